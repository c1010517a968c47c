"""Whether a run diverged, by a rule that was fixed before any run: for the tables' empty rows."""

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

AVERAGED = 3  # evaluations whose mean is held against the start
STAYS = 3  # evaluations that it stays below, or as many as are left
ERRORS = 2  # standard errors below the start
MOST_MSE = 1.0  # of flow/mse, the squared distance of velocities from the reference's
MOST_TRUNCATED = 0.5  # of the reasonings
# Metrics of the mode that the method is judged by.
REWARD, STRICT = "eval/think/reward", "eval/think/iconworld_strict"
_FINITE = ("loss/", "grad_norm/")  # what must be finite


class Verdict(NamedTuple):
  """What came of a run: `iteration` is None, and `by` empty, where it did not diverge."""

  diverged: bool
  iteration: int | None
  by: str  # the letters of all that held then, "b" or "bd", say; see `verdict`


def verdict(
  rows: Sequence[Mapping[str, float]], *, rejected: int | None = None
) -> Verdict:
  """Whether a run diverged: at its first evaluation where one of these holds.

    a  a loss or a gradient of an iteration so far is not finite, or its update was rejected
    b  the mean reward of three evaluations is below the first one by more than two of its standard
       errors, and stays so to the end, or for three evaluations
    c  the strict score is below half the first one
    d  flow/mse of the last iteration is above 1
    e  more than half of the last iteration's reasonings were cut (text/truncated)

  A run that merely gains nothing did not diverge.

  Args:
    rows: of its log, in order, each with a "step"; an evaluation's has REWARD, the standard error
      REWARD_se of its mean (the first one's is enough), and may have STRICT. See `read_rows`.
    rejected: iteration whose update was not finite, with which the run ended.

  Raises:
    InputError: there is no evaluation to compare with, or it has no standard error.
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
  """Numbers of the evaluations at which a reward is below its start, and stays so."""
  # Of the evaluations after the start, each with those before it.
  low = [
    number >= AVERAGED and means[0] - np.mean(means[number - AVERAGED + 1 : number + 1]) > least
    for number in range(len(means))
  ]
  return {number for number in range(len(means)) if low[number] and all(low[number :][:STAYS])}


def read_rows(workdir: pathlib.Path, mode: str = "think") -> list[dict[str, float]]:
  """The log of a run for `verdict`, with standard errors from its evaluations, by prompt.

  Images of a prompt are correlated: the error is that of the means of prompts, of which there are
  as many as the evaluation has.

  Raises:
    InputError: an evaluation of the log is not in the folder `evaluations`.
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
  """Of the mean reward in an evaluation; NaN for fewer than two prompts."""
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(
      f"{path}: cannot be read ({error}); the rule needs the evaluations of the run"
    ) from None
  rows = [row for row in record["rows"] if row["mode"] == mode and "reward" in row["rewards"]]
  scores = [row["rewards"]["reward"] for row in rows]
  return intervals.clustered(scores, [row["prompt"] for row in rows]).se
