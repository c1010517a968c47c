"""The comparison's page in Markdown: Tables 1 and 2, notes, and further results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

from unigrpo_jax.benchmarks import geneval, intervals, markdown
from unigrpo_jax.tools.compare import runs

DASH = "–"
YES = {True: "yes", False: "no", None: DASH}
WHICH = {runs.LAST: "last checkpoint", runs.BEST: "best checkpoint by the {} on validation"}
GUIDANCE = {True: "with guidance", False: "without guidance"}


def text(record: Mapping[str, Any]) -> str:
  """The whole page; `record` is `Comparison.record` as plain JSON values."""
  parts = ["# Comparison", "", _how(record), ""]
  for which in (runs.LAST, runs.BEST):
    for guided in (True, False):
      key = f"{which}, {GUIDANCE[guided]}"
      if any(key in row["scores"] for row in record["rows"]):
        reward = "learned reward" if record["reward_checksum"] else "reward"
        title = f"{WHICH[which].format(reward)}, {GUIDANCE[guided]}"
        parts += [f"## Table 1: {title}", "", table1(record, key), ""]
        parts += [f"## Table 2: {title}", "", table2(record, key), ""]
  if record.get("sweep"):
    parts += ["## Learning rates", "", _sweep(record["sweep"]), ""]
  if record.get("agreement"):
    parts += ["## Exam points", "", _agreement(record["agreement"]), ""]
  if record.get("at_equal_reward"):
    parts += ["## Regularisers", "", _regularisers(record["at_equal_reward"]), ""]
  if record.get("hacking"):
    parts += ["## The learned reward and the verifier", "", _hacking(record["hacking"]), ""]
  parts += [_notes(record)]
  return "\n".join(parts).rstrip() + "\n"


def table1(record: Mapping[str, Any], key: str) -> str:
  """Table 1: TA, GenEval and the learned reward of each row, by seed, and differences to UniGRPO.

  `key` selects checkpoints and guidance, "last, with guidance" for example.
  """
  head = [
    "#", "method", "trained from", "trained thinking", "evaluated thinking", "TA", "GenEval",
    "learned reward", "TA by seed", "GenEval by seed", "TA − UniGRPO", "GenEval − UniGRPO",
  ]

  def cells(row: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
      return [DASH] * 7
    difference = scores.get("difference")
    return [
      *(estimate(scores[name]) for name in ("ta", "geneval", "reward")),
      _seeds(scores, "ta"), _seeds(scores, "geneval"),
      *(estimate(difference[name], sign=True) if difference else "" for name in ("ta", "geneval")),
    ]

  return _table(record, key, head, cells)


def table2(record: Mapping[str, Any], key: str) -> str:
  """Table 2: GenEval by category; the strict score also counts extra objects as errors."""
  head = [
    "#", "method", "trained from", "trained thinking", "evaluated thinking",
    *(name.replace("_", " ") for name in geneval.CATEGORIES), "overall", "strict overall",
  ]

  def cells(row: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
      return [DASH] * (len(geneval.CATEGORIES) + 2)
    by_category = [scores["categories"].get(name) for name in geneval.CATEGORIES]
    return [estimate(part) for part in (*by_category, scores["geneval"], scores["strict"])]

  return _table(record, key, head, cells)


def _table(record: Mapping[str, Any], key: str, head: Sequence[str], cells) -> str:
  """A table with the columns that both share; `cells(row, scores)` returns the others."""
  lines: list[list[str]] = []
  numbered, extra = 0, False
  for row in record["rows"]:
    if row["extra"] and not extra:  # The rule.
      extra = True
      lines.append(["**further rows**", *[""] * (len(head) - 1)])
    numbered += not row["extra"]
    label = "" if row["extra"] else str(numbered)
    name = row["name"] + (" *" if row["note"] else "")
    lines.append([
      label, name, row["trained_from"] or DASH, YES[row["trained_thinking"]],
      YES[row["evaluated_thinking"]], *cells(row, row["scores"].get(key)),
    ])
  return markdown.table(head, lines)


def estimate(part: Mapping[str, Any] | None, sign: bool = False) -> str:
  """"0.512 ± 0.031", the mean and half its 95 % interval over prompts; a dash without a mean."""
  if part is None or part["mean"] is None:
    return DASH
  mean = f"{part['mean']:+.3f}" if sign else f"{part['mean']:.3f}"
  return mean if part["se"] is None else f"{mean} ± {intervals.NORMAL * part['se']:.3f}"


def _seeds(scores: Mapping[str, Any], name: str) -> str:
  values = ", ".join(f"{value:.3f}" for value in scores["by_seed"][name] if value is not None)
  half = scores["across_seeds"][name]["half"]
  if half is None or math.isnan(half):
    return values
  return f"{values} ({scores['across_seeds'][name]['mean']:.3f} ± {half:.3f})"


def _how(record: Mapping[str, Any]) -> str:
  b = record["benchmark"]
  return (
    f"All methods: start {record['start']} ({record['start_checkpoint']}), reward "
    f"{record['reward']} ({record['reward_checksum'] or 'no checksum'}), {record['iterations']} "
    f"iterations of {record['reward_calls']} reward calls, seeds "
    f"{', '.join(map(str, record['seeds']))}. TA: {b['ta_prompts']} prompts, GenEval: "
    f"{b['prompts']}, {b['images']} images each, noise seed {b['seed']}. ± is half a 95 % interval "
    "over prompts, a prompt's images of all seeds together; differences are paired by prompt, from "
    "the same noise. In parentheses: mean over seeds and its t interval."
  )


def _sweep(sweep: Mapping[str, Any]) -> str:
  factors = sorted({factor for of in sweep.values() for factor in of["rewards"]}, key=float)
  head = ["method", *(f"x {float(factor):.3g}" for factor in factors), "chosen"]
  lines = []
  for method, of in sweep.items():
    shown = [of["rewards"].get(factor) for factor in factors]
    cells = [DASH if value is None else f"{value:.3f}" for value in shown]
    chosen = DASH if of["chosen"] is None else f"x {of['chosen']:.3g}"
    lines.append([method, *cells, chosen])
  return (
    "Learned reward on the validation prompts after the last iteration of one seed, by the factor "
    "of the learning rates; the highest was chosen, and nothing else was looked at.\n\n"
    + markdown.table(head, lines)
  )


def _agreement(by_mode: Mapping[str, Mapping[str, Any]]) -> str:
  head, lines = ["SFT, evaluated", "same answer", "Cohen's kappa", "answers"], []
  for mode, of in by_mode.items():
    shares = (_interval(*of[name]) for name in ("accuracy", "kappa"))
    lines.append([mode, *shares, str(of["answers"])])
  return (
    "TA is the verifier's verdict on each exam point. How often the learned reward, asked about "
    "the point alone, gives the same (intervals over prompts):\n\n" + markdown.table(head, lines)
  )


def _interval(value: float | None, low: float | None, high: float | None) -> str:
  """A value with its interval; kappa has none where all answers are the same."""
  ends = "" if None in (low, high) else f" ({low:.3f} to {high:.3f})"
  return DASH if value is None else f"{value:.3f}{ends}"


def _regularisers(strict: Mapping[str, float]) -> str:
  scores = ", ".join(f"{name} {value:.3f}" for name, value in strict.items())
  return (
    "The verifier's strict score on validation, at the highest learned reward that training with "
    f"each of them reached: {scores}."
  )


def _hacking(runs_of: Mapping[str, Mapping[str, Any]]) -> str:
  head = [
    "trained", "seed", "hacked from", "learned reward", "strict score at the start", "at its peak",
    "at the end", "of the checkpoint by reward", "AUC", "false yes", "ECE",
  ]
  lines = []
  for method, seeds in runs_of.items():
    for seed, run in seeds.items():
      ends = [run["evaluations"][place] for place in (0, -1)]
      changes = [
        " → ".join(DASH if one[name] is None else f"{one[name]:.3f}" for one in ends)
        for name in ("reward", "auc", "false_yes", "ece")
      ]
      lines.append([
        method, seed, DASH if run["onset"] is None else str(run["onset"]), changes[0],
        f"{ends[0]['score']:.3f}", *map(_at, (run["peak"], run["end"], run["chosen"])),
        *changes[1:],
      ])
  return (
    "On validation, from the first evaluation to the last. A reward is hacked from the evaluation "
    "on at which the strict score is below its highest so far by more than half its 95 % interval "
    "while the reward is at its highest. In parentheses: the iteration. The peak is what choosing "
    "a checkpoint by the verifier would have found. AUC: how often the reward ranks a right "
    "picture over a wrong one; false yes: how many of the pictures that it calls right are "
    "wrong.\n\n" + markdown.table(head, lines)
  )


def _at(place: Sequence[float]) -> str:
  step, value = place
  return f"{value:.3f} ({step})"


def _notes(record: Mapping[str, Any]) -> str:
  notes = dict.fromkeys(f"- {row['name']}: {row['note']}" for row in record["rows"] if row["note"])
  return "\n".join(["## Notes", "", *notes]) if notes else ""
