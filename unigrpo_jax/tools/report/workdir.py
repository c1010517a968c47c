"""Reads what a run left in its folder; a missing or damaged piece becomes a note, not an error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.runtime import metrics


@dataclasses.dataclass(frozen=True)
class Sample:
  """One image of a prompt in one mode of the evaluation after `step`; its picture is a file."""

  step: int
  mode: str
  category: str
  prompt: str
  key: Hashable  # of the prompt: equal for all its images; see `results.Row.key`
  text: str | None
  rewards: dict[str, float]
  image: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a run's folder."""

  name: str  # of the folder, and of the run
  rows: list[dict[str, float]]  # metrics, one row per step
  config: dict[str, Any]  # {} where it is missing
  info: dict[str, Any]  # versions, devices and the like; {} where they are missing
  evaluations: dict[int, list[Sample]]  # by step, in order
  notes: list[str]  # sentences about what is missing or unreadable

  @property
  def keys(self) -> list[str]:
    """Names of all metrics, in the order in which they first appear."""
    return [key for key in dict.fromkeys(key for row in self.rows for key in row) if key != "step"]

  @property
  def steps(self) -> tuple[int, int]:
    """First and last step of metrics and evaluations."""
    steps = [row["step"] for row in self.rows] + list(self.evaluations)
    return min(steps), max(steps)

  def series(self, key: str) -> list[tuple[int, float]]:
    """[(step, value)] of a metric; values need not be finite."""
    return [(row["step"], row[key]) for row in self.rows if key in row]

  def finite(self, key: str) -> list[float]:
    """The finite values of a metric, in order of steps."""
    return [value for _, value in self.series(key) if math.isfinite(value)]

  def evaluated(self, reward: str) -> dict[str, list[tuple[int, Sequence[float]]]]:
    """{mode: [(step, scores)]} of a reward.

    Scores are those of all prompts, see `prompt_scores`, where the evaluation was saved, else the
    logged mean alone.
    """
    modes: dict[str, dict[int, Sequence[float]]] = {}
    for key in self.keys:
      path, _, name = key.rpartition("/")
      section, _, mode = path.partition("/")
      if section == "eval" and name == reward:
        means = {step: [value] for step, value in self.series(key) if math.isfinite(value)}
        modes[mode or "all"] = means
    for step, samples in self.evaluations.items():
      for mode in dict.fromkeys(sample.mode for sample in samples):
        if scores := prompt_scores([one for one in samples if one.mode == mode], reward):
          modes.setdefault(mode, {})[step] = scores
    return {mode: sorted(steps.items()) for mode, steps in modes.items() if steps}


def prompt_scores(samples: Sequence[Sample], reward: str) -> list[float]:
  """The mean of a reward over the images of each prompt that has a finite one."""
  scored = [one for one in samples if math.isfinite(one.rewards.get(reward, math.nan))]
  scores, keys = [one.rewards[reward] for one in scored], [one.key for one in scored]
  return list(intervals.prompt_means(scores, keys).values())


def read(folder: pathlib.Path) -> Run:
  """Reads the workdir of a run.

  Raises:
    InputError: it has no metrics.
  """
  path = folder / "metrics.jsonl"
  if not path.is_file():
    raise errors.InputError(f"{path} does not exist; give the --workdir of a run that has started")
  rows, skipped = metrics.read(path)
  if not rows:
    raise errors.InputError(f"{path} holds no metrics yet; wait for the first step of the run")
  steps = metrics.by_step(rows)
  notes = [f"{skipped} line(s) of metrics.jsonl were unreadable and left out."] if skipped else []
  config, info = (_json(folder / name, name, notes) for name in ("config.json", "run.json"))
  places = results_lib.of_run(folder)
  if "resumed" in info:  # Later ones are of before this start, which may have had no checkpoint.
    places = {step: place for step, place in places.items() if step <= max(steps)}
  evaluations = {step: _samples(place, notes) for step, place in places.items()}
  return Run(
    name=folder.resolve().name + (f", run {info['run_id']}" if "run_id" in info else ""),
    rows=[steps[step] for step in sorted(steps)], config=config, info=info,
    evaluations={step: evaluations[step] for step in sorted(evaluations) if evaluations[step]},
    notes=notes,
  )


def _json(path: pathlib.Path, name: str, notes: list[str]) -> dict[str, Any]:
  """The object in a JSON file; where it cannot be read, {} and a note about `name`."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
      return content
    notes.append(f"{name} is not a JSON object.")
  except FileNotFoundError:
    notes.append(f"{name} is missing.")
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{name} is unreadable: {error}.")
  return {}


def _samples(folder: pathlib.Path, notes: list[str]) -> list[Sample]:
  """The samples that an evaluation saved in a folder."""
  name = f"evaluations/{folder.name}/results.json"
  results = _json(folder / "results.json", name, notes)
  rows = results["rows"] if isinstance(results.get("rows"), list) else []
  samples = [
    Sample(
      step=int(folder.name),
      # Without spaces, as in configs and metrics.
      mode=str(row.get("mode", "all")).replace(" ", ""),
      category=str(row.get("category", "all")),
      prompt=str(row.get("prompt", "")),
      key=_key(place, row),
      text=row["text"] if isinstance(row.get("text"), str) else None,
      rewards={
        reward: score if type(score) in (int, float) else math.nan
        for reward, score in (rewards.items() if isinstance(rewards, dict) else ())
      },
      image=_inside(folder, row.get("image")),
    )
    for place, row in enumerate(rows) if isinstance(row, dict) for rewards in [row.get("rewards")]
  ]
  if results and not samples:
    notes.append(f"{name} holds no rows.")
  return samples


def _key(place: int, row: dict[str, Any]) -> Hashable:
  """What the images of a prompt have in common; a row without the prompt's number is one by itself.
  """
  if row.get("number") is None:
    return place
  return intervals.prompt_key(str(row.get("prompt", "")), row.get("metadata"))


def _inside(folder: pathlib.Path, name: Any) -> pathlib.Path | None:
  """The path of a file in the folder; None without a name, or where it leads outside."""
  if not isinstance(name, str) or not name:
    return None
  try:
    path = (folder / name).resolve()
  except ValueError:  # A null or half a character: no file has such a name.
    return None
  return path if path.is_relative_to(folder.resolve()) else None
