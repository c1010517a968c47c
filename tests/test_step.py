"""The supervised step: microbatches add up, masked rows count for nothing, and it learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import types
from unigrpo_jax.algorithms import update
from unigrpo_jax.episodes import packing
from unigrpo_jax.models import bagel
from unigrpo_jax.runtime import optim, sharding
from unigrpo_jax.supervised import step

WEIGHTS = dict(ce_weight=0.5, mse_weight=2.0, label_chunk=3)
PAD_TO = packing.PadTo(
  tokens=32, labels=8, patches=4, images=8, clean=4, latents=4, noisy=2
)

TOLERANCE = 2e-6  # Absolute, beside 1e-4 relative: float32 sums in another order.


def _batch(config, rows, seed=0):
  """Rows of text with labels, a ViT image, a clean image and two noisy ones."""
  rng = np.random.default_rng(seed)
  grid = np.array([0, 1, 8, 9])
  latents = lambda: rng.normal(size=(4, config.latent_dim)).astype(np.float32)
  samples = []
  for row in range(rows):
    ids = rng.integers(3, 250, 4 + row % 3).astype(np.int32)
    pixels = rng.uniform(-1, 1, (4, config.vit.patch_dim)).astype(np.float32)
    target = latents()
    samples.append([
      packing.CleanImage(latents(), grid), packing.PatchImage(pixels, grid),
      packing.Text(ids, packing.next_token_labels(ids)),
      *[packing.NoisyImage(target, latents(), 0.3 + 0.2 * k, grid) for k in range(2)],
    ])
  return packing.pack(samples, image_markers=(285, 286), pad_to=PAD_TO)


def _stack(*batches):
  return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def _gradient(model, params, batches):
  """Loss and gradient of a stack of microbatches, as the step accumulates them."""
  def loss(params):
    total = 0.0
    shares = step.shares(batches)
    for i in range(len(batches.und_ids)):
      pick = lambda a, i=i: a[i]
      value, _ = step.supervised_loss(
        model, params, jax.tree.map(pick, batches), jax.tree.map(pick, shares), **WEIGHTS
      )
      total += value
    return total

  return jax.jit(jax.value_and_grad(loss))(params)


def test_microbatches_add_up_to_the_whole_batch(config, model, params):
  whole = _batch(config, 4)
  # The same four rows in two microbatches: rows by hand, images by the row they belong to.
  halves = []
  for part in (slice(0, 2), slice(2, 4)):
    fields = {
      name: getattr(whole, name)[part] for name in whole.__dataclass_fields__
      if name not in ("vit", "vit_row", "vit_slot")
    }
    vit = jax.tree.map(lambda a, part=part: a[part], whole.vit)
    halves.append(types.PackedBatch(
      **fields, vit=vit, vit_row=whole.vit_row[part] - part.start, vit_slot=whole.vit_slot[part]))
  got = _gradient(model, params["bagel"], _stack(*halves))
  want = _gradient(model, params["bagel"], _stack(whole))
  chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_it_learns_and_leaves_frozen_groups_alone(config, model, params):
  trained = {*optim.GROUPS} - {"und", "base"}
  schedules = {group: (lambda _: 3e-3) if group in trained else None for group in optim.GROUPS}
  optimizer = optim.adamw_by_group(
    schedules, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
  )
  start = jax.tree.map(jnp.array, params["bagel"])
  copy = jax.tree.map(jnp.array, start)
  state = types.TrainState(jnp.int32(0), start, optimizer.init(start), copy)
  run = jax.jit(step.make_supervised_step(
    model, optimizer, trained=trained, ema_decay=0.9, **WEIGHTS
  ))
  batches, losses = _stack(_batch(config, 2)), []
  for _ in range(8):
    state, values = run(state, batches)
    losses.append(float(values["ce"] + values["mse"]))
  assert losses[-1] < 0.8 * losses[0] and int(state.step) == 8
  old, new, ema = (optim_leaves(tree) for tree in (params["bagel"], state.params, state.ema))
  for group in old:
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(old[group], new[group]))
    assert (moved > 0) == (group != "und"), group
  # The average lags behind: it lies between where training began and where it is.
  behind = sum(float(jnp.abs(a - b).sum()) for a, b in zip(ema["gen"], new["gen"]))
  assert 0 < behind < sum(float(jnp.abs(a - b).sum()) for a, b in zip(old["gen"], new["gen"]))
  assert set(values) == {"ce", "mse", *(f"grad_norm/{group}" for group in trained)}


def _steps(model, mesh_sizes, batches, steps=2):
  """State and metrics after a few steps on a mesh, from the same random weights."""
  count = int(np.prod(list(mesh_sizes.values())))
  mesh = sharding.make_mesh(**mesh_sizes, devices=jax.devices()[:count])
  # A large epsilon: an update is then as exact as its gradient, and not the sign of a rounding.
  optimizer = optim.adamw_by_group(
    dict.fromkeys(optim.GROUPS, lambda _: 1e-2), b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.1,
    clip_norm=1.0,
  )

  def fresh(key):
    params = model.init(key, bagel.example_batch(model.config))["params"]
    return types.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  places = sharding.shardings(jax.eval_shape(fresh, jax.random.key(0)), mesh)
  run = jax.jit(
    step.make_supervised_step(
      model, optimizer, trained={*optim.GROUPS} - {"base"}, ema_decay=0.9, **WEIGHTS
    ),
    out_shardings=(places, None),
  )
  with sharding.activate(mesh):
    metrics = None
    state = jax.device_put(sharding.unbox(jax.jit(fresh)(jax.random.key(0))), places)
    batches = jax.device_put(batches, sharding.along_batch(mesh, axis=1))
    for _ in range(steps):
      state, metrics = run(state, batches)
  return jax.block_until_ready((state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh_sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=["fsdp8", "2x2x2"]
)
def test_sharded_steps_equal_those_of_one_device(config, model, one_device_steps, mesh_sizes):
  """Two steps of two microbatches, to float32 rounding."""
  batches, want, start = one_device_steps
  got = _steps(model, mesh_sizes, batches)
  state = got[0]
  kernel = state.params["layers"]["gen"]["mlp"]["gate"]["kernel"]
  ways = mesh_sizes.get("tensor", 1) * mesh_sizes["fsdp"]
  assert kernel.addressable_shards[0].data.size * ways == kernel.size
  chex.assert_trees_all_close(
    jax.device_get(got), jax.device_get(want), rtol=1e-4, atol=TOLERANCE
  )
  # What two steps change is far larger than what is tolerated, in every group.
  for group, (old, new) in _pairs(start.params, state.params).items():
    assert max(float(np.abs(a - b).max()) for a, b in zip(old, new)) > 100 * TOLERANCE, group


@pytest.fixture(scope="module")
def one_device_steps(config, model):
  """(batches, what two steps on one device make of them, the state before)."""
  batches = _stack(_batch(config, 8, seed=0), _batch(config, 8, seed=1))
  want = _steps(model, dict(data=1), batches)
  return batches, want, _steps(model, dict(data=1), batches, steps=0)[0]


def _pairs(a, b):
  a, b = optim_leaves(jax.device_get(a)), optim_leaves(jax.device_get(b))
  return {group: (a[group], b[group]) for group in a}


def optim_leaves(tree):
  by_group = {group: [] for group in optim.GROUPS if group != "base"}  # no adapters here
  for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(optim.groups(tree))):
    by_group[group].append(leaf)
  return by_group


def test_the_ema_starts_from_what_there_is():
  """Step 0 averages with decay 1/10 whatever the decay: not 99.9 % of the random start."""
  params = {"layers": {"und": jnp.ones(1)}}
  optimizer = optim.adamw_by_group(
    dict.fromkeys(optim.GROUPS), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.0, clip_norm=1.0
  )
  state = types.TrainState(
    jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params))
  state, norms = update.apply_gradients(
    state, jax.tree.map(jnp.zeros_like, params), optimizer, ema_decay=0.999, trained={"und"}
  )
  assert norms == {"grad_norm/und": 0}
  assert float(state.ema["layers"]["und"][0]) == pytest.approx(0.9)
