"""What the tables say in place of UniFPO's scores where it diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re

from unigrpo_jax.benchmarks import verdict
from unigrpo_jax.tools.compare import methods, runs

_NOT_FINITE, _STEP = "not finite", re.compile(r"step (\d+):")  # of the line that ended a run


def note(method: str, trainings: Sequence[runs.Training], failed: Mapping[str, str]) -> str:
  """"k of n seeds diverged, at iterations ..., by (...)"; "" where none did.

  The rule was fixed before any run, see `verdict.verdict`, and holds for UniFPO alone: the paper
  leaves its cells empty.

  Args:
    method: of `methods.ALL`.
    trainings: of its seeds.
    failed: {run: why it ended}.
  """
  if not method.startswith(methods.UNIFPO):
    return ""
  found = []
  for run in trainings:
    reason, iteration = failed.get(run.name, ""), None
    if _NOT_FINITE in reason:
      step = _STEP.search(reason)
      iteration = int(step[1]) if step else max(run.rows(), default=0) + 1
    if run.is_done() or iteration is not None:
      found.append(verdict.verdict(verdict.read_rows(run.folder, run.mode), rejected=iteration))
  diverged = [each for each in found if each.diverged]
  if not diverged:
    return ""
  at = ", ".join(str(each.iteration) for each in diverged)
  letters = ", ".join(f"({'; '.join(each.by)})" for each in diverged)
  return f"{len(diverged)} of {len(trainings)} seeds diverged, at iterations {at}, by {letters}"
