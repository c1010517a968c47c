"""Attention by order and reach: against a plain softmax, in parts, in blocks, shared by rows."""

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import types
from unigrpo_jax.models import attention


def _problem(rng, rows=2, queries=5, keys=7, key_rows=None):
  key_rows = key_rows or rows
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q = normal(rows, queries, 4, 8)
  k, v = normal(key_rows, keys, 2, 8), normal(key_rows, keys, 2, 8)
  order = jnp.asarray(rng.integers(0, 6, (key_rows, keys)), jnp.int32)
  reach = jnp.asarray(rng.integers(0, 6, (rows, queries)), jnp.int32)
  return q, reach, attention.Keys.of(k, v, order)


def _plain(q, reach, keys):
  """Softmax attention with a materialised mask, one head at a time."""
  out = np.zeros(q.shape)
  for row, query, head in np.ndindex(q.shape[:3]):
    seen = np.asarray(keys.order[row] <= reach[row, query])
    if seen.any():
      source = head // (q.shape[2] // keys.k.shape[1])
      scores = np.asarray(keys.k[row, source, seen]) @ np.asarray(q[row, query, head]) / np.sqrt(8)
      weights = np.exp(scores - scores.max())
      out[row, query, head] = weights / weights.sum() @ np.asarray(keys.v[row, source, seen])
  return out


def _part(keys, start, stop):
  some = slice(start, stop)
  return attention.Keys(keys.k[:, :, some], keys.v[:, :, some], keys.order[:, some])


def test_equals_plain_softmax():
  q, reach, keys = _problem(np.random.default_rng(0))
  got = attention.attend(q, reach, [keys], precision="highest")
  np.testing.assert_allclose(got, _plain(q, reach, keys), atol=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_parts_equal_their_concatenation(cut):
  q, reach, keys = _problem(np.random.default_rng(1))
  parts = [_part(keys, 0, cut), _part(keys, cut, 7)] if 0 < cut < 7 else [keys]
  got = attention.attend(q, reach, parts)
  np.testing.assert_allclose(got, _plain(q, reach, keys), atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
def test_query_blocks_change_nothing(block):
  q, reach, keys = _problem(np.random.default_rng(2))
  loss = lambda q, size: jnp.sum(attention.attend(q, reach, [keys], query_block=size) ** 2)
  chex.assert_trees_all_close(
    jax.value_and_grad(loss)(q, block), jax.value_and_grad(loss)(q, 1000), rtol=1e-5, atol=5e-6
  )


def test_rows_share_a_context_as_if_it_were_repeated():
  q, reach, keys = _problem(np.random.default_rng(3), rows=6, key_rows=2)
  repeated = attention.Keys(*(jnp.repeat(a, 3, axis=0) for a in keys))
  np.testing.assert_allclose(
    attention.attend(q, reach, [keys]), attention.attend(q, reach, [repeated]), atol=1e-6
  )


def test_unseen_keys_equal_deleted_keys_and_blind_queries_give_zero():
  q, reach, keys = _problem(np.random.default_rng(4))
  hidden = keys._replace(order=keys.order.at[:, 4:].set(types.UNSEEN))
  reach = reach.at[1, 2].set(types.BLIND)

  def loss(q, keys):
    out = attention.attend(q, reach, [keys])
    return jnp.sum(out**2), out

  (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)(q, hidden)
  np.testing.assert_allclose(out, _plain(q, reach, _part(keys, 0, 4)), atol=1e-6)
  assert (out[1, 2] == 0).all()
  chex.assert_tree_all_finite((grads[0], grads[1].k, grads[1].v))
  assert (grads[1].k[:, :, 4:] == 0).all() and (grads[0][1, 2] == 0).all()


def test_large_scores_do_not_overflow():
  q, reach, keys = _problem(np.random.default_rng(5))
  out = attention.attend(q * 1e4, reach, [_part(keys, 0, 3), _part(keys, 3, 7)])
  chex.assert_tree_all_finite(out)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  rng = np.random.default_rng(6)
  x, y = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)), jnp.float32)
  at = lambda a, p: attention.rotate(a, attention.rotation(jnp.array([[p]]), 16, 1e4))[0, 0, 0]
  np.testing.assert_allclose(jnp.linalg.norm(at(x, 9)), jnp.linalg.norm(x), rtol=1e-6)
  np.testing.assert_allclose(at(x, 9) @ at(y, 4), at(x, 25) @ at(y, 20), rtol=1e-4)
  np.testing.assert_allclose(at(x, 0), x[0, 0, 0], rtol=1e-6)


def test_scores_are_never_transposed():
  """To transpose them would cost as much as to compute them; queries, keys and values are small."""
  q, reach, keys = _problem(np.random.default_rng(5), rows=4, queries=40, keys=50, key_rows=2)
  program = jax.make_jaxpr(lambda q, k, v: attention.attend(
    q, reach, [attention.Keys(k, v, keys.order)]))(q, keys.k, keys.v)
  sizes = [equation.outvars[0].aval.size for equation in _equations(program.jaxpr)
           if equation.primitive.name == "transpose"]
  assert sizes and max(sizes) == q.size < 4 * 40 * 4 * 50


def _equations(jaxpr):
  """All of them, those of the programs within included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _equations(inner)
