"""Algorithms that add fresh noise to the finished image: DiffusionNFT, AWM and FPO.

They need no SDE. They train at x_t = (1 - t) x_0 + t noise, where x_0 is the sampled image.
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
from unigrpo_jax.losses import forward_process
from unigrpo_jax.sampling import direct, times


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardProcess(base.Algorithm):
  """Base of the three; a subclass defines `_matching_loss`.

  Times and noise are drawn once per rollout and kept for all epochs, so ratios compare the same
  noised images.
  """

  draws: times.Times  # how the W times of each image are drawn; each has a noise of its own

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    experience = super().experience(episodes, prompts, key)
    if not self.replay.flow:
      return experience
    return noise_again(jax.random.fold_in(key, 2**32 - 1), experience, self.draws)

  def _recorded_flow(self, flow: types.FlowRollout):
    return jnp.zeros_like(flow.x_t)  # placeholder: the sampler never saw these noised images

  def _flow_values(self, velocity, flow: types.FlowRollout):
    return velocity

  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    drawn = micro.only
    x_0 = jnp.broadcast_to(drawn.flow.latents[:, None], drawn.noise.shape)
    mask = jnp.broadcast_to(mask, drawn.noise.shape[:-1])
    matching = dict(x_0=x_0, noise=drawn.noise, t=drawn.flow.t, mask=mask)
    loss, metrics = self._matching_loss(velocity, old, micro.adv, weights, matching)
    error = forward_process.matching_error(velocity, x_0, drawn.noise, mask)
    return loss, {f"flow/{name}": value for name, value in metrics.items()} | {
      "flow/matching": error
    }

  def _matching_loss(self, v, v_old, adv, weights, matching):
    """The subclass's objective: (loss, {name: metric of each time [B, W] or image [B, 1]}).

    Args:
      v, v_old: velocities at the noised images, [B, W, I, C].
      adv: advantages, [B].
      weights: of the times, [B, W].
      matching: keyword arguments of the losses in `forward_process`: x_0 and noise [B, W, I, C],
        t [B, W], mask [B, W, I].
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFT(ForwardProcess):
  """DiffusionNFT (Zheng et al. 2025); see `forward_process.nft_losses`."""

  beta: float  # mixing coefficient of the implicit positive and negative policies
  bound: float  # advantages are clipped to [-bound, bound], which become probabilities 0 to 1

  def _matching_loss(self, v, v_old, adv, weights, matching):
    optimal = forward_process.optimality(adv, bound=self.bound)
    losses = forward_process.nft_losses(
      v, v_old, optimal=jnp.broadcast_to(optimal[:, None], matching["t"].shape), beta=self.beta,
      scale=self.bound, **matching,
    )
    return jnp.sum(weights * losses), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWM(ForwardProcess):
  """Advantage weighted matching (Xue et al. 2025); see `forward_process.awm_loss`."""

  weighting: str  # of the matching error, one of `forward_process.AWM_WEIGHTINGS`
  ratio: str  # one of `forward_process.AWM_RATIOS`
  clip: float  # how far a ratio may differ from 1, both ways; infinity for none
  bound: float | None  # advantages are clipped to [-bound, bound] and divided by it; None: neither

  def _matching_loss(self, v, v_old, adv, weights, matching):
    return forward_process.awm_loss(
      v, v_old, adv=adv, weights=weights, weighting=self.weighting, ratio=self.ratio,
      clip=self.clip, bound=self.bound, **matching,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FPO(ForwardProcess):
  """Flow policy optimization (2507.21053), FPO++; see `forward_process.fpo_surrogate`."""

  weighting: str  # of the matching error, one of `forward_process.FPO_WEIGHTINGS`
  ratio: str  # one of `forward_process.FPO_RATIOS`
  surrogate: str  # one of `flow.SURROGATES`
  clip: float  # how far a ratio may differ from 1, both ways
  cap: float  # largest matching loss of an image with a negative advantage; infinity for none

  def _matching_loss(self, v, v_old, adv, weights, matching):
    losses = forward_process.fpo_losses(v, v_old, weighting=self.weighting, **matching)
    return forward_process.fpo_surrogate(
      *losses, adv, weights, ratio=self.ratio, clip=self.clip, surrogate=self.surrogate,
      cap_negative=self.cap,
    )


@functools.partial(jax.jit, static_argnums=2)
def noise_again(key, experience: types.Experience, draws: times.Times) -> types.Experience:
  """Replaces the recorded steps by W noised versions of the image, x_t = (1 - t) x_0 + t noise.

  Fields that only an SDE has are left out.
  """
  flow = experience.only.flow
  x_0 = flow.latents[:, None]
  t_key, noise_key = jax.random.split(key)
  t = draws.draw(t_key, len(x_0))
  noise = jax.random.normal(noise_key, (*t.shape, *x_0.shape[2:]))
  x_t = direct.noised(x_0, noise, t)
  flow = types.FlowRollout(flow.latents, x_t=x_t, t=t)
  return experience.with_only(flow=flow, noise=noise)
