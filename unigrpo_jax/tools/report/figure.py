"""One picture of a run, for web pages and slides: its reward, and prompts before and after."""

from __future__ import annotations

import contextlib
import io
import math
import pathlib

import matplotlib
from matplotlib import figure
import matplotlib.axes
import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, tokenizer
from unigrpo_jax.tools.report import charts, page, samples, workdir

FORMATS = ("png", "svg", "pdf")
ROWS, COLUMNS = 2, 4  # of the prompts that are shown
CHANGED = 0.4  # least change of the reward of a prompt that is shown
SIZE, DPI = (11, 9.4), 130  # inches, dots per inch


def check_name(out: pathlib.Path) -> str:
  """The kind of picture that the suffix of `out` says; raises InputError if it is none of FORMATS.
  """
  kind = out.suffix.removeprefix(".")
  errors.choose("the ending of --figure", kind, FORMATS)
  return kind


@matplotlib.rc_context(fname=charts.STYLE)
def draw(run: workdir.Run, out: pathlib.Path) -> None:
  """Writes the picture of a run to `out`, whose suffix is one of FORMATS.

  Raises:
    InputError: `out` has another suffix or cannot be written, or the run was not evaluated twice.
  """
  kind = check_name(out)
  headline = page.headline(run)
  if headline is None:
    evaluates = not run.config or (run.config.get("eval") or {}).get("every")
    raise errors.InputError(f"{run.name}: " + (
      "no reward was evaluated twice; wait for the run's second evaluation" if evaluates
      else "this run does not evaluate; leave out --figure"
    ))
  reward, mode, evaluated = headline
  before, after = evaluated[0][1], evaluated[-1][1]
  whole = figure.Figure(figsize=SIZE, dpi=DPI, facecolor="white")
  top, bottom = whole.subfigures(2, 1, height_ratios=[1, 2.9])
  top.text(
    0.02, 0.98, f"Reward of {len(after)} held-out prompts ({mode}): {samples.estimate(before)} "
    f"before, {samples.estimate(after)} after", va="top", weight="bold",
  )
  axes = top.add_axes((0.05, 0.17, 0.93, 0.68))
  charts.set_axes(axes, "iteration", run.steps)
  lines, intervals = page.reward_lines(run, reward)
  charts.draw_lines(
    axes, {name: line._replace(low=line.y, high=line.y) for name, line in lines.items()},
    {name: line for name, line in intervals.items() if name.endswith(f", {mode}")},
  )
  axes.legend(loc="lower right")

  both = pairs(run, mode)
  change = np.array([_reward(after, reward) - _reward(before, reward) for before, after in both])
  bottom.text(
    0.02, 0.99, f"The first prompts whose reward changed by more than {CHANGED}: of all, "
    f"{(change > CHANGED).sum()} rose so much, {(change < -CHANGED).sum()} fell",
    va="top", weight="bold",
  )
  shown = [
    pair for pair, difference in zip(both, change)
    if abs(difference) > CHANGED and all(sample.image for sample in pair)
  ]
  # Room above each picture for a prompt, and below for a reasoning of some eight lines.
  space = dict(left=0.02, right=0.99, top=0.86, bottom=0.16, hspace=1.45, wspace=0.1)
  cells = bottom.subplots(ROWS, 2 * COLUMNS, squeeze=False, gridspec_kw=space).reshape(-1, 2)
  for cell in cells.flat:
    cell.set_axis_off()
  for pair, places in zip(shown, cells):
    for sample, name, cell in zip(pair, ("before", "after"), places):
      _show(cell, sample, f"{name}: {_reward(sample, reward):.2f}")
    _write(places[0], pair[0].prompt, width=38, above=True)
  with errors.storage(f"--figure={out}"):
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(out, lambda partial: whole.savefig(partial, format=kind))


def pairs(run: workdir.Run, mode: str) -> list[tuple[workdir.Sample, workdir.Sample]]:
  """(before, after) of each prompt that both ends of a run evaluated: its first image."""
  sides = [{one.key: one for one in reversed(side)} for side in samples.by_mode(run).get(mode, [])]
  if len(sides) < 2:
    return []
  before, after = sides
  return [(before[key], after[key]) for key in reversed(before) if key in after]


def _reward(sample: workdir.Sample, name: str) -> float:
  return sample.rewards.get(name, math.nan)


def _show(cell: matplotlib.axes.Axes, sample: workdir.Sample, title: str) -> None:
  """Draws a sample: its picture, unless that is damaged, a title above and its reasoning below."""
  with contextlib.suppress(Exception):  # Pillow raises many kinds for damaged files.
    with PIL.Image.open(io.BytesIO(sample.image.read_bytes())) as image:
      cell.imshow(image.convert("RGB"), interpolation="nearest")
  cell.set_title(title, loc="left", fontsize=7.5, pad=2)
  _write(cell, tokenizer.without_tags(sample.text), width=21, above=False)


def _write(cell: matplotlib.axes.Axes, text: str, *, width: int, above: bool) -> None:
  """Writes a text, wrapped at `width` characters, above the cell and its title, or below the cell.
  """
  cell.annotate(
    charts.wrapped(text, width), (0, 1 if above else 0), (0, 14 if above else -3),
    xycoords="axes fraction", textcoords="offset points", va="bottom" if above else "top",
    fontsize=7.5, weight="bold" if above else "normal",
  )
