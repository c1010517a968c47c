"""Rewards -> advantages, relative to the other trajectories of the same prompt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

STDS = ("group", "batch", "none")


def group_advantages(
  rewards: chex.Array, group: chex.Array, *,
  num_groups: int, std: str = "group", ddof: int = 0, eps: float = 1e-4, clip: float | None = None,
) -> tuple[chex.Array, chex.Array, dict[str, chex.Array]]:
  """How much better each trajectory is than its group, in standard deviations.

    adv_i = (R_i - mean_g R) / (std R + eps),   g the group of i

  Source: UniGRPO eq. 1. The defaults are Flow-GRPO's; others take squares over n - 1 (ddof=1, with
  eps 1e-4, 1e-6 or 1e-8), the standard deviation of the batch, or none (Dr. GRPO).

  Args:
    rewards: R, [B]; NaN where scoring failed. A group with such a reward is dropped whole: scoring
      a failure as 0 would shift the advantages of its neighbours.
    group: 0 to num_groups - 1, [B] int; members need not be neighbours, groups may be empty.
    std: of the `group`, of all valid rewards of the `batch`, or `none`.
    clip: bound on |adv|.

  Returns:
    (adv [B] float32, 0 where invalid; valid [B] bool; metrics, each [] float32:
    `zero_std_fraction` and `group_std_mean` of the valid groups, `dropped_groups`).
  """
  if std not in STDS:
    raise ValueError(f"std={std!r} is none of {STDS}")
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, group])
  rewards = rewards.astype(jnp.float32)
  total = lambda values: jax.ops.segment_sum(values, group, num_groups)  # [B] -> [num_groups]
  finite = jnp.isfinite(rewards)
  members = total(jnp.ones_like(rewards))
  whole = total(finite.astype(jnp.float32)) == members
  valid = whole[group]
  rewards = jnp.where(valid, rewards, 0.0)
  # Counted from the group's least reward: equal rewards have a deviation of exactly 0.
  least = jax.ops.segment_min(rewards, group, num_groups)[group]
  above = rewards - least
  deviation = above - (total(above) / jnp.maximum(members, 1))[group]
  squares = total(jnp.square(deviation))
  group_std = jnp.sqrt(squares / jnp.maximum(members - ddof, 1))

  adv = deviation
  if std != "none":
    scale = (group_std[group] if std == "group" else _std(rewards, valid, ddof)) + eps
    adv = deviation / jnp.where(scale > 0, scale, 1.0)  # eps may be 0, and rewards equal.
  if clip is not None:
    adv = jnp.clip(adv, -clip, clip)
  counted = whole & (members > 0)
  groups = jnp.maximum(counted.sum(), 1)
  metrics = {
    "zero_std_fraction": (counted & (group_std == 0)).sum() / groups,
    "dropped_groups": (~whole).sum().astype(jnp.float32),
    "group_std_mean": jnp.where(counted, group_std, 0.0).sum() / groups,
  }
  return jnp.where(valid, adv, 0.0), valid, metrics


def _std(rewards: chex.Array, valid: chex.Array, ddof: int) -> chex.Array:
  """Standard deviation of the valid rewards, [] float32; the others are 0."""
  count = valid.sum()
  mean = rewards.sum() / jnp.maximum(count, 1)
  spread = jnp.sum(jnp.where(valid, jnp.square(rewards - mean), 0.0))
  return jnp.sqrt(spread / jnp.maximum(count - ddof, 1))
