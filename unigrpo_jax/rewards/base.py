"""What a reward is, and how one is found by its name.

Letters: N samples, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import threading
from typing import Any

import numpy as np

from unigrpo_jax import errors


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """What a trajectory made: the input of every reward.

  Attributes:
    prompt: what the user wrote.
    image: the picture, [H, W, 3] uint8.
    text: the sampled reasoning; None where there was none.
    metadata: what the prompt set says about the prompt, in GenEval's style (tag, include,
      exclude); {} where it says nothing.
  """

  prompt: str
  image: np.ndarray
  text: str | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Samples -> [N], any real dtype, larger is better; NaN where a sample could not be scored. One
# thread at a time calls it, unless it has a true attribute `concurrent`. It may say in an attribute
# `last_error` why it gave NaN, and have a method `close()` that makes calls return soon.
Reward = Callable[[Sequence[Sample]], np.ndarray]

_registered: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorator that gives a reward a name for `make`.

  It goes on a function `(samples, *, options...) -> [N]`, or on a class that is made with the
  options and whose instances are called with the samples.

  Raises:
    ValueError: the name is another reward's, or has a colon, which marks "module:function".
  """

  def keep(target):
    other = _registered.get(name, target)
    if ":" in name or (other.__module__, other.__qualname__) != _home(target):
      raise ValueError(f"reward name {name!r} is taken by {'.'.join(_home(other))} or has a colon")
    _registered[name] = target
    return target

  return keep


def _home(target) -> tuple[str, str]:
  return target.__module__, target.__qualname__


def names() -> list[str]:
  """The registered names, in order."""
  return sorted(_registered)


def make(name: str, /, **options: Any) -> Reward:
  """A reward by its name.

  Args:
    name: a registered one, or "module:function" (or "module:Class") for one that can be imported.
    **options: the reward's own.

  Raises:
    InputError: no such reward or option, or an option that the reward refuses.
  """
  target = _imported(name) if ":" in name else _registered.get(name)
  if target is None:
    near = difflib.get_close_matches(name, names(), 1, 0.4)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise errors.InputError(
      f"reward={name!r} is none of {', '.join(names())}, nor module:function{guess}"
    )
  arguments = () if inspect.isclass(target) else ((),)
  try:
    inspect.signature(target).bind(*arguments, **options)
  except TypeError as error:
    raise errors.InputError(f"reward={name!r}: {error} in its options {sorted(options)}") from None
  if inspect.isclass(target):
    return target(**options)
  return functools.partial(target, **options) if options else target


def _imported(name: str) -> Callable[..., Any]:
  module, _, attribute = name.partition(":")
  try:
    target = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.InputError(
      f"reward={name!r} cannot be imported: {error}; write module:function and check PYTHONPATH"
    ) from None
  if not callable(target):
    kind = type(target).__name__
    raise errors.InputError(f"reward={name!r} is a {kind}; name a function or a class")
  return target


def turn(reward: Reward) -> contextlib.AbstractContextManager:
  """What whoever calls `reward` from several threads holds meanwhile."""
  return contextlib.nullcontext() if getattr(reward, "concurrent", False) else threading.Lock()


def evaluate(reward: Reward, samples: Sequence[Sample]) -> tuple[np.ndarray, str | None]:
  """Calls a reward and holds it to its word.

  Args:
    reward: what to call.
    samples: N of them; the reward is not called for none.

  Returns:
    (scores [N] float32, each finite or NaN; why some are NaN in one line, None if none is).

  Raises:
    ValueError: the result has a wrong shape or dtype.
    Exception: whatever the reward raises.
  """
  count = len(samples)
  if not count:
    return np.zeros(0, np.float32), None
  given = np.asarray(reward(samples))
  if given.shape != (count,) or given.dtype.kind not in "biuf":
    raise ValueError(
      f"a reward must return [{count}] numbers, one a sample; got {list(given.shape)} {given.dtype}"
    )
  with np.errstate(over="ignore"):
    scores = given.astype(np.float32)
  infinite, unscored = np.isinf(scores), np.isnan(scores)
  scores[infinite] = np.nan
  if infinite.any():
    first = int(infinite.argmax())
    return scores, f"{given[first]} is not finite in float32, for {samples[first].prompt[:60]!r}"
  if unscored.any():
    first = samples[int(unscored.argmax())].prompt[:60]
    reason = getattr(reward, "last_error", None)
    return scores, reason or f"no score for {unscored.sum()} of {count} samples, as {first!r}"
  return scores, None
