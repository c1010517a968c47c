"""One attention for every mode: grouped queries, keys in several parts, visibility by order."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import kernels, plain


class Keys(NamedTuple):
  """One part of the keys: `k`, `v` [Bk, K, S, H] and `order` [Bk, S] int32 (see types.Tokens).

  Each part serves B / Bk consecutive rows of queries, so that the images of a group share their
  context without a copy of it. Heads lead, as products need them: a cache that is read for each
  token is not transposed for each.
  """

  k: chex.Array
  v: chex.Array
  order: chex.Array

  @classmethod
  def of(cls, k, v, order) -> Keys:
    """From `k`, `v` [Bk, S, K, H]."""
    return cls(*(jnp.moveaxis(a, 1, 2) for a in (k, v)), order)


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
      `kernels` and `plain.attend_in_cache`.
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
  if in_cache := backend == "blocked":
    query_block = plain.query_block(q.shape[2], sum(part.order.shape[1] for part in parts))
  attend_some = plain.attend_in_cache if in_cache else plain.attend
  attend_block = lambda q, reach: attend_some(q, reach, parts, precision)
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


class Rotation(NamedTuple):
  """Cosines and sines of the angles by which tokens are rotated, [B, T, 1, H/2] float32 each."""

  cos: chex.Array
  sin: chex.Array


def rotation(position, head_dim: int, theta: float, *, keep: bool = False) -> Rotation:
  """The rotation of tokens at positions [B, T] int32, by the frequencies theta^(-2j/H).

  Angles at bf16 would merge neighbouring positions beyond 256. With `keep` both are computed once:
  XLA's CPU backend computes an elementwise operand again for each of its uses, cosines too, but
  keeps the result of a product.
  """
  half = head_dim // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] * frequency
  tables = jnp.cos(angle), jnp.sin(angle)
  if keep:
    same = jnp.eye(half, dtype=jnp.float32)
    tables = (jnp.matmul(table, same, precision="highest") for table in tables)
  return Rotation(*tables)


@jax.custom_vjp
def rotate(x, by: Rotation):
  """Rotary position embedding of x [B, T, N, H] float32, half-split (Su et al. 2021, as in Qwen2).

  Its gradient is the rotation back: JAX's would pad each half and add them.
  """
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1
  )


def _rotate_backward(by, dy):
  return rotate(dy, Rotation(by.cos, -by.sin)), None


rotate.defvjp(lambda x, by: (rotate(x, by), by), _rotate_backward)
