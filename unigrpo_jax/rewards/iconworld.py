"""Rewards of IconWorld: the verifier scores the image, the plan checker the reasoning.

A sample whose metadata asks for nothing, or for what IconWorld does not have, scores NaN: a wrong
prompt set must not count as a bad picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import threading
from typing import Any
import weakref

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import plans, points, riddles, scenes, scoring, verifier
from unigrpo_jax.rewards import base, making

REWARDS = ("strict", "soft", "geneval", "points", "reasoning")


@making.register("iconworld_strict")
def strict(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: 1 where the image shows exactly what the prompt asks for, else 0."""
  return _scores(samples, lambda sample: scoring.score(detect(sample), sample.metadata)[0])


@making.register("iconworld_soft")
def soft(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32 in [0, 1]: the share of the prompt's demands that are met, less for extra objects.

  It is 1 exactly where `iconworld_strict` is 1; see `scoring.score`.
  """
  return _scores(samples, lambda sample: scoring.score(detect(sample), sample.metadata)[1])


@making.register("iconworld_geneval")
def official(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: GenEval's verdict, 1 or 0, which ignores objects that were not asked for."""
  return _scores(
    samples, lambda sample: float(rules.verify_geneval(detect(sample), sample.metadata))
  )


@making.register("iconworld_points")
def exam(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32 in [0, 1]: the share of the exam points that the image meets; see `points`."""
  return _scores(
    samples, lambda sample: float(np.mean(points.met(detect(sample), sample.metadata)))
  )


@making.register("iconworld_reasoning")
def reasoning(samples: Sequence[base.Sample]) -> np.ndarray:
  """[N] float32: 1 where the reasoning ends in the plan of a correct scene, else 0.

  The image does not matter. A sample without a reasoning (text None) scores NaN.
  """
  def score(sample: base.Sample) -> float:
    if sample.text is None:
      return np.nan
    return float(plans.is_correct(sample.text, sample.metadata))
  return _scores(samples, score)


def score(samples: Sequence[base.Sample]) -> dict[str, np.ndarray]:
  """{name: [N] float32} of all `REWARDS`, without their prefix "iconworld_"."""
  return {name: making.make(f"iconworld_{name}")(samples) for name in REWARDS}


# What was detected in each sample: its rewards share it, whichever is called first.
_detected: weakref.WeakKeyDictionary[base.Sample, list[rules.Found]] = (
  weakref.WeakKeyDictionary()
)
_detecting = threading.Lock()


def detect(sample: base.Sample) -> list[rules.Found]:
  """`verifier.detect` of a sample's image, computed once per sample."""
  with _detecting:
    if sample not in _detected:
      _detected[sample] = verifier.detect(sample.image)
    return _detected[sample]


def _scores(samples: Sequence[base.Sample], score: Callable[[base.Sample], float]) -> np.ndarray:
  return np.array([score(s) if applies(s.metadata) else np.nan for s in samples], np.float32)


def applies(metadata: Mapping[str, Any]) -> bool:
  """Whether metadata is in GenEval's format and asks for something, all of which IconWorld has."""
  if not metadata.get("include") or rules.problem(metadata):
    return False
  return all(
    entry["class"] in scenes.KINDS
    and entry.get("color", scenes.COLORS[0]) in scenes.COLORS
    and ("position" not in entry or entry["position"][0] in riddles.RELATIONS)
    for entry in (*metadata["include"], *metadata.get("exclude", ()))
  )
