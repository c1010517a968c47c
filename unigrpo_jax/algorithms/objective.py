"""The joint objective of UniGRPO on a microbatch: text GRPO + lambda (FlowGRPO + regulariser).

  J = J_text + lambda J_flow    (UniGRPO eq. 7), one advantage a trajectory for both

Its neighbours differ in the flow's term alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.episodes import policy
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import forward_process, regularizers
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.sampling import sde

# What trains the images: the steps of the SDE, or noise added to the finished image.
SDE_OBJECTIVES = ("grpo", "dppo")
FORWARD_OBJECTIVES = ("nft", "awm", "fpo")
REGULARISERS = ("velocity_mse", "latent_kl", "latent_kl_exact", "none")


@dataclasses.dataclass(frozen=True)
class Objective:
  """The numbers of the objective; clips and weights as they are applied.

  Attributes:
    aggregation: of tokens, one of `losses.text.AGGREGATIONS`.
    max_tokens: of a reasoning.
    text_clip_low, text_clip_high, dual_clip: of the tokens' ratios.
    text_kl_weight: of the k3 estimate.
    flow_weight: lambda.
    flow: one of SDE_OBJECTIVES and FORWARD_OBJECTIVES.
    ratio: "norm" or "plain".
    flow_clip_low, flow_clip_high: of the steps' ratios.
    grad_reweight: "none" or "inv_dt".
    dppo_threshold: divergence from which on Flow-DPPO drops a step.
    nft_beta, nft_bound: of DiffusionNFT: reach of its mixtures, and bound of its advantages.
    awm_weighting: of AWM, one of `forward_process.WEIGHTINGS`.
    regulariser: one of REGULARISERS; its `regulariser_weight`.
    kind, noise_level, t_second: of the SDE.
  """

  aggregation: str
  max_tokens: int
  text_clip_low: float
  text_clip_high: float
  dual_clip: float | None
  text_kl_weight: float
  flow_weight: float
  flow: str
  ratio: str
  flow_clip_low: float
  flow_clip_high: float
  grad_reweight: str
  dppo_threshold: float
  nft_beta: float
  nft_bound: float
  awm_weighting: str
  regulariser: str
  regulariser_weight: float
  kind: str
  noise_level: float
  t_second: float


@struct.dataclass
class Old:
  """The values that ratios are taken against.

  Attributes:
    logp: of the sampled tokens, [B, T]; or None.
    flow: [B, W, I, C]: means of the SDE's steps, or velocities for the forward objectives; or None.
  """

  logp: Any = None
  flow: Any = None


def joint_loss(
  said: policy.Said, experience: types.Experience, old: Old, weights: dict[str, Any],
  grid: types.LatentGrid, objective: Objective, first_epoch: jax.Array | None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Old, dict[str, jax.Array]]]:
  """The loss of a microbatch, as its share of the whole batch's.

  Args:
    said: by the policy.
    experience: B trajectories.
    old: what ratios are taken against.
    weights: {"text": [B, T], "flow": [B, W]}; see `token_weights` and `step_weights`.
    grid: of one image.
    objective: numbers.
    first_epoch: [] bool: the policy's own values take the place of `old`, so that every ratio is
      exactly 1; None: never.

  Returns:
    (loss, (the terms of the loss, the policy's own values, what there is to know about each token
    and step)).
  """
  terms, own, signals = {}, Old(), {}
  zero = jnp.zeros(())

  def chosen(mine, given):
    if first_epoch is None:
      return given
    return jnp.where(first_epoch, jax.lax.stop_gradient(mine), given)

  text_loss = flow_loss = zero
  if said.logp is not None:
    own = own.replace(logp=jax.lax.stop_gradient(said.logp))
    text_loss, found = text_losses.policy_loss(
      said.logp, chosen(said.logp, old.logp), experience.adv, weights["text"],
      clip_low=objective.text_clip_low, clip_high=objective.text_clip_high,
      dual_clip=objective.dual_clip, logp_ref=experience.logp_ref,
      kl_weight=objective.text_kl_weight,
    )
    drift = jnp.where(experience.text.mask, said.logp - experience.text.logp, 0.0)
    signals |= {f"text/{name}": value for name, value in found.items()}
    # A log-probability is a difference of logits, whose rounding grows with them.
    scaled = jnp.abs(drift) / jnp.maximum(jnp.abs(experience.text.logp), 1.0)
    signals |= {"text/entropy": said.entropy, "drift/text": jnp.abs(drift)}
    signals["drift/text_scaled"] = scaled
    terms["text"] = text_loss
  if said.guided is not None:
    value, found, mine = _flow(
      said, experience, chosen, old, weights["flow"], grid.mask[:, None], objective
    )
    own = own.replace(flow=jax.lax.stop_gradient(mine))
    penalty = _penalty(said, experience, grid.mask[:, None], objective)
    signals |= found
    terms["flow"] = value
    flow_loss = value
    if penalty is not None:
      # How far the policy is from its reference, whatever holds it back.
      signals["flow/mse"] = regularizers.velocity_mse(
        said.velocity, experience.velocity_ref, grid.mask[:, None]
      )
      if objective.regulariser != "velocity_mse":
        signals["flow/latent_kl"] = penalty
      terms["regulariser"] = objective.regulariser_weight * jnp.sum(weights["flow"] * penalty)
      flow_loss += terms["regulariser"]
  loss = text_loss + objective.flow_weight * flow_loss
  terms["total"] = loss
  return loss, (terms, own, jax.lax.stop_gradient(signals))


def _step(velocity, experience: types.Experience, objective: Objective) -> sde.Transition:
  f = experience.flow
  return sde.transition(
    f.x_t, velocity, f.t, f.t_next, jnp.float32(objective.t_second), kind=objective.kind,
    noise_level=objective.noise_level,
  )


def _flow(said, experience: types.Experience, chosen, old: Old, weights, mask, o: Objective):
  """(loss, signals, the policy's own means or velocities) of the chosen flow objective."""
  f, adv = experience.flow, experience.adv
  if o.flow in FORWARD_OBJECTIVES:
    before = chosen(said.guided, old.flow)
    loss, signals = _forward(said.guided, before, experience, weights, mask, o)
    return loss, signals, said.guided
  move = _step(said.guided, experience, o)
  before = chosen(move.mean, old.flow)
  ratio = lambda earlier, kind: flow_losses.log_ratio(
    move.mean, earlier, f.x_next, move.std, mask, kind="unnormalised" if o.kind == "cps" else kind
  )
  # Flow-DPPO bounds how far a step moves by itself: its ratio is the plain one.
  log_ratio, keep = ratio(before, "plain" if o.flow == "dppo" else o.ratio), None
  if o.flow == "dppo":
    far = flow_losses.divergence(move.mean, before, move.std, mask)
    keep = flow_losses.dppo_keep(
      far, jax.lax.stop_gradient(log_ratio), adv, threshold=o.dppo_threshold
    )
  loss, found = flow_losses.policy_loss(
    log_ratio, adv, weights, clip_low=o.flow_clip_low, clip_high=o.flow_clip_high, keep=keep,
    loss_weight=flow_losses.reweight(o.grad_reweight, move.dt),
  )
  signals = {f"flow/{name}": value for name, value in found.items()}
  signals["drift/flow"] = jnp.abs(ratio(f.mean, "norm"))
  return loss, signals, move.mean


def _forward(v, v_old, experience: types.Experience, weights, mask, o: Objective):
  """(loss, signals) of the objectives that noise the finished image again."""
  noise, t, adv = experience.noise, experience.flow.t, experience.adv
  x_0 = jnp.broadcast_to(experience.flow.latents[:, None], noise.shape)
  mask = jnp.broadcast_to(mask, noise.shape[:-1])
  if o.flow == "nft":
    optimal = forward_process.optimality(adv, bound=o.nft_bound)
    losses = forward_process.nft_losses(
      v, v_old, x_0, noise, t, jnp.broadcast_to(optimal[:, None], t.shape), mask,
      beta=o.nft_beta, scale=o.nft_bound,
    )
    return jnp.sum(weights * losses), {}
  matched = functools.partial(
    forward_process.awm_log_prob, x_0=x_0, noise=noise, t=t, mask=mask,
    weighting=o.awm_weighting if o.flow == "awm" else "uniform",
  )
  if o.flow == "awm":
    log_ratio = forward_process.awm_log_ratio(matched(v), matched(v_old), order="exp_first")
  else:
    log_ratio = forward_process.fpo_log_ratio(-matched(v), -matched(v_old))
    weights = weights.sum(axis=1, keepdims=True)
  loss, found = flow_losses.policy_loss(
    log_ratio, adv, weights, clip_low=o.flow_clip_low, clip_high=o.flow_clip_high
  )
  return loss, {f"flow/{name}": value for name, value in found.items()}


def _penalty(said, experience: types.Experience, mask, o: Objective):
  """Distance from the reference at each step, [B, W], or None."""
  if o.regulariser == "none" or experience.velocity_ref is None:
    return None
  if o.regulariser == "velocity_mse":
    return regularizers.velocity_mse(said.velocity, experience.velocity_ref, mask)
  mine, theirs = (
    _step(velocity, experience, o) for velocity in (said.velocity, experience.velocity_ref)
  )
  form = "exact" if o.regulariser == "latent_kl_exact" else "code"
  return regularizers.latent_kl(mine.mean, theirs.mean, mine.std, mine.dt, mask, form=form)
