"""Several hosts: two processes of four devices each, connected by JAX over the loopback."""

import dataclasses
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import chex
import jax
import numpy as np
import pytest

from tests import rewards_of_hosts, test_train_unigrpo
from unigrpo_jax import errors
from unigrpo_jax.runtime import hosts, sharding

ROOT = pathlib.Path(__file__).parents[1]
# Two chunks an iteration, of which each host has one group; the evaluation's batch is filled up.
SMALL = {
  "steps": 4, "prompts_per_step": 4, "rollout.prompts_at_once": 2, "group_size": 4, "microbatch": 8,
  "rollout.max_tokens": 6, "rollout.num_timesteps": 5, "rollout.window_range": [0, 3],
  "rollout.window_size": 2, "text.chunk": 8, "checkpoint_every": 1, "keep_checkpoints": 1,
  "eval.every": 4, "eval.prompts": 3, "eval.batch_size": 4, "eval.keep": 2,
  "eval.modes": ["think"], "eval.num_timesteps": 4, "warmup_steps": 0, "schedule": "constant",
  "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "rollout.tensor": 1,
  # The first words of the embedded network are certain: without it they would have no gradient, of
  # whose rounding Adam would make whole steps; nor may it of other gradients that are next to none.
  "rollout.temperature": 4.0, "eps": 1e-5,
}
CONFIG = """
from unigrpo_jax.recipe import config_files

def get_config():
  config = config_files.load("configs/unigrpo.py:tiny")
  config.rewards = {{"rewards_of_hosts:brightness": 1.0}}
  config.update_from_flattened_dict({changes!r})
  return config
"""
COMPARED = """
from unigrpo_jax import errors
from unigrpo_jax.runtime import hosts, sharding, stopping
import jax, numpy as np, sys, time
stopping.GRACE_SECONDS = 0.5
def main():
  number = int(sys.argv[3].partition("=")[2])
  hosts.start(sys.argv[1].partition("=")[2], 2, number)
  print(hosts.any_host(number == 1), hosts.any_host(False), hosts.broadcast(["é", number]))
  print(hosts.gather_rows([number, 2 + number], {"score": [number, 7]}, 4)["score"].tolist())
  flag, seen = hosts.AgreedFlag(sharding.make_mesh(data=8)), []
  for step in range(4):
    flag.post(step == 1 and number == 1)
    seen.append(flag.read())
  print(seen)
  sampling = sharding.make_mesh(fsdp=8)
  rows = sharding.put_rows(sampling, np.arange(16))
  for groups in (2, 1):
    readers = sharding.with_whole_groups(sampling, groups)
    print(sharding.local_rows(readers, rows)[1]().tolist())
  update = sharding.make_mesh(fsdp=2, tensor=4)
  moved = jax.device_put(rows, sharding.along_batch(update))
  print([shard.data.tolist() == [*range(8 * number, 8 * number + 8)]
         for shard in moved.addressable_shards])
  try:
    with hosts.raise_on_all_hosts():
      if number == 1:
        raise errors.Diverged("not: finite")
  except errors.InputError as error:
    print(type(error).__name__, error)
  try:  # One waits for what never comes, the other was asked to stop.
    stopping.wait(
      lambda seconds: time.sleep(0.1) or number == 1, lambda: "" if number else "reward a",
      lambda: number == 1,
    )
  except stopping.Stopped:
    print("stopped")
  hosts.compare({"lora": {"rank": 8}, "seed": 5, "prompts": ["a kite"] * 1000})
  hosts.compare({"lora": {"rank": 8 + number}, "seed": 5})
errors.report(main)
"""


ALONE = """
from unigrpo_jax import errors
from unigrpo_jax.runtime import checkpoints, hosts, metrics
import errno, jax, pathlib, sys
def main():
  workdir, failing, number = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[-1][-1])
  hosts.start(sys.argv[3].partition("=")[2], 2, number)
  from tests import test_run, toy_run  # They compute.
  append, record = metrics.files.append_text, checkpoints.TrainCheckpoints.record
  def append_text(path, text):
    if failing == "log" and '"step": 4' in text:
      raise OSError(errno.EROFS, "Read-only file system")
    append(path, text)
  def read_record(self, step):
    if failing == "record" and step == 4 and number == 1:
      raise errors.Damaged("checkpoint 4 is damaged: so it is")
    return record(self, step)
  metrics.files.append_text = append_text
  checkpoints.TrainCheckpoints.record = read_record
  hosts.run(lambda: toy_run.train(
    toy_run.make_network("a/folder", jax.devices()), workdir,
    test_run._spec(steps=6, checkpoint_every=2, keep_checkpoints=9, evaluate_every=0), size=8,
    evaluate=None, in_step=lambda step: None, metrics=lambda step, by: {"loss": 1.0},
  ), lambda: "")
errors.report(main)
"""


def _start(commands, environ):
  """Starts `commands`, arguments of python, each as a host of its own; one as a whole machine."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  connected = lambda number: [
    f"--coordinator=127.0.0.1:{port}", f"--processes={len(commands)}", f"--process={number}"
  ] if len(commands) > 1 else []
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // len(commands)}")
  own = {
    "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
  }
  return [
    subprocess.Popen(
      [sys.executable, *command, *connected(number)], cwd=ROOT, env=os.environ | own | environ,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for number, command in enumerate(commands)
  ]


def _end(processes):
  """[(status, lines on standard output, standard error)] of each host; without Gloo's chatter."""
  try:
    outputs = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  # Its threads tear each other's lines apart; what is left of one is its end.
  end = "Rank # is connected to # peer ranks. Expected number of connected peer ranks is : #"
  gloo = lambda line: "[Gloo]" in line or end.endswith(re.sub(r"\d+", "#", line).strip())
  printed = lambda out: [line for line in out.splitlines() if not gloo(line)]
  return [
    (process.returncode, printed(out), err) for process, (out, err) in zip(processes, outputs)
  ]


def _seen(folder, host):
  """What the reward of a host was called with: a list of [prompt, reasoning, score] a call."""
  return [json.loads(line) for line in (folder / f"{host}.jsonl").read_text().splitlines()]


@pytest.fixture
def run(shallow, tmp_path):
  """Trains on so many hosts: (workdir, hosts, ...) -> [(status, output, errors)]."""
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(changes=SMALL | {"init_from": str(shallow)}))

  def run(name, count, *more, seen, end="-1:0:0"):
    command = ["-m", "unigrpo_jax.train", f"--config={config}", f"--workdir={tmp_path / name}"]
    (tmp_path / seen).mkdir()
    return _end(_start([[*command, *more]] * count, {
      rewards_of_hosts.SEEN: str(tmp_path / seen), rewards_of_hosts.END: end,
    }))

  return run


@pytest.mark.slow
def test_two_hosts_die_resume_stop_and_equal_one(run, tmp_path):
  """One of two is killed; the run continues until one gets a signal: it is that of one host.

  The two sample with fewer tensor ways, too.
  """
  [(status, _, words)] = run("one", 1, "--config.rollout.tensor=2", seen="whole")
  assert status == 0, words

  # Calls of the reward on a host: one for the evaluation before the first step, then two a step.
  (status, _, words), (killed, *_) = run("two", 2, seen="killed", end=f"1:6:{signal.SIGKILL:d}")
  assert killed == -signal.SIGKILL, words
  newest = max(int(p.name) for p in (tmp_path / "two/checkpoints").iterdir() if p.name.isdigit())
  last = words.splitlines()[-1]
  assert newest in (1, 2)
  if status == -signal.SIGABRT:
    # It waited where nothing raises, until the runtime found the silence and ended it.
    assert last.startswith("error: host 0 of 2 was killed, or ended because host 1 of 2 no longer")
  else:
    assert status == 1 and last.startswith("error: host 0 of 2: host 1 of 2 no longer"), words
    assert last.endswith(f"the run continues from step {newest}")

  # Would go on to step 9, but host 1 gets a signal in the evaluation after step 4.
  end = f"1:{2 * (4 - newest) + 1}:{signal.SIGTERM:d}"
  first, second = run("two", 2, "--config.steps=9", seen="resumed", end=end)
  assert first[0] == second[0] == 0, first[2] + second[2]
  assert first[1][0].startswith("host 0 of 2: ") and len(second[1]) == 1
  assert f"resumed {tmp_path / 'two'} at step {newest}" in first[1]
  assert "stopped by a signal at step 4; run the same command again to continue" in first[1]

  _check_metrics(*(test_train_unigrpo.rows_of(tmp_path / name) for name in ("one", "two")))
  (step, want, record), (same, got, other) = (
    test_train_unigrpo.saved_in(tmp_path / name) for name in ("one", "two")
  )
  assert step == same == 4 and record["prompt_position"] == other["prompt_position"] == 16
  chex.assert_trees_all_close(got.params, want.params, rtol=1e-4, atol=3e-6)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), want.params, want.reference)
  assert moved["layers"]["und"]["mlp"]["up"]["kernel"] > 1e-3
  assert moved["layers"]["gen"]["mlp"]["up"]["kernel"] > 1e-3

  # Each host scored whole groups, and each row once: of both chunks of the steps after `newest`.
  whole = _seen(tmp_path / "whole", 0)[1 + 2 * newest : -1]
  halves = [_seen(tmp_path / "resumed", host)[: len(whole)] for host in (0, 1)]
  for chunk, upper, lower in zip(whole, *halves, strict=True):
    assert [row[:2] for row in upper + lower] == [row[:2] for row in chunk]
    np.testing.assert_allclose([r[2] for r in upper + lower], [r[2] for r in chunk], atol=1e-4)
    assert len({row[0] for row in upper}) == len({row[0] for row in lower}) == 1
  results = [
    json.loads((tmp_path / name / "evaluations/000004/results.json").read_text())["rows"]
    for name in ("one", "two")
  ]
  assert [row["text"] for row in results[0]] == [row["text"] for row in results[1]]
  assert (tmp_path / "two/evaluations/000004/contact.png").is_file()


def _check_metrics(want, got):
  assert [row["step"] for row in got] == [0, 1, 2, 3, 4, 4]
  for row, other in zip(want, got, strict=True):
    assert row.keys() == other.keys()
    for name, value in row.items():
      if not name.startswith("drift/"):  # rounding itself
        np.testing.assert_allclose(other[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


def test_what_hosts_exchange():
  """And that they stop where they do not run the same."""
  ended = _end(_start([["-c", COMPARED]] * 2, {}))
  words = "error: host 1 of 2 has lora.rank=9, host 0 has 8; start all hosts again"
  for number, (status, out, err) in enumerate(ended):
    assert status == 2 and words in err, err
    assert out[1:3] == ["True False ['é', 0]", "[0.0, 1.0, 7.0, 7.0]"]
    assert out[3] == "[False, False, True, False]"
    half = [*range(8 * number, 8 * number + 8)]
    # Of one group, which both have, the first reads all.
    assert out[4:7] == [str(half), str([] if number else [*range(16)]), str([True] * 4)]
    assert out[7] == "Diverged " + ("" if number else "host 1 of 2: ") + "not: finite"
    assert out[-1] == "stopped"
    assert number or out[8].startswith("no longer waiting for reward a, after ")


def test_collectives_of_texts_have_few_lengths():
  lengths = {len(hosts._padded(np.ones(size, np.uint8), size)) for size in range(1, 1001)}
  assert lengths == {2**power for power in range(11)}
  assert hosts._padded(np.ones(2, np.uint8), 5).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_hosts_end_alike_where_one_cannot_write_or_read(tmp_path):
  """The first its log, in step 4; then the second what was saved with step 4."""
  train = lambda failing: [["-c", ALONE, str(tmp_path / "run"), failing]] * 2
  ended = _end(_start(train("log"), {}))
  for number, (status, _, err) in enumerate(ended):
    assert status == 2, err
    words = "" if number else "metrics.jsonl: cannot be written (Read-only file system); give"
    assert f"error: {'host 0 of 2: ' * number}" in err and words in err
  kept = lambda: {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
  assert {"2", "4"} <= kept()
  ended = _end(_start(train("record"), {}))
  assert [status for status, *_ in ended] == [0, 0], ended
  assert any("resumed" in line and "at step 2" in line for line in ended[0][1]), ended[0][1]
  assert "6" in kept() and len(list((tmp_path / "run/checkpoints_damaged").iterdir())) == 1


def test_what_may_work_the_next_time_has_another_status(capsys):
  for kind, status in ((errors.InputError, 2), (errors.Storage, 1), (errors.Unavailable, 1)):
    def main(kind=kind):
      raise kind("the disk is full")

    with pytest.raises(SystemExit) as stop:
      errors.report(main)
    assert stop.value.code == status and capsys.readouterr().err == "error: the disk is full\n"


def test_hosts_of_gpus_are_no_slices():
  """JAX numbers them as if they were; those of TPUs are ways of `data`."""
  fields = ("id", "platform", "slice_index", "process_index", "device_kind")
  Device = dataclasses.make_dataclass("Device", fields, frozen=True)
  device = lambda platform, i: Device(i, platform, i // 4, i // 4, "any")
  mesh = sharding.make_mesh(fsdp=8, devices=[device("gpu", i) for i in range(8)])
  assert [d.id for d in mesh.devices.ravel()] == list(range(8))
  with pytest.raises(errors.InputError, match="must be a multiple of the 2 slices"):
    sharding.make_mesh(fsdp=8, devices=[device("tpu", i) for i in range(8)])


def test_one_host_asks_nobody(monkeypatch):
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", None)
  assert hosts.any_host(True) and not hosts.any_host(False) and hosts.first()
  assert hosts.broadcast({"a": 1}) == {"a": 1} and hosts.gather_texts("x") == ["x"]
  rows = hosts.gather_rows([2, 0, 1], {"score": np.array([3.0, 1.0, 2.0])}, 3)
  np.testing.assert_array_equal(rows["score"], [1, 2, 3])
  assert list(hosts.share(3)) == [0, 1, 2]
  with pytest.raises(errors.InputError, match="^as it was$"), hosts.raise_on_all_hosts():
    raise errors.InputError("as it was")
  hosts.compare({"a": 1})
  assert hosts.run(lambda: 5, lambda: "") == 5


def test_a_flag_on_one_host_needs_no_device(monkeypatch):
  flag = hosts.AgreedFlag(sharding.make_mesh(data=8))
  monkeypatch.setattr(flag, "_any", None)
  seen = [flag.read()]
  for value in (False, True, False):
    flag.post(value)
    seen.append(flag.read())
  assert seen == [False, False, True, False]


def test_a_flag_of_several_hosts_is_that_of_the_post_before(monkeypatch):
  """The reduction itself, on eight devices of this process."""
  flag = hosts.AgreedFlag(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  monkeypatch.setattr(hosts, "count", lambda: 2)
  seen = [flag.read()]
  for value in (False, True, False):
    flag.post(value)
    seen.append(flag.read())
  assert seen == [False, False, False, True]


SLURM = {"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1", "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("environ, starts", [
  ({"JAX_PLATFORMS": "cpu"}, False),
  ({"TPU_SKIP_MDS_QUERY": "1"}, False),
  (SLURM | {"SLURM_NTASKS": "2"}, True),
  (SLURM | {"SLURM_NTASKS": "1"}, False),
  ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "JAX_PLATFORMS": "cpu"}, False),  # not within srun
  ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, True),
  ({"TPU_WORKER_HOSTNAMES": "a", "TPU_SKIP_MDS_QUERY": "1"}, False),
  ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_SKIP_MDS_QUERY": "1"}, True),
  ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
])
def test_where_jax_is_told_to_connect(environ, starts):
  assert hosts.in_cluster(environ) is starts


@pytest.mark.parametrize("attributes, starts", [
  ({"worker-network-endpoints": "x:0:10.0.0.1,x:1:10.0.0.2"}, True),
  ({"worker-network-endpoints": "x:0:10.0.0.1"}, False),
  ({"worker-network-endpoints": "x:0:10.0.0.1", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n"},
   True),
  ({"worker-network-endpoints": "x:0:10.0.0.1", "tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, False),
  ({}, False),
])
def test_a_tpu_vm_asks_for_its_neighbours(attributes, starts):
  class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      value = attributes.get(self.path.rpartition("/")[2])
      known = value is not None and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if known else 404)
      self.end_headers()
      self.wfile.write((value or "").encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    assert hosts.in_cluster({"GCE_METADATA_IP": address}) is starts
    server.shutdown()


@pytest.mark.parametrize("given, words", [
  (("a:1", None, 0), "give all of --coordinator, --processes and --process"),
  (("a", 2, 0), "--coordinator=a must be HOST:PORT"),
  (("a:65536", 2, 0), "--coordinator=a:65536 must be HOST:PORT"),
  (("a:\u0663", 2, 0), "--coordinator=a:\u0663 must be HOST:PORT"),
  (("a:1", 2, 2), "--process=2 must be at least 0 and at most 1"),
])
def test_impossible_flags_are_refused(given, words):
  with pytest.raises(errors.InputError, match=words):
    hosts.start(*given)
