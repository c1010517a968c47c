"""How sure a mean of scores is."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
  """Mean and its 95 % interval: Wilson's (1927) for 0/1 scores, the normal one's for others.

  Wilson, with n scores of mean p and z = 1.96:
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Returns:
    (mean, low, high); NaN for no scores.
  """
  values = np.asarray(scores, float)
  count = len(values)
  if not count:
    return math.nan, math.nan, math.nan
  mean, z = float(values.mean()), 1.96
  if np.isin(values, (0.0, 1.0)).all():
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(
      mean * (1 - mean) / count + z * z / (4 * count * count)
    )
    return mean, center - half, center + half
  half = z * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
  return mean, mean - half, mean + half
