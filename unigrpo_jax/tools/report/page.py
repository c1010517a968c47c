"""The report of a run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import math
import pathlib
import re
import statistics
from typing import Any

import jinja2
import numpy as np

from unigrpo_jax.benchmarks import hacking, intervals
from unigrpo_jax.runtime import metrics
from unigrpo_jax.tools.report import charts, samples, workdir

# Points of a large and of a small chart; longer series are averaged.
LARGE, SMALL = 200, 80
# Groups of small charts: (title, explanation, regular expression of metrics). A metric belongs to
# the first group that matches, else to a group named by its prefix.
HEALTH = (
  ("Drift", "Between the sampler's and the trainer's own values.", r"^drift"),
  ("Importance ratios", "1 before the first update of an iteration, close to it after.",
   r"(^|[/_])ratio($|[/_])"),
  ("Clip fractions", "Share of tokens or steps whose ratio was clipped.", r"clip_fraction"),
  ("KL divergence", "How far an update moves the policy, by estimate.", r"(^|[/_])kl($|[/_])"),
  ("Entropy", "Of the sampled tokens; near zero the reasoning no longer varies.", r"entropy"),
  ("Lengths", "Tokens of the reasoning, and the share cut at the limit.", r"length|truncated"),
  ("Losses", "", r"^loss|loss$|(^|[/_])(ce|mse)$"),
  ("Gradient norms", "Before clipping.", r"grad_norm"),
  ("Pictures", "Statistics of the pixels: a reward that is gamed shows here.", r"^images/"),
  ("Groups", "A group whose rewards are all equal teaches nothing.", r"^groups/"),
  ("Speed", "", r"per_second$"),
)
# Prefixes of metrics with sections of their own.
ELSEWHERE = ("reward/", "eval/", "seconds/", "share/")
TOTAL = hacking.REWARD  # training logs it as reward/mean and reward/std


def render(run: workdir.Run) -> str:
  """The HTML of the page."""
  unit = "iteration" if any(k.startswith(("reward/", "eval/")) for k in run.keys) else "step"
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True,
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
  )
  return environment.get_template("report.html.j2").render(
    run=run, unit=unit, headline=headline(run), training=training(run), seconds=seconds,
    reward_names=reward_names(run), reward_chart=reward_chart, witnesses=witnesses(run),
    health=health(run, unit), scored_names=scored_names(run),
    samples=samples, timings=timings(run, unit), config=metrics.without_secrets(run.config),
  )


def headline(run: workdir.Run) -> tuple[str, str, list] | None:
  """The result to show first: of the first reward that was evaluated at least twice.

  Its mode is the first one in the config (which decides the best checkpoint) that was evaluated,
  else one with thinking, else any.

  Returns:
    (reward, mode, [(step, scores of the prompts)]); None where no reward was evaluated twice.
  """
  configured = [mode.replace(" ", "") for mode in (run.config.get("eval") or {}).get("modes", ())]
  for reward in reward_names(run):
    modes = run.evaluated(reward)
    order = (*configured, *(mode for mode in modes if "think" in mode), *modes)
    mode = next((mode for mode in order if mode in modes), None)
    if mode and len(modes[mode]) > 1:
      return reward, mode, modes[mode]
  return None


def training(run: workdir.Run) -> tuple[float, float, int] | None:
  """(mean training reward of the first tenth of all steps, of the last tenth, steps of a tenth).

  None for fewer than two steps.
  """
  values = run.finite("reward/mean")
  tenth = max(1, len(values) // 10)
  ends = (values[:tenth], values[-tenth:])
  return (*map(statistics.fmean, ends), tenth) if len(values) > 1 else None


def seconds(run: workdir.Run, phase: str) -> datetime.timedelta:
  """Wall time of a phase in all steps together."""
  return datetime.timedelta(seconds=round(math.fsum(run.finite(f"seconds/{phase}"))))


def scored_names(run: workdir.Run) -> list[str]:
  """Names of the rewards that saved evaluations have, the weighted sum first."""
  samples_of_all = (sample for samples in run.evaluations.values() for sample in samples)
  names = dict.fromkeys(name for sample in samples_of_all for name in sample.rewards)
  return sorted(names, key=lambda name: name != TOTAL)


def reward_names(run: workdir.Run) -> list[str]:
  """Names of the rewards that were evaluated or logged; the weighted sum first."""
  names = scored_names(run)
  for key in run.keys:
    if key in ("reward/mean", "reward/std"):
      names.append(TOTAL)
    elif key.startswith(("reward/", "eval/")):
      names.append(key.rpartition("/")[2])
  return sorted(dict.fromkeys(names), key=lambda name: name != TOTAL)


def witnesses(
  run: workdir.Run,
) -> dict[str, tuple[Sequence[hacking.Evaluation], hacking.Verdict]]:
  """{reward of weight 0: (its evaluations beside the weighted sum, what they say)}.

  They are those of the headline's mode; {} where fewer than two were saved.
  """
  weights, shown = run.config.get("rewards"), headline(run)
  if not isinstance(weights, dict) or shown is None:
    return {}
  made = {}
  for name in [name for name, weight in weights.items() if weight == 0]:
    evaluations = [
      hacking.evaluation(step, [one for one in samples if one.mode == shown[1]], name)
      for step, samples in run.evaluations.items()
    ]
    evaluations = [one for one in evaluations if one is not None]
    if len(evaluations) > 1:
      made[name] = evaluations, hacking.verdict(evaluations)
  return made


def reward_chart(run: workdir.Run, name: str, unit: str) -> str | None:
  """The chart of a reward in training, and in evaluations by mode with intervals; see `charts`."""
  return charts.line_chart(*reward_lines(run, name), x_range=run.steps, x_label=unit)


def reward_lines(
  run: workdir.Run, name: str
) -> tuple[dict[str, charts.Line], dict[str, charts.Line]]:
  """(lines, intervals) of `reward_chart`, by their names in the legend."""
  training = charts.binned(run.series("reward/mean" if name == TOTAL else f"reward/{name}"), LARGE)
  std = charts.binned(run.series("reward/std"), LARGE).y
  if name == TOTAL and len(std) == len(training.y):
    training = training._replace(low=training.y - std, high=training.y + std)
  evaluations = {}
  for mode, evaluated in run.evaluated(name).items():
    points = [(step, *intervals.interval(scores)) for step, scores in evaluated]
    evaluations[f"evaluation, {mode}"] = charts.Line(*np.array(points, float).T)
  return {"training": training} if len(training.x) else {}, evaluations


def health(run: workdir.Run, unit: str) -> dict[str, tuple[str, list[tuple]]]:
  """{title: (explanation, [(metric, chart, caption)])} of the metrics without their own section."""
  groups: dict[str, tuple[str, list[tuple]]] = {title: (hint, []) for title, hint, _ in HEALTH}
  for key in run.keys:
    if key.startswith(ELSEWHERE):
      continue
    prefix, slash, _ = key.partition("/")
    other = f"Other: {prefix}" if slash else "Other"
    title = next((title for title, _, pattern in HEALTH if re.search(pattern, key)), other)
    series, finite = run.series(key), run.finite(key)
    chart = charts.line_chart(
      {key: charts.binned(series, SMALL)}, {}, x_range=run.steps, x_label=unit, size=charts.SMALL,
      log=title == "Drift" and max(finite, default=0) > 10 * min(finite, default=0) > 0,
    )
    caption = [f"last {finite[-1]:.5g}"] if finite else []
    if len(finite) < len(series):
      caption.append(f"{len(series) - len(finite)} value(s) not finite")
    groups.setdefault(title, ("", []))[1].append((key, chart, "; ".join(caption)))
  return {title: group for title, group in groups.items() if group[1]}


def timings(run: workdir.Run, unit: str) -> dict[str, Any] | None:
  """Seconds by phase, for the page.

  Returns:
    {"chart": stacked chart, "rows": [(phase, median, share of all time)], "median": of a step,
    "first_is_left_out": whether the first step, which compiles, was left out}; None without phases.
  """
  # Compilation happens within other phases, and evaluations between iterations.
  apart = ("total", "compile", "evaluate")
  # Without seconds/reward/NAME, which are parts of phases.
  keys = [
    key for key in run.keys if re.fullmatch("seconds/[^/]+", key) and key.split("/")[1] not in apart
  ]
  rows = [row for row in run.rows if not row.keys().isdisjoint(keys)]
  first_is_left_out = len(rows) > 2
  rows = rows[first_is_left_out:]
  column = lambda key: np.nan_to_num([row.get(key, 0.0) for row in rows])
  phases = {key.removeprefix("seconds/"): column(key) for key in keys}
  phases["outside phases"] = np.maximum(column("seconds/total") - sum(phases.values()), 0)
  phases = {name: seconds for name, seconds in phases.items() if seconds.sum() > 0}
  if not phases:
    return None
  phases = dict(sorted(phases.items(), key=lambda item: -item[1].sum()))
  total = sum(phases.values())
  bars = {
    name: charts.binned([(row["step"], value) for row, value in zip(rows, seconds)], SMALL)
    for name, seconds in phases.items()
  }
  return {
    "chart": charts.stacked_chart(bars, x_label=unit, y_label="seconds"),
    "first_is_left_out": first_is_left_out,
    "rows": [(name, np.median(s), s.sum() / total.sum()) for name, s in phases.items()],
    "median": np.median(total),
  }
