"""Trajectories: every prompt of a chunk thought about and drawn `group_size` times.

A prompt is read once; its group goes on from it without a copy. What a trajectory samples depends
on the run's seed, the iteration and its own number, not on its chunk, its neighbours or the
devices.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import batches, phases, pipeline
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import hosts, metrics, sharding
from unigrpo_jax.sampling import flow, text

DIVERGED = (
  "the {} are not finite; the policy has diverged: lower the learning rates and resume from a "
  "checkpoint before (remove those after it)"
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a trajectory is sampled.

  Attributes:
    group_size: trajectories of a prompt.
    think: reasons before it draws.
    prompt_tokens: most tokens of a prompt, its two markers included.
    max_tokens: most sampled tokens of a reasoning.
    temperature: of sampled tokens.
    height, width: of an image, in pixels.
    num_timesteps: points of the time grid.
    shift: timestep shift.
    kind: of the SDE, one of `sde.KINDS`.
    noise_level: of the SDE.
    guidance: a text_scale of 1 is none.
    same_noise: a group starts from the same noise.
    layout: of the parameters while sampling, one of `sharding.LAYOUTS`.
    prompt_copies: rows that read the same prompt, each for its part of the group; so that few
      prompts divide over many devices. Divides `group_size`.
  """

  group_size: int
  think: bool
  prompt_tokens: int
  max_tokens: int
  temperature: float
  height: int
  width: int
  num_timesteps: int
  shift: float
  kind: str
  noise_level: float
  guidance: flow.Guidance
  same_noise: bool = False
  layout: str = "stationary"
  prompt_copies: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectories:
  """A chunk of B trajectories, those of a prompt consecutive.

  Attributes:
    prompt_ids, prompt_mask: of its P prompts, each `prompt_copies` times, [P, T], on the device.
    text: reasonings on the device, or None.
    flow: recorded steps on the device.
    rows: which of the B trajectories this host has itself, [n]; all of them where it is the only
      one.
    images: theirs, [n, H, W, 3] uint8 on the host.
    texts: their reasonings in words; None without thinking.
    lengths, finished: of these, [n] on the host; None without thinking.
  """

  prompt_ids: Any
  prompt_mask: Any
  text: types.TextRollout | None
  flow: types.FlowRollout
  rows: np.ndarray
  images: np.ndarray
  texts: list[str] | None = None
  lengths: np.ndarray | None = None
  finished: np.ndarray | None = None

  def told(self) -> dict[str, np.ndarray]:
    """What is told of the reasonings of this host's rows, {name: [n] float32}."""
    if self.texts is None:
      return {}
    return {"lengths": np.float32(self.lengths), "finished": np.float32(self.finished)}


class Sampler:
  """Samples chunks of trajectories from parameters that change between them.

  `take` makes of a state's parameters those that `sample` reads: in the network's dtype, which in
  bfloat16 halves what a token reads, and laid out as `Settings.layout` says.
  """

  def __init__(
    self, model: bagel_lib.Bagel, vae: vae_lib.VAE, vae_params, tokenizer, mesh,
    settings: Settings,
  ):
    self.model, self.tokenizer, self.mesh, self.settings = model, tokenizer, mesh, settings
    self._vae_params = vae_params
    wrap = lambda ids: [tokenizer.im_start, *ids, tokenizer.im_end]
    system = wrap(tokenizer.encode(tokenizer_lib.SYSTEM_PROMPT_GEN))
    self.system_ids = np.asarray(system, np.int32) if settings.think else None
    self.grid = batches.latent_grid(model.config, [(settings.height, settings.width)])
    batches.check_sizes(model.config, [(settings.height, settings.width)])
    needed = settings.prompt_tokens + 1
    if settings.think:
      needed += len(system) + settings.max_tokens + text.EXTRA_SLOTS
    if needed > model.config.llm.max_positions:
      raise errors.InputError(
        f"prompt_tokens={settings.prompt_tokens} and max_tokens={settings.max_tokens} need "
        f"{needed} positions, the model has {model.config.llm.max_positions} "
        "(max_position_embeddings); lower one of them"
      )
    self.layout = pipeline.param_shardings(
      model, mesh, ("bagel",), sharding.LAYOUTS[settings.layout]
    )["bagel"]
    self.lay_out = jax.jit(
      lambda params: jax.tree.map(lambda a: a.astype(model.dtype), params),
      out_shardings=self.layout,
    )
    # The device programs of a chunk, each but for its parameters and arrays.
    bind, s = functools.partial, settings
    self.read = bind(
      phases.read, model,
      capacity=s.prompt_tokens + (0 if self.system_ids is None else len(self.system_ids)),
    )
    self.fork = bind(
      phases.fork, model, copies=s.group_size // s.prompt_copies,
      capacity=s.max_tokens + text.EXTRA_SLOTS,
    )
    self.write = bind(
      phases.write, model, start_id=tokenizer.im_start, end_id=tokenizer.im_end,
      max_tokens=s.max_tokens, temperature=s.temperature,
    )
    self.explore = bind(
      phases.explore, model, num_timesteps=s.num_timesteps, shift=s.shift, guidance=s.guidance,
      kind=s.kind, noise_level=s.noise_level, same_noise=s.group_size if s.same_noise else 1,
    )
    self.decode_images = bind(phases.decode_images, vae)

  def take(self, params):
    """A state's parameters as `sample` reads them; a copy only where they differ from those."""
    same = jax.tree.map(
      lambda a, place: a.dtype == self.model.dtype and a.sharding.is_equivalent_to(place, a.ndim),
      params, self.layout,
    )
    return params if all(jax.tree.leaves(same)) else self.lay_out(params)

  def encode_prompts(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, [P, prompt_tokens]; refuses an empty or too long prompt."""
    tokenizer, room = self.tokenizer, self.settings.prompt_tokens
    ids = np.zeros((len(prompts), room), np.int32)
    mask = np.zeros((len(prompts), room), bool)
    for row, prompt in enumerate(prompts):
      tokens = [tokenizer.im_start, *tokenizer.encode(prompt), tokenizer.im_end]
      if len(tokens) > room or not prompt.strip():
        raise errors.InputError(
          f"prompt {prompt[:60]!r} has {len(tokens)} tokens with its markers, expected 3 to "
          f"config.rollout.prompt_tokens={room}; raise that or leave the prompt out"
        )
      ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    return ids, mask

  def sample(
    self, params, prompts: Sequence[str], key, first: int, steps: np.ndarray,
    timer: metrics.PhaseTimer,
  ) -> Trajectories:
    """Samples a chunk; call it within `sharding.activate`.

    Args:
      params: of the network.
      prompts: P prompts.
      key: of the iteration.
      first: number of the chunk's first trajectory in the iteration.
      steps: SDE steps of each trajectory, [P * group_size, W] int32.
      timer: is told the seconds of each phase.

    Raises:
      InputError: a log-probability or a latent is not finite.
    """
    s, rows = self.settings, len(prompts) * self.settings.group_size
    over_rows = functools.partial(sharding.put_rows, self.mesh)
    prompt_ids, prompt_mask = (
      np.repeat(a, s.prompt_copies, axis=0) for a in self.encode_prompts(prompts)
    )
    with timer("read"):
      keys = trajectory_keys(key, first, rows)
      inputs = phases.Inputs(
        prompt_ids=over_rows(prompt_ids), prompt_mask=over_rows(prompt_mask),
        system_ids=self.system_ids,
      )
      contexts = jax.block_until_ready(self.read(params, inputs))
    rollout = None
    if s.think:
      with timer("decode"):
        contexts = self.fork(contexts)
        rollout, main = self.write(params, contexts.main, keys["text"], None)
        contexts = contexts.replace(main=main)
        jax.block_until_ready(rollout)
    with timer("denoise"):
      grid = jax.tree.map(lambda a: over_rows(np.repeat(a, rows, axis=0)), self.grid)
      drawn = jax.block_until_ready(
        self.explore(params, contexts, keys["image"], over_rows(steps), grid)
      )
      if not bool(jnp.isfinite(drawn.latents).all()):
        raise errors.Diverged(DIVERGED.format("latents of some images"))
    with timer("vae"):
      own, images = self._decode(drawn.latents)
    written = ()
    if rollout is not None:
      _, read = sharding.local_rows(self.mesh, rollout)
      with hosts.raise_on_all_hosts():
        written = self._words(read)
    return Trajectories(
      inputs.prompt_ids, inputs.prompt_mask, rollout, drawn, own, images, *written
    )

  def _decode(self, latents) -> tuple[np.ndarray, np.ndarray]:
    """The rows that this host reads, and their images."""
    c, s = self.model.config, self.settings
    grids = vae_lib.unpack_latents(
      latents, s.height // c.latent_stride, s.width // c.latent_stride, c.latent_patch_size
    )
    # A few of every device's own rows at a time, so that the decoder's temporaries stay within it
    # and no row moves.
    everywhere = len(grids) % self.mesh.size == 0
    ways = self.mesh.size if everywhere else sharding.batch_multiple(self.mesh)
    grids = grids.reshape(ways, -1, *grids.shape[1:])
    numbers = np.arange(grids.shape[0] * grids.shape[1]).reshape(grids.shape[:2])
    rows, images = [], []
    for first in range(0, grids.shape[1], self.images_at_once):
      part = slice(first, first + self.images_at_once)
      taken = grids[:, part].reshape(-1, *grids.shape[2:])
      if everywhere:
        taken = jax.device_put(taken, sharding.along_all(self.mesh))
      own, read = sharding.local_rows(self.mesh, self.decode_images(self._vae_params, taken))
      rows.append(numbers[:, part].ravel()[own])
      images.append(read)
    rows, images = np.concatenate(rows), np.concatenate(images)
    order = np.argsort(rows)
    return rows[order], images[order]

  @property
  def images_at_once(self) -> int:
    """Images that a device decodes together: the decoder's temporaries stay within it."""
    return max(phases.VAE_PIXELS // (self.settings.height * self.settings.width), 1)

  def _words(self, host: types.TextRollout) -> tuple[list[str], np.ndarray, np.ndarray]:
    bad = np.flatnonzero(~np.isfinite(host.logp).all(axis=1))
    if bad.size:
      raise errors.Diverged(
        DIVERGED.format(f"log-probabilities of {bad.size} of {len(host.logp)} reasonings")
      )
    words = []
    for ids, mask, finished in zip(host.ids, host.mask, host.finished):
      ids = [int(i) for i in ids[mask]]
      words.append(self.tokenizer.decode(ids[:-1] if finished else ids))
    return words, host.mask.sum(axis=1), host.finished


@functools.partial(jax.jit, static_argnums=2)
def trajectory_keys(key, first, rows: int) -> dict[str, jax.Array]:
  """Keys of `rows` trajectories, one for their text and one for their image."""
  own = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))
  folded = lambda number: jax.vmap(jax.random.fold_in, (0, None))(own, number)
  return {"text": folded(0), "image": folded(1)}
