"""Integrating the flow from noise (t = 1) to data (t = 0), with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import types

VelocityFn = Callable[[chex.Array, chex.Array], chex.Array]

RENORMS = ("global", "channel", "text_channel")


def time_grid(num_timesteps: int, shift: float):
  """Shifted schedule t = shift u / (1 + (shift - 1) u), u from 1 to 0: [num_timesteps] float32.

  `num_timesteps` points make `num_timesteps - 1` velocity evaluations (BAGEL, `generate_image`).
  """
  # Counted down exactly: linspace is off by 6e-8, which is much beside the smallest t. And on the
  # host: compiled, a division by a constant is a product, and 47 * (1 / 47) is not 1.
  u = np.arange(num_timesteps - 1, -1, -1, dtype=np.float32) / np.float32(num_timesteps - 1)
  t = np.float32(shift) * u / (1 + np.float32(shift - 1) * u)
  return jnp.asarray(np.minimum(t, np.float32(1)))


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Classifier-free guidance (Ho and Salimans 2022) as BAGEL applies it."""

  text_scale: float = 4.0  # 1 or less turns all guidance off, the image branch too
  image_scale: float = 1.0  # 1 or less leaves the image branch out
  interval: tuple[float, float] = (0.4, 1.0)  # acts where low < t <= high, t shifted
  renorm: str = "global"  # one of RENORMS
  renorm_min: float = 0.0  # lower clip of the renorm factor; 1 turns renorm off
  # Takes the `global` norm over all images together, as the official code does to a pack; otherwise
  # an image's result is its own.
  pack_coupled: bool = False


def guide(v, v_text, v_image, guidance: Guidance):
  """Combines conditional and unconditional velocities.

  With a = v_text, b = v_image: w = a + s_text (v - a), then b + s_image (. - b); the result is
  scaled by clip(|v| / |w|, renorm_min, 1), over a token's features (`channel`), a whole image
  (`global`), or a token's features before the image step (`text_channel`). BAGEL, `_forward_flow`.

  All [M, I, C] float32, zero at padding: v conditional, v_text without the last text, v_image
  without images, or None where image_scale <= 1.
  """
  chex.assert_rank(v, 3)
  chex.assert_equal_shape([v, v_text])
  axes = {"channel": (2,), "text_channel": (2,), "global": (1, 2)}[guidance.renorm]
  if guidance.pack_coupled and guidance.renorm == "global":
    axes = (0, 1, 2)
  norm = lambda a: jnp.sqrt(jnp.sum(a * a, axis=axes, keepdims=True))

  def renorm(w):
    return w * jnp.clip(norm(v) / (norm(w) + 1e-8), guidance.renorm_min, 1.0)

  w = v_text + guidance.text_scale * (v - v_text)
  if guidance.renorm == "text_channel":
    w = renorm(w)
  if v_image is not None:
    w = v_image + guidance.image_scale * (w - v_image)
  return w if guidance.renorm == "text_channel" else renorm(w)


def guided(
  velocity_fn: VelocityFn, text_fn: VelocityFn | None, image_fn: VelocityFn | None,
  guidance: Guidance,
) -> VelocityFn:
  """A velocity function, (x [M, I, C], t []) -> [M, I, C], with guidance where the interval asks.

  `text_fn` and `image_fn` are the branches, needed where their scale exceeds 1.
  """

  if guidance.text_scale <= 1:
    return velocity_fn
  low, high = guidance.interval

  def combined(x, t):
    v = velocity_fn(x, t)

    def with_guidance():
      v_image = image_fn(x, t) if guidance.image_scale > 1 else None
      return guide(v, text_fn(x, t), v_image, guidance)

    return jax.lax.cond((t > low) & (t <= high), with_guidance, lambda: v)

  return combined


def integrate(
  velocity_fn: VelocityFn, noise, times, *, record: bool = False,
  on_step: Callable[[chex.Array], None] | None = None,
):
  """Euler steps x <- x - v (t_i - t_{i+1}) down the grid, as one `lax.scan`.

  Args:
    velocity_fn: (x, t []) -> velocity of the same shape.
    noise: x at times[0], float32.
    times: [N] float32, decreasing; see `time_grid`.
    on_step: called on the host with the index of each finished step.

  Returns:
    x at times[-1], float32; with `record` (x, (x before each step [N-1, ...], velocities)).
  """
  chex.assert_type([noise, times], jnp.float32)

  def step(x, inputs):
    index, t, t_next = inputs
    v = velocity_fn(x, t).astype(jnp.float32)
    if on_step is not None:
      jax.debug.callback(on_step, index)
    return x - v * (t - t_next), (x, v) if record else None

  steps = jnp.arange(times.shape[0] - 1)
  x, history = jax.lax.scan(step, noise, (steps, times[:-1], times[1:]))
  return (x, history) if record else x


def integrate_recording(
  velocity_fn: VelocityFn, noise: chex.Array, times: chex.Array, steps: chex.Array, *,
  on_step: Callable[[chex.Array], None] | None = None,
) -> types.FlowRollout:
  """`integrate`, with the latents before some steps of each row.

  Args:
    velocity_fn, noise, times, on_step: see `integrate`; x is [B, I, C].
    steps: which of the N - 1 steps of each row are recorded, [B, W] int32.

  Returns:
    The images, and `x_t` and `t` of the recorded steps: constants, no gradient flows to them.
  """
  chex.assert_rank([noise, steps], [3, 2])
  chex.assert_type(steps, jnp.int32)

  def step(carry, inputs):
    x, recorded = carry
    index, t, t_next = inputs
    recorded = jnp.where((steps == index)[..., None, None], x[:, None], recorded)
    v = velocity_fn(x, t).astype(jnp.float32)
    if on_step is not None:
      jax.debug.callback(on_step, index)
    return (x - v * (t - t_next), recorded), None

  index = jnp.arange(times.shape[0] - 1)
  recorded = jnp.zeros(steps.shape + noise.shape[1:])
  (x, recorded), _ = jax.lax.scan(step, (noise, recorded), (index, times[:-1], times[1:]))
  recorded = jax.lax.stop_gradient(recorded)
  return types.FlowRollout(latents=x, x_t=recorded, t=times[steps])
