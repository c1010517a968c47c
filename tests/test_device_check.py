"""The check of a device: its formulas by hand, and the whole of it at toy width."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from unigrpo_jax import errors
from unigrpo_jax.runtime import metrics, sharding
from unigrpo_jax.tools import bench, device_check, workloads

TOY = device_check.TOY


def test_bytes_that_decoding_reads_by_hand():
  """An expert of 2 layers: q, o 2 x 64 x 64, k, v 2 x 64 x 32, MLP 3 x 64 x 96; the head 64 x 64;
  the keys and values, 2 x 2 layers x 32, of 64 shared tokens and 2 of each trajectory's 4.
  """
  expert = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
  cache = 2 * 2 * 32 * (64 + 2 * 2)
  assert device_check.decode_bytes(TOY, 2) == 2 * (expert + 64 * 64 + cache)


def test_layers_that_fit():
  """A layer at full width: two experts of 233,046,016 weights, of 16 bytes each while training."""
  layer, vocab = 16 * 2 * 233046016, 16 * 2 * 16384 * 3584
  fits = lambda layers: (layers * layer + vocab) / device_check.MEMORY
  assert device_check.layers_that_fit(device_check.FULL, int(fits(7) * 1.001)) == 7
  assert device_check.layers_that_fit(device_check.FULL, int(fits(7) * 0.999)) == 6
  with pytest.raises(errors.InputError, match="give --layers, or --toy"):
    device_check.layers_that_fit(device_check.FULL, None)


def test_rates_by_hand():
  """Eight tokens in a quarter of a second; the bound is 2 trajectories a reading of the bytes."""
  seconds = {"read": 1.0, "decode": 0.25, "denoise": 0.5, "joint_update": 2.0}
  copied = 10 * device_check.decode_bytes(TOY, 4)
  got = device_check.rates(TOY, seconds, copied=copied, peak=1e6, itemsize=4)
  assert got["decode_tokens_per_second"] == 32
  assert got["decode_bound"] == pytest.approx(20) and got["decode_of_bound"] == pytest.approx(1.6)
  counted = workloads.phase_flops(TOY)
  assert got["denoise_of_peak"] == pytest.approx(2 * counted["denoise"] / 1e6)
  assert got["update_flops_per_second"] == pytest.approx(counted["joint_update"] / 2)


@pytest.mark.slow
def test_the_whole_at_toy_width(tmp_path, capsys):
  path = tmp_path / "device.json"
  bench.main([
    "--device-check", "--toy", "--layers=1", "--repeats=1", "--remat=full", f"--json={path}"
  ])
  report = json.loads(path.read_text())
  assert report["workload"] == dataclasses.asdict(dataclasses.replace(TOY, layers=1))
  assert report["copy_bytes_per_second"] > 0 < report["matmul_flops_per_second"]
  assert set(report["attention"]) == {"plain"}
  row = report["attention"]["plain"]
  assert set(row["seconds"]) == set(workloads.JOINT_ITERATION)
  assert all(value > 0 for value in row["rates"].values())
  assert "an attention kernel: there is none for cpu" in report["left_out"]
  if importlib.util.find_spec("torch") is None:
    assert "PyTorch, which is not installed" in report["left_out"]
  printed, progress = capsys.readouterr()
  assert "\n  plain " in printed and "left out: " in printed and "attention plain" in progress


def test_it_takes_fewer_layers_where_they_do_not_fit(monkeypatch):
  tried = []

  def measure(work, **_):
    tried.append(work.layers)
    if work.layers > 3:
      raise errors.InputError("RESOURCE_EXHAUSTED: no memory")
    return dict.fromkeys(workloads.JOINT_ITERATION, 1.0)

  monkeypatch.setattr(device_check, "measure_phases", measure)
  args = bench.parse_args(["--device-check", "--toy", "--layers=6"])
  report = device_check.check(args)
  assert tried == [6, 4, 3] and report["attention"]["plain"]["layers"] == 3


@pytest.mark.parametrize("rounds, left", [(1, 1), (3, 0)])
def test_no_round_begins_after_the_limit(rounds, left, monkeypatch):
  """The limit is over after the round that compiles, or after two more of the nine."""
  now, done = [0.0], []

  class Bench:
    def __init__(self, work, **_):
      self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
      self.timer = metrics.PhaseTimer(lambda: now[0])

    def iteration(self, number):
      done.append(number)
      now[0] += device_check.LIMIT / (rounds - 0.5)
      for phase in workloads.JOINT_ITERATION:
        with self.timer(phase):
          now[0] += 0.5

  monkeypatch.setattr(device_check.timing, "Bench", Bench)
  monkeypatch.setattr(device_check.time, "monotonic", lambda: now[0])
  args = bench.parse_args(["--device-check", "--toy", "--repeats=9"])
  report = device_check.check(args)
  assert done == list(range(rounds)) and len(report["attention"]) == 1 - left
  assert report["left_out"].count("attention plain: 600 s were over") == left
  assert device_check.table(report)
