"""The sampler: runs a batch's script on the devices, for inference, rollouts and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import numpy as np

from unigrpo_jax import types
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.episodes import programs, requests
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.models import lowering
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.sampling import text as text_lib

# Called with (phase, units done, units in total).
Progress = Callable[[str, int, int], None]
# Phase -> context manager that surrounds it.
Timer = Callable[[str], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class SDE:
  """How noise is added in the steps of a window; see `sde.transition`."""

  kind: str  # one of `sde.KINDS`
  noise_level: float


@struct.dataclass
class Randomness:
  """All randomness of B rows. The caller supplies it, so that a row does not depend on the others.
  """

  text: Any  # typed PRNG keys of the sampled tokens, [B]
  noise: Any = None  # initial noise of the images, [B, I, C] float32; None where nothing is drawn
  steps: Any = None  # typed PRNG keys of the SDE's noise, [B]; None for the ODE


@dataclasses.dataclass(frozen=True, eq=False)
class HostRows:
  """The rows of an episode that this host reads, as NumPy arrays."""

  rows: np.ndarray  # their numbers in the episode, [n], increasing
  text: types.TextRollout | None  # their sampled tokens
  texts: list[str] | None  # the same, decoded
  images: list[np.ndarray] | None  # [H, W, 3] uint8 each


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
  """The results of B sampled rows, on the devices, which may still be computing `pixels`."""

  inputs: programs.Inputs  # the given and seen segments
  text: types.TextRollout | None  # sampled tokens
  flow: types.FlowRollout | None  # images and recorded steps
  pixels: Sequence[jax.Array] = ()  # decoded images, uint8, in parts of a few rows
  # Fetches the results to this host. It waits for the devices but launches no program, so any
  # thread may call it.
  read: Callable[[], HostRows] | None = None


@dataclasses.dataclass(frozen=True)
class Programs:
  """The functions of module `programs`, bound to the static settings of a batch."""

  prefill: Callable
  fork: Callable
  decode_text: Callable
  denoise: Callable


class Sampler:
  """Samples batches. Parameters are an argument; call it within `sharding.activate`.

  `cast_and_reshard` turns the parameters of a training state into those that `sample` takes: in the
  network's dtype (bfloat16 halves the memory traffic of decoding) and in the layout of sampling.
  """

  def __init__(
    self, network: state.Network, vae_params: Any, *, layout: str = "update",
    groups: int | None = None,
  ):
    """Compiles nothing yet.

    Args:
      network: the network and its mesh.
      vae_params: parameters of the autoencoder; None: images are not decoded.
      layout: of the network's parameters, one of `sharding.LAYOUTS`.
      groups: number of groups in a batch. Each host then reads only its own rows of an `Episode`,
        in whole groups. None: every host reads all rows.
    """
    self.network, self.model, self.mesh = network, network.model, network.mesh
    self.vae, self.vae_params = vae_lib.VAE(network.config.vae), vae_params
    self._ways = sharding.batch_multiple(self.mesh)
    self._readers = None if groups is None else sharding.with_whole_groups(self.mesh, groups)
    self.layout = state.param_shardings(
      self.model, self.mesh, ("bagel",), sharding.LAYOUTS[layout]
    )["bagel"]
    self.cast = jax.jit(
      lambda params: jax.tree.map(lambda a: a.astype(self.model.dtype), params),
      out_shardings=self.layout,
    )
    platform = lowering.platform(self.mesh)
    self.encode_images, self.decode_images = (
      functools.partial(program(platform), self.vae)
      for program in (programs.encode_images, programs.decode_images)
    )

  def cast_and_reshard(self, params):
    """Parameters of a training state as `sample` takes them; copied only if they differ."""
    same = jax.tree.map(
      lambda a, place: a.dtype == self.model.dtype and a.sharding.is_equivalent_to(place, a.ndim),
      params, self.layout,
    )
    return params if all(jax.tree.leaves(same)) else self.cast(params)

  def programs(
    self, batch: requests.Batch, sde: SDE | None = None, progress: Progress | None = None
  ) -> Programs:
    """The device programs that `sample` runs for a batch; arguments as there."""
    s, bind, tokenizer = batch.settings, functools.partial, self.network.tokenizer
    return Programs(
      prefill=bind(programs.prefill, self.model, script=batch.script, capacity=batch.capacity),
      fork=bind(
        programs.fork, self.model, copies=batch.copies,
        capacity=s.max_tokens + text_lib.EXTRA_SLOTS,
      ),
      decode_text=bind(
        programs.decode_text, self.model, start_id=tokenizer.im_start, end_id=tokenizer.im_end,
        max_tokens=s.max_tokens, temperature=s.temperature, top=s.top,
        on_step=_step_reporter(progress, "decode", s.max_tokens),
      ),
      denoise=bind(
        programs.denoise, self.model, num_timesteps=s.num_timesteps, shift=s.shift,
        guidance=s.guidance, **({} if sde is None else dataclasses.asdict(sde)),
        on_step=_step_reporter(progress, "denoise", s.num_timesteps - 1),
      ),
    )

  def sample(
    self, params, batch: requests.Batch, randomness: Randomness, *,
    window: np.ndarray | None = None, sde: SDE | None = None, previous: Episode | None = None,
    timer: Timer = lambda phase: contextlib.nullcontext(), progress: Progress | None = None,
  ) -> Episode:
    """Reads the given and seen segments, then samples text and images as the batch's script says.

    Returns when the latents are computed; the images are still being decoded.

    Args:
      params: of the network; see `cast_and_reshard`.
      batch: the rows.
      randomness: of the rows.
      window: numbers of the denoising steps to record of each row, [B, W] int32; with `sde`, noise
        is added in these steps. None: no step is recorded.
      sde: noise of the window's steps; None: they are steps of the ODE.
      previous: the episode sampled before this one. Its images may still be being decoded; the time
        for that is not attributed to this episode's phases.
      timer: surrounds the phases "read", "decode", "denoise" and "vae". Each phase waits for its
        results, except that decoded images are waited for by `wait_for_images`.
      progress: called after every token and denoising step; never on several hosts.
    """
    run = self.programs(batch, sde, progress)
    put = functools.partial(sharding.put_rows, self.mesh)
    with timer("read"):
      inputs = jax.tree.map(lambda a: a if a.shape[0] == 1 else put(a), self._inputs(batch))
      contexts = run.prefill(params, inputs)
      if previous is not None:
        wait_for_images(previous, timer)
      jax.block_until_ready(contexts)
    text = flow = None
    for segment in batch.script.own:
      if isinstance(segment, script_lib.Sampled):
        with timer("decode"):
          if batch.copies > 1:
            contexts = run.fork(contexts)
          active = put(np.arange(batch.rows) < batch.real)
          text, main = run.decode_text(params, contexts.main, randomness.text, active)
          contexts = contexts.replace(main=main)
          jax.block_until_ready(text)
      else:
        with timer("denoise"):
          grid = jax.tree.map(put, batch.grid)
          steps = () if window is None else (randomness.steps, put(window))
          flow = run.denoise(params, contexts, randomness.noise, grid, *steps)
          jax.block_until_ready(flow)
    rows, read_text = self._read(text, batch.real)
    decoded = None
    if flow is not None and self.vae_params is not None:
      with timer("vae"):
        decoded = list(self._decode(flow.latents, batch))

    def read() -> HostRows:
      host_text = read_text()
      texts = self._decoded(host_text)
      if decoded is None:
        return HostRows(rows, host_text, texts, None)
      images = {row: image for part in decoded for row, image in zip(part.rows, part.read())}
      drawn = sorted(row for row in images if row < batch.real)  # without those that only fill up
      return HostRows(np.array(drawn, int), host_text, texts, [images[row] for row in drawn])

    return Episode(inputs, text, flow, [part.pixels for part in decoded or ()], read)

  def _read(self, arrays, real: int) -> tuple[np.ndarray, Callable[[], Any]]:
    """Which rows this host reads, and a function that fetches them as NumPy arrays.

    `arrays` is a tree with rows on its leading axis, of which the first `real` were requested.
    """
    if arrays is None:
      return np.arange(real), lambda: None
    if self._readers is None:
      read = sharding.start_fetch(arrays)
      return np.arange(real), lambda: jax.tree.map(lambda a: a[:real], read())
    return sharding.local_rows(self._readers, arrays)

  def _decoded(self, text: types.TextRollout | None) -> list[str] | None:
    """The sampled tokens as texts, without their terminators."""
    if text is None:
      return None
    texts = []
    for ids, mask, finished in zip(text.ids, text.mask, text.finished):
      ids = [int(i) for i in ids[mask]]
      texts.append(self.network.tokenizer.decode(ids[:-1] if finished else ids))
    return texts

  def _inputs(self, batch: requests.Batch) -> programs.Inputs:
    """The arrays of the batch's given and seen segments; images are encoded by the VAE."""
    images = {}
    for segment in batch.script.shared:
      if isinstance(segment, script_lib.Seen):
        images[segment.name] = types.Seen(
          latents=self._encode(batch) if segment.latents else None,
          grid=batch.grid if segment.latents else None,
          patches=batch.patches if segment.patches else None,
        )
    return programs.Inputs(batch.texts, images)

  def _encode(self, batch: requests.Batch) -> np.ndarray:
    """Clean latent tokens of the batch's images, [B, I, C]; one posterior sample each."""
    c, latents = self.network.config, [None] * batch.rows
    for rows, size in requests.by_size(batch.sizes, programs.VAE_PIXELS * self.mesh.size):
      pixels = np.stack([images_lib.to_array(batch.images[row]) for row in rows])
      shape = [side // c.vae.downsample for side in size] + [c.vae.z_channels]
      keys = [requests.row_key(batch.seeds[row], "posterior") for row in rows]
      noise = np.stack([jax.random.normal(key, shape) for key in keys])
      # Spread over the devices; images are repeated until every device has equally many.
      filled = np.arange(len(rows) + -len(rows) % self.mesh.size) % len(rows)
      spread = [sharding.put(a[filled], sharding.along_all(self.mesh)) for a in (pixels, noise)]
      encoded = self.encode_images(self.vae_params, *spread)
      encoded = sharding.fetch(encoded)[: len(rows)]
      for row, tokens in zip(rows, vae_lib.pack_latents(encoded, c.latent_patch_size)):
        latents[row] = np.asarray(tokens)
    return requests.pad_rows(latents)[0]

  def images_at_once(self, size: tuple[int, int]) -> int:
    """How many images of a (height, width) in pixels a device decodes together; see VAE_PIXELS."""
    return max(programs.VAE_PIXELS // (size[0] * size[1]), 1)

  def _decode(self, latents, batch: requests.Batch) -> Iterator[_Images]:
    """Launches the decoding of all rows' images, a few at a time; waits for none of them."""
    for size in sorted(set(batch.sizes)):
      members = np.flatnonzero([other == size for other in batch.sizes])
      filled = members[np.arange(len(members) + -len(members) % self._ways) % len(members)]
      some = latents if len(members) == batch.rows else latents[filled]
      for places, pixels, read in self._decode_one_size(some, size):
        rows = [members[place] if place < len(members) else batch.real for place in places]
        yield _Images(rows, pixels, read)

  def _decode_one_size(self, latents, size: tuple[int, int]):
    """Launches the decoding of latents [B, I, C] of images of one size, a few at a time.

    Yields (numbers of the rows that this host reads, pixels on the devices, a function that fetches
    these rows' pixels in that order).
    """
    c, (height, width) = self.network.config, size
    h, w = height // c.latent_stride, width // c.latent_stride
    grids = vae_lib.unpack_latents(latents[:, : h * w], h, w, c.latent_patch_size)
    # Each part takes a few rows of every device, those it holds already: no row moves between
    # devices, and the decoder's temporaries fit into memory.
    everywhere = len(grids) % self.mesh.size == 0
    ways = self.mesh.size if everywhere else self._ways
    grids = grids.reshape(ways, -1, *grids.shape[1:])
    numbers = np.arange(grids.shape[0] * grids.shape[1]).reshape(grids.shape[:2])
    at_once = self.images_at_once(size)
    for first in range(0, grids.shape[1], at_once):
      part = slice(first, first + at_once)
      chunk = grids[:, part].reshape(-1, *grids.shape[2:])
      if everywhere:
        chunk = jax.device_put(chunk, sharding.along_all(self.mesh))
      pixels = self.decode_images(self.vae_params, chunk)
      local, read = self._read(pixels, len(chunk))
      yield numbers[:, part].ravel()[local], pixels, read


@dataclasses.dataclass(frozen=True, eq=False)
class _Images:
  """Images that the devices decode in one call."""

  rows: Sequence[int]  # the rows that this host reads
  pixels: jax.Array  # of all of them, uint8
  read: Callable[[], np.ndarray]  # fetches those of `rows`


def wait_for_images(episode: Episode, timer: Timer) -> None:
  """Waits until an episode's images are decoded, timed as phase "vae"."""
  with timer("vae"):
    jax.block_until_ready(episode.pixels)


@functools.lru_cache(maxsize=16)
def _step_reporter(progress: Progress | None, phase: str, total: int):
  """The `on_step` callback of a phase, cached: a new object each time would compile each time."""
  if progress is None or jax.process_count() > 1:
    return None
  return lambda step: progress(phase, min(int(step) + 1, total), total)
