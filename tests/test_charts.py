"""Charts: binning, ticks, labels, scales, and where a value lands in the picture."""

import math
import re

import pytest

from unigrpo_jax.tools.report import charts

NAN = math.nan


def test_bins_are_means_with_their_extremes_and_gaps_stay():
  """Worked by hand: five values into three bins of two, two and one; NaN counts nowhere."""
  series = [(1, 2.0), (2, 4.0), (3, NAN), (4, NAN), (5, 7.0)]
  first, gap, last = charts.binned(series, 3, "step")
  assert first == (1.5, 3.0, 2.0, 4.0, "steps 1 to 2: mean 3, 2 to 4")
  assert gap.x == 3 and math.isnan(gap.y) and gap.hover == ""
  assert last == (5.0, 7.0, 7.0, 7.0, "step 5: 7")
  assert [p.y for p in charts.binned(series[:2], 2)] == [2.0, 4.0]
  assert charts.binned([(1, 1.0), (2, NAN)], 1)[0].y == 1.0 and charts.binned([], 3) == []


@pytest.mark.parametrize("count", [1, 7, 599, 600, 601, 5000, 100_003])
def test_bins_never_exceed_the_limit_and_keep_the_mean(count):
  points = charts.binned([(step, float(step)) for step in range(count)], 600)
  assert count / 600 <= len(points) <= min(count, 600)
  assert points[0].low == 0 and points[-1].high == count - 1


@pytest.mark.parametrize("low, high, want", [
  (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
  (0.13, 0.58, [0.2, 0.3, 0.4, 0.5]),
  (-250, 900, [-200, 0, 200, 400, 600, 800]),
  (0, 3e-6, [0, 5e-7, 1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6]),
  (2, 2, [2]),
])
def test_ticks_are_round_numbers_inside_the_range(low, high, want):
  assert charts.ticks(low, high) == pytest.approx(want, rel=1e-12)


def test_logarithmic_ticks_are_powers_of_ten_or_finer_where_there_is_no_room():
  assert charts.log_ticks(3e-7, 2e-3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
  assert charts.log_ticks(1e-9, 1e3) == pytest.approx([1e-9, 1e-6, 1e-3, 1.0, 1e3])
  assert charts.log_ticks(1.5, 30) == pytest.approx([2, 5, 10, 20])


def test_labels_count_from_a_base_where_the_values_hardly_differ():
  assert charts.labels([0.999999, 1, 1.000001]) == (["-1e-06", "0", "+1e-06"], "1")
  assert charts.labels([0, 5e-7, 1e-6]) == (["0", "5e-07", "1e-06"], "")
  assert charts.labels([0, 20_000, 40_000]) == (["0", "20k", "40k"], "")


@pytest.mark.parametrize("value, want", [
  (0.12345, "0.1235"), (1.0, "1"), (1 + 2e-7, "1 + 2e-07"), (0.9999, "1 − 0.0001"), (NAN, "–"),
])
def test_numbers_for_people(value, want):
  assert charts.shown(value) == want


def test_a_scale_maps_its_ends_and_its_middle():
  linear = charts.Scale(10, 20, 100, 0)
  assert [linear(v) for v in (10, 15, 20)] == [100, 50, 0]
  log = charts.Scale(1e-6, 1e-2, 0, 100, log=True)
  assert [log(v) for v in (1e-6, 1e-4, 1e-2)] == pytest.approx([0, 50, 100])
  assert charts.Scale(3, 3, 0, 100)(3) == 50


def test_an_axis_of_what_is_never_negative_does_not_go_below_zero():
  assert charts.span([0.0, 1.0]) == pytest.approx((0.0, 1.06))
  assert charts.span([-1.0, 1.0]) == pytest.approx((-1.12, 1.12))
  assert charts.span([1.0]) == pytest.approx((0.9, 1.1)) and charts.span([0.0]) == (0.0, 1.0)


def _draw(points, **more):
  lines = [charts.Line("a", points, **more)]
  return charts.line_chart(lines, x_range=(0, 10), x_label="step", title="t", width=400, height=200)


def _coordinates(path):
  return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def test_a_line_lies_where_its_values_say_and_breaks_at_a_gap():
  series = [(0, 0.0), (5, 1.0), (6, NAN), (8, 1.0), (10, 0.0)]
  svg = _draw(charts.binned(series, 100))
  first, second = (_coordinates(d) for d in re.findall('class="line" d="([^"]*)"', svg))
  left, right = charts.LEFT, 400 - charts.RIGHT
  assert [x for x, _ in first] == [left, (left + right) / 2]
  assert second[-1][0] == right
  bottom, top = first[0][1], first[1][1]
  # 0 lies on the axis; 1 lies 6 % below the top of the plot.
  assert bottom == 200 - charts.BOTTOM
  assert top == pytest.approx(bottom - (bottom - charts.TOP) / 1.06, abs=0.1)
  assert svg.count("<title>step") == 4 and "<title>step 5: 1</title>" in svg


def test_marks_have_their_interval_and_text_is_escaped():
  svg = _draw([charts.Point(5, 0.5, 0.25, 0.75, "<think> & 0.5")], marks=True)
  assert "<title>&lt;think&gt; &amp; 0.5</title>" in svg and svg.count("<circle") == 1
  [(low, high)] = re.findall(r'class="thin" d="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)
  middle = float(re.search(r'cy="([\d.]+)"', svg)[1])
  assert middle == pytest.approx((float(low) + float(high)) / 2, abs=0.1)


def test_nothing_to_draw_is_a_sentence():
  assert "no finite value" in _draw([charts.Point(1, NAN, NAN, NAN, "")])
  empty = charts.stacked_chart([], [("a", [])], [], x_range=(0, 1), x_label="", title="")
  assert "no finite value" in empty


def test_stacked_bars_stand_on_each_other():
  """Two bars of 1 + 3 and 2 + 2: all of both reach 4, and the first part's tops differ."""
  svg = charts.stacked_chart(
    [1, 2], [("a", [1, 2]), ("b", [3, 2])], ["one", "two"], x_range=(1, 2), x_label="step",
    title="t", width=400, height=200,
  )
  below, above = (
    [tuple(map(float, bar)) for bar in re.findall(r"M[\d.]+ ([\d.]+)h[\d.]+V([\d.]+)h", path)]
    for path in re.findall('class="bar c[01]" d="([^"]*)"', svg)
  )
  floor, top = 200 - charts.BOTTOM, above[0][1]
  assert [b for b, _ in below] == [floor, floor] and [b for b, _ in above] == [t for _, t in below]
  assert above[1][1] == top
  assert floor - below[0][1] == pytest.approx((floor - top) / 4, abs=0.11)
  assert floor - below[1][1] == pytest.approx((floor - top) / 2, abs=0.11)
