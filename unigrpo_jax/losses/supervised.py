"""The objectives of supervised training: next-token cross entropy and velocity regression."""

from __future__ import annotations

from collections.abc import Callable
import math

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax.losses import text


def cross_entropy(
  logits_fn: Callable[[chex.Array], chex.Array], hidden: chex.Array, label_ids: chex.Array,
  label_weight: chex.Array, *, chunk: int,
) -> tuple[chex.Array, chex.Array]:
  """Weighted mean cross entropy of the labels, never holding [B, Y, V] logits.

    ce_y = log sum_v exp(logits_yv) - logits_y[label_y],    loss = sum_y w_y ce_y / sum_y w_y

  logits_fn, hidden and chunk as of `text.by_chunk`; label_ids [B, Y] int32; label_weight w [B, Y]
  float32, not negative, 0 for padding -> (loss [], 0 where all weights are 0; ce [B, Y] in nats,
  0 at weight 0), float32. Source: official BAGEL `Bagel.forward`; with w = 1 / sqrt(labels of the
  text) its `ce_loss_reweighting`.
  """

  def measure(logits, ids):
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  ce = text.by_chunk(measure, logits_fn, hidden, label_ids, label_weight > 0, chunk=chunk)
  weight = label_weight.astype(jnp.float32)
  return _mean(ce * weight, weight), ce


def velocity_mse(
  velocity: chex.Array, target: chex.Array, noise: chex.Array, mask: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Mean squared error of predicted velocities over the latent tokens that count.

    e = (v - (noise - target))^2,    loss = mean over counting tokens of mean_c e

  Rectified flow (Liu et al. 2022): dx/dt of x_t = (1 - t) target + t noise. Source: official BAGEL
  `Bagel.forward`. There is no weight in t.

  velocity, target, noise [..., I, C], mask [..., I] bool -> (loss [], 0 where nothing counts;
  e [..., I, C], 0 where mask is False), float32.
  """
  chex.assert_equal_shape([velocity, target, noise])
  chex.assert_shape(mask, velocity.shape[:-1])
  goal = noise.astype(jnp.float32) - target.astype(jnp.float32)
  # Cleared before squaring, so that no gradient of padding is 0 * NaN.
  difference = jnp.where(mask[..., None], velocity.astype(jnp.float32) - goal, 0.0)
  squared = jnp.square(difference)
  return _mean(squared.mean(-1), mask.astype(jnp.float32)), squared


def shifted_timesteps(normal: chex.ArrayNumpy | chex.Array, *, shift: float) -> chex.Array:
  """Flow times for training, from standard normal draws z: float32 in [0, 1], 1 is noise.

    t = s sigma(z) / (1 + (s - 1) sigma(z)) = sigma(z + log s)

  A larger s is noisier; a draw of -inf is a clean image, t = 0. NumPy in, NumPy out. Source:
  official BAGEL `Bagel.forward` (logit-normal times, Esser et al. 2024, eq. 19 and 23).
  """
  xp = normal.__array_namespace__()
  z = normal.astype(xp.float32) + math.log(shift)
  return xp.exp(-xp.logaddexp(xp.float32(0), -z))


def _mean(values: chex.Array, weight: chex.Array) -> chex.Array:
  """sum(values) / sum(weight) in float32; 0 where all weights are 0."""
  total = weight.sum()
  return jnp.where(total > 0, values.sum() / jnp.where(total > 0, total, 1.0), 0.0)
