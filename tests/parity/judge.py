"""Recorded chat completions: what the judge reads out of each, null for no score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.parity import cases
from unigrpo_jax.data import exam_points
from unigrpo_jax.rewards.judge import answers, templates

MIN_MASS = 0.05
ROUNDED = cases.Tolerance(1e-6, 0.0)  # recorded with six decimals


@cases.file_case("*answers*.jsonl")
def read_answers(path, report):
  for line in path.read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    found = read_out(record)
    for name, expected in record["expect"].items():
      # null, no score, is the only thing that no number equals.
      as_text = [None if value is None else "a score" for value in (found[name], expected)]
      report.check_equal(record["task"], name, *map(str, as_text), cases.EXACT)
      if expected is not None and found[name] is not None:
        report.check_equal(record["task"], name, found[name], expected, ROUNDED)


@cases.file_case("*exam_points*.jsonl")
def read_points(path, report):
  for line in path.read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    found = [
      [point.question, point.answer, str(list(point.needs))] for point in exam_points.read(record)
    ]
    expected = [_point(item) for item in record.get("points") or record["vqa_list"]]
    report.check_equal("points", record["prompt"], found, expected, cases.EXACT)


def _point(item: Any) -> list[str]:
  """[question, answer, needs] of an object, a question, or GenEval2's [question, answer]."""
  if isinstance(item, str):
    return [item, "yes", "[]"]
  if isinstance(item, list):
    return [item[0], str(item[1]), "[]"]
  return [item["question"], str(item.get("answer", "yes")), str(item.get("needs", []))]


@cases.file_case("*judge/templates.json")
def shipped_templates(path, report):
  for name, record in json.loads(path.read_text(encoding="utf-8")).items():
    shipped = (templates.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    report.check_equal("text", name, shipped.rstrip("\n"), record["text"], cases.EXACT)


def read_out(record: dict[str, Any]) -> dict[str, Any]:
  """What is read out of one line of answers.jsonl, with the names of its "expect"."""
  reply = answers.Reply.parse(record["body"])
  match record["task"]:
    case "yes_no":
      return {
        "p_yes": _or_none(answers.p_yes, reply, MIN_MASS),
        "binary": _or_none(answers.credit, reply, "yes"),
      }
    case "count":
      return {
        "p_answer": _or_none(answers.p_answer, reply, record["answer"], MIN_MASS, False),
        "binary": _or_none(answers.credit, reply, record["answer"]),
      }
    case "structured_points":
      said = _or_none(answers.listed, reply, record["points"])
      met = said and [_or_none(answers.credit, answers.Reply(text), "yes") for text in said]
      if not met or None in met:
        met = None
      return {"answers": met, "mean": met and float(np.mean(met))}
  scale = answers.SCALES[record["task"]]
  values = scale.read(reply)
  score = _or_none(scale.score, values)
  return values | {"mean_0_1": score, "score_over_5": score, "wiscore": score}


def _or_none(read, *args):
  try:
    return read(*args)
  except answers.Unreadable:
    return None
