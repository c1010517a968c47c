"""Attention kernels against the plain path, which test_attention.py holds to a plain softmax."""

import functools
import types as types_lib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import refusals
from unigrpo_jax import types
from unigrpo_jax.models import attention, bagel, kernels, lowering
from unigrpo_jax.runtime import sharding

splash = functools.partial(kernels.splash, interpret=True)
# cuDNN runs on GPUs only; what stands around it is the same around jax's own attention.
cudnn = functools.partial(kernels.cudnn, implementation="xla")
HEADS, KV_HEADS, HEAD_DIM, LAST = 4, 2, 16, 7


def _problem(lengths, *, rows=4, queries=40, key_rows=None, seed=0):
  """Queries of one reach a row, some blind, and parts of keys, half of them out of reach."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q = normal(rows, queries, HEADS, HEAD_DIM)
  # A reach of its own for every row; row 1 sees only the keys that everyone sees.
  reach = np.tile(LAST + np.arange(rows)[:, None], (1, queries)).astype(np.int32)
  reach[1] = types.OWN
  reach[:, 3], reach[0, -5:] = types.BLIND, types.BLIND
  parts = []
  for count, length in zip(key_rows or [rows] * len(lengths), lengths):
    order = rng.integers(types.OWN, 2 * LAST, (count, length)).astype(np.int32)
    order[:, -1] = types.UNSEEN
    keys = normal(count, KV_HEADS, length, HEAD_DIM), normal(count, KV_HEADS, length, HEAD_DIM)
    parts.append(attention.Keys(*keys, jnp.asarray(order)))
  return q, jnp.asarray(reach), parts


def _both(attend, q, reach, parts):
  """Output, and gradients by queries, keys and values of a weighted sum of it."""
  weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

  def loss(q, kvs):
    out = attend(q, reach, [attention.Keys(*kv, part.order) for kv, part in zip(kvs, parts)])
    return (out * weight).sum(), out

  grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(q, [(p.k, p.v) for p in parts])
  return out, grads


# name: lengths of the parts, options of the problem. Blocks of 128 at most, to have several.
PROBLEMS = {
  "one part": ([40], {}),
  "two parts over several blocks": ([150, 120], dict(queries=140)),
  "whole blocks": ([128], dict(queries=128)),
  "shared by rows": ([30, 20, 10], dict(key_rows=[4, 2, 1])),
}


@pytest.mark.parametrize("attend", [splash, cudnn], ids=["splash", "cudnn"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_values_and_gradients_equal_the_plain_path(monkeypatch, attend, problem):
  monkeypatch.setattr(kernels, "QUERY_BLOCK", 128)
  monkeypatch.setattr(kernels, "KEY_BLOCK", 128)
  lengths, options = problem
  q, reach, parts = _problem(lengths, **options)
  want = _both(functools.partial(attention.attend, precision="highest"), q, reach, parts)
  got = _both(attend, q, reach, parts)
  chex.assert_trees_all_close(got, want, atol=5e-6, rtol=1e-5)
  assert (got[0][:, 3] == 0).all() and (got[0][0, -5:] == 0).all()
  assert np.abs(got[0][:, 0]).min() > 0


@pytest.mark.parametrize("attend", [splash, cudnn], ids=["splash", "cudnn"])
def test_a_row_that_sees_nothing_gives_zero_and_moves_nothing(attend):
  q, reach, [keys] = _problem([40], rows=3)
  reach = reach.at[1].set(types.BLIND)
  keys = keys._replace(order=keys.order.at[2].set(types.UNSEEN))
  out, (by_q, [(by_k, by_v)]) = _both(attend, q, reach, [keys])
  chex.assert_tree_all_finite((out, by_q, by_k, by_v))
  for array in (out, by_q, by_k, by_v):
    assert (array[1:] == 0).all() and (array[0] != 0).any()


def test_cudnn_masks_each_query():
  """Its queries may have any reach: causal text is its too. An odd number of both."""
  q, _, parts = _problem([33], queries=33)
  reach = jnp.asarray(np.random.default_rng(1).integers(types.BLIND, LAST, (4, 33)), jnp.int32)
  want = _both(functools.partial(attention.attend, precision="highest"), q, reach, parts)
  chex.assert_trees_all_close(_both(cudnn, q, reach, parts), want, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
  "rows, key_rows", [(4, [4, 2]), (3, [3, 1])], ids=["divided", "rows that do not divide"]
)
def test_sharded_equals_unsharded(rows, key_rows):
  """4 rows and 2 key-value heads over 2 x 2 x 2 devices; 2 or 3 rows do not divide over 4."""
  q, reach, parts = _problem([40, 30], rows=rows, key_rows=key_rows)
  want = _both(splash, q, reach, parts)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with sharding.activate(mesh):
    got = _both(splash, q, reach, parts)
    text = jax.jit(splash).lower(q, reach, parts).compile().as_text()
  chex.assert_trees_all_close(got, want, atol=1e-6)
  if rows == 4:
    # Of each device's own rows and heads: [1 row, 2 of 4 heads, 128 padded queries, head dim].
    assert "f32[1,2,128,16]" in text and "f32[4,4,128,16]" not in text


def test_dtype_is_the_queries_and_bfloat16_is_near():
  q, reach, parts = jax.tree.map(
    lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, _problem([40, 30])
  )
  exact = lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
  want = attention.attend(exact(q), reach, jax.tree.map(exact, parts), precision="highest")
  got = splash(q, reach, parts)
  assert got.dtype == jnp.bfloat16
  # Rounded are the scaled queries and the result, of up to 2.8, by 2^-9 each.
  np.testing.assert_allclose(exact(got), want, atol=1e-2)


def test_lowers_for_a_tpu_at_the_released_sizes():
  """Forward and backward, among the latents of 1,024 pixels and the patches of 980."""
  for length, context, heads, kv_heads, width in ((4098, 1534, 28, 4, 128), (4900, 0, 16, 16, 72)):
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)
    keys = [array(kv_heads, n, width) for n in (length, context) if n]
    order = [jax.ShapeDtypeStruct((1, k.shape[2]), jnp.int32) for k in keys]

    def loss(q, keys, order, reach):
      parts = [attention.Keys(k, k, o) for k, o in zip(keys, order)]
      out = attention.attend(q, reach, parts, backend="splash", one_reach=True)
      return (out.astype(jnp.float32) ** 2).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(
      array(length, heads, width), keys, order, jax.ShapeDtypeStruct((1, length), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # The forward kernel, and one each for the gradients of queries and of keys and values.
    assert text.count("@tpu_custom_call") == 3


def test_blocks():
  sizes = [kernels.block_size(length, 1536) for length in (1, 128, 129, 512, 1025, 4098)]
  assert sizes == [128, 128, 256, 512, 1152, 1408]
  assert kernels.block_size(5632, 512) == 512 and kernels.block_size(4098, 512) == 384


def _mesh(platform, devices=1):
  """As much of a mesh as the choice looks at."""
  device = types_lib.SimpleNamespace(platform=platform)
  return types_lib.SimpleNamespace(devices=np.array([device] * devices), size=devices)


def test_the_lowering_fits_the_devices_and_the_dtype():
  choose = lambda name, platform, dtype, *devices: lowering.choose(
    name, _mesh(platform, *devices), dtype
  )
  for name, platform, dtype, devices, attends in (
    ("auto", "tpu", "bfloat16", 4, "splash"), ("auto", "tpu", "float32", 4, "plain"),
    ("auto", "gpu", "bfloat16", 4, "plain"), ("cudnn", "gpu", jnp.bfloat16, 4, "cudnn"),
    ("auto", "cpu", "float32", 1, "blocked"), ("auto", "cpu", "bfloat16", 1, "plain"),
    ("auto", "cpu", "float32", 8, "plain"), ("plain", "tpu", "bfloat16", 4, "plain"),
  ):
    chosen = choose(name, platform, dtype, devices)
    assert chosen.attention == attends
    # Several CPU devices would deadlock in a loop over layers; accelerators keep it.
    assert chosen.unroll == (platform == "cpu" and devices > 1)
    assert chosen.unroll_gradients == (platform == "cpu")
    assert chosen.own_gradients == (platform == "cpu" and dtype == "float32")
    assert chosen.keep_angles == (platform == "cpu")
  for name, platform, dtype, devices, words in (
    ("splash", "cpu", "bfloat16", 1, "config.attention='splash' runs on a tpu"),
    ("cudnn", "tpu", "bfloat16", 1, "config.attention='cudnn' runs on a gpu"),
    ("splash", "tpu", "float32", 1, "config.attention='splash' is not exact in config.dtype="),
    ("blocked", "cpu", "float32", 8, "config.attention='blocked' is for one device, but there are"),
    ("blocked", "cpu", "bfloat16", 1, "config.attention='blocked' is for config.dtype=float32"),
    ("flash", "cpu", "float32", 1, "config.attention='flash'"),
  ):
    assert words in refusals.refusal(choose, name, platform, dtype, devices)


@pytest.fixture
def calls(monkeypatch):
  """Lets the kernel serve even tiny images; lists the number of queries of each call traced."""
  lengths = []

  def counted(q, reach, parts):
    lengths.append(q.shape[1])
    return splash(q, reach, parts)

  monkeypatch.setattr(kernels, "LEAST_QUERIES", 2)
  monkeypatch.setattr(kernels, "splash", counted)
  return lengths


def test_network_attends_by_it_among_images_only(config, model, params, calls):
  """Text and two images as the ViT and the VAE see them, then velocities and their gradient."""
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(3, 250, (2, 5)), jnp.int32)
  pixels = jnp.asarray(rng.normal(size=(2, 4, config.vit.patch_dim)), jnp.float32)
  places = jnp.tile(jnp.arange(4), (2, 1))
  some = jnp.arange(4) < jnp.array([[4], [3]])
  grid = types.LatentGrid(places, some)
  latents, x = jnp.asarray(rng.normal(size=(2, 2, 4, config.latent_dim)), jnp.float32)

  def run(network, values):
    call = lambda method, *args: network.apply({"params": values}, *args, method=method)
    context = bagel.empty_context(config, 2, 20, jnp.float32)
    context, _ = call("append_text", context, ids, ids > 0)
    context = call("append_patches", context, types.Patches(pixels, places, some))
    context = call("append_latents", context, latents, grid)
    # The gradient is that of the velocities only. Each row's two images share its context.
    context = jax.lax.stop_gradient(context)
    twice = lambda a: jnp.repeat(a, 2, axis=0)
    v_t = call("velocity", context, twice(x), jnp.linspace(0.2, 1, 4), jax.tree.map(twice, grid))
    return (v_t**2).sum(), v_t

  found = [
    jax.jit(jax.value_and_grad(functools.partial(run, network), has_aux=True))(params["bagel"])
    for network in (model, model.clone(lowering=lowering.Lowering("splash")))
  ]
  # The tower's patches; patches, clean and noisy latents with their two markers.
  assert set(calls) == {4, 6}
  chex.assert_trees_all_close(*found, atol=2e-5, rtol=1e-4)
