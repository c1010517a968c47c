"""What the rewards of this folder share: options, weights, batches, and what is printed at start.

Of the package they need `unigrpo_jax.rewards` alone, so that each runs in an environment of its
own; see README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib
import math
import pathlib
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image

from unigrpo_jax import errors, rewards


class Release(NamedTuple):
  """Where a reward's weights come from."""

  name: str  # of the reward, and of its files here
  hub: str  # repository of the Hugging Face hub
  size: str
  licence: str
  files: tuple[str, ...]  # patterns of what is read of it


def load_module(name: str, reward: str) -> ModuleType:
  """Imports a module of the reward's own requirements.

  Raises:
    InputError: it is not installed; names the file that says what to install.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise errors.InputError(
      f"reward {reward} needs {name}, which cannot be imported ({errors.first_line(error)}): "
      f"pip install -r zoo/requirements-{reward}.txt, or bash launch/rewards.sh {reward}"
    ) from None


def find(release: Release, weights: str, revision: str) -> tuple[pathlib.Path, str]:
  """The folder or file that `weights` names, and its revision.

  What is neither on this machine is a repository of the hub, which is downloaded into the hub's
  cache, after a line with its size and licence.

  Raises:
    InputError: there is nothing of that name.
  """
  path = pathlib.Path(weights).expanduser()
  if path.exists():
    return path, "local"
  if not weights or weights.startswith((".", "/", "~")) or weights.count("/") != 1:
    raise errors.InputError(
      f"weights={weights!r}: no such folder; give one, or a repository of the Hugging Face hub, as "
      f"{release.hub} ({release.size}, {release.licence})"
    )
  hub = load_module("huggingface_hub", release.name)
  print(
    f"{release.name}: {weights} of the Hugging Face hub ({release.size}, {release.licence}); "
    "downloads what its cache lacks", flush=True,
  )
  try:
    folder = pathlib.Path(hub.snapshot_download(
      weights, revision=revision or None, allow_patterns=list(release.files)
    ))
  except Exception as error:  # of the network, of names, of rights: of several libraries
    raise errors.InputError(
      f"weights={weights!r} cannot be had from the hub ({errors.first_line(error)}): hf download "
      f"{weights} where there is a network, and give its folder"
    ) from None
  return folder, folder.name


# Of a CLIP in the form of transformers.
CLIP_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "*.safetensors*")


class Reward:
  """A reward by PyTorch; `rewards.Reward`. A subclass loads its model and has `score`.

  Attributes:
    settings: what changes a score.
  """

  release: ClassVar[Release]

  def __init__(
    self, *, weights: str, device: str, dtype: str, batch_size: int, revision: str,
    **settings: Any,
  ):
    """Finds the weights; `settings` are further ones that change a score.

    Args:
      weights: a local folder, or a repository of the hub.
      device: of PyTorch; "" is "cuda" where there is one.
      dtype: "float32", "bfloat16" or "float16", of the network.
      batch_size: pictures at once.
      revision: of a repository: a branch, a tag or a commit; "" is its newest.

    Raises:
      InputError: see `find` and `load_module`; or an option is none of these.
    """
    self.torch = load_module("torch", self.release.name)
    errors.choose("dtype", dtype, ("float32", "bfloat16", "float16"))
    errors.require("batch_size", batch_size, low=1, integer=True)
    self.device = device or ("cuda" if self.torch.cuda.is_available() else "cpu")
    self.dtype, self.batch_size = getattr(self.torch, dtype), batch_size
    self.folder, self.revision = find(self.release, weights, revision)
    self.settings = {
      "model": weights, "revision": self.revision, "dtype": dtype, **settings
    }

  def score(self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]) -> Sequence[float]:
    """Scores of at most `batch_size` RGB pictures and their prompts."""
    raise NotImplementedError

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    """Scores N pictures; a batch that fails is NaN, with the reason."""
    values, reason = np.full(len(samples), np.nan, np.float32), None
    for first in range(0, len(samples), self.batch_size):
      part = samples[first : first + self.batch_size]
      images = [PIL.Image.fromarray(sample.image).convert("RGB") for sample in part]
      try:
        with self.torch.inference_mode():
          found = self.score(images, [sample.prompt for sample in part])
        values[first : first + len(part)] = np.asarray(found, np.float32).reshape(len(part))
      except Exception as error:  # out of memory, say; the server goes on
        reason = errors.describe(error)
    return rewards.Scores(values, reason)

  def report(self) -> None:
    """Prints what was loaded and how it scores a plain red and a plain blue picture as red.

    Raises:
      InputError: a score is not finite.
    """
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    found = self([
      rewards.Sample("a plain red picture", np.full((224, 224, 3), colour, np.uint8))
      for colour in colours.values()
    ])
    name, revision = self.release.name, self.settings["revision"]
    if not all(map(math.isfinite, found.values)):
      raise errors.InputError(f"{name}: its first scores failed: {found.reason}")
    said = ", ".join(f"{colour} {value:.4f}" for colour, value in zip(colours, found.values))
    print(
      f"{name}: {self.settings['model']} (revision {revision}) in {self.settings['dtype']} on "
      f"{self.device}; 'a plain red picture': {said}", flush=True,
    )


def refuse_other_weights(name: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
  """Raises InputError unless both are empty, but for numbers of positions, which old files hold."""
  known = lambda key: key.endswith("position_ids")
  wrong = {
    "missing": [key for key in missing if not known(key)],
    "unexpected": [key for key in unexpected if not known(key)],
  }
  said = [f"{len(keys)} {kind} ({', '.join(keys[:5])})" for kind, keys in wrong.items() if keys]
  if said:
    raise errors.InputError(
      f"{name}: the weights are not its own: {'; '.join(said)}; take the release that the "
      "requirements are pinned for"
    )


class Clip:
  """CLIPModel of transformers, its processor and its tokenizer, from a folder."""

  def __init__(self, reward: Reward):
    """Raises InputError where a file is missing or a tensor is not the network's."""
    name, folder = reward.release.name, reward.folder
    transformers = load_module("transformers", name)
    tokenizers = load_module("tokenizers", name)
    for file in ("config.json", "preprocessor_config.json", "tokenizer.json"):
      if not (folder / file).is_file():
        raise errors.InputError(f"{folder / file}: no such file; {reward.release.hub} has it")
    self._torch, self._device = reward.torch, reward.device
    self.model, found = transformers.CLIPModel.from_pretrained(
      folder, dtype=reward.dtype, use_safetensors=True, output_loading_info=True
    )
    refuse_other_weights(str(folder), list(found["missing_keys"]), list(found["unexpected_keys"]))
    self.model.eval().to(reward.device)
    # The other processor, torchvision's, resizes tensors, which rounds otherwise.
    self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    self._tokenizer.enable_truncation(self.model.config.text_config.max_position_embeddings)
    self._tokenizer.no_padding()
    self._tokenizer.enable_padding(pad_id=self._tokenizer.encode("").ids[-1])

  def images(self, images: Sequence[PIL.Image.Image]):
    """Unit features [N, P] float32 of pictures."""
    pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
    return self._unit(self.model.get_image_features(
      pixel_values=pixels.to(self._device, self.model.dtype)
    ))

  def texts(self, texts: Sequence[str]):
    """Unit features [N, P] float32 of texts; attention is causal, so padding needs no mask."""
    ids = self._torch.tensor([found.ids for found in self._tokenizer.encode_batch(list(texts))])
    return self._unit(self.model.get_text_features(input_ids=ids.to(self._device)))

  def logits(self, images: Sequence[PIL.Image.Image], texts: Sequence[str]):
    """exp(logit_scale) cos of N pictures and their texts, [N] float32."""
    cosine = (self.images(images) * self.texts(texts)).sum(-1)
    return self.model.logit_scale.float().exp() * cosine

  def _unit(self, found):
    # transformers 5 returns an object in place of the projected features.
    features = (found if isinstance(found, self._torch.Tensor) else found.pooler_output).float()
    return features / features.norm(dim=-1, keepdim=True)
