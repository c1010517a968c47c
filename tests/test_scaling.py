"""How seconds and bytes grow: the fit by hand, and a point measured."""

import dataclasses
import json

import pytest

from unigrpo_jax import errors
from unigrpo_jax.tools import bench, flops, scaling, workloads

SMALL = workloads.Workload(
  layers=1, width=32, heads=4, kv_heads=2, ffn=48, vocab=64, system=5, prompt=3, tokens=4,
  latents=16, points=4, window=2, group=2,
)


def test_an_exponent_by_hand():
  assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
  assert scaling.exponent([1, 4, 16], [5, 5, 5]) == pytest.approx(0)
  # 1 + x at 1, 3: log(4 / 2) / log(3).
  assert scaling.exponent([1, 3], [2, 4]) == pytest.approx(0.6309298)


def test_axes_share_their_first_point():
  made = scaling.points()
  assert len(made) == 1 + 3 + 2 + 3 + 3
  assert [point.factor for point in made.values()].count(1) == 1
  assert made["latents:16"].workload(SMALL) == dataclasses.replace(SMALL, latents=256)
  assert made["devices:8"].workload(SMALL) == SMALL and made["devices:8"].devices == 8
  assert made["group:8"].devices == 1


@pytest.mark.slow
def test_a_point_is_measured():
  """The formula's FLOPs are those of the larger group; the update has weights and two moments."""
  point = scaling.Point("group", 2)
  got = scaling.measure_point(SMALL, point, repeats=1, dtype="float32", remat="none")
  for quantity in ("seconds", "bytes", "flops"):
    assert set(got[quantity]) == set(scaling.PHASES)
    assert all(value > 0 for value in got[quantity].values())
  assert got["flops"]["decode"] == 2 * workloads.phase_flops(SMALL)["decode"]
  weights = 2 * flops.Sizes.of(workloads.network_config(SMALL)).expert + 2 * 64 * 32
  assert got["bytes"]["joint_update"] > 3 * 4 * weights > got["bytes"]["read"] > 4 * weights / 2


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
  measured, limit = [], 4

  def one(args, name, folder):
    if len(measured) == limit:
      raise errors.InputError("stopped")
    measured.append(name)
    size = scaling.points()[name].factor
    return {
      quantity: dict.fromkeys(scaling.PHASES, float(size**power))
      for quantity, power in (("seconds", 2), ("bytes", 1), ("flops", 1))
    }

  monkeypatch.setattr(scaling, "_in_process", one)
  path = tmp_path / "scaling.json"
  command = ["--scaling", f"--json={path}"]
  with pytest.raises(errors.InputError, match="stopped"):
    bench.main(command)
  limit = 99
  bench.main(command)
  assert measured == list(scaling.points())  # none of them twice
  report = json.loads(path.read_text())
  assert list(report["points"]) == list(scaling.points())
  fit = report["fits"]["image tokens"]["denoise"]
  assert fit["seconds"]["exponent"] == pytest.approx(2)
  printed = capsys.readouterr().out
  assert "image tokens" in printed and "2.00      1.00 *" in printed
  with pytest.raises(errors.InputError, match="scaling.json is of another shape"):
    bench.main([*command, "--shape=small"])
  for damaged in ("", "[]", "3", "[" * 100_000):
    path.write_text(damaged)
    with pytest.raises(errors.InputError, match="scaling.json: .*JSON"):
      bench.main(command)
  del report["points"]
  path.write_text(json.dumps(report))
  with pytest.raises(errors.InputError, match="scaling.json .* has no points"):
    bench.main(command)
