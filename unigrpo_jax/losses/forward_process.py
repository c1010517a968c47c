"""Objectives that noise a finished image again instead of keeping the steps that drew it.

x_t = (1 - t) x_0 + t noise, with x_0 the generated image. The ratios of AWM and FPO go through
`flow.policy_loss`, with a column for each of N times. <.> and `mask` are those of `flow`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax.losses import flow

OPTIMALITIES = ("all", "positive_only", "negative_only", "one_only", "binary")
AWM_WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")
AWM_RATIOS = ("exp_first", "sum_first")
FPO_WEIGHTINGS = ("uniform", "one_minus_t2")
# What is made of the differences of matching losses, and the bound of its logarithm.
FPO_RATIOS = {
  "mean_first": jnp.inf, "per_pair": 3.0, "clamped_mean": 3.0, "straight_through": 10.0,
}
HUBER_EPS = 1e-10
GHUBER_POWER = 0.25  # of all released recipes


def optimality(adv: chex.Array, *, bound: float, kind: str = "all") -> chex.Array:
  """The probability that a trajectory is a good one: 1/2 + clip(A / bound, -1, 1) / 2, as `adv`.

  Source: DiffusionNFT (Zheng et al. 2025), eq. 7 and the `adv_mode` of its code: `positive_only`
  and `negative_only` take the other advantages for 0, `binary` takes their sign, `one_only` 1 where
  A > 0 and 0 elsewhere.
  """
  if kind not in OPTIMALITIES:
    raise ValueError(f"kind={kind!r} is none of {OPTIMALITIES}")
  chex.assert_type(adv, jnp.float32)
  if kind == "positive_only":
    adv = jnp.maximum(adv, 0)
  elif kind == "negative_only":
    adv = jnp.minimum(adv, 0)
  elif kind == "one_only":
    adv = (adv > 0).astype(jnp.float32)
  elif kind == "binary":
    adv = jnp.sign(adv)
  return 0.5 + 0.5 * unit_advantages(adv, bound=bound)


def nft_losses(
  v: chex.Array, v_old: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array,
  optimal: chex.Array, mask: chex.Array, *, beta: float, scale: float,
) -> chex.Array:
  """The loss of DiffusionNFT: pulls one mixture of velocities to the image, and pushes its mirror.

    v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v
    E(u) = <(x_t - t u - x_0)^2> / <|x_t - t u - x_0|>
    loss = (r E(v+) + (1 - r) E(v-)) scale / beta

  v, v_old at x_t, x_0, noise [..., I, C]; t, optimal (r, see `optimality`) [...] -> [...] float32.
  The scale is the bound of the advantages. No gradient flows to v_old, nor through a denominator,
  which is at least 1e-5. Source: DiffusionNFT (Zheng et al. 2025), eq. 9 and its code.
  """
  chex.assert_equal_shape([v, v_old, x_0, noise])
  chex.assert_equal_shape([t, optimal, v[..., 0, 0]])
  v, v_old = v.astype(jnp.float32), jax.lax.stop_gradient(v_old).astype(jnp.float32)
  time = t[..., None, None]
  away = time * (noise - x_0)  # x_t - x_0

  def error(u):
    miss = jnp.where(mask[..., None], away - time * u, 0.0)
    size = flow.element_mean(jnp.abs(jax.lax.stop_gradient(miss)), mask)
    return flow.element_mean(jnp.square(miss), mask) / jnp.maximum(size, 1e-5)

  good, bad = error((1 - beta) * v_old + beta * v), error((1 + beta) * v_old - beta * v)
  return (optimal * good + (1 - optimal) * bad) * scale / beta


def matching_error(
  v: chex.Array, x_0: chex.Array, noise: chex.Array, mask: chex.Array
) -> chex.Array:
  """How far velocities are from the image's own, m = <(v - u)^2> with u = noise - x_0.

  v at x_t, x_0, noise [..., I, C], mask [..., I] -> [...] float32.
  """
  chex.assert_equal_shape([v, x_0, noise])
  return flow.element_mean(jnp.square(flow.difference(v, noise - x_0, mask)), mask)


def matching_gain(
  v: chex.Array, v_old: chex.Array, x_0: chex.Array, noise: chex.Array, mask: chex.Array
) -> chex.Array:
  """By how much the matching error fell, m_old - m, as <(v_old - v)(v_old + v - 2 u)>.

  A difference of two means of order 1 is only known to 1e-7; this product is known to 1e-7 of
  itself, and is exactly 0 where v = v_old.

  v, v_old at x_t, x_0, noise [..., I, C], mask [..., I] -> [...] float32; no gradient to v_old.
  """
  chex.assert_equal_shape([v, v_old, x_0, noise])
  v_old, u = jax.lax.stop_gradient(v_old), noise - x_0
  away = flow.difference(v_old, u, mask) + flow.difference(v, u, mask)
  return flow.element_mean(flow.difference(v_old, v, mask) * away, mask)


def awm_log_prob(
  v: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array, mask: chex.Array, *,
  weighting: str = "ghuber", power: float = GHUBER_POWER,
) -> chex.Array:
  """The matching error m of a noised image, taken for its log-probability.

    uniform -m;   t  -t m;   t2  -t^2 m
    huber   -t (sqrt(m + 1e-10) - 1e-5)
    ghuber  -t ((m + 1e-10)^power - 1e-10^power) / power

  v at x_t, x_0, noise [..., I, C], t [...], mask [..., I] -> [...] float32. Source: advantage
  weighted matching (Xue et al. 2025, 2509.25050), `compute_log_prob_awm`.
  """
  chex.assert_shape(t, v.shape[:-2])
  m = matching_error(v, x_0, noise, mask)
  if weighting == "huber":
    return -t * (jnp.sqrt(m + HUBER_EPS) - HUBER_EPS**0.5)
  if weighting == "ghuber":
    return -t * ((m + HUBER_EPS) ** power - HUBER_EPS**power) / power
  return -m * _factor(weighting, t)


def awm_log_ratio(
  v: chex.Array, v_old: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array,
  mask: chex.Array, *, weighting: str = "ghuber", power: float = GHUBER_POWER,
) -> chex.Array:
  """log p(v) - log p(v_old) of `awm_log_prob`, of its arguments, from `matching_gain`.

  (m + c)^power = (m_old + c)^power (1 - gain / (m_old + c))^power. Exactly 0 where v = v_old; no
  gradient to v_old.
  """
  gain = matching_gain(v, v_old, x_0, noise, mask)
  if weighting not in ("huber", "ghuber"):
    return gain * _factor(weighting, t)
  power, scale = (0.5, 1.0) if weighting == "huber" else (power, 1 / power)
  base = matching_error(jax.lax.stop_gradient(v_old), x_0, noise, mask) + HUBER_EPS
  # m + c is more than 0, but its rounding need not be.
  change = jnp.log1p(jnp.maximum(-gain / base, jnp.finfo(jnp.float32).eps - 1))
  return -t * scale * base**power * jnp.expm1(power * change)


def _factor(weighting: str, t: chex.Array) -> chex.Array:
  return {"uniform": jnp.ones_like(t), "t": t, "t2": jnp.square(t)}[weighting]


def unit_advantages(adv: chex.Array, *, bound: float) -> chex.Array:
  """clip(A, -bound, bound) / bound, as `adv`: advantages of at most 1 either way (AWM)."""
  chex.assert_type(adv, jnp.float32)
  return jnp.clip(adv / bound, -1, 1)


def awm_loss(
  v: chex.Array, v_old: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array,
  mask: chex.Array, adv: chex.Array, weights: chex.Array, *, weighting: str, ratio: str,
  clip: float, bound: float | None, power: float = GHUBER_POWER,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Advantage weighted matching (Xue et al. 2025): `flow.policy_loss` of unit advantages.

  v to mask: of N times, [B, N, ...], see `awm_log_ratio`; adv [B], weights [B, N] float32. `ratio`
  is "exp_first", one a time, or "sum_first", one of the mean over the times of a trajectory; a clip
  of infinity is none; `bound` is that of `unit_advantages`, None for none. Returns (loss [],
  metrics [B, N], or [B, 1] where a trajectory has one ratio).
  """
  if ratio not in AWM_RATIOS:
    raise ValueError(f"ratio={ratio!r} is none of {AWM_RATIOS}")
  log_ratio = awm_log_ratio(
    v, v_old, x_0, noise, t, mask, weighting=weighting, power=power
  )
  if ratio == "sum_first":
    log_ratio, weights = _one_an_image(log_ratio, weights)
  if bound is not None:
    adv = unit_advantages(adv, bound=bound)
  return flow.policy_loss(log_ratio, adv, weights, clip_low=clip, clip_high=clip)


def fpo_weight(weighting: str, t: chex.Array) -> chex.Array:
  """The weight of a pair's matching error, as t: 1 (`uniform`) or (1 - t)^2 (`one_minus_t2`).

  The second makes it the squared error of the noise: noise - x_t - (1 - t) v = (1 - t)(u - v).
  """
  return {"uniform": jnp.ones_like(t), "one_minus_t2": jnp.square(1 - t)}[weighting]


def fpo_losses(
  v: chex.Array, v_old: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array,
  mask: chex.Array, *, weighting: str = "one_minus_t2",
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Matching losses of pairs (t, noise): (l, l_old, l_old - l), each [...] float32.

  l = w(t) <(v - (noise - x_0))^2>, see `fpo_weight`; the difference is of `matching_gain`. No
  gradient to v_old. Source: flow policy optimization (2507.21053).
  """
  w = fpo_weight(weighting, t)
  losses = w * matching_error(v, x_0, noise, mask)
  old = w * matching_error(jax.lax.stop_gradient(v_old), x_0, noise, mask)
  return losses, old, w * matching_gain(v, v_old, x_0, noise, mask)


def fpo_surrogate(
  losses: chex.Array, old: chex.Array, gain: chex.Array, adv: chex.Array, weights: chex.Array, *,
  ratio: str, clip: float, surrogate: str = "ppo", bound: float | None = None,
  cap: float = jnp.inf, cap_negative: float = jnp.inf,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """`flow.policy_loss` of the ratios of matching losses: the objectives of FPO and FPO++.

    gain = min(l_old, cap) - min(l, cap, and cap_negative where A < 0)
    mean_first        exp(mean_j gain_j), one a trajectory              playground
    per_pair          exp(clip(gain_j, -bound, bound)), bound 3         playground
    clamped_mean      exp(mean_j clip(gain_j, -bound, bound)), bound 3  gridworld
    straight_through  exp(min(gain_j, bound)), bound 10, its gradient as without min   FPO++

  Args:
    losses, old, gain: see `fpo_losses`; of N pairs, [B, N] float32.
    adv: [B] float32. weights: [B, N] float32.
    ratio: one of FPO_RATIOS.
    clip, surrogate: of `flow.policy_loss`.
    bound: of logarithms of ratios; None: the usual one of `ratio`.
    cap, cap_negative: largest matching losses; infinite for none.

  Returns:
    (loss [], metrics [B, N], or [B, 1] where a trajectory has one ratio).
  """
  if ratio not in FPO_RATIOS:
    raise ValueError(f"ratio={ratio!r} is none of {FPO_RATIOS}")
  chex.assert_rank(losses, 2)
  chex.assert_equal_shape([losses, old, gain, weights])
  if cap < jnp.inf or cap_negative < jnp.inf:
    most = jnp.where(adv < 0, jnp.minimum(cap, cap_negative), cap)[:, None]
    capped = jnp.minimum(old, cap) - jnp.minimum(losses, most)
    gain = jnp.where((losses > most) | (old > cap), capped, gain)
  bound = FPO_RATIOS[ratio] if bound is None else bound
  if ratio == "straight_through":
    gain += jax.lax.stop_gradient(jnp.minimum(gain, bound) - gain)
  elif ratio != "mean_first":
    gain = jnp.clip(gain, -bound, bound)
  if ratio in ("mean_first", "clamped_mean"):
    gain, weights = _one_an_image(gain, weights)
  return flow.policy_loss(
    gain, adv, weights, clip_low=clip, clip_high=clip, surrogate=surrogate
  )


def _one_an_image(log_ratios: chex.Array, weights: chex.Array) -> tuple[chex.Array, chex.Array]:
  """The mean over the times of a trajectory, and its weight: [B, 1] each."""
  return log_ratios.mean(1, keepdims=True), weights.sum(1, keepdims=True)
