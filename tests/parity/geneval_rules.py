"""GenEval's verdicts on recorded detections."""

from __future__ import annotations

import json

from tests.parity import cases
from unigrpo_jax.geneval import rules

MASK2FORMER = (0.3, 0.9)
RECORDED = {  # its name in the recording: rule, clip
  "official": ("official", True), "strict": ("strict", True), "soft_unirl": ("soft", False),
  "soft_flow_grpo": ("soft_flow_grpo", False),
}
ROUNDED = cases.Tolerance(5e-7, 0.0)  # recorded with six decimals


@cases.file_case("*rules*.jsonl")
def verdicts(path, report):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for name, (rule, clip) in RECORDED.items():
    made = [
      rules.verdict(found(row), row["metadata"], rule=rule, clip=clip)[0] for row in rows
    ]
    report.check_equal(name, name, made, [float(row[name]) for row in rows], ROUNDED)


def found(row) -> list[rules.Found]:
  """The detections of a recorded case that count."""
  objects = [
    rules.Found(item["class"], item["color"], tuple(item["box"]), item["score"])
    for item in row["detections"]
  ]
  return rules.kept(objects, row["metadata"], thresholds=MASK2FORMER)
