"""Network sizes, read from the JSON files of an official BAGEL folder.

What the official loader passes by hand (VAE shape, latent patch, table sides) comes from an
optional `bagel_config.json`; the defaults below are the release's.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from unigrpo_jax import errors

LLM_FILE, VIT_FILE, BAGEL_FILE = "llm_config.json", "vit_config.json", "bagel_config.json"


class Kind(NamedTuple):
  """What a value of a file must be: a test, its description, and what the value becomes."""

  accepts: Callable[[Any], bool]
  description: str
  convert: Callable[[Any], Any] = lambda value: value


def integer(low: int = 1, high: int = 2**31 - 1) -> Kind:
  accepts = lambda value: type(value) is int and low <= value <= high
  return Kind(accepts, f"an integer from {low} to {high}")


def number(low: float, high: float, description: str) -> Kind:
  accepts = lambda value: type(value) in (int, float) and low < value < high
  return Kind(accepts, description, float)


def one_of(*choices: Any) -> Kind:
  listed = " or ".join(map(repr, choices))
  return Kind(lambda value: value in choices, f"{listed}: nothing else is supported")


def _is_list(value: Any, item: Kind, shortest: int, longest: int) -> bool:
  is_list = isinstance(value, (list, tuple)) and shortest <= len(value) <= longest
  return is_list and all(map(item.accepts, value))


SIZE = integer()
SIDE = integer(high=4096)
POSITIVE = number(1e-30, 1e30, "a positive number")
_FINITE = number(-1e30, 1e30, "a finite number")
_BOOLEAN = Kind(lambda value: isinstance(value, bool), "true or false")
_FACTORS = Kind(
  lambda value: _is_list(value, integer(high=64), 1, 8), "a list of 1 to 8 integers from 1 to 64",
  tuple,
)
_INTERVAL = Kind(
  lambda value: _is_list(value, _FINITE, 2, 2) and 0 <= value[0] < value[1] <= 1,
  "two numbers, 0 <= low < high <= 1",
  lambda value: (float(value[0]), float(value[1])),
)


def key(kind: Kind, default: Any = dataclasses.MISSING, *, name: str | None = None) -> Any:
  """A field that `read_fields` takes from a file, under the field's name or `name`."""
  return dataclasses.field(default=default, metadata={"kind": kind, "name": name})


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Qwen2 decoder with two experts. Sizes in elements."""

  hidden_size: int = key(SIZE)
  intermediate_size: int = key(SIZE)
  # No network of this kind has more layers; a typing error may.
  num_layers: int = key(integer(high=10_000), name="num_hidden_layers")
  num_heads: int = key(SIZE, name="num_attention_heads")
  num_kv_heads: int = key(SIZE, name="num_key_value_heads")
  vocab_size: int = key(SIZE)
  rope_theta: float = key(POSITIVE, 10_000.0)
  rms_norm_eps: float = key(POSITIVE, 1e-6)
  max_positions: int = key(SIZE, 32768, name="max_position_embeddings")

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """SigLIP tower. `num_layers` counts the layers that are built: one less than the file says."""

  hidden_size: int = key(SIZE)
  intermediate_size: int = key(SIZE)
  num_layers: int = key(integer(low=2, high=10_000), name="num_hidden_layers")
  num_heads: int = key(SIZE, name="num_attention_heads")
  patch_size: int = key(SIDE)
  image_size: int = key(SIZE)
  num_channels: int = key(integer(low=3, high=3), 3)
  layer_norm_eps: float = key(POSITIVE, 1e-6)

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_dim(self) -> int:
    return self.num_channels * self.patch_size**2

  @property
  def num_positions(self) -> int:
    return (self.image_size // self.patch_size) ** 2


# Groups of every group norm of the autoencoder.
GROUPS = 32


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """FLUX autoencoder; defaults are the release's."""

  in_channels: int = key(integer(low=3, high=3), 3)
  out_channels: int = key(integer(low=3, high=3), 3, name="out_ch")
  ch: int = key(integer(high=65536), 128)
  ch_mult: tuple[int, ...] = key(_FACTORS, (1, 2, 4, 4))
  num_res_blocks: int = key(integer(high=64), 2)
  z_channels: int = key(integer(high=65536), 16)
  scale_factor: float = key(POSITIVE, 0.3611)
  shift_factor: float = key(_FINITE, 0.1159)

  @property
  def downsample(self) -> int:
    """Pixels per latent side."""
    return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class ImageSizeRule:
  """Bounds in pixels of a resized image, and the multiple its sides are rounded to."""

  max_size: int = key(SIZE, name="max_image_size")
  min_size: int = key(SIZE, name="min_image_size")
  stride: int = key(SIZE, name="image_stride")
  max_pixels: int = 1_806_336


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
  """How a checkpoint is meant to be sampled; defaults are the release's for drawing.

  `num_timesteps` counts the points of the time grid, `max_tokens` those of reasoning or an answer.
  """

  num_timesteps: int = key(integer(low=2), 50)
  timestep_shift: float = key(POSITIVE, 3.0)
  cfg_text_scale: float = key(POSITIVE, 4.0)
  cfg_interval: tuple[float, float] = key(_INTERVAL, (0.4, 1.0))
  cfg_renorm_type: str = key(one_of("global", "channel", "text_channel"), "global")
  temperature: float = key(_FINITE, 0.3)
  max_tokens: int = key(SIZE, 1000)


@dataclasses.dataclass(frozen=True)
class BagelConfig:
  """A whole BAGEL: sizes of the three networks and what joins them."""

  llm: LLMConfig
  vit: ViTConfig
  vae: VAEConfig = VAEConfig()
  latent_patch_size: int = key(integer(high=64), 2)
  max_latent_size: int = key(SIDE, 64)
  vit_max_patches_per_side: int = key(SIDE, 70, name="vit_max_num_patch_per_side")
  interpolate_pos: bool = key(_BOOLEAN, False)
  timestep_shift: float = key(POSITIVE, 1.0)
  vae_image: ImageSizeRule = ImageSizeRule(1024, 512, 16)
  vit_image: ImageSizeRule = ImageSizeRule(980, 224, 14)
  generation: GenerationDefaults = GenerationDefaults()

  @property
  def latent_dim(self) -> int:
    """Features of one latent token."""
    return self.latent_patch_size**2 * self.vae.z_channels

  @property
  def latent_stride(self) -> int:
    """Pixels per latent token side."""
    return self.latent_patch_size * self.vae.downsample

  @property
  def max_image_side(self) -> int:
    """Largest image side in pixels that the latent position table covers."""
    return self.max_latent_size * self.latent_stride


class Section:
  """The keys of one JSON object, read with their kind; errors name file and key."""

  def __init__(self, path: pathlib.Path, values: Any, name: str = ""):
    if not isinstance(values, dict):
      raise errors.InputError(f"{path}: {name or 'the file'}={values!r} must be a JSON object")
    self._path, self._values, self._prefix = path, values, f"{name}." if name else ""

  def section(self, key: str) -> Section:
    return Section(self._path, self._values.get(key, {}), self._prefix + key)

  def get(self, key: str, kind: Kind, default: Any = dataclasses.MISSING) -> Any:
    """The converted value of a key; without `default`, the key must be there."""
    value = self._values.get(key, default)
    if value is dataclasses.MISSING:
      raise errors.InputError(f"{self._path}: key {self._prefix}{key} is missing")
    self.require(kind.accepts(value), key, value, kind.description)
    return kind.convert(value)

  def require(self, condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
      raise errors.InputError(f"{self._path}: {self._prefix}{key}={value!r} must be {expected}")

  def require_multiple(self, key: str, value: int, by_key: str, by: int) -> None:
    self.require(value % by == 0, key, value, f"a multiple of {by_key}={by}")


def read_fields(cls: type, section: Section, *, defaults: Any = None, **others: Any) -> Any:
  """A dataclass: its `key` fields from a section, whose defaults may be an object's, and others.
  """
  values = {
    field.name: section.get(
      field.metadata["name"] or field.name, field.metadata["kind"],
      getattr(defaults, field.name, field.default),
    )
    for field in dataclasses.fields(cls) if field.metadata
  }
  return cls(**values, **others)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises InputError naming the file."""
  try:
    text = path.read_text(encoding="utf-8")
    if text.startswith(errors.LFS.decode()):
      raise errors.InputError(f"{path}: {errors.POINTER}")
    value = json.loads(text)
  except FileNotFoundError:
    raise errors.InputError(f"{path}: file not found; a BAGEL folder must contain it") from None
  except (OSError, ValueError, RecursionError) as error:
    raise errors.unreadable(error, path, f"{path}: not readable as JSON ({error})") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
  return value


def read_config(folder: pathlib.Path | str) -> BagelConfig:
  """Reads the sizes of the BAGEL in `folder` from its JSON files.

  Raises:
    InputError: a file or key is missing, out of bounds, or asks for what BAGEL does not have.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: no such folder; expected a BAGEL checkpoint folder")
  path = folder / BAGEL_FILE
  extra = Section(path, read_json(path) if path.exists() else {})
  joint, images = extra.section("bagel"), extra.section("image_transforms")
  joint.get("connector_act", one_of("gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  config = read_fields(
    BagelConfig, joint,
    llm=_read_llm(folder / LLM_FILE), vit=_read_vit(folder / VIT_FILE),
    vae=_read_vae(extra.section("vae")),
    generation=read_fields(GenerationDefaults, extra.section("generation")),
  )

  def size_rule(name: str, default: ImageSizeRule, stride: int) -> ImageSizeRule:
    default = dataclasses.replace(default, stride=stride)
    max_pixels = images.get("max_pixels", SIZE, default.max_pixels)
    return read_fields(ImageSizeRule, images.section(name), defaults=default, max_pixels=max_pixels)

  return dataclasses.replace(
    config,
    vae_image=size_rule("vae", config.vae_image, config.latent_stride),
    vit_image=size_rule("vit", config.vit_image, config.vit.patch_size),
  )


def _read_llm(path: pathlib.Path) -> LLMConfig:
  values = read_json(path)
  values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
  section = Section(path, values)
  if values.get("rope_parameters") is not None:  # where transformers keeps both since version 5
    rope = section.section("rope_parameters")
    rope.get("rope_type", one_of("default"), "default")
    if "rope_theta" not in values:
      values["rope_theta"] = rope.get("rope_theta", POSITIVE, 10_000.0)
  section.get("hidden_act", one_of("silu"), "silu")
  section.get("use_sliding_window", one_of(False), False)
  section.get("rope_scaling", one_of(None), None)
  config = read_fields(LLMConfig, section)
  heads, size = config.num_heads, config.hidden_size
  section.require_multiple("hidden_size", size, "num_attention_heads", heads)
  section.require_multiple("num_attention_heads", heads, "num_key_value_heads", config.num_kv_heads)
  section.require(
    config.head_dim % 2 == 0 and size % 4 == 0, "hidden_size", size,
    "a multiple of 4 whose heads have an even size: positions rotate pairs and fill quarters",
  )
  return config


def _read_vit(path: pathlib.Path) -> ViTConfig:
  section = Section(path, read_json(path))
  section.get("hidden_act", one_of("gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  config = read_fields(ViTConfig, section)
  size, heads = config.hidden_size, config.num_heads
  section.require_multiple("hidden_size", size, "num_attention_heads", heads)
  # BAGEL builds all layers but the last.
  return dataclasses.replace(config, num_layers=config.num_layers - 1)


def _read_vae(section: Section) -> VAEConfig:
  config = read_fields(VAEConfig, section)
  groups = f"a multiple of {GROUPS}, the number of normalised groups"
  section.require(config.ch % GROUPS == 0, "ch", config.ch, groups)
  downsample = section.get("downsample", SIZE, config.downsample)
  section.require(
    downsample == config.downsample, "downsample", downsample,
    f"{config.downsample}, as the {len(config.ch_mult)} levels of ch_mult make it",
  )
  return config


def bagel_7b() -> BagelConfig:
  """Sizes of the released ByteDance-Seed/BAGEL-7B-MoT, as its own JSON files give them."""
  return BagelConfig(
    llm=LLMConfig(
      hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
      vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6, max_positions=32768,
    ),
    vit=ViTConfig(
      hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16, patch_size=14,
      image_size=980,
    ),
  )
