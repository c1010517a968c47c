"""The interval of a mean: its numbers, how often it holds the truth, and degenerate values."""

import math
import time

import numpy as np
import pytest
import scipy.stats

from unigrpo_jax.benchmarks import intervals

NAN = math.nan


@pytest.mark.parametrize(("ones", "count"), [(1, 3), (2, 3), (3, 10), (41, 600), (599, 600)])
def test_zeros_and_ones_have_jeffreys_interval(ones, count):
  values = [1.0] * ones + [0.0] * (count - ones)
  expected = scipy.stats.beta.ppf([0.025, 0.975], ones + 0.5, count - ones + 0.5)
  np.testing.assert_allclose(intervals.interval(values), (ones / count, *expected), rtol=1e-9)


def test_other_values_by_hand():
  # On [0, 1] with half a row at each end: m = (0 + 1/2 + 1 + 1/2) / 4 = 1/2, s^2 = (1/4 + 1/4 +
  # 1/8 + 1/8) / 4 = 3/16, variance 3/80, and the beta's parameters add up to 1/4 / (3/80) - 1.
  total = 17 / 3
  low, high = scipy.stats.beta.ppf([0.025, 0.975], total / 2, total / 2)
  np.testing.assert_allclose(
    intervals.interval([3.0, 5.0, 7.0]), (5, 3 + 4 * low, 3 + 4 * high), rtol=1e-9
  )


def test_the_method_does_not_jump_between_kinds_of_values():
  """A value next to 1 is as good as 1: no formula is chosen by what the values look like."""
  values = np.array([0.0] * 50 + [1.0] * 50)
  nearly = values.copy()
  nearly[-1] -= 1e-9
  np.testing.assert_allclose(intervals.interval(values), intervals.interval(nearly), atol=1e-8)


def test_units_do_not_matter():
  values = np.random.default_rng(0).lognormal(size=40)
  expected = 2.5 * np.array(intervals.interval(values)) - 7
  np.testing.assert_allclose(intervals.interval(2.5 * values - 7), expected, rtol=1e-9)


def test_many_values_have_the_normal_interval():
  values = np.random.default_rng(0).normal(0.27, 0.02, 3000)
  half = 1.96 * values.std(ddof=1) / math.sqrt(3000)
  mean, low, high = intervals.interval(values)
  np.testing.assert_allclose([mean - low, high - mean], half, rtol=0.01)


@pytest.mark.parametrize(
  ("draw", "truth"),
  [
    (lambda rng: rng.random(100) < 0.1, 0.1),
    (lambda rng: rng.choice([0, 0.25, 0.5, 1], 100, p=[0.6, 0.2, 0.1, 0.1]), 0.2),
    (lambda rng: rng.normal(30, 3, 100), 30),
  ],
)
def test_19_of_20_intervals_hold_the_true_mean(draw, truth):
  rng = np.random.default_rng(0)
  made = [intervals.interval(draw(rng)) for _ in range(1000)]
  # Standard deviation of the share: 0.007.
  assert 0.93 <= np.mean([low <= truth <= high for _, low, high in made]) <= 0.97


def test_an_interval_stays_within_the_range_and_holds_the_mean():
  rng = np.random.default_rng(0)
  for _ in range(300):
    count = int(rng.integers(2, 30))
    values = rng.choice([0.0, 1e-9, 0.5, 1.0], count, p=rng.dirichlet([0.3] * 4))
    mean, low, high = intervals.interval(values)
    assert 0 <= low <= mean <= high <= 1 and low < high
    assert not any(math.copysign(1, number) < 0 for number in (mean, low, high))


def test_a_rare_score_does_not_begin_below_zero():
  # The normal interval of these would begin at -0.006.
  mean, low, high = intervals.interval([0.0] * 99 + [0.8])
  assert 0 < low < mean < high < 0.05


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0])
def test_equal_zeros_or_ones_are_not_certain(value):
  mean, low, high = intervals.interval([value] * 100)
  # Jeffreys: of 0 in 100, up to 2.5 %; at least as far as the mean itself.
  far = scipy.stats.beta.ppf(0.975, 0.5, 100.5)
  expected = (1, 1 - far, 1) if value else (0, 0, far)
  np.testing.assert_allclose((mean, low, high), expected, rtol=1e-9)
  assert f"{mean:.3f} {low:.3f}".count("-") == 0


def test_other_equal_values():
  for values in ([0.3] * 7, [0.3] * 6 + [float(np.float32(0.3))]):
    mean, low, high = intervals.interval(values)
    assert mean == pytest.approx(0.3) and 0.1 < low < 0.25 and 0.4 < high < 0.6
  for value in (5.0, -0.25):
    np.testing.assert_array_equal(intervals.interval([value] * 7), (value, NAN, NAN))


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([], (NAN, NAN, NAN)), ([0.25], (0.25, NAN, NAN)), ([-0.0], (0.0, NAN, NAN)),
    ([0.5, NAN], (NAN, NAN, NAN)), ([0.5, math.inf], (NAN, NAN, NAN)),
  ],
)
def test_what_has_no_interval(values, expected):
  assert str(intervals.interval(values)) == str(expected)


def test_hundreds_of_values_take_milliseconds():
  values = np.random.default_rng(0).random(600)
  intervals.interval(values)
  start = time.perf_counter()
  for _ in range(20):
    intervals.interval(values)
  assert (time.perf_counter() - start) / 20 < 0.05
