"""When a run counts as diverged, by logs that are made up."""

import json
import math

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax.benchmarks import verdict

R, V = "eval/think/reward", "eval/think/iconworld_strict"


def log(rewards, strict=None, every=10, **training):
  """Rows of a run evaluated every 10 iterations; `training` are metrics by iteration."""
  rows = []
  for number, reward in enumerate(rewards):
    step = number * every
    if step:
      values = {name: by_step[step] for name, by_step in training.items() if step in by_step}
      rows.append({"step": step, "loss/total": 0.1, "flow/mse": 0.01} | values)
    row = {"step": step, R: reward, f"{R}_se": 0.02, V: 0.4 if strict is None else strict[number]}
    rows.append(row)
  return rows


def test_a_run_without_gain_did_not_diverge():
  assert verdict.verdict(log([0.5] * 8)) == (False, None, "")
  # Less than two standard errors below, and further below but not for long.
  assert verdict.verdict(log([0.5, 0.47, 0.47, 0.47, 0.465])) == (False, None, "")
  assert not verdict.verdict(log([0.5, 0.5, 0.5, 0.3, 0.6, 0.6, 0.6, 0.6])).diverged


def test_b_three_evaluations_below_the_start():
  """Means of three: 0.5 at 30, 0.45 at 40 and 50, below 0.5 - 2 x 0.02."""
  falls = [0.5, 0.5, 0.5, 0.5, 0.35]
  assert verdict.verdict(log([*falls, 0.5, 0.6, 0.6])) == (False, None, "")  # for two only
  assert verdict.verdict(log([*falls, 0.5, 0.5, 0.9])) == (True, 40, "b")
  assert verdict.verdict(log([*falls, 0.4, 0.4, 0.4, 0.9, 0.9])) == (True, 40, "b")
  # To the end, where fewer than three are left.
  assert verdict.verdict(log([0.5, 0.5, 0.5, 0.5, 0.35])) == (True, 40, "b")
  # Two evaluations after the start are not three.
  assert verdict.verdict(log([0.5, 0.1, 0.1])) == (False, None, "")


def test_c_d_e_at_the_first_evaluation():
  strict = [0.4, 0.4, 0.19, 0.4]
  assert verdict.verdict(log([0.5] * 4, strict)) == (True, 20, "c")
  assert verdict.verdict(log([0.5] * 4, [0.4, 0.4, 0.2, 0.4])).diverged is False
  assert verdict.verdict(log([0.5] * 4, [0, 0, 0, 0])).diverged is False
  assert verdict.verdict(log([0.5] * 4, **{"flow/mse": {20: 1.2}})) == (True, 20, "d")
  assert verdict.verdict(log([0.5] * 4, **{"text/truncated": {30: 0.51}})) == (True, 30, "e")
  assert verdict.verdict(log([0.5] * 4, **{"text/truncated": {30: 0.5}})).diverged is False
  both = {"flow/mse": {20: 1.2}, "text/truncated": {20: 0.9}}
  assert verdict.verdict(log([0.5] * 4, strict, **both)) == (True, 20, "cde")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_what_is_not_finite(value):
  for name in ("loss/flow", "grad_norm/gen"):
    assert verdict.verdict(log([0.5] * 4, **{name: {20: value}})) == (True, 20, "a")
  # Between two evaluations, it counts at the second.
  rows = log([0.5] * 4)
  rows.insert(4, {"step": 13, "loss/text": value})
  assert verdict.verdict(rows) == (True, 20, "a")
  # A run ends with it.
  assert verdict.verdict(log([0.5] * 4), rejected=34) == (True, 34, "a")
  # A reward that failed is no sign of it.
  rows = log([0.5] * 4, **{"reward/mean": {20: math.nan}})
  assert not verdict.verdict(rows).diverged


def test_what_the_rule_needs_is_named():
  assert f"has no {R};" in refusal(verdict.verdict, [{"step": 0}])
  rows = [{"step": 0, R: 0.5}]
  assert "has no eval/think/reward_se" in refusal(verdict.verdict, rows)


def test_rows_of_a_run_have_errors_by_prompt(tmp_path):
  """Two images of a prompt count as their mean; other modes do not count."""
  scores = {"a kite": (0.2, 0.4), "a boat": (0.9, 0.9), "a hat": (0.0, 0.2)}
  rows = [
    {"mode": mode, "prompt": prompt, "rewards": {"reward": score * (mode == "think")}}
    for mode in ("plain", "think") for prompt, pair in scores.items() for score in pair
  ]
  folder = tmp_path / "evaluations" / "000000"
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps({"rows": rows}))
  lines = [{"step": 0, R: 0.433}, {"step": 1, "loss/total": None}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  first, second = verdict.read_rows(tmp_path)
  assert first[f"{R}_se"] == pytest.approx(np.std([0.3, 0.9, 0.1], ddof=1) / 3**0.5)
  assert verdict.verdict([first, second]) == (True, 1, "a")
  (folder / "results.json").unlink()
  assert "000000" in refusal(verdict.read_rows, tmp_path)
