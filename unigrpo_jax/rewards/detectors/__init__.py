"""Detectors of objects behind one interface, for the reward `geneval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.rewards import making

NAMED = {"nanodet": "unigrpo_jax.rewards.detectors.nanodet:NanoDet"}


class Detector(Protocol):
  """Interface of an object detector.

  Attributes:
    name: model and weights, for reports: scores by two detectors are not comparable.
    thresholds: scores above which a detection counts, (for all of GenEval's tags but counting, for
      counting). Scales of scores differ between detectors, so each has its own pair.
    concurrent: optional; True if several threads may call it at the same time.
  """

  name: str
  thresholds: tuple[float, float]

  def __call__(self, images: Sequence[np.ndarray]) -> list[list[rules.Found]]:
    """The objects in each of N images [H, W, 3] uint8 of any sizes, in any order.

    Classes are of `classes.CLASSES`, boxes in pixels of the image, and colours `rules.UNKNOWN`. At
    least all objects above the lower threshold must be returned.
    """


def make(name: str, options: Mapping[str, Any]) -> Detector:
  """Makes a detector by its name in `NAMED`, or "module:Class"; raises InputError as `making.make`.
  """
  return making.make_part("detector", name, NAMED, options)
