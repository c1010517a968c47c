"""The benchmark: it runs, counts what flops.py counts, and refuses what it cannot time."""

import json

import jax
import pytest

from unigrpo_jax import errors
from unigrpo_jax.episodes import sampler
from unigrpo_jax.tools import bench, flops, timing, workloads

SMALL = workloads.Workload(
  layers=2, width=32, heads=4, kv_heads=2, ffn=48, vocab=64, system=5, prompt=3, tokens=4,
  latents=16, points=4, window=2, group=3,
)


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(workloads.SHAPES, "tiny", SMALL)
  monkeypatch.setattr(workloads, "MATMUL_SIDE", 16)


@pytest.mark.slow
def test_a_shape_is_measured_and_written(small, tmp_path, capsys):
  bench.main(["--shape=tiny", f"--json={tmp_path / 'out.json'}", "--repeats=2"])
  report = json.loads((tmp_path / "out.json").read_text())
  [result] = report.pop("shapes")
  assert report.keys() == {
    "date", "jax", "backend", "device", "cpus", "dtype", "remat", "repeats"
  }
  assert result.keys() == {
    "shape", "workload", "load_average", "trajectory_tokens", "drift", "warm_compile_seconds",
    "peak_memory_bytes", "phases", "totals", "rates",
  }
  assert workloads.Workload(**result["workload"]) == SMALL
  # No row ended early, and the trainer computed what the sampler did.
  assert result["trajectory_tokens"] == SMALL.tokens
  assert 0 <= result["drift"]["text"] < 1e-5 and 0 <= result["drift"]["flow"] < 1e-6
  # What is timed compiles nothing.
  assert result["warm_compile_seconds"] == 0
  assert result["peak_memory_bytes"] > 2**25
  assert set(result["phases"]) == {"matmul", *workloads.PHASES}
  counted = workloads.phase_flops(SMALL)
  for name, row in result["phases"].items():
    assert row["flops"] == counted[name] and len(row["rounds"]) == 2
    assert min(row["rounds"]) <= row["seconds"] <= max(row["rounds"])
  assert all(rate > 0 for rate in result["rates"].values())
  printed = capsys.readouterr().out
  assert all(f"\n  {name} " in printed for name in (*workloads.PHASES, *result["totals"]))


def test_flops_are_those_of_an_iteration():
  sizes, group = flops.Sizes.of(workloads.network_config(SMALL)), SMALL.group
  counted = workloads.phase_flops(SMALL)
  read, context = flops.text(sizes, 8).forward, flops.text(sizes, 12)
  # The group shares what it reads; otherwise it is the rollout of each trajectory.
  decode, drawn = flops.decode(sizes, 4, context=8), flops.velocity(sizes, 16, context=12)
  alone = read + decode.forward + 3 * drawn.forward
  assert sum(counted[name] for name in workloads.ROLLOUT) == group * alone - (group - 1) * read
  # No gradient of the image reaches its context.
  assert counted["image_update"] == group * (context.forward + 2 * drawn.update(("gen",)))
  assert counted["text_update"] == group * flops.text(sizes, 12, scored=4).update(("und",))
  # Together they save one reading of the context.
  assert counted["joint_update"] == (
    counted["image_update"] + counted["text_update"] - group * context.forward
  )


def test_the_summary_by_hand():
  """Median seconds 2, 1, 3, 4, 5, 5 and 6, of which an iteration is 1 + 3 + 4 + 5 + 5 = 18."""
  names = ["matmul", *workloads.PHASES]
  seconds = {name: [value, 0.5, 9] for name, value in zip(names, (2, 1, 3, 4, 5, 5, 6))}
  got = timing.summary(SMALL, seconds, dict.fromkeys(names, 0.25))
  assert got["phases"]["denoise"]["share"] == pytest.approx(4 / 18)
  assert got["phases"]["joint_update"]["share"] is None
  assert got["totals"]["rollout"]["seconds"] == 8
  assert got["totals"]["joint_iteration"]["seconds"] == 14
  counted = workloads.phase_flops(SMALL)
  assert got["phases"]["decode"]["gflops_per_second"] == pytest.approx(counted["decode"] / 3e9)
  assert got["phases"]["decode"]["of_matmul"] == pytest.approx(
    counted["decode"] / 3 / (counted["matmul"] / 2))
  assert got["rates"] == pytest.approx({
    "images_per_second": 3 / 8, "reasoning_tokens_per_second": 12 / 3,
    "velocity_evaluations_per_second": 9 / 4, "trajectories_per_second": 3 / 18,
    "trajectories_per_second_joint": 3 / 14,
  })


@pytest.mark.slow
def test_a_trainer_that_drifts_is_not_timed(small, monkeypatch):
  """Here the sampler's parameters are a little larger than the trainer's."""
  cast = sampler.Sampler.cast_and_reshard
  monkeypatch.setattr(
    sampler.Sampler, "cast_and_reshard",
    lambda self, params: jax.tree.map(lambda a: 1.01 * a, cast(self, params)),
  )
  with pytest.raises(errors.InputError, match="nothing was measured: drift/flow_p99="):
    bench.main(["--shape=tiny", "--repeats=1"])


@pytest.mark.parametrize("arguments, words", [
  (["--repeats=0"], "--repeats=0 must be at least 1"),
  (["--shape=huge"], "invalid choice: 'huge'"),
  (["--json=nowhere/out.json"], "nowhere/out.json: no such folder"),
  (["--layers=3"], "--layers is only with --device-check"),
  (["--toy"], "--toy is only with --device-check"),
  (["--device-check", "--shape=small"], "--shape has no effect with --device-check"),
])
def test_bad_arguments_are_named(arguments, words):
  with pytest.raises(errors.InputError, match=words):
    bench.parse_args(arguments)


def test_help_lists_every_shape(capsys):
  with pytest.raises(SystemExit):
    bench.parse_args(["--help"])
  printed = capsys.readouterr().out
  assert all(name in printed for name in (*workloads.SHAPES, *workloads.PHASES))
