"""The figures of a plan: bytes, FLOPs and seconds per chip."""

from __future__ import annotations

from collections import defaultdict
import math
from typing import Any

from unigrpo_jax.tools.plan import chips, hlo, plans

SPARE = 0.1  # A plan fits if it leaves this share of a chip's memory free.
# FLOPs of splash attention's kernels, per head with T queries, S keys and size H, as multiples of
# T S H. The backward kernels recompute the scores.
_SPLASH = {"splash_mha_fwd": 4, "splash_mha_dkv": 8, "splash_mha_dq": 6}
# What is held in all phases, and what else in some of them; see `plans.Plan.held`.
_STATE = ("parameters", "optimizer", "moving average", "reference", "anchor", "reward_model",
          "rewards")
_BESIDE = {
  "layout": (), "read": ("sampler", "recorded"), "precompute": ("recorded",),
  "update": ("recorded", "precomputed"),
}


def record(plan: plans.Plan, chip: chips.Chip) -> dict[str, Any]:
  """All figures of a plan as JSON values.

  These are, among others: "held", bytes by cause; "phases", see `_phase`; "peak", bytes of each
  phase; "spare", the share of the memory that stays free; "fits"; "seconds" of an iteration at
  best, None unless all phases were compiled and fit. If only some phases were compiled, "fits" is
  about these.
  """
  phases = {name: _phase(phase, plan, chip) for name, phase in plan.phases.items()}
  peak = {name: _peak(phase, plan) for name, phase in plan.phases.items()}
  largest = max(peak.values())
  is_compiled = all(phase.exceeds is None for phase in plan.phases.values())
  seconds = None
  if is_compiled and set(plans.PHASES) <= phases.keys():
    seconds = sum(phase["seconds"] for phase in phases.values())
  return {
    "chip": chip.name, "hbm": chip.hbm, "mesh": dict(plan.mesh),
    "sampling_mesh": dict(plan.sampling_mesh), "held": dict(plan.held),
    "phases": phases, "peak": peak, "spare": 1 - largest / chip.hbm,
    "fits": is_compiled and largest <= (1 - SPARE) * chip.hbm, "seconds": seconds,
    "images_per_hour": 3600 * plan.trajectories / seconds if seconds is not None else None,
  }


def held_beside(phase: str, plan: plans.Plan) -> float:
  """Bytes on a chip while a phase runs, besides its own results and temporaries."""
  causes = _STATE + _BESIDE.get(phase, ("sampler", "cache", "recorded"))
  return sum(plan.held.get(cause, 0) for cause in causes)


def _peak(phase: plans.Phase, plan: plans.Plan) -> float:
  """All bytes on a chip while a phase runs."""
  if phase.exceeds is not None:
    return phase.exceeds
  return held_beside(phase.name, plan) + phase.bytes["results"] + phase.bytes["temporaries"]


def _phase(phase: plans.Phase, plan: plans.Plan, chip: chips.Chip) -> dict[str, Any]:
  """The figures of all runs of a phase in an iteration, on one chip.

  "times" has the seconds that each resource alone would take at its peak, and "seconds" the largest
  of them, as if all overlapped perfectly. "cycles" are the compiler's own estimate; see
  `hlo.Program`.
  """
  figures = {"runs": phase.runs, "compile_seconds": phase.seconds, "exceeds": phase.exceeds}
  if phase.program is None:
    return figures | {"seconds": 0.0}
  program, runs = phase.program, phase.runs
  sent: dict[tuple[str, str], float] = defaultdict(float)
  mesh = plan.mesh if phase.name in plans.UPDATE else plan.sampling_mesh
  for collective in program.collectives:
    along = "+".join(hlo.axes(collective.groups, mesh)) or "none"
    sent[collective.kind, along] += runs * collective.times * hlo.wire_bytes(collective)
  flops = runs * (program.flops + _kernel_flops(program))
  times = {
    "compute": flops / chip.flops, "hbm": runs * program.bytes / chip.hbm_bandwidth,
    "interconnect": sum(sent.values()) / chip.axis_bandwidth,
  }
  model_flops, count = phase.model_flops, math.prod(plan.mesh.values())
  return figures | {
    "bytes": dict(phase.bytes), "flops": flops, "hbm_bytes": runs * program.bytes,
    "cycles": runs * program.cycles,
    "model_flops": None if model_flops is None else model_flops / count,
    "collectives": [
      {"kind": kind, "axis": axis, "bytes": value} for (kind, axis), value in sorted(sent.items())
    ],
    "times": times, "seconds": max(times.values()), "bound": max(times, key=times.get),
  }


def _kernel_flops(program: hlo.Program) -> float:
  """FLOPs of the kernels in one run: by formula, else as their authors noted, else 0."""
  return sum(call.times * (_splash_flops(call) or call.flops or 0) for call in program.custom_calls)


def _splash_flops(call: hlo.CustomCall) -> float:
  """FLOPs of a splash attention kernel, over padded lengths; 0 for other kernels."""
  factor = next((f for name, f in _SPLASH.items() if call.name.startswith(name)), 0)
  # Tables of blocks come first, then queries and keys: [..., heads, length, H].
  tensors = [array.dims for array in call.operands if array.dtype in ("bf16", "f32")]
  if not factor or len(tensors) < 2:
    return 0.0
  queries, keys = tensors[:2]
  return factor * math.prod(queries) * keys[-2]
