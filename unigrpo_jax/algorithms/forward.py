"""Algorithms that noise the finished image again: DiffusionNFT, AWM and FPO.

They need no SDE: x_t = (1 - t) x_0 + t noise, with x_0 the image that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.algorithms import base
from unigrpo_jax.episodes import sampler
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import forward_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardProcess(base.Algorithm):
  """What the three have in common."""

  draws: int  # times and noises of each image

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    experience = super().experience(episodes, prompts, key)
    if not self.replay.flow:
      return experience
    return noise_again(jax.random.fold_in(key, 2**32 - 1), experience, self.draws)

  def _recorded_flow(self, flow: types.FlowRollout):
    return jnp.zeros_like(flow.x_t)  # a rollout knows no velocities of noised images

  def _flow_values(self, velocity, flow: types.FlowRollout):
    return velocity

  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    drawn = micro.only
    x_0 = jnp.broadcast_to(drawn.flow.latents[:, None], drawn.noise.shape)
    mask = jnp.broadcast_to(mask, drawn.noise.shape[:-1])
    matching = dict(x_0=x_0, noise=drawn.noise, t=drawn.flow.t, mask=mask)
    return self._matching_loss(velocity, old, micro.adv, weights, matching)

  def _matching_loss(self, v, v_old, adv, weights, matching):
    """(loss, signals) of velocities [B, W, I, C] at noised images."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFT(ForwardProcess):
  """DiffusionNFT (Zheng et al. 2025); see `forward_process.nft_losses`."""

  beta: float  # how far its mixtures reach
  bound: float  # of the advantages

  def _matching_loss(self, v, v_old, adv, weights, matching):
    optimal = forward_process.optimality(adv, bound=self.bound)
    losses = forward_process.nft_losses(
      v, v_old, optimal=jnp.broadcast_to(optimal[:, None], matching["t"].shape), beta=self.beta,
      scale=self.bound, **matching,
    )
    return jnp.sum(weights * losses), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWM(ForwardProcess):
  """Advantage weighted matching (Xue et al. 2025): a ratio a time."""

  clip: float  # how far a ratio may differ from 1, both ways
  weighting: str  # of the matching error, one of `forward_process.WEIGHTINGS`

  def _matching_loss(self, v, v_old, adv, weights, matching):
    match = functools.partial(forward_process.awm_log_prob, weighting=self.weighting, **matching)
    log_ratio = self._log_ratio(match(v), match(v_old))
    if log_ratio.shape != weights.shape:  # one ratio an image
      weights = weights.sum(axis=1, keepdims=True)
    loss, metrics = flow_losses.policy_loss(
      log_ratio, adv, weights, clip_low=self.clip, clip_high=self.clip
    )
    return loss, {f"flow/{name}": value for name, value in metrics.items()}

  def _log_ratio(self, match, match_old):
    return forward_process.awm_log_ratio(match, match_old)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FPO(AWM):
  """Flow policy optimization (2507.21053): one ratio an image, of its mean matching error."""

  weighting: str = "uniform"

  def _log_ratio(self, match, match_old):
    return forward_process.fpo_log_ratio(-match, -match_old)


@functools.partial(jax.jit, static_argnums=2)
def noise_again(key, experience: types.Experience, draws: int) -> types.Experience:
  """Noises every finished image `draws` times, x_t = (1 - t) x_0 + t noise, t uniform."""
  flow = experience.only.flow
  x_0 = flow.latents[:, None]
  rows = x_0.shape[0]
  t_key, noise_key = jax.random.split(key)
  t = jax.random.uniform(t_key, (rows, draws), minval=0.01)
  noise = jax.random.normal(noise_key, (rows, draws, *x_0.shape[2:]))
  x_t = (1 - t[..., None, None]) * x_0 + t[..., None, None] * noise
  zero = jnp.zeros_like(t)
  flow = flow.replace(x_t=x_t, x_next=x_t, mean=jnp.zeros_like(x_t), t=t, t_next=zero, logp=zero)
  return experience.with_only(flow=flow, noise=noise)
