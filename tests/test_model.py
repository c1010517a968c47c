"""The network: padding and neighbours, packed mask, caches, sharding, compilation, real shapes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import packed_reference
from unigrpo_jax import types
from unigrpo_jax.episodes import programs
from unigrpo_jax.models import bagel, lowering
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import sharding

ATOL = 2e-5


@pytest.fixture(scope="module")
def call(model, params):
  """call(method)(*args): the method, jitted, on the golden weights."""

  @functools.cache
  def jitted(method):
    return jax.jit(functools.partial(model.apply, {"params": params["bagel"]}, method=method))

  return jitted


def _pad(rows, length):
  ids = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  for row, values in enumerate(rows):
    ids[row, : len(values)], mask[row, : len(values)] = values, True
  return ids, mask


def _texts(rng, count):
  return [rng.integers(3, 250, rng.integers(1, 9)) for _ in range(count)]


def _grid(config, sizes, length):
  side = config.max_latent_size
  return types.LatentGrid(*_pad([
    (np.arange(h)[:, None] * side + np.arange(w)).ravel() for h, w in sizes], length))


@pytest.mark.parametrize("seed", range(3))
def test_a_row_ignores_padding_and_neighbours(config, call, seed):
  """Two texts, a clean image and a velocity: batched under random padding equals alone."""
  rng = np.random.default_rng(seed)
  rows = 3
  first, second = _texts(rng, rows), _texts(rng, rows)
  sizes = [tuple(rng.integers(1, 4, 2)) for _ in range(rows)]
  clean_sizes = [tuple(rng.integers(1, 4, 2)) for _ in range(rows)]
  clean = rng.normal(size=(rows, 9, config.latent_dim)).astype(np.float32)
  x = rng.normal(size=(rows, 9, config.latent_dim)).astype(np.float32)
  t = rng.uniform(size=rows).astype(np.float32)

  def run(which, extra):
    pick = lambda values: [values[i] for i in which]
    length = lambda values: max(len(v) for v in values) + extra
    tokens = lambda sizes: max(h * w for h, w in sizes) + extra
    context = bagel.empty_context(config, len(which), 64, jnp.float32)
    context, _ = call("append_text")(context, *_pad(pick(first), length(pick(first))))
    count = tokens(pick(clean_sizes))
    cut = lambda a, n: np.pad(a, ((0, 0), (0, extra), (0, 0)))[:, :n]
    # What lies in the padding must not matter.
    grid = _grid(config, pick(clean_sizes), count)
    latents = cut(clean[which], count) + 7.0 * ~grid.mask[..., None]
    context = call("append_latents")(context, latents, grid)
    context, hidden = call("append_text")(context, *_pad(pick(second), length(pick(second))))
    count = tokens(pick(sizes))
    velocity = call("velocity")(context, cut(x[which], count), t[which],
                                _grid(config, pick(sizes), count))
    return [(hidden[i, : len(second[row])], velocity[i, : np.prod(sizes[row])])
            for i, row in enumerate(which)]

  together = run([2, 0, 1], int(rng.integers(0, 5)))
  for row, got in zip([2, 0, 1], together):
    chex.assert_trees_all_close(got, run([row], 0)[0], atol=ATOL)


def test_patches_of_different_sizes_in_one_batch(config, call):
  rng = np.random.default_rng(0)
  sizes = [(2, 3), (1, 1), (3, 2)]
  pixels = rng.uniform(-1, 1, (3, 8, config.vit.patch_dim)).astype(np.float32)

  def run(which, length):
    side = config.vit_max_patches_per_side
    ids, mask = _pad([(np.arange(sizes[i][0])[:, None] * side + np.arange(sizes[i][1])).ravel()
                      for i in which], length)
    context = bagel.empty_context(config, len(which), 32, jnp.float32)
    context = call("append_patches")(context, types.Patches(pixels[which][:, :length], ids, mask))
    assert (context.position == 1).all()
    ids, mask = _pad([[5, 6, 7]] * len(which), 3)
    return call("append_text")(context, ids, mask)[1]

  together = run([0, 1, 2], 8)
  for row in range(3):
    np.testing.assert_allclose(together[row], run([row], 6)[0], atol=ATOL)


def _random_sample(rng):
  """Splits of one sequence: (mode, tokens that the generation expert takes)."""
  splits = []
  for _ in range(rng.integers(3, 7)):
    mode = rng.choice(["causal", "full", "noise"])
    splits.append((mode, 0 if mode == "causal" else int(rng.integers(1, 5))))
  return splits + [("noise", 2)]


@pytest.mark.parametrize("seed", range(4))
def test_decomposed_attention_equals_the_packed_mask(config, params, model, seed):
  """Context rows plus one row a noisy image equal one sequence under one dense mask."""
  rng = np.random.default_rng(seed)
  splits = _random_sample(rng)
  lengths = [int(rng.integers(1, 6)) if m == "causal" else n + 2 for m, n in splits]
  modes = [m for m, _ in splits]
  starts = np.concatenate([[0], np.cumsum(lengths)])
  total = starts[-1]
  is_gen = np.zeros(total, bool)
  for (mode, _), start, stop in zip(splits, starts, starts[1:]):
    is_gen[start + 1 : stop - 1] = mode != "causal"
  x = rng.normal(size=(total, config.llm.hidden_size)).astype(np.float32)
  position = rng.integers(0, 40, total)
  mask = packed_reference.dense_mask(lengths, modes)
  want = packed_reference.decoder(params["bagel"], config.llm, x, is_gen, position, mask)

  split_of = np.repeat(np.arange(len(splits)), lengths)
  mode_of = np.array(modes)[split_of]
  noisy = mode_of == "noise"
  reach = np.where(mode_of == "causal", np.arange(total), starts[split_of + 1] - 1)
  run = functools.partial(model.apply, {"params": params["bagel"]}, method="decode")

  def tokens(places, order, reach):
    pick = lambda a: jnp.asarray(a)[None]
    return types.Tokens(pick(x[places]), pick(position[places]), pick(order), pick(reach)), places

  def stream(places):
    return tokens(places, places, reach[places]) if len(places) else (None, places)

  und, und_at = stream(np.flatnonzero(~noisy & ~is_gen))
  gen, gen_at = stream(np.flatnonzero(~noisy & is_gen))
  got = np.zeros_like(want)
  context = None
  if und is not None or gen is not None:
    und_out, gen_out, kv = run(und, gen, None, keep_kv=True)
    order = jnp.concatenate([s.order for s in (und, gen) if s is not None], axis=1)
    context = types.Context(*kv, order=order, position=None, cursor=None)
    for out, places in ((und_out, und_at), (gen_out, gen_at)):
      if out is not None:
        got[places] = out[0]
  for start, stop, mode in zip(starts, starts[1:], modes):
    if mode == "noise":
      own = np.arange(start, stop)
      und, und_at = tokens(own[[0, -1]], np.full(2, types.OWN), np.full(2, start - 1))
      count = stop - start - 2
      gen, gen_at = tokens(own[1:-1], np.full(count, types.OWN), np.full(count, start - 1))
      und_out, gen_out, _ = run(und, gen, context)
      got[und_at], got[gen_at] = und_out[0], gen_out[0]
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_images_of_a_group_share_one_context(config, call):
  rng = np.random.default_rng(0)
  context = bagel.empty_context(config, 2, 16, jnp.float32)
  context, _ = call("append_text")(context, *_pad(_texts(rng, 2), 9))
  x = rng.normal(size=(6, 4, config.latent_dim)).astype(np.float32)
  t = rng.uniform(size=6).astype(np.float32)
  grid = _grid(config, [(2, 2)] * 6, 4)
  repeated = context.replace(
    k=jnp.repeat(context.k, 3, 1), v=jnp.repeat(context.v, 3, 1),
    order=jnp.repeat(context.order, 3, 0), position=jnp.repeat(context.position, 3),
  )
  np.testing.assert_allclose(
    call("velocity")(context, x, t, grid), call("velocity")(repeated, x, t, grid), atol=ATOL
  )


def test_an_earlier_context_is_the_same_cache(config, call):
  rng = np.random.default_rng(0)
  early, _ = call("append_text")(
    bagel.empty_context(config, 1, 16, jnp.float32), *_pad([[4, 5, 6]], 3))
  late, _ = call("append_text")(early, *_pad([[7, 8]], 4))
  x = rng.normal(size=(1, 4, config.latent_dim)).astype(np.float32)
  velocity = lambda c: call("velocity")(c, x, np.ones(1, np.float32), _grid(config, [(2, 2)], 4))
  np.testing.assert_allclose(velocity(late.as_of(early.mark())), velocity(early), atol=1e-6)
  assert np.abs(velocity(late) - velocity(early)).max() > 1e-3


def test_an_inactive_row_stays_as_it_was(config, call):
  context, _ = call("append_text")(
    bagel.empty_context(config, 2, 16, jnp.float32), *_pad([[4, 5], [6, 7, 8]], 3))
  after, _ = call("append_text")(context, np.array([[9], [9]]), np.array([[True], [False]]))
  assert after.position.tolist() == [3, 3]
  np.testing.assert_array_equal(after.order[1, :4], [0, 1, 2, types.UNSEEN])
  assert after.order[0, 3] == 3 and after.cursor == 4


def _flops(fn, *args):
  return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_an_absent_stream_costs_nothing(config, model, params):
  """Text through both experts' weights costs what it costs through its own."""
  tokens = types.Tokens(jnp.ones((1, 6, config.llm.hidden_size)), *[jnp.zeros((1, 6), int)] * 3)
  text = lambda p: model.apply({"params": p}, tokens, None, None, method="decode")[0]
  full = params["bagel"]
  und_only = full | {"layers": {"und": full["layers"]["und"]}, "norm": {"und": full["norm"]["und"]}}
  assert _flops(text, full) == _flops(text, und_only)
  # And the sum of both streams is what each costs, plus the attention that they share.
  both = lambda p: model.apply({"params": p}, tokens, tokens, None, method="decode")[:2]
  gen = lambda p: model.apply({"params": p}, None, tokens, None, method="decode")[1]
  apart = _flops(text, full) + _flops(gen, full)
  assert apart <= _flops(both, full) < 1.2 * apart


def test_writing_does_not_copy_the_cache(config):
  """The whole decoding loop with a donated cache: temporaries are a layer's slices, no more."""
  layers = 12
  config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, num_layers=layers))
  model = bagel.Bagel(config, (285, 286), dtype=jnp.float32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), bagel.example_batch(config))
  context = jax.eval_shape(lambda: bagel.empty_context(config, 4, 4096, jnp.float32))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
  compiled = programs.decode_text.lower(
    model, _unboxed(boxed)["params"], context, keys, jnp.ones(4, bool),
    start_id=1, end_id=2, max_tokens=8, temperature=1.0,
  ).compile()
  memory = compiled.memory_analysis()
  cache = context.k.size * 4 * 2
  assert memory.alias_size_in_bytes >= cache
  # A copy of the keys alone would be half of it; a layer of both is a twelfth.
  assert memory.temp_size_in_bytes < 0.3 * cache


def test_bfloat16_keeps_latents_in_float32(config, params):
  model = bagel.Bagel(config, (285, 286), dtype=jnp.bfloat16)
  context = bagel.empty_context(config, 1, 8)
  apply = functools.partial(model.apply, {"params": params["bagel"]})
  context, hidden = apply(context, *_pad([[4, 5, 6]], 3), method="append_text")
  assert hidden.dtype == context.k.dtype == jnp.bfloat16
  x = jnp.ones((1, 4, config.latent_dim))
  velocity = apply(context, x, jnp.ones(1), _grid(config, [(2, 2)], 4), method="velocity")
  assert velocity.dtype == jnp.float32
  exact = bagel.Bagel(config, (285, 286), dtype=jnp.float32)
  apply = functools.partial(exact.apply, {"params": params["bagel"]})
  context = bagel.empty_context(config, 1, 8, jnp.float32)
  context, _ = apply(context, *_pad([[4, 5, 6]], 3), method="append_text")
  want = apply(context, x, jnp.ones(1), _grid(config, [(2, 2)], 4), method="velocity")
  # The reference code's own bf16 run deviates by 1.2 % on such weights.
  assert 1e-4 < jnp.linalg.norm(velocity - want) / jnp.linalg.norm(want) < 0.03


def _unboxed(tree):
  from flax import linen as nn

  return nn.meta.unbox(tree)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(config, model, params, shape):
  mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, shape)))
  boxed = jax.eval_shape(model.init, jax.random.key(0), bagel.example_batch(config))["params"]
  placed = jax.device_put(params["bagel"], sharding.shardings(boxed, mesh))
  rng = np.random.default_rng(0)
  texts, x = _pad(_texts(rng, 8), 8), rng.normal(size=(8, 4, config.latent_dim)).astype("f")
  grid = _grid(config, [(2, 2)] * 8, 4)

  def forward(p, ids, mask, x):
    context = bagel.empty_context(config, 8, 8, jnp.float32)
    run = functools.partial(model.apply, {"params": p})
    context, hidden = run(context, ids, mask, method="append_text")
    return run(hidden, method="logits"), run(context, x, jnp.ones(8), grid, method="velocity")

  want = jax.jit(forward)(params["bagel"], *texts, x)
  with sharding.activate(mesh):
    rows = sharding.along_batch(mesh)
    compiled = jax.jit(forward).lower(placed, *jax.device_put((*texts, x), rows)).compile()
    got = compiled(placed, *jax.device_put((*texts, x), rows))
  assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)) or (
    shape == (8, 1, 1))
  chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), atol=ATOL)


def test_repeated_calls_compile_once(config, model, params, compilations):
  """Other lengths under the same padding, and a context that has moved on: the same program."""
  step = jax.jit(functools.partial(model.apply, method="append_text"))
  # Where the weights are, as it is when a program made it.
  context = jax.device_put(bagel.empty_context(config, 2, 32, jnp.float32), jax.devices()[0])
  compilations.clear()
  for size in (3, 1, 2):
    context, _ = step({"params": params["bagel"]}, context, *_pad([[4] * size, [5, 6]], 4))
  assert len(compilations) == 1


def test_seven_billion_forward_and_backward_trace_on_shapes():
  """The released sizes at 1024 px: every shape agrees, forward and backward, nothing allocated."""
  config = config_lib.bagel_7b()
  model = bagel.Bagel(config, (151652, 151653))
  params = _unboxed(jax.eval_shape(model.init, jax.random.key(0), bagel.example_batch(config)))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == 14_607_260_128
  rows, text, tokens, images = 2, 1184, 4096, 3
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  latents = floats(rows, images, tokens, config.latent_dim)
  batch = types.PackedBatch(
    und_ids=ints(rows, text), und_position=ints(rows, text), und_order=ints(rows, text),
    und_reach=ints(rows, text), label_slot=ints(rows, 1024), label_ids=ints(rows, 1024),
    label_weight=floats(rows, 1024), target=latents, noise=latents, t=floats(rows, images),
    noisy_ids=ints(rows, images, tokens), noisy_position=ints(rows, images),
    noisy_mask=jax.ShapeDtypeStruct((rows, images, tokens), bool),
    noisy_reach=ints(rows, images),
  )

  def loss(params, batch):
    hidden, velocity = model.apply(params, batch, method="packed")
    assert hidden.shape == (rows, 1024, 3584) and velocity.shape == latents.shape
    return jnp.mean(velocity**2) + jnp.mean(hidden.astype(jnp.float32) ** 2)

  grads = jax.eval_shape(jax.grad(loss), params, batch)
  assert jax.tree.map(lambda a: a.shape, grads) == jax.tree.map(lambda a: a.shape, params)


def test_layers_one_after_the_other_are_the_loop(config, model, params):
  ids, mask = _pad([[5, 6, 7, 8]], 6)

  def read(unroll):
    network = model.clone(lowering=lowering.Lowering(unroll=unroll))
    fn = functools.partial(network.apply, method="read_text")
    compiled = jax.jit(fn).lower({"params": params["bagel"]}, ids, mask).compile()
    return compiled({"params": params["bagel"]}, ids, mask)[1], compiled.as_text()

  (looped, loop), (straight, text) = read(False), read(True)
  assert " while(" in loop and " while(" not in text
  np.testing.assert_allclose(straight[:, :4], looped[:, :4], atol=ATOL)


def test_layers_are_taken_apart_and_put_together_again(config, model, params):
  """Where they are unrolled; their gradient is put together once, not added up by layer."""
  ids, mask = _pad([[5, 6, 7, 8]], 6)
  looped, straight = (
    model.clone(lowering=lowering.Lowering(unroll=unroll), remat="none") for unroll in (False, True)
  )
  stacked = params["bagel"]
  assert looped.unstacked(stacked) is stacked and looped.stacked(stacked) is stacked
  apart = straight.unstacked(stacked)
  chex.assert_trees_all_equal(straight.stacked(apart), stacked)

  def loss(params):
    read = functools.partial(straight.apply, {"params": params}, method="read_text")
    context, _ = read(ids, mask)
    return read(ids, mask, context)[1].sum()

  gradient = jax.jit(jax.grad(loss))
  got, want = straight.stacked(gradient(apart)), gradient(stacked)
  for off, of in zip(*map(jax.tree.leaves, (jax.tree.map(jnp.subtract, got, want), want))):
    assert jnp.linalg.norm(off) <= 2e-6 * jnp.linalg.norm(of)
  assert " pad(" not in gradient.lower(stacked).as_text("hlo")  # nothing as large as all layers
