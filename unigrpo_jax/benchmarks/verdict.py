"""Whether a run diverged, by a rule that was fixed before any run.

The paper leaves the cells of a diverged method empty; this rule decides which cells those are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import intervals, validation
from unigrpo_jax.runtime import metrics

AVERAGED = 3  # number of evaluations whose mean is compared with the first evaluation
STAYS = 3  # number of evaluations for which the mean must stay low (fewer at the end of a run)
ERRORS = 2  # it is low from so many standard errors below the first evaluation
MOST_MSE = 1.0  # largest flow/mse, the squared distance of velocities from the reference's
MOST_TRUNCATED = 0.5  # largest share of reasonings that were cut
# Metrics of the mode by which a method is judged.
REWARD, STRICT = "eval/think/reward", "eval/think/iconworld_strict"
_FINITE = ("loss/", "grad_norm/")  # metrics that must be finite


class Verdict(NamedTuple):
  """Whether, when and by which conditions a run diverged."""

  diverged: bool
  iteration: int | None  # at which it diverged; None where it did not
  by: str  # letters of the conditions that held then, such as "bd"; see `verdict`


def verdict(
  rows: Sequence[Mapping[str, float]], *, rejected: int | None = None
) -> Verdict:
  """Whether a run diverged: it did at its first evaluation where one of these conditions holds.

    a  a loss or a gradient norm of an iteration so far was not finite, or an update was rejected
    b  the mean reward of the last three evaluations is below the first evaluation by more than two
       of that one's standard errors, and so it stays for three evaluations, or to the end
    c  the strict score is below half of that of the first evaluation
    d  flow/mse of the last iteration is above 1
    e  more than half of the last iteration's reasonings were cut (text/truncated)

  A run that merely does not improve did not diverge.

  Args:
    rows: rows of its log, in order, each with "step". Those of evaluations have REWARD and may have
      STRICT; the first of them also has f"{REWARD}_se", the standard error. See `read_rows`.
    rejected: iteration whose update was rejected, which ended the run; None: there is none.

  Raises:
    InputError: there is no evaluation, or the first one has no standard error.
  """
  evaluations = [row for row in rows if REWARD in row]
  if not evaluations:
    raise errors.InputError(f"the log has no {REWARD}; give the metric of a mode that is evaluated")
  start = evaluations[0]
  if not math.isfinite(start.get(f"{REWARD}_se", math.nan)):
    raise errors.InputError(f"the first evaluation has no {REWARD}_se, which the rule needs")
  broken = [
    row["step"] for row in rows
    if any(name.startswith(_FINITE) and not math.isfinite(row[name]) for name in row)
  ]
  broken += [] if rejected is None else [rejected]
  fell = _fell([row[REWARD] for row in evaluations], ERRORS * start[f"{REWARD}_se"])
  for number, row in enumerate(evaluations):
    step = row["step"]
    last = {k: v for other in rows if other["step"] <= step for k, v in other.items()}
    held = {
      "a": any(one <= step for one in broken),
      "b": number in fell,
      "c": row.get(STRICT, math.inf) < start.get(STRICT, 0.0) / 2,
      "d": last.get("flow/mse", 0.0) > MOST_MSE,
      "e": last.get("text/truncated", 0.0) > MOST_TRUNCATED,
    }
    if by := "".join(letter for letter, holds in held.items() if holds):
      return Verdict(True, step, by)
  if broken:  # No evaluation came after it.
    return Verdict(True, min(broken), "a")
  return Verdict(False, None, "")


def _fell(means: Sequence[float], least: float) -> set[int]:
  """Numbers of the evaluations at which condition b of `verdict` holds, by the mean rewards.

  `least` is the drop from the first evaluation that counts.
  """
  # A mean of AVERAGED evaluations, without the first one.
  low = [
    number >= AVERAGED and means[0] - np.mean(means[number - AVERAGED + 1 : number + 1]) > least
    for number in range(len(means))
  ]
  return {number for number in range(len(means)) if low[number] and all(low[number :][:STAYS])}


def read_rows(workdir: pathlib.Path, mode: str = "think") -> list[dict[str, float]]:
  """The rows of a run's log for `verdict`, with standard errors from the saved evaluations.

  Images of a prompt are correlated, so the error is that of the prompts' means.

  Raises:
    InputError: an evaluation in the log is not saved in the folder `evaluations`.
  """
  rows, _ = metrics.read(workdir / "metrics.jsonl")
  name = f"{validation.metric(mode)}/reward"
  for row in rows:
    if name in row:
      row[f"{name}_se"] = _standard_error(
        workdir / "evaluations" / f"{row['step']:06d}" / "results.json", mode
      )
  return rows


def _standard_error(path: pathlib.Path, mode: str) -> float:
  """The standard error of the mean reward of a saved evaluation; NaN for fewer than two prompts."""
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(
      f"{path}: cannot be read ({error}); the rule needs the evaluations of the run"
    ) from None
  rows = [row for row in record["rows"] if row["mode"] == mode and "reward" in row["rewards"]]
  scores = [row["rewards"]["reward"] for row in rows]
  return intervals.clustered(scores, [row["prompt"] for row in rows]).se
