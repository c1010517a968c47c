"""Several rewards of N samples together: run in threads, weighed, and watched for failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import logging
import threading

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base

# Names of other metrics beside those of rewards: reward/mean, reward/std and eval/MODE/reward.
RESERVED = ("mean", "std", "reward")
EPS = 1e-4  # Added to a group's standard deviation.
MAX_WARNINGS = 20  # Different messages of one reward that are logged; more are only counted.

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Failures:
  """How many samples a reward could not score so far, and the last reason."""
  count: int = 0
  last: str = ""


@dataclasses.dataclass(frozen=True)
class Pending:
  """The scores of samples, which threads compute, one part a reward."""

  parts: Mapping[str, futures.Future[np.ndarray]]

  def done(self) -> bool:
    return all(part.done() for part in self.parts.values())

  def result(self, timeout: float | None = None) -> dict[str, np.ndarray]:
    """Waits for {name: [N] float32}, as `Scorer.score`; TimeoutError after `timeout` seconds, and
    CancelledError if the scorer was closed before all rewards began.
    """
    return {name: part.result(timeout) for name, part in self.parts.items()}


class Scorer:
  """Scores samples by several rewards.

  A reward that raises, or returns something else than N real numbers, scores NaN for all samples of
  that call; an infinite score is NaN. Each is counted in `failures` and logged once a message.
  """

  def __init__(
    self, rewards: Mapping[str, base.Reward], weights: Mapping[str, float], *,
    threads: int = 2, max_failed_fraction: float = 0.5,
  ):
    """Starts the threads.

    Args:
      rewards: by the names that they are logged under.
      weights: for the same names; 0 for a reward that is only logged.
      threads: calls of rewards that run at once; only calls of a `concurrent` reward overlap.
      max_failed_fraction: of the samples of one `check`, in [0, 1].

    Raises:
      InputError: a reserved name, other names in `weights`, no weight but 0, a number out of range.
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
    self._max_failed_fraction = max_failed_fraction
    self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="reward")
    self._reward_locks = {name: base.reward_lock(reward) for name, reward in rewards.items()}
    self._failures_lock = threading.Lock()  # Over `failures`, `_logged` and `_last_failure`.
    self._logged: dict[str, set[str]] = {name: set() for name in rewards}
    self._last_failure = "not seen by this scorer"
    self.failures = {name: Failures() for name in rewards}

  def submit(self, samples: Sequence[base.Sample]) -> Pending:
    """Scores samples in the threads, each reward by itself; `Pending.result` waits for them."""
    samples = tuple(samples)
    return Pending({name: self._pool.submit(self._run, name, samples) for name in self._rewards})

  def score(self, samples: Sequence[base.Sample]) -> dict[str, np.ndarray]:
    """{name: [N] float32, as the reward gave it; NaN where it could not}."""
    return self.submit(samples).result()

  def _run(self, name: str, samples: Sequence[base.Sample]) -> np.ndarray:
    trace = None
    try:
      with self._reward_locks[name]:
        scores = base.evaluate(self._rewards[name], samples)
    except Exception as error:
      trace, reason = error, f"{type(error).__name__}: {error}"
      scores = base.Scores(np.full(len(samples), np.nan, np.float32), reason)
    if scores.reason is not None:
      count = int(np.isnan(scores.values).sum())
      self._add_failure(name, " ".join(scores.reason.split()), count, trace)
    return scores.values

  def _add_failure(self, name: str, reason: str, count: int, trace: Exception | None) -> None:
    with self._failures_lock:
      failures, logged = self.failures[name], self._logged[name]
      failures.count += count
      failures.last = reason
      if self._weights[name]:
        self._last_failure = f"reward {name}: {reason}"
      new = reason not in logged and len(logged) < MAX_WARNINGS
      if new:
        logged.add(reason)
    if new:
      # A reward that is only logged may not apply: a plan's score where there is no reasoning.
      level = logging.WARNING if self._weights[name] else logging.DEBUG
      _log.log(level, "reward %s gave %d NaN: %s", name, count, reason, exc_info=trace)

  def total(
    self, scores: Mapping[str, np.ndarray], group: np.ndarray | None = None,
    normalise: bool = False,
  ) -> np.ndarray:
    """The weighted sum of scores, [N] float32; NaN where a reward of non-zero weight is.

      R_i = sum_k w_k r_ki,   or with `normalise`
      R_i = sum_k w_k (r_ki - mean_g(i) r_k) / (std_g(i) r_k + 1e-4)

    Mean and standard deviation (ddof 0) are those of the group's samples that have a score. Source:
    standardising before the sum is the first step of GDPO (arXiv 2601.05242); eps and ddof are
    those of Flow-GRPO's code (arXiv 2505.05470).

    `group`, [N] integers, says which samples share a prompt; None: all of them.
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

  def check(self, total: np.ndarray) -> None:
    """Raises InputError if more than `max_failed_fraction` of `total`, [N], is NaN."""
    failed = int(np.isnan(total).sum())
    if failed > self._max_failed_fraction * len(total):
      raise errors.InputError(
        f"{failed} of {len(total)} samples have no reward, max_failed_fraction="
        f"{self._max_failed_fraction}; the last failure was {self._last_failure}; repair the reward"
      )

  def close(self) -> None:
    """Closes the rewards, drops calls that have not begun, and waits for those that have."""
    for reward in self._rewards.values():
      if hasattr(reward, "close"):
        reward.close()
    self._pool.shutdown(cancel_futures=True)


def _standardised(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """(values - mean) / (std + EPS) within each group, both over what is not NaN; [N]."""
  result = np.full_like(values, np.nan)
  scored = ~np.isnan(values)
  for number in np.unique(group):
    rows = (group == number) & scored
    if rows.any():
      result[rows] = (values[rows] - values[rows].mean()) / (values[rows].std() + EPS)
  return result
