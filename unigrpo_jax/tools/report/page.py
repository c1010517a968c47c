"""The page: one HTML text of a run, with nothing outside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import html
import math
import re
import statistics
from typing import Any

from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.runtime import metrics
from unigrpo_jax.tools.report import charts, samples, style, workdir

# Points of a large and of a small chart; more steps than that are averaged.
LARGE, SMALL = 240, 100
# Groups of small charts: title, what a healthy run shows, which keys; in this order.
HEALTH = (
  ("Importance ratios", "1 before the first update of an iteration, and close to it after.",
   r"ratio"),
  ("Clip fractions", "Share of tokens or steps whose ratio was clipped.", r"clip_fraction"),
  ("KL divergence", "How far an update moves the policy, by estimate.", r"(^|[/_])kl($|[/_])"),
  ("Entropy", "Of the sampled tokens; near zero the reasoning no longer varies.", r"entropy"),
  ("Lengths", "Tokens of the reasoning, and the share cut at the limit.", r"length|truncated"),
  ("Losses", "", r"(^|/)(ce|mse|loss\w*)$|loss$"),
  ("Drift", "Between the sampler's and the trainer's own values, on a logarithmic axis.",
   r"^drift"),
  ("Gradient norms", "Before clipping.", r"grad_norm"),
  ("Groups", "A group whose rewards are all equal teaches nothing.", r"^groups/"),
  ("Speed", "", r"per_second$"),
)
# Sections of their own.
ELSEWHERE = re.compile(r"^(reward|eval|seconds|share)/")
TOTAL = "reward"  # What evaluations call the weighted sum.
MISSING = '<p class="missing">{}</p>'


def page(run: workdir.Run) -> str:
  """The whole page of `run`."""
  unit = "iteration" if any(k.startswith(("reward/", "eval/")) for k in run.keys) else "step"
  notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.notes)
  sections = (
    ("Rewards", _rewards(run, unit)),
    ("Health", _health(run, unit)),
    ("Before and after", BEFORE_AFTER + samples.grid(run)),
    ("By category", samples.by_category(run)),
    ("Timings", _timings(run, unit)),
    ("Configuration", _config(run)),
    ("Versions", _versions(run)),
  )
  body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
  name = html.escape(run.name)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # Nothing is fetched and nothing runs, whatever a prompt holds.
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    f"<title>{name}</title><style>{style.CSS}</style></head><body>"
    f'<h1>{name}</h1><p class="summary">{summary(run, unit)}</p>'
    f'{f"<ul class=notes>{notes}</ul>" if notes else ""}{body}</body></html>\n'
  )


BEFORE_AFTER = (
  '<p class="hint">The first prompts of each mode, in their order: none is chosen by its '
  "reward.</p>"
)


def summary(run: workdir.Run, unit: str) -> str:
  """What became of the reward, in a sentence."""
  first, last = run.steps
  sentences = []
  for reward in _reward_names(run):
    modes = workdir.evaluated(run, reward)
    mode = _headline(run, list(modes))
    if mode is None or len(modes[mode]) < 2:
      continue
    (start, before), (end, after) = modes[mode][0], modes[mode][-1]
    sentences.append(
      f"{html.escape(reward)} ({html.escape(mode)}): {samples.interval(before)} → "
      f"<b>{samples.interval(after)}</b>, {unit}s {start} to {end}."
    )
    break
  # A tenth of the run at either end: single steps are noisy.
  series = [(s, v) for s, v in run.series("reward/mean") if math.isfinite(v)]
  if len(series) > 1:
    tenth = max(1, len(series) // 10)
    ends = [statistics.fmean(v for _, v in part) for part in (series[:tenth], series[-tenth:])]
    sentences.append(
      f"Training reward {ends[0]:.3f} → {ends[1]:.3f} (first and last {tenth} {unit}(s))."
    )
  total = math.fsum(v for _, v in run.series("seconds/total") if math.isfinite(v))
  took = f", {_duration(total)}" if total else ""
  sentences.append(f"{len(run.rows):,} rows of metrics, {unit}s {first} to {last}{took}.")
  return " ".join(sentences)


def _headline(run: workdir.Run, modes: Sequence[str]) -> str | None:
  """The mode that says which checkpoint is the best, the config's first; else one that thinks."""
  try:
    asked = [workdir.mode_name(mode) for mode in run.config["eval"]["modes"]]
  except (KeyError, TypeError):
    asked = []
  thinks = [mode for mode in modes if "think" in mode]
  return next((mode for mode in (*asked, *thinks, *modes) if mode in modes), None)


def _duration(seconds: float) -> str:
  for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {name}"
  return f"{seconds:.0f} seconds"


def _reward_names(run: workdir.Run) -> list[str]:
  """Rewards that were evaluated or logged by name."""
  names = [name for evaluation in run.evaluations for name in evaluation.rewards]
  names += [key.rpartition("/")[2] for key in run.keys if key.startswith("eval/")]
  names += [
    key.removeprefix("reward/") for key in run.keys
    if key.startswith("reward/") and key not in ("reward/mean", "reward/std")
  ]
  # What is trained on comes first, then what it is made of.
  return sorted(dict.fromkeys(names), key=lambda name: name != TOTAL)


def _rewards(run: workdir.Run, unit: str) -> str:
  names = _reward_names(run)
  alone = names[:1] == [TOTAL] or len(names) == 1
  lone = names[0] if alone and f"reward/{names[0]}" not in run.keys else None
  figures = []
  if "reward/mean" in run.keys:
    lines = [charts.Line("training, mean and spread", _spread(run, unit))]
    title = "Reward" if lone in (None, TOTAL) else f"Reward: {lone}"
    figures.append(_reward_figure(run, unit, title, lines, lone))
  for name in names:
    if name == lone and figures:
      continue
    points = charts.binned(run.series(f"reward/{name}"), LARGE, unit)
    lines = [charts.Line("training", points)] if points else []
    figures.append(_reward_figure(run, unit, f"Reward: {name}", lines, name))
  if not figures:
    return MISSING.format("This run logged no reward.")
  hint = (
    '<p class="hint">Lines are training, with the standard deviation of the rewards as a band '
    "around their mean; points are evaluations on fixed prompts with 95 % intervals.</p>"
  )
  return f'{hint}<div class="large">{"".join(figures)}</div>'


def _spread(run: workdir.Run, unit: str) -> list[charts.Point]:
  """Training mean with the mean standard deviation around it."""
  points = charts.binned(run.series("reward/mean"), LARGE, unit)
  stds = {row["step"]: row.get("reward/std", math.nan) for row in run.rows if "reward/mean" in row}
  wide = charts.binned(list(stds.items()), LARGE, unit)
  if len(wide) != len(points):
    return points
  return [
    p if not math.isfinite(s.y)
    else p._replace(low=p.y - s.y, high=p.y + s.y, hover=f"{p.hover}; spread {s.y:.4g}")
    for p, s in zip(points, wide)
  ]


def _reward_figure(
  run: workdir.Run, unit: str, title: str, lines: list[charts.Line], reward: str | None
) -> str:
  modes = {} if reward is None else workdir.evaluated(run, reward)
  for color, (mode, evaluations) in enumerate(modes.items(), 1):
    points = []
    for iteration, scores in evaluations:
      mean, low, high = intervals.interval(scores)
      hover = f"{mode}, {unit} {iteration}: {mean:.6g}"
      if len(scores) > 1:
        hover += f" [{low:.4g}, {high:.4g}], {len(scores)} prompts"
      points.append(charts.Point(iteration, mean, low, high, hover))
    lines.append(charts.Line(f"evaluation, {mode}", points, color, marks=True))
  drawn = charts.line_chart(lines, x_range=run.steps, x_label=unit, title=title)
  names = charts.legend([(line.name, line.color) for line in lines])
  return f"<figure><h4>{html.escape(title)}</h4>{names}{drawn}</figure>"


def _health(run: workdir.Run, unit: str) -> str:
  """Small charts of every metric that has no section of its own, by group."""
  groups: dict[str, list[str]] = {title: [] for title, _, _ in HEALTH}
  for key in run.keys:
    if ELSEWHERE.match(key):
      continue
    named = next((title for title, _, pattern in HEALTH if re.search(pattern, key)), None)
    prefix, slash, _ = key.partition("/")
    groups.setdefault(named or (f"Other: {prefix}" if slash else "Other"), []).append(key)
  hints = {title: hint for title, hint, _ in HEALTH}
  parts = []
  for title, keys in groups.items():
    if keys:
      figures = "".join(_panel(run, key, unit, log=title == "Drift") for key in keys)
      hint = f'<p class="hint">{hints[title]}</p>' if hints.get(title) else ""
      parts.append(
        f'<div class="group" style="--n:{len(keys)}"><h3>{html.escape(title)}</h3>{hint}'
        f'<div class="small">{figures}</div></div>'
      )
  if not parts:
    return MISSING.format("No other metrics were logged.")
  hint = (
    f'<p class="hint">A line of many {unit}s shows means of consecutive ones; its band reaches '
    "from their least to their largest value.</p>"
  )
  return f'{hint}<div class="groups">{"".join(parts)}</div>'


def _panel(run: workdir.Run, key: str, unit: str, log: bool) -> str:
  series = run.series(key)
  points = charts.binned(series, SMALL, unit)
  # A drift of zero has no place on a logarithmic axis.
  log = log and all(v > 0 for _, v in series if math.isfinite(v))
  drawn = charts.line_chart(
    [charts.Line(key, points)], x_range=run.steps, x_label=unit, title=key, width=340, height=190,
    log=log,
  )
  finite = [v for _, v in series if math.isfinite(v)]
  gaps = len(series) - len(finite)
  caption = f"last {charts.shown(finite[-1])}" if finite else ""
  caption += f"; {gaps} value(s) not finite" if gaps else ""
  return (
    f"<figure><h4>{html.escape(key)}</h4>{drawn}"
    f"<figcaption>{caption.removeprefix('; ')}</figcaption></figure>"
  )


def _timings(run: workdir.Run, unit: str) -> str:
  """Seconds by phase, stacked over the run and in a table."""
  phases = [k.removeprefix("seconds/") for k in run.keys if k.startswith("seconds/")]
  # Compiling happens within the other phases, and evaluations are between the iterations.
  phases = [phase for phase in phases if phase not in ("total", "compile", "evaluate")]
  rows = [row for row in run.rows if any(f"seconds/{phase}" in row for phase in phases)]
  left_out = ""
  if len(rows) > 2:
    left_out = f" The first {unit}, which compiles, is left out."
    rows = rows[1:]
  if not rows:
    return MISSING.format("No seconds by phase were logged.")
  table = {
    phase: [_finite(row.get(f"seconds/{phase}")) for row in rows] for phase in phases
  }
  inside = [math.fsum(column) for column in zip(*table.values())]
  rest = [max(_finite(r.get("seconds/total")) - s, 0.0) for r, s in zip(rows, inside)]
  if math.fsum(rest) > 0.005 * math.fsum(inside):
    table["outside phases"] = rest
  totals = [math.fsum(column) for column in zip(*table.values())]
  everything = math.fsum(totals) or 1.0
  order = sorted(table, key=lambda phase: -math.fsum(table[phase]))
  lines = "".join(
    f'<tr><td><span class="swatch c{min(k, charts.COLORS - 1)}"></span>{html.escape(phase)}</td>'
    f'<td class="number">{statistics.median(table[phase]):.3g}</td>'
    f'<td class="number">{100 * math.fsum(table[phase]) / everything:.1f} %</td></tr>'
    for k, phase in enumerate(order)
  )
  chart = _stacked(run, unit, [row["step"] for row in rows], [(p, table[p]) for p in order])
  return (
    f'<p class="hint">Wall time of an {unit} by phase.{left_out}</p><div class="large">'
    f"<figure><h4>Seconds by phase</h4>{chart}</figure>"
    '<figure class="scroll"><table><thead><tr><th>phase</th><th class="number">median seconds</th>'
    f'<th class="number">share of all time</th></tr></thead><tbody>{lines}'
    f'<tr class="all"><td>an {unit}</td><td class="number">{statistics.median(totals):.3g}</td>'
    "<td></td></tr></tbody></table></figure></div>"
  )


def _stacked(run: workdir.Run, unit: str, steps: list[int], parts: list[tuple[str, Any]]) -> str:
  """Means of consecutive steps as bars; what exceeds the colours is drawn as one."""
  most = charts.COLORS - 1
  if len(parts) > charts.COLORS:
    rest = [math.fsum(column) for column in zip(*(values for _, values in parts[most:]))]
    parts = [*parts[:most], ("the rest", rest)]
  binned = [
    (name, charts.binned(list(zip(steps, values)), SMALL, unit)) for name, values in parts
  ]
  hovers = [
    f"{unit} {points[0].x:g}: "
    + ", ".join(f"{name} {p.y:.3g} s" for (name, _), p in zip(binned, points))
    for points in zip(*(points for _, points in binned))
  ]
  xs = [point.x for point in binned[0][1]]
  drawn = charts.stacked_chart(
    xs, [(name, [p.y for p in points]) for name, points in binned], hovers,
    x_range=(xs[0], xs[-1]), x_label=unit, title="seconds by phase",
  )
  return charts.legend([(name, color) for color, (name, _) in enumerate(parts)]) + drawn


def _finite(value: float | None) -> float:
  return value if value is not None and math.isfinite(value) else 0.0


def _config(run: workdir.Run) -> str:
  if run.config is None:
    return MISSING.format("No configuration was found.")
  flat = flatten(metrics.without_secrets(run.config))
  return f"<details><summary>{len(flat)} keys</summary>{_table(flat)}</details>"


def _versions(run: workdir.Run) -> str:
  return _table(flatten(run.info)) if run.info else MISSING.format("run.json was not found.")


def flatten(tree: Any, path: str = "") -> dict[str, str]:
  """Dotted names of the leaves of nested mappings, and their values as text."""
  if isinstance(tree, Mapping) and tree:
    leaves: dict[str, str] = {}
    for name, value in tree.items():
      leaves |= flatten(value, f"{path}.{name}" if path else str(name))
    return leaves
  return {path: str(tree)}


def _table(flat: Mapping[str, str]) -> str:
  rows = "".join(
    f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
    for name, value in flat.items()
  )
  return f'<div class="scroll"><table class="config"><tbody>{rows}</tbody></table></div>'
