"""ReFL: a gradient through one late denoising step and a frozen, differentiable reward.

  x_0 = sg(x_m) - t_m v(sg(x_m), t_m),    R = reward(decode(x_0), prompt)
  L = w <relu(margin - R)> + beta <|v - v_ref|^2>                       (ImageReward, 2304.05977)

x_m is the latent that the rollout recorded before one of its last steps. Advantages are not used,
so no groups are needed. DRaFT-K and direct alignment differ in how x_0 depends on the velocity; see
`sampling.direct`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
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
  """ReFL, DRaFT-K and direct alignment; the reward is a differentiable function of latents.

  `fixed` holds the parameters of the reward model and of the autoencoder. They are an argument of
  the update, never differentiated and no part of the training state.
  """

  reward: Callable[..., jax.Array]  # (fixed, latents [n, I, C], questions of n) -> [n] float32
  ask: Callable[[Sequence[Any]], Any]  # B prompts -> their questions on the devices, B rows
  parts: int  # a microbatch's images are scored in so many parts, one after the other
  ways: int  # a microbatch's rows are sharded over so many devices or groups of them
  weight: float  # w
  margin: float
  # Direct alignment: the time grid from which each image draws one step; () for other methods.
  align_times: tuple[float, ...] = ()
  per_batch: bool = False  # direct alignment: all images share the drawn step
  term_norms_every: int = 10

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    experience = super().experience(episodes, prompts, key)
    group = experience.only.flow.latents.shape[0] // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(group)]
    experience = experience.replace(question=self.ask(asked))
    if not self.align_times:
      return experience
    times = (self.align_times, self.per_batch)
    return noise_with_its_own(jax.random.fold_in(key, 2**32 - 1), experience, *times)

  def _recorded_flow(self, flow: types.FlowRollout):
    return None

  def _flow_values(self, velocity, flow: types.FlowRollout):
    return None

  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    drawn = micro.only.flow
    # One recorded step a trajectory: [B, 1, I, C] and [B, 1].
    x_t, v, t = drawn.x_t[:, 0], velocity[:, 0], drawn.t[:, 0]
    if self.align_times:
      x_0 = direct.align(x_t, v, micro.only.noise[:, 0], t, drawn.t_next[:, 0])
    else:
      x_0 = direct.predict(x_t, v, t)
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


@functools.partial(jax.jit, static_argnums=(2, 3))
def noise_with_its_own(
  key, experience: types.Experience, times: tuple[float, ...], per_batch: bool
) -> types.Experience:
  """Noises every image to the start of a random step of `times`, by the noise it was sampled from.

  The recorded step must be the first of the rollout: its `x_t` is that noise.

  Args:
    key: draws the step of each image, or with `per_batch` of all.
    experience: of B trajectories with one recorded step each.
    times: the time grid, from noise to image.
    per_batch: all images take the same step.
  """
  flow, schedule = experience.only.flow, jnp.array(times, jnp.float32)
  rows = flow.t.shape[0]
  index = jax.random.randint(key, (1 if per_batch else rows, 1), 0, len(times) - 1)
  t, t_next = (jnp.broadcast_to(schedule[i], (rows, 1)) for i in (index, index + 1))
  x_t = direct.noised(flow.latents[:, None], flow.x_t, t)
  return experience.with_only(flow=flow.replace(x_t=x_t, t=t, t_next=t_next), noise=flow.x_t)
