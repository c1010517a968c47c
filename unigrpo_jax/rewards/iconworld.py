"""Rewards of the embedded world: the verifier's scores of the image, the plan's of the reasoning.

A sample whose metadata asks for nothing, or for what IconWorld does not have, gets NaN: a wrong
prompt set is no picture's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import threading
from typing import Any
import weakref

import numpy as np

from unigrpo_jax.iconworld import geneval, plans, riddles, scenes, verifier
from unigrpo_jax.rewards import base


@base.register("iconworld_strict")
def strict(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: 1 where the image shows what the prompt asks for and nothing else, else 0."""
  return _scores(samples, lambda sample: _verdict(sample)[0])


@base.register("iconworld_soft")
def soft(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32 in [0, 1]: the share of the demands that the image meets, less for extra objects.

  It is 1 exactly where `iconworld_strict` is 1; see `geneval.score`.
  """
  return _scores(samples, lambda sample: _verdict(sample)[1])


@base.register("iconworld_reasoning")
def reasoning(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: 1 where the reasoning ends in the plan of a correct scene, else 0.

  The image is not looked at. Reasoning without a plan scores 0; no reasoning at all (text None)
  scores NaN, so it never passes for wrong reasoning.
  """

  def score(sample: base.Sample) -> float:
    if sample.text is None:
      return np.nan
    return float(plans.is_correct(sample.text, sample.metadata))

  return _scores(samples, score)


# Strict and soft scores come from one look at an image, whichever reward asks first.
_verdicts: weakref.WeakKeyDictionary[base.Sample, tuple[float, float]]
_verdicts = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def _verdict(sample: base.Sample) -> tuple[float, float]:
  """(strict, soft) of a sample."""
  with _looking:
    if sample not in _verdicts:
      _verdicts[sample] = verifier.verify(sample.image, sample.metadata)
    return _verdicts[sample]


def _scores(
  samples: Sequence[base.Sample], score: Callable[[base.Sample], float]
) -> np.ndarray:
  return np.array([score(s) if _asks(s.metadata) else np.nan for s in samples], np.float32)


def _asks(metadata: Mapping[str, Any]) -> bool:
  """Whether metadata is GenEval's format, asks for something, and all of it is of this world."""
  if not metadata.get("include") or geneval.problem(metadata):
    return False
  return all(map(_known, (*metadata["include"], *metadata.get("exclude", ()))))


def _known(entry: Mapping[str, Any]) -> bool:
  """Whether an entry in GenEval's format is about things, colours and relations of this world."""
  return (
    entry["class"] in scenes.KINDS
    and entry.get("color", scenes.COLORS[0]) in scenes.COLORS
    and ("position" not in entry or entry["position"][0] in riddles.RELATIONS)
  )
