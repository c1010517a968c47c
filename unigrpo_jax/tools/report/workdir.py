"""What a run left in its folder, read tolerantly: a missing piece becomes a note, not an error."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.runtime import metrics

Series = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt under one mode of an evaluation; `text` is the reasoning, `image` a file."""

  mode: str
  category: str
  prompt: str
  text: str | None
  rewards: dict[str, float]
  image: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """All rows of the evaluation after `iteration`."""

  iteration: int
  rows: list[Row]

  @property
  def modes(self) -> list[str]:
    return list(dict.fromkeys(row.mode for row in self.rows))

  @property
  def rewards(self) -> list[str]:
    return list(dict.fromkeys(name for row in self.rows for name in row.rewards))

  def categories(self, mode: str) -> list[str]:
    return sorted({row.category for row in self.rows if row.mode == mode})

  def scores(self, mode: str, reward: str, category: str | None = None) -> list[float]:
    """Finite rewards of a mode, of one category or of all."""
    return [
      row.rewards[reward] for row in self.rows
      if row.mode == mode and category in (None, row.category)
      and math.isfinite(row.rewards.get(reward, math.nan))
    ]


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that the page shows.

  Attributes:
    name: of the run, else of its folder.
    rows: of the metrics, in the order of the file.
    config: as read, or None.
    info: versions, devices and the like; empty where there is none.
    evaluations: by iteration.
    notes: sentences on what is missing or unreadable.
  """

  name: str
  rows: list[dict[str, float]]
  config: Any
  info: dict[str, Any]
  evaluations: list[Evaluation]
  notes: list[str]

  @property
  def keys(self) -> list[str]:
    """Names of all metrics, in the order in which they first appear."""
    return [key for key in dict.fromkeys(key for row in self.rows for key in row) if key != "step"]

  @property
  def steps(self) -> tuple[int, int]:
    """First and last step of metrics and evaluations."""
    steps = [row["step"] for row in self.rows] + [e.iteration for e in self.evaluations]
    return min(steps), max(steps)

  def series(self, key: str) -> Series:
    """(step, value) of one metric; NaN where it was not finite."""
    return [(row["step"], row[key]) for row in self.rows if key in row]


def read(folder: pathlib.Path) -> Run:
  """Reads a working folder.

  Raises:
    InputError: the folder has no metrics.
  """
  path = folder / "metrics.jsonl"
  if not path.is_file():
    raise errors.InputError(f"{path} does not exist; give the --workdir of a run that has started")
  rows, skipped = metrics.read(path)
  if not rows:
    raise errors.InputError(f"{path} holds no metrics yet; wait for the first step of the run")
  notes = [f"{skipped} line(s) of metrics.jsonl were unreadable and left out."] if skipped else []
  config = _json(folder / "config.json", notes)
  info = _json(folder / "run.json", notes)
  info = info if isinstance(info, dict) else {}
  evaluations = [
    evaluation for place in sorted((folder / "evaluations").glob("*"))
    if (evaluation := _evaluation(place, notes)) is not None
  ]
  return Run(
    name=str(info.get("run_id") or folder.resolve().name), rows=rows, config=config, info=info,
    evaluations=sorted(evaluations, key=lambda e: e.iteration), notes=notes,
  )


def _json(path: pathlib.Path, notes: list[str]) -> Any:
  """The content of a JSON file, or None with a note."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    notes.append(f"{path.name} is missing.")
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{path.name} is unreadable: {error}.")
  return None


def _evaluation(folder: pathlib.Path, notes: list[str]) -> Evaluation | None:
  if not (folder.is_dir() and folder.name.isdecimal()):
    return None
  problems: list[str] = []
  results = _json(folder / "results.json", problems)
  notes += [f"Evaluation {folder.name}: {problem}" for problem in problems]
  found = results.get("rows") if isinstance(results, dict) else None
  found = found if isinstance(found, list) else []
  rows = [_row(row, folder) for row in found if isinstance(row, dict)]
  if not rows:
    if not problems:
      notes.append(f"Evaluation {folder.name}: results.json holds no rows.")
    return None
  return Evaluation(int(folder.name), rows)


def _row(row: dict[str, Any], folder: pathlib.Path) -> Row:
  rewards = row.get("rewards")
  numbers = {
    str(name): float(value) if type(value) in (int, float) else math.nan
    for name, value in (rewards if isinstance(rewards, dict) else {}).items()
  }
  text, image = row.get("text"), row.get("image")
  return Row(
    mode=str(row.get("mode", "all")), category=str(row.get("category", "all")),
    prompt=str(row.get("prompt", "")), text=None if text is None else str(text), rewards=numbers,
    image=_inside(folder, image) if isinstance(image, str) else None,
  )


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """A file of the folder; None for a name that leads out of it."""
  path = (folder / name).resolve()
  return path if path.is_relative_to(folder.resolve()) else None


def mode_name(text: str) -> str:
  """The name of a mode that a config or a key of the metrics has without its spaces."""
  return re.sub(r"\s*\+\s*", " + ", text)


def evaluated(run: Run, reward: str) -> dict[str, list[tuple[int, Sequence[float]]]]:
  """Mode -> [(iteration, scores)] of a reward.

  The scores are those of every prompt where the evaluation was saved; its mean alone, from
  `eval/<mode>/<reward>`, where only that is known.
  """
  modes: dict[str, dict[int, Sequence[float]]] = {}
  for key in run.keys:
    if key.startswith("eval/") and key.rpartition("/")[2] == reward:
      mode = mode_name(key.rpartition("/")[0].partition("/")[2]) or "all"
      known = {step: [value] for step, value in run.series(key) if math.isfinite(value)}
      modes.setdefault(mode, {}).update(known)
  for evaluation in run.evaluations:
    for mode in evaluation.modes:
      scores = evaluation.scores(mode, reward)
      if scores:
        modes.setdefault(mode, {})[evaluation.iteration] = scores
  return {mode: sorted(points.items()) for mode, points in modes.items() if points}
