"""Network sizes, read from the JSON files of an official BAGEL folder.

`llm_config.json` and `vit_config.json` hold what the released files hold. What the official loader
passes by hand (VAE shape, latent patch, table sides) comes from an optional `bagel_config.json`;
without that file it is the release's own values, which are the dataclass defaults below.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from unigrpo_jax import errors


@dataclasses.dataclass(frozen=True)
class LLMConfig:
  """Qwen2 decoder with two experts. Sizes in elements."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  vocab_size: int
  rope_theta: float
  rms_norm_eps: float
  max_positions: int

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """SigLIP tower. `num_layers` counts the layers that are built: one less than the file says."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  patch_size: int
  image_size: int
  num_channels: int = 3
  layer_norm_eps: float = 1e-6

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

  in_channels: int = 3
  out_channels: int = 3
  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  z_channels: int = 16
  scale_factor: float = 0.3611
  shift_factor: float = 0.1159

  @property
  def downsample(self) -> int:
    """Pixels per latent side."""
    return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class ImageSizeRule:
  """Bounds in pixels of a resized image, and the multiple its sides are rounded to."""

  max_size: int
  min_size: int
  stride: int
  max_pixels: int = 1_806_336


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
  """How a checkpoint is meant to be sampled; defaults are the release's for drawing.

  Attributes:
    num_timesteps: points of the time grid.
    timestep_shift: of the grid.
    cfg_text_scale, cfg_interval, cfg_renorm_type: of guidance.
    temperature: of sampled text.
    max_tokens: of reasoning or an answer.
  """

  num_timesteps: int = 50
  timestep_shift: float = 3.0
  cfg_text_scale: float = 4.0
  cfg_interval: tuple[float, float] = (0.4, 1.0)
  cfg_renorm_type: str = "global"
  temperature: float = 0.3
  max_tokens: int = 1000


@dataclasses.dataclass(frozen=True)
class BagelConfig:
  """A whole BAGEL: sizes of the three networks and what joins them."""

  llm: LLMConfig
  vit: ViTConfig
  vae: VAEConfig = VAEConfig()
  latent_patch_size: int = 2
  max_latent_size: int = 64
  vit_max_patches_per_side: int = 70
  interpolate_pos: bool = False
  timestep_shift: float = 1.0
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


LLM_FILE, VIT_FILE, BAGEL_FILE = "llm_config.json", "vit_config.json", "bagel_config.json"

# No network of this kind has more layers, nor a size beyond this; a slip of the keyboard might.
_MOST_LAYERS, _MOST = 10_000, 2**31 - 1
_REQUIRED = object()


class _Section:
  """The keys of one JSON object, read with their kind and bounds; errors name file and key."""

  def __init__(self, path: pathlib.Path, values: Any, name: str = ""):
    if not isinstance(values, dict):
      raise errors.InputError(f"{path}: {name or 'the file'}={values!r} must be a JSON object")
    self._path, self._values, self._prefix = path, values, f"{name}." if name else ""

  def _get(self, key: str, default: Any) -> Any:
    value = self._values.get(key, default)
    if value is _REQUIRED:
      raise errors.InputError(f"{self._path}: key {self._prefix}{key} is missing")
    return value

  def fail(self, key: str, value: Any, expected: str) -> errors.InputError:
    return errors.InputError(f"{self._path}: {self._prefix}{key}={value!r} must be {expected}")

  def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int = _MOST) -> int:
    value = self._get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
      raise self.fail(key, value, f"an integer from {low} to {high}")
    return value

  def number(self, key: str, default: float, *, positive: bool = True) -> float:
    value = self._get(key, default)
    usual = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usual or not abs(value) < 1e30 or (positive and not value > 1e-30):
      raise self.fail(key, value, "a positive number" if positive else "a finite number")
    return float(value)

  def boolean(self, key: str, default: bool) -> bool:
    value = self._get(key, default)
    if not isinstance(value, bool):
      raise self.fail(key, value, "true or false")
    return value

  def choice(self, key: str, default: Any, choices: tuple[Any, ...]) -> Any:
    value = self._get(key, default)
    if value not in choices:
      raise self.fail(key, value, f"{' or '.join(map(repr, choices))}: BAGEL has nothing else")
    return value

  def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = self._get(key, default)
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 8 or not all(
      isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= 64 for item in value
    ):
      raise self.fail(key, value, "a list of 1 to 8 integers from 1 to 64")
    return tuple(value)

  def interval(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
    value = self._get(key, default)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(
      isinstance(item, (int, float)) for item in value
    ) or not 0 <= value[0] < value[1] <= 1:
      raise self.fail(key, value, "two numbers, 0 <= low < high <= 1")
    return float(value[0]), float(value[1])

  def section(self, key: str) -> _Section:
    return _Section(self._path, self._values.get(key, {}), self._prefix + key)

  def divides(self, size: int, by: int, key: str, by_key: str) -> None:
    if size % by:
      raise self.fail(key, size, f"a multiple of {self._prefix}{by_key}={by}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises InputError naming the file."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.InputError(f"{path}: file not found; a BAGEL folder must contain it") from None
  except (OSError, ValueError, RecursionError) as error:
    raise errors.InputError(f"{path}: not readable as JSON ({error})") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def read_config(folder: pathlib.Path | str) -> BagelConfig:
  """Reads the sizes of the BAGEL in `folder` from its JSON files.

  Raises:
    InputError: a file or key is missing, of the wrong kind or out of bounds, or asks for something
      that BAGEL does not have.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: no such folder; expected a BAGEL checkpoint folder")
  path = folder / BAGEL_FILE
  extra = _Section(path, read_json(path) if path.exists() else {})
  llm = _read_llm(folder / LLM_FILE)
  vit = _read_vit(folder / VIT_FILE)
  vae = _read_vae(extra.section("vae"))
  joint = extra.section("bagel")
  joint.choice("connector_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
  config = BagelConfig(
    llm=llm,
    vit=vit,
    vae=vae,
    latent_patch_size=joint.integer("latent_patch_size", 2, high=64),
    max_latent_size=joint.integer("max_latent_size", 64, high=4096),
    vit_max_patches_per_side=joint.integer("vit_max_num_patch_per_side", 70, high=4096),
    interpolate_pos=joint.boolean("interpolate_pos", False),
    timestep_shift=joint.number("timestep_shift", 1.0),
    generation=_read_generation(extra.section("generation")),
  )
  rules = extra.section("image_transforms")
  return dataclasses.replace(
    config,
    vae_image=_read_size_rule(rules, "vae", config.latent_stride, config.vae_image),
    vit_image=_read_size_rule(rules, "vit", vit.patch_size, config.vit_image),
  )


def _read_size_rule(
  rules: _Section, name: str, stride: int, default: ImageSizeRule
) -> ImageSizeRule:
  given = rules.section(name)
  return ImageSizeRule(
    max_size=given.integer("max_image_size", default.max_size),
    min_size=given.integer("min_image_size", default.min_size),
    stride=given.integer("image_stride", stride),
    max_pixels=rules.integer("max_pixels", default.max_pixels),
  )


def _read_generation(given: _Section) -> GenerationDefaults:
  default = GenerationDefaults()
  renorms = ("global", "channel", "text_channel")
  return GenerationDefaults(
    num_timesteps=given.integer("num_timesteps", default.num_timesteps, low=2),
    timestep_shift=given.number("timestep_shift", default.timestep_shift),
    cfg_text_scale=given.number("cfg_text_scale", default.cfg_text_scale),
    cfg_interval=given.interval("cfg_interval", default.cfg_interval),
    cfg_renorm_type=given.choice("cfg_renorm_type", default.cfg_renorm_type, renorms),
    temperature=given.number("temperature", default.temperature, positive=False),
    max_tokens=given.integer("max_tokens", default.max_tokens),
  )


def _read_llm(path: pathlib.Path) -> LLMConfig:
  values = _Section(path, read_json(path))
  values.choice("hidden_act", "silu", ("silu",))
  values.choice("use_sliding_window", False, (False,))
  values.choice("rope_scaling", None, (None,))
  heads = values.integer("num_attention_heads")
  config = LLMConfig(
    hidden_size=values.integer("hidden_size"),
    intermediate_size=values.integer("intermediate_size"),
    num_layers=values.integer("num_hidden_layers", high=_MOST_LAYERS),
    num_heads=heads,
    num_kv_heads=values.integer("num_key_value_heads", heads),
    vocab_size=values.integer("vocab_size"),
    rope_theta=values.number("rope_theta", 10_000.0),
    rms_norm_eps=values.number("rms_norm_eps", 1e-6),
    max_positions=values.integer("max_position_embeddings", 32768),
  )
  values.divides(config.hidden_size, heads, "hidden_size", "num_attention_heads")
  values.divides(heads, config.num_kv_heads, "num_attention_heads", "num_key_value_heads")
  if config.head_dim % 2 or config.hidden_size % 4:
    raise values.fail(
      "hidden_size", config.hidden_size,
      "a multiple of 4 whose heads have an even size: positions rotate pairs and fill quarters",
    )
  return config


def _read_vit(path: pathlib.Path) -> ViTConfig:
  values = _Section(path, read_json(path))
  values.choice("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
  config = ViTConfig(
    hidden_size=values.integer("hidden_size"),
    intermediate_size=values.integer("intermediate_size"),
    # BAGEL builds all layers but the last.
    num_layers=values.integer("num_hidden_layers", low=2, high=_MOST_LAYERS) - 1,
    num_heads=values.integer("num_attention_heads"),
    patch_size=values.integer("patch_size", high=4096),
    image_size=values.integer("image_size"),
    num_channels=values.integer("num_channels", 3, low=3, high=3),
    layer_norm_eps=values.number("layer_norm_eps", 1e-6),
  )
  values.divides(config.hidden_size, config.num_heads, "hidden_size", "num_attention_heads")
  return config


def _read_vae(values: _Section) -> VAEConfig:
  default = VAEConfig()
  config = VAEConfig(
    in_channels=values.integer("in_channels", default.in_channels, low=3, high=3),
    out_channels=values.integer("out_ch", default.out_channels, low=3, high=3),
    ch=values.integer("ch", default.ch, high=65536),
    ch_mult=values.integers("ch_mult", default.ch_mult),
    num_res_blocks=values.integer("num_res_blocks", default.num_res_blocks, high=64),
    z_channels=values.integer("z_channels", default.z_channels, high=65536),
    scale_factor=values.number("scale_factor", default.scale_factor),
    shift_factor=values.number("shift_factor", default.shift_factor, positive=False),
  )
  values.divides(config.ch, GROUPS, "ch", "the number of normalised groups")
  stated = values.integer("downsample", config.downsample)
  if stated != config.downsample:
    raise values.fail(
      "downsample", stated,
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
