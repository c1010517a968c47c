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


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises InputError naming the file."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.InputError(f"{path}: file not found; a BAGEL folder must contain it") from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise errors.InputError(f"{path}: not readable as JSON ({error})") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def read_config(folder: pathlib.Path | str) -> BagelConfig:
  """Reads the sizes of the BAGEL in `folder` from its JSON files.

  Raises:
    InputError: a file or key is missing, or a value asks for something BAGEL does not have.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: no such folder; expected a BAGEL checkpoint folder")
  bagel_path = folder / BAGEL_FILE
  extra = read_json(bagel_path) if bagel_path.exists() else {}
  llm = _read_llm(folder / LLM_FILE)
  vit = _read_vit(folder / VIT_FILE)
  vae = _read_vae(bagel_path, extra.get("vae", {}))
  joint = extra.get("bagel", {})
  if joint.get("connector_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
    raise errors.InputError(
      f"{bagel_path}: connector_act={joint['connector_act']!r} is not supported; "
      "BAGEL uses 'gelu_pytorch_tanh'"
    )
  named = {
    "latent_patch_size": "latent_patch_size",
    "max_latent_size": "max_latent_size",
    "vit_max_num_patch_per_side": "vit_max_patches_per_side",
    "interpolate_pos": "interpolate_pos",
    "timestep_shift": "timestep_shift",
  }
  joint = {ours: joint[theirs] for theirs, ours in named.items() if theirs in joint}
  config = BagelConfig(llm=llm, vit=vit, vae=vae, **joint)
  rules = extra.get("image_transforms", {})
  return dataclasses.replace(
    config,
    vae_image=_read_size_rule(rules, "vae", config.latent_stride, config.vae_image),
    vit_image=_read_size_rule(rules, "vit", vit.patch_size, config.vit_image),
  )


def _read_size_rule(rules, name, stride, default: ImageSizeRule) -> ImageSizeRule:
  given = rules.get(name, {})
  return ImageSizeRule(
    max_size=given.get("max_image_size", default.max_size),
    min_size=given.get("min_image_size", default.min_size),
    stride=given.get("image_stride", stride),
    max_pixels=rules.get("max_pixels", default.max_pixels),
  )


def _integer(path: pathlib.Path, values: dict[str, Any], key: str, default: int | None = None):
  value = values.get(key, default)
  if value is None:
    raise errors.InputError(f"{path}: key {key!r} is missing")
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.InputError(f"{path}: {key}={value!r} must be a positive integer")
  return value


def _divisible(path: pathlib.Path, values: dict[str, Any], key: str, by: str) -> None:
  if values[key] % values[by]:
    raise errors.InputError(f"{path}: {key}={values[key]} is not a multiple of {by}={values[by]}")


def _only(path: pathlib.Path, values: dict[str, Any], key: str, supported: Any) -> None:
  if values.get(key, supported) != supported:
    raise errors.InputError(
      f"{path}: {key}={values[key]!r} is not supported; BAGEL uses {supported!r}"
    )


def _read_llm(path: pathlib.Path) -> LLMConfig:
  values = read_json(path)
  _only(path, values, "hidden_act", "silu")
  _only(path, values, "use_sliding_window", False)
  _only(path, values, "rope_scaling", None)
  heads = _integer(path, values, "num_attention_heads")
  config = LLMConfig(
    hidden_size=_integer(path, values, "hidden_size"),
    intermediate_size=_integer(path, values, "intermediate_size"),
    num_layers=_integer(path, values, "num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=_integer(path, values, "num_key_value_heads", heads),
    vocab_size=_integer(path, values, "vocab_size"),
    rope_theta=float(values.get("rope_theta", 10_000.0)),
    rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
    max_positions=_integer(path, values, "max_position_embeddings", 32768),
  )
  _divisible(path, values, "hidden_size", "num_attention_heads")
  _divisible(path, {"num_key_value_heads": heads} | values, "num_attention_heads",
             "num_key_value_heads")
  return config


def _read_vit(path: pathlib.Path) -> ViTConfig:
  values = read_json(path)
  _only(path, values, "hidden_act", "gelu_pytorch_tanh")
  layers = _integer(path, values, "num_hidden_layers")
  if layers < 2:
    raise errors.InputError(
      f"{path}: num_hidden_layers={layers} must be at least 2; BAGEL uses all layers but the last"
    )
  config = ViTConfig(
    hidden_size=_integer(path, values, "hidden_size"),
    intermediate_size=_integer(path, values, "intermediate_size"),
    num_layers=layers - 1,
    num_heads=_integer(path, values, "num_attention_heads"),
    patch_size=_integer(path, values, "patch_size"),
    image_size=_integer(path, values, "image_size"),
    num_channels=_integer(path, values, "num_channels", 3),
    layer_norm_eps=float(values.get("layer_norm_eps", 1e-6)),
  )
  _divisible(path, values, "hidden_size", "num_attention_heads")
  return config


def _read_vae(path: pathlib.Path, values: dict[str, Any]) -> VAEConfig:
  default = VAEConfig()
  config = VAEConfig(
    in_channels=_integer(path, values, "in_channels", default.in_channels),
    out_channels=_integer(path, values, "out_ch", default.out_channels),
    ch=_integer(path, values, "ch", default.ch),
    ch_mult=tuple(values.get("ch_mult", default.ch_mult)),
    num_res_blocks=_integer(path, values, "num_res_blocks", default.num_res_blocks),
    z_channels=_integer(path, values, "z_channels", default.z_channels),
    scale_factor=float(values.get("scale_factor", default.scale_factor)),
    shift_factor=float(values.get("shift_factor", default.shift_factor)),
  )
  stated = values.get("downsample", config.downsample)
  if stated != config.downsample:
    raise errors.InputError(
      f"{path}: vae.downsample={stated} contradicts vae.ch_mult={list(config.ch_mult)}, "
      f"whose {len(config.ch_mult)} levels downsample by {config.downsample}"
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
