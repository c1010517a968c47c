"""Image statistics of each iteration, and a warning when they leave their range as rewards rise.

A policy that games its reward degrades what the reward does not look at: colours, contrast, fine
texture, diversity.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import math
import pathlib

import numpy as np
import PIL.Image

from unigrpo_jax.benchmarks import statistics
from unigrpo_jax.runtime import hosts, metrics

NAMES = ("saturation", "sharpness", "clipped", "diversity")
PREFIX, REWARD, OUTSIDE = "images/", "reward/mean", "images/outside"
FIRST = 10  # iterations at the start of a run that define the usual range
RECENT = 5  # latest iterations, whose mean is compared with it
THUMBNAIL = 32  # pixels of the shorter side of thumbnails, whose distances are the diversity


def of_images(images: Sequence[np.ndarray], groups: Sequence[int]) -> dict[str, np.ndarray]:
  """{name of NAMES: [N] float32} of N images [H, W, 3] uint8; `groups` has each image's group.

  saturation, sharpness and clipped: see `statistics.quick`. diversity: of an image's group, the
  mean over its pairs of the root mean squared difference of their thumbnails, in [0, 1]; NaN for
  a group of one.
  """
  made = {name: np.full(len(images), np.nan, np.float32) for name in NAMES}
  thumbnails = []
  for row, image in enumerate(images):
    for name, value in statistics.quick(image).items():
      made[name][row] = value
    factor = max(min(image.shape[:2]) // THUMBNAIL, 1)
    thumbnails.append(np.asarray(PIL.Image.fromarray(image).reduce(factor), np.float32) / 255)
  for group in set(groups):
    rows = np.flatnonzero(np.asarray(groups) == group)
    of_group = np.stack([thumbnails[row] for row in rows])
    distance = statistics.diversity(of_group, [group] * len(rows))
    made["diversity"][rows] = distance / math.sqrt(of_group[0].size)
  return made


class Watch:
  """Watches the metrics of each iteration, and warns of signs that the reward is gamed.

  The usual range of a statistic goes from the lowest to the highest value of the run's first
  `FIRST` iterations, widened by its own width on either side. A warning is printed when the mean of
  the last `RECENT` iterations leaves that range while their mean reward is more than one standard
  deviation above that of the first ones. It is not repeated until the statistic has been back.
  """

  def __init__(self, log: pathlib.Path):
    """`log` is the run's metrics.jsonl, from which a resumed run reads its first iterations."""
    self._log = log
    self._first: list[Mapping[str, float]] | None = None
    self._recent: collections.deque[Mapping[str, float]] = collections.deque(maxlen=RECENT)
    self._warned: set[str] = set()

  def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
    """Takes the metrics of one iteration; may print a warning.

    Returns:
      {OUTSIDE: number of statistics outside their range while the reward is higher}, for the log;
      {} where the metrics have no image statistics.
    """
    names = [name for name in NAMES if PREFIX + name in values]
    if not names:
      return {}
    if self._first is None:
      rows = metrics.read(self._log)[0] if self._log.exists() else []
      rows = [row for row in rows if PREFIX + names[0] in row and REWARD in row]
      self._first = rows[:FIRST]
      self._recent.extend(rows[FIRST:])
    if len(self._first) < FIRST:
      self._first.append(dict(values))
      return {OUTSIDE: 0.0}
    self._recent.append(dict(values))
    before, now = self._column(self._first, REWARD), self._column(self._recent, REWARD).mean()
    rises = now > before.mean() + before.std()
    outside = set()
    for name in names if rises and len(self._recent) == RECENT else ():
      usual = self._column(self._first, PREFIX + name)
      low, high = usual.min(), usual.max()
      value = self._column(self._recent, PREFIX + name).mean()
      if not low - (high - low) <= value <= high + (high - low):
        outside.add(name)
        if name not in self._warned:
          hosts.print_first(
            f"warning: {PREFIX}{name} is {value:.3g}, {low:.3g} to {high:.3g} in the first {FIRST} "
            f"iterations, while {REWARD} rose from {before.mean():.3g} to {now:.3g}: look at the "
            "pictures, and at a reward of weight 0"
          )
    self._warned = outside
    return {OUTSIDE: float(len(outside))}

  @staticmethod
  def _column(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    return np.array([row.get(name, math.nan) for row in rows], float)
