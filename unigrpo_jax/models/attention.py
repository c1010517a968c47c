"""One attention for every mode: grouped queries, keys in several parts, visibility by order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import blocked, kernels


class Keys(NamedTuple):
  """One part of the keys: `k`, `v` [Bk, S, K, H] and `order` [Bk, S] int32 (see types.Tokens).

  Each part serves B / Bk consecutive rows of queries, so that the images of a group share their
  context without a copy of it.
  """

  k: chex.Array
  v: chex.Array
  order: chex.Array


def attend(
  q, reach, parts: list[Keys], *, precision=None, query_block: int = 1024, backend: str = "plain",
  one_reach: bool = False,
):
  """Softmax attention of `q` over the union of `parts`, where order <= reach.

  Args:
    q: [B, T, N, H] queries; query head n reads key-value head n // (N / K).
    reach: [B, T] int32, the last order each query sees.
    parts: keys and values; their partial softmaxes are merged by log-sum-exp, so that a cache and
      the new tokens need not be concatenated.
    query_block: queries scored at once; the scores held are [B, N, query_block, S].
    backend: one of `lowering.ATTENTION` but "auto": "plain", or what is used where it serves; see
      `kernels` and `blocked`.
    one_reach: whether a row's queries that see anything have the same reach; `splash` needs it.

  Returns:
    [B, T, N, H] in the dtype of `q`; exactly zero for a query that sees nothing.
  """
  chex.assert_rank([q, reach], [4, 2])
  length = q.shape[1]
  if length >= kernels.LEAST_QUERIES:
    if backend == "splash" and one_reach:
      return kernels.splash(q, reach, parts)
    if backend == "cudnn":
      return kernels.cudnn(q, reach, parts)
  if in_cache := backend == "blocked" and length >= blocked.LEAST_QUERIES:
    query_block = blocked.query_block(q.shape[2], sum(part.k.shape[1] for part in parts))
    attend_block = lambda q, reach: blocked.attend(q, reach, parts, precision)
  else:
    attend_block = lambda q, reach: _attend_block(q, reach, parts, precision)
  blocks = -(-length // query_block)
  if blocks == 1:
    return attend_block(q, reach)
  if not in_cache:
    # Rematerialised, else the backward pass would keep the scores of every block.
    attend_block = jax.checkpoint(attend_block)
  # Equal blocks: 4,098 queries become 5 x 820, not 4 x 1,024 and a block of 2.
  size = -(-length // blocks)
  pad = blocks * size - length
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  reach = jnp.pad(reach, ((0, 0), (0, pad)), constant_values=types.BLIND)
  q = jnp.moveaxis(q.reshape(q.shape[0], blocks, size, *q.shape[2:]), 1, 0)
  reach = jnp.moveaxis(reach.reshape(reach.shape[0], blocks, size), 1, 0)
  out = jnp.moveaxis(jax.lax.map(lambda block: attend_block(*block), (q, reach)), 0, 1)
  return out.reshape(out.shape[0], blocks * size, *out.shape[3:])[:, :length]


def _attend_block(q, reach, parts: list[Keys], precision):
  partials = [_partial_softmax(q, reach, part, precision) for part in parts]
  peak = functools.reduce(jnp.maximum, [part_peak for part_peak, _, _ in partials])
  # A query that sees nothing has peak -inf; 0 keeps exp(-inf - peak) a clean zero.
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  total, out = 0.0, 0.0
  for part_peak, part_total, part_out in partials:
    weight = jnp.exp(part_peak - peak)  # [B, T, N]
    total += weight * part_total
    out += weight[..., None] * part_out
  return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype)


def _partial_softmax(q, reach, keys: Keys, precision):
  """Unnormalised softmax over one part: peak and total [B, T, N], sum [B, T, N, H], float32."""
  rows, length, num_heads, head_dim = q.shape
  key_rows, _, kv_heads, _ = keys.k.shape

  shared = rows // key_rows * length
  # [Bk, K, N/K, (B/Bk) T, H]: rows that share a context become longer queries. Heads lead
  # everywhere, so that the products come out as they are needed: to transpose the scores costs as
  # much as to compute them.
  q = q.reshape(key_rows, shared, kv_heads, num_heads // kv_heads, head_dim)
  q, k, v = jnp.moveaxis(q, 1, 3), jnp.moveaxis(keys.k, 1, 2), jnp.moveaxis(keys.v, 1, 2)
  visible = keys.order[:, None, :] <= reach.reshape(key_rows, shared)[:, :, None]
  scores = jnp.einsum(
    "bkgth,bksh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32
  )
  scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
  peak = jax.lax.stop_gradient(scores.max(-1))
  finite_peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  weights = jnp.exp(scores - finite_peak[..., None])
  out = jnp.einsum(
    "bkgts,bksh->bkgth", weights.astype(v.dtype), v, precision=precision,
    preferred_element_type=jnp.float32,
  )
  by_query = lambda a: jnp.moveaxis(a, 3, 1).reshape(rows, length, num_heads, *a.shape[4:])
  return by_query(peak), by_query(weights.sum(-1)), by_query(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x, position, theta: float):
  """Rotary position embedding of x [B, T, N, H] float32, half-split (Su et al. 2021, as in Qwen2).

  The frequencies are theta^(-2j/H). Angles at bf16 would merge neighbouring positions beyond 256.
  Its gradient is the rotation back: JAX's would pad each half and add them.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, H/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rotate_forward(x, position, theta):
  return rotate(x, position, theta), position


def _rotate_backward(theta, position, dy):
  return rotate(dy, -position, theta), None


rotate.defvjp(_rotate_forward, _rotate_backward)
