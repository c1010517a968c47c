"""Supervised training on two hosts: the numbers of one, and all stop at one's bad example."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS, ROWS = 5, 4
CHANGES = {
  "steps": STEPS, "sequences_per_step": ROWS, "microbatch": ROWS, "noise_draws": 2,
  "checkpoint_every": 9, "log_every": 1, "limits.images": ROWS, "warmup_steps": 0, "eps": 1e-2,
}


@pytest.fixture
def shards(tmp_path):
  """An epoch of as many examples as the run has rows."""
  folder = tmp_path / "shards"
  folder.mkdir()
  for number in range(STEPS * ROWS):
    PIL.Image.new("RGB", (32, 32), (12 * number,) * 3).save(folder / f"{number}.png")
  lines = [{"prompt": "a kite", "image": f"{n}.png"} for n in range(STEPS * ROWS)]
  (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return folder


@pytest.fixture
def train(shallow, shards, tmp_path):
  """Trains on so many hosts, two devices in all: (workdir, hosts) -> [(status, errors)]."""
  def train(name, count):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={2 // count}")
    environ = os.environ | {
      "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
      "GIT_DIR": os.devnull,  # hosts compare commits, and one may be made while they start
    }
    command = [
      sys.executable, "-m", "unigrpo_jax.train", "--config=configs/sft.py:tiny",
      f"--workdir={tmp_path / name}", f"--config.init_from={shallow}",
      f"--config.data.folder={shards}", *(f"--config.{key}={CHANGES[key]}" for key in CHANGES),
    ]
    connected = lambda host: [
      f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={host}"
    ] if count > 1 else []
    processes = [
      subprocess.Popen(
        [*command, *connected(host)], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
      )
      for host in range(count)
    ]
    try:
      errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
      for process in processes:
        process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors)]

  return train


def _rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _checkpoints(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("bad_step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_hosts_stop_at_a_bad_example_of_one_and_continue_as_one_host(
  train, shards, tmp_path, bad_step
):
  """The state before the bad batch is saved, once there is one that all hosts can agree on."""
  want = None
  if bad_step == 3:
    [(status, error)] = train("one", 1)
    assert status == 0, error
    want = _rows(tmp_path / "one")
  # Host 1 makes the last half of each step's rows.
  bad = np.random.default_rng((0, 1, 0)).permutation(STEPS * ROWS)[bad_step * ROWS + 2]
  image = shards / f"{bad}.png"
  readable = image.read_bytes()
  image.write_bytes(b"")
  (first, first_error), (second, second_error) = train("two", 2)
  assert first == second == 2, (first_error, second_error)
  message = f"{shards / 'a.jsonl'}, line {bad + 1}: {image}: not readable as an image"
  assert f"error: host 1 of 2: {message}" in first_error
  assert f"error: {message}" in second_error
  assert _checkpoints(tmp_path / "two") == ([] if bad_step == 1 else [bad_step])
  if want is not None:
    image.write_bytes(readable)
    for status, error in train("two", 2):
      assert status == 0, error
    got = _rows(tmp_path / "two")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5]
    for a, b in zip(want, got, strict=True):
      assert a == pytest.approx(b, rel=1e-4)
