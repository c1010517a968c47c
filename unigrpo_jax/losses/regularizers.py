"""How far a policy is from its reference: in velocities, or in the means of its steps.

<.> and `mask` are those of `flow`; no gradient flows to what is of the reference.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax.losses import flow

FORMS = ("exact", "code")


def velocity_mse(v: chex.Array, v_ref: chex.Array, mask: chex.Array) -> chex.Array:
  """Squared distance of velocities [..., I, C], no weight in t: <(v - v_ref)^2>, [...] float32.

  Source: UniGRPO eq. 8, which replaces the latent divergence of eq. 6.
  """
  apart = flow.difference(v, jax.lax.stop_gradient(v_ref), mask)
  return flow.element_mean(jnp.square(apart), mask)


def latent_kl(
  mean: chex.Array, mean_ref: chex.Array, std: chex.Array, dt: chex.Array, mask: chex.Array, *,
  form: str,
) -> chex.Array:
  """KL divergence of a step from the reference's, as a mean over elements.

    exact  <(mean - mean_ref)^2> / (2 std^2)
    code   <(mean - mean_ref)^2> / (2 sigma^2),  sigma = std / sqrt|dt|

  mean, mean_ref [..., I, C] float32; std (more than 0) and dt (signed) [...] or broadcasting to it,
  float32 -> [...] float32. Source: Flow-GRPO; its code leaves |dt| out, and its weights are chosen
  for that.
  """
  if form not in FORMS:
    raise ValueError(f"form={form!r} is none of {FORMS}")
  exact = flow.divergence(mean, jax.lax.stop_gradient(mean_ref), std, mask)
  return exact if form == "exact" else exact * jnp.abs(dt)
