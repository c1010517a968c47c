"""A CLIP on this host's devices, and its rewards of finished pictures: pickscore, clip, aesthetic.

They score in a thread beside the training, whose programs span all hosts. So theirs are of this
host's devices alone, without a collective: the parameters are on each device, and each has a part
of the batch. Every call has the same shapes, and they are compiled before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.data import files
from unigrpo_jax.models import weight_files
from unigrpo_jax.reward_models.clip import config as config_lib
from unigrpo_jax.reward_models.clip import convert, network, preprocess
from unigrpo_jax.runtime import checksums, sharding

DTYPES = ("bfloat16", "float32")
FILES = (config_lib.FILE, preprocess.IMAGE_FILE, preprocess.TEXT_FILE)


class Release(NamedTuple):
  """Where weights come from that are not part of this package, for messages and plans."""

  hub: str
  size: str
  licence: str
  config: config_lib.Config


PICKSCORE = Release("yuvalkirstain/PickScore_v1", "3.9 GB", "MIT", config_lib.HUGE)
LARGE = Release("openai/clip-vit-large-patch14", "1.7 GB", "MIT", config_lib.LARGE)


RELEASES = {"pickscore": PICKSCORE, "clip": LARGE, "aesthetic": LARGE}  # by reward
BATCH, DTYPE = 16, "bfloat16"  # by default: pictures at once, and what matrices are kept in


def find_folder(folder: str, release: Release) -> pathlib.Path:
  """The local folder with the files of a CLIP.

  Raises:
    InputError: there is none, or one of FILES is missing; says how to get them.
  """
  path = files.path(folder) if folder else pathlib.Path("FOLDER")
  missing = [name for name in FILES if not (path / name).is_file()]
  if folder and not missing:
    return path
  names = " ".join((*FILES, convert.FILE))
  lacks = f"{path}: lacks {', '.join(missing)}" if path.is_dir() else f"{folder!r}: no such folder"
  raise errors.InputError(
    f"folder={lacks if folder else repr('')}; give that of a CLIP: {release.hub} on the Hugging "
    f"Face hub ({release.size}, {release.licence}): hf download {release.hub} {names} --local-dir "
    f"{path}"
  )


def device_bytes(reward: str, options: Mapping[str, Any], device: Any, devices: int) -> int:
  """What a reward takes of a device: its parameters, and what its program needs while it runs.

  Args:
    reward: one of RELEASES.
    options: of it; where its folder is not there, the sizes are those of the release.
    device: which is compiled for, and need not be there.
    devices: of a host, over which a batch is split.
  """
  path = files.path(options.get("folder") or "FOLDER")
  known = (path / config_lib.FILE).is_file()
  config = config_lib.read(path) if known else RELEASES[reward].config
  rows, side = -(-options.get("batch_size", BATCH) // devices), config.vision.image_size
  shapes = (
    convert.abstract_params(config, jnp.dtype(options.get("dtype", DTYPE))),
    jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32),
    jax.ShapeDtypeStruct((rows, config.text.max_positions), jnp.int32),
  )
  mesh = sharding.make_mesh(devices=[device])
  score = lambda params, *rows: network.CLIP(config).apply({"params": params}, *rows)
  with sharding.activate(mesh):
    program = jax.jit(score, in_shardings=sharding.replicated(mesh)).lower(*shapes).compile()
  return sharding.program_bytes(program)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """A CLIP whose parameters are on every device of this host.

  Attributes:
    model: the network.
    params: its parameters, replicated.
    pixels, words: what it sees of a picture and reads of a prompt.
    mesh: this host's devices.
    settings: what its features depend on.
  """

  model: network.CLIP
  params: Any
  pixels: preprocess.Pixels
  words: preprocess.Words
  mesh: jax.sharding.Mesh
  settings: dict[str, Any]

  @classmethod
  def open(cls, folder: str, release: Release, dtype: str) -> Clip:
    """Loads a folder; matrices are kept in `dtype`.

    Raises:
      InputError: the folder or one of its files is missing, damaged or of another network; a
        `dtype` that is none of DTYPES.
    """
    errors.choose("dtype", dtype, DTYPES)
    path = find_folder(folder, release)
    config = config_lib.read(path)
    pixels = preprocess.read_pixels(path, config.vision.image_size)
    words = preprocess.Words(path, config.text.max_positions, config.text.vocab_size)
    devices = jax.local_devices()
    mesh = sharding.make_mesh(data=len(devices), devices=devices)
    params = convert.load(path, config, jnp.dtype(dtype), sharding.replicated(mesh))
    read = [*(path / name for name in FILES), *weight_files.find(path, convert.FILE)]
    settings = {
      "model": release.hub, "dtype": dtype,
      "checksums": {file.name: checksums.of(file) for file in read},
    }
    return cls(network.CLIP(config), params, pixels, words, mesh, settings)

  @property
  def pixel_shape(self) -> tuple[int, ...]:
    return (self.pixels.crop, self.pixels.crop, 3)

  @property
  def text_shape(self) -> tuple[int, ...]:
    return (self.model.config.text.max_positions,)

  def compile(
    self, score: Callable[..., jax.Array], shapes: Sequence[tuple[tuple[int, ...], Any]],
    batch_size: int,
  ) -> Callable[..., np.ndarray]:
    """Compiles `score(params, *rows)`; the result takes any number of rows, in padded batches.

    Args:
      score: of parameters and arrays of B rows, to an array of B rows.
      shapes: (shape, dtype) of a row of each of these.
      batch_size: rows at once, rounded up to a multiple of the devices.
    """
    errors.require("batch_size", batch_size, low=1, integer=True)
    count = self.mesh.size
    rows = -(-batch_size // count) * count
    where = sharding.along_batch(self.mesh)
    batch = [jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where) for shape, dtype in shapes]
    with sharding.activate(self.mesh):
      program = jax.jit(score, out_shardings=where).lower(self.params, *batch).compile()
    return functools.partial(_in_batches, program, self.params, rows, where)


def _in_batches(program, params, rows: int, where, *arrays: np.ndarray) -> np.ndarray:
  found = []
  for first in range(0, len(arrays[0]), rows):
    parts = [array[first : first + rows] for array in arrays]
    count = len(parts[0])
    padded = [part[np.arange(rows) % count] for part in parts]
    result = program(params, *(jax.device_put(part, where) for part in padded))
    found.append(np.asarray(result)[:count])
  return np.concatenate(found)


class ClipReward:
  """A reward of a CLIP; `rewards.Reward`. A prompt that is no text scores NaN.

  Attributes:
    settings: what changes a score.
    fingerprint: text of them.
  """

  def __init__(self, clip: Clip, settings: dict[str, Any]):
    self._clip = clip
    self.settings = clip.settings | settings
    self.fingerprint = json.dumps(self.settings, sort_keys=True)

  def _seen(self, samples: Sequence[rewards.Sample]) -> np.ndarray:
    return np.stack([self._clip.pixels(sample.image) for sample in samples])

  def _by_prompt(self, samples: Sequence[rewards.Sample], score, scale: float) -> rewards.Scores:
    """Scores of pictures and their prompts: what `score` gives, times `scale`."""
    values, reason = np.full(len(samples), np.nan, np.float32), None
    rows, ids = [], []
    for row, sample in enumerate(samples):
      try:
        ids.append(self._clip.words([sample.prompt])[0])
        rows.append(row)
      except errors.InputError as error:
        reason = str(error)
    if rows:
      pixels = self._seen([samples[row] for row in rows])
      values[rows] = score(pixels, np.stack(ids)) * scale
    return rewards.Scores(values, reason)


class _Pairs(ClipReward):
  """The scaled cosine of a picture and its prompt."""

  def __init__(
    self, release: Release, folder: str, batch_size: int, dtype: str, scale: str,
    factor: Callable[[float], float],
  ):
    """`factor` of exp(logit_scale), by which the network's cosine is scaled, gives the score's."""
    clip = Clip.open(folder, release, dtype)
    super().__init__(clip, {"scale": scale})
    self._factor = factor(float(jnp.exp(clip.params["logit_scale"])))
    self._score = clip.compile(
      lambda params, *rows: clip.model.apply({"params": params}, *rows),
      [(clip.pixel_shape, jnp.float32), (clip.text_shape, jnp.int32)], batch_size,
    )

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    """Scores N pictures; see the class."""
    return self._by_prompt(samples, self._score, self._factor)


class PickScore(_Pairs):
  """How people would prefer the picture for its prompt (Kirstain et al., arXiv 2305.01569).

  exp(logit_scale) cos / 26, as Flow-GRPO, UniRL and verl-omni have it: about 0.7 to 0.95. `raw`
  leaves the 26 out.
  """

  def __init__(
    self, *, folder: str = "", batch_size: int = BATCH, dtype: str = DTYPE, raw: bool = False
  ):
    """Loads the folder of a PickScore; `batch_size` pictures at once, of all this host's devices.

    Raises:
      InputError: see `Clip.open`.
    """
    scale = "logit" if raw else "logit / 26"
    super().__init__(
      PICKSCORE, folder, batch_size, dtype, scale, lambda logit: 1.0 if raw else 1 / 26
    )


class ClipScore(_Pairs):
  """How well the picture fits its prompt, by CLIP ViT-L/14 (Hessel et al., arXiv 2104.08718).

  exp(logit_scale) cos / 30, and that scale is 100: as Flow-GRPO and UniRL have it, about 0.7 to
  1.1. `cosine` gives the cosine itself.
  """

  def __init__(
    self, *, folder: str = "", batch_size: int = BATCH, dtype: str = DTYPE, cosine: bool = False
  ):
    """Loads the folder of a CLIP; `batch_size` pictures at once, of all this host's devices.

    Raises:
      InputError: see `Clip.open`.
    """
    scale = "cosine" if cosine else "logit / 30"
    super().__init__(
      LARGE, folder, batch_size, dtype, scale, lambda logit: 1 / logit if cosine else 1 / 30
    )


class Aesthetic(ClipReward):
  """How well the picture was rated without its prompt: 1 to 10, mostly 4 to 7 (LAION).

  A head of five matrices on the image feature of CLIP ViT-L/14, from
  christophschuhmann/improved-aesthetic-predictor.
  """

  def __init__(
    self, *, folder: str = "", head: str = "", batch_size: int = BATCH, dtype: str = DTYPE
  ):
    """Loads the folder of a CLIP, and the `head`, by default `aesthetic.safetensors` in it.

    Raises:
      InputError: see `Clip.open`; or the head is missing or of another network.
    """
    clip = Clip.open(folder, LARGE, dtype)
    path = files.path(head) if head else files.path(folder) / HEAD_FILE
    layers = read_head(path, clip.model.config.projection_size)
    layers = jax.device_put(layers, sharding.replicated(clip.mesh))
    super().__init__(clip, {"head": checksums.of(path)})

    def score(params, pixels):
      features = clip.model.apply({"params": params}, pixels, method="image_features")
      return aesthetic(layers, network.unit(features))

    self._score = clip.compile(score, [(clip.pixel_shape, jnp.float32)], batch_size)

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    """Scores N pictures; see the class."""
    return rewards.Scores(self._score(self._seen(samples)))


HEAD_FILE = "aesthetic.safetensors"
# The layers of the released Sequential that are matrices, and what they give; dropout is between.
_HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def read_head(path: pathlib.Path, features: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The aesthetic predictor's layers: [(matrix [out, in], bias [out]), ...] float32.

  Raises:
    InputError: the file is missing, damaged, or not a head of `features`.
  """
  expected, wide = {}, features
  for name, out in _HEAD.items():
    expected |= {f"layers.{name}.weight": (out, wide), f"layers.{name}.bias": (out,)}
    wide = out
  if not path.is_file():
    raise errors.InputError(
      f"{path}: no such file; it is sac+logos+ava1-l14-linearMSE.pth (3.7 MB, Apache-2.0) of "
      "github.com/christophschuhmann/improved-aesthetic-predictor as safetensors; where PyTorch is "
      "installed: python -c \"import torch, safetensors.torch as s; s.save_file(torch.load("
      f"'sac+logos+ava1-l14-linearMSE.pth', weights_only=True), '{path}')\""
    )
  with weight_files.Tensors(path.parent, path.name) as file:
    convert.check(file, expected, "the aesthetic predictor")
    read = lambda name: file.read(name).astype(np.float32)
    return [(read(f"layers.{name}.weight"), read(f"layers.{name}.bias")) for name in _HEAD]


def aesthetic(layers: Sequence[tuple[jax.Array, jax.Array]], features: jax.Array) -> jax.Array:
  """Unit image features [B, P] -> [B] float32; the layers have no activation between them."""
  for matrix, bias in layers:
    features = jnp.matmul(features, matrix.T, precision=jax.lax.Precision.HIGHEST) + bias
  return features[:, 0]
