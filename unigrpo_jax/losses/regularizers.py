"""How far a policy is from its reference: in velocities, or in the means of its steps.

Letters: B trajectories, W window steps, I latent tokens, C features of a token. <.> is the mean
over the latent elements of one image that count.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax.losses import flow

FORMS = ("exact", "code")


def velocity_mse(v: chex.Array, v_ref: chex.Array, mask: chex.Array) -> chex.Array:
  """Squared distance of velocities, <(v - v_ref)^2>, with no weight in t.

  Source: UniGRPO eq. 8, which replaces the latent divergence of eq. 6.

  Args:
    v: of the policy, [..., I, C], taken to float32; anything at padding.
    v_ref: of the reference, likewise; no gradient.
    mask: latent tokens that count, [..., I] bool; its leading axes may be 1.

  Returns:
    [...] float32, [B, W] for the steps of windows.
  """
  apart = flow.difference(v, jax.lax.stop_gradient(v_ref), mask)
  return flow.element_mean(jnp.square(apart), mask)


def latent_kl(
  mean: chex.Array,
  mean_ref: chex.Array,
  std: chex.Array,
  dt: chex.Array,
  mask: chex.Array,
  *,
  form: str,
) -> chex.Array:
  """KL divergence of a step from the reference's, as a mean over elements.

    exact  <(mean - mean_ref)^2> / (2 std^2)
    code   <(mean - mean_ref)^2> / (2 sigma^2),  sigma = std / sqrt|dt|

  Source: Flow-GRPO; its code leaves |dt| out, and its weights are chosen for that.

  Args:
    mean: of the policy, [..., I, C] float32; anything at padding.
    mean_ref: of the reference, likewise; no gradient.
    std: of the injected noise, [...] or broadcasting to it, float32, more than 0.
    dt: signed, as `std`.
    mask: latent tokens that count, [..., I] bool; its leading axes may be 1.
    form: one of FORMS.

  Returns:
    [...] float32, [B, W] for the steps of windows.

  Raises:
    ValueError: `form` is none of FORMS.
  """
  if form not in FORMS:
    raise ValueError(f"form={form!r} is none of {FORMS}")
  exact = flow.divergence(mean, jax.lax.stop_gradient(mean_ref), std, mask)
  return exact if form == "exact" else exact * jnp.abs(dt)
