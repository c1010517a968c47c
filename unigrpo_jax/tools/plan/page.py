"""What a plan says, for people and for machines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
import math
from typing import Any

from unigrpo_jax.tools.plan import chips, hlo, programs

_SPLASH = {"splash_mha_fwd": 4, "splash_mha_dkv": 8, "splash_mha_dq": 6}
SPARE = 0.1  # Of a chip's memory, that a plan which fits leaves free.
_TITLES = {
  "layout": "lay out", "read": "read", "decode": "think", "denoise": "draw", "vae": "decode images",
  "update": "update",
}


def record(plan: programs.Plan, chip: chips.Chip) -> dict[str, Any]:
  """Everything a plan says, as plain numbers: bytes, FLOPs and seconds of one chip.

  Of a plan of some phases alone, `fits` is about them, and there are no seconds of an iteration.

  Returns:
    chip, mesh, held (bytes by cause), phases (by name: see `_phase`), peak (bytes, by phase),
    fits, spare (part of the memory that stays free), seconds (of an iteration),
    images_per_hour.
  """
  phases = {name: _phase(phase, plan, chip) for name, phase in plan.phases.items()}
  peak = {name: _peak(phase, plan) for name, phase in plan.phases.items()}
  largest = max(peak.values())
  compiled = all(phase.exceeds is None for phase in plan.phases.values())
  whole = compiled and set(programs.PHASES) <= phases.keys()
  seconds = sum(phase["seconds"] for phase in phases.values()) if whole else None
  return {
    "chip": chip.name, "hbm": chip.hbm, "mesh": dict(plan.mesh), "held": dict(plan.held),
    "phases": phases, "peak": peak, "spare": 1 - largest / chip.hbm,
    "fits": compiled and largest <= (1 - SPARE) * chip.hbm, "seconds": seconds,
    "images_per_hour": 3600 * plan.trajectories / seconds if whole else None,
  }


def _peak(phase: programs.Phase, plan: programs.Plan) -> float:
  """Bytes on a chip while a phase runs: what is held all through, and its own."""
  if phase.exceeds is not None:
    return phase.exceeds
  held = sum(plan.held.get(cause, 0) for cause in held_beside(phase.name))
  return held + phase.bytes["results"] + phase.bytes["temporaries"]


def held_beside(phase: str) -> tuple[str, ...]:
  """Causes, see `programs.Plan`, whose bytes lie on a chip while a phase runs."""
  beside = {"layout": (), "read": ("sampler", "recorded"), "update": ("recorded",)}
  state = ("parameters", "optimizer", "moving average", "reference")
  return state + beside.get(phase, ("sampler", "cache", "recorded"))


def _phase(phase: programs.Phase, plan: programs.Plan, chip: chips.Chip) -> dict[str, Any]:
  """A phase in an iteration, on one chip.

  Of the seconds, `compute`, `hbm` and `interconnect` are what each alone would take at its peak;
  `seconds` is the largest of them, as if all ran beside each other.
  """
  told = {"runs": phase.runs, "compile_seconds": phase.seconds, "exceeds": phase.exceeds}
  if phase.program is None:
    return told | {"seconds": 0.0}
  program, runs = phase.program, phase.runs
  sent: dict[tuple[str, str], float] = defaultdict(float)
  for collective in program.collectives:
    along = "+".join(hlo.axes(collective.groups, plan.mesh)) or "none"
    sent[collective.kind, along] += runs * collective.times * hlo.wire_bytes(collective)
  flops, count = runs * (program.flops + kernel_flops(program)), math.prod(plan.mesh.values())
  times = {
    "compute": flops / chip.flops, "hbm": runs * program.bytes / chip.hbm_bandwidth,
    "interconnect": sum(sent.values()) / chip.axis_bandwidth,
  }
  return told | {
    "bytes": dict(phase.bytes), "flops": flops, "hbm_bytes": runs * program.bytes,
    "model_flops": None if phase.model_flops is None else phase.model_flops / count,
    "collectives": [
      {"kind": kind, "axis": axis, "bytes": value} for (kind, axis), value in sorted(sent.items())
    ],
    "times": times, "seconds": max(times.values()), "bound": max(times, key=times.get),
  }


def kernel_flops(program: hlo.Program) -> float:
  """FLOPs of the kernels of one run.

  Of splash attention, a head: forward 4 T S H, the gradient of keys and values 8 T S H, that of the
  queries 6 T S H, since each computes the scores again; over padded lengths, as the kernel does. Of
  any other kernel what its author says, or nothing.
  """
  return sum(call.times * (_splash_flops(call) or call.flops or 0) for call in program.custom_calls)


def _splash_flops(call: hlo.CustomCall) -> float:
  factor = next((f for name, f in _SPLASH.items() if call.name.startswith(name)), 0)
  # Tables of blocks come first, then queries and keys: [..., heads, length, H].
  tensors = [array.dims for array in call.operands if array.dtype in ("bf16", "f32")]
  if not factor or len(tensors) < 2:
    return 0
  queries, keys = tensors[:2]
  return factor * math.prod(queries) * keys[-2]


def text(name: str, told: Mapping[str, Any], chip: chips.Chip, lines: Sequence[str] = ()) -> str:
  """One page about one topology.

  Args:
    name: of the topology.
    told: see `record`.
    chip: of the topology.
    lines: more about the run, below the title.
  """
  mesh = " x ".join(f"{axis} {size}" for axis, size in told["mesh"].items())
  count = math.prod(told["mesh"].values())
  out = [f"{name}: {count} chips, mesh {mesh}", *lines, ""]
  out += [f"memory of a chip, GiB of {chip.hbm / chips.GIB:.2f}"]
  out += [f"  {cause:16} {value / chips.GIB:8.2f}" for cause, value in told["held"].items()
          if value]
  out += [""] + _rows(
    [("phase", "runs", "peak GiB", "results", "temporaries", "compiled in")]
    + [_memory_row(phase, told) for phase in told["phases"]]
  )
  out += ["", _verdict(told, chip), ""]
  out += ["time of an iteration at the chip's peak figures, s; FLOPs of a chip"]
  out += _rows(
    [("phase", "compute", "HBM", "interconnect", "PFLOP", "of model FLOPs")]
    + [_time_row(phase, told) for phase in told["phases"]]
  )
  if told["seconds"] is not None:
    out += ["", f"at best {told['seconds']:.0f} s an iteration, "
            f"{told['images_per_hour']:,.0f} images an hour"]
  out += ["", "interconnect, GB that a chip sends in an iteration"]
  out += _rows([("phase", "collective", "axis", "GB")] + [
    (_TITLES[phase], row["kind"], row["axis"], f"{row['bytes'] / 1e9:,.2f}")
    for phase, values in told["phases"].items() for row in values.get("collectives", ())
    if row["bytes"] >= 1e7
  ])
  out += ["", f"a chip: {chip.flops / 1e12:,.0f} bf16 TFLOP/s, "
          f"{chip.hbm_bandwidth / 1e9:,.0f} GB/s of HBM, {chip.axis_bandwidth / 1e9:,.0f} GB/s "
          f"along an axis of its {chip.torus}D torus ({chip.source})"]
  return "\n".join(line.rstrip() for line in out) + "\n"


def _memory_row(phase: str, told: Mapping[str, Any]) -> tuple[str, ...]:
  values = told["phases"][phase]
  gib = lambda value: f"{value / chips.GIB:.2f}"
  peak = gib(told["peak"][phase])
  if values["exceeds"] is not None:
    return (_TITLES[phase], str(values["runs"]), peak, "does not fit", "", "")
  return (
    _TITLES[phase], str(values["runs"]), peak, gib(values["bytes"]["results"]),
    gib(values["bytes"]["temporaries"]), f"{values['compile_seconds']:.0f} s",
  )


def _time_row(phase: str, told: Mapping[str, Any]) -> tuple[str, ...]:
  values = told["phases"][phase]
  if "times" not in values:
    return (_TITLES[phase],)
  model = values["model_flops"]
  times = [f"{values['times'][name]:,.2f}" for name in ("compute", "hbm", "interconnect")]
  ratio = "" if not model else f"{values['flops'] / model:.2f}"
  return (_TITLES[phase], *times, f"{values['flops'] / 1e15:,.2f}", ratio)


def _verdict(told: Mapping[str, Any], chip: chips.Chip) -> str:
  phase = max(told["peak"], key=told["peak"].get)
  peak, spare = told["peak"][phase] / chips.GIB, told["spare"]
  if told["fits"]:
    return f"fits: at most {peak:.2f} GiB, {spare:.0%} stay free"
  if spare >= 0 and all(values["exceeds"] is None for values in told["phases"].values()):
    return f"too tight: {_TITLES[phase]} needs {peak:.2f} GiB, {spare:.0%} stay free of {SPARE:.0%}"
  return (f"does not fit: {_TITLES[phase]} needs {peak:.2f} GiB, "
          f"{peak - chip.hbm / chips.GIB:.2f} more than there are")


def _rows(table: Sequence[Sequence[str]]) -> list[str]:
  """Cells in columns: the first to the left, numbers to the right."""
  width = max(len(row) for row in table)
  full = [tuple(row) + ("",) * (width - len(row)) for row in table]
  sizes = [max(len(row[column]) for row in full) for column in range(width)]
  return [
    "  " + "  ".join(
      cell.ljust(size) if column == 0 else cell.rjust(size)
      for column, (cell, size) in enumerate(zip(row, sizes))
    )
    for row in full
  ]


def comparison(told: Mapping[str, Mapping[str, Any]]) -> str:
  """A line a topology: whether it fits, and what an iteration takes at best."""
  rows = [("topology", "chips", "peak GiB", "free", "fits", "s an iteration", "images/h",
           "images/h a chip")]
  for name, one in told.items():
    count = math.prod(one["mesh"].values())
    rate = one["images_per_hour"]
    rows.append((
      name, str(count), f"{max(one['peak'].values()) / chips.GIB:.2f}", f"{one['spare']:.0%}",
      "yes" if one["fits"] else "no", "" if rate is None else f"{one['seconds']:.0f}",
      "" if rate is None else f"{rate:,.0f}", "" if rate is None else f"{rate / count:,.1f}",
    ))
  return "\n".join(_rows(rows)) + "\n"
