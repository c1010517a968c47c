"""Attention without a kernel: partial softmaxes over the parts of the keys, merged.

`attend` is differentiated by JAX. `attend_in_cache` is for CPUs, where scores that go through
memory cost more than the products that make and read them: a core forms and exponentiates them
faster than it can write them. It takes many queries in blocks whose scores stay in the cache, and
its gradient forms them again, as kernels for accelerators do (Dao et al. 2022). JAX's would also
copy scores in transposed order; here the operand with a head's few features is transposed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Scores of a block, 8 MiB of float32: a loop over smaller blocks costs more than it saves.
SCORES = 1 << 21
# Rows with fewer queries share their keys as they are: to repeat them costs more than it saves.
MANY_QUERIES = 64


def attend(q, reach, parts, precision):
  """All queries at once; arguments and result are those of `attention.attend`."""
  return _merge(q, reach, parts, precision, lambda weights: weights.sum(-1))[0].astype(q.dtype)


def attend_in_cache(q, reach, parts, precision):
  """In blocks, with a gradient of its own; arguments and result are those of `attention.attend`."""
  if q.shape[1] >= MANY_QUERIES:
    own = [part for part in parts if part.k.shape[0] == q.shape[0]]
    shared = [part for part in parts if part.k.shape[0] != q.shape[0]]
    # What rows share is often constant: in a group of its own, its gradient is not computed then.
    one = lambda group: type(group[0])(*own_keys(group, q.shape[0]))
    parts = [one(group) for group in (own, shared) if group]
  return _attend_in_cache(precision, q, reach, parts)


def query_block(num_heads: int, keys: int) -> int:
  """How many queries of a row are a block, where a row's scores are too many for one."""
  return max(SCORES // (num_heads * keys), MANY_QUERIES)


def _merge(q, reach, parts, precision, sum_of):
  """Output [B, T, N, H] and logarithm of the softmax's denominator [B, T, N], float32."""
  partials = [_partial_softmax(q, reach, part, precision, sum_of) for part in parts]
  peak = functools.reduce(jnp.maximum, [part_peak for part_peak, _, _ in partials])
  # A query that sees nothing has peak -inf; 0 keeps exp(-inf - peak) a clean zero.
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  total, out = 0.0, 0.0
  for part_peak, part_total, part_out in partials:
    weight = jnp.exp(part_peak - peak)  # [B, T, N]
    total += weight * part_total
    out += weight[..., None] * part_out
  total = jnp.where(total > 0, total, 1.0)
  return out / total[..., None], peak + jnp.log(total)


def _partial_softmax(q, reach, keys, precision, sum_of):
  """Unnormalised softmax over one part: peak and total [B, T, N], sum [B, T, N, H], float32."""
  scores = _scores(q, reach, keys, precision)
  peak = jax.lax.stop_gradient(scores.max(-1))
  finite_peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  weights = jnp.exp(scores - finite_peak[..., None])
  out = _product(precision)(
    "bkgts,bksh->bkgth", weights.astype(keys.v.dtype), keys.v
  )
  by_query = functools.partial(_by_query, rows=q.shape[0])
  return by_query(peak), by_query(sum_of(weights)), by_query(out)


def _scores(q, reach, keys, precision):
  """Scaled scores [Bk, K, N/K, (B/Bk) T, S] float32, -inf where a query does not see a key."""
  scores = _product(precision)("bkgth,bksh->bkgts", _by_key(q, keys), keys.k)
  visible = keys.order[:, None, :] <= reach.reshape(len(keys.order), -1)[:, :, None]
  return jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)


def _product(precision):
  def product(letters, a, b):
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=wide)

  return product


def _by_key(a, keys):
  """[B, T, N, ...] -> [Bk, K, N/K, (B/Bk) T, ...]: queries by the keys that they read.

  Rows that share a context become longer queries. Heads lead everywhere, so that the products come
  out as they are needed: to transpose the scores costs as much as to compute them.
  """
  key_rows, kv_heads, _, _ = keys.k.shape
  a = a.reshape(key_rows, -1, kv_heads, a.shape[2] // kv_heads, *a.shape[3:])
  return jnp.moveaxis(a, 1, 3)


def _by_query(a, rows: int):
  """The inverse of `_by_key`, for B = `rows`."""
  a = jnp.moveaxis(a, 3, 1)
  return a.reshape(rows, -1, a.shape[2] * a.shape[3], *a.shape[4:])


def own_keys(parts, rows: int):
  """All keys of each row of queries: k, v [B, K, S, H] and order [B, S], for B = `rows`."""
  repeat = lambda a: jnp.repeat(a, rows // a.shape[0], axis=0)
  joined = lambda arrays, axis: jnp.concatenate([repeat(a) for a in arrays], axis)
  return tuple(map(joined, zip(*parts), (2, 2, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_cache(precision, q, reach, parts):
  return _forward(precision, q, reach, parts)[0]


def _forward(precision, q, reach, parts):
  out, log_total = _by_rows(functools.partial(_forward_block, precision), q, reach, parts)
  return out.astype(q.dtype), (q, reach, parts, out, log_total)


def _backward(precision, residuals, dout):
  q, reach, parts, out, log_total = residuals
  block = functools.partial(_backward_block, precision)
  return _by_rows(block, q, reach, parts, out, log_total, dout)


_attend_in_cache.defvjp(_forward, _backward)


def _by_rows(block, q, reach, parts, *others):
  """`block` of arrays whose rows come first, for as many rows at once as `SCORES` allows.

  All at once where rows share keys.
  """
  rows, at_once = len(q), len(q)
  if all(len(part.order) == rows for part in parts):
    most = SCORES // (q.shape[1] * q.shape[2] * sum(part.order.shape[1] for part in parts))
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(most, 1))
  args = (q, reach, parts, *others)
  if at_once == rows:
    return block(*args)
  cut = lambda a: a.reshape(rows // at_once, at_once, *a.shape[1:])
  whole = lambda a: a.reshape(rows, *a.shape[2:])
  return jax.tree.map(whole, jax.lax.map(lambda xs: block(*xs), jax.tree.map(cut, args)))


def _forward_block(precision, q, reach, parts):
  # A sum as a product, which XLA's CPU backend computes faster.
  sum_of = lambda weights: _product(precision)(
    "bkgts,bksh->bkgth", weights, jnp.ones((*weights.shape[:2], weights.shape[-1], 1))
  )[..., 0]
  return _merge(q, reach, parts, precision, sum_of)


def _backward_block(precision, q, reach, parts, out, log_total, dout):
  product, scale = _product(precision), q.shape[-1] ** -0.5
  delta = (dout * out).sum(-1)  # [R, T, N]
  dq, dparts = 0.0, []
  for keys in parts:
    by_key = functools.partial(_by_key, keys=keys)
    dout_by_key = by_key(dout).astype(q.dtype)
    weights = jnp.exp(_scores(q, reach, keys, precision) - by_key(log_total)[..., None])
    dweights = product("bkgth,bksh->bkgts", dout_by_key, keys.v)
    dscores = (weights * (dweights - by_key(delta)[..., None])).astype(q.dtype)
    dq += _by_query(product("bkgts,bksh->bkgth", dscores, keys.k), q.shape[0])
    dk = product("bkgth,bkgts->bkhs", by_key(q), dscores) * scale
    dv = product("bkgth,bkgts->bkhs", dout_by_key, weights.astype(q.dtype))
    across = lambda a, like: a.swapaxes(2, 3).astype(like.dtype)
    dparts.append(type(keys)(across(dk, keys.k), across(dv, keys.v), None))
  return (dq * scale).astype(q.dtype), None, dparts
