"""Rollouts: `group_size` trajectories of every prompt, sampled in chunks of prompts.

What a trajectory samples depends on the run's seed, on the iteration and on its own number, but not
on its chunk, its neighbours or the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.episodes import requests, script
from unigrpo_jax.episodes import sampler as sampler_lib
from unigrpo_jax.runtime import sharding, state

DIVERGED = (
  "the {} are not finite; the policy has diverged: lower the learning rates and resume from a "
  "checkpoint before (remove those after it)"
)


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """How trajectories are sampled."""

  settings: requests.Settings  # of text and images; there is no guidance where text_scale is 1
  group_size: int  # trajectories per prompt
  prompts_at_once: int  # prompts per chunk, of all hosts together
  prompt_tokens: int  # length to which prompts are padded, their two markers included
  height: int  # of an image, in pixels
  width: int
  sde: sampler_lib.SDE | None  # noise in a window's steps; None: they are ODE steps
  same_noise: bool = False  # all images of a group start from the same noise
  layout: str = "stationary"  # of the parameters during sampling, one of `sharding.LAYOUTS`
  tensor: int = 0  # tensor-parallel ways during sampling; 0: `state.fewest_tensor_ways`

  def mesh(self, network: state.Network) -> jax.sharding.Mesh:
    """The mesh for sampling, on the devices of the update's mesh; see `sharding.with_tensor_ways`.
    """
    ways = self.tensor or network.mesh.shape["tensor"]
    if not self.tensor and self.layout == "stationary":
      ways = state.fewest_tensor_ways(network)
    return sharding.with_tensor_ways(network.mesh, ways)

  def prompt_copies(self, mesh) -> int:
    """Into how many parts each group is cut so that the parts of a chunk divide over the mesh.

    Each part reads the prompt once.
    """
    ways = sharding.batch_multiple(mesh)
    return ways // math.gcd(self.prompts_at_once, ways)


class Rollout:
  """Samples chunks of trajectories, on a mesh of its own.

  Attributes:
    network: the trained network, on the mesh for sampling.
    spec: how trajectories are sampled.
    sampler: runs the device programs.
    grid: latent grid of one image, [1, I].
    script: of a trajectory.
    system_ids: tokens of the system prompt; () where the script has none.
  """

  def __init__(self, network: state.Network, vae_params, spec: RolloutSpec):
    """Compiles nothing yet.

    Args:
      network: the trained network, on the mesh of the update.
      vae_params: parameters of its autoencoder; None: images are not decoded.
      spec: how trajectories are sampled.

    Raises:
      InputError: the image size or the tensor ways are impossible, or the model has too few
        positions.
    """
    self._update_mesh, self.spec = network.mesh, spec
    self.network = dataclasses.replace(network, mesh=spec.mesh(network))
    self.sampler = sampler_lib.Sampler(
      self.network, vae_params, layout=spec.layout, groups=spec.prompts_at_once
    )
    self.grid = requests.latent_grid(network.config, [(spec.height, spec.width)])
    example = self.prepare(["a"])
    self.script = example.script
    system = example.texts.get(script.SYSTEM)
    self.system_ids = () if system is None else tuple(int(i) for i in system.ids[0])

  def prepare(self, prompts: Sequence[str]) -> requests.Batch:
    """Checks prompts and makes a batch of their groups; see `requests.prepare_groups`."""
    s = self.spec
    return requests.prepare_groups(
      self.network.config, self.network.tokenizer, prompts, s.settings,
      size=(s.height, s.width), group_size=s.group_size, prompt_tokens=s.prompt_tokens,
      prompt_copies=s.prompt_copies(self.network.mesh),
    )

  def sample_chunks(
    self, params, prompts: Sequence[Any], key, window: np.ndarray, timer: sampler_lib.Timer
  ) -> Iterator[tuple[Sequence[Any], int, sampler_lib.Episode]]:
    """Samples the prompts of an iteration, `prompts_at_once` at a time; see `sample`.

    Yields (the chunk's prompts, the number of its first trajectory, its episode) before its images
    are decoded: while the caller handles a chunk, the devices decode it and begin the next one.
    """
    size, episode = self.spec.prompts_at_once, None
    if self._update_mesh != self.network.mesh:
      # A key made under the update's mesh cannot be an input of programs on this mesh.
      with sharding.activate(self.network.mesh):
        key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(key)))
    for at in range(0, len(prompts), size):
      chunk, first = prompts[at : at + size], at * self.spec.group_size
      rows = slice(first, first + len(chunk) * self.spec.group_size)
      episode = self.sample(params, chunk, key, first, window[rows], timer, episode)
      yield chunk, first, episode
    sampler_lib.wait_for_images(episode, timer)

  def sample(
    self, params, prompts: Sequence[Any], key, first: int, window: np.ndarray,
    timer: sampler_lib.Timer, previous: sampler_lib.Episode | None = None,
  ) -> sampler_lib.Episode:
    """Samples a chunk of P prompts.

    Args:
      params: of the network; see `Sampler.cast_and_reshard`.
      prompts: objects whose `prompt` is the text.
      key: of the iteration, made on the mesh for sampling.
      first: number of the chunk's first trajectory in the iteration.
      window: recorded steps of each trajectory, [P * group_size, W] int32.
      timer, previous: see `Sampler.sample`.

    Returns:
      The episode, with its arrays laid out for the update; see `for_update`. Its `read` raises
      Diverged where a log-probability that this host reads, or any latent, is not finite.
    """
    batch = self.prepare([prompt.prompt for prompt in prompts])
    with sharding.activate(self.network.mesh):
      episode = self.sampler.sample(
        params, batch, self.randomness(key, first, batch), window=window, sde=self.spec.sde,
        previous=previous, timer=timer,
      )
      finite = jnp.isfinite(episode.flow.latents).all()
    read = functools.partial(_read_finite, episode.read, finite)
    return self.for_update(dataclasses.replace(episode, read=read))

  def for_update(self, episode: sampler_lib.Episode) -> sampler_lib.Episode:
    """Lays out an episode's arrays for the update's mesh, with its number of copies per prompt.

    Each device keeps the rows that it sampled. `pixels` and `read` stay as they are.
    """
    mesh, sampled_on = self._update_mesh, self.network.mesh
    if mesh == sampled_on:
      return episode
    step = self.spec.prompt_copies(sampled_on) // self.spec.prompt_copies(mesh)
    place = lambda a: jax.device_put(a, sharding.row_sharding(mesh, a.shape[0]))
    inputs = jax.tree.map(
      # The system prompt has one row, and its array is on the host.
      lambda a: a if a.shape[0] == 1 else place(a[::step]), episode.inputs
    )
    text, flow = jax.tree.map(place, (episode.text, episode.flow))
    return dataclasses.replace(episode, inputs=inputs, text=text, flow=flow)

  def randomness(self, key, first: int, batch: requests.Batch) -> sampler_lib.Randomness:
    """The randomness of the trajectories `first`, `first` + 1, ... of the iteration with `key`."""
    shape = (self.grid.ids.shape[1], self.network.config.latent_dim)
    same = self.spec.group_size if self.spec.same_noise else 1
    place = sharding.row_sharding(self.network.mesh, batch.rows)
    return _randomness(batch.rows, shape, same, place)(key, first)


@functools.lru_cache(maxsize=8)
def _randomness(rows: int, shape: tuple[int, int], same_noise: int, place):
  """A jitted (key, first) -> Randomness.

  Args:
    rows: B.
    shape: of an image's noise, (I, C).
    same_noise: so many consecutive images start from the same noise.
    place: sharding of the noise; keys are replicated.
  """

  def make(key, first) -> sampler_lib.Randomness:
    fold = lambda keys, number: jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    each = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))
    images = fold(each, 1)
    starts = fold(images[::same_noise], 0)
    noise = jax.vmap(lambda start: jax.random.normal(start, shape))(starts)
    return sampler_lib.Randomness(
      text=fold(each, 0), noise=jnp.repeat(noise, same_noise, axis=0), steps=fold(images, 1)
    )

  everywhere = sharding.replicated(place.mesh)
  where = sampler_lib.Randomness(text=everywhere, noise=place, steps=everywhere)
  return jax.jit(make, out_shardings=where)


def _read_finite(read: Callable[[], sampler_lib.HostRows], finite) -> sampler_lib.HostRows:
  """The result of `read`.

  Raises:
    Diverged: `finite` [] bool is False, or a log-probability in the result is not finite.
  """
  if not bool(finite):
    raise errors.Diverged(DIVERGED.format("latents of some images"))
  rows = read()
  if rows.text is not None:
    bad = (~np.isfinite(rows.text.logp).all(axis=1)).sum()
    if bad:
      what = f"log-probabilities of {bad} of {len(rows.text.logp)} reasonings"
      raise errors.Diverged(DIVERGED.format(what))
  return rows
