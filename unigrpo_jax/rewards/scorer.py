"""Scores samples by several rewards: runs them in threads, weighs them and counts failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import logging
import threading
import time
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, making
from unigrpo_jax.rewards import threads as threads_lib

# Names that no reward may have, as the log has metrics reward/mean, reward/std, eval/MODE/reward.
RESERVED = ("mean", "std", "reward")
EPS = 1e-4  # Added to a group's standard deviation.
CLOSE_SECONDS = 5.0
MAX_WARNINGS = 20  # Different messages of one reward that are logged; others are only counted.

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Failures:
  """All failures of one reward so far."""

  count: int = 0  # samples that it could not score
  last: str = ""  # the last reason


@dataclasses.dataclass(frozen=True)
class Failure:
  """Recent failures of a reward with a weight, for one reason."""

  count: int  # samples that it could not score
  temporary: bool  # see `base.Scores`
  reason: str


@dataclasses.dataclass(frozen=True)
class Pending:
  """Scores that threads are still computing."""

  parts: Mapping[str, futures.Future[Mapping[str, base.Scores]]]  # by reward; may be shared
  seconds: Mapping[str, float]  # {reward: duration of its call}, of calls that are done

  def done(self) -> bool:
    """Whether all rewards are done."""
    return not self.awaited()

  def awaited(self) -> list[str]:
    """The rewards that are not done."""
    return [name for name, part in self.parts.items() if not part.done()]

  def wait(self, seconds: float) -> bool:
    """Waits at most `seconds`; returns whether all rewards are done."""
    return not futures.wait(self.parts.values(), seconds).not_done

  def result(self, timeout: float | None = None) -> dict[str, np.ndarray]:
    """Waits for the scores, {reward: [N] float32}; NaN where a reward could not score a sample.

    Raises:
      TimeoutError: a reward took longer than `timeout` seconds.
      CancelledError: the scorer was closed before all rewards began.
    """
    return {name: scores.values for name, scores in self.scores(timeout).items()}

  def scores(self, timeout: float | None = None) -> dict[str, base.Scores]:
    """Waits like `result`; returns the scores with reasons and details."""
    return {name: part.result(timeout)[name] for name, part in self.parts.items()}


class Scorer:
  """Scores samples by several rewards.

  Where a reward raises anything, even SystemExit, or does not return N real numbers, all samples of
  that call score NaN; so does a sample with an infinite score. Failures are counted, and each
  message is logged once.

  Attributes:
    failures: {reward: `Failures`} so far.
  """

  def __init__(
    self, rewards: Mapping[str, base.Reward], weights: Mapping[str, float], *,
    threads: int = 2, max_failed_fraction: float = 0.5,
  ):
    """Starts the threads.

    Args:
      rewards: {name in the log: reward}.
      weights: {the same names: weight}; 0 for a reward that is only logged.
      threads: number of calls at the same time. Calls of one reward overlap only if it is
        `concurrent`.
      max_failed_fraction: `check` refuses a larger share of samples without a score, in [0, 1].

    Raises:
      InputError: a name is reserved, `weights` has other names, all weights are 0, or a number is
        out of range.
    """
    for name in rewards:
      if name in RESERVED:
        raise errors.InputError(
          f"reward {name!r}: {', '.join(RESERVED)} are names of other metrics in the log; give the "
          f"reward another name (in a config with its option kind, on a command line NAME=REWARD)"
        )
    if set(rewards) != set(weights):
      raise errors.InputError(
        f"weights={sorted(weights)} must name the same rewards as rewards={sorted(rewards)}"
      )
    for name, weight in weights.items():
      errors.require(f"weight of reward {name}", weight)
    if not any(weights.values()):
      raise errors.InputError(f"weights={dict(weights)}: at least one must not be 0")
    errors.require("threads", threads, low=1)
    errors.require("max_failed_fraction", max_failed_fraction, low=0, high=1)
    self._rewards, self._weights = dict(rewards), dict(weights)
    joint: dict[Any, list[str]] = {}
    for name, reward in rewards.items():
      joint.setdefault(getattr(reward, "joint", None) or name, []).append(name)
    self._together = [tuple(names) for names in joint.values()]  # one call each
    self._max_failed_fraction = max_failed_fraction
    self._pool = threads_lib.Pool(threads, "reward")
    self._reward_locks = {name: base.reward_lock(reward) for name, reward in rewards.items()}
    self._failures_lock = threading.Lock()  # Over `failures`, `_logged` and `_recent`.
    self._logged: dict[str, set[str]] = {name: set() for name in rewards}
    # By reward and whether temporary: of weighted rewards, since `worst_failure` was called.
    self._recent: dict[tuple[str, bool], Failure] = {}
    self.failures = {name: Failures() for name in rewards}

  def fingerprints(self) -> dict[str, str]:
    """{"reward_options.NAME": fingerprint} of the rewards that have one, for `Run`'s `pinned`."""
    found = {}
    for name, reward in self._rewards.items():
      with making.made(f"reward {name} has no fingerprint"):
        text = getattr(reward, "fingerprint", None)
      if text is not None and not isinstance(text, str):
        raise errors.InputError(
          f"reward {name}: its fingerprint must be text, not {errors.shown(text)}; make it an "
          "attribute or a property"
        )
      found[name] = text
    return {f"reward_options.{name}": text for name, text in found.items() if text}

  def settings(self) -> dict[str, dict[str, Any]]:
    """{reward: settings} of the rewards that have `settings`; see `base.Reward`."""
    return base.settings_of(self._rewards)

  def ready(self) -> None:
    """Asks the rewards with a weight that can tell, `ready`, whether they can score at all.

    Raises:
      InputError: one cannot.
      Unavailable: one cannot now.
    """
    for name, reward in self._rewards.items():
      if self._weights[name] and hasattr(reward, "ready"):
        with making.made(f"reward {name} is not ready"):
          reward.ready()

  def submit(self, samples: Sequence[base.Sample]) -> Pending:
    """Begins to score samples in the threads; does not wait."""
    samples = tuple(samples)
    seconds: dict[str, float] = {}
    calls = {
      names: self._pool.submit(self._run, names, samples, seconds) for names in self._together
    }
    by_name = {name: call for names, call in calls.items() for name in names}
    return Pending({name: by_name[name] for name in self._rewards}, seconds)

  def score(self, samples: Sequence[base.Sample]) -> dict[str, np.ndarray]:
    """Scores samples; see `Pending.result`."""
    return self.submit(samples).result()

  def _run(
    self, names: tuple[str, ...], samples: Sequence[base.Sample], seconds: dict[str, float]
  ) -> dict[str, base.Scores]:
    """Calls the rewards `names`, which are scored together; records how long it took in `seconds`.
    """
    trace = None
    try:
      with self._reward_locks[names[0]]:
        start = time.monotonic()
        try:
          given = base.evaluate_together([self._rewards[name] for name in names], samples)
        finally:
          seconds.update(dict.fromkeys(names, time.monotonic() - start))
    except BaseException as error:  # In a thread, SystemExit or KeyboardInterrupt is the reward's.
      trace, missing = error, np.full(len(samples), np.nan, np.float32)
      scores = base.Scores(missing, errors.describe(error), making.is_temporary(error))
      given = [scores] * len(names)
    for name, scores in zip(names, given):
      if scores.reason is not None:
        count = int(np.isnan(scores.values).sum())
        failure = Failure(count, scores.temporary, " ".join(scores.reason.split()))
        self._add_failure(name, failure, trace)
    return dict(zip(names, given))

  def _add_failure(self, name: str, failure: Failure, trace: BaseException | None) -> None:
    count, reason = failure.count, failure.reason
    with self._failures_lock:
      failures, logged = self.failures[name], self._logged[name]
      failures.count += count
      failures.last = reason
      if self._weights[name]:
        key = (name, failure.temporary)
        before = self._recent[key].count if key in self._recent else 0
        self._recent[key] = Failure(before + count, failure.temporary, f"reward {name}: {reason}")
      new = reason not in logged and len(logged) < MAX_WARNINGS
      if new:
        logged.add(reason)
    if new:
      # A reward of weight 0 often just does not apply, such as a plan's score without a reasoning.
      level = logging.WARNING if self._weights[name] else logging.DEBUG
      _log.log(level, "reward %s gave %d NaN: %s", name, count, reason, exc_info=trace)

  def total(
    self, scores: Mapping[str, np.ndarray], group: np.ndarray | None = None,
    normalise: bool = False,
  ) -> np.ndarray:
    """The weighted sum of scores, [N] float32; NaN where a reward of non-zero weight is NaN.

      R_i = sum_k w_k r_ki,   or with `normalise`
      R_i = sum_k w_k (r_ki - mean_g(i) r_k) / (std_g(i) r_k + 1e-4)

    Mean and standard deviation (ddof 0) are over the samples of the group that have a score.
    Source: standardising before the sum is the first step of GDPO (arXiv 2601.05242); eps and ddof
    are those of Flow-GRPO's code (arXiv 2505.05470).

    Args:
      scores: {reward: [N]}, of at least the rewards with a weight.
      group: number of each sample's group, [N] integers; None: one group.
      normalise: standardise each reward within its group.

    Raises:
      ValueError: shapes differ.
    """
    weighted = {name: weight for name, weight in self._weights.items() if weight}
    values = {name: np.asarray(scores[name], np.float64) for name in weighted}
    total = np.zeros(next(iter(values.values())).shape)
    group = np.zeros(total.shape, int) if group is None else np.asarray(group)
    shapes = {name: value.shape for name, value in values.items()} | {"group": group.shape}
    if total.ndim != 1 or set(shapes.values()) != {total.shape}:
      raise ValueError(f"shapes differ: {shapes}")
    for name, weight in weighted.items():
      total += weight * (_standardised(values[name], group) if normalise else values[name])
    return total.astype(np.float32)

  def worst_failure(self) -> Failure:
    """The failure that concerns most samples since this method was last called."""
    with self._failures_lock:
      recent, self._recent = self._recent, {}
    return max(
      recent.values(), key=lambda failure: (failure.count, failure.temporary),
      default=Failure(0, False, "no reward failed: their weighted sum is beyond float32"),
    )

  def check(
    self, total: np.ndarray, group: np.ndarray | None = None, failure: Failure | None = None
  ) -> None:
    """Raises where too many samples have no score.

    Args:
      total: total rewards, [N].
      group: number of each sample's group, [N]; None: groups do not matter.
      failure: the failure to name in the error; None: `worst_failure` of this scorer.

    Raises:
      InputError: more than `max_failed_fraction` of the samples, or one in each group, have no
        finite total.
      Unavailable: the same, where the failure is temporary.
    """
    failure = self.worst_failure() if failure is None else failure
    missing = ~np.isfinite(total)
    if missing.sum() > self._max_failed_fraction * len(total):
      words = (
        f"{missing.sum()} of {len(total)} samples have no reward, max_failed_fraction="
        f"{self._max_failed_fraction}"
      )
    elif group is not None and missing.any() and not set(group) - set(group[missing]):
      words = f"each of the {len(set(group))} groups has a sample without a reward, and is dropped"
    else:
      return
    if failure.temporary:
      raise errors.Unavailable(f"{words}; {failure.reason}; run the same command again later")
    raise errors.InputError(f"{words}; {failure.reason}; repair the reward")

  def close(self) -> None:
    """Closes the rewards and cancels calls that have not begun.

    Waits at most CLOSE_SECONDS for running calls; those that take longer end with the program.
    """
    end = time.monotonic() + CLOSE_SECONDS
    self._pool.close()
    closing = {
      name: threads_lib.start(reward.close, name=f"close {name}")
      for name, reward in self._rewards.items() if hasattr(reward, "close")
    }
    futures.wait(closing.values(), CLOSE_SECONDS)
    for name, call in closing.items():
      error = call.exception() if call.done() else TimeoutError(f"after {CLOSE_SECONDS:g} s")
      if error is not None:
        _log.warning("reward %s did not close: %s", name, errors.describe(error), exc_info=error)
    if not self._pool.join(end - time.monotonic()):
      _log.warning("calls of rewards still run; they end with the program")


def _standardised(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """(values - mean) / (std + EPS), [N], with mean and std of each group's values but NaN."""
  result = np.full_like(values, np.nan)
  scored = ~np.isnan(values)
  for number in np.unique(group):
    rows = (group == number) & scored
    if rows.any():
      result[rows] = (values[rows] - values[rows].mean()) / (values[rows].std() + EPS)
  return result
