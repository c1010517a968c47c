"""The loss of images that a differentiable reward scores: ReFL (Xu et al. 2023) and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

# Beyond these a probability has hardly a gradient left.
SATURATED = (0.01, 0.99)


def reward_with_gradient(
  reward_fn: Callable[..., chex.Array], x_0: chex.Array, *inputs: Any, parts: int = 1,
  ways: int = 1,
) -> tuple[chex.Array, chex.Array]:
  """Rewards that carry their gradient with them: (rewards [B], d reward / d x_0 like `x_0`).

    R(x_0) + <g, x_0 - sg(x_0)>,    g = dR / dx_0 at x_0

  The reward is differentiated at once, so that nothing of it is kept while the network that made
  x_0 is. Its value and its first derivative are exact.

  Args:
    reward_fn: of latents [n, ...] and rows of `inputs` -> [n] float32; a row's reward depends on
      that row alone.
    x_0: [B, ...] float32.
    inputs: trees of arrays with B rows.
    parts: that the rows are cut into and scored one after the other; the memory is that of one.
    ways: of devices that hold the rows in order; each part has rows of all of them. parts * ways
      divides B.
  """
  fixed = jax.lax.stop_gradient(x_0)

  def of_part(part):
    x_0, *inputs = part
    rewards, pull = jax.vjp(lambda x_0: reward_fn(x_0, *inputs), x_0)
    chex.assert_shape(rewards, x_0.shape[:1])
    return rewards, *pull(jnp.ones_like(rewards))

  def cut(a):
    a = a.reshape(ways, parts, -1, *a.shape[1:])
    return jnp.moveaxis(a, 1, 0).reshape(parts, -1, *a.shape[3:])

  def joined(a):
    a = a.reshape(parts, ways, -1, *a.shape[2:])
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[3:])

  rows = (fixed, *inputs)
  if parts == 1:
    rewards, gradient = of_part(rows)
  else:
    rewards, gradient = jax.tree.map(joined, jax.lax.map(of_part, jax.tree.map(cut, rows)))
  rewards, gradient = jax.lax.stop_gradient((rewards, gradient))
  axes = tuple(range(1, x_0.ndim))
  return rewards + jnp.sum(gradient * (x_0 - fixed), axis=axes), gradient


def reward_loss(
  rewards: chex.Array, weights: chex.Array, *, margin: float
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """How far rewards are below a margin: sum_b w_b relu(margin - R_b).

  Source: ImageReward (Xu et al. 2023), `ReFL.py`, with weights of grad_scale / B.

  Args:
    rewards: R, [B] float32.
    weights: w, [B]; those of all microbatches add up to 1, or to a scale.
    margin: beyond which a reward is good enough; 1 never is for a probability.

  Returns:
    (loss [] float32, {"reward", "zero_gradient", "saturated"}: of each row, [B] float32).
  """
  chex.assert_rank(rewards, 1)
  chex.assert_equal_shape([rewards, weights])
  missing = jax.nn.relu(margin - rewards.astype(jnp.float32))
  # Where the weight is 0 the reward may be anything, NaN too.
  loss = jnp.sum(jnp.where(weights > 0, weights * missing, 0.0))
  low, high = SATURATED
  signals = {
    "reward": rewards, "zero_gradient": rewards >= margin,
    "saturated": (rewards < low) | (rewards > high),
  }
  return loss, {name: jnp.float32(jax.lax.stop_gradient(a)) for name, a in signals.items()}
