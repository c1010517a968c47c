"""Charts as inline SVG: lines with bands, marks with intervals, stacked bars. Text in, text out.

Colours are classes (`c0` to `c7`) that the page's style sheet defines for light and for dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import html
import math
from typing import NamedTuple

COLORS = 8
# Room for labels around the plot, in units of the view box.
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 14, 40


class Point(NamedTuple):
  """A value with its band or interval; `y` is NaN where the line has a gap."""

  x: float
  y: float
  low: float
  high: float
  hover: str


@dataclasses.dataclass(frozen=True)
class Line:
  """A named series; `marks` draws points with intervals, else a line with a band."""

  name: str
  points: Sequence[Point]
  color: int = 0
  marks: bool = False


def shown(value: float) -> str:
  """A number for people: four digits, those after the 1 for a ratio close to it; a dash for NaN."""
  if not math.isfinite(value):
    return "–"
  if 0 < abs(value - 1) < 5e-4:
    sign = "−" if value < 1 else "+"
    return f"1 {sign} {abs(value - 1):.2g}"
  return f"{value:.4g}"


def binned(series: Sequence[tuple[float, float]], limit: int, unit: str = "step") -> list[Point]:
  """At most `limit` points: means of consecutive values, from their least to their largest.

  Args:
    series: (x, value) in order; a value that is not finite makes a gap where it stands alone.
    limit: most points.
    unit: name of x, for the hover text.

  Returns:
    One point per bin of equally many values; a bin's x is its middle.
  """
  size = max(1, -(-len(series) // limit))
  points = []
  for first in range(0, len(series), size):
    part = series[first : first + size]
    values = [y for _, y in part if math.isfinite(y)]
    if not values:
      points.append(Point(part[0][0], math.nan, math.nan, math.nan, ""))
      continue
    mean = math.fsum(values) / len(values)
    low, high = min(values), max(values)
    if len(part) == 1:
      hover = f"{unit} {part[0][0]:g}: {values[0]:.8g}"
    else:
      hover = (
        f"{unit}s {part[0][0]:g} to {part[-1][0]:g}: mean {mean:.8g}, {low:.8g} to {high:.8g}"
      )
    points.append(Point((part[0][0] + part[-1][0]) / 2, mean, low, high, hover))
  return points


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = min((s * power for s in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  # Rounded, so that 0.1 x 3 is 0.3.
  digits = max(0, 2 - math.floor(math.log10(step)))
  return [round(k * step, digits) for k in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Powers of ten from low to high, every n-th so that they are about `count`; 1, 2, 5 in less."""
  first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
  powers = [10.0**k for k in range(first, last + 1, max(1, -(-(last - first) // count)))]
  if len(powers) > 1:
    return powers
  fine = [s * 10.0**k for k in range(first - 1, last + 2) for s in (1, 2, 5)]
  return [t for t in fine if low <= t <= high] or [low]


def labels(values: Sequence[float]) -> tuple[list[str], str]:
  """Labels of ticks, and the base they count from where they differ only far behind the point.

  [0.999999, 1, 1.000001] -> (["-1e-06", "0", "+1e-06"], "1").
  """
  span = max(values) - min(values)
  largest = max(map(abs, values))
  if span > 0 and largest / span > 1e4:
    base = min(values, key=lambda v: len(f"{v:.12g}"))
    return [f"{v - base:+.3g}" if v != base else "0" for v in values], f"{base:.12g}"
  return [_compact(v) for v in values], ""


def _compact(value: float) -> str:
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size <= abs(value) < 1e13:
      return f"{value / (1e3 if letter == 'k' else size):.6g}{letter}"
  return f"{value:.6g}"


class Scale:
  """Maps [low, high] to [start, end], linearly or by the logarithm."""

  def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
    self.low, self.high, self.log = low, high, log
    self._start, self._end = start, end

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    part = (value - low) / (high - low) if high > low else 0.5
    return round(self._start + part * (self._end - self._start), 1)

  def ticks(self, count: int) -> list[float]:
    return (log_ticks if self.log else ticks)(self.low, self.high, count)


def span(values: Sequence[float], log: bool = False) -> tuple[float, float]:
  """The range of an axis for some finite values: a little more, but not below zero for nothing."""
  low, high = min(values), max(values)
  if log:
    return (low / 1.3, high * 1.3)
  if low == high:
    margin = abs(low) * 0.1 or 1.0
  else:
    margin = 0.06 * (high - low)
  return (max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)


def line_chart(
  lines: Sequence[Line],
  *,
  x_range: tuple[float, float],
  x_label: str,
  title: str,
  width: int = 540,
  height: int = 300,
  log: bool = False,
) -> str:
  """Lines and marks over one pair of axes.

  Args:
    lines: what to draw, the first at the back.
    x_range: first and last x of the axis.
    x_label: under the x axis.
    title: what the chart shows, for those who cannot see it.
    width, height: of the view box; the page scales it.
    log: a logarithmic y axis; values that are not positive become gaps.

  Returns:
    An <svg> element; a sentence in its place where there is no value.
  """
  good = lambda y: math.isfinite(y) and (y > 0 or not log)
  lines = [
    dataclasses.replace(line, points=[
      p if good(p.y) else p._replace(y=math.nan) for p in line.points
    ]) for line in lines
  ]
  values = [
    v for line in lines for p in line.points if good(p.y) for v in p[1:4] if good(v)
  ]
  if not values:
    return '<p class="missing">no finite value yet</p>'
  x = Scale(*x_range, LEFT, width - RIGHT)
  y = Scale(*span(values, log), height - BOTTOM, TOP, log)
  clip = lambda v: v if good(v) else y.low
  parts = [_axes(x, y, x_label, width, height)]
  for line in lines:
    draw = _marks if line.marks else _line
    parts.append(draw(line, x, lambda v: y(clip(v)), height))
  return _svg(title, width, height, parts)


def _line(line: Line, x: Scale, y: Callable[[float], float], height: int) -> str:
  """A line with gaps, its band behind it, and a strip to hover over for every point."""
  runs: list[list[Point]] = [[]]
  for point in line.points:
    if math.isfinite(point.y):
      runs[-1].append(point)
    elif runs[-1]:
      runs.append([])
  parts = []
  for run in filter(None, runs):
    if any(p.low < p.high for p in run):
      around = [(p.x, p.high) for p in run] + [(p.x, p.low) for p in reversed(run)]
      parts.append(f'<path class="band" d="M{_path(around, x, y)}z"/>')
    if len(run) == 1:
      parts.append(f'<circle class="dot" cx="{x(run[0].x)}" cy="{y(run[0].y)}" r="2"/>')
    else:
      parts.append(f'<path class="line" d="M{_path([(p.x, p.y) for p in run], x, y)}"/>')
  kept = [p for run in runs for p in run]
  parts.append(_hover([(x(p.x), p.hover) for p in kept], height))
  return f'<g class="c{line.color % COLORS}">{"".join(parts)}</g>'


def _marks(line: Line, x: Scale, y: Callable[[float], float], height: int) -> str:
  """Points with intervals, joined by a thin line."""
  points = [p for p in line.points if math.isfinite(p.y)]
  parts = []
  if len(points) > 1:
    parts.append(f'<path class="thin" d="M{_path([(p.x, p.y) for p in points], x, y)}"/>')
  for p in points:
    at = x(p.x)
    interval = f'<path class="thin" d="M{at} {y(p.low)}V{y(p.high)}"/>' if p.low < p.high else ""
    parts.append(
      f'<g class="mark"><title>{html.escape(p.hover)}</title>{interval}'
      f'<circle class="dot" cx="{at}" cy="{y(p.y)}" r="4"/></g>'
    )
  return f'<g class="c{line.color % COLORS}">{"".join(parts)}</g>'


def stacked_chart(
  xs: Sequence[float],
  parts: Sequence[tuple[str, Sequence[float]]],
  hovers: Sequence[str],
  *,
  x_range: tuple[float, float],
  x_label: str,
  title: str,
  width: int = 540,
  height: int = 300,
) -> str:
  """Bars at `xs`, one part on the other; part k has colour k and one value a bar."""
  totals = [math.fsum(values) for values in zip(*(values for _, values in parts))]
  if not totals or max(totals) <= 0:
    return '<p class="missing">no finite value yet</p>'
  # Half a bar beyond the outermost ones.
  gap = (xs[-1] - xs[0]) / (len(xs) - 1) if len(xs) > 1 else 1.0
  x = Scale(x_range[0] - gap / 2, x_range[1] + gap / 2, LEFT, width - RIGHT)
  y = Scale(0, max(totals) * 1.05, height - BOTTOM, TOP)
  size = max((x(xs[0] + gap) - x(xs[0])) * 0.92, 0.5)
  drawn, floor = [_axes(x, y, x_label, width, height)], [0.0] * len(xs)
  for color, (_, values) in enumerate(parts):
    bars = "".join(
      f"M{x(at) - size / 2:.1f} {y(base)}h{size:.1f}V{y(base + value)}h-{size:.1f}z"
      for at, base, value in zip(xs, floor, values) if value > 0
    )
    drawn.append(f'<path class="bar c{color % COLORS}" d="{bars}"/>')
    floor = [base + value for base, value in zip(floor, values)]
  drawn.append(_hover([(x(at), text) for at, text in zip(xs, hovers)], height))
  return _svg(title, width, height, drawn)


def legend(names: Sequence[tuple[str, int]]) -> str:
  """Names beside their colours."""
  items = "".join(
    f'<li><span class="swatch c{color % COLORS}"></span>{html.escape(name)}</li>'
    for name, color in names
  )
  return f'<ul class="legend">{items}</ul>'


def _axes(x: Scale, y: Scale, x_label: str, width: int, height: int) -> str:
  bottom = height - BOTTOM
  x_ticks = [t for t in x.ticks(6 if width > 400 else 4) if t == int(t)] or [x.low]
  y_ticks = y.ticks(5 if height > 220 else 4)
  names, base = labels(y_ticks)
  grid = "".join(f"M{LEFT} {y(t)}H{width - RIGHT}" for t in y_ticks)
  parts = [f'<path class="grid" d="{grid}"/>']
  parts += [
    f'<text class="tick end" x="{LEFT - 6}" y="{y(t) + 4:.1f}">{name}</text>'
    for t, name in zip(y_ticks, names)
  ]
  parts += [
    f'<text class="tick mid" x="{x(t)}" y="{bottom + 16}">{_compact(t)}</text>' for t in x_ticks
  ]
  parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{width - RIGHT}"/>')
  label = html.escape(x_label)
  parts.append(f'<text class="tick end" x="{width - RIGHT}" y="{height - 6}">{label}</text>')
  if base:
    parts.append(f'<text class="tick" x="4" y="{height - 6}">counted from {base}</text>')
  return "".join(parts)


def _hover(places: Sequence[tuple[float, str]], height: int) -> str:
  """Invisible strips, one a point, that show its text."""
  if not places:
    return ""
  xs = [at for at, _ in places]
  size = max(min((b - a for a, b in zip(xs, xs[1:])), default=12.0), 3.0)
  strips = "".join(
    f'<path d="M{at} {TOP}V{height - BOTTOM}"><title>{html.escape(text)}</title></path>'
    for at, text in places
  )
  return f'<g class="hover" stroke-width="{size:.1f}">{strips}</g>'


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Callable[[float], float]) -> str:
  return "L".join(f"{x(px)} {y(py)}" for px, py in points)


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
    f"{''.join(parts)}</svg>"
  )
