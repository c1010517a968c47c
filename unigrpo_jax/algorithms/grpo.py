"""FlowGRPO and Flow-DPPO: ratios of the steps of an SDE (UniGRPO eqs. 4 to 6)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.algorithms import base
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import regularizers
from unigrpo_jax.sampling import sde


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(base.Algorithm):
  """The clipped surrogate over the steps of a window."""

  ratio: str  # "norm" (RatioNorm, eq. 5) or "plain"
  clip: float  # how far a ratio may differ from 1, both ways
  grad_reweight: str  # "none" or "inv_dt"
  # The SDE that sampled, as arguments of `sde.transition`.
  kind: str  # one of `sde.KINDS`
  noise_level: float
  t_second: float  # the schedule's second time

  def _recorded_flow(self, flow: types.FlowRollout):
    return flow.mean

  def _flow_values(self, velocity, flow: types.FlowRollout):
    return self._step(velocity, flow).mean

  def _step(self, velocity, flow: types.FlowRollout) -> sde.Transition:
    return sde.transition(
      flow.x_t, velocity, flow.t, flow.t_next, jnp.float32(self.t_second), kind=self.kind,
      noise_level=self.noise_level,
    )

  def _log_ratio(self, step: sde.Transition, mean_old, flow: types.FlowRollout, mask, kind: str):
    kind = "unnormalised" if self.kind == "cps" else kind
    return flow_losses.log_ratio(step.mean, mean_old, flow.x_next, step.std, mask, kind=kind)

  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    flow = micro.only.flow
    step = self._step(velocity, flow)
    log_ratio, loss_mask = self._surrogate(step, old, micro, mask)
    loss, metrics = flow_losses.policy_loss(
      log_ratio, micro.adv, weights, clip_low=self.clip, clip_high=self.clip, loss_mask=loss_mask,
      loss_weight=flow_losses.reweight(self.grad_reweight, step.dt),
    )
    signals = {f"flow/{name}": value for name, value in metrics.items()}
    signals["drift/flow"] = jnp.abs(self._log_ratio(step, flow.mean, flow, mask, "norm"))
    return loss, signals

  def _surrogate(self, step: sde.Transition, mean_old, micro: types.Experience, mask):
    """(log ratios [B, W], steps that count [B, W] bool; None: all count, with the clip)."""
    return self._log_ratio(step, mean_old, micro.only.flow, mask, self.ratio), None

  def _latent_kl(self, velocity, reference, flow: types.FlowRollout, mask):
    new, ref = (self._step(v, flow) for v in (velocity, reference))
    form = "exact" if self.regulariser == "latent_kl_exact" else "code"
    return regularizers.latent_kl(new.mean, ref.mean, new.std, new.dt, mask, form=form)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPPO(GRPO):
  """Flow-DPPO (2606.11025): a mask by divergence takes the place of the clip."""

  # A step whose divergence from the old policy reaches this, and which its advantage would push
  # further away, is dropped.
  threshold: float

  def _surrogate(self, step: sde.Transition, mean_old, micro: types.Experience, mask):
    # The mask already bounds how far a step moves, so the ratio is not normalised.
    log_ratio = self._log_ratio(step, mean_old, micro.only.flow, mask, "plain")
    far = flow_losses.divergence(step.mean, mean_old, step.std, mask)
    return log_ratio, flow_losses.dppo_mask(
      far, jax.lax.stop_gradient(log_ratio), micro.adv, threshold=self.threshold
    )
