"""Making a reward by its name.

What a module of rewards raises, even SystemExit, is one line that says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import difflib
import functools
import importlib
import inspect
import logging
import sys
import traceback
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.rewards import base

_log = logging.getLogger(__name__)

_registered: dict[str, Callable[..., Any]] = {}
# Rewards that need jax: they are imported only when they are used.
_LAZY = {
  "reward_model": "unigrpo_jax.reward_models.host:LearnedReward",
  "pickscore": "unigrpo_jax.reward_models.clip.host:PickScore",
  "clip": "unigrpo_jax.reward_models.clip.host:ClipScore",
  "aesthetic": "unigrpo_jax.reward_models.clip.host:Aesthetic",
}

# Kinds of parameters that take no samples, which come without a name.
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorator that registers a reward under a name for `make`.

  It takes a function `(samples, *, options...) -> [N]`, or a class that is constructed with the
  options and whose instances are called with the samples.

  Raises:
    ValueError: the name is taken or contains a colon.
  """

  def add(target):
    other = _registered.get(name, target)
    if ":" in name or _path(other) != _path(target):
      raise ValueError(f"reward name {name!r} is taken by {_path(other)} or has a colon")
    _registered[name] = target
    return target

  return add


def _path(target) -> str:
  return f"{target.__module__}.{target.__qualname__}"


def names() -> list[str]:
  """The names that `make` knows, sorted."""
  return sorted(_registered | _LAZY)


def make(name: str, /, *, time_limit: float | None = None, **options: Any) -> base.Reward:
  """Makes a reward.

  Args:
    name: registered name, "module:function" or "module:Class".
    time_limit: most seconds of a call, for any reward; see `base.TimeLimited`. None: no limit.
    options: of the reward.

  Raises:
    InputError: there is no such reward or option, the reward refuses an option, its module cannot
      be imported, or making it raises anything; says what is wrong, where, and what to do.
    Unavailable: making it failed because of a server or a disk.
  """
  reward = _make(name, options)
  if time_limit is None:
    return reward
  with errors.at(f"reward={name!r}"):
    return base.TimeLimited(reward, time_limit)


def make_part(
  what: str, name: str, named: Mapping[str, str], options: Mapping[str, Any]
) -> Callable[..., Any]:
  """Makes a part of a reward, such as its detector.

  Args:
    what: the part, for error messages: "detector".
    name: a key of `named`, or "module:Class".
    named: {name: "module:Class"}.
    options: of the part.

  Raises:
    InputError: see `make`.
  """
  if ":" not in name:
    errors.choose(what, name, [*named, "module:Class"])
  with errors.at(f"{what}={name!r}"):
    return _make(named.get(name, name), options)


def _make(name: str, options: Mapping[str, Any]) -> base.Reward:
  if not isinstance(name, str):
    raise errors.InputError(f"reward={errors.shown(name)} must be text: a name or module:function")
  module, _, attribute = name.partition(":")
  if "/" in module or module.endswith(".py"):
    folder, _, file = module.rpartition("/")
    raise errors.InputError(
      f"reward={name!r} is a path; write {file.removesuffix('.py')}:{attribute or 'function'}, "
      f"with its folder in PYTHONPATH: PYTHONPATH={folder or '.'} python -m ..."
    )
  if ":" in name:
    target = _imported(name)
  else:
    if "." in name and name not in _registered:
      raise errors.InputError(
        f"reward={name!r} is not one of {', '.join(names())}; for one of your own write "
        f"{':'.join(name.rsplit('.', 1))}"
      )
    errors.choose("reward", name, [*names(), "module:function"])
    target = _imported(_LAZY[name]) if name in _LAZY else _registered[name]
  made_first = inspect.isclass(target)
  try:
    signature = inspect.signature(target)
  except ValueError:  # Some of C have none.
    signature = inspect.Signature([inspect.Parameter("samples", inspect.Parameter.POSITIONAL_ONLY)])
  if not made_first and not any(
    parameter.kind not in _BY_NAME for parameter in signature.parameters.values()
  ):
    raise errors.InputError(
      f"reward={name!r} takes no samples; give it a first parameter for them"
    )
  try:
    signature.bind(*() if made_first else ((),), **options)
  except TypeError as error:
    raise errors.InputError(f"reward={name!r}: {error} in its options {sorted(options)}") from None
  _check_numbers(name, signature, options)
  if not made_first:
    # With the function's attributes, such as `concurrent`.
    return functools.update_wrapper(functools.partial(target, **options), target)
  with made(f"reward={name!r} cannot be made"):
    reward = target(**options)
  if not callable(reward):
    raise errors.InputError(
      f"reward={name!r}: a {target.__name__} cannot be called; give it __call__(self, samples)"
    )
  return reward


def _check_numbers(name: str, signature: inspect.Signature, options: Mapping[str, Any]) -> None:
  """Raises InputError for an option whose default is a number and which is not one; or which its
  annotation says to be an int or a float, and which is of another kind or None."""
  for key, value in options.items():
    parameter = signature.parameters.get(key)
    if parameter is None or type(parameter.default) not in (int, float):
      continue
    kind = getattr(parameter.annotation, "__name__", parameter.annotation)
    if value is None and kind in ("int", "float"):
      raise errors.InputError(f"reward={name!r}: {key}=None must be a number; leave it out")
    errors.require(f"reward={name!r}: {key}", value, integer=kind == "int")


def _imported(name: str) -> Callable[..., Any]:
  """The function or class "module:attribute"; InputError where there is none."""
  module, _, attribute = name.partition(":")
  if not module or not attribute or module.startswith("."):
    raise errors.InputError(f"reward={name!r} must be module:function or module:Class")
  try:
    with made(f"reward={name!r} cannot be imported", ModuleNotFoundError):
      target = found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    what = _missing(module, error)
    raise errors.InputError(f"reward={name!r} cannot be imported: {what}") from None
  for part in attribute.split("."):
    if not hasattr(target, part):
      near = difflib.get_close_matches(part, vars(target), 1)
      hint = f"did you mean {near[0]!r}?" if near else "write module:function"
      raise errors.InputError(f"reward={name!r}: {_place(found)} has no {part!r}; {hint}")
    target = getattr(target, part)
  if not callable(target):
    kind = type(target).__name__
    raise errors.InputError(f"reward={name!r} is a {kind}; name a function or a class")
  return target


def _missing(module: str, error: ModuleNotFoundError) -> str:
  """Explains, for an error message, why importing `module` raised `error`."""
  missing = error.name or ""
  if module != missing and not module.startswith(f"{missing}."):
    return f"it imports {missing}, which is not installed; install it"
  parent = sys.modules.get(missing.rpartition(".")[0])
  if parent is not None:  # Another package of the same name may hide the one that is meant.
    return f"{_place(parent)} has no {missing.rpartition('.')[2]!r}; check its name and PYTHONPATH"
  return f"there is no module {missing!r}; put its folder into PYTHONPATH"


def _place(module: Any) -> str:
  """A module's name and file, for error messages."""
  folders = [*getattr(module, "__path__", []), "built in"]
  where = getattr(module, "__file__", None) or folders[0]
  return f"module {module.__name__!r} ({where})"


@contextlib.contextmanager
def made(failed: str, *expected: type[Exception]) -> Iterator[None]:
  """Context for code of a reward: whatever it raises, even SystemExit, becomes an `InputError`.

  Its message begins with `failed` and ends with file and line; the traceback is logged. Exceptions
  of the types `expected`, InputError and KeyboardInterrupt pass unchanged.

  Raises:
    InputError: the code raised; its subclass Unavailable where `is_temporary`.
  """
  try:
    yield
  except (errors.InputError, KeyboardInterrupt, *expected):
    raise
  except BaseException as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}"
    if isinstance(error, SyntaxError):
      where = f"{error.filename}, line {error.lineno}"
    if not isinstance(error, SyntaxError | ImportError):  # Their line says all.
      _log.warning("%s", failed, exc_info=error)
    kind = errors.Unavailable if is_temporary(error) else errors.InputError
    raise kind(f"{failed}: {errors.describe(error)} ({where})") from error
  finally:
    errors.undo_changes()


def is_temporary(error: BaseException) -> bool:
  """Whether the same call may succeed later: a server or a disk failed, not a path or the code."""
  about_paths = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
                 PermissionError)
  return isinstance(error, OSError) and not isinstance(error, about_paths)
