"""Charts of the run report: matplotlib figures as SVG images that can be embedded in a page."""

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
  """Values y at x, with a band or interval from low to high, [N] each; y is NaN at a gap."""

  x: np.ndarray
  y: np.ndarray
  low: np.ndarray
  high: np.ndarray


def binned(series: Sequence[tuple[float, float]], limit: int) -> Line:
  """Averages a series [(x, value)] in at most `limit` bins, with bands from minimum to maximum.

  All bins but the last have equally many values; x is the middle of a bin. Values that are not
  finite are left out; a bin without any others is a gap.
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
  """Draws a line chart.

  Args:
    lines: {name: values with a band}, drawn as lines.
    intervals: {name: values with intervals}, drawn as marks.
    x_range: of the x axis.
    x_label: of the x axis.
    size: width and height in inches.
    log: logarithmic y axis; needs values above 0.

  Returns:
    A data URI; None where there is no value.
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
  """Draws `lines` and `intervals` of `line_chart`; y begins at 0 or above if no value is negative.
  """
  for name, (x, y, low, high) in lines.items():
    # Dots mark single values between gaps, and all values of a short line.
    gaps = np.pad(np.isnan(y), 1, constant_values=True)
    dots = np.flatnonzero(gaps[:-2] & gaps[2:] | (len(x) <= 20)).tolist()
    [drawn] = axes.plot(x, y, marker="o", markersize=3, markevery=dots, label=name)
    if (low < high).any():
      axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
  for name, (x, y, low, high) in intervals.items():
    # Rounding may put an end of an interval on the wrong side of the mean.
    reach = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, reach, marker="o", markersize=4, linewidth=1, capsize=2, label=name)
  everything = [*lines.values(), *intervals.values()]
  linear = axes.get_yscale() == "linear"
  if linear and min(np.nanmin(line.low, initial=0) for line in everything) >= 0:
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))


@matplotlib.rc_context(fname=STYLE)
def stacked_chart(parts: Mapping[str, Line], *, x_label: str, y_label: str) -> str:
  """Draws a stacked bar chart; returns a data URI. All parts must have the same x."""
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
  """Sets a few round ticks, the x label at the right, and a margin around `x_range`."""
  round_steps = [1, 2, 5, 10]
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=round_steps, integer=True))
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=round_steps))
  axes.set_xlabel(x_label, loc="right")
  margin = 0.02 * (x_range[1] - x_range[0]) or 0.5
  axes.set_xlim(x_range[0] - margin, x_range[1] + margin)


def wrapped(text: str, width: int, most: int | None = None) -> str:
  """Wraps a text for Matplotlib: at most `most` lines of at most `width` characters."""
  lines = textwrap.wrap(text, width, max_lines=most, placeholder=" …")
  return "\n".join(lines).replace("$", r"\$")  # A plain dollar sign would begin a formula.


def _data_uri(chart: figure.Figure) -> str:
  buffer = io.BytesIO()
  no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  chart.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
  return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
