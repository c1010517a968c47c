"""Charts: binning, and where a value lands in the picture."""

import ast
import base64
import math
import pathlib
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest

from unigrpo_jax.tools.report import charts

NAN = math.nan
PACKAGE = pathlib.Path(charts.__file__).parents[2]
BLUE, ORANGE = "#2a78d6", "#eb6834"


def test_bins_are_means_with_their_extremes_and_gaps_stay():
  """Worked by hand: five values into three bins of two, two and one; NaN counts nowhere."""
  series = [(1, 2.0), (2, 4.0), (3, NAN), (4, NAN), (5, 7.0)]
  line = charts.binned(series, 3)
  np.testing.assert_array_equal(line, [[1.5, 3.5, 5], [3, NAN, 7], [2, NAN, 7], [4, NAN, 7]])
  assert charts.binned(series[:2], 2).y.tolist() == [2.0, 4.0]
  assert charts.binned([(1, 1.0), (2, NAN)], 1).y.tolist() == [1.0]
  assert charts.binned([], 3).y.tolist() == []


@pytest.mark.parametrize("count", [1, 7, 599, 600, 601, 5000, 100_003])
def test_bins_never_exceed_the_limit_and_keep_the_extremes(count):
  line = charts.binned([(step, float(step)) for step in range(count)], 600)
  assert count / 600 <= len(line.x) <= min(count, 600)
  assert line.low[0] == 0 and line.high[-1] == count - 1


def _svg(uri):
  kind, _, data = uri.partition(",")
  assert kind == "data:image/svg+xml;base64"
  text = base64.b64decode(data).decode()
  xml.etree.ElementTree.fromstring(text)
  return text


def _draw(lines=None, intervals=None, **options):
  return _svg(charts.line_chart(lines or {}, intervals or {}, x_range=(0, 10), x_label="step",
                                **options))


def _paths(svg, style):
  """Coordinates of the paths whose style begins so, each a list of pieces of (x, y)."""
  found = re.findall(rf'<path d="([^"]*)"[^>]*style="{style}', svg)
  pieces = [re.split("M", path)[1:] for path in found]
  number = r"(-?[\d.]+) (-?[\d.]+)"
  return [
    [[(float(x), float(y)) for x, y in re.findall(number, piece)] for piece in path]
    for path in pieces
  ]


def _texts(svg):
  return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_line_lies_where_its_values_say_and_breaks_at_a_gap():
  series = [(0, 0.0), (5, 1.0), (6, NAN), (8, 1.0), (10, 0.0)]
  svg = _draw({"a": charts.binned(series, 100)})
  [[first, second]] = _paths(svg, f"fill: none; stroke: {BLUE}")
  (left, bottom), (middle, top) = first
  assert [y for _, y in second] == [top, bottom] and top < bottom
  assert second[1][0] - middle == pytest.approx(middle - left, abs=0.01)
  assert second[0][0] - left == pytest.approx(0.8 * (second[1][0] - left), abs=0.01)
  assert "step" in _texts(svg) and "a" not in _texts(svg)


def test_a_band_is_drawn_only_where_there_is_one():
  wide = charts.binned([(0, 1.0), (1, 3.0), (2, 2.0), (3, 2.0)], 2)
  assert "fill-opacity: 0.2" in _draw({"a": wide})
  assert "fill-opacity: 0.2" not in _draw({"a": charts.binned([(0, 1.0), (1, 3.0)], 2)})


def test_a_logarithmic_axis_gives_equal_ratios_equal_lengths():
  svg = _draw({"a": charts.binned([(0, 1e-6), (5, 1e-4), (10, 1e-2)], 9)}, log=True)
  [[[(_, low), (_, middle), (_, high)]]] = _paths(svg, f"fill: none; stroke: {BLUE}")
  assert low - middle == pytest.approx(middle - high, abs=0.01) and low > high


def test_intervals_reach_from_low_to_high_and_names_are_text():
  point = [np.array([value]) for value in (5, 0.5, 0.25, 0.75)]
  svg = _draw({"training": charts.binned([(0, 0.0), (10, 1.0)], 9)},
              {"<think> & so on": charts.Line(*point)})
  assert "&lt;think&gt; &amp; so on" in _texts(svg) and "training" in _texts(svg)
  [[[(_, bottom), (_, top)]]] = _paths(svg, f"fill: none; stroke: {BLUE}")[:1]
  # The line's legend is shorter; the interval is the one that is half as high as the line.
  heights = [
    piece[0][1] - piece[-1][1]
    for path in _paths(svg, f"fill: none; stroke: {ORANGE}") for piece in path
  ]
  assert any(height == pytest.approx((bottom - top) / 2, abs=0.01) for height in heights)


def test_an_interval_end_may_miss_the_mean_by_a_rounding_error():
  point = [np.array([value]) for value in (5, 0.0, 1e-17, 0.3)]
  assert "<svg" in _draw(intervals={"a": charts.Line(*point)})


def test_an_axis_of_what_is_never_negative_does_not_go_below_zero():
  for values in ((0.0, 1.0), (0.0, 0.0), (3.0, 3.0)):
    svg = _draw({"a": charts.binned(list(enumerate(values)), 9)})
    assert not any("−" in text for text in _texts(svg)), values
  assert any("−" in text for text in _texts(_draw({"a": charts.binned([(0, -1.0), (9, 1.0)], 9)})))


def test_nothing_to_draw_is_none():
  options = {"x_range": (0, 1), "x_label": "step"}
  assert charts.line_chart({}, {}, **options) is None
  assert charts.line_chart({"a": charts.binned([(1, NAN)], 9)}, {}, **options) is None
  # A single value, on an axis of a single step, is one dot.
  assert charts.line_chart({"a": charts.binned([(1, 2.0)], 9)}, {}, x_range=(1, 1), x_label="s")


def test_stacked_bars_stand_on_each_other():
  """Two bars of 1 + 3 and 2 + 2: all of both reach 4, and the first part's tops differ."""
  parts = {"a": charts.binned([(1, 1.0), (2, 2.0)], 9), "b": charts.binned([(1, 3.0), (2, 2.0)], 9)}
  svg = _svg(charts.stacked_chart(parts, x_label="step", y_label="seconds"))
  assert {"step", "seconds", "a", "b"} <= set(_texts(svg))
  (below,), (above,) = (_paths(svg, f"fill: {color}")[0] for color in (BLUE, ORANGE))
  heights = lambda path: sorted({round(y, 3) for _, y in path}, reverse=True)
  floor, one, two = heights(below)
  assert heights(above) == [one, two, heights(above)[-1]]
  assert [floor - one, floor - two] == pytest.approx(
    [(floor - heights(above)[-1]) / 4, (floor - heights(above)[-1]) / 2], abs=0.01
  )


def test_charts_are_the_same_every_time_and_leave_matplotlib_as_it_is():
  before = dict(matplotlib.rcParams)
  line = {"a": charts.binned([(0, 1.0), (1, 3.0), (2, 2.0), (3, 2.0)], 2)}
  assert _draw(line) == _draw(line)
  assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_for_reports_and_comparisons_alone():
  """It takes a second, which no other command should wait for."""
  users = {"matplotlib": set(), "unigrpo_jax.tools.report": set()}
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
      for library in users:
        if any(f"{name}.".startswith(f"{library}.") for name in names):
          users[library].add(str(path.relative_to(PACKAGE)))
  compares = "tools/compare/figures.py"
  assert users["matplotlib"] == {"tools/report/charts.py", "tools/report/figure.py", compares}
  users = users["unigrpo_jax.tools.report"]
  assert {user for user in users if not user.startswith("tools/report/")} == {"report.py", compares}
