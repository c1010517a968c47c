"""Confidence intervals and standard errors of mean scores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
import json
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95  # Probability of the interval.
NORMAL = 1.96  # Standard errors from the mean to an end of the normal interval.
EQUAL = 1e-6  # Relative difference of equal values: rewards are rounded to float32.


def interval(values: Sequence[float]) -> tuple[float, float, float]:
  """The mean of independent values and its 95 % interval, by one method for all data.

  To the n values, half a value is added at each end of their range [a, b]. With m the mean and s^2
  the variance (ddof 0) of these n + 1 values, the interval is the central 95 % of the beta
  distribution on [a, b] with mean m and variance s^2 / (n + 2), extended to the mean of the n
  values if it does not contain it.

  For 0/1 values that is Jeffreys's interval, Beta(k + 1/2, n - k + 1/2) for k ones (Brown, Cai and
  DasGupta 2001, "Interval Estimation for a Binomial Proportion"). For other values it has the first
  two moments of the Bayesian bootstrap (Rubin 1981) of these values, and approaches the normal
  interval as n grows. It never leaves [a, b], so it is too narrow for fewer than about 10 values
  other than 0/1. Equal values show no range: inside [0, 1] that is taken as the range, so that 0 of
  100 gives 0.000 to 0.025; outside there is no interval.

  Returns:
    (mean, low, high), low <= mean <= high. low and high are NaN for fewer than two values and for
    equal values outside [0, 1]; all three are NaN where there is no value or one is not finite.
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


# The functions below take values of images. Images of one prompt are not independent, so the unit
# of every standard error and interval is a prompt with its mean over images, m_p.


def prompt_key(prompt: str, metadata: Any) -> Hashable:
  """Identifies a prompt: equal for all its images, also if the prompt set repeats it."""
  return prompt, json.dumps(metadata, sort_keys=True)


class Estimate(NamedTuple):
  """A mean over images or prompts, its standard error (NaN for fewer than two prompts), and P."""

  mean: float
  se: float
  prompts: int


def by_prompt(values: Sequence[float], prompts: Sequence[Hashable]) -> dict[Hashable, list[float]]:
  """{prompt: values of its images}; images whose value is NaN are left out.

  Args:
    values: of the images, [N].
    prompts: of the images, [N]; images with equal entries belong to one prompt.
  """
  made: dict[Hashable, list[float]] = {}
  for value, prompt in zip(values, prompts, strict=True):
    if not math.isnan(value):
      made.setdefault(prompt, []).append(float(value))
  return made


def prompt_means(values: Sequence[float], prompts: Sequence[Hashable]) -> dict[Hashable, float]:
  """{prompt: mean over its images, m_p}; see `by_prompt`."""
  images = by_prompt(values, prompts)
  return {prompt: math.fsum(of) / len(of) for prompt, of in images.items()}


def clustered(values: Sequence[float], prompts: Sequence[Hashable]) -> Estimate:
  """The mean over all images, with SE = sd(m_p) / sqrt(P), ddof 1; arguments of `by_prompt`."""
  finite = [float(value) for value in values if not math.isnan(value)]
  means = list(prompt_means(values, prompts).values())
  se = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
  return Estimate(math.fsum(finite) / len(finite) if finite else math.nan, se, len(means))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
  """The mean of C independent means, with SE = sqrt(sum of SE_c^2) / C."""
  count = len(estimates)
  if not count:
    return Estimate(math.nan, math.nan, 0)
  return Estimate(
    math.fsum(part.mean for part in estimates) / count,
    math.sqrt(math.fsum(part.se**2 for part in estimates)) / count,
    sum(part.prompts for part in estimates),
  )


def of_mean(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
  """The 95 % interval (low, high) of the mean of C independent means, each (mean, low, high):

    low  = mean - sqrt(sum_c (mean_c - low_c)^2) / C,   high likewise

  It is no wider than the mean of the parts' intervals, so it stays in [0, 1] where they do. NaN
  where a part has no interval. Source: Zou and Donner 2008, "Construction of confidence limits
  about effect measures".
  """
  means, lows, highs = np.array(parts, float).reshape(-1, 3).T
  if not len(means):
    return math.nan, math.nan
  mean = math.fsum(means) / len(means)
  below, above = (math.sqrt(math.fsum((ends - means) ** 2)) / len(means) for ends in (lows, highs))
  # Exact arithmetic cannot leave these bounds, but rounding may.
  return max(mean - below, lows.min()), min(mean + above, highs.max())


def paired(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> Estimate:
  """The mean difference a - b over the prompts that both have; a, b as `prompt_means` returns."""
  both = [prompt for prompt in a if prompt in b]
  return clustered([a[prompt] - b[prompt] for prompt in both], both)


def bootstrap(
  statistic: Callable[[np.ndarray], float], rows: np.ndarray, *, draws: int = 10_000
) -> tuple[float, float, float]:
  """A percentile bootstrap over prompts, for statistics other than means.

  Args:
    statistic: [P, ...] rows -> float; resamples for which it is NaN are left out.
    rows: [P, ...], one per prompt.
    draws: number of resamples.

  Returns:
    (the statistic of all rows, low, high), the last two the central 95 % of the resamples.
  """
  rows = np.asarray(rows)
  if not len(rows):
    return math.nan, math.nan, math.nan
  rng = np.random.default_rng(0)
  made = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
  made = np.asarray(made)[np.isfinite(made)]
  ends = np.quantile(made, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if made.size else [math.nan] * 2
  return float(statistic(rows)), float(ends[0]), float(ends[1])


def across_seeds(values: Sequence[float]) -> tuple[float, float]:
  """(mean, half width) of n runs: t_{n-1, 0.975} sd / sqrt(n); NaN for fewer than two."""
  values = np.asarray(values, float)
  if values.size < 2:
    return float(values.mean()) if values.size else math.nan, math.nan
  t = float(scipy.stats.t.ppf((1 + LEVEL) / 2, values.size - 1))
  return float(values.mean()), t * float(values.std(ddof=1)) / math.sqrt(values.size)
