"""The TA benchmark: exam points of each prompt, answered with 0 or 1 by a judge of the image.

TA is the mean over images of the mean over an image's points, so that a prompt with two points
counts as much as one with nine (UniGRPO, arXiv 2603.23500, whose prompts and judge are not public).
Prompts come from JSON lines {"prompt": ..., "points": [...]} (`data.exam_points`), or are
IconWorld's, whose points follow from their metadata. Judge 1 is IconWorld's verifier, judge 2 a
learned reward asked point by point. What the reward `judge` scores is TA already, see `of_reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import intervals, results
from unigrpo_jax.data import exam_points
from unigrpo_jax.iconworld import points
from unigrpo_jax.rewards import iconworld

# Images, and a statement about each -> [N] probabilities of "yes"; NaN where a call failed.
Ask = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the judges answered about an image.

  Attributes:
    mode, number, k: of the image; see `results.Row`.
    points: K statements.
    verifier, judge: 1.0 or 0.0 of each, NaN where a call failed; None where that judge was not
      asked.
  """

  mode: str
  number: int | None
  k: int
  points: tuple[str, ...]
  verifier: tuple[float, ...] | None
  judge: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Summary:
  """TA by one judge.

  Attributes:
    ta: with its standard error over prompts.
    images: that count.
    dropped: images with a point that has no answer.
  """

  ta: intervals.Estimate
  images: int
  dropped: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two judges agree about the same points.

  Attributes:
    accuracy: share of points with the same answer: (value, low, high).
    kappa: Cohen's, 1 for the same answers and 0 for chance: (value, low, high).
    answers: points that both answered.
  """

  accuracy: tuple[float, float, float]
  kappa: tuple[float, float, float]
  answers: int


def of_image(answers: Sequence[float]) -> float:
  """The share of an image's points that are met; NaN where one has no answer."""
  return float(np.mean(answers)) if len(answers) else math.nan


def summary(answers: Sequence[Sequence[float]], prompts: Sequence[Hashable]) -> Summary:
  """TA of N images: the answers about each, and its prompt."""
  values = [of_image(image) for image in answers]
  dropped = sum(math.isnan(value) for value in values)
  return Summary(intervals.clustered(values, prompts), len(values) - dropped, dropped)


def of_reward(rows: Sequence[results.Row], name: str) -> Summary | None:
  """TA of the rows by a reward that is asked about exam points; None where it is not."""
  if not any("credits" in row.details.get(name, {}) for row in rows):
    return None
  return summary([[row.rewards.get(name, math.nan)] for row in rows], [row.key for row in rows])


def agreement(
  first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], prompts: Sequence[Hashable]
) -> Agreement:
  """The agreement about N images' points; 95 % intervals by a bootstrap over prompts."""
  tables: dict[Hashable, np.ndarray] = {}
  for a, b, prompt in zip(first, second, prompts, strict=True):
    table = tables.setdefault(prompt, np.zeros((2, 2)))
    for x, y in zip(a, b, strict=True):
      if not math.isnan(x + y):
        table[int(x), int(y)] += 1
  rows = np.array(list(tables.values())).reshape(-1, 2, 2)
  return Agreement(
    intervals.bootstrap(_accuracy, rows), intervals.bootstrap(_kappa, rows), int(rows.sum())
  )


def _accuracy(tables: np.ndarray) -> float:
  table = tables.sum(axis=0)
  return float(np.trace(table) / table.sum()) if table.sum() else math.nan


def _kappa(tables: np.ndarray) -> float:
  table = tables.sum(axis=0)
  if not table.sum():
    return math.nan
  table = table / table.sum()
  chance = float(table.sum(axis=0) @ table.sum(axis=1))
  return (float(np.trace(table)) - chance) / (1 - chance) if chance < 1 else math.nan


def points_of(prompt: str, metadata: Mapping[str, Any]) -> tuple[exam_points.Point, ...]:
  """The exam points of a prompt: those of its line, else IconWorld's.

  Raises:
    InputError: it has none, or one whose answer is neither yes nor no.
  """
  with errors.at(f"prompt {prompt!r}"):
    if given := exam_points.read(metadata):
      for point in given:
        if point.answer.lower() not in ("yes", "no"):
          raise errors.InputError(
            f"{errors.shown(point.question)} has the answer {point.answer!r}, and --points_judge "
            "says yes or no; use --rewards ta=judge"
          )
      return given
  if not iconworld.applies(metadata):
    raise errors.InputError(
      f"prompt {prompt!r} has no exam points; give JSON lines {{\"prompt\": ..., \"points\": "
      "[...]}} or prompts of IconWorld"
    )
  return tuple(map(exam_points.Point, points.statements(metadata)))


class Exam:
  """Answers about all images of an evaluation, whose `run` it observes; kept as details "exam" of
  their rows.

  Attributes:
    answers: so far.
  """

  def __init__(self, ask: Ask | None):
    """`ask`: judge 2, about one statement a call's row; None: the verifier alone."""
    self._ask = ask
    self.answers: list[Answers] = []

  def __call__(self, rows: Sequence[results.Row], samples: Sequence[rewards.Sample]) -> None:
    asked = [points_of(sample.prompt, sample.metadata) for sample in samples]
    judged: list[tuple[float, ...] | None] = [None] * len(samples)
    if self._ask is not None:
      judged = _split(self._ask(
        [sample.image for sample, of in zip(samples, asked) for _ in of],
        [point.question for of in asked for point in of],
      ), asked)
    for row, sample, of, judge in zip(rows, samples, asked, judged, strict=True):
      verifier, of = None, tuple(point.question for point in of)
      if not exam_points.read(sample.metadata):
        verifier = tuple(points.met(iconworld.detect(sample), sample.metadata))
      self.answers.append(Answers(row.mode, row.number, row.k, of, verifier, judge))
      row.details["exam"] = {"points": list(of)} | {
        name: [None if math.isnan(answer) else answer for answer in answers]
        for name, answers in (("verifier", verifier), ("judge", judge)) if answers is not None
      }

  def restore(self, rows: Sequence[results.Row]) -> None:
    """Takes the answers from the details of rows that were observed before."""
    for row in rows:
      kept = row.details["exam"]
      verifier, judge = (
        kept.get(name) and tuple(math.nan if a is None else a for a in kept[name])
        for name in ("verifier", "judge")
      )
      self.answers.append(
        Answers(row.mode, row.number, row.k, tuple(kept["points"]), verifier, judge)
      )

  def summaries(self, mode: str) -> dict[str, Any]:
    """{"verifier", "judge": `Summary`, "agreement"}: those that there are, of a mode's images."""
    of_mode = [answers for answers in self.answers if answers.mode == mode]
    prompts = [answers.number for answers in of_mode]
    made: dict[str, Any] = {}
    for judge in ("verifier", "judge"):
      given = [getattr(answers, judge) for answers in of_mode]
      if given and None not in given:
        made[judge] = summary(given, prompts)
    if len(made) == 2:
      made["agreement"] = agreement(
        [answers.verifier for answers in of_mode], [answers.judge for answers in of_mode], prompts
      )
    return made


def _split(
  probabilities: np.ndarray, asked: Sequence[Sequence[exam_points.Point]]
) -> list[tuple[float, ...] | None]:
  """Whether each image meets each of its points, by the likelier of yes and no."""
  said = np.where(np.isnan(probabilities), np.nan, np.asarray(probabilities) > 0.5)
  ends = np.cumsum([len(of) for of in asked])
  made: list[tuple[float, ...] | None] = []
  for of, part in zip(asked, np.split(said, ends[:-1])):
    met = [
      yes if point.answer.lower() == "yes" else 1 - yes for point, yes in zip(of, part.tolist())
    ]
    made.append(tuple(exam_points.apply_needs(of, met)))
  return made
