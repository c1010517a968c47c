"""Statistics of the images of each iteration, and a warning where a reward that rises changes them.

A reward that is gamed is paid for by what it does not look at: colours, contrast, specks, sameness.
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
FIRST = 10  # iterations of a run that say what is usual
RECENT = 5  # iterations whose mean is held against that
THUMBNAIL = 32  # pixels of the shorter side, for diversity


def of_images(images: Sequence[np.ndarray], groups: Sequence[int]) -> dict[str, np.ndarray]:
  """{name of NAMES: [N] float32} of N images [H, W, 3] uint8, each of a group.

  saturation, sharpness and clipped are those of `statistics.quick`; diversity is of the group, the
  mean over its pairs of the root of the mean squared difference, in [0, 1], of thumbnails; NaN for
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
  """Sees the metrics of each iteration, and warns.

  What is usual are the values of the run's first `FIRST` iterations, from the lowest to the
  highest, and as much again to either side. A warning is printed where the mean of the last
  `RECENT` leaves that while their reward is above the first ones' by more than their standard
  deviation; once, until it is back.
  """

  def __init__(self, log: pathlib.Path):
    """`log` is the run's metrics.jsonl, from which a resumed one knows its first iterations."""
    self._log = log
    self._first: list[Mapping[str, float]] | None = None
    self._recent: collections.deque[Mapping[str, float]] = collections.deque(maxlen=RECENT)
    self._warned: set[str] = set()

  def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
    """{OUTSIDE: how many statistics are unusual while the reward is higher}; {} without any."""
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
