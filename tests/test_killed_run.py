"""A run that is killed at any moment continues as if nothing had happened. Slow: some minutes."""

import os
import pathlib
import random
import subprocess
import sys
import time

import chex
import pytest

from tests import test_train_unigrpo

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 20
STEPS = 60
SMALL = [
  f"steps={STEPS}", "prompts_per_step=4", "rollout.prompts_at_once=2", "group_size=2",
  "microbatch=4", "rollout.max_tokens=24", "rollout.num_timesteps=7", "checkpoint_every=1",
  "eval.every=4", "eval.prompts=4", "eval.batch_size=4", "eval.num_timesteps=4", "ema_decay=0.9",
]


def _start(workdir, out):
  return subprocess.Popen(
    [sys.executable, "-m", "unigrpo_jax.train", "--config=configs/unigrpo.py:tiny",
     f"--workdir={workdir}", f"--config.export_to={out}",
     *(f"--config.{override}" for override in SMALL)],
    # One device, where the tests have eight.
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def _wait_for_a_step(run) -> float:
  """Seconds until a line of progress is printed."""
  start, lines = time.monotonic(), []
  for line in run.stdout:
    lines.append(line)
    if line.startswith("step "):
      return time.monotonic() - start
  raise AssertionError(f"the run ended with status {run.wait()}: {''.join(lines)}")


def _files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(tmp_path):
  whole = _start(tmp_path / "whole", tmp_path / "a")
  start = time.monotonic()
  first = _wait_for_a_step(whole)
  text, _ = whole.communicate()
  assert whole.returncode == 0, text
  step = (time.monotonic() - start - first) / (STEPS - 1)

  rng = random.Random(0)
  for number in range(KILLS):
    run = _start(tmp_path / "parts", tmp_path / "b")
    if number % 4 == 0:
      # Before, or while, the programs are compiled and the first checkpoint is written.
      time.sleep(rng.uniform(0, first))
    else:
      # A few steps later, so that KILLS of them do not reach the end.
      first = _wait_for_a_step(run)
      time.sleep(rng.uniform(0, 2 * step))
    assert run.poll() is None, f"it ended before kill {number + 1}: {run.communicate()[0]}"
    run.kill()
    run.communicate()
  last = _start(tmp_path / "parts", tmp_path / "b")
  text, _ = last.communicate()
  assert last.returncode == 0, text
  rows = [test_train_unigrpo.rows_of(tmp_path / name) for name in ("parts", "whole")]
  assert rows[0] == rows[1]
  (step, got, record), (last, want, other) = (
    test_train_unigrpo.saved_in(tmp_path / name) for name in ("parts", "whole")
  )
  assert step == last == STEPS and record["prompt_position"] == other["prompt_position"]
  chex.assert_trees_all_equal(got, want)
  assert _files(tmp_path / "b") == _files(tmp_path / "a")
