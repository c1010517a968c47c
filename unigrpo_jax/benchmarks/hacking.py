"""Reward hacking: the reward that trains goes on rising while a score that only measures falls.

Of the same pictures of an evaluation, R is the reward that trains and V the score that is only
logged, such as IconWorld's verifier.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import math
from typing import NamedTuple, Protocol

import numpy as np

from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.reward_models import metrics

REWARD = "reward"  # name of the weighted sum in evaluations


class Picture(Protocol):
  """A picture of an evaluation, as `results.Row`."""

  @property
  def rewards(self) -> dict[str, float]: ...

  @property
  def key(self) -> Hashable: ...


class Evaluation(NamedTuple):
  """Scores of the pictures of one evaluation. What cannot be computed is NaN."""

  step: int
  reward: float  # mean of R
  score: float  # mean of V
  half_width: float  # half the 95 % interval of V's mean, over prompts
  # Of V that is 0 or 1:
  auc: float  # probability that a picture with V = 1 has the higher R
  # And of R within [0, 1]:
  false_yes: float  # share of V = 0 among R > 1/2
  ece: float  # expected calibration error of R
  group_std: float  # standard deviation of R within a prompt (ddof 0), averaged over prompts


class Verdict(NamedTuple):
  """What a run's evaluations say of V; each place is a step with the mean of V there."""

  onset: int | None  # see `verdict`; None where the reward was not hacked
  peak: tuple[int, float]  # the first one with the highest V: the checkpoint that V would choose
  chosen: tuple[int, float]  # the last one with the highest R: the checkpoint that R chooses
  end: tuple[int, float]


def evaluation(step: int, pictures: Sequence[Picture], name: str) -> Evaluation | None:
  """Reads the pictures of an evaluation after `step` steps.

  Args:
    step: optimizer steps or iterations taken.
    pictures: of one mode.
    name: of V.

  Returns:
    The evaluation, of the pictures that have both scores; None where there is none.
  """
  finite = lambda picture, which: math.isfinite(picture.rewards.get(which, math.nan))
  both = [one for one in pictures if finite(one, REWARD) and finite(one, name)]
  if not both:
    return None
  keys = [one.key for one in both]
  reward, score = (np.array([one.rewards[which] for one in both]) for which in (REWARD, name))
  estimate = intervals.clustered(score, keys)
  auc = false_yes = ece = math.nan
  if np.isin(score, (0.0, 1.0)).all():
    auc = metrics.auc(reward, score == 1)
    if reward.min() >= 0 and reward.max() <= 1:
      said_yes = score[reward > 0.5]
      false_yes = float(np.mean(said_yes == 0)) if said_yes.size else math.nan
      ece = metrics.calibration_error(reward, score == 1)
  spreads = [np.std(of) for of in intervals.by_prompt(reward, keys).values() if len(of) > 1]
  return Evaluation(
    step, float(reward.mean()), estimate.mean, intervals.NORMAL * estimate.se, auc, false_yes, ece,
    float(np.mean(spreads)) if spreads else math.nan,
  )


def verdict(evaluations: Sequence[Evaluation]) -> Verdict:
  """Whether and when the reward was hacked, and what a checkpoint's choice costs.

  The onset is the first evaluation at which V is below its highest value so far by more than half
  its 95 % interval, while R is at its highest so far.

  Args:
    evaluations: of a run, in order, at least one.
  """
  onset, most_reward, most_score = None, -math.inf, -math.inf
  for one in evaluations:
    most_reward, most_score = max(most_reward, one.reward), max(most_score, one.score)
    fell = one.score < most_score - one.half_width
    if onset is None and fell and one.reward >= most_reward:
      onset = one.step
  place = lambda one: (one.step, one.score)
  return Verdict(
    onset, place(max(evaluations, key=lambda one: one.score)),
    place(max(evaluations, key=lambda one: (one.reward, one.step))), place(evaluations[-1]),
  )
