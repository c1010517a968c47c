"""The TA benchmark: a judge answers yes or no to each exam point of a prompt about its image.

TA is the mean over images of the share of an image's points that are met, so that a prompt with two
points counts as much as one with nine (UniGRPO, arXiv 2603.23500, whose prompts and judge are not
public). Points come with the prompts, as JSON lines {"prompt": ..., "points": [...]}
(`data.exam_points`), or follow from the metadata of IconWorld's prompts. There are two judges:
IconWorld's verifier, and a learned reward that is asked about one point at a time. The score of the
reward `judge` is TA by itself; see `of_reward`.
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

# (N images, N questions, one about each) -> probabilities of "yes", [N]; NaN where a call failed.
Ask = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Answers:
  """The judges' answers about one image.

  Attributes:
    mode, prompt: of the image; the `mode` and `key` of its `results.Row`.
    points: the K questions or statements.
    verifier, judge: answers of the verifier and of the learned reward, [K]: 1.0 where the point is
      met, 0.0 where not, NaN where a call failed; None where that judge was not asked.
  """

  mode: str
  prompt: Hashable
  points: tuple[str, ...]
  verifier: tuple[float, ...] | None
  judge: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Summary:
  """TA by one judge.

  Attributes:
    ta: the mean over images, with its standard error over prompts.
    images: number of images that count.
    dropped: number of images left out because a point has no answer.
  """

  ta: intervals.Estimate
  images: int
  dropped: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two judges agree about the same points.

  Attributes:
    accuracy: share of points with equal answers, as (value, low, high).
    kappa: Cohen's kappa, as (value, low, high): 1 for equal answers, 0 for agreement by chance.
    answers: number of points that both answered.
  """

  accuracy: tuple[float, float, float]
  kappa: tuple[float, float, float]
  answers: int


def of_image(answers: Sequence[float]) -> float:
  """The share of an image's points that are met; NaN where one has no answer."""
  return float(np.mean(answers)) if len(answers) else math.nan


def summary(answers: Sequence[Sequence[float]], prompts: Sequence[Hashable]) -> Summary:
  """TA of N images, from the answers about each image [N][K] and the images' prompts [N]."""
  values = [of_image(image) for image in answers]
  dropped = sum(math.isnan(value) for value in values)
  return Summary(intervals.clustered(values, prompts), len(values) - dropped, dropped)


def of_reward(rows: Sequence[results.Row], name: str) -> Summary | None:
  """TA of rows by a reward that asks about exam points itself; None if reward `name` does not."""
  if not any("credits" in row.details.get(name, {}) for row in rows):
    return None
  return summary([[row.rewards.get(name, math.nan)] for row in rows], [row.key for row in rows])


def agreement(
  first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], prompts: Sequence[Hashable]
) -> Agreement:
  """The agreement of two judges about N images' points, with intervals by bootstrap over prompts.

  Args:
    first, second: answers of each judge, [N][K].
    prompts: of the images, [N].
  """
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
  """The exam points of a prompt: those in its metadata, else those of IconWorld.

  Raises:
    InputError: it has none, or one whose expected answer is neither yes nor no.
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
  """An observer of `Evaluation.run` that has judges answer the exam points of every image.

  It also keeps the answers in the rows, as `Row.details["exam"]`.

  Attributes:
    answers: of the images so far.
  """

  def __init__(self, ask: Ask | None):
    """`ask`: the learned reward; None: IconWorld's verifier is the only judge."""
    self._ask = ask
    self.answers: list[Answers] = []

  def __call__(self, rows: Sequence[results.Row], samples: Sequence[rewards.Sample]) -> None:
    """Judges the images of one batch; see `results.Observe`."""
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
      self.answers.append(Answers(row.mode, row.key, of, verifier, judge))
      row.details["exam"] = {"points": list(of)} | {
        name: [None if math.isnan(answer) else answer for answer in answers]
        for name, answers in (("verifier", verifier), ("judge", judge)) if answers is not None
      }

  def restore(self, rows: Sequence[results.Row]) -> None:
    """Takes over the answers in rows that an interrupted run observed."""
    for row in rows:
      kept = row.details["exam"]
      verifier, judge = (
        kept.get(name) and tuple(math.nan if a is None else a for a in kept[name])
        for name in ("verifier", "judge")
      )
      self.answers.append(
        Answers(row.mode, row.key, tuple(kept["points"]), verifier, judge)
      )

  def summaries(self, mode: str) -> dict[str, Any]:
    """{"verifier": `Summary`, "judge": `Summary`, "agreement": `Agreement`} of a mode's images.

    Without judges that were not asked about all images.
    """
    of_mode = [answers for answers in self.answers if answers.mode == mode]
    prompts = [answers.prompt for answers in of_mode]
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
  """For each image, whether it meets each of its points: 1.0 or 0.0, NaN without an answer.

  The likelier of yes and no is compared with the expected answer; `probabilities` are of "yes", of
  all images' points in order.
  """
  said = np.where(np.isnan(probabilities), np.nan, np.asarray(probabilities) > 0.5)
  ends = np.cumsum([len(of) for of in asked])
  made: list[tuple[float, ...] | None] = []
  for of, part in zip(asked, np.split(said, ends[:-1])):
    met = [
      yes if point.answer.lower() == "yes" else 1 - yes for point, yes in zip(of, part.tolist())
    ]
    made.append(tuple(exam_points.apply_needs(of, met)))
  return made
