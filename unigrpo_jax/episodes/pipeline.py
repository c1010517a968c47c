"""A BAGEL on its devices: opens a checkpoint and answers requests.

  pipeline = Pipeline.open("BAGEL-7B-MoT")            # config and tokenizer
  settings = Settings.of(pipeline.config.generation, think=True)
  batch = pipeline.prepare([Request("a red kite")], settings)
  pipeline.load()                                     # the weights
  [result] = pipeline.run(batch)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.episodes import sampler as sampler_lib
from unigrpo_jax.runtime import sharding, state


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of one request."""

  text: str | None  # reasoning or answer; None where no text was sampled
  ids: tuple[int, ...]  # the sampled ids of the text, including its terminator
  finished: bool  # False where the text was cut at `max_tokens`
  image: np.ndarray | None  # [H, W, 3] uint8; None where nothing was drawn
  # The `Settings.top` likeliest (id, log-probability) pairs at each id.
  top: tuple[tuple[tuple[int, float], ...], ...] = ()


class Pipeline:
  """A checkpoint on its devices; see the module's docstring.

  Attributes:
    network: the network, its tokenizer and its mesh.
    config: the network's sizes.
    mesh: the devices.
    params: {"bagel": ..., "vae": ...} after `load`; other weights may be put in their place.
    seconds: {phase: wall time} of the last `run`.
  """

  def __init__(self, network: state.Network):
    """Without weights. To open a checkpoint, use `open`."""
    self.network, self.config, self.mesh = network, network.config, network.mesh
    self.params: dict[str, Any] = {}
    self.seconds: dict[str, float] = {}
    self._sampler = sampler_lib.Sampler(network, None)

  @classmethod
  def open(
    cls, path: pathlib.Path | str, *, adapter: pathlib.Path | str | None = None, dtype=None,
    mesh=None,
  ) -> Pipeline:
    """Opens a checkpoint; loads no weights yet.

    Args:
      path: an official or a converted folder.
      adapter: folder of LoRA adapters, which `load` adds to the weights.
      dtype: of the network; None: float32 on CPU, bfloat16 elsewhere. The VAE is always float32.
      mesh: None: all devices.

    Raises:
      InputError: it is no such folder, or its config or tokenizer cannot be used.
    """
    return cls(state.open_for_sampling(path, adapter=adapter, dtype=dtype, mesh=mesh))

  def load(
    self, parts: Sequence[str] = ("bagel", "vae"), without: Collection[str] = ()
  ) -> Pipeline:
    """Loads the weights, each parameter directly into its shards; returns self.

    Args:
      parts: of the weights; ("bagel",) is enough for answers in words.
      without: see `ModelFolder.load_params`; answers need nothing of `bagel.DRAWING`.

    Raises:
      InputError: the weights are missing, broken, or do not agree with the config.
    """
    network = self.network
    self.params = network.folder.load_params(
      dtype={"bagel": network.model.dtype, "vae": jnp.float32},
      shardings=state.param_shardings(network.model, self.mesh, parts), parts=parts,
      without=without,
    )
    return self

  def batch_rows(self, batch_size: int, count: int) -> int:
    """`batch_size`, but at most `count`, rounded up to a multiple of the devices."""
    ways = sharding.batch_multiple(self.mesh)
    return -(-min(batch_size, count) // ways) * ways

  def prepare(
    self, requests: Sequence[requests_lib.Request], settings: requests_lib.Settings, rows: int = 1
  ) -> requests_lib.Batch:
    """Checks requests and makes a batch of them, filled up to a multiple of `rows` rows.

    Raises:
      InputError: see `requests.prepare`.
    """
    return requests_lib.prepare(
      self.config, self.network.tokenizer, requests, settings,
      multiple=math.lcm(rows, sharding.batch_multiple(self.mesh)),
    )

  def run(
    self, batch: requests_lib.Batch, progress: sampler_lib.Progress | None = None
  ) -> list[Result]:
    """Samples a batch; returns one result per request. All hosts call it, and all get all results.

    Args:
      batch: see `prepare`.
      progress: called after every token and denoising step; never on several hosts.

    Raises:
      InputError: a row's log-probabilities or latents are not finite.
    """
    self.seconds = {}
    self._sampler.vae_params = self.params.get("vae")
    with sharding.activate(self.mesh):
      randomness = self._randomness(batch)
      episode = self._sampler.sample(
        self.params["bagel"], batch, randomness, timer=self._timed, progress=progress
      )
      latents = None if episode.flow is None else sharding.fetch(episode.flow.latents)
      if episode.pixels:
        sampler_lib.wait_for_images(episode, self._timed)
    result = episode.read()
    _check_finite("text", result.text and result.text.logp)
    _check_finite("image", latents if latents is None else latents[: batch.real])
    return [self._result(result, row) for row in range(batch.real)]

  def _randomness(self, batch: requests_lib.Batch) -> sampler_lib.Randomness:
    """The randomness of each row, from its seed alone.

    Each row's noise is drawn at its own length, so that padding does not change it.
    """
    keys = np.stack([
      jax.random.key_data(requests_lib.row_key(seed, "text")) for seed in batch.seeds
    ])
    rows = sharding.along_batch(self.mesh)
    text = jax.random.wrap_key_data(sharding.put(keys, rows))
    if batch.grid is None:
      return sampler_lib.Randomness(text)
    counts = batch.grid.mask.sum(axis=1)
    noise, _ = requests_lib.pad_rows([
      jax.random.normal(requests_lib.row_key(seed, "noise"), (count, self.config.latent_dim))
      for seed, count in zip(batch.seeds, counts)
    ])
    return sampler_lib.Randomness(text, sharding.put_rows(self.mesh, noise))

  def _result(self, rows: sampler_lib.HostRows, row: int) -> Result:
    image = None if rows.images is None else rows.images[row]
    if rows.text is None:
      return Result(text=None, ids=(), finished=True, image=image)
    ids, mask = rows.text.ids[row], rows.text.mask[row]
    top: tuple[Any, ...] = ()
    if rows.text.top_ids is not None:
      pairs = zip(rows.text.top_ids[row][mask].tolist(), rows.text.top_logp[row][mask].tolist())
      top = tuple(tuple(zip(*pair)) for pair in pairs)
    return Result(
      text=rows.texts[row], ids=tuple(int(i) for i in ids[mask]),
      finished=bool(rows.text.finished[row]), image=image, top=top,
    )

  @contextlib.contextmanager
  def _timed(self, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 3)


def _check_finite(what: str, values: np.ndarray | None) -> None:
  if values is None:
    return
  bad = [row for row, value in enumerate(values) if not np.isfinite(value).all()]
  if bad:
    raise errors.InputError(
      f"the {what} of prompt {bad[0] + 1} is not finite ({len(bad)} of {len(values)} rows): the "
      "weights hold non-finite values, or the guidance is too strong for the dtype"
    )
