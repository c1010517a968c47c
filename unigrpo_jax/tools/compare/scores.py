"""Test scores of checkpoints: how they are evaluated, and how a row of the tables sums them up."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

from unigrpo_jax.benchmarks import evaluation, intervals, measured
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.tools.compare import runs

REWARD_MODEL = "reward_model"  # the learned reward's name


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """How all checkpoints are evaluated.

  Attributes:
    prompts: number of prompts of the test split, for GenEval; all categories have equally many.
    ta_prompts: number of the first of these, for TA.
    images: images per prompt.
    seed: of the noise; it is the same for all checkpoints, so that they can be compared by prompt.
    reward_model: name or folder of the learned reward; "": none.
  """

  prompts: int
  ta_prompts: int
  images: int
  seed: int
  reward_model: str

  @property
  def name(self) -> str:
    """Identifies the benchmark in names of folders."""
    return f"{self.prompts}x{self.images}_{self.seed}"

  def command(
    self, checkpoint: str, modes: Sequence[str], out: pathlib.Path, points: bool = False
  ) -> list[str]:
    """The command that evaluates a checkpoint.

    Args:
      checkpoint: folder of the model.
      modes: of the evaluation.
      out: folder of the results.
      points: whether the learned reward also answers exam points.
    """
    names = [f"{measured.PREFIX}{name}" for name in ("strict", "soft", "geneval", "points")]
    if any(mode.startswith("think") for mode in modes):
      names.append(f"{measured.PREFIX}reasoning")
    options: dict[str, Any] = {}
    judged: list[str] = []
    if self.reward_model:
      names.append(REWARD_MODEL)
      options[REWARD_MODEL] = {"folder": self.reward_model}
      judged = [f"--points_judge={self.reward_model}"] if points else []
    return [
      sys.executable, "-m", "unigrpo_jax.evaluate", f"--checkpoint={checkpoint}", f"--out={out}",
      f"--prompts={self.prompts}", f"--samples={self.images}", f"--seed={self.seed}",
      "--overwrite", "--modes", *modes, "--rewards", *names,
      f"--reward_options={json.dumps(options)}", *judged,
    ]


def read(folder: pathlib.Path) -> tuple[results_lib.Row, ...]:
  """The rows of a finished evaluation; () where there is none."""
  return _read(folder) if (folder / results_lib.FINISHED).exists() else ()


@functools.lru_cache(maxsize=128)
def _read(folder: pathlib.Path) -> tuple[results_lib.Row, ...]:
  _, rows = results_lib.read(folder)
  return tuple(rows)


def of_seeds(
  by_seed: Sequence[Sequence[results_lib.Row]], thinks: bool, guided: bool, ta_prompts: int,
  reference: Sequence[Sequence[results_lib.Row]] | None = None,
) -> dict[str, Any]:
  """The scores of a row of the tables: of one method in one mode, over its seeds.

  Means are over seeds, images and prompts. Their standard errors are over prompts: images of all
  seeds count as further images of their prompt. Besides, "by_seed" has the score of each seed, and
  "across_seeds" their mean and half the width of its t interval. The two are never mixed.

  Args:
    by_seed: rows of each seed's evaluation.
    thinks, guided: the mode.
    ta_prompts: see `Benchmark`.
    reference: rows of each seed of the method to compare with, whose mode with thinking and the
      same guidance is used; differences are paired by prompt. None: there are none.
  """
  chosen = [_of_mode(rows, thinks, guided) for rows in by_seed]
  pooled = [row for rows in chosen for row in rows]
  exam = lambda rows: [row for row in rows if row.number is None or row.number < ta_prompts]
  official = measured.summary(pooled, "geneval")
  made: dict[str, Any] = {
    "ta": _clustered(exam(pooled), "points"),
    "geneval": official.overall, "categories": official.tasks,
    "strict": measured.summary(pooled, "strict").overall,
    "reward": _clustered(pooled, REWARD_MODEL),
    "images_dropped": sum(math.isnan(measured.reward(row, "points")) for row in exam(pooled)),
    "by_seed": {
      "ta": [_clustered(exam(rows), "points").mean for rows in chosen],
      "geneval": [measured.summary(rows, "geneval").overall.mean for rows in chosen],
      "reward": [_clustered(rows, REWARD_MODEL).mean for rows in chosen],
    },
  }
  made["across_seeds"] = {
    name: dict(zip(("mean", "half"), intervals.across_seeds(values)))
    for name, values in made["by_seed"].items()
  }
  if reference is not None:
    other = [row for rows in reference for row in _of_mode(rows, True, guided)]
    made["difference"] = {
      "ta": intervals.paired(_means(exam(pooled), "points"), _means(exam(other), "points")),
      "geneval": _paired_categories(pooled, other),
    }
  return made


def _of_mode(rows: Sequence[results_lib.Row], thinks: bool, guided: bool) -> list[results_lib.Row]:
  name = evaluation.Mode(thinks, guided).name
  return [row for row in rows if row.mode == name]


def _clustered(rows: Sequence[results_lib.Row], name: str) -> intervals.Estimate:
  return intervals.clustered(*_scores(rows, name))


def _means(rows: Sequence[results_lib.Row], name: str) -> dict[Any, float]:
  return intervals.prompt_means(*_scores(rows, name))


def _scores(rows: Sequence[results_lib.Row], name: str) -> tuple[list[float], list[int | None]]:
  """(a reward, NaN where it is missing; the prompt's number) of each row."""
  return [measured.reward(row, name) for row in rows], [row.number for row in rows]


def _paired_categories(
  a: Sequence[results_lib.Row], b: Sequence[results_lib.Row]
) -> intervals.Estimate:
  """The difference a - b of GenEval's overall scores: the mean of the categories' differences."""
  parts = []
  for category in dict.fromkeys(row.category for row in a):
    of_a, of_b = ([row for row in rows if row.category == category] for rows in (a, b))
    parts.append(intervals.paired(_means(of_a, "geneval"), _means(of_b, "geneval")))
  return intervals.mean_of(parts)


def identity(
  training: runs.Training | None, model: str, benchmark: Benchmark, which: str
) -> dict[str, Any]:
  """What was evaluated: hashes of checkpoint and config, seed, step and noise.

  Args:
    training: None for a checkpoint that no run of the comparison made.
    model: folder of the checkpoint.
    benchmark: how it was evaluated.
    which: `runs.LAST` or `runs.BEST`.
  """
  return {
    "checkpoint": runs.fingerprint(model), "noise_seed": benchmark.seed,
  } | ({} if training is None else {
    "seed": training.seed, "config": training.config_hash(), "step": training.step(which),
    "learning_rate_factor": training.rate,
  })


def agreement(folder: pathlib.Path) -> dict[str, Any]:
  """{mode: agreement of verifier and learned reward on exam points, see `ta.Agreement`}."""
  path = folder / "benchmarks.json"
  record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  return {
    mode: of["ta"]["agreement"] for mode, of in record.items() if "agreement" in of.get("ta", {})
  }
