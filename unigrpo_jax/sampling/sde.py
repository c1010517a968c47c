"""Integrating the flow with noise: at the steps of a window each step is a draw from a Gaussian.

Time runs from t = 1 (noise) to t = 0 (data), so dt = t_next - t is negative. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable
import math

import chex
from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types

KINDS = ("flow", "dance", "cps")


@struct.dataclass
class Transition:
  """p(x_next | x) = N(mean, std^2), and how its mean moves with the velocity; float32."""

  mean: chex.Array  # [..., I, C]
  std: chex.Array  # of the injected noise, [...]; 0 for a step without noise
  dt: chex.Array  # t_next - t, negative, [...]
  slope: chex.Array  # d mean / d velocity, [...]


def transition(
  x: chex.Array, v: chex.Array, t: chex.Array, t_next: chex.Array, t_second: chex.Array, *,
  kind: str, noise_level: float,
) -> Transition:
  """One step from t to t_next with noise: an Euler step and a push g along the predicted noise.

    mean = x + v dt + g (x + (1 - t) v)

    flow   sigma = a sqrt(t / (1 - t)),  g = sigma^2 dt / (2 t),   std = sigma sqrt|dt|
    dance  sigma = a,                    g = sigma^2 dt / (2 t),   std = sigma sqrt|dt|
    cps    g = t_next (|cos(a pi/2)| - 1),                         std = t_next sin(a pi/2)

  In `flow`, t = 1 would divide by zero: there 1 - t is taken at `t_second`, the second time of the
  schedule, []. A noise level of 0 is the Euler step of the ODE. Source: UniGRPO eq. 3 and Flow-GRPO
  (Liu et al. 2025); DanceGRPO (Xue et al. 2025), whose score term is the same push;
  coefficient-preserving sampling (Wang and Yu 2025), regrouped.

  x, v [..., I, C]; t, t_next [...] or broadcasting to it, 0 <= t_next < t <= 1. The noise level a
  (eta for `dance`) is not negative, for `cps` at most 2.
  """
  _require_kind(kind)
  chex.assert_equal_shape([x, v])
  x, v, t, t_next, t_second = (jnp.asarray(a, jnp.float32) for a in (x, v, t, t_next, t_second))
  chex.assert_is_broadcastable(t.shape, x.shape[:-2])
  chex.assert_equal_shape([t, t_next])
  dt = t_next - t
  if kind == "cps":
    push = t_next * (jnp.abs(jnp.cos(noise_level * math.pi / 2)) - 1)
    std = t_next * jnp.sin(noise_level * math.pi / 2)
  else:
    sigma = jnp.full_like(t, noise_level)
    if kind == "flow":
      sigma = sigma * jnp.sqrt(t / (1 - jnp.where(t >= 1, t_second, t)))
    push = jnp.square(sigma) * dt / (2 * t)
    std = sigma * jnp.sqrt(-dt)
  along = lambda a: a[..., None, None]
  mean = x + v * along(dt) + along(push) * (x + along(1 - t) * v)
  return Transition(mean=mean, std=std, dt=dt, slope=dt + push * (1 - t))


def log_prob(
  x_next: chex.Array, mean: chex.Array, std: chex.Array, mask: chex.Array, *,
  kind: str, normalised: bool = False,
) -> chex.Array:
  """Log-density of a step of a `transition`, as the mean over the latent elements that count.

    flow, dance: -<(x_next - mean)^2> / (2 std^2)   [- log std - log(2 pi) / 2 if normalised]
    cps:         -<(x_next - mean)^2>

  The mean instead of the sum is what gives clip ranges of 1e-6 their meaning. Source: Flow-GRPO
  eq. 10 as coded there; `cps` as its authors drop all constants.

  x_next (no gradient), mean [..., I, C], std [...] or broadcasting to it, float32, mask [..., I]
  bool -> [...] float32. A std of 0 has no density and gives NaN.
  """
  _require_kind(kind)
  chex.assert_equal_shape([x_next, mean])
  chex.assert_type([x_next, mean, std], jnp.float32)
  chex.assert_type(mask, bool)
  chex.assert_is_broadcastable(mask.shape, mean.shape[:-1])
  # Cleared before squaring, so that no gradient of padding is 0 * NaN.
  difference = jnp.where(mask[..., None], jax.lax.stop_gradient(x_next) - mean, 0.0)
  count = jnp.maximum(mask.sum(-1), 1)
  error = jnp.square(difference).mean(-1).sum(-1) / count
  if kind == "cps":
    return -error
  logp = -error / (2 * jnp.square(std))
  return logp - jnp.log(std) - 0.5 * math.log(2 * math.pi) if normalised else logp


def integrate(
  velocity_fn: Callable[[chex.Array, chex.Array], chex.Array], noise: chex.Array,
  times: chex.Array, steps: chex.Array, keys: chex.Array, mask: chex.Array, *,
  kind: str, noise_level: float, on_step: Callable[[chex.Array], None] | None = None,
) -> types.FlowRollout:
  """From noise to data as one `lax.scan`: noise at the steps of each row's window, Euler elsewhere.

  Step k of a row draws its noise with fold_in(key of the row, k), so a row does not depend on its
  neighbours. Only the window is kept.

  Args:
    velocity_fn, noise, times, on_step: see `flow.integrate`; x is [B, I, C].
    steps: which of the N - 1 steps of each row have noise, [B, W] int32, in any order; traced.
    keys: a typed PRNG key a row, [B].
    mask: latent tokens that count, [B, I] bool.
  """
  chex.assert_type([noise, times], jnp.float32)
  chex.assert_type(steps, jnp.int32)
  chex.assert_rank([noise, times, steps], [3, 1, 2])
  chex.assert_shape(mask, noise.shape[:-1])
  chex.assert_equal_shape_prefix([noise, steps, keys], 1)

  def noisy_step(x, v, window, index, t, t_next):
    """A draw where `index` is in the row's window, an Euler step elsewhere; records the former."""
    move = transition(x, v, t, t_next, times[1], kind=kind, noise_level=noise_level)
    drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))
    here = steps == index  # [B, W]
    x_next = jnp.where(
      here.any(-1)[:, None, None], move.mean + move.std * drawn(keys), x + v * move.dt
    )
    logp = log_prob(x_next, move.mean, move.std, mask, kind=kind)
    values = {"x_t": x, "x_next": x_next, "mean": move.mean, "logp": logp}
    values |= {"t": jnp.broadcast_to(t, logp.shape), "t_next": jnp.broadcast_to(t_next, logp.shape)}

    def record(old, value):  # old [B, W, ...], value [B, ...]
      chosen = here.reshape(here.shape + (1,) * (value.ndim - 1))
      return jnp.where(chosen, value[:, None], old)

    return x_next, {name: record(window[name], value) for name, value in values.items()}

  def step(carry, inputs):
    x, window = carry
    index, t, t_next, noisy = inputs
    v = velocity_fn(x, t).astype(jnp.float32)
    # Few steps are in any row's window: the others pay for no noise, density or record.
    x, window = jax.lax.cond(
      noisy,
      lambda: noisy_step(x, v, window, index, t, t_next),
      lambda: (x + v * (t_next - t), window),
    )
    if on_step is not None:
      jax.debug.callback(on_step, index)
    return (x, window), None

  images = ("x_t", "x_next", "mean")
  window = {name: jnp.zeros(steps.shape + noise.shape[1:]) for name in images}
  window |= {name: jnp.zeros(steps.shape) for name in ("logp", "t", "t_next")}
  index = jnp.arange(times.shape[0] - 1)
  noisy = (steps[..., None] == index).any((0, 1))
  (x, window), _ = jax.lax.scan(step, (noise, window), (index, times[:-1], times[1:], noisy))
  return types.FlowRollout(latents=x, **window)


def _require_kind(kind: str) -> None:
  """A wrong kind would pass for another: its density has the same shape."""
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} is none of {KINDS}")
