"""Sizes of a CLIP, read from the `config.json` of a folder that transformers wrote.

A missing key has the default of transformers' CLIPConfig, which is that of ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from unigrpo_jax.models import config as config_lib

FILE = "config.json"

_SIZE, _LAYERS = config_lib.SIZE, config_lib.integer(high=10_000)
_ACT = config_lib.one_of("quick_gelu", "gelu")
_key = config_lib.key


@dataclasses.dataclass(frozen=True)
class Tower:
  """One of CLIP's two transformers; the defaults are those of the image tower."""

  hidden_size: int = _key(_SIZE, 768)
  intermediate_size: int = _key(_SIZE, 3072)
  num_layers: int = _key(_LAYERS, 12, name="num_hidden_layers")
  num_heads: int = _key(_SIZE, 12, name="num_attention_heads")
  act: str = _key(_ACT, "quick_gelu", name="hidden_act")
  layer_norm_eps: float = _key(config_lib.POSITIVE, 1e-5)


@dataclasses.dataclass(frozen=True)
class Vision(Tower):
  """The image tower: a transformer of a class token and patches."""

  image_size: int = _key(config_lib.SIDE, 224)
  patch_size: int = _key(config_lib.SIDE, 32)
  num_channels: int = _key(config_lib.integer(low=3, high=3), 3)

  @property
  def num_positions(self) -> int:
    return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class Text(Tower):
  """The text tower: a causal transformer of tokens."""

  hidden_size: int = _key(_SIZE, 512)
  intermediate_size: int = _key(_SIZE, 2048)
  num_heads: int = _key(_SIZE, 8, name="num_attention_heads")
  vocab_size: int = _key(_SIZE, 49408)
  max_positions: int = _key(_SIZE, 77, name="max_position_embeddings")
  # Old configs have 2; then the largest id of a text is its end token.
  eos_token_id: int = _key(config_lib.integer(low=0), 49407)


@dataclasses.dataclass(frozen=True)
class Config:
  """A CLIP; `projection_size` is the number of features of both towers."""

  vision: Vision
  text: Text
  projection_size: int = _key(_SIZE, 512, name="projection_dim")


# The released models, as in their own files.
LARGE = Config(
  Vision(1024, 4096, 24, 16, patch_size=14), Text(768, 3072, 12, 12, eos_token_id=2), 768
)
HUGE = Config(
  Vision(1280, 5120, 32, 16, "gelu", patch_size=14),
  Text(1024, 4096, 24, 16, "gelu", eos_token_id=2), 1024,
)


def read(folder: pathlib.Path) -> Config:
  """Reads the sizes of the CLIP in `folder`.

  Raises:
    InputError: the file or a key is missing or out of bounds, or it is no CLIP.
  """
  path = folder / FILE
  values = config_lib.read_json(path)
  whole = config_lib.Section(path, values)
  whole.get("model_type", config_lib.one_of("clip"))
  return config_lib.read_fields(
    Config, whole, vision=_tower(Vision, path, values, "vision_config"),
    text=_tower(Text, path, values, "text_config"),
  )


def _tower(kind: type[Tower], path: pathlib.Path, values: Mapping[str, Any], key: str) -> Tower:
  # Where an old file has both keys, transformers uses the one with "_dict".
  key = next((name for name in (f"{key}_dict", key) if values.get(name) is not None), key)
  section = config_lib.Section(path, values).section(key)
  tower = config_lib.read_fields(kind, section)
  section.require_multiple(
    "hidden_size", tower.hidden_size, "num_attention_heads", tower.num_heads
  )
  if isinstance(tower, Vision):
    # Otherwise the convolution would drop a part of the image; no released model does.
    section.require_multiple("image_size", tower.image_size, "patch_size", tower.patch_size)
  return tower
