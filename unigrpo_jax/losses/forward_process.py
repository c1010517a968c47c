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
WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")


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
  return 0.5 + 0.5 * jnp.clip(adv / bound, -1, 1)


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


def awm_log_prob(
  v: chex.Array, x_0: chex.Array, noise: chex.Array, t: chex.Array, mask: chex.Array, *,
  weighting: str = "uniform", power: float = 0.25,
) -> chex.Array:
  """The matching error of a noised image, taken for its log-probability.

    m = <(v - (noise - x_0))^2>
    uniform -m;   t  -t m;   t2  -t^2 m
    huber   -t (sqrt(m + 1e-10) - 1e-5)
    ghuber  -t ((m + 1e-10)^power - 1e-10^power) / power

  v at x_t, x_0, noise [..., I, C], t [...], mask [..., I] -> [...] float32. Source: advantage
  weighted matching (Xue et al. 2025, 2509.25050), `compute_log_prob_awm`. The negative of `uniform`
  is the loss that FPO compares.
  """

  chex.assert_equal_shape([v, x_0, noise])
  chex.assert_shape(t, v.shape[:-2])
  miss = jnp.where(mask[..., None], v.astype(jnp.float32) - (noise - x_0), 0.0)
  m = flow.element_mean(jnp.square(miss), mask)
  if weighting == "huber":
    return -t * (jnp.sqrt(m + 1e-10) - 1e-5)
  if weighting == "ghuber":
    return -t * ((m + 1e-10) ** power - 1e-10**power) / power
  return -m * {"uniform": 1.0, "t": t, "t2": jnp.square(t)}[weighting]


def awm_log_ratio(logp: chex.Array, logp_old: chex.Array) -> chex.Array:
  """Log importance ratios of AWM, one a time, [B, N]; no gradient to `logp_old`."""
  chex.assert_rank(logp, 2)
  chex.assert_equal_shape([logp, logp_old])
  return logp - jax.lax.stop_gradient(logp_old)


def fpo_log_ratio(losses: chex.Array, losses_old: chex.Array) -> chex.Array:
  """Log importance ratios of flow policy optimization (2507.21053), one an image: [B, 1] float32.

    mean_j l_old_j - mean_j l_j

  `losses`, [B, N] float32, are the matching errors l at N times; no gradient to `losses_old`.
  """
  chex.assert_rank(losses, 2)
  chex.assert_equal_shape([losses, losses_old])
  return (jax.lax.stop_gradient(losses_old) - losses).mean(-1, keepdims=True)
