"""Detectors of objects behind one interface, for the reward `geneval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.rewards import base

NAMED = {"nanodet": "unigrpo_jax.rewards.detectors.nanodet:NanoDet"}


class Detector(Protocol):
  """What finds objects in pictures.

  Attributes:
    name: model and weights, for results: scores of two detectors are not comparable.
    thresholds: scores above which an object counts: for all of GenEval's tags but counting, and for
      counting. A score is the detector's own measure, so each has its own pair.
  An optional `concurrent` is true where several threads may call it at once.
  """

  name: str
  thresholds: tuple[float, float]

  def __call__(self, images: Sequence[np.ndarray]) -> list[list[rules.Found]]:
    """The objects of each of N images [H, W, 3] uint8, of any sizes.

    Their classes are of `classes.CLASSES`, their boxes in pixels of the image, their colours
    `rules.UNKNOWN`, in any order, at least all above the lower threshold.
    """


def make(name: str, options: Mapping[str, Any]) -> Detector:
  """A detector by its name in `NAMED`, or "module:Class", with its options; or InputError."""
  return base.make_part("detector", name, NAMED, options)
