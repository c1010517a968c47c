"""The objective of the sampled images: importance ratios of the steps of a window, and their clip.

A ratio differs from 1 by 1e-6 and less, where float32 has steps of 1e-7: so ratios are kept as
their logarithm, from differences of means, and clipped as rho = ratio - 1. <.> is the mean over the
D latent elements of an image that count; `mask`, [..., I] bool, is True at its tokens that count,
and its leading axes may be 1. What lies at padding is never read.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

RATIOS = ("norm", "plain", "unnormalised")
REWEIGHTS = ("none", "inv_dt")
SURROGATES = ("ppo", "spo", "aspo")
# |log ratio| beyond this is cut: its exponential would be of no use, or infinite.
LOG_RATIO_BOUND = 20.0


def element_mean(values: chex.Array, mask: chex.Array) -> chex.Array:
  """The mean of values [..., I, C] float32 over the elements that count: [...], 0 where none does.

  Padding must be finite, and cleared where a gradient is taken.
  """
  chex.assert_type(values, jnp.float32)
  chex.assert_type(mask, bool)
  chex.assert_rank(mask, values.ndim - 1)
  chex.assert_is_broadcastable(mask.shape, values.shape[:-1])
  return jnp.where(mask, values.mean(-1), 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def difference(a: chex.Array, b: chex.Array, mask: chex.Array) -> chex.Array:
  """a - b [..., I, C] in float32, cleared at padding: 0 * NaN is NaN, in the gradient too."""
  chex.assert_equal_shape([a, b])
  chex.assert_rank(mask, a.ndim - 1)
  return jnp.where(mask[..., None], a.astype(jnp.float32) - b.astype(jnp.float32), 0.0)


def log_ratio(
  mean: chex.Array, mean_old: chex.Array, x_next: chex.Array, std: chex.Array, mask: chex.Array,
  *, kind: str = "norm",
) -> chex.Array:
  """Log importance ratio of steps between two Gaussians of the same std, in difference form.

  With d = mean - mean_old and e = x_next - mean_old:

    norm          <d e> / std              RatioNorm: UniGRPO eq. 5, GRPO-Guard (Wang et al. 2025)
    plain         <d (e - d / 2)> / std^2  log p - log p_old: UniGRPO eq. 4, Flow-GRPO
    unnormalised  <d (2 e - d)>            the same without 1 / (2 std^2), as `cps` has it

  `norm` is eq. 5 with its quadratic term cancelled: std (log r + <d^2> / (2 std^2)).

  mean, mean_old, x_next [..., I, C], std (more than 0) [...] or broadcasting to it -> [...], all
  float32. No gradient flows but to `mean`.
  """
  if kind not in RATIOS:
    raise ValueError(f"kind={kind!r} is none of {RATIOS}")
  chex.assert_type([mean, mean_old, x_next, std], jnp.float32)
  d = difference(mean, jax.lax.stop_gradient(mean_old), mask)
  e = difference(*jax.lax.stop_gradient((x_next, mean_old)), mask)
  if kind == "norm":
    return element_mean(d * e, mask) / std
  if kind == "plain":
    return element_mean(d * (e - d / 2), mask) / jnp.square(std)
  return element_mean(d * (2 * e - d), mask)


def policy_loss(
  log_ratio: chex.Array, adv: chex.Array, weights: chex.Array, *,
  clip_low: chex.Numeric, clip_high: chex.Numeric, surrogate: str = "ppo",
  loss_mask: chex.Array | None = None, loss_weight: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """The surrogate of PPO over the steps of a window, or one of its kin, less its constant.

    rho = exp(log_ratio) - 1,    eps = clip_high where A > 0, clip_low elsewhere
    ppo   l = -min(rho A, clip(rho, -clip_low, clip_high) A)
    spo   l = -rho A + |A| rho^2 / (2 eps)       has no gradient at eps, and pulls back beyond
    aspo  ppo where A > 0, spo elsewhere
    loss = sum w u l

  It is smaller by the constant sum w u A than with the ratio itself, and has the same gradient.
  With `loss_mask` nothing is clipped, and only its terms -rho A remain. Source: UniGRPO eq. 6;
  SPO (Xie et al. 2024) and ASPO as in FPO++ (fpo-control); `loss_mask`: Flow-DPPO (see
  `dppo_mask`); u: GRPO-Guard (see `reweight`).

  Args:
    log_ratio: [B, W] float32; anything where the weight is 0.
    adv: A, [B] float32.
    weights: w, [B, W] float32; see `step_weights`.
    clip_low, clip_high: how far the ratio may fall below 1 and rise above it; [] or [B, W].
      Infinite for no bound.
    surrogate: one of SURROGATES; but for "ppo" the bounds are more than 0.
    loss_mask: steps that count, [B, W] bool. loss_weight: u, [B, W] float32; None for 1.

  Returns:
    (loss [] float32; dict of `log_ratio` [B, W] float32, `clipped` [B, W] bool, where the bound
    or `loss_mask` took the gradient, or SPO turned it, and `outside` [B, W] bool, where the ratio
    is beyond a bound on either side; 0 and False where the weight is 0).
  """
  if surrogate not in SURROGATES:
    raise ValueError(f"surrogate={surrogate!r} is none of {SURROGATES}")
  chex.assert_rank([log_ratio, adv], [2, 1])
  chex.assert_equal_shape([log_ratio, weights])
  chex.assert_equal_shape_prefix([log_ratio, adv], 1)
  chex.assert_type([log_ratio, adv, weights], jnp.float32)
  counts = weights > 0
  log_ratio = jnp.where(counts, log_ratio, 0.0)
  rho = jnp.expm1(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
  adv = adv[:, None]
  free = -rho * adv
  if loss_mask is None:
    bound = -jnp.clip(rho, -clip_low, clip_high) * adv
    losses, clipped = jnp.maximum(free, bound), bound > free
    if surrogate != "ppo":
      pulled = free + jnp.abs(adv) * jnp.square(rho) / (2 * jnp.where(adv > 0, clip_high, clip_low))
      losses = pulled if surrogate == "spo" else jnp.where(adv > 0, losses, pulled)
  else:
    chex.assert_shape(loss_mask, log_ratio.shape)
    losses, clipped = jnp.where(loss_mask, free, 0.0), ~loss_mask
  if loss_weight is not None:
    chex.assert_shape(loss_weight, log_ratio.shape)
    weights = weights * loss_weight
  outside = (rho < -clip_low) | (rho > clip_high)
  return jnp.sum(weights * losses), {
    "log_ratio": log_ratio, "clipped": counts & clipped, "outside": counts & outside,
  }


def step_weights(valid: chex.Array, steps: int) -> chex.Array:
  """The weight of each step, 1 / (B W) with B the valid trajectories: [B, W] float32 of valid [B].

  Taken of a whole batch and then cut into microbatches, the microbatches' losses add up exactly.
  """
  chex.assert_rank(valid, 1)
  chex.assert_type(valid, bool)
  weight = valid.astype(jnp.float32) / (jnp.maximum(valid.sum(), 1) * max(steps, 1))
  return jnp.broadcast_to(weight[:, None], (valid.shape[0], steps))


def reweight(kind: str, dt: chex.Array) -> chex.Array:
  """The weight u of each step's surrogate, as `dt`: 1, or 1 / |dt| (`inv_dt`, GRPO-Guard)."""
  if kind not in REWEIGHTS:
    raise ValueError(f"kind={kind!r} is none of {REWEIGHTS}")
  return jnp.ones_like(dt) if kind == "none" else 1 / jnp.abs(dt)


def divergence(
  mean: chex.Array, mean_old: chex.Array, std: chex.Array, mask: chex.Array
) -> chex.Array:
  """KL divergence of two Gaussians of the same std, a mean over elements: <d^2> / (2 std^2).

  mean, mean_old [..., I, C] float32; std more than 0, [...] or broadcasting to it -> [...] float32.
  """
  squared = jnp.square(difference(mean, mean_old, mask))
  return element_mean(squared, mask) / (2 * jnp.square(std))


def dppo_mask(
  divergence: chex.Array, log_ratio: chex.Array, adv: chex.Array, *, threshold: float
) -> chex.Array:
  """Which steps Flow-DPPO (2606.11025) keeps: near ones, and far ones that move back.

  A step goes when its divergence is at least the threshold (1e-5 in the paper) and its ratio has
  already moved the way its advantage pushes.

  divergence, log_ratio (of kind `plain`) [B, W] float32, adv [B] -> [B, W] bool.
  """
  chex.assert_equal_shape([divergence, log_ratio])
  chex.assert_rank([divergence, adv], [2, 1])
  away = jnp.sign(log_ratio) * jnp.sign(adv)[:, None] > 0
  return ~((divergence >= threshold) & away)


def scaled_clip(clip: chex.Numeric, elements: chex.Numeric, reference: int = 262144):
  """A clip range, or velocity-error weight, for images of D elements: clip sqrt(reference / D).

  A log ratio is a mean over D elements, so it shrinks as 1 / sqrt(D) at the same drift per element.
  UniGRPO's 1e-6 and 1.5e-5 are of 1024 x 1024 pixels: 4096 tokens of 64 features.
  """
  return clip * (reference / elements) ** 0.5
