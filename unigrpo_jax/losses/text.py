"""The objective of the sampled text: clipped importance ratios, a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "constant")
RATIOS = ("token", "sequence")
# |log ratio| beyond this is cut, as verl does: its exponential would be of no use, or infinite.
LOG_RATIO_BOUND = 20.0
KL_BOUND = 10.0


def token_weights(
  mask: chex.Array, valid: chex.Array, *, aggregation: str, max_tokens: int
) -> chex.Array:
  """The weight of each token's loss, so that the loss of a batch is a plain sum.

    seq-mean-token-mean  1 / (|y_i| B)      UniGRPO eq. 2 (Shao et al. 2024)
    token-mean           1 / sum_i |y_i|    DAPO (Yu et al. 2025)
    constant             1 / (B L_max)      Dr. GRPO (Liu et al. 2025)

  with sums over the trajectories that count, and B their number: valid, with a token. Taken of a
  whole batch and then cut into microbatches, the microbatches' losses add up exactly.

  mask [B, T], valid [B] bool -> [B, T] float32, 0 where nothing counts.
  """
  if aggregation not in AGGREGATIONS:
    raise ValueError(f"aggregation={aggregation!r} is none of {AGGREGATIONS}")
  chex.assert_rank([mask, valid], [2, 1])
  chex.assert_equal_shape_prefix([mask, valid], 1)
  chex.assert_type([mask, valid], bool)
  counts = (mask & valid[:, None]).astype(jnp.float32)
  length = counts.sum(-1, keepdims=True)
  rows = jnp.maximum((length > 0).sum(), 1)
  if aggregation == "seq-mean-token-mean":
    return counts / jnp.maximum(length, 1) / rows
  if aggregation == "token-mean":
    return counts / jnp.maximum(counts.sum(), 1)
  return counts / (rows * max_tokens)


def policy_loss(
  logp: chex.Array, logp_old: chex.Array, adv: chex.Array, weights: chex.Array, *,
  clip_low: float, clip_high: float, dual_clip: float | None = None, ratio: str = "token",
  logp_ref: chex.Array | None = None, kl_weight: float = 0.0,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """The clipped surrogate of PPO over tokens, with an optional penalty for leaving a reference.

    r = exp(logp - logp_old)
    loss = sum w (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight k3)

  Source: UniGRPO eq. 2. `dual_clip` c bounds the first term by c |A| where A < 0 (Ye et al. 2020).
  `ratio="sequence"` gives every token the geometric mean of its row's ratios, and its own gradient
  (GSPO, Zheng et al. 2025).

  Args:
    logp, logp_old, logp_ref: of the policy, of the one that sampled and of the reference, [B, T]
      float32; anything where the weight is 0; no gradient but to `logp`.
    adv: A, [B] float32.
    weights: w, [B, T] float32; see `token_weights`.
    clip_low, clip_high: how far r may fall below 1 and rise above it.
    dual_clip: c, more than 1.
    kl_weight: of the k3 estimate of KL(policy || reference).

  Returns:
    (loss [] float32; dict of `log_ratio` [B, T] float32 and `clipped` [B, T] bool, where the clip
    took the gradient, `dual_clipped` [B, T] bool, and with `logp_ref` `kl` [B, T] float32; 0 and
    False where the weight is 0).
  """
  if ratio not in RATIOS:
    raise ValueError(f"ratio={ratio!r} is none of {RATIOS}")
  if kl_weight and logp_ref is None:
    raise ValueError(f"kl_weight={kl_weight} needs logp_ref")
  chex.assert_rank([logp, adv], [2, 1])
  chex.assert_equal_shape([logp, logp_old, weights])
  chex.assert_equal_shape_prefix([logp, adv], 1)
  chex.assert_type([logp, logp_old, adv, weights], jnp.float32)
  counts = weights > 0
  # Cleared before the difference, so that no gradient of padding is 0 * NaN.
  clear = lambda values: jnp.where(counts, values, 0.0)
  logp, logp_old = clear(logp), clear(jax.lax.stop_gradient(logp_old))
  log_ratio = jnp.clip(logp - logp_old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
  if ratio == "sequence":
    row = (logp - logp_old).sum(-1, keepdims=True) / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    own = logp - jax.lax.stop_gradient(logp)  # 0, with the token's gradient
    log_ratio = clear(own + jnp.clip(jax.lax.stop_gradient(row), -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
  adv = adv[:, None]
  r = jnp.exp(log_ratio)
  free, bound = -r * adv, -jnp.clip(r, 1 - clip_low, 1 + clip_high) * adv
  losses = jnp.maximum(free, bound)
  dual = jnp.zeros_like(counts)
  if dual_clip is not None:
    dual = counts & (adv < 0) & (losses > -dual_clip * adv)
    losses = jnp.where(dual, -dual_clip * adv, losses)
  metrics = {"log_ratio": log_ratio, "clipped": counts & (bound > free), "dual_clipped": dual}
  if logp_ref is not None:
    metrics["kl"] = k3(logp, clear(jax.lax.stop_gradient(logp_ref)))
    losses = losses + kl_weight * metrics["kl"]
  return jnp.sum(weights * losses), metrics


def k1(logp: chex.Array, logp_ref: chex.Array) -> chex.Array:
  """logp - logp_ref: unbiased for KL(policy || reference) of policy samples (Schulman 2020)."""
  chex.assert_equal_shape([logp, logp_ref])
  return logp - logp_ref


def k3(logp: chex.Array, logp_ref: chex.Array) -> chex.Array:
  """exp(d) - d - 1 with d = logp_ref - logp: unbiased, never negative; see `k1`.

  d is cut to +-20 and the result to 10, as verl does.
  """
  d = jnp.clip(-k1(logp, logp_ref), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
  return jnp.clip(jnp.exp(d) - d - 1, -KL_BOUND, KL_BOUND)


def token_logprobs(
  logits_fn: Callable[[chex.Array], chex.Array], hidden: chex.Array, ids: chex.Array,
  mask: chex.Array, *, temperature: float, chunk: int,
) -> tuple[chex.Array, chex.Array]:
  """Log-probabilities of given tokens at the sampling temperature, never holding [B, Y, V] logits.

    logp_y = log softmax(logits_y / temperature)[ids_y],   entropy_y = -sum_v p_yv log p_yv

  Arguments as of `by_chunk`; the temperature is more than 0. Returns (logp, entropy), [B, Y]
  float32 in nats, 0 where mask is False.
  """

  def measure(logits, ids):
    logp = jax.nn.log_softmax(logits / temperature, axis=-1)
    picked = jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  return by_chunk(measure, logits_fn, hidden, ids, mask, chunk=chunk)


def by_chunk(
  measure: Callable[[chex.Array, chex.Array], Any], logits_fn: Callable[[chex.Array], chex.Array],
  hidden: chex.Array, ids: chex.Array, mask: chex.Array, *, chunk: int,
) -> Any:
  """Measures tokens by their logits, a chunk of tokens of each row at a time.

  Forward and backward: a chunk's logits are recomputed, not kept.

  Args:
    measure: (logits [B, chunk, V] float32, ids [B, chunk]) -> tree of [B, chunk].
    logits_fn: [B, chunk, D] -> [B, chunk, V], any float dtype.
    hidden: hidden states that predict the tokens, [B, Y, D]; anything where mask is False.
    ids, mask: [B, Y] int32, and bool: tokens that count.
    chunk: tokens of each row whose logits exist at once, at least 1.

  Returns:
    The tree of [B, Y], 0 where mask is False.
  """
  chex.assert_rank([hidden, ids, mask], [3, 2, 2])
  chex.assert_equal_shape([hidden[..., 0], ids, mask])
  rows, count, _ = hidden.shape
  chunks = max(-(-count // chunk), 1)
  size = -(-count // chunks)

  @jax.checkpoint
  def measured(inputs):
    hidden, ids = inputs
    return measure(logits_fn(hidden).astype(jnp.float32), ids)

  def split(array):  # [B, Y, ...] -> [chunks, B, size, ...]
    padding = [(0, 0), (0, chunks * size - count)] + [(0, 0)] * (array.ndim - 2)
    return jnp.moveaxis(jnp.pad(array, padding).reshape(rows, chunks, size, *array.shape[2:]), 1, 0)

  def join(array):  # [chunks, B, size] -> [B, Y]
    joined = jnp.moveaxis(array, 0, 1).reshape(rows, chunks * size)[:, :count]
    return jnp.where(mask, joined, 0.0)

  # 0 * NaN is NaN, in the gradient too: padding is cleared before it enters and after it leaves.
  hidden = jnp.where(mask[..., None], hidden, 0)
  return jax.tree.map(join, jax.lax.map(measured, (split(hidden), split(ids))))
