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
  return _scores(samples, lambda sample: _verify(sample)[0])


@base.register("iconworld_soft")
def soft(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32 in [0, 1]: the share of the demands that the image meets, less for extra objects.

  It is 1 exactly where `iconworld_strict` is 1; see `geneval.score`.
  """
  return _scores(samples, lambda sample: _verify(sample)[1])


@base.register("iconworld_reasoning")
def reasoning(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: 1 where the reasoning ends in the plan of a correct scene, else 0.

  The image is not looked at. No reasoning at all (text None) scores NaN.
  """
  def score(sample: base.Sample) -> float:
    if sample.text is None:
      return np.nan
    return float(plans.is_correct(sample.text, sample.metadata))
  return _scores(samples, score)


# Strict and soft scores are verified together, whichever reward is called first.
_verified: weakref.WeakKeyDictionary[base.Sample, tuple[float, float]] = weakref.WeakKeyDictionary()
_verifying = threading.Lock()


def _verify(sample: base.Sample) -> tuple[float, float]:
  """(strict, soft) of a sample."""
  with _verifying:
    if sample not in _verified:
      _verified[sample] = verifier.verify(sample.image, sample.metadata)
    return _verified[sample]


def _scores(samples: Sequence[base.Sample], score: Callable[[base.Sample], float]) -> np.ndarray:
  return np.array([score(s) if _applies(s.metadata) else np.nan for s in samples], np.float32)


def _applies(metadata: Mapping[str, Any]) -> bool:
  """Whether metadata is in GenEval's format, asks for something, and all of it is of this world."""
  if not metadata.get("include") or geneval.problem(metadata):
    return False
  return all(
    entry["class"] in scenes.KINDS
    and entry.get("color", scenes.COLORS[0]) in scenes.COLORS
    and ("position" not in entry or entry["position"][0] in riddles.RELATIONS)
    for entry in (*metadata["include"], *metadata.get("exclude", ()))
  )
