"""One attention for every mode: grouped queries, keys in several parts, visibility by order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax import errors, types
from unigrpo_jax.models import kernels

# How attention may be computed, by name: "auto" is for `choose_backend` to decide.
BACKENDS = ("auto", "plain", "splash", "cudnn")
# What a kernel runs on.
_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


class Keys(NamedTuple):
  """One part of the keys: `k`, `v` [Bk, S, K, H] and `order` [Bk, S] int32 (see types.Tokens).

  Each part serves B / Bk consecutive rows of queries, so that the images of a group share their
  context without a copy of it.
  """

  k: chex.Array
  v: chex.Array
  order: chex.Array


def choose_backend(name: str, platform: str, dtype) -> str:
  """The backend for `attend` by its name, checked against the devices ("cpu", "gpu" or "tpu").

  "auto" is the kernel for TPUs where it can be used, and "plain" elsewhere. The kernels round the
  products of float32 arrays or do not take them: exact products are the plain path's.

  Raises:
    InputError: the kernel asked for is none of these devices', or not of this dtype.
  """
  exact = jnp.dtype(dtype) == jnp.float32
  if name == "auto":
    return "splash" if platform == "tpu" and not exact else "plain"
  wanted = _PLATFORMS.get(name, platform)
  if platform != wanted:
    raise errors.InputError(
      f"config.attention={name!r} runs on a {wanted}, but the devices are {platform}; set auto"
    )
  if name in _PLATFORMS and exact:
    raise errors.InputError(
      f"config.attention={name!r} is not exact in config.dtype=float32; set plain or bfloat16"
    )
  return name


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
    backend: "plain", or the kernel to use where it serves: see `kernels`.
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
  blocks = -(-length // query_block)
  if blocks == 1:
    return _attend_block(q, reach, parts, precision)
  # Equal blocks: 4,098 queries become 5 x 820, not 4 x 1,024 and a block of 2.
  size = -(-length // blocks)
  pad = blocks * size - length
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  reach = jnp.pad(reach, ((0, 0), (0, pad)), constant_values=types.BLIND)
  q = jnp.moveaxis(q.reshape(q.shape[0], blocks, size, *q.shape[2:]), 1, 0)
  reach = jnp.moveaxis(reach.reshape(reach.shape[0], blocks, size), 1, 0)
  # Rematerialised, else the backward pass would keep the scores of every block.
  step = jax.checkpoint(lambda block: _attend_block(*block, parts, precision))
  out = jnp.moveaxis(jax.lax.map(step, (q, reach)), 0, 1)
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


def rotate(x, position, theta: float):
  """Rotary position embedding of x [B, T, N, H] float32, half-split (Su et al. 2021, as in Qwen2).

  The frequencies are theta^(-2j/H). Angles at bf16 would merge neighbouring positions beyond 256.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, H/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
