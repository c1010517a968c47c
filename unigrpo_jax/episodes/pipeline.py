"""A BAGEL on its devices: opens a checkpoint and runs batches through the phases.

  pipeline = Pipeline.open("BAGEL-7B-MoT")            # config and tokenizer
  batch = pipeline.prepare([Request("a red kite")], Settings(think=True))
  pipeline.load()                                     # the weights
  [result] = pipeline.run(batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import batches, phases
from unigrpo_jax.models import attention, weights
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import checkpoints, folders, sharding

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Result:
  """What a request gave.

  Attributes:
    text: reasoning or answer; None when none was asked for.
    ids: its sampled ids, the terminator included.
    finished: False when the text was cut at `max_tokens`.
    image: [H, W, 3] uint8, or None.
  """

  text: str | None
  ids: tuple[int, ...]
  finished: bool
  image: np.ndarray | None


class Pipeline:
  """See the module's docstring."""

  def __init__(self, folder: folders.ModelFolder, model: bagel_lib.Bagel, tokenizer, mesh):
    """Use `open`."""
    tokenizer.check_fits(folder.config.llm.vocab_size)
    self.config, self.model, self.tokenizer, self.mesh = folder.config, model, tokenizer, mesh
    self.vae = vae_lib.VAE(folder.config.vae)
    self.params: dict[str, Any] = {}
    self.seconds: dict[str, float] = {}
    self._folder = folder

  @classmethod
  def open(cls, path: pathlib.Path | str, *, dtype=None, mesh=None) -> Pipeline:
    """Opens an official or a converted folder; loads no weights yet.

    Args:
      path: the folder.
      dtype: of the network (the VAE is float32 always); None: float32 on CPU, bfloat16 elsewhere.
      mesh: devices; None: all of them.

    Raises:
      InputError: it is no such folder, or its config or tokenizer cannot be used.
    """
    folder = folders.open_folder(path)
    tokenizer = tokenizer_lib.load(folder.files)
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if mesh is None:
      count = sum(math.prod(leaf.shape) for leaf in weights.table(folder.config))
      size = count * jnp.dtype(dtype).itemsize
      mesh = sharding.sampling_mesh(folder.config.llm.num_kv_heads, size)
    markers = (tokenizer.vision_start, tokenizer.vision_end)
    backend = attention.choose_backend("auto", mesh.devices.flat[0].platform, dtype)
    model = bagel_lib.Bagel(
      folder.config, markers, dtype=dtype, param_dtype=dtype, backend=backend,
      unroll=sharding.needs_straight_programs(mesh),
    )
    return cls(folder, model, tokenizer, mesh)

  def load(self, parts: Sequence[str] = ("bagel", "vae")) -> Pipeline:
    """Loads the weights, each parameter straight into its shards.

    Args:
      parts: what to load; ("bagel",) suffices to answer.

    Raises:
      InputError: the weights are missing, broken, or do not agree with the config.
    """
    try:
      self.params = self._folder.load_params(
        dtype={"bagel": self.model.dtype, "vae": jnp.float32},
        shardings=param_shardings(self.model, self.mesh, parts), parts=parts,
      )
    except jax.errors.JaxRuntimeError as error:
      if not checkpoints.is_full(error):
        raise
      raise errors.InputError(f"{self._folder.path}: {checkpoints.TOO_SMALL}") from None
    return self

  def batch_rows(self, batch_size: int, count: int) -> int:
    """`batch_size`, at most `count`, rounded up to what the devices share evenly."""
    ways = sharding.batch_multiple(self.mesh)
    return -(-min(batch_size, count) // ways) * ways

  def prepare(
    self, requests: Sequence[batches.Request], settings: batches.Settings, rows: int = 1
  ) -> batches.Batch:
    """Checks requests and makes a batch of a multiple of `rows`; see `batches.prepare`."""
    multiple = math.lcm(rows, sharding.batch_multiple(self.mesh))
    return batches.prepare(
      self.config, self.tokenizer, requests, settings, multiple=multiple
    )

  def run(self, batch: batches.Batch, progress: Progress | None = None) -> list[Result]:
    """Runs a batch; several hosts call it together, and each has all results.

    Args:
      batch: see `prepare`.
      progress: called with a phase, what is done of it, and its total; on several hosts never.

    Returns:
      One result a request, in order. `seconds` holds the time of each phase.

    Raises:
      InputError: a row's log-probabilities or latents are not finite.
    """
    self.seconds = {}
    settings, rollout, drawn = batch.settings, None, [None] * batch.real
    with sharding.activate(self.mesh):
      with self._timed("read"):
        contexts = self._run(phases.read, self._inputs(batch), capacity=batch.capacity)
      if batch.writes:
        with self._timed("write"):
          rollout, contexts = self._write(contexts, batch, progress)
          _check_finite("text", rollout.logp[: batch.real])
      if not settings.understand:
        with self._timed("draw"):
          latents = self._draw(contexts, batch, progress)
          _check_finite("image", latents[: batch.real])
        with self._timed("decode"):
          drawn = self._decode(latents, batch)
    return [self._result(rollout, row, image) for row, image in enumerate(drawn)]

  def _inputs(self, batch: batches.Batch) -> phases.Inputs:
    latents = self._encode(batch) if batch.edits else None
    return phases.Inputs(
      prompt_ids=batch.prompt_ids, prompt_mask=batch.prompt_mask, system_ids=batch.system_ids,
      latents=latents, grid=batch.grid if batch.edits else None, patches=batch.patches,
      given_ids=batch.given_ids, given_mask=batch.given_mask,
    )

  def _encode(self, batch: batches.Batch) -> np.ndarray:
    """Clean latent tokens of the batch's images, [B, I, C]; one posterior sample each."""
    c, latents = self.config, [None] * len(batch.images)
    for rows, size in batches.by_size(batch.sizes, self._vae_pixels):
      pixels = np.stack([images_lib.to_array(batch.images[row]) for row in rows])
      shape = [side // c.vae.downsample for side in size] + [c.vae.z_channels]
      keys = [batches.row_key(batch.seeds[row], "posterior") for row in rows]
      noise = np.stack([jax.random.normal(key, shape) for key in keys])
      encoded = self._run_vae(phases.encode_images, pixels, noise)
      for row, tokens in zip(rows, vae_lib.pack_latents(encoded, c.latent_patch_size)):
        latents[row] = np.asarray(tokens)
    return batches.pad_rows(latents)[0]

  def _write(self, contexts: phases.Contexts, batch: batches.Batch, progress):
    settings = batch.settings
    keys = np.stack([
      jax.random.key_data(batches.row_key(seed, "text")) for seed in batch.seeds
    ])
    rollout, main = self._run(
      phases.write, contexts.main, jax.random.wrap_key_data(keys),
      np.arange(len(batch.seeds)) < batch.real,
      start_id=self.tokenizer.im_start, end_id=self.tokenizer.im_end,
      max_tokens=settings.max_tokens, temperature=settings.temperature,
      on_step=_step_reporter(progress, "write", settings.max_tokens),
    )
    return sharding.fetch(rollout), contexts.replace(main=main)

  def _draw(self, contexts: phases.Contexts, batch: batches.Batch, progress) -> np.ndarray:
    settings, counts = batch.settings, batch.grid.mask.sum(axis=1)
    # Drawn at each row's own length: a row's noise must not depend on its padding.
    noise, _ = batches.pad_rows([
      jax.random.normal(batches.row_key(seed, "noise"), (count, self.config.latent_dim))
      for seed, count in zip(batch.seeds, counts)
    ])
    return sharding.fetch(self._run(
      phases.draw, contexts, noise, batch.grid, num_timesteps=settings.num_timesteps,
      shift=settings.shift, guidance=settings.guidance,
      on_step=_step_reporter(progress, "draw", settings.num_timesteps - 1),
    ))

  def _decode(self, latents: np.ndarray, batch: batches.Batch) -> list[np.ndarray]:
    c, out = self.config, [None] * batch.real
    for rows, (height, width) in batches.by_size(
      batch.sizes[: batch.real], self._vae_pixels
    ):
      h, w = height // c.latent_stride, width // c.latent_stride
      tokens = np.stack([latents[row][: h * w] for row in rows])
      grids = vae_lib.unpack_latents(tokens, h, w, c.latent_patch_size)
      for row, image in zip(rows, self._run_vae(phases.decode_images, grids)):
        out[row] = image
    return out

  def _result(self, rollout: types.TextRollout | None, row: int, image) -> Result:
    if rollout is None:
      return Result(text=None, ids=(), finished=True, image=image)
    ids = tuple(int(i) for i in rollout.ids[row][rollout.mask[row]])
    finished = bool(rollout.finished[row])
    words = self.tokenizer.decode(ids[:-1] if finished else ids)
    return Result(text=words, ids=ids, finished=finished, image=image)

  def _run(self, phase, *args, **options):
    """Runs a phase with the rows of its host arrays spread over the mesh."""
    rows = sharding.along_batch(self.mesh)
    put = lambda a: sharding.put(a, rows) if isinstance(a, np.ndarray) and a.ndim > 1 else a
    out = phase(self.model, self.params["bagel"], *jax.tree.map(put, args), **options)
    return jax.block_until_ready(out)

  @property
  def _vae_pixels(self) -> int:
    return phases.VAE_PIXELS * self.mesh.size

  def _run_vae(self, program, *arrays) -> np.ndarray:
    """Runs a VAE program with the images spread over the mesh, filled up to share it evenly."""
    count = len(arrays[0])
    rows = np.arange(count + -count % self.mesh.size) % count
    everywhere = sharding.along_all(self.mesh)
    spread = [sharding.put(np.asarray(a)[rows], everywhere) for a in arrays]
    return sharding.fetch(program(self.vae, self.params["vae"], *spread))[:count]

  @contextlib.contextmanager
  def _timed(self, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.seconds[phase] = round(time.perf_counter() - start, 3)


def param_shardings(
  model: bagel_lib.Bagel, mesh: jax.sharding.Mesh, parts: Sequence[str], rules=sharding.RULES
):
  """Shardings of the parameter tree {"bagel": ..., "vae": ...} of `model` on `mesh`."""
  key, c = jax.random.key(0), model.config
  pixels = jnp.zeros((1, c.latent_stride, c.latent_stride, c.vae.in_channels))
  make = {
    "bagel": lambda: model.init(key, bagel_lib.example_batch(c)),
    "vae": lambda: vae_lib.VAE(c.vae).init(key, pixels),
  }
  return {
    part: sharding.shardings(jax.eval_shape(make[part])["params"], mesh, rules) for part in parts
  }


def _check_finite(what: str, values: np.ndarray) -> None:
  bad = [row for row, value in enumerate(values) if not np.isfinite(value).all()]
  if bad:
    raise errors.InputError(
      f"the {what} of prompt {bad[0] + 1} is not finite ({len(bad)} of {len(values)} rows): the "
      "weights hold non-finite values, or the guidance is too strong for the dtype"
    )


@functools.lru_cache(maxsize=16)
def _step_reporter(progress: Progress | None, phase: str, total: int):
  """One callable for repeated calls: a new one each time would compile each time."""
  if progress is None or jax.process_count() > 1:
    return None
  return lambda step: progress(phase, min(int(step) + 1, total), total)
