"""ReFL: a gradient through one late denoising step and a frozen, differentiable reward.

  x_0 = sg(x_m) - t_m v(sg(x_m), t_m),    R = reward(decode(x_0), prompt)
  L = w <relu(margin - R)> + beta <|v - v_ref|^2>                       (ImageReward, 2304.05977)

x_m is what the rollout recorded before its late step. Advantages are not read, so no groups are
needed. DRaFT-K and direct alignment differ in how the image depends on the velocity; see
`sampling.direct`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.algorithms import base
from unigrpo_jax.episodes import sampler
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import refl as refl_losses
from unigrpo_jax.sampling import direct


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReFL(base.Algorithm):
  """The late step's loss; its reward is a function of latents.

  The parameters of `fixed` are those of the reward and of the autoencoder: an argument of the
  update, never differentiated, and no part of the state.
  """

  reward: Callable[..., jax.Array]  # (fixed, latents [n, I, C], questions of n) -> [n] float32
  ask: Callable[[Sequence[Any]], Any]  # B prompts -> their questions on the devices, B rows
  parts: int  # that a microbatch's images are scored in, one after the other
  ways: int  # of devices that a microbatch's rows are cut into
  weight: float  # w
  margin: float
  term_norms_every: int = 10

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    experience = super().experience(episodes, prompts, key)
    group = experience.only.flow.latents.shape[0] // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(group)]
    return experience.replace(question=self.ask(asked))

  def _recorded_flow(self, flow: types.FlowRollout):
    return None

  def _flow_values(self, velocity, flow: types.FlowRollout):
    return None

  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    drawn = micro.only.flow
    # One recorded step a trajectory: [B, 1, I, C] and [B, 1].
    x_0 = direct.predict(drawn.x_t[:, 0], velocity[:, 0], drawn.t[:, 0])
    rewards, gradient = refl_losses.reward_with_gradient(
      lambda x_0, questions: self.reward(self.fixed, x_0, questions), x_0, micro.question,
      parts=self.parts, ways=self.ways,
    )
    loss, signals = refl_losses.reward_loss(
      rewards, self.weight * weights[:, 0], margin=self.margin
    )
    counted = jnp.broadcast_to(mask[:, 0], x_0.shape[:-1])
    signals["gradient_rms"] = jnp.sqrt(flow_losses.element_mean(jnp.square(gradient), counted))
    return loss, {f"refl/{name}": value[:, None] for name, value in signals.items()}
