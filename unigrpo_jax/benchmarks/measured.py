"""What the benchmarks say about an evaluation, by mode, and how that is kept as JSON."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
from typing import Any

from unigrpo_jax.benchmarks import evaluation, geneval, intervals, ta

# IconWorld's rewards have this before their names, where a command line names them.
PREFIX = "iconworld_"


def by_mode(
  results: evaluation.Results, *observers: evaluation.Observe
) -> dict[str, dict[str, Any]]:
  """{mode: {"geneval", "strict": `geneval.Summary`, "ta": `ta.Exam.summaries`}}, as far as given.

  `observers` are those of the evaluation, of which a `ta.Exam` is asked.
  """
  made: dict[str, dict[str, Any]] = {}
  for mode in results.modes:
    rows = [row for row in results.rows if row.mode == mode]
    of_mode: dict[str, Any] = {}
    for name in ("geneval", "strict"):
      if any(reward(row, name) is not None for row in rows):
        of_mode[name] = summary(rows, name)
    for observer in observers:
      if isinstance(observer, ta.Exam) and (summaries := observer.summaries(mode)):
        of_mode["ta"] = summaries
    if of_mode:
      made[mode] = of_mode
  return made


def reward(row: evaluation.Row, name: str) -> float | None:
  """A reward of a row, with or without the prefix; None where it has none."""
  return row.rewards.get(name, row.rewards.get(PREFIX + name))


def summary(rows: Sequence[evaluation.Row], name: str) -> geneval.Summary:
  """GenEval's summary of one reward of the rows; a row without it is left out."""
  values = [reward(row, name) for row in rows]
  return geneval.summary(
    [math.nan if value is None else value for value in values],
    [row.category for row in rows],
    [row.prompt if row.number is None else row.number for row in rows],
  )


def to_json(value: Any) -> str:
  """JSON of dataclasses and estimates within dictionaries; NaN becomes null."""
  return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
  """Dictionaries, lists, numbers and texts of a value; NaN becomes None."""
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
