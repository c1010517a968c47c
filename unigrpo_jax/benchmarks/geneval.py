"""GenEval's summary of judged images, and its table.

Source: Ghosh et al. (arXiv 2310.11513), djghosh13/geneval: `evaluation/summary_scores.py`. The
intervals and the best of N images are additions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import math

import numpy as np

from unigrpo_jax.benchmarks import intervals, markdown
from unigrpo_jax.geneval import prompts as geneval_prompts

CATEGORIES = geneval_prompts.TAGS
OVERALL, MEAN = "overall (mean of tags)", "mean of images"


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of the table: the images of one tag, or of all tags.

  Attributes:
    mean, low, high: mean of the scores and its 95 % interval over prompts; NaN where undefined.
    prompts: number of prompts with at least one judged image.
    any_right, all_right: number of prompts with one image, or all judged images, scored 1; None
      where scores are not just 0 and 1.
    images: number of judged images.
    failures: number of images without a score.
  """

  mean: float
  low: float
  high: float
  prompts: int
  any_right: int | None
  all_right: int | None
  images: int
  failures: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """GenEval's figures of N judged images.

  Attributes:
    tasks: {tag: share of its images that are correct, with the standard error over prompts}.
    overall: mean of the tags' shares, GenEval's headline figure.
    images: share of all images that are correct.
    prompts: share of prompts with a correct image; NaN where scores are not just 0 and 1.
    lines: {tag, `OVERALL` or `MEAN`: line of the table}.
    best_of: {n: mean over tags where the best of n images of each prompt counts}.
  """

  tasks: dict[Hashable, intervals.Estimate]
  overall: intervals.Estimate
  images: float
  prompts: float
  lines: dict[Hashable, Line]
  best_of: dict[int, float]

  def table(self) -> str:
    """Markdown: one line per tag, then both means; below it the figures that GenEval prints."""
    head = ["tag", "score", "95 %", "prompts", "any right", "all right", "images", "failures"]
    cells = []
    for name, line in self.lines.items():
      cells.append([
        str(name), _cell(line.mean),
        "" if math.isnan(line.low) else f"{line.low:z.3f} to {line.high:z.3f}", *(
          "" if count is None else str(count) for count in
          (line.prompts, line.any_right, line.all_right, line.images, line.failures)
        ),
      ])
    total = self.lines[MEAN]
    correct, overall = "", f"{self.overall.mean:.5f}" if total.images else "none was judged"
    if total.images and total.any_right is not None:
      correct = f"% correct images: {self.images:.2%}, % correct prompts: {self.prompts:.2%}, "
    return markdown.table(head, cells) + (
      f"\n\nTotal images: {total.images}, total prompts: {total.prompts}, {correct}Overall: "
      f"{overall}\n"
    )


def summary(
  correct: Sequence[float], tags: Sequence[Hashable], prompts: Sequence[Hashable]
) -> Summary:
  """GenEval's summary of N images.

  Args:
    correct: scores, [N]; an image whose score is NaN is a failure and counts nowhere else.
    tags: of the images, [N].
    prompts: of the images, [N]; images with equal values belong to one prompt.
  """
  correct = np.asarray(correct, float)
  tags, prompts = list(tags), list(prompts)
  found = dict.fromkeys(tags)
  order = [tag for tag in CATEGORIES if tag in found] + [t for t in found if t not in CATEGORIES]
  rows = {tag: [i for i, of in enumerate(tags) if of == tag] for tag in order}
  lines = {tag: _line(correct[of], [prompts[i] for i in of]) for tag, of in rows.items()}
  judged = {tag: lines[tag] for tag in order if lines[tag].images}
  tasks = {tag: intervals.clustered(correct[rows[tag]], [prompts[i] for i in rows[tag]])
           for tag in judged}
  total = _line(correct, prompts)
  overall = intervals.mean_of(list(tasks.values()))
  low, high = intervals.of_mean([(line.mean, line.low, line.high) for line in judged.values()])
  lines[OVERALL] = dataclasses.replace(total, mean=overall.mean, low=low, high=high)
  lines[MEAN] = total
  share = math.nan
  if total.prompts and total.any_right is not None:
    share = total.any_right / total.prompts
  by_tag = {
    tag: intervals.by_prompt(correct[rows[tag]], [prompts[i] for i in rows[tag]]) for tag in judged
  }
  return Summary(tasks, overall, total.mean, share, lines, _best_of(by_tag))


def _line(scores: np.ndarray, prompts: Sequence[Hashable]) -> Line:
  by_prompt = intervals.by_prompt(scores, prompts)
  judged = scores[~np.isnan(scores)]
  mean = float(judged.mean()) if judged.size else math.nan
  _, low, high = intervals.interval([float(np.mean(of)) for of in by_prompt.values()])
  counts: list[int | None] = [None, None]
  if set(judged.tolist()) <= {0.0, 1.0}:
    counts = [sum(map(how, by_prompt.values())) for how in (any, all)]
  # With failures, the mean over images differs from that over prompts and may leave its interval.
  return Line(
    mean, float(np.fmin(mean, low)) if low == low else math.nan,
    float(np.fmax(mean, high)) if high == high else math.nan,
    len(by_prompt), *counts, judged.size, scores.size - judged.size,
  )


def _best_of(by_tag: dict[Hashable, dict[Hashable, list[float]]]) -> dict[int, float]:
  """{n: mean over tags of the mean over prompts of the best of n images}, n = 1, 2, 4, ..., most.

  See `best_of`. Prompts with fewer than n judged images are left out; where a tag has no others,
  the mean is NaN.
  """
  most = max((len(of) for prompts in by_tag.values() for of in prompts.values()), default=0)
  numbers = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | ({most} - {0}))
  made = {}
  for n in numbers:
    tags = [
      [best_of(of, n) for of in prompts.values() if len(of) >= n] for prompts in by_tag.values()
    ]
    made[n] = float(np.mean([np.mean(values) if values else math.nan for values in tags]))
  return made


def best_of(scores: Sequence[float], n: int) -> float:
  """The expected maximum of n scores chosen at random, without replacement, from K >= n scores.

    sum_i s_(i) C(i - 1, n - 1) / C(K, n),   s_(1) <= ... <= s_(K)
  """
  ascending = sorted(scores)
  return math.fsum(
    score * math.comb(i, n - 1) for i, score in enumerate(ascending)
  ) / math.comb(len(ascending), n)


def _cell(value: float) -> str:
  return "" if math.isnan(value) else f"{value:z.4f}"


def best_of_table(reward: str, by_mode: dict[str, Summary]) -> str:
  """Markdown: one line per mode, with the mean reward of the best of n images of each prompt.

  "" where each prompt has one image.
  """
  numbers = sorted({n for made in by_mode.values() for n in made.best_of})
  if len(numbers) < 2:
    return ""
  lines = [
    [mode, *(_cell(made.best_of.get(n, math.nan)) for n in numbers)]
    for mode, made in by_mode.items()
  ]
  return markdown.table([f"{reward}, best of N", *map(str, numbers)], lines) + "\n"
