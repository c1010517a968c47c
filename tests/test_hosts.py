"""Several hosts: two processes of four devices each, connected by JAX over the loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import rewards_of_hosts, test_train_unigrpo
from unigrpo_jax import errors, hosts, recipe, runs, sharding, train

ROOT = pathlib.Path(__file__).parents[1]
base = test_train_unigrpo.base
# Two chunks an iteration, of which each host has one group; the last mode fills its batch up.
SMALL = {
  "steps": 4, "prompts_per_step": 4, "rollout.prompts_at_once": 2, "group_size": 2, "microbatch": 8,
  "rollout.max_tokens": 6, "rollout.num_timesteps": 5, "rollout.window_range": [0, 3],
  "rollout.window_size": 2, "text.chunk": 8, "checkpoint_every": 1, "keep_checkpoints": 1,
  "eval.every": 4, "eval.prompts": 3, "eval.batch_size": 4, "eval.keep": 2,
  "eval.modes": ["think"], "eval.num_timesteps": 4, "warmup_steps": 0, "schedule": "constant",
  "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
}
CONFIG = """
from unigrpo_jax import config_files

def get_config():
  config = config_files.load("unigrpo", "tiny")
  config.rewards = {{"rewards_of_hosts:brightness": 1.0}}
  config.update_from_flattened_dict({values!r})
  return config
"""


def _port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _start(arguments, **environ):
  """One process for each host; `arguments` are those of python, for each of them."""
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  cache = jax.config.jax_compilation_cache_dir
  port = _port()
  return [
    subprocess.Popen(
      [sys.executable, *own, f"--coordinator=127.0.0.1:{port}", "--processes=2",
       f"--process={number}"],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
      } | environ,
    )
    for number, own in enumerate(arguments)
  ]


def _end(processes):
  """[(status, standard output, standard error)] of each host."""
  try:
    found = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, found)]


def _seen(folder, host):
  lines = (folder / f"{host}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture
def config_file(base, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG.format(values=SMALL | {"init_from": str(base)}))
  return path


def test_a_run_on_two_hosts(config_file, base, tmp_path, monkeypatch):
  """One is killed, then one is told to stop; in the end it is the run of one host."""
  workdir = tmp_path / "two"
  command = ["-m", "unigrpo_jax.train", f"--config={config_file}", f"--workdir={workdir}"]

  def start(name, end=""):
    (tmp_path / name).mkdir()
    return _end(_start([command] * 2, REWARDS_SEEN=str(tmp_path / name), REWARDS_END=end))

  # Calls of the reward: one for the evaluation, then two an iteration.
  began = time.monotonic()
  (left, out, words), (killed, _, _) = start("killed", f"1:6:{signal.SIGKILL:d}")
  assert killed == -signal.SIGKILL and left == 1, words
  print(out, words, time.monotonic() - began)
