"""LoRA adapters in the folders of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

Of a linear layer M, named as in the official checkpoint, a folder holds A [r, in] as
base_model.model.M.lora_A.weight and B [out, r] as base_model.model.M.lora_B.weight. The layer's
weight is W + scale B A, where scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import layers, safetensors_files, weights

FILES = CONFIG_FILE, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The linear layers that training adapts: those of both experts, not those of the ViT.
TARGET_MODULES = (
  r"language_model\.model\.layers\.\d+\."
  r"(self_attn\.[qkvo]_proj(_moe_gen)?|mlp(_moe_gen)?\.(gate|up|down)_proj)"
)
# With a name between the letter and "weight" where the state of a PeftModel was saved as it is.
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_PATTERN = r"(.*\.)?({})"  # What a key of alpha_pattern matches.
# What changes the network beyond W + scale B A, with the value that does not.
_UNSUPPORTED = {
  "use_dora": False, "modules_to_save": None, "bias": "none", "lora_bias": False,
  "fan_in_fan_out": False, "trainable_token_indices": None, "target_parameters": None,
  "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False,
  "use_bdlora": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
  "velora_config": None,
}

# Starts (init_lora_weights) that take scale B A, or what quantising loses, off the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_folder(path: pathlib.Path) -> bool:
  """Whether `path` is a folder of adapters."""
  return (path / CONFIG_FILE).is_file()


def read_config(path: pathlib.Path) -> tuple[dict[str, Any], layers.Lora]:
  """The config of a folder, and the `Lora` that its adapters fit.

  Raises:
    InputError: it is no folder of LoRA adapters, or of a kind that is more than W + scale B A.
  """
  if not is_folder(path):
    state = "no such folder" if not path.exists() else f"holds no {CONFIG_FILE}"
    raise errors.InputError(f"{path}: {state}; give a folder that PEFT or export --adapter wrote")
  config, where = config_lib.read_json(path / CONFIG_FILE), path / CONFIG_FILE
  if config.get("peft_type") != "LORA":
    raise errors.InputError(f"{where}: peft_type={config.get('peft_type')!r}; only LORA is read")
  for key, value in _UNSUPPORTED.items():
    if config.get(key, value) not in (value, None, False, [], {}):
      raise errors.InputError(
        f"{where}: {key}={config[key]!r} is not supported; merge the adapters with PEFT "
        "(merge_and_unload) and give the merged checkpoint"
      )
  start = str(config.get("init_lora_weights")).lower()
  if start.startswith(_CHANGES_BASE):
    raise errors.InputError(
      f"{where}: init_lora_weights={config['init_lora_weights']!r} changed the weights beneath the "
      "adapters too; save them with path_initial_model_for_weight_conversion, or merge them with "
      "PEFT (merge_and_unload) and give the merged checkpoint"
    )
  ranks, alphas = (config.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
  for values in (ranks, alphas):
    if not isinstance(values, dict):
      raise errors.InputError(f"{where}: rank_pattern and alpha_pattern map names to numbers")
    for pattern in values:
      try:
        re.compile(_PATTERN.format(pattern))
      except re.error as error:
        raise errors.InputError(f"{where}: {pattern!r} is no pattern of names: {error}") from None
  for name, value in (("r", config.get("r")), *ranks.items()):
    if type(value) is not int or not 1 <= value < 2**31:
      raise errors.InputError(
        f"{where}: rank {name}={errors.shown(value)} must be a whole number from 1"
      )
  for name, value in (("lora_alpha", config.get("lora_alpha")), *alphas.items()):
    if type(value) not in (int, float) or not -1e30 < value < 1e30:
      raise errors.InputError(f"{where}: {name}={errors.shown(value)} must be a number")
  rank = max(config["r"], *ranks.values(), 1)
  root = config["r"] ** 0.5 if config.get("use_rslora") else 1.0
  return config, layers.Lora(rank, config["lora_alpha"] * rank / config["r"] * root)


class Adapter:
  """The adapters of a folder for a network.

  Attributes:
    lora: what holds all of them: the largest rank, and alpha so that the scale is the folder's.
    path: of the folder.
  """

  def __init__(self, path: pathlib.Path | str, config: config_lib.BagelConfig):
    """Opens a folder and compares its tensors with the linear layers of the network.

    Raises:
      InputError: it is no folder of LoRA adapters, is damaged, or is of another network.
    """
    self.path = pathlib.Path(path)
    self._config, self.lora = read_config(self.path)
    if not (self.path / FILE).is_file():
      other = " (adapter_model.bin is a pickle, which is not read)"
      raise errors.InputError(
        f"{self.path}: holds no {FILE}{other if (self.path / 'adapter_model.bin').exists() else ''}"
        "; save it with safe_serialization=True"
      )
    self._file = safetensors_files.SafetensorsFile(self.path / FILE)
    self._leaves = {
      name: leaf for leaf in weights.table(config, ("bagel",)) if _is_linear(leaf)
      for name in leaf.names
    }
    self._tensors: dict[str, dict[str, str]] = {}
    self._peft_names: dict[str, str] = {}
    for name in self._file.entries:
      module, letter = self._parse(name)
      pair = self._tensors.setdefault(f"{module}.weight", {})
      if letter in pair:
        raise errors.InputError(
          f"{self._file.path}: tensors {pair[letter]} and {name} adapt the same layer; save one of "
          "the adapters with save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
      pair[letter] = name
      self._peft_names[f"{module}.weight"] = _TENSOR.fullmatch(name)[1]
    for name, pair in self._tensors.items():
      self._check(name, pair)

  def _parse(self, name: str) -> tuple[str, str]:
    """The official module of a tensor, and "A" or "B"."""
    if match := _TENSOR.fullmatch(name):
      # Without the prefix where PEFT wrapped the language model alone.
      for module in (match[1], f"language_model.{match[1]}"):
        if f"{module}.weight" in self._leaves:
          return module, match[2]
    raise errors.InputError(
      f"{self._file.path}: tensor {name} belongs to no linear layer of the network; it is of "
      "another model, or of more than LoRA's two matrices"
    )

  def _check(self, name: str, pair: Mapping[str, str]) -> None:
    outputs, inputs = self._leaves[name].official_shape
    shapes = {letter: self._file.entries[tensor].shape for letter, tensor in pair.items()}
    rank = shapes.get("A", (0,))[0]
    if not rank or shapes != {"A": (rank, inputs), "B": (outputs, rank)}:
      raise errors.InputError(
        f"{self._file.path}: the adapter of {name} has {shapes}, not A [r, {inputs}] and "
        f"B [{outputs}, r]; it is damaged or of another network"
      )
    if rank > self.lora.rank:
      raise errors.InputError(
        f"{self._file.path}: the adapter of {name} has rank {rank}, but {CONFIG_FILE} says "
        f"{self.lora.rank}; give the config that belongs to it"
      )

  def __contains__(self, name: str) -> bool:
    """Whether the weight of official name `name` is adapted."""
    return name in self._tensors

  def __len__(self) -> int:
    return len(self._tensors)

  def factors(
    self, name: str, outputs: slice = slice(None), inputs: slice = slice(None)
  ) -> tuple[np.ndarray, np.ndarray, float]:
    """A [r, in] and B [out, r] of a weight, some of their columns and rows, float32; and scale."""
    pair = self._tensors[name]
    a = self._file.read(pair["A"], (slice(None), inputs)).astype(np.float32)
    b = self._file.read(pair["B"], (outputs,)).astype(np.float32)
    alpha = self._config["lora_alpha"]
    for pattern, value in (self._config.get("alpha_pattern") or {}).items():
      # As PEFT named it: without the prefix where it wrapped the language model alone.
      if re.fullmatch(_PATTERN.format(pattern), self._peft_names[name]):
        alpha = value
        break
    root = 0.5 if self._config.get("use_rslora") else 1.0
    return a, b, alpha / len(a) ** root

  def params(self, lora: layers.Lora, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters as parameters of a network with `lora`, float32.

    What the folder lacks, a layer or ranks up to that of `lora`, is zero in both factors: it has no
    gradient, so it stays so.

    Args:
      lora: of the network.
      shardings: of its parameters, the tree under "bagel".

    Raises:
      InputError: the rank is not the folder's, or the folder adapts what the network does not.
    """
    if lora.rank != self.lora.rank:
      raise errors.InputError(
        f"config.lora.rank={lora.rank}, but the adapters of {self.path} have rank "
        f"{self.lora.rank}; set that, or 0 to take the folder's rank and alpha"
      )
    adapted = [leaf for leaf in dict.fromkeys(self._leaves.values()) if _is_adapted(leaf)]
    extra = self._tensors.keys() - {name for leaf in adapted for name in leaf.names}
    if extra:
      raise errors.InputError(
        f"{self.path}: adapts {min(extra)}, but training adapts the layers of the experts alone; "
        "merge it with PEFT (merge_and_unload) and give the merged checkpoint as config.init_from"
      )
    tree: dict[str, Any] = {}
    for leaf in adapted:
      *parents, _ = leaf.path[1:]
      place, where = tree, shardings
      for key in parents:
        place, where = place.setdefault(key, {}), where[key]
      values = self._stacked(leaf, lora)
      for key, value in zip((layers.LORA_DOWN, layers.LORA_UP), values):
        place[key] = jax.make_array_from_callback(value.shape, where[key], value.__getitem__)
    return tree

  def _stacked(self, leaf: weights.Leaf, lora: layers.Lora) -> tuple[np.ndarray, np.ndarray]:
    """down [L, *in, r] and up [L, r, *out] of a kernel's layers."""
    inputs, outputs = leaf.axes
    down = np.zeros((len(leaf.names), math.prod(inputs), lora.rank), np.float32)
    up = np.zeros((len(leaf.names), lora.rank, math.prod(outputs)), np.float32)
    for layer, name in enumerate(leaf.names):
      if name in self:
        a, b, scale = self.factors(name)
        down[layer, :, : len(a)] = a.T
        up[layer, : len(a)] = b.T * np.float32(scale / (lora.alpha / lora.rank))
    return down.reshape(-1, *inputs, lora.rank), up.reshape(-1, lora.rank, *outputs)


class MergedReader:
  """The parameters of another reader with adapters added to the kernels; see `OfficialReader`."""

  def __init__(self, reader: Any, adapter: Adapter):
    self._reader, self._adapter, self.leaves = reader, adapter, reader.leaves

  def dtype(self, leaf: weights.Leaf) -> np.dtype:
    return self._reader.dtype(leaf)

  def read(self, leaf: weights.Leaf, index: weights.Index = (), dtype: Any = None) -> np.ndarray:
    """`parameter[index]`: added in float32, then cast to `dtype`, or to the stored one."""
    dtype = self.dtype(leaf) if dtype is None else dtype
    index = (*index, *(slice(None),) * (len(leaf.shape) - len(index)))
    first = index[0] if leaf.stacked else slice(None)
    if not any(name in self._adapter for name in leaf.names[first]):
      return self._reader.read(leaf, index, dtype)
    out = self._reader.read(leaf, index, np.float32)
    blocks = out if leaf.stacked else out[None]
    inner = index[1:] if leaf.stacked else index
    for name, block in zip(leaf.names[first], blocks):
      if name in self._adapter:
        block += leaf.read_layer(lambda rows, name=name: self._change(name, *rows), inner)
    return out.astype(dtype)

  def _change(self, name: str, outputs: slice, inputs: slice) -> np.ndarray:
    a, b, scale = self._adapter.factors(name, outputs, inputs)
    return (b @ a) * np.float32(scale)

  def __enter__(self) -> MergedReader:
    self._reader.__enter__()
    return self

  def __exit__(self, *error: object) -> None:
    self._reader.__exit__(*error)


def config_of(lora: layers.Lora, base: str) -> dict[str, Any]:
  """The adapter_config.json of a trained network; `base` says what it adapts."""
  alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
  return {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base,
    "inference_mode": True, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
    "target_modules": TARGET_MODULES, "bias": "none", "fan_in_fan_out": False,
    "modules_to_save": None, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    "rank_pattern": {}, "alpha_pattern": {},
  }


def contents(
  params: Mapping[str, Any], config: config_lib.BagelConfig, rank: int, dtype: Any
) -> safetensors_files.Contents:
  """The adapter_model.safetensors of parameters, the tree under "bagel"."""
  adapted = [leaf for leaf in weights.table(config, ("bagel",)) if _is_adapted(leaf)]
  tensors = {}
  for leaf in adapted:
    outputs, inputs = leaf.official_shape
    for name in leaf.names:
      tensors[_tensor(name, "A")] = (np.dtype(dtype), (rank, inputs))
      tensors[_tensor(name, "B")] = (np.dtype(dtype), (outputs, rank))

  def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
    for leaf in adapted:
      module = weights.lookup(params, leaf.path[1:-1])
      down, up = (np.asarray(module[key]) for key in (layers.LORA_DOWN, layers.LORA_UP))
      for layer, name in enumerate(leaf.names):
        yield _tensor(name, "A"), 0, down[layer].reshape(-1, rank).T
        yield _tensor(name, "B"), 0, up[layer].reshape(rank, -1).T

  return safetensors_files.Contents(tensors, pieces(), {"format": "pt"})


def _tensor(name: str, letter: str) -> str:
  return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight"


def _is_linear(leaf: weights.Leaf) -> bool:
  return leaf.path[-1] == "kernel" and len(leaf.axes) == 2


def _is_adapted(leaf: weights.Leaf) -> bool:
  return _is_linear(leaf) and leaf.path[:2] == ("bagel", "layers")
