"""Figures 3, 4 and 5 of the paper and sheets of samples, from the records of a comparison.

Every function that draws returns a figure, or None where there are no data for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import matplotlib
from matplotlib import figure
import matplotlib.axes
import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import atomic
from unigrpo_jax.tools.compare import methods, rewards
from unigrpo_jax.tools.report import charts

DPI = 130
DECAY = 0.9  # of the moving average of a training curve
GUIDED = "UniGRPO trained with guidance"
REGULARISERS = {
  "velocity MSE": methods.UNIGRPO, "latent KL": "UniGRPO, latent KL",
  "none": "UniGRPO without regulariser",
}
MARKERS = ("o", "s", "^")
STRICT = rewards.STRICT
BOUNDS = (0.5, 2.0)  # Usual range of a statistic, as multiples of its value before training.
Curves = Mapping[str, Mapping[str, Any]]  # see `curves.record`


def write(chart: figure.Figure | None, path: pathlib.Path) -> bool:
  """Writes a figure as PNG; returns whether there was one."""
  if chart is None:
    return False
  with errors.storage(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda aside: chart.savefig(aside, format="png"))
  return True


@matplotlib.rc_context(fname=charts.STYLE)
def learning(curves: Curves) -> figure.Figure | None:
  """Figure 3: the learned reward and the verifier's, in training and on validation.

  Training shows the rollouts' means (SDE, no guidance), validation pictures of the ODE without
  guidance. Thin lines are single seeds; thick ones the mean over seeds, smoothed in training; bands
  reach from the lowest to the highest seed.
  """
  seeds = list(curves.get(methods.UNIGRPO, {}).values())
  if not any(run["training"] for run in seeds):
    return None
  chart, (left, right) = _panels(2, f"{methods.UNIGRPO}: {len(seeds)} seed(s)")
  for name, label, line in (("mean", "reward", "-"), (STRICT, "verifier, strict", "--")):
    _draw(left, [run["training"].get(name, []) for run in seeds], label, line, smooth=True)
  mode = _mode(seeds, guided=False)
  for name, label, line in (("reward", "reward", "-"), (STRICT, "verifier, strict", "--")):
    _draw(right, [run["validation"].get(mode, {}).get(name, []) for run in seeds], label, line)
  left.set_title("training (rollouts)")
  right.set_title(f"validation ({mode})")
  return _finish(chart, (left, right))


@matplotlib.rc_context(fname=charts.STYLE)
def hacking(curves: Curves, method: str = methods.REFL_LONG) -> figure.Figure | None:
  """The learned reward and the verifier's score on validation, by iteration and by distance.

  The distance is the root of `flow/mse`, the mean squared difference of an element of the velocity
  from the reference's, in the iteration of the evaluation; before the first one it is 0. Lines are
  those of `learning`.
  """
  seeds = list(curves.get(method, {}).values())
  mode = _mode(seeds, guided=False)
  found = [run["validation"].get(mode, {}) for run in seeds]
  if not any(found):
    return None
  chart, (left, right) = _panels(2, f"{method}: {len(seeds)} seed(s)")
  for name, label, line in (("reward", "reward", "-"), (STRICT, "verifier, strict", "--")):
    _draw(left, [each.get(name, []) for each in found], label, line)
    color = left.lines[-1].get_color()
    for run, each in zip(seeds, found):
      squares = dict(map(tuple, run["flow_mse"]))
      points = [
        (squares[step] ** 0.5, value) for step, value in each.get(name, []) if squares.get(step)
      ]
      right.plot(*np.transpose(points or [(np.nan, np.nan)]), line, color=color, marker="o",
                 markersize=3)
  left.set_title(f"validation ({mode})")
  right.set_title("the same by distance")
  right.set_xscale("log")
  right.xaxis.set_major_formatter("{x:g}")
  right.xaxis.set_minor_formatter("{x:g}")
  _finish(chart, (left,))
  right.set_xlabel("distance of the velocity from the reference's", loc="right")
  return chart


@matplotlib.rc_context(fname=charts.STYLE)
def guidance(curves: Curves) -> figure.Figure | None:
  """Figure 4: training with and without guidance; both are validated with it.

  Training rewards of the two are not comparable, since only one has guidance in its rollouts. A
  velocity with guidance takes two evaluations of the network, hence the curves by cost.
  """
  kinds = {
    label: list(curves[name].values())
    for label, name in (("without", methods.UNIGRPO), ("with", GUIDED)) if curves.get(name)
  }
  if len(kinds) < 2:
    return None
  chart, (left, middle, right) = _panels(3, "Training with and without guidance")
  for label, seeds in kinds.items():
    label = f"trained {label} guidance"
    _draw(left, [run["training"].get("mean", []) for run in seeds], label, smooth=True)
    validated = [
      run["validation"].get(_mode(seeds, guided=True), {}).get("reward", []) for run in seeds
    ]
    _draw(middle, validated, label)
    _draw(right, [
      [[step * run["velocity_evaluations"] / 1e6, value] for step, value in points]
      for run, points in zip(seeds, validated)
    ], label)
  left.set_title("training reward (rollouts)")
  middle.set_title("validation reward, with guidance")
  right.set_title("the same by cost")
  middle.set_xlabel("iteration", loc="right")
  right.set_xlabel("million velocity evaluations", loc="right")
  return _finish(chart, (left,))  # one legend is enough


@matplotlib.rc_context(fname=charts.STYLE)
def regularisers(
  curves: Curves, statistics: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
) -> figure.Figure | None:
  """Figure 5: learned reward against the verifier's score and image statistics.

  Each dot is an evaluation, its colour the iteration. Statistics are divided by their values before
  the first iteration. Outside `BOUNDS`, or where the verifier's score falls, quality degrades.

  Args:
    curves: see `curves.record`.
    statistics: {method: {seed: {iteration: {statistic: mean}}}}, see `measure`.
  """
  kinds = {label: name for label, name in REGULARISERS.items() if curves.get(name)}
  if len(kinds) < 2:
    return None
  names = list(dict.fromkeys(
    name for method in kinds.values() for of in statistics.get(method, {}).values()
    for row in of.values() for name, value in row.items() if value is not None
  ))
  columns = 4
  rows = -(-(1 + len(names)) // columns)
  chart = figure.Figure(figsize=(3.1 * columns, 2.6 * rows + 0.5), dpi=DPI, layout="constrained")
  panels = list(np.atleast_1d(chart.subplots(rows, columns, squeeze=False)).flat)
  last = max(
    point[0] for name in kinds.values() for run in curves[name].values()
    for points in run["validation"].get(_mode([run], False), {}).values() for point in points
  )
  dots = None
  for (label, method), marker in zip(kinds.items(), MARKERS):
    for seed, run in curves[method].items():
      found = run["validation"].get(_mode([run], guided=False), {})
      reward, strict = (dict(map(tuple, found.get(key, []))) for key in ("reward", STRICT))
      style = dict(marker=marker, s=22, cmap="viridis", vmin=0, vmax=last, edgecolors="#5d5c58",
                   linewidths=0.4)
      first = label if seed == next(iter(curves[method])) else None
      steps = [step for step in reward if step in strict]
      dots = panels[0].scatter([reward[s] for s in steps], [strict[s] for s in steps], c=steps,
                               label=first, **style)
      measured = {int(k): row for k, row in statistics.get(method, {}).get(seed, {}).items()}
      for panel, name in zip(panels[1:], names):
        ratios = {
          step: row[name] / measured[0][name] for step, row in measured.items()
          if step in reward and row.get(name) is not None and measured.get(0, {}).get(name)
        }
        panel.scatter([reward[s] for s in ratios], list(ratios.values()), c=list(ratios), **style)
  panels[0].set_title("verifier, strict")
  for panel, name in zip(panels[1:], names):
    panel.set_title(f"{name.replace('_', ' ')}, over the start's")
    for bound in BOUNDS:
      panel.axhline(bound, color="#5d5c58", linewidth=0.7, linestyle=":")
  for panel in panels[len(names) + 1 :]:
    panel.set_axis_off()
  for panel in panels[: len(names) + 1]:
    panel.set_xlabel("learned reward", loc="right")
  panels[0].legend(loc="best", fontsize=7)
  if dots is not None:
    chart.colorbar(dots, ax=panels, label="iteration", shrink=0.7)
  return chart


def at_equal_reward(curves: Curves) -> dict[str, float]:
  """{regulariser: strict score at the highest learned reward that all of them reach}.

  By linear interpolation of the means over seeds, where a method first reaches that reward.
  """
  lines = {}
  for label, method in REGULARISERS.items():
    seeds = list(curves.get(method, {}).values())
    found = [run["validation"].get(_mode([run], False), {}) for run in seeds]
    if found and all("reward" in each and STRICT in each for each in found):
      reward, strict = (_mean([each[key] for each in found])[1] for key in ("reward", STRICT))
      lines[label] = (reward, strict)
  if len(lines) < 2:
    return {}
  common = min(float(np.max(reward)) for reward, _ in lines.values())
  made = {}
  for label, (reward, strict) in lines.items():
    reached = int(np.argmax(np.asarray(reward) >= common - 1e-12))
    before = max(reached - 1, 0)
    made[label] = float(np.interp(
      common, np.asarray(reward)[[before, reached]], np.asarray(strict)[[before, reached]]
    ))
  return made


@matplotlib.rc_context(fname=charts.STYLE)
def sheet(
  columns: Mapping[str, Mapping[str, tuple[pathlib.Path, str]]], prompts: Sequence[str]
) -> figure.Figure | None:
  """Samples with their reasonings, one row per prompt, one column per method (figures 2, 6 to 8).

  Args:
    columns: {method: {prompt: (file of the picture, reasoning or "")}}, all from the same noise.
    prompts: the rows.
  """
  columns = {name: of for name, of in columns.items() if any(prompt in of for prompt in prompts)}
  if not columns or not prompts:
    return None
  titles = {name: charts.wrapped(name, 18) for name in columns}
  thoughts = {
    (name, prompt): charts.wrapped(of[prompt][1], 34, most=6)
    for name, of in columns.items() for prompt in prompts if prompt in of
  }
  below = 0.08 * max(len(text.split("\n")) for text in thoughts.values())  # inches, per row
  above = 0.1 + 0.13 * max(len(title.split("\n")) for title in titles.values())
  chart = figure.Figure(
    figsize=(2.2 + 1.25 * len(columns), (1.3 + below) * len(prompts) + above), dpi=DPI,
    facecolor="white",
  )
  left = 2.1 / chart.get_figwidth()
  cells = chart.subplots(
    len(prompts), len(columns), squeeze=False,
    gridspec_kw=dict(left=left, right=0.995, top=1 - above / chart.get_figheight(),
                     bottom=(0.05 + below) / chart.get_figheight(), wspace=0.06,
                     hspace=(0.08 + below) / 1.2),
  )
  for row, prompt in enumerate(prompts):
    for (name, of), cell in zip(columns.items(), cells[row]):
      cell.set_axis_off()
      if prompt in of:
        with PIL.Image.open(of[prompt][0]) as image:
          cell.imshow(image.convert("RGB"), interpolation="nearest")
        cell.annotate(
          thoughts[name, prompt], (0, 0), (0, -2), xycoords="axes fraction",
          textcoords="offset points", va="top", fontsize=4.6, color="#5d5c58",
        )
      if row == 0:
        cell.set_title(titles[name], fontsize=7.5, pad=3)
    cells[row][0].annotate(
      charts.wrapped(prompt, 30), (0, 0.5), (-6, 0),
      xycoords="axes fraction", textcoords="offset points", ha="right", va="center", fontsize=7.5,
    )
  return chart


def _panels(count: int, title: str) -> tuple[figure.Figure, Sequence[matplotlib.axes.Axes]]:
  chart = figure.Figure(figsize=(4.2 * count, 3.0), dpi=DPI, layout="constrained",
                        facecolor="white")
  chart.suptitle(title, x=0.01, ha="left", weight="bold")
  return chart, chart.subplots(1, count)


def _finish(chart: figure.Figure, panels) -> figure.Figure:
  for panel in panels:
    panel.set_xlabel("iteration", loc="right")
    if panel.get_legend_handles_labels()[0]:
      panel.legend(loc="best")
  return chart


def _mode(seeds: Sequence[Mapping[str, Any]], guided: bool) -> str:
  """The first mode of the validation with or without guidance; "" where there is none."""
  modes = [mode for run in seeds for mode in run["validation"]]
  return next((mode for mode in modes if ("guidance" in mode) == guided), "")


def _draw(
  panel: matplotlib.axes.Axes, seeds: Sequence[Sequence[Sequence[float]]], label: str,
  line: str = "-", smooth: bool = False,
) -> None:
  """Draws a quantity: each seed as a thin line, their mean as a thick one, their range as a band.

  `seeds` has the points [[x, value], ...] of each seed.
  """
  seeds = [points for points in seeds if points]
  if not seeds:
    return
  x, mean, rows = _mean(seeds, smooth)
  [drawn] = panel.plot(x, mean, line, linewidth=2, label=label, marker="" if smooth else "o",
                       markersize=3)
  color = drawn.get_color()
  if len(rows) > 1:
    panel.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.15, linewidth=0)
  for points in seeds:
    panel.plot(*np.transpose(points), line, color=color, linewidth=0.6, alpha=0.45)


def _mean(
  seeds: Sequence[Sequence[Sequence[float]]], smooth: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(x that all seeds have [X], mean over seeds [X], values [seeds, X]).

  With `smooth`, values are exponential moving averages.
  """
  by_seed = [dict(map(tuple, points)) for points in seeds]
  x = [step for step in by_seed[0] if all(step in of for of in by_seed)]
  rows = np.array([[of[step] for step in x] for of in by_seed], float)
  if smooth:
    for row in rows:
      weight = total = 0.0
      for place, value in enumerate(row):
        total, weight = DECAY * total + value, DECAY * weight + 1
        row[place] = total / weight  # corrects the bias at the start
  return np.array(x), rows.mean(axis=0), rows
