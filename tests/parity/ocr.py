"""The reward of recognised texts, as Flow-GRPO gives it and with all white space removed."""

from __future__ import annotations

import json

from tests.parity import cases
from unigrpo_jax.rewards import ocr

# A column -> what is removed from both texts.
WHITE_SPACE = {"reward": " ", "reward_all_whitespace_removed": r"\s+"}
NO_SCORE = -1.0
ROUNDED = cases.Tolerance(1e-6, 0.0)  # recorded with six decimals


@cases.file_case("*ocr*.jsonl")
def rewards_of_texts(path, report):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for name, space in WHITE_SPACE.items():
    recorded = [NO_SCORE if row[name] is None else row[name] for row in rows]
    report.check_equal(name, name, [score(row, space) for row in rows], recorded, ROUNDED)


def score(row, space) -> float:
  """The reward of a recorded text."""
  try:
    target = ocr.target_of(row["prompt"], row.get("metadata", {}))
  except ValueError:
    return NO_SCORE
  return ocr.score(*(ocr.canonical(s, whitespace=space) for s in (target, row["recognised"])))
