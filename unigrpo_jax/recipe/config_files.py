"""Config files: loaded by path and variant, changed by `--config.KEY=VALUE`, for every command."""

from __future__ import annotations

import ast
from collections.abc import Sequence
import pathlib
import runpy
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags

from unigrpo_jax import errors

_PACKAGE = pathlib.Path(__file__).parents[1]
FOLDER = _PACKAGE / "configs"  # of an installation
if not FOLDER.is_dir():
  FOLDER = _PACKAGE.parent / "configs"  # of a clone


def find(path: pathlib.Path) -> pathlib.Path:
  """The config file at `path`; where there is none at `configs/NAME.py`, that of the package."""
  packaged = FOLDER / path.name
  if path.parent == pathlib.Path("configs") and packaged.is_file() and not path.exists():
    return packaged
  return path


def load(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The config that `--config=NAME --config.KEY=VALUE ...` describes.

  Args:
    name: `FILE.py:VARIANTS`, e.g. "configs/unigrpo.py:tiny,lora"; see `find`.
    overrides: command line arguments, e.g. ["--config.seed=1", "--config.rollout.sde", "cps"].

  Raises:
    InputError: the file cannot be read or fails, or a variant, key or value does not fit.
  """
  for argument in overrides:
    if argument.partition("=")[0] in ("-config", "--config"):
      raise errors.InputError(f"{argument}: the config is {name}; give --config.KEY=VALUE")
  path, colon, variants = name.partition(":")
  path = find(pathlib.Path(path))
  _run(path, variants)  # so that its own faults are not taken for those of a flag
  values = flags.FlagValues()
  arguments = [f"--config={path}{colon}{variants}", *overrides]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
  try:
    rest = values(["", *arguments])
    config = values["config"].value
  except flags.UnrecognizedFlagError as error:
    raise errors.InputError(f"{error}; keys of the config are --config.KEY=VALUE") from None
  except flags.Error as error:
    raise errors.InputError(str(error).strip().splitlines()[-1].strip()) from None
  except (AttributeError, KeyError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    words = f"--config has no key {'. '.join(str(error.args[0]).splitlines())}"
    if any(argument.lstrip("-").startswith("config.reward_options.") for argument in overrides):
      words += "; new options come as a whole, --config.reward_options=\"{'NAME': {'KEY': 1}}\""
    if any(argument.lstrip("-").startswith("config.rewards.") for argument in overrides):
      words += "; rewards come as a whole, --config.rewards=\"{'NAME': 1.0}\""
    raise errors.InputError(words) from None
  except (TypeError, ValueError) as error:
    raise errors.InputError(f"--config: {' '.join(str(error).split())}") from None
  if not isinstance(config, ConfigDict):
    raise errors.InputError(f"--config={path}: get_config must return a ConfigDict")
  if rest[1:]:
    raise errors.InputError(f"unrecognized arguments: {' '.join(rest[1:])}; --help shows them")
  return config


class _Mapping(flags.ArgumentParser):
  """Of `--config.KEY="{...}"`: its names may have dots, as those of rewards, module:function."""

  def parse(self, argument: str | ConfigDict) -> ConfigDict:
    if isinstance(argument, ConfigDict):  # the default
      return argument
    try:
      value = ast.literal_eval(argument.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      value = None
    if not isinstance(value, dict):
      raise ValueError(f"{argument} is not a dict, as in {{'name': 1.0}}")
    return ConfigDict(value, allow_dotted_keys=True)


config_flags.register_flag_parser_for_type(ConfigDict, _Mapping())


def _run(path: pathlib.Path, variants: str) -> None:
  """Runs a config file by itself.

  Raises:
    InputError: it does not exist, or raises; names the file and line.
  """
  try:
    path.open("rb").close()  # Of a folder, another file would be run.
    runpy.run_path(str(path))["get_config"](*[variants] * bool(variants))
  except OSError as error:
    names = ", ".join(f"configs/{file.name}" for file in sorted(FOLDER.glob("*.py")))
    raise errors.unreadable(
      error, path,
      f"--config={path}: cannot be read ({error.strerror}); give a file of your own or one of "
      f"{names}, with a variant as in configs/unigrpo.py:tiny",
    ) from None
  except ValueError as error:
    raise errors.InputError(f"--config={path}:{variants}: {error}") from None
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    raise errors.InputError(f"--config={path}{where}: {type(error).__name__}: {error}") from None
