"""What a reward is, how one is found by its name, and two of pixels alone.

Letters: N samples, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import json
import logging
import math
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.rewards import threads

_log = logging.getLogger(__name__)

MAX_DETAIL = 65_536  # Bytes of a sample's details, as JSON.


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """What a trajectory made: the input of every reward."""

  prompt: str  # what the user wrote
  image: np.ndarray  # [H, W, 3] uint8
  text: str | None = None  # the sampled reasoning; None where there was none
  # The prompt set's, in GenEval's format (tag, include, exclude); {} where it has none.
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """Scores of one call, and why some are missing."""

  values: np.ndarray  # [N], any real numbers, larger is better; NaN where there is no score
  reason: str | None = None  # one line about the NaN
  temporary: bool = False  # whether the NaN may be scored later: a server that did not answer
  # [N], what else is to be known of each sample, as JSON: its reason, boxes, answers; None for
  # nothing. Training ignores it, an evaluation keeps it.
  details: Sequence[Mapping[str, Any] | None] | None = None

  def detail(self, i: int) -> dict[str, Any]:
    """Details of sample `i` as JSON has them, with the "reason" where it has no score; {} for none.

    Numpy's numbers and arrays become numbers and lists, and NaN null. What is no JSON, or longer
    than `MAX_DETAIL`, is left out, and "left_out" says so.
    """
    given = {} if self.details is None else dict(self.details[i] or {})
    if self.reason is not None and np.isnan(self.values[i]):
      given.setdefault("reason", self.reason)
    try:
      text = json.dumps(given, default=lambda item: item.tolist())
      if len(text) <= MAX_DETAIL:
        return json.loads(text, parse_constant=lambda _: None)
      left_out = f"{len(text)} bytes are more than {MAX_DETAIL}"
    except Exception as error:  # Whatever an object of another library raises.
      left_out = f"no JSON: {errors.describe(error)}"
    return {"left_out": left_out[:300]} | ({"reason": self.reason} if "reason" in given else {})


# N samples -> [N] numbers as in `Scores.values`, or `Scores` to give a reason for NaN as well.
# Optional attributes: `concurrent`, true if several threads may call the reward at once; `close()`,
# called from another thread, makes calls return soon; `fingerprint`, text that other scores would
# change: a run that continues with another is refused; `settings`, {name: JSON}, what changes a
# score; `joint`, what rewards have in common of which `score_together(rewards, samples)` of any
# gives the `Scores` of all.
Reward = Callable[[Sequence[Sample]], np.ndarray | Scores]

_registered: dict[str, Callable[..., Any]] = {}
# Names of rewards that need jax, and so are imported only when they are asked for.
_LAZY = {
  "reward_model": "unigrpo_jax.reward_models.host:LearnedReward",
  "pickscore": "unigrpo_jax.reward_models.clip.host:PickScore",
  "clip": "unigrpo_jax.reward_models.clip.host:ClipScore",
  "aesthetic": "unigrpo_jax.reward_models.clip.host:Aesthetic",
}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorator that gives a reward a name for `make`; refuses one that is taken or has a colon.

  It goes on a function `(samples, *, options...) -> [N]`, or on a class that is made with the
  options and whose instances are called with the samples.
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


def make(name: str, /, *, time_limit: float | None = None, **options: Any) -> Reward:
  """A reward by its registered name, or by "module:function" or "module:Class", with its options.

  `time_limit`, which any reward may have: seconds of a call; see `TimeLimited`.

  Raises:
    InputError: no such reward or option, an option that the reward refuses, a module that cannot
      be imported, or whatever making it raises; says what is wrong, where, and what to do.
      `Unavailable` where a server or a disk failed.
  """
  reward = _make(name, options)
  if time_limit is None:
    return reward
  with errors.at(f"reward={name!r}"):
    return TimeLimited(reward, time_limit)


def make_part(
  what: str, name: str, named: Mapping[str, str], options: Mapping[str, Any]
) -> Callable[..., Any]:
  """A part of a reward, such as its detector: by a name in `named`, {name: "module:Class"}, or as
  "module:Class", with its options. `what` it is stands in messages.

  Raises:
    InputError: as `make`.
  """
  if ":" not in name:
    errors.choose(what, name, [*named, "module:Class"])
  with errors.at(f"{what}={name!r}"):
    return _make(named.get(name, name), options)


def _make(name: str, options: Mapping[str, Any]) -> Reward:
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
  """Refuses what is no number for an option whose default is one."""
  for key, value in options.items():
    parameter = signature.parameters.get(key)
    if parameter is not None and type(parameter.default) in (int, float) and value is not None:
      errors.require(f"reward={name!r}: {key}", value)


def _imported(name: str) -> Callable[..., Any]:
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
  """What to do where a module, or one that it imports, is not there."""
  missing = error.name or ""
  if module != missing and not module.startswith(f"{missing}."):
    return f"it imports {missing}, which is not installed; install it"
  parent = sys.modules.get(missing.rpartition(".")[0])
  if parent is not None:  # Another package of the same name may hide the one that is meant.
    return f"{_place(parent)} has no {missing.rpartition('.')[2]!r}; check its name and PYTHONPATH"
  return f"there is no module {missing!r}; put its folder into PYTHONPATH"


def _place(module: Any) -> str:
  """A module and where it comes from."""
  folders = [*getattr(module, "__path__", []), "built in"]
  where = getattr(module, "__file__", None) or folders[0]
  return f"module {module.__name__!r} ({where})"


@contextlib.contextmanager
def made(failed: str, *expected: type[Exception]) -> Iterator[None]:
  """Whatever a reward's own code raises within, a SystemExit too, becomes an `InputError` that
  begins with `failed` and ends in the file and line, after the traceback; not what is `expected`,
  nor the user's Ctrl-C.
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


def is_temporary(error: BaseException) -> bool:
  """Whether a call that raised this may do better later: a server or a disk, not a path or a bug.
  """
  about_paths = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
                 PermissionError)
  return isinstance(error, OSError) and not isinstance(error, about_paths)


def reward_lock(reward: Reward) -> contextlib.AbstractContextManager:
  """What a thread holds while it calls `reward`; it locks nothing for a `concurrent` one."""
  return contextlib.nullcontext() if getattr(reward, "concurrent", False) else threading.Lock()


def evaluate(reward: Reward, samples: Sequence[Sample]) -> Scores:
  """Calls a reward, unless there are no samples, and checks its result.

  Real numbers of any dtype count: those of jax, of ml_dtypes (bfloat16, float8), of PyTorch, also
  on an accelerator or with a gradient; and Decimal, Fraction and bool.

  Returns values [N] float32, each finite or NaN, a reason where there is a NaN, and the details.

  Raises:
    ValueError: the result or its details have a wrong shape, or none of it is a real number; and
      whatever the reward raises.
  """
  count = len(samples)
  if not count:
    return Scores(np.zeros(0, np.float32))
  result = reward(samples)
  if not isinstance(result, Scores):
    result = Scores(result)
  given, unreal = _real(_array(result.values), count)
  with np.errstate(over="ignore"):
    values = given.astype(np.float32)
  infinite, missing = np.isinf(values), np.isnan(values)
  values[infinite] = np.nan
  reason = None
  if infinite.any():
    first = int(infinite.argmax())
    reason = f"{given[first]} is not finite in float32, for {samples[first].prompt[:60]!r}"
  elif missing.any():
    prompt = samples[int(missing.argmax())].prompt[:60]
    reason = result.reason or f"no score for {missing.sum()} of {count} samples, as {prompt!r}"
    reason += f": {unreal}" if unreal else ""
  details = result.details
  if details is not None:
    if len(details) != count:
      raise ValueError(f"a reward's details must be [{count}], one a sample; got [{len(details)}]")
    details = details if any(details) else None
  return Scores(values, reason, result.temporary, details)


def evaluate_together(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[Scores]:
  """`evaluate` of a reward, or of several with one `joint`, which are asked together."""
  if len(rewards) == 1 or not samples:
    return [evaluate(reward, samples) for reward in rewards]
  given = rewards[0].score_together(rewards, samples)
  return [evaluate(lambda _, part=part: part, samples) for part in given]


def _array(values) -> np.ndarray:
  """Values as numpy takes them, or as objects where it cannot."""
  try:
    return np.asarray(values)
  except Exception:
    # A PyTorch tensor with a gradient, in bfloat16 or on an accelerator; or a list of such, or of
    # lists of several lengths.
    if not hasattr(values, "__len__"):
      raise
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    return np.fromiter(items, object, len(items))


def _real(given: np.ndarray, count: int) -> tuple[np.ndarray, str | None]:
  """[count] real numbers, NaN for what is none, and the first thing that is none."""
  unreal: list[str] = []
  if given.shape == (count,):
    # numpy itself does not know that bfloat16 is real, but that it may become float64.
    if given.dtype.kind in "biuf" or np.can_cast(given.dtype, np.float64):
      return given, None
    numbers = np.array([_number(item, unreal) for item in given.astype(object)])
    if len(unreal) < count:
      return numbers, unreal[0] if unreal else None
  raise ValueError(
    f"a reward must return [{count}] numbers, one a sample; got {list(given.shape)} {given.dtype}"
    + (f" ({unreal[0]})" if unreal else "")
  )


def _number(item, unreal: list[str]) -> float:
  """A Decimal, a Fraction, a tensor without axes ... as float; NaN, and a line, for what is none.
  """
  try:
    # float() would read text, and drop an imaginary part with a warning.
    if not isinstance(item, str | bytes | complex | np.complexfloating) and not np.shape(item):
      return float(item)
  except OverflowError:
    return math.inf
  except Exception:  # Whatever an object of another library raises.
    pass
  unreal.append(f"{item!r:.60} is no real number")
  return math.nan


class TimeLimited:
  """A reward whose calls raise `TimeoutError` after `seconds`.

  Nothing can end what was called: it goes on in its thread. Unless the reward is `concurrent`, the
  next call waits for that, within its own limit.
  """

  def __init__(self, reward: Reward, seconds: float):
    """Raises InputError unless `seconds` > 0."""
    errors.require("time_limit", seconds, above=0)
    self._reward, self._seconds = reward, seconds
    self.concurrent = getattr(reward, "concurrent", False)
    self.fingerprint = getattr(reward, "fingerprint", None)
    self._overdue: futures.Future | None = None

  @property
  def settings(self) -> Mapping[str, Any] | None:
    """Of the reward, which may ask a server for them."""
    return getattr(self._reward, "settings", None)

  def __call__(self, samples: Sequence[Sample]) -> Scores:
    end = time.monotonic() + self._seconds
    if self._overdue is not None:
      if futures.wait([self._overdue], self._seconds).not_done:
        raise TimeoutError(
          f"an earlier call that took longer than time_limit={self._seconds:g} s still runs"
        )
      self._overdue = None
    # Evaluated there: what a reward returns may be computed only when it is read.
    call = threads.start(evaluate, self._reward, samples, name="reward-limited")
    if futures.wait([call], end - time.monotonic()).done:
      return call.result()
    if not self.concurrent:
      self._overdue = call
    raise TimeoutError(f"it took longer than time_limit={self._seconds:g} s")

  def close(self) -> None:
    """Closes the reward, where it can be closed."""
    if hasattr(self._reward, "close"):
      self._reward.close()


@register("brightness")
def brightness(samples: Sequence[Sample]) -> np.ndarray:
  """Mean of all pixels and channels over 255: [N] float32, 0 is black and 1 is white."""
  return np.array([sample.image.mean() / 255 for sample in samples], np.float32)


@register("jpeg_size")
def jpeg_size(samples: Sequence[Sample], *, quality: int = 95) -> np.ndarray:
  """Kilobytes (1000 bytes) of the picture as JPEG of `quality` 1 to 95: [N] float32.

  A positive weight rewards detail, a negative one compressibility. Source: the
  (in)compressibility tasks of DDPO, Black et al. (arXiv 2305.13301), section 5.1.
  """
  sizes = []
  for sample in samples:
    file = io.BytesIO()
    PIL.Image.fromarray(sample.image).save(file, "JPEG", quality=quality)
    sizes.append(file.tell() / 1000)
  return np.array(sizes, np.float32)
