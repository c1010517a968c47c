"""Metrics of how well scores tell yes from no, by NumPy.

Letters: N answers, z the margins (`readout.margin`), P = sigmoid(z / tau), y the right answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

BINS = 15  # number of equal bins of P
_LEAST = 1e-300  # Least probability of a point in a geometric mean.


def auc(scores: np.ndarray, yes: np.ndarray) -> float:
  """Probability that a "yes" scores higher than a "no", ties counting half; NaN without both."""
  scores, yes = np.asarray(scores), np.asarray(yes, bool)
  positive, negative = int(yes.sum()), int((~yes).sum())
  if not positive or not negative:
    return float("nan")
  ranks = scipy.stats.rankdata(scores)
  return float((ranks[yes].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(scores: np.ndarray, yes: np.ndarray) -> float:
  """sum_k (recall_k - recall_(k-1)) precision_k over the distinct scores, from the highest down.

  NaN where no answer is "yes".
  """
  order = np.argsort(-np.asarray(scores), kind="stable")
  scores, yes = np.asarray(scores)[order], np.asarray(yes, bool)[order]
  last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each distinct score
  hits = np.cumsum(yes)[last]
  if not len(yes) or not hits[-1]:
    return float("nan")
  return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))


def group_auc(scores: np.ndarray, yes: np.ndarray, group: np.ndarray) -> tuple[float, int]:
  """(mean AUC within groups, number of groups), over the groups that have both answers.

  Algorithms that compare the trajectories of a group depend on this one.
  """
  values = [auc(scores[group == g], yes[group == g]) for g in np.unique(group)]
  values = [value for value in values if not np.isnan(value)]
  return (float(np.mean(values)) if values else float("nan")), len(values)


def log_loss(z: np.ndarray, yes: np.ndarray, tau: float = 1.0) -> float:
  """Mean of -log P(right answer), nats."""
  signed = np.where(yes, 1.0, -1.0) * np.asarray(z, np.float64) / tau
  return float(np.mean(np.logaddexp(0.0, -signed)))


def best_temperature(z: np.ndarray, yes: np.ndarray) -> float:
  """The tau that minimises `log_loss`, from 1e-3 to 1e3."""
  found = scipy.optimize.minimize_scalar(
    lambda log_tau: log_loss(z, yes, np.exp(log_tau)), bounds=(-np.log(1e3), np.log(1e3)),
    method="bounded", options=dict(xatol=1e-9),
  )
  return float(np.exp(found.x))


def probability(z: np.ndarray, tau: float = 1.0) -> np.ndarray:
  """P("yes"), float64."""
  return scipy.special.expit(np.asarray(z, np.float64) / tau)


def calibration_error(p: np.ndarray, yes: np.ndarray) -> float:
  """Expected calibration error: sum over bins of P of (share of answers) |mean P - share of yes|.

  Source: Guo et al. 2017.
  """
  p, yes = np.asarray(p, np.float64), np.asarray(yes, np.float64)
  place = np.minimum((p * BINS).astype(int), BINS - 1)
  total = lambda values: np.bincount(place, values, minlength=BINS)
  return float(np.abs(total(p) - total(yes)).sum() / len(p))


def summary(z: np.ndarray, yes: np.ndarray, tau: float = 1.0) -> dict[str, float]:
  """Figures of N answers: "n", "yes" (its share), "accuracy", "auc", "brier", "log_loss", "ece"."""
  z, yes = np.asarray(z, np.float64), np.asarray(yes, bool)
  p = probability(z, tau)
  return {
    "n": len(z), "yes": float(yes.mean()), "accuracy": float(np.mean((p > 0.5) == yes)),
    "auc": auc(z, yes), "brier": float(np.mean((p - yes) ** 2)),
    "log_loss": log_loss(z, yes, tau), "ece": calibration_error(p, yes),
  }


def soft_tifa(points: Sequence[float]) -> tuple[float, float]:
  """(geometric, arithmetic) mean of the probabilities that a picture's points are met.

  Source: Soft-TIFA of GenEval 2, as in UniRL, where a probability counts at least 1e-300.
  """
  points = np.asarray(points, np.float64)
  return float(np.exp(np.log(np.maximum(points, _LEAST)).mean())), float(points.mean())
