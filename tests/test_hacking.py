"""When a reward counts as hacked, and how well it tells right pictures, by hand-worked numbers."""

import math
import types

import pytest

from unigrpo_jax.benchmarks import hacking


def runs(rewards, scores, half_width=0.05):
  """Evaluations of a run, every 10 iterations."""
  return [
    hacking.Evaluation(10 * number, reward, score, half_width, *[math.nan] * 4)
    for number, (reward, score) in enumerate(zip(rewards, scores, strict=True))
  ]


def test_the_onset_is_a_fall_of_the_score_at_the_highest_reward():
  rising = [0.5, 0.6, 0.7, 0.8]
  assert hacking.verdict(runs(rising, [0.4, 0.5, 0.44, 0.40])) == (
    20, (10, 0.5), (30, 0.40), (30, 0.40))
  # Within half the interval of the highest so far, from which it is counted.
  assert hacking.verdict(runs(rising, [0.4, 0.5, 0.46, 0.455])).onset is None
  assert hacking.verdict(runs(rising, [0.5, 0.47, 0.46, 0.44])).onset == 30
  # Both fall: that is no hacking. It is, once the reward has its highest value again, or equals it.
  assert hacking.verdict(runs([0.5, 0.6, 0.4, 0.3], [0.4, 0.5, 0.3, 0.2])).onset is None
  assert hacking.verdict(runs([0.5, 0.6, 0.4, 0.6], [0.4, 0.5, 0.3, 0.2])).onset == 30
  # One evaluation, and an interval that is not known, are no ground for it.
  assert hacking.verdict(runs([0.5], [0.4])).onset is None
  assert hacking.verdict(runs(rising, [0.4, 0.5, 0.1, 0.1], math.nan)).onset is None


def test_what_the_reward_and_the_score_would_choose():
  found = hacking.verdict(runs([0.5, 0.7, 0.7, 0.6], [0.4, 0.5, 0.3, 0.5]))
  assert found.chosen == (20, 0.3)  # of equal ones the later, as a run's best checkpoint
  assert found.peak == (10, 0.5) and found.end == (30, 0.5)


def picture(key, reward, score):
  return types.SimpleNamespace(key=key, rewards={"reward": reward, "strict": score})


def test_an_evaluation_by_hand():
  """Two prompts with two pictures each; R > 1/2 for three of them, of which one is wrong."""
  pictures = [
    picture("a", 0.9, 1), picture("a", 0.7, 0), picture("b", 0.6, 1), picture("b", 0.2, 0),
    picture("b", math.nan, 1), picture("c", 0.5, math.nan),
    types.SimpleNamespace(key="d", rewards={}),
  ]
  found = hacking.evaluation(7, pictures, "strict")
  assert found.step == 7 and found.reward == pytest.approx(0.6) and found.score == 0.5
  assert found.half_width == 0  # the mean of each prompt is 1/2
  assert found.auc == 3 / 4  # of the four pairs only (0.6, 0.7) is the wrong way round
  assert found.false_yes == 1 / 3
  # Four bins with a picture each: |0.9 - 1|, |0.7 - 0|, |0.6 - 1|, |0.2 - 0|.
  assert found.ece == pytest.approx((0.1 + 0.7 + 0.4 + 0.2) / 4)
  assert found.group_std == pytest.approx((0.1 + 0.2) / 2)


def test_the_interval_is_over_prompts():
  pictures = [picture(key, 0.5, score) for key, score in (("a", 1), ("a", 1), ("b", 0), ("c", 0))]
  # Means 1, 0, 0: their standard deviation is 1 / sqrt(3).
  assert hacking.evaluation(0, pictures, "strict").half_width == pytest.approx(1.96 / 3)
  assert math.isnan(hacking.evaluation(0, pictures[:2], "strict").half_width)


def test_what_needs_right_and_wrong_or_a_probability_is_left_out():
  soft = hacking.evaluation(0, [picture("a", 0.5, 0.3), picture("b", 0.6, 1.0)], "strict")
  assert soft.score == 0.65 and all(map(math.isnan, (soft.auc, soft.false_yes, soft.ece)))
  free = hacking.evaluation(0, [picture("a", -3.0, 0.0), picture("b", 2.0, 1.0)], "strict")
  assert free.auc == 1 and math.isnan(free.false_yes) and math.isnan(free.group_std)
  none = hacking.evaluation(0, [picture("a", 0.1, 0.0), picture("b", 0.2, 1.0)], "strict")
  assert math.isnan(none.false_yes)  # it calls nothing right
  assert hacking.evaluation(0, [picture("a", 0.1, math.nan)], "strict") is None
  assert hacking.evaluation(0, [], "strict") is None
