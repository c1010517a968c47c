"""The benchmarks' summaries of an evaluation (GenEval, TA), by mode, and their JSON."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
from typing import Any

from unigrpo_jax.benchmarks import geneval, intervals, results, ta

# IconWorld's rewards have this prefix in names of `--rewards`.
PREFIX = "iconworld_"


def by_mode(
  found: results.Results, *observers: results.Observe, names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
  """The benchmarks' summaries of each mode.

  Args:
    found: results of an evaluation.
    observers: of the same evaluation; a `ta.Exam` among them contributes its summaries.
    names: rewards to summarise by GenEval's rules; None: IconWorld's "geneval" and "strict", where
      the rows have them.

  Returns:
    {mode: {reward: `geneval.Summary`, "ta": `ta.Exam.summaries` | {reward: `ta.Summary`}}}, without
    modes and entries for which there is nothing.
  """
  made: dict[str, dict[str, Any]] = {}
  for mode in found.modes:
    rows = [row for row in found.rows if row.mode == mode]
    of_mode: dict[str, Any] = {}
    for name in ("geneval", "strict") if names is None else names:
      if names or not all(math.isnan(reward(row, name)) for row in rows):
        of_mode[name] = summary(rows, name)
    for observer in observers:
      if isinstance(observer, ta.Exam) and (summaries := observer.summaries(mode)):
        of_mode["ta"] = summaries
    for name in dict.fromkeys(name for row in rows for name in row.details):
      if (summary_of := ta.of_reward(rows, name)) is not None:
        of_mode["ta"] = of_mode.get("ta", {}) | {name: summary_of}
    if of_mode:
      made[mode] = of_mode
  return made


def is_geneval(prompts: Sequence[Any]) -> bool:
  """Whether all prompts (objects with `metadata`) have GenEval's tags."""
  return all(
    one.metadata.get("tag") in geneval.CATEGORIES and "include" in one.metadata for one in prompts
  )


def reward(row: results.Row, name: str) -> float:
  """A row's reward `name` or `PREFIX + name`; NaN where it has neither."""
  return row.rewards.get(name, row.rewards.get(PREFIX + name, math.nan))


def summary(rows: Sequence[results.Row], name: str) -> geneval.Summary:
  """GenEval's summary of one reward of the rows; a row without it is a failure."""
  return geneval.summary(
    [reward(row, name) for row in rows], [row.category for row in rows], [row.key for row in rows]
  )


def to_json(value: Any) -> str:
  """JSON text of `plain(value)`, with a newline at the end; NaN becomes null."""
  return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
  """Converts nested dataclasses, estimates, dictionaries and sequences to what JSON can hold.

  Numbers that are not finite become None.
  """
  match value:
    case intervals.Estimate():
      return plain({"mean": value.mean, "se": value.se, "prompts": value.prompts})
    case dict():
      return {str(key): plain(item) for key, item in value.items()}
    case list() | tuple():
      return [plain(item) for item in value]
    case float() if not math.isfinite(value):
      return None
    case _ if dataclasses.is_dataclass(value):
      return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
  return value
