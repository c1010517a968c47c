"""What is written for CPUs: its gradients against float64, and those of the network with JAX's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import types
from unigrpo_jax.models import attention, layers, lowering, plain

# Of the norm of a gradient.
EXACT = 2e-6
CPU = lowering.Lowering("blocked", unroll_gradients=True, own_gradients=True, keep_angles=True)


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def _assert_exact(function, reference, *args):
  """Value and gradients of `function` in float32 are those of `reference` in float64."""
  seed = np.random.default_rng(9).normal(size=jax.eval_shape(function, *args).shape)

  def grads(fn, *args):
    weigh = lambda *args: jnp.sum(fn(*args) * seed.astype(args[0].dtype))
    return jax.jit(jax.value_and_grad(weigh, tuple(range(len(args)))))(*args)

  got = grads(function, *args)
  with jax.enable_x64(True):
    wanted = grads(reference, *(np.asarray(a, np.float64) for a in args))
    wanted = jax.tree.map(np.asarray, wanted)
  assert wanted[0].dtype == np.float64
  for mine, true in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    assert np.linalg.norm(mine - true) <= EXACT * np.linalg.norm(true)


@pytest.mark.parametrize("inputs, x_shape, kernel_shape", [
  (1, (3, 5, 4), (4, 9)), (1, (3, 5, 9), (9, 4)), (1, (7, 4), (4, 2, 3)),
  (2, (3, 5, 2, 6), (2, 6, 4)),
], ids=["wider", "narrower", "to heads", "from heads"])
def test_product(inputs, x_shape, kernel_shape):
  rng = np.random.default_rng(0)
  letters = ("ab"[: len(x_shape) - inputs], "xy"[:inputs], "pq"[: len(kernel_shape) - inputs])
  rows, inner, outer = letters
  _assert_exact(
    lambda x, kernel: layers.product(x, kernel, inputs),
    lambda x, kernel: jnp.einsum(f"{rows}{inner},{inner}{outer}->{rows}{outer}", x, kernel),
    _normal(rng, *x_shape), _normal(rng, *kernel_shape),
  )


def test_gated():
  rng = np.random.default_rng(1)
  _assert_exact(
    layers.gated, lambda gate, up: jax.nn.silu(gate) * up,
    *(3 * _normal(rng, 2, 40, 30) for _ in range(2)),
  )


@pytest.mark.parametrize("keep", [False, True])
def test_rotate(keep):
  rng = np.random.default_rng(2)
  position = np.array([[0, 1, 7, 300]])

  def rotate(x):
    angle = position[..., None, None] * 1e4 ** (-np.arange(8) / 8)
    first, second = x[..., :8], x[..., 8:]
    return jnp.concatenate([
      first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    ], axis=-1)

  # The angles themselves are float32's.
  x = _normal(rng, 3, 4, 2, 16)
  grad = lambda fn: jax.grad(lambda x: jnp.sum(fn(x) * x[:, ::-1]))(x)
  by = attention.rotation(jnp.asarray(position), 16, 1e4, keep=keep)
  chex.assert_trees_all_equal(by, attention.rotation(jnp.asarray(position), 16, 1e4))
  got = grad(lambda x: attention.rotate(x, by))
  np.testing.assert_allclose(got, grad(rotate), atol=3e-5)


def _dense(q, reach, k, v, order):
  """Softmax attention over keys of each row's own, [B, S, K, H], with all scores at once."""
  heads = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, heads, axis=2) for a in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
  visible = (order[:, None] <= reach[..., None])[:, None]
  weights = jnp.where(visible, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
  total = weights.sum(-1, keepdims=True)
  return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total > 0, total, 1.0), v)


@pytest.mark.parametrize("many, scores, loops", [
  (1000, 1 << 30, 0), (3, 1 << 30, 0), (3, 5000, 1), (3, 300, 2),
], ids=["shared", "repeated", "blocks of rows", "blocks of queries"])
def test_blocked_attention(many, scores, loops, monkeypatch):
  """Own keys and those of a context that rows share, whole, in blocks of rows, and of queries."""
  monkeypatch.setattr(plain, "SCORES", scores)
  monkeypatch.setattr(plain, "MANY_QUERIES", many)
  rng, rows, length = np.random.default_rng(3), 6, 10
  q = 2 * _normal(rng, rows, length, 4, 8)
  sizes = ((rows, 10), (2, 7), (1, 5))
  keys = [2 * _normal(rng, n, s, 2, 8) for n, s in sizes for _ in "kv"]
  orders = [rng.integers(0, 6, size).astype(np.int32) for size in sizes]
  reach = rng.integers(0, 6, (rows, length)).astype(np.int32)
  reach[1, 2] = types.BLIND

  def attend(q, *keys):
    parts = [attention.Keys.of(k, v, order) for k, v, order in zip(keys[::2], keys[1::2], orders)]
    return attention.attend(q, jnp.asarray(reach), parts, precision="highest", backend="blocked")

  def dense(q, *keys):
    own = lambda a: jnp.repeat(a, rows // a.shape[0], axis=0)
    k, v = (jnp.concatenate([own(a) for a in arrays], axis=1) for arrays in (keys[::2], keys[1::2]))
    return _dense(q, reach, k, v, jnp.concatenate([own(o) for o in orders], axis=1))

  _assert_exact(attend, dense, q, *keys)
  assert (attend(q, *keys)[1, 2] == 0).all()
  assert str(jax.make_jaxpr(attend)(q, *keys)).count("scan[") == loops


def test_blocked_attention_never_transposes_scores():
  rng = np.random.default_rng(4)
  q, k, v = _normal(rng, 2, 80, 4, 8), _normal(rng, 2, 90, 2, 8), _normal(rng, 2, 90, 2, 8)
  order, reach = np.zeros((2, 90), np.int32), np.zeros((2, 80), np.int32)

  def loss(q, k, v):
    parts = [attention.Keys.of(k, v, jnp.asarray(order))]
    out = attention.attend(q, jnp.asarray(reach), parts, precision="highest", backend="blocked")
    return jnp.sum(out**2)

  program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).as_text()
  transposes = [line for line in program.splitlines() if "stablehlo.transpose" in line]
  assert transposes and not any("80x90" in line or "160x90" in line for line in transposes)


def test_the_network_and_its_gradient_are_the_same(config, model, params, monkeypatch):
  """Text, then two images a row over it: as accelerators have it, and as CPUs."""
  monkeypatch.setattr(plain, "MANY_QUERIES", 5)
  rng = np.random.default_rng(5)
  ids = jnp.asarray(rng.integers(3, 250, (2, 5)), jnp.int32)
  some = jnp.arange(4) < jnp.array([[4], [3]])
  grid = types.LatentGrid(jnp.tile(jnp.arange(4), (2, 1)), some)
  x = jnp.asarray(_normal(rng, 4, 4, config.latent_dim))
  twice = functools.partial(jax.tree.map, lambda a: jnp.repeat(a, 2, axis=0))

  def run(network, values):
    call = lambda method, *args: network.apply({"params": values}, *args, method=method)
    context, hidden = call("read_text", ids, ids > 0)
    velocity = call("velocity", context, x, jnp.linspace(0.2, 1, 4), twice(grid))
    logp = jax.nn.log_softmax(call("logits", hidden)).mean()
    return (velocity**2).sum() + logp, velocity

  results = [
    jax.jit(jax.value_and_grad(functools.partial(run, network), has_aux=True))(params["bagel"])
    for network in (model.clone(remat="none"), model.clone(lowering=CPU).for_gradients())
  ]
  (wanted, wanted_grads), (got, got_grads) = results
  chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=2e-5)
  flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)], dtype=np.float64)
  got, wanted = flat(got_grads), flat(wanted_grads)
  assert np.linalg.norm(got - wanted) <= EXACT * np.linalg.norm(wanted)
