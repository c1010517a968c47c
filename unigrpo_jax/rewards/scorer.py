"""Several rewards together: run in threads beside the device, weighed, and watched for failures.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import logging
import threading

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base

EPS = 1e-4  # Added to a group's standard deviation.
WARNINGS = 20  # Different messages of one reward that are logged; more are only counted.

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Failures:
  """What a reward could not score so far: how many samples, and why the last of them."""

  count: int = 0
  last: str = ""


class Scorer:
  """Scores samples by several rewards.

  A reward that raises, or returns something else than N real numbers, scores NaN for all samples of
  that call; one infinite score is NaN for its sample. Each is counted in `failures` and logged once
  a message, an exception with its traceback. Nothing that failed ever becomes a 0.
  """

  def __init__(
    self, rewards: Mapping[str, base.Reward], weights: Mapping[str, float], *,
    threads: int = 2, max_failed_fraction: float = 0.5,
  ):
    """Starts the threads.

    Args:
      rewards: by the names that they are logged under.
      weights: for the same names; 0 for a reward that is only logged.
      threads: calls of rewards that run at once. Each reward is called by one of them at a time,
        unless it says `concurrent`.
      max_failed_fraction: of the samples of one `check`, in [0, 1].

    Raises:
      InputError: the names differ, no weight counts, or a number is out of range.
    """
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
    self._limit = max_failed_fraction
    self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="reward")
    self._turns = {name: base.turn(reward) for name, reward in rewards.items()}
    self._notes = threading.Lock()  # Over failures and what was logged.
    self._logged: dict[str, set[str]] = {name: set() for name in rewards}
    self._last = ""
    self.failures = {name: Failures() for name in rewards}

  def submit(self, samples: Sequence[base.Sample]) -> futures.Future[dict[str, np.ndarray]]:
    """Scores samples in the threads, each reward by itself; the future holds what `score` gives."""
    samples, done, lock = tuple(samples), futures.Future(), threading.Lock()
    parts = {name: self._pool.submit(self._run, name, samples) for name in self._rewards}
    left = len(parts)
    done.set_running_or_notify_cancel()  # From here on nobody can cancel it.

    def finish(_):
      nonlocal left
      with lock:
        left -= 1
        if left:
          return
      try:
        done.set_result({name: part.result() for name, part in parts.items()})
      except BaseException as error:  # Else whoever waits would wait for ever.
        done.set_exception(error)

    for part in parts.values():
      part.add_done_callback(finish)
    return done

  def score(self, samples: Sequence[base.Sample]) -> dict[str, np.ndarray]:
    """{name: [N] float32, as the reward gave it; NaN where it could not}."""
    return self.submit(samples).result()

  def _run(self, name: str, samples: Sequence[base.Sample]) -> np.ndarray:
    try:
      with self._turns[name]:
        scores, problem = base.evaluate(self._rewards[name], samples)
      trace = None
    except Exception as error:
      scores = np.full(len(samples), np.nan, np.float32)
      problem, trace = f"{type(error).__name__}: {error}", error
    if problem is not None:
      self._note(name, " ".join(problem.split()), int(np.isnan(scores).sum()), trace)
    return scores

  def _note(self, name: str, problem: str, count: int, trace: Exception | None) -> None:
    with self._notes:
      failures, logged = self.failures[name], self._logged[name]
      failures.count += count
      failures.last = problem
      if self._weights[name]:
        self._last = f"reward {name}: {problem}"
      new = problem not in logged and len(logged) < WARNINGS
      if new:
        logged.add(problem)
    if new:
      # A reward that is only logged may not apply: a plan's score where nothing was thought.
      level = logging.WARNING if self._weights[name] else logging.DEBUG
      _log.log(level, "reward %s gave %d NaN: %s", name, count, problem, exc_info=trace)

  def total(
    self, scores: Mapping[str, np.ndarray], group: np.ndarray | None = None,
    normalise: bool = False,
  ) -> np.ndarray:
    """The weighted sum of scores.

      R_i = sum_k w_k r_ki,   or with `normalise`
      R_i = sum_k w_k (r_ki - mean_g(i) r_k) / (std_g(i) r_k + 1e-4)

    over the rewards of non-zero weight. Mean and standard deviation (ddof 0) are those of the
    group's samples that have a score. Source: standardising before the sum, so that no reward
    drowns another by its scale, is the first step of GDPO (arXiv 2601.05242); eps and ddof are
    those of Flow-GRPO's code (arXiv 2505.05470).

    Args:
      scores: what `score` gives, {name: [N]}.
      group: which samples share a prompt, [N] integers; None for all. Only `normalise` reads it.
      normalise: standardise each reward within its group first.

    Returns:
      [N] float32; NaN where a reward of non-zero weight is.

    Raises:
      ValueError: the arrays differ in length.
    """
    weights = {name: weight for name, weight in self._weights.items() if weight}
    counting = {name: np.asarray(scores[name], np.float64) for name in weights}
    total = np.zeros(next(iter(counting.values())).shape)
    group = np.zeros(total.shape, int) if group is None else np.asarray(group)
    shapes = {name: values.shape for name, values in counting.items()} | {"group": group.shape}
    if total.ndim != 1 or set(shapes.values()) != {total.shape}:
      raise ValueError(f"shapes differ: {shapes}")
    for name, values in counting.items():
      total += weights[name] * (_standardised(values, group) if normalise else values)
    return total.astype(np.float32)

  def check(self, total: np.ndarray) -> None:
    """Stops a run whose rewards do not work.

    Args:
      total: [N], what `total` gives.

    Raises:
      InputError: more than `max_failed_fraction` of it is NaN.
    """
    failed = int(np.isnan(total).sum())
    if failed > self._limit * len(total):
      raise errors.InputError(
        f"{failed} of {len(total)} samples have no reward, max_failed_fraction={self._limit}; the "
        f"last failure was {self._last or 'not seen by this scorer'}; repair the reward"
      )

  def close(self) -> None:
    """Tells the rewards to hurry, drops what is not begun, and waits for what is."""
    for reward in self._rewards.values():
      if hasattr(reward, "close"):
        reward.close()
    self._pool.shutdown(cancel_futures=True)


def _standardised(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """(values - mean) / (std + EPS) within each group, both over what is not NaN; [N]."""
  result = np.full_like(values, np.nan)
  scored = ~np.isnan(values)
  for member in np.unique(group):
    own = (group == member) & scored
    if own.any():
      result[own] = (values[own] - values[own].mean()) / (values[own].std() + EPS)
  return result
