"""The kind and the bounds of every key of a run's config, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import os
import re
from typing import Any, Protocol

from ml_collections import ConfigDict
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.models import layers, lowering
from unigrpo_jax.runtime import metrics, optim, state

EXPORT_DTYPES = ("bfloat16", "float16", "float32")
MOST = 2**31 - 1  # Sizes and counts are 32-bit integers on the devices.
MANY = 10**6  # More of something of which arrays are made is a mistake.
_LEAST, _LARGEST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))


class Kind(Protocol):
  """What a key may be."""

  def read(self, name: str, value: Any) -> Any:
    """The value as JSON has it, with tuples; raises InputError, which names key, value and kind."""


@dataclasses.dataclass(frozen=True)
class Number:
  """A number within bounds, see `errors.require`, that float32 can hold; its value is a float."""

  low: float | None = None
  above: float | None = None
  high: float | None = None

  def read(self, name: str, value: Any) -> float:
    errors.require(name, _given(name, value, "a number"), **dataclasses.asdict(self))
    size = abs(float(value))
    if size > _LARGEST or 0 < size < _LEAST:
      raise errors.InputError(
        f"{name}={errors.shown(value)} must be 0, or of a size from {_LEAST:.2g} to "
        f"{_LARGEST:.2g}, which float32 holds"
      )
    return float(value)


@dataclasses.dataclass(frozen=True)
class Integer:
  """An integer within bounds, the upper one included."""

  low: int | None = None
  high: int = MOST

  def read(self, name: str, value: Any) -> int:
    value = _given(name, value, "an integer")
    errors.require(name, value, integer=True, low=self.low, high=self.high)
    return int(value)


@dataclasses.dataclass(frozen=True)
class Flag:
  """True or False."""

  def read(self, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
      raise errors.InputError(f"{name}={errors.shown(value)} must be True or False")
    return bool(value)


@dataclasses.dataclass(frozen=True)
class Text:
  """A line of text, or the path of a file."""

  def read(self, name: str, value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
      raise errors.InputError(f"{name}={errors.shown(value)} must be text")
    if re.search(r"[\x00-\x1f\x7f]", value):
      raise errors.InputError(f"{name}={value!r} holds a control character; leave it out")
    return str(value)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """One of some names."""

  options: Collection[str]

  def read(self, name: str, value: Any) -> str:
    errors.choose(name, value, self.options)
    return str(value)


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of values of one kind: `count` of them, or any number."""

  kind: Kind
  count: int | None = None

  def read(self, name: str, value: Any) -> tuple:
    if not isinstance(value, tuple | list) or self.count not in (None, len(value)):
      number = "" if self.count is None else f"{self.count} "
      raise errors.InputError(
        f"{name}={errors.shown(value)} must be a tuple of {number}values, as in (a, b) or (a,)"
      )
    return tuple(self.kind.read(name, item) for item in value)


@dataclasses.dataclass(frozen=True)
class Table:
  """Values of one kind by name; `names`, where given, are those that there are."""

  kind: Kind
  names: Collection[str] | None = None

  def read(self, name: str, value: Any) -> dict[str, Any]:
    for key in (items := _items(name, value)):
      if self.names is not None:
        errors.choose(name, key, self.names)
    return {key: self.kind.read(f"{name}.{key}", item) for key, item in items.items()}


@dataclasses.dataclass(frozen=True)
class Json:
  """Whatever JSON can hold, with tuples: the options of a reward."""

  def read(self, name: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
      return tuple(self.read(name, item) for item in value)
    if isinstance(value, Mapping | ConfigDict):
      return {key: self.read(f"{name}.{key}", item) for key, item in _items(name, value).items()}
    if isinstance(value, np.generic):
      value = value.item()
    if isinstance(value, float):
      errors.require(name, value)
    if value is not None and not isinstance(value, bool | int | float | str):
      raise errors.InputError(
        f"{name}={errors.shown(value)} must be a number, text, True, False, None, or a tuple or "
        "dict of them"
      )
    return value


def _given(name: str, value: Any, wanted: str) -> Any:
  if value is None:
    raise errors.InputError(f"{name}=None must be {wanted}")
  return value


def _items(name: str, value: Any) -> dict[str, Any]:
  """The items of a mapping; refuses names that are not text."""
  if not isinstance(value, Mapping | ConfigDict):
    raise errors.InputError(
      f"{name}={errors.shown(value)} must be a dict by name, as in {{'name': value}}"
    )
  for key in value.keys():
    if not isinstance(key, str):
      raise errors.InputError(f"{name}: the name {errors.shown(key)} must be text")
  # Not by `value[key]`: a key with dots would be a path.
  return dict(value.items())


Keys = Mapping[str, Kind]
# Of all runs, dotted.
KEYS: Keys = {
  "algorithm": Text(), "seed": Integer(**errors.SEED), "steps": Integer(low=1),
  "init_from": Text(), "random_init": Flag(), "export_to": Text(),
  "export_dtype": OneOf(EXPORT_DTYPES), "microbatch": Integer(low=1),
  # "base" lies under adapters, in the network's dtype: it stays as it is.
  "learning_rate": Table(Number(low=0), tuple(name for name in optim.GROUPS if name != "base")),
  "schedule": OneOf(("constant", "cosine")), "warmup_steps": Integer(low=0),
  "b1": Number(low=0, high=1), "b2": Number(low=0, high=1), "eps": Number(low=0, above=0),
  "weight_decay": Number(low=0), "clip_norm": Number(above=0),
  "ema_decay": Number(low=0, high=1), "dtype": OneOf(state.DTYPES),
  "remat": OneOf(tuple(layers.REMAT)), "attention": OneOf(lowering.ATTENTION),
  "mesh.data": Integer(low=1), "mesh.fsdp": Integer(low=0), "mesh.tensor": Integer(low=1),
  "writers": Several(OneOf(metrics.WRITERS)), "checkpoint_every": Integer(low=1),
  "keep_checkpoints": Integer(low=1), "keep_every": Integer(low=0),
}


def read(config: ConfigDict, keys: Keys, defaults: Mapping[str, Any]) -> ConfigDict:
  """A config whose every value is of its key's kind, as plain Python has it.

  Args:
    config: of the run; it stays as it was.
    keys: of this kind of run, besides KEYS: dotted, with their kinds.
    defaults: of keys that an older config lacks.

  Raises:
    InputError: a key is missing, unknown, or of a wrong kind or out of bounds; names it, its value,
      and what it may be.
  """
  config, keys = config.copy_and_resolve_references(), KEYS | dict(keys)
  values = dict(_leaves(config, keys))
  for key in values:
    errors.choose("the config's key", key, keys)
  checked: dict[str, Any] = {}
  for key, kind in keys.items():
    if key not in values | dict(defaults):
      raise errors.InputError(f"config.{key} is missing; see configs/ for what it is")
    value = kind.read(f"config.{key}", values.get(key, defaults.get(key)))
    *sections, name = key.split(".")
    node = checked
    for section in sections:
      node = node.setdefault(section, {})
    node[name] = value
  for key in ("b1", "b2"):
    if np.float32(checked[key]) == 1:
      raise errors.InputError(f"config.{key}={checked[key]} must be less than 1 in float32")
  return ConfigDict(checked, allow_dotted_keys=True)


def _leaves(config: ConfigDict, keys: Keys, path: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted key, value) of all that is not a section."""
  for name, value in config.items():
    key = f"{path}{name}"
    if any(other.startswith(f"{key}.") for other in keys):
      _items(f"config.{key}", value)
      yield from _leaves(value, keys, f"{key}.")
    else:
      yield key, value
