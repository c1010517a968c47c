"""Charts of the run report: matplotlib figures, as SVG images that a page can hold."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import io
import math
import pathlib
import textwrap
from typing import NamedTuple

import matplotlib
from matplotlib import figure, ticker
import matplotlib.axes
import numpy as np

STYLE = pathlib.Path(__file__).with_name("report.mplstyle")
# Width and height in inches.
LARGE, SMALL = (4.2, 2.6), (3.2, 1.8)


class Line(NamedTuple):
  """Values y [N] at x [N], NaN for a gap, with a band or an interval from low to high."""

  x: np.ndarray
  y: np.ndarray
  low: np.ndarray
  high: np.ndarray


def binned(series: Sequence[tuple[float, float]], limit: int) -> Line:
  """At most `limit` means of consecutive (x, value), with bands from their least to their largest.

  All bins have equally many values, and their middle as x. A value that is not finite is left out;
  a bin of none is a gap.
  """
  size = max(1, -(-len(series) // limit))
  bins = []
  for first in range(0, len(series), size):
    part = series[first : first + size]
    values = [value for _, value in part if math.isfinite(value)] or [math.nan]
    middle = (part[0][0] + part[-1][0]) / 2
    bins.append((middle, math.fsum(values) / len(values), min(values), max(values)))
  return Line(*np.array(bins, float).reshape(-1, 4).T)


@matplotlib.rc_context(fname=STYLE)
def line_chart(
  lines: Mapping[str, Line], intervals: Mapping[str, Line], *, x_range: tuple[float, float],
  x_label: str, size: tuple[float, float] = LARGE, log: bool = False,
) -> str | None:
  """Lines with bands, and marks with intervals, by name: a data URI, or None without a value.

  The x axis reaches over `x_range`. `size` is in inches. `log` needs values above zero.
  """
  everything = [*lines.values(), *intervals.values()]
  if not any(np.isfinite(line.y).any() for line in everything):
    return None
  chart, axes = _axes(size, x_label, x_range)
  if log:
    axes.set_yscale("log")
  draw_lines(axes, lines, intervals)
  if len(everything) > 1:
    chart.legend(loc="outside upper left", ncols=2)
  return _data_uri(chart)


def draw_lines(
  axes: matplotlib.axes.Axes, lines: Mapping[str, Line], intervals: Mapping[str, Line]
) -> None:
  """Draws lines with bands, and marks with intervals, by name; y begins at 0 at the least."""
  for name, (x, y, low, high) in lines.items():
    # A value between two gaps is a dot, and so is each of a short line.
    gaps = np.pad(np.isnan(y), 1, constant_values=True)
    dots = np.flatnonzero(gaps[:-2] & gaps[2:] | (len(x) <= 20)).tolist()
    [drawn] = axes.plot(x, y, marker="o", markersize=3, markevery=dots, label=name)
    if (low < high).any():
      axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
  for name, (x, y, low, high) in intervals.items():
    # An end may lie on the wrong side of the mean by a rounding error.
    reach = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, reach, marker="o", markersize=4, linewidth=1, capsize=2, label=name)
  everything = [*lines.values(), *intervals.values()]
  linear = axes.get_yscale() == "linear"
  if linear and min(np.nanmin(line.low, initial=0) for line in everything) >= 0:
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))


@matplotlib.rc_context(fname=STYLE)
def stacked_chart(parts: Mapping[str, Line], *, x_label: str, y_label: str) -> str:
  """Bars at the same x, one part on the other, as a data URI."""
  heights = np.array([line.y for line in parts.values()])
  x = next(iter(parts.values())).x
  half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
  edges = np.concatenate([x[:1] - half, (x[1:] + x[:-1]) / 2, x[-1:] + half])
  chart, axes = _axes(LARGE, x_label, (edges[0], edges[-1]))
  axes.set_ylabel(y_label)
  for name, height, top in zip(parts, heights, heights.cumsum(axis=0)):
    axes.stairs(top, edges, baseline=top - height, fill=True, label=name)
  chart.legend(loc="outside upper left", ncols=4)
  return _data_uri(chart)


def _axes(size: tuple[float, float], x_label: str, x_range: tuple[float, float]):
  chart = figure.Figure(figsize=size, layout="constrained")
  axes = chart.add_subplot()
  set_axes(axes, x_label, x_range)
  return chart, axes


def set_axes(axes: matplotlib.axes.Axes, x_label: str, x_range: tuple[float, float]) -> None:
  """Few round ticks, the x label at the right, and a margin around `x_range`."""
  round_steps = [1, 2, 5, 10]
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=round_steps, integer=True))
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=round_steps))
  axes.set_xlabel(x_label, loc="right")
  margin = 0.02 * (x_range[1] - x_range[0]) or 0.5
  axes.set_xlim(x_range[0] - margin, x_range[1] + margin)


def wrapped(text: str, width: int, most: int | None = None) -> str:
  """Text in lines of some characters' width, at most so many of them, for Matplotlib to write."""
  lines = textwrap.wrap(text, width, max_lines=most, placeholder=" …")
  return "\n".join(lines).replace("$", r"\$")  # A dollar sign would begin a formula.


def _data_uri(chart: figure.Figure) -> str:
  buffer = io.BytesIO()
  no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  chart.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
  return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
