"""Images that a gradient flows through, from a latent on the way to the network that moves it.

ReFL predicts the image in one step from a late latent, DRaFT-K takes the last K steps of the flow,
direct alignment noises the finished image again with the noise that it came from. In all of them
what comes before is a constant.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax.sampling import flow


def late_range(num_steps: int) -> tuple[int, int]:
  """The last quarter of the steps, (first, one after the last): ReFL draws one of them.

  At least one step. Source: ImageReward (Xu et al. 2023): steps 30 to 39 of 40, both included.
  """
  return min(-(-3 * num_steps // 4), num_steps - 1), num_steps


def predict(x_t: chex.Array, v: chex.Array, t: chex.Array) -> chex.Array:
  """The image by one step from t to 0: x_t - t v; no gradient to x_t.

  x_t, v [..., I, C], t [...] or broadcasting to it, float32 -> [..., I, C] float32.
  """
  chex.assert_equal_shape([x_t, v])
  return jax.lax.stop_gradient(x_t) - t[..., None, None] * v.astype(jnp.float32)


def finish(velocity_fn: flow.VelocityFn, x_t: chex.Array, times: chex.Array) -> chex.Array:
  """The image by Euler steps down `times`, each of which the backward pass computes again.

  Args:
    velocity_fn: (x, t []) -> velocity of the same shape.
    x_t: at times[0], float32; no gradient flows to it, but through all steps from there.
    times: [K + 1] float32, decreasing.
  """
  @jax.checkpoint
  def step(x, t, t_next):
    return x - velocity_fn(x, t).astype(jnp.float32) * (t - t_next)

  x = jax.lax.stop_gradient(x_t)
  for t, t_next in zip(times[:-1], times[1:]):
    x = step(x, t, t_next)
  return x


def first_differentiated(num_steps: int, gradient_steps: int) -> int:
  """The first of the last `gradient_steps` steps; 0, and more than there are, take them all."""
  return max(num_steps - gradient_steps, 0) if gradient_steps else 0


def noised(x_0: chex.Array, noise: chex.Array, t: chex.Array) -> chex.Array:
  """A finished image with its own noise at time t: (1 - t) x_0 + t noise; shapes of `predict`."""
  t = t[..., None, None]
  return (1 - t) * x_0 + t * noise


def align(
  x_t: chex.Array, v: chex.Array, noise: chex.Array, t: chex.Array, t_next: chex.Array
) -> chex.Array:
  """The image of a noised one after a step from t to t_next, its noise taken away again.

    x' = x_t + (t_next - t) v,    (x' - t_next noise) / (1 - t_next)

  It depends on v the less the smaller the step, so early times can be trained too. A step towards
  noise, t_next > t, is the other direction of the authors ("inversion"). Source: SRPO (Shen et al.
  2025). Shapes of `predict`; t_next < 1; no gradient to x_t and the noise.
  """
  chex.assert_equal_shape([x_t, v, noise])
  x_t, noise = jax.lax.stop_gradient((x_t, noise))
  along = lambda a: a[..., None, None]
  x_next = x_t + along(t_next - t) * v.astype(jnp.float32)
  return (x_next - along(t_next) * noise) / along(1 - t_next)
