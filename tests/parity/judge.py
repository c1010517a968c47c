"""Recorded chat completions: what the judge reads out of each, null for no score."""

from __future__ import annotations

from typing import Any

import numpy as np

from unigrpo_jax.rewards.judge import answers

MIN_MASS = 0.05


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


def same(found: Any, expected: Any) -> bool:
  """Whether what was read out is what is recorded, to its six digits; null is null alone."""
  if expected is None or found is None:
    return found is expected
  return bool(np.all(np.abs(np.subtract(found, expected)) <= 1e-6))
