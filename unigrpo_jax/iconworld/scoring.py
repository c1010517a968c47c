"""The score of an image of this world: GenEval's demands, and nothing that was not asked for."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unigrpo_jax.geneval import rules


def extra_objects(detections: Sequence[rules.Found], metadata: Mapping[str, Any]) -> int:
  """Objects beyond what `metadata` includes, unknown blobs among them."""
  wanted = collections.Counter()
  for entry in metadata.get("include", ()):
    wanted[entry["class"]] += entry["count"]
  present = collections.Counter(item.kind for item in detections)
  return (present - wanted).total()


def score(detections: Sequence[rules.Found], metadata: Mapping[str, Any]) -> tuple[float, float]:
  """The strict (0.0 or 1.0) and the soft score (in [0, 1]) of this world.

  Strict is GenEval's verdict and no extra object. Soft is the mean of the demands of include, times
  max(0, 1 - extra objects / objects asked for). It is 1 exactly where strict is and something is
  asked for.
  """
  extra = extra_objects(detections, metadata)
  strict = rules.verify_geneval(detections, metadata) and extra == 0
  included, _ = rules.demands(detections, metadata)
  wanted = sum(entry["count"] for entry in metadata.get("include", ()))
  soft = np.mean(included) * max(0.0, 1 - extra / wanted) if included else 0.0
  return float(strict), float(soft)
