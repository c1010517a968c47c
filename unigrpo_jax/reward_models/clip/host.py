"""CLIP on this host's devices, and rewards of finished pictures: pickscore, clip and aesthetic.

They score in a thread beside the training, whose programs span all hosts. So their own programs use
only this host's devices, without collectives: each device has all parameters and a part of the
batch. All calls have the same shapes, and are compiled before the first step.
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
  """Weights that are not part of this package: their source, for messages, and their sizes."""

  hub: str  # name on the Hugging Face hub
  size: str  # of the files
  licence: str
  config: config_lib.Config


PICKSCORE = Release("yuvalkirstain/PickScore_v1", "3.9 GB", "MIT", config_lib.HUGE)
LARGE = Release("openai/clip-vit-large-patch14", "1.7 GB", "MIT", config_lib.LARGE)


RELEASES = {"pickscore": PICKSCORE, "clip": LARGE, "aesthetic": LARGE}  # by reward
BATCH, DTYPE = 16, "bfloat16"  # defaults: pictures scored at once, and the dtype of matrices


def find_folder(folder: str, release: Release) -> pathlib.Path:
  """The path of a CLIP's folder.

  Raises:
    InputError: there is no such folder, or one of FILES is missing in it; says how to get them.
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
  """Bytes that a reward takes on each device: its parameters, and what its program needs.

  Args:
    reward: a key of RELEASES.
    options: of the reward. If its folder does not exist, the sizes are those of the release.
    device: to compile for; may be one of a topology that is only named.
    devices: number of devices of a host, over which a batch is split.
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
    pixels, words: preprocessing of pictures and of prompts.
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
    """Loads a CLIP.

    Args:
      folder: in the format of transformers.
      release: what should be in it, for messages.
      dtype: of its matrices, one of DTYPES.

    Raises:
      InputError: the folder or one of its files is missing, damaged or of another network; or
        `dtype` is none of DTYPES.
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
    """Compiles a function of the parameters and of rows, for batches of one size.

    Args:
      score: (params, *arrays of B rows) -> array of B rows.
      shapes: (shape, dtype) of one row of each of these arrays.
      batch_size: B, rounded up to a multiple of the devices.

    Returns:
      (*NumPy arrays of any number of rows) -> NumPy array of the same number of rows. Rows are run
      in batches of B, the last one padded.
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
  """Base of the rewards by CLIP. A prompt that is no Unicode text scores NaN.

  Attributes:
    settings: what scores depend on; see `rewards.Reward`.
    fingerprint: the settings as text.
  """

  def __init__(self, clip: Clip, settings: dict[str, Any]):
    self._clip = clip
    self.settings = clip.settings | settings
    self.fingerprint = json.dumps(self.settings, sort_keys=True)

  def _pixels(self, samples: Sequence[rewards.Sample]) -> np.ndarray:
    """The samples' pictures as the network's input, [N, S, S, 3] float32."""
    return np.stack([self._clip.pixels(sample.image) for sample in samples])


class _Pairs(ClipReward):
  """Base of the rewards that are the scaled cosine of a picture's and its prompt's features."""

  def __init__(
    self, release: Release, folder: str, batch_size: int, dtype: str, scale: str,
    factor: Callable[[float], float],
  ):
    """Loads a CLIP and compiles.

    Args:
      release, folder, dtype: see `Clip.open`.
      batch_size: see `Clip.compile`.
      scale: name of the score's scale, for the settings.
      factor: exp(logit_scale) of the network -> factor of its output, exp(logit_scale) cosine.
    """
    clip = Clip.open(folder, release, dtype)
    super().__init__(clip, {"scale": scale})
    self._factor = factor(float(jnp.exp(clip.params["logit_scale"])))
    self._score = clip.compile(
      lambda params, *rows: clip.model.apply({"params": params}, *rows),
      [(clip.pixel_shape, jnp.float32), (clip.text_shape, jnp.int32)], batch_size,
    )

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    """Scores N pictures; see the class."""
    return rewards.score_encodable(
      samples, lambda sample: self._clip.words([sample.prompt])[0],
      lambda able, ids: self._score(self._pixels(able), np.stack(ids)) * self._factor,
    )


class PickScore(_Pairs):
  """How much people would prefer the picture for its prompt (Kirstain et al., arXiv 2305.01569).

  exp(logit_scale) cos / 26, as in Flow-GRPO, UniRL and verl-omni: about 0.7 to 0.95. `raw` does not
  divide by 26.
  """

  def __init__(
    self, *, folder: str = "", batch_size: int = BATCH, dtype: str = DTYPE, raw: bool = False
  ):
    """Loads the folder of a PickScore; scores `batch_size` pictures at once on all local devices.

    Raises:
      InputError: see `Clip.open`.
    """
    scale = "logit" if raw else "logit / 26"
    super().__init__(
      PICKSCORE, folder, batch_size, dtype, scale, lambda logit: 1.0 if raw else 1 / 26
    )


class ClipScore(_Pairs):
  """How well the picture fits its prompt, by CLIP ViT-L/14 (Hessel et al., arXiv 2104.08718).

  exp(logit_scale) cos / 30 with exp(logit_scale) = 100, as in Flow-GRPO and UniRL: about 0.7 to
  1.1. With `cosine`, the cosine itself.
  """

  def __init__(
    self, *, folder: str = "", batch_size: int = BATCH, dtype: str = DTYPE, cosine: bool = False
  ):
    """Loads the folder of a CLIP; scores `batch_size` pictures at once on all local devices.

    Raises:
      InputError: see `Clip.open`.
    """
    scale = "cosine" if cosine else "logit / 30"
    super().__init__(
      LARGE, folder, batch_size, dtype, scale, lambda logit: 1 / logit if cosine else 1 / 30
    )


class Aesthetic(ClipReward):
  """How people would rate the picture without its prompt, from 1 to 10, mostly 4 to 7 (LAION).

  Five linear layers on the image feature of CLIP ViT-L/14, from
  christophschuhmann/improved-aesthetic-predictor.
  """

  def __init__(
    self, *, folder: str = "", head: str = "", batch_size: int = BATCH, dtype: str = DTYPE
  ):
    """Loads the folder of a CLIP, and the linear layers of the predictor.

    Args:
      folder: of a CLIP ViT-L/14.
      head: file of the layers; "": `aesthetic.safetensors` in the folder.
      batch_size, dtype: see `Clip.compile` and `Clip.open`.

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
    return rewards.Scores(self._score(self._pixels(samples)))


HEAD_FILE = "aesthetic.safetensors"
# Linear layers of the released Sequential, {name: output features}; the other layers are dropout.
_HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def read_head(path: pathlib.Path, features: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The aesthetic predictor's layers: [(matrix [out, in], bias [out]), ...] float32.

  Raises:
    InputError: the file is missing, damaged, or its first layer does not take `features` inputs.
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
  """Scores of unit image features, [B, P] -> [B] float32; there are no activations in between."""
  for matrix, bias in layers:
    features = jnp.matmul(features, matrix.T, precision=jax.lax.Precision.HIGHEST) + bias
  return features[:, 0]
