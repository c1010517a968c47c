"""Config files from code: loaded by path, changed by KEY=VALUE."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import importlib.util
import json
import pathlib
import types

from ml_collections import ConfigDict

from unigrpo_jax import errors

FOLDER = pathlib.Path(__file__).parents[2] / "configs"


def module(path: pathlib.Path) -> types.ModuleType:
  """The config file at `path`, which lies in no package, as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def load(
  name: str | pathlib.Path, variants: str = "", overrides: Sequence[str] = ()
) -> ConfigDict:
  """`configs/NAME.py:VARIANTS` with KEY=VALUE overrides, whose values are JSON.

  Args:
    name: of a config in `configs`, or the path of any.
    variants: joined by commas.
    overrides: KEY=VALUE; a key of a section is dotted.

  Raises:
    InputError: there is no such file, variant or key, or a value is not JSON or of another type.
  """
  path = pathlib.Path(name) if str(name).endswith(".py") else FOLDER / f"{name}.py"
  if not path.is_file():
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py")))
    raise errors.InputError(f"{path}: no such config; expected one of {known}")
  try:
    config = module(path).get_config(variants)
  except ValueError as error:
    raise errors.InputError(f"{path.name}:{variants}: {error}") from None
  for override in overrides:
    key, _, value = override.partition("=")
    *sections, last = key.split(".")
    try:
      node = functools.reduce(lambda node, section: node[section], sections, config)
      if last not in node:
        raise KeyError(f"no key {key!r} in {path.name}")
      node[last] = json.loads(value)
    except (KeyError, TypeError, ValueError) as error:
      raise errors.InputError(f"--set {override}: {error}; values are JSON") from None
  return config
