"""Preprocessing of CLIP's pictures and prompts, by the files of its folder; on the host.

Pictures are processed as by transformers' CLIPImageProcessorPil; its other processor resizes
tensors, which rounds differently.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import pathlib

import numpy as np
import PIL.Image
import tokenizers

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib

IMAGE_FILE, TEXT_FILE = "preprocessor_config.json", "tokenizer.json"

_log = logging.getLogger(__name__)

# Further keys that a file may have and that change no pixel here. Others, unless null, are refused.
_WITHOUT_EFFECT = {
  "image_processor_type", "feature_extractor_type", "processor_class", "return_tensors",
  "data_format", "input_data_format", "device", "disable_grouping", "use_square_size",
  "default_to_square", "do_pad", "pad_size",
}
_MUST = {
  name: True
  for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
}
_THREE = config_lib.Kind(
  lambda value: isinstance(value, list) and len(value) == 3
  and all(type(number) in (int, float) for number in value), "three numbers", tuple,
)


@dataclasses.dataclass(frozen=True)
class Pixels:
  """How a picture becomes the network's input.

  Attributes:
    size: length to which the shortest edge is resized, in pixels.
    crop: side of the square that is then cut out of the middle, in pixels.
    resample: the filter, a value of `PIL.Image.Resampling`.
    scale: factor for the channels' values 0 to 255.
    mean, std: by which the scaled channels are normalised.
  """

  size: int = 224
  crop: int = 224
  resample: int = PIL.Image.Resampling.BICUBIC
  scale: float = 1 / 255
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

  def __call__(self, image: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] uint8 of any size -> [crop, crop, 3] float32."""
    height, width = image.shape[:2]
    long = int(self.size * max(height, width) / min(height, width))
    size = (long, self.size) if width > height else (self.size, long)  # width first, as of PIL
    picture = PIL.Image.fromarray(image).convert("RGB").resize(size, self.resample)
    left, top = ((side - self.crop) // 2 for side in size)
    pixels = np.asarray(picture.crop((left, top, left + self.crop, top + self.crop)), np.float64)
    pixels = (pixels * self.scale).astype(np.float32)
    return (pixels - np.float32(self.mean)) / np.float32(self.std)


def read_pixels(folder: pathlib.Path, image_size: int) -> Pixels:
  """Reads the preprocessing of a folder whose network takes images of `image_size` pixels a side.

  Raises:
    InputError: the file is missing or damaged, or asks for something that is not supported.
  """
  path = folder / IMAGE_FILE
  values = {key: v for key, v in config_lib.read_json(path).items() if v is not None}
  section = config_lib.Section(path, values)
  for key, wanted in _MUST.items():
    section.require(values.get(key, wanted) is wanted, key, values.get(key), "true, as CLIP has it")
  default = Pixels()
  known = {"size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"}
  for key in values.keys() - known - _MUST.keys() - _WITHOUT_EFFECT:
    section.require(False, key, values[key], "left out: it is not one of CLIP's")
  pixels = Pixels(
    size=_side(section, values, "size", ("shortest_edge",), default.size),
    crop=_side(section, values, "crop_size", ("height", "width"), default.crop),
    resample=section.get("resample", config_lib.one_of(*map(int, PIL.Image.Resampling)),
                         int(default.resample)),
    scale=section.get("rescale_factor", config_lib.POSITIVE, default.scale),
    mean=section.get("image_mean", _THREE, list(default.mean)),
    std=section.get("image_std", _THREE, list(default.std)),
  )
  section.require(
    pixels.crop == image_size <= pixels.size, "crop_size", values.get("crop_size", default.crop),
    f"the network's {image_size} pixels, and at most its size={pixels.size}",
  )
  section.require(min(pixels.std) > 0, "image_std", list(pixels.std), "positive numbers")
  return pixels


def _side(section, values, key: str, names: tuple[str, ...], default: int) -> int:
  """A length in pixels: a number, as in old files, or an object in which all `names` are equal."""
  given = values.get(key, default)
  if isinstance(given, dict) and sorted(given) == sorted(names) and len({*given.values()}) == 1:
    given = given[names[0]]
  accepts = type(given) is int and config_lib.SIDE.accepts(given)
  section.require(accepts, key, values.get(key), f"one number of pixels, of {' and '.join(names)}")
  return given


class Words:
  """Converts prompts to ids, with start and end tokens; cuts or pads them to a fixed length."""

  def __init__(self, folder: pathlib.Path, length: int, vocabulary: int):
    """Reads a folder's tokenizer.

    Args:
      folder: of the CLIP.
      length: number of ids that a text becomes, by cutting it or by repeating its end token.
      vocabulary: of the network; the tokenizer must not have more tokens.

    Raises:
      InputError: the file is missing, damaged, or of another network.
    """
    path = folder / TEXT_FILE
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing more precise.
      raise errors.InputError(f"{path}: cannot be read as a tokenizer ({error})") from None
    if (size := self._tokenizer.get_vocab_size()) > vocabulary:
      raise errors.InputError(
        f"{path}: {size} tokens are more than the network's {vocabulary}; take both from one folder"
      )
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    ends = self._tokenizer.encode("").ids
    if len(ends) != 2:
      raise errors.InputError(
        f"{path}: puts {len(ends)} tokens around a text, where CLIP has one before and one after it"
      )
    self._tokenizer.enable_truncation(length)
    self._tokenizer.enable_padding(pad_id=ends[1], length=length)
    self._warned = False

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """N texts -> [N, length] int32. A warning is logged the first time that a text is cut.

    Raises:
      InputError: a text is not a string, or no valid Unicode.
    """
    try:
      found = self._tokenizer.encode_batch(list(texts))
    except (TypeError, UnicodeError):
      raise errors.InputError(f"a prompt is no Unicode text: {errors.shown(list(texts))}") from None
    cut = next((text for text, one in zip(texts, found) if one.overflowing), None)
    if cut is not None and not self._warned:
      self._warned = True
      _log.warning(
        "CLIP reads the first %d tokens of a prompt, of which %s has more; said once",
        len(found[0].ids), errors.shown(cut),
      )
    return np.array([one.ids for one in found], np.int32)
