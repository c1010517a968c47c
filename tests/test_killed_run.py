"""A run that is killed at any moment goes on as if nothing had happened. Slow: some minutes."""

import pathlib
import random
import subprocess
import sys
import time

import pytest

from tests import test_train_unigrpo
from unigrpo_jax import folders

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 20
SMALL = [
  "steps=12", "prompts_per_step=4", "rollout.prompts_at_once=2", "group_size=2", "microbatch=4",
  "rollout.max_tokens=24", "rollout.num_timesteps=7", "checkpoint_every=1", "eval.every=4",
  "eval.prompts=4", "eval.batch_size=4", "eval.num_timesteps=4", "ema_decay=0.9",
]


def _start(workdir, out):
  return subprocess.Popen(
    [sys.executable, "-m", "unigrpo_jax.train", "--config=configs/unigrpo.py:tiny",
     f"--workdir={workdir}", f"--config.export_to={out}",
     *(f"--config.{override}" for override in SMALL)],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def _files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.skipif(not folders.TINY_FOLDER.is_dir(), reason="the embedded checkpoint is missing")
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(tmp_path):
  start = time.monotonic()
  whole = _start(tmp_path / "whole", tmp_path / "a")
  text, _ = whole.communicate()
  assert whole.returncode == 0, text
  taken = time.monotonic() - start

  rng, kills = random.Random(0), 0
  while kills < KILLS:
    run = _start(tmp_path / "parts", tmp_path / "b")
    try:
      # From before the first line is printed to beyond the last step.
      run.communicate(timeout=rng.uniform(0.1, taken))
      assert run.returncode == 0
      break  # It got to its end; killing more would only repeat that.
    except subprocess.TimeoutExpired:
      run.kill()
      run.communicate()
      kills += 1
  last = _start(tmp_path / "parts", tmp_path / "b")
  text, _ = last.communicate()
  assert last.returncode == 0, text
  print(f"killed {kills} times")
  assert kills >= 3
  rows = [test_train_unigrpo.rows_of(tmp_path / name) for name in ("parts", "whole")]
  assert rows[0] == rows[1]
  assert _files(tmp_path / "b") == _files(tmp_path / "a")
