"""The note that replaces UniFPO's scores in the tables where it diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re

from unigrpo_jax.benchmarks import verdict
from unigrpo_jax.tools.compare import methods, runs

NOT_FINITE, _STEP = "not finite", re.compile(r"step (\d+):")  # of the line that ended a run


def note(method: str, trainings: Sequence[runs.Training], failed: Mapping[str, str]) -> str:
  """"k of n seeds diverged, at iterations ..., by (...)"; "" where none did.

  The rule, `verdict.verdict`, was fixed before any run. It applies to UniFPO alone, whose cells the
  paper leaves empty.

  Args:
    method: a key of `methods.ALL`.
    trainings: its runs.
    failed: {name of a run: why it failed}.
  """
  if not method.startswith(methods.UNIFPO):
    return ""
  found = []
  for run in trainings:
    reason, iteration = failed.get(run.name, ""), None
    if NOT_FINITE in reason:
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
