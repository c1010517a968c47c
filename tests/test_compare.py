"""The table of methods, by hand, and config files that are loaded from code."""

import json

import pytest

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files
from unigrpo_jax.tools import compare


def _row(think, plain, reasoning):
  return {
    "eval/think/reward": think, "eval/plain/reward": plain,
    "eval/think/iconworld_reasoning": reasoning,
  }


def test_a_line_has_means_over_seeds_and_each_gain():
  before = _row(0.4, 0.1, 0.6)
  found = {
    "UniGRPO": {0: {"before": before, "after": _row(0.7, 0.2, 0.9)},
                1: {"before": before, "after": _row(0.6, 0.2, 0.8)}},
    "FlowGRPO": {0: {"before": before, "after": _row(0.4, 0.25, 0.6)}},
  }
  lines = compare.table(found).splitlines()
  assert lines[2].startswith("| SFT | think | 0.400 |") and "| 0.600 |" in lines[2]
  assert lines[3].startswith("| SFT | plain | 0.100 |")
  assert lines[4] == "| UniGRPO | think | 0.650 |  |  | 0.850 | +0.300, +0.200 |"
  # A method without thinking is judged without it.
  assert lines[5] == "| FlowGRPO | plain | 0.250 |  |  |  | +0.150 |"


def test_a_finished_run_is_only_read(tmp_path):
  folder = tmp_path / "text_grpo_5"
  folder.mkdir()
  rows = [{"step": 0} | _row(0.4, 0.1, 0.6), {"step": 3} | _row(0.5, 0.1, 0.7)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  compare.main([
    f"--workdir={tmp_path}", "--methods", "TextGRPO", "--seeds", "5", "--set", "steps=3"])
  assert "| TextGRPO | think | 0.500 |" in (tmp_path / "results.md").read_text()


def test_a_run_of_another_configuration_is_not_read(tmp_path):
  folder = tmp_path / "text_grpo_5"
  folder.mkdir()
  rows = [{"step": 0} | _row(0.4, 0.1, 0.6), {"step": 3} | _row(0.5, 0.1, 0.7)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = config_files.load("text_grpo", "tiny", ["steps=3"])
  config.seed = 5
  (folder / "config.json").write_text(config.to_json())
  asked = [f"--workdir={tmp_path}", "--methods", "TextGRPO", "--seeds", "5", "--set", "steps=3"]
  compare.main(asked)
  with pytest.raises(errors.InputError, match="text_grpo_5: config.text.clip_low=0.1 but the run"):
    compare.main([*asked, "text.clip_low=0.1"])
  with pytest.raises(errors.InputError, match="TextGRPO is compared by its evaluations"):
    compare.main([*asked, "eval.every=0"])


@pytest.mark.parametrize("name,variant,override,message", [
  ("unigrop", "", "", "no such config; expected one of flow_grpo, sft, text_grpo, unigrpo"),
  ("unigrpo", "tinny", "", "'tinny' is none of"),
  ("unigrpo", "tiny", "flow.wieght=1", "no key 'flow.wieght'"),
  ("unigrpo", "tiny", "flow.weight=two", "values are JSON"),
  ("unigrpo", "tiny", 'steps="many"', "--set steps"),
])
def test_configs_that_cannot_be_loaded(name, variant, override, message):
  with pytest.raises(errors.InputError, match=message):
    config_files.load(name, variant, [override] if override else [])
