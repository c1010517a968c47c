"""How time and memory of each phase grow with sizes: `python -m unigrpo_jax.bench --scaling`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, progress
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import compile_timer
from unigrpo_jax.tools import timing, workloads
from unigrpo_jax.tools.plan import planner

# What grows -> (field of `Workload`, or "devices"; factors by which it grows).
AXES = {
  "trajectories": ("group", (1, 2, 4, 8)),
  "image tokens": ("latents", (1, 4, 16)),
  "reasoning length": ("tokens", (1, 2, 4, 8)),
  "devices": ("devices", (1, 2, 4, 8)),
}
PHASES = workloads.JOINT_ITERATION
WORSE = 0.15  # An exponent is marked if it is higher than that of the FLOPs by more than this.


@dataclasses.dataclass(frozen=True)
class Point:
  """What one process measures: a workload in which one field is multiplied by `factor`."""

  field: str
  factor: int

  @property
  def name(self) -> str:
    return "base" if self.factor == 1 else f"{self.field}:{self.factor}"

  @property
  def devices(self) -> int:
    return self.factor if self.field == "devices" else 1

  def workload(self, base: workloads.Workload) -> workloads.Workload:
    if self.field == "devices":
      return base
    return dataclasses.replace(base, **{self.field: self.factor * getattr(base, self.field)})


def points() -> dict[str, Point]:
  """{name: point} of all axes, which share the point "base"."""
  made = [Point(field, factor) for field, factors in AXES.values() for factor in factors]
  return {point.name: point for point in made}


def measure_point(
  base: workloads.Workload, point: Point, *, repeats: int, dtype: str, remat: str
) -> dict[str, Any]:
  """Measures a point.

  Args:
    base: the workload whose field grows.
    point: which field, and by what factor.
    repeats, dtype, remat: see `timing.measure`.

  Returns:
    {"seconds": {phase: median}, "bytes": {phase: per device}, "flops": {phase: by formula}}. Bytes
    are those of arguments, results and temporaries of the phase's program, by the compiler.
  """
  work = point.workload(base)
  with compile_timer.CompileTimer() as compiling:
    made = timing.Bench(
      work, dtype=dtype, remat=remat, compiling=compiling, updates=("joint_update",),
      devices=jax.devices()[: point.devices],
    )
    plan = planner.Planner(made.spec, made.network, only=("read", "decode", "denoise", "update"))
    phases = plan.run().phases
    seconds = [each for _, each in timing.rounds(made, repeats, "nothing was measured")]
  flops = workloads.phase_flops(work)
  compiled = {phase: phases["update" if phase == "joint_update" else phase] for phase in PHASES}
  return {
    "seconds": timing.medians(seconds),
    "bytes": {phase: sum(made.bytes.values()) for phase, made in compiled.items()},
    "flops": {phase: flops[phase] for phase in PHASES},
  }


def exponent(factors: Sequence[float], values: Sequence[float]) -> float:
  """The exponent p of values ~ factors ** p, by least squares of the logarithms."""
  return float(np.polyfit(np.log(factors), np.log(values), 1)[0])


def fits(measured: Mapping[str, Any]) -> dict[str, Any]:
  """{axis: {phase: {quantity: {"values", "exponent"}}}} of the axes whose points are all measured.

  `measured` is {name of a point: result of `measure_point`}.
  """
  result = {}
  for axis, (field, factors) in AXES.items():
    names = [Point(field, factor).name for factor in factors]
    if not set(names) <= set(measured):
      continue
    result[axis] = {
      phase: {
        quantity: {
          "values": (values := [measured[name][quantity][phase] for name in names]),
          "exponent": exponent(factors, values),
        }
        for quantity in ("seconds", "bytes", "flops")
      }
      for phase in PHASES
    }
  return result


def table(result: Mapping[str, Any]) -> str:
  """The fits as text."""
  lines = []
  for axis, phases in result["fits"].items():
    factors = AXES[axis][1]
    heads = " ".join(f"{'x' + str(factor):>9}" for factor in factors)
    lines += [axis, f"  {'phase':<13} {'':8} {heads} {'exponent':>9} {'of FLOPs':>9}"]
    for phase, quantities in phases.items():
      expected = quantities["flops"]["exponent"]
      for quantity in ("seconds", "bytes"):
        values, slope = quantities[quantity]["values"], quantities[quantity]["exponent"]
        cells = " ".join(f"{_short(quantity, value):>9}" for value in values)
        mark = " *" if slope > max(expected, 0) + WORSE and axis != "devices" else ""
        lines.append(
          f"  {phase if quantity == 'seconds' else '':<13} {quantity:<8} {cells} {slope:>9.2f} "
          f"{f'{expected:.2f}' if quantity == 'seconds' else '':>9}{mark}"
        )
  return "\n".join(lines)


def _short(quantity: str, value: float) -> str:
  return f"{value:.4f}" if quantity == "seconds" else f"{value / 2**20:.1f}M"


def main(args: argparse.Namespace) -> None:
  """Measures the points that the file `args.json` lacks, each in a process of its own.

  Raises:
    InputError: a point failed, or the file has other settings.
  """
  settings = {"shape": args.shape, "workload": dataclasses.asdict(workloads.SHAPES[args.shape])}
  settings |= {name: getattr(args, name) for name in ("dtype", "remat", "repeats")}
  if args.point is not None:
    one = measure_point(
      workloads.SHAPES[args.shape], points()[args.point], repeats=args.repeats, dtype=args.dtype,
      remat=args.remat,
    )
    args.json.write_text(json.dumps(one), encoding="utf-8")
    return
  jax.config.update("jax_platforms", "cpu")  # as in the processes
  report = settings | {"points": {}}
  if args.json is not None and args.json.exists():
    report = config_lib.read_json(args.json)
    other = any(report.get(name) != value for name, value in settings.items())
    if other or not isinstance(report.get("points"), dict):
      raise errors.InputError(
        f"--json={args.json} is of another shape, dtype, remat or number of repeats, or has no "
        "points; name another file, or remove it"
      )
  missing = [name for name in points() if name not in report["points"]]
  with (
    tempfile.TemporaryDirectory() as folder,
    progress.bar(len(missing), "measuring", unit="points") as bar,
  ):
    for name in missing:
      report["points"][name] = _in_process(args, name, pathlib.Path(folder))
      report |= timing.environment(args) | {"fits": fits(report["points"])}
      if args.json is not None:
        atomic.write_text(args.json, json.dumps(report, indent=1) + "\n")
      bar.update(1)
  print(table(report), flush=True)


def _in_process(args: argparse.Namespace, name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Measures a point in a new process, with as many CPU devices as the point needs."""
  count = points()[name].devices
  environ = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")
  }
  given = environ.get("XLA_FLAGS", "")
  environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={count}"
  flags = ["--scaling", f"--point={name}", f"--shape={args.shape}"]
  return timing.in_process(args, f"--scaling: point {name}", flags, environ)
