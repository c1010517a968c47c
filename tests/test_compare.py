"""The comparison of methods: its table by hand, what is only read, and what signals do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.refusals import refusal
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.tools import compare

ROOT = pathlib.Path(__file__).parents[1]


def _row(think, plain, reasoning):
  return {
    "eval/think/reward": think, "eval/plain/reward": plain,
    "eval/think/iconworld_reasoning": reasoning,
  }


def test_a_line_has_means_over_seeds_and_each_gain():
  before = _row(0.4, 0.1, 0.6)
  outcomes = {
    "UniGRPO": {0: {"before": before, "after": _row(0.7, 0.2, 0.9)},
                1: {"before": before, "after": _row(0.6, 0.2, 0.8)}},
    "FlowGRPO": {0: {"before": before, "after": _row(0.4, 0.25, 0.6)}},
  }
  lines = compare.table(outcomes).splitlines()
  assert lines[2].startswith("| SFT | think | 0.400 |") and "| 0.600 |" in lines[2]
  assert lines[3].startswith("| SFT | plain | 0.100 |")
  assert lines[4] == "| UniGRPO | think | 0.650 |  |  | 0.850 | +0.300, +0.200 |"
  # A method without thinking is judged without it.
  assert lines[5] == "| FlowGRPO | plain | 0.250 |  |  |  | +0.150 |"


ARGUMENTS = ["--methods", "TextGRPO", "--seeds", "5", "--config.steps=3"]
# The last step as it is logged: its training, then its evaluation.
ROWS = [
  {"step": 0} | _row(0.4, 0.1, 0.6), {"step": 3, "reward/mean": 0.5},
  {"step": 3} | _row(0.5, 0.1, 0.7),
]


def _write_rows(folder, rows):
  folder.mkdir(exist_ok=True)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
  _write_rows(tmp_path / "text_grpo_5", ROWS)
  monkeypatch.setattr(compare, "train", None)
  compare.main([f"--workdir={tmp_path}", *ARGUMENTS])
  assert "| TextGRPO | think | 0.500 |" in (tmp_path / "results.md").read_text()


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path):
  training = compare.prepare("TextGRPO", 5, tmp_path, "tiny", ["--config.steps=3"])
  assert training.outcome() is None
  _write_rows(tmp_path / "text_grpo_5", ROWS[:2])
  assert training.outcome() is None
  _write_rows(tmp_path / "text_grpo_5", ROWS)
  assert training.outcome()["after"]["eval/think/reward"] == 0.5


def test_a_run_of_another_configuration_is_not_read(tmp_path, monkeypatch):
  folder = tmp_path / "text_grpo_5"
  _write_rows(folder, ROWS)
  overrides = ["--config.steps=3", "--config.seed=5"]
  spec = rl.read(config_files.load(f"{config_files.FOLDER / 'text_grpo.py'}:tiny", overrides))
  (folder / "config.json").write_text(json.dumps(spec.run.config))
  monkeypatch.setattr(compare, "train", None)
  arguments = [f"--workdir={tmp_path}", *ARGUMENTS]
  compare.main([*arguments, "--config.microbatch=12"])  # changes memory and speed alone
  for override, message in (
    ("text.clip_low=0.1", "text_grpo_5: config.text.clip_low=0.1 but the run"),
    ("learning_rate.und=0.1", "text_grpo_5: config.learning_rate.und=0.1 but the run"),
    ("eval.prompts=9", "text_grpo_5: config.eval.prompts=9 but the run"),
    ("eval.every=0", "TextGRPO is compared by its evaluations with mode think"),
  ):
    assert message in refusal(compare.main, [*arguments, f"--config.{override}"])


@pytest.mark.parametrize("arguments, message", [
  (["--methods", "NoGRPO"], "NoGRPO"),
  (["--seeds"], "--seeds"),
  (["--variants=tinny"], "'tinny' is none of"),
  (["--config.flow.wieght=1"], "no key 'wieght'"),
  (["--config.flow.weight=two"], "--config.flow.weight=two"),
  (["--config=configs/sft.py"], "--config=configs/sft.py"),
  (["--set", "steps=3"], "Unknown command line flag 'set'"),
  (["--config.eval.modes=('plain',)"], "UniGRPO is compared by its evaluations"),
])
def test_mistakes_are_found_before_anything_is_trained(tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(compare, "train", None)
  assert message in refusal(compare.main, [f"--workdir={tmp_path / 'w'}", *arguments])
  assert not (tmp_path / "w").exists()


TRAINING = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def save(*_):
  (folder / "saved").write_text(os.environ["JAX_COMPILATION_CACHE_DIR"])
  sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
{rest}
"""


def _train(folder, rest):
  """Runs `compare.train` in a process of its own, with a stand-in for the training."""
  (folder / "stand_in").mkdir()
  code = TRAINING.format(folder=str(folder), rest=rest)
  (folder / "stand_in" / "train.py").write_text(code)
  program = (
    "import pathlib, sys\n"
    "from unigrpo_jax import errors\n"
    "from unigrpo_jax.tools import compare\n"
    f"folder = pathlib.Path({str(folder)!r})\n"
    f"sys.executable = {str(folder / 'python')!r}\n"
    "training = compare.Training('UniGRPO, seed 0', 'think', folder, 3, ())\n"
    "errors.report(lambda: compare.train(training, folder / 'compiled'))\n"
    "print('next')\n"
  )
  (folder / "python").write_text(
    f"#!/bin/sh\nexec {sys.executable} {folder}/stand_in/train.py\n"
  )
  (folder / "python").chmod(0o755)
  environ = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  return subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, env=environ, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_save_itself_and_ends_the_comparison(tmp_path, number):
  process = _train(tmp_path, "time.sleep(300)")
  while not (tmp_path / "started").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130 and out == "== UniGRPO, seed 0\n"
  assert err == "stopped in UniGRPO, seed 0; run the same command again to continue\n"
  assert (tmp_path / "saved").read_text() == str(tmp_path / "compiled")


def test_a_training_that_fails_ends_the_comparison_with_its_status(tmp_path):
  process = _train(tmp_path, "print('error: a key', file=sys.stderr); sys.exit(2)")
  out, err = process.communicate(timeout=120)
  assert process.returncode == 2 and "next" not in out
  assert err == "error: a key\nerror: UniGRPO, seed 0: training ended with status 2\n"


def test_a_training_that_succeeds_is_read(tmp_path):
  rows = "".join(json.dumps(row) + "\n" for row in ROWS)
  process = _train(tmp_path, f"(folder / 'metrics.jsonl').write_text({rows!r})")
  out, err = process.communicate(timeout=120)
  assert (process.returncode, out, err) == (0, "== UniGRPO, seed 0\nnext\n", "")
