"""How sure a mean of scores is."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np
import scipy.stats

LEVEL = 0.95  # Probability of the interval.
EQUAL = 1e-6  # Relative difference of equal values: rewards are rounded to float32.


def interval(values: Sequence[float]) -> tuple[float, float, float]:
  """The mean of independent rows and its 95 % interval, by one method for all data.

  The n values get half a row more at each end of their range [a, b]. With m the mean and s^2 the
  variance (ddof 0) of these n + 1 rows, the interval is the central 95 % of the beta distribution
  on [a, b] with mean m and variance s^2 / (n + 2), stretched to the values' mean if need be.

  For 0/1 values that is Jeffreys's interval, Beta(k + 1/2, n - k + 1/2) for k ones (Brown, Cai and
  DasGupta 2001, "Interval Estimation for a Binomial Proportion"). For other values it has the first
  two moments of the Bayesian bootstrap (Rubin 1981) of these rows, and tends to the normal one as n
  grows. It never leaves [a, b], and so is too narrow for fewer than about 10 values that are not
  0/1. Equal values do not show a range: they are taken for values in [0, 1] where they lie in it,
  so that 0 of 100 gives 0.000 to 0.025, and have no interval elsewhere.

  Returns:
    (mean, low, high), low <= mean <= high. low and high are NaN for fewer than two values and for
    equal ones outside [0, 1]; all three are NaN for no value or one that is not finite.
  """
  rows = np.asarray(values, float)
  if not rows.size or not np.isfinite(rows).all():
    return math.nan, math.nan, math.nan
  low, high = float(rows.min()), float(rows.max())
  mean = float(np.clip(rows.mean(), low, high)) + 0.0  # Never -0.0.
  if math.isclose(low, high, rel_tol=EQUAL):
    low, high = 0.0, 1.0
  if len(rows) < 2 or not low <= mean <= high:
    return mean, math.nan, math.nan
  unit = np.append((rows - low) / (high - low), [0.0, 1.0])
  weights = np.append(np.ones(len(rows)), [0.5, 0.5])
  m = np.average(unit, weights=weights)
  variance = np.average((unit - m) ** 2, weights=weights) / (len(rows) + 2)
  total = m * (1 - m) / variance - 1
  ends = scipy.stats.beta.interval(LEVEL, m * total, (1 - m) * total, low, high - low)
  return mean, min(mean, float(ends[0])), max(mean, float(ends[1]))
