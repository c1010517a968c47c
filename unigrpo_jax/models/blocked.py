"""Attention for CPUs: in blocks whose scores stay in the cache, with a gradient of its own.

Scores that go through memory cost more than the products that make and read them: a core forms and
exponentiates them faster than it can write them. So a block of rows runs through all of attention
before the next, and the backward pass forms the scores of a block again, as kernels for
accelerators do (Dao et al. 2022). Derived by JAX, the gradient would also copy the scores in
transposed order; here the operand with a head's few features is the one that is transposed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Fewer queries are the plain path's: to repeat shared keys for them would cost more than it saves.
LEAST_QUERIES = 64
# Scores of a block, 8 MiB of float32: a loop over smaller blocks costs more than it saves.
SCORES = 1 << 21


def query_block(num_heads: int, keys: int) -> int:
  """How many queries of a row are a block, where a row's scores are too many for one."""
  return max(SCORES // (num_heads * keys), LEAST_QUERIES)


def attend(q, reach, parts, precision=None):
  """Attention in blocks of rows; arguments and result are those of `attention.attend`."""
  rows, length, num_heads, head_dim = q.shape
  kv_heads = parts[0].k.shape[2]
  own = [part for part in parts if part.k.shape[0] == rows]
  shared = [part for part in parts if part.k.shape[0] != rows]
  # What rows share is often constant: in a group of its own, its gradient is not computed then.
  groups = [_concatenate(group, rows) for group in (own, shared) if group]
  # [B, K, N/K T, H]: queries that read the same keys are one longer query.
  by_head = q.reshape(rows, length, kv_heads, num_heads // kv_heads, head_dim)
  by_head = jnp.moveaxis(by_head, 1, 3).reshape(rows, kv_heads, -1, head_dim)
  out = _attend(precision, by_head, reach, groups)
  out = out.reshape(rows, kv_heads, num_heads // kv_heads, length, head_dim)
  return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)


def _concatenate(parts, rows: int):
  """Parts as one, heads first, a row for every row of queries: k, v [B, K, S, H], order [B, S]."""
  repeat = lambda a: jnp.repeat(a, rows // a.shape[0], axis=0)
  k, v, order = (jnp.concatenate([repeat(a) for a in arrays], axis=1) for arrays in zip(*parts))
  return jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(precision, q, reach, groups):
  """q [B, K, Q, H], reach [B, T], groups of (k, v, order) -> [B, K, Q, H] float32; Q is N/K * T."""
  return _forward(precision, q, reach, groups)[0]


def _forward(precision, q, reach, groups):
  out, log_total = _by_rows(functools.partial(_forward_block, precision), q, reach, groups)
  return out, (q, reach, groups, out, log_total)


def _backward(precision, residuals, dout):
  q, reach, groups, out, log_total = residuals
  block = functools.partial(_backward_block, precision)
  return _by_rows(block, q, reach, groups, out, log_total, dout)


_attend.defvjp(_forward, _backward)


def _by_rows(block, q, reach, groups, *others):
  """`block` of arrays whose rows come first, for as many rows at once as `SCORES` allows."""
  keys = sum(order.shape[1] for _, _, order in groups)
  rows, most = len(q), SCORES // (q.shape[1] * q.shape[2] * keys)
  at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(most, 1))
  args = (q, reach, groups, *others)
  if at_once == rows:
    return block(*args)
  cut = lambda a: a.reshape(rows // at_once, at_once, *a.shape[1:])
  whole = lambda a: a.reshape(rows, *a.shape[2:])
  return jax.tree.map(whole, jax.lax.map(lambda xs: block(*xs), jax.tree.map(cut, args)))


def _product(precision):
  return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def _scores(precision, q, reach, k, order):
  """Scaled scores [R, K, Q, S] float32, -inf where a query does not see a key."""
  rows, kv_heads, queries, head_dim = q.shape
  scores = _product(precision)("rkqh,rksh->rkqs", q, k) * head_dim**-0.5
  visible = order[:, None, :] <= reach[:, :, None]  # [R, T, S]
  apart = (rows, kv_heads, queries // reach.shape[1], reach.shape[1], k.shape[2])
  scores = jnp.where(visible[:, None, None], scores.reshape(apart), -jnp.inf)
  return scores.reshape(rows, kv_heads, queries, -1)


def _forward_block(precision, q, reach, groups):
  """Output and logarithm of the softmax's denominator, [R, K, Q, H] and [R, K, Q, 1] float32."""
  product = _product(precision)
  scores = [_scores(precision, q, reach, k, order) for k, _, order in groups]
  peak = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores])
  # A query that sees nothing has peak -inf; 0 keeps exp(-inf - peak) a clean zero.
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  out, total = 0.0, 0.0
  for s, (_, v, _) in zip(scores, groups):
    weights = jnp.exp(s - peak)
    out += product("rkqs,rksh->rkqh", weights.astype(v.dtype), v)
    # A sum as a product, which XLA's CPU backend computes faster.
    total += product("rkqs,rksh->rkqh", weights, jnp.ones_like(s[..., 0, :, None]))
  total = jnp.where(total > 0, total, 1.0)
  return out / total, peak + jnp.log(total)


def _backward_block(precision, q, reach, groups, out, log_total, dout):
  product, scale = _product(precision), q.shape[-1] ** -0.5
  delta = (dout * out).sum(-1, keepdims=True)
  dout = dout.astype(q.dtype)
  dq, dgroups = 0.0, []
  for k, v, order in groups:
    weights = jnp.exp(_scores(precision, q, reach, k, order) - log_total)
    dscores = (weights * (product("rkqh,rksh->rkqs", dout, v) - delta)).astype(q.dtype)
    dq += product("rkqs,rksh->rkqh", dscores, k)
    dk = product("rkqh,rkqs->rkhs", q, dscores) * scale
    dv = product("rkqh,rkqs->rkhs", dout, weights.astype(q.dtype))
    across = lambda a, like: jnp.swapaxes(a, 2, 3).astype(like.dtype)
    dgroups.append((across(dk, k), across(dv, v), None))
  return (dq * scale).astype(q.dtype), None, dgroups
