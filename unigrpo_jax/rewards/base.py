"""What a reward is, and how it is called.

Letters: N samples, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import copy
import dataclasses
import json
import logging
import math
import pathlib
import threading
import time
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import threads

_log = logging.getLogger(__name__)

MAX_DETAIL = 65_536  # Most bytes of one sample's details, as JSON.
MAX_REASON = 1_000  # Most characters of a reason.


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """The result of a trajectory: the input of every reward."""

  prompt: str  # what the user wrote
  image: np.ndarray  # [H, W, 3] uint8; read-only, since all rewards share it
  text: str | None = None  # the sampled reasoning; None where there was none
  # Of the prompt, mostly in GenEval's format (tag, include, exclude); {} where it has none.
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Keeps apart from its source what a reward could change: the image and the metadata."""
    image = np.asarray(self.image).view()
    image.flags.writeable = False
    object.__setattr__(self, "image", image)
    object.__setattr__(self, "metadata", copy.deepcopy(self.metadata))


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """The scores of one call, and why some are missing."""

  values: np.ndarray  # [N], any real numbers, larger is better; NaN where there is no score
  reason: str | None = None  # one line that explains the NaN
  temporary: bool = False  # whether a later call may succeed, as after a server did not answer
  # [N] JSON objects with more about each sample: a reason, boxes, answers; None for nothing.
  # Training ignores them, an evaluation keeps them.
  details: Sequence[Mapping[str, Any] | None] | None = None

  def detail(self, i: int) -> dict[str, Any]:
    """The details of sample `i` as plain JSON values; {} where there are none.

    Where the sample has no score, "reason" is added. NumPy numbers and arrays become numbers and
    lists, NaN becomes None. Details that are not JSON, or longer than `MAX_DETAIL` bytes, are
    replaced by {"left_out": why}.
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


# N samples -> [N] numbers as in `Scores.values`, or `Scores`, which may explain a NaN. A reward may
# have these attributes:
#   concurrent      True if several threads may call the reward at the same time
#   close()         called from another thread; makes running calls return soon
#   fingerprint     text that differs wherever scores may differ; a run refuses to continue with
#                   another one
#   ready()         raises InputError, before anything is drawn, where it could score nothing
#   settings        {name: JSON value} on which scores depend, for reports
#   joint           equal for rewards that one call can score together: then any of them has
#                   score_together(rewards, samples) -> the `Scores` of each of `rewards`
Reward = Callable[[Sequence[Sample]], np.ndarray | Scores]


def settings_of(rewards: Mapping[str, Reward]) -> dict[str, dict[str, Any]]:
  """{name: its `settings`, as JSON} of the rewards that have some; a message where they fail: what
  has been scored is worth more than they are."""
  found = {}
  for name, reward in rewards.items():
    try:
      given = dict(getattr(reward, "settings", None) or {})
      text = json.dumps(given, default=lambda a: a.tolist() if hasattr(a, "tolist") else str(a))
      given = json.loads(text, parse_constant=lambda _: None)
    except Exception as error:
      _log.warning("reward %s: its settings are left out: %s", name, errors.describe(error))
      given = {"left_out": errors.describe(error)[:300]}
    if given:
      found[name] = given
  return found


def reward_lock(reward: Reward) -> contextlib.AbstractContextManager:
  """A lock to hold while calling `reward`; for a `concurrent` reward it does nothing."""
  return contextlib.nullcontext() if getattr(reward, "concurrent", False) else threading.Lock()


def evaluate(reward: Reward, samples: Sequence[Sample]) -> Scores:
  """Calls a reward (unless there are no samples) and checks its result.

  It may return real numbers of any type: of NumPy, jax, ml_dtypes (bfloat16, float8) and PyTorch,
  also on an accelerator or with a gradient; Decimal, Fraction and bool.

  Returns:
    `Scores` with values [N] float32, each finite or NaN, and a reason where one is NaN. An infinite
    value becomes NaN.

  Raises:
    ValueError: the values or details have a wrong shape, or no value is a real number.
    Exception: whatever the reward raises.
  """
  count = len(samples)
  if not count:
    return Scores(np.zeros(0, np.float32))
  try:
    result = reward(samples)
  finally:
    errors.undo_changes()
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
    # It may be an exception, or very long.
    reason = " ".join(str(result.reason or "").split())[:MAX_REASON]
    reason = reason or f"no score for {missing.sum()} of {count} samples, as {prompt!r}"
    reason += f": {unreal}" if unreal else ""
  details = result.details
  if details is not None:
    if len(details) != count:
      raise ValueError(f"a reward's details must be [{count}], one a sample; got [{len(details)}]")
    for detail in details:
      if detail is not None and not isinstance(detail, Mapping):
        raise ValueError(f"a reward's details must be mappings or None; got {detail!r:.60}")
    details = details if any(details) else None
  return Scores(values, reason, bool(result.temporary), details)


def score_encodable(
  samples: Sequence[Sample], encode: Callable[[Sample], Any],
  score: Callable[[Sequence[Sample], Sequence[Any]], np.ndarray],
) -> Scores:
  """Scores the samples whose prompts a model can read; the others score NaN.

  Args:
    samples: N samples.
    encode: sample -> what the model reads of its prompt; raises InputError where it cannot.
    score: (n samples, what `encode` returned for each) -> scores, [n]; n >= 1.
  """
  values, reasons = np.full(len(samples), np.nan, np.float32), {}
  rows, encoded = [], []
  for row, sample in enumerate(samples):
    try:
      encoded.append(encode(sample))
      rows.append(row)
    except errors.InputError as error:
      reasons[row] = str(error)
  if rows:
    values[rows] = score([samples[row] for row in rows], encoded)
  if not reasons:
    return Scores(values)
  details = [{"reason": reasons[row]} if row in reasons else None for row in range(len(samples))]
  return Scores(values, next(iter(reasons.values())), details=details)


def evaluate_together(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[Scores]:
  """`evaluate` of one reward, or of several with equal `joint`, which one call scores together."""
  if len(rewards) == 1 or not samples:
    return [evaluate(reward, samples) for reward in rewards]
  given = list(rewards[0].score_together(rewards, samples))
  if len(given) != len(rewards):
    raise ValueError(f"score_together gave {len(given)} scores for {len(rewards)} rewards")
  return [evaluate(lambda _, part=part: part, samples) for part in given]


def _array(values) -> np.ndarray:
  """Values as an array, with dtype object where NumPy cannot convert them; masked ones are NaN."""
  try:
    if isinstance(values, np.ma.MaskedArray):
      return values.astype(object).filled(np.nan)
    return np.asarray(values)
  except Exception:
    # A PyTorch tensor that has a gradient, is bfloat16 or on an accelerator; a list of such; or
    # lists of different lengths.
    if not hasattr(values, "__len__"):
      raise
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    return np.fromiter(items, object, len(items))


def _real(given: np.ndarray, count: int) -> tuple[np.ndarray, str | None]:
  """([count] real numbers, NaN for anything else; a line about the first that is no number).

  Raises:
    ValueError: the shape is wrong, or nothing is a real number.
  """
  unreal: list[str] = []
  if given.shape == (count,):
    # bfloat16 is not among NumPy's real kinds, but can be cast to float64.
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
  """A Decimal, a Fraction, a scalar tensor, ... as float.

  For anything else it returns NaN and appends a line to `unreal`.
  """
  try:
    # float() would parse text, and drop an imaginary part with just a warning.
    if not isinstance(item, str | bytes | complex | np.complexfloating) and not np.shape(item):
      return float(item)
  except OverflowError:
    return math.inf
  except Exception:  # Whatever an object of another library raises.
    pass
  unreal.append(f"{item!r:.60} is no real number")
  return math.nan


class TimeLimited:
  """Wraps a reward so that calls raise `TimeoutError` after `seconds`.

  A call that takes too long cannot be aborted; it goes on in its thread. Unless the reward is
  `concurrent`, the next call first waits for it, within its own limit.
  """

  def __init__(self, reward: Reward, seconds: float):
    """Raises InputError unless `seconds` > 0."""
    errors.require("time_limit", seconds, above=0, high=errors.MAX_SECONDS)
    self._reward, self._seconds = reward, seconds
    self.concurrent = getattr(reward, "concurrent", False)
    self.fingerprint = getattr(reward, "fingerprint", None)
    self._overdue: futures.Future | None = None

  @property
  def settings(self) -> Mapping[str, Any] | None:
    """The reward's settings; a property, since the reward may have to ask a server."""
    return getattr(self._reward, "settings", None)

  def __call__(self, samples: Sequence[Sample]) -> Scores:
    end = time.monotonic() + self._seconds
    if self._overdue is not None:
      if futures.wait([self._overdue], self._seconds).not_done:
        raise TimeoutError(
          f"an earlier call that took longer than time_limit={self._seconds:g} s still runs"
        )
      self._overdue = None
    # `evaluate` runs in the thread too: a lazy result is only computed when it is read.
    call = threads.start(evaluate, self._reward, samples, name="reward-limited")
    if futures.wait([call], end - time.monotonic()).done:
      return call.result()
    if not self.concurrent:
      self._overdue = call
    raise TimeoutError(f"it took longer than time_limit={self._seconds:g} s")

  def cache_in(self, path: pathlib.Path) -> None:
    """Has the reward keep its answers in a file, if it can."""
    if hasattr(self._reward, "cache_in"):
      self._reward.cache_in(path)

  def ready(self) -> None:
    """Asks the reward, if it has `ready`."""
    if hasattr(self._reward, "ready"):
      self._reward.ready()

  def close(self) -> None:
    """Closes the reward, if it has `close`."""
    if hasattr(self._reward, "close"):
      self._reward.close()
