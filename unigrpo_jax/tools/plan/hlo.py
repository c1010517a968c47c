"""What a compiled XLA program does on one device: FLOPs, memory traffic and collectives.

They are read from the program's text, `compiled.as_text()`. Unlike XLA's own cost analysis, which
counts the body of a loop once, everything is counted as often as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import re

import numpy as np

from unigrpo_jax.tools.plan import hlo_costs, hlo_text

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)
_GOES_ON = "async_collective_fusion"  # names of computations in which a collective goes on
_NOTED_FLOPS = re.compile(r'"cost_estimate":\{[^{}]*"flops":"(-?\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation between devices."""

  kind: str  # one of `KINDS`
  bytes: float  # on one device: of an all-gather's result, or of another collective's operands
  # Positions of the devices in each group; for a collective-permute, pairs (source, target).
  groups: hlo_text.Groups
  times: float  # how often it runs


@dataclasses.dataclass(frozen=True)
class CustomCall:
  """A call of a kernel, whose FLOPs cannot be read from the text."""

  name: str  # of the instruction
  operands: tuple[hlo_text.Array, ...]  # on one device
  times: float  # how often it runs
  flops: float | None = None  # of one run, if its author noted them (Pallas: `cost_estimate`)


@dataclasses.dataclass
class Program:
  """What one device does in one run of a program or of one of its computations.

  `flops` counts two for each multiply-add of a dot or convolution, without the convolution's
  padding and dilation: on TPUs, batched products are such convolutions.

  `bytes` estimates the traffic of main memory. An instruction outside a fusion reads its operands
  and writes its results once, without the padding of layouts. A slice or gather, alone or in a
  fusion, reads as much as its result has; an update in place reads and writes just the update.
  Scalars, arrays in another memory (VMEM) and instructions that move no data are free. What a
  kernel or fusion reads twice is counted once.

  `cycles` adds up what the TPU compiler noted as its estimate for each instruction, as if they ran
  one after the other. Kernels have none, nor has a program for another device.
  """

  flops: float = 0.0
  bytes: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)
  cycles: float = 0.0

  def add(self, called: Program, times: float) -> None:
    """Adds `times` runs of a program that is called."""
    self.flops += times * called.flops
    self.bytes += times * called.bytes
    self.cycles += times * called.cycles
    for field in ("collectives", "custom_calls"):
      getattr(self, field).extend(
        dataclasses.replace(item, times=times * item.times) for item in getattr(called, field)
      )


def read(text: str, unknown_trips: float = 1) -> Program:
  """Reads what a compiled program does.

  The body of a loop counts as often as it runs, and its condition once more. Of a conditional, the
  most expensive branch counts.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: number of trips of loops for which the text does not have it.
  """
  entry, devices = hlo_text.parse(text)
  return _Reader(devices, unknown_trips).program(entry, fused=False)


class _Reader:
  """Sums up the instructions of computations, each of which is read only once."""

  def __init__(self, devices: int, unknown_trips: float):
    self._devices = devices
    self._unknown_trips = unknown_trips
    self._programs: dict[tuple[str, bool], Program] = {}

  def program(self, computation: hlo_text.Computation, fused: bool) -> Program:
    """One run of a computation; a fused one has no memory traffic of its own."""
    key = computation.name, fused
    if key not in self._programs:
      self._programs[key] = total = Program()
      counted: set[str] = set()
      for instruction in computation.instructions.values():
        if not instruction.opcode.endswith(("-done", "-update")):
          self._add(instruction, computation, fused, total, counted)
    return self._programs[key]

  def _add(self, instruction, computation, fused: bool, total: Program, counted: set[str]) -> None:
    """Adds an instruction to `total`; `counted` are channels of its collectives within fusions."""
    opcode = instruction.opcode
    total.flops += hlo_costs.flops(instruction)
    if not fused:
      total.bytes += hlo_costs.traffic(instruction)
      total.cycles += hlo_costs.cycles(instruction)
    if opcode in KINDS:
      total.collectives.append(self._collective(instruction, computation, fused))
    elif opcode == "custom-call" and instruction.target not in hlo_costs.NO_KERNELS:
      total.custom_calls.append(_custom_call(instruction))
    elif opcode == "while":
      trips = hlo_costs.trips(instruction)
      trips = self._unknown_trips if trips is None else trips
      body, condition = instruction.called("body", "condition")
      total.add(self.program(body, fused), trips)
      total.add(self.program(condition, fused), trips + 1)
    elif opcode == "conditional":
      branches = instruction.called("branch_computations", "true_computation", "false_computation")
      dearest = max((self.program(branch, fused) for branch in branches), key=_weight)
      total.add(dearest, 1)
    elif opcode == "fusion":
      for called in instruction.called("calls"):
        part, channels = self.program(called, fused=True), _channels(called)
        # A TPU's collective that runs beside products starts in one fusion, goes on in theirs and
        # ends in another one. All of them have it.
        if channels and (called.name.startswith(_GOES_ON) or channels <= counted):
          part = dataclasses.replace(part, collectives=[])
        else:
          counted |= channels
        total.add(part, 1)
    elif opcode in ("call", "async"):
      for called in instruction.called("calls", "to_apply"):
        total.add(self.program(called, fused), 1)

  def _collective(self, instruction, computation, fused: bool) -> Collective:
    kind = instruction.opcode
    key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    groups = hlo_text.groups(instruction.attribute(key), self._devices)
    size, sent = len(groups[0]), sum(operand.bytes for operand in instruction.operands)
    if kind == "all-reduce" and fused and size > 1:
      # On TPUs, a reduce-scatter is a fusion of an all-reduce with a slice of its result.
      if size * sum(result.bytes for result in computation.results) == sent:
        kind = "reduce-scatter"
    return Collective(kind, sent * size if kind == "all-gather" else sent, groups, 1)


def _channels(fused: hlo_text.Computation) -> set[str]:
  """Channels of the collectives of a fused computation."""
  return {
    instruction.attribute("channel_id") for instruction in fused.instructions.values()
    if instruction.opcode in KINDS
  } - {""}


def _custom_call(instruction: hlo_text.Instruction) -> CustomCall:
  noted = _NOTED_FLOPS.search(instruction.attributes)
  operands = tuple(array for operand in instruction.operands for array in operand.arrays)
  return CustomCall(instruction.name, operands, 1, float(noted[1]) if noted else None)


def _weight(branch: Program) -> tuple[float, ...]:
  """A key that orders branches by cost."""
  return branch.flops, branch.bytes, sum(c.times * wire_bytes(c) for c in branch.collectives)


def axes(groups: hlo_text.Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes, in order, along which a collective communicates.

  Args:
    groups: see `Collective`.
    mesh_shape: {axis: size}.

  Returns:
    () where each group is a single device; ("other",) where the groups do not consist of whole
    axes, or a device is not in the mesh.
  """
  if len({len(group) for group in groups}) > 1:
    return ("other",)
  ids = np.array(groups)  # [groups, devices of a group]
  if ids.max() >= math.prod(mesh_shape.values()):
    return ("other",)
  places = np.array(np.unravel_index(ids, tuple(mesh_shape.values())))  # [axes, groups, devices]
  varies = (places != places[:, :, :1]).any(axis=(1, 2))
  names = tuple(axis for axis, along in zip(mesh_shape, varies) if along)
  # In pairs, devices occur twice: as source and as target.
  are_pairs = np.unique(ids).size < ids.size
  fits = are_pairs or ids.shape[1] == math.prod(mesh_shape[axis] for axis in names)
  return names if fits else ("other",)


def wire_bytes(collective: Collective) -> float:
  """Bytes that a device sends in one run of a collective, over a ring of n devices.

  (n - 1) / n of the array for an all-gather, reduce-scatter or all-to-all; twice that for an
  all-reduce; the whole array for a permute or broadcast.
  """
  if collective.kind in ("collective-permute", "collective-broadcast"):
    return collective.bytes
  devices = max(len(group) for group in collective.groups)
  part = (devices - 1) / devices * collective.bytes
  return 2 * part if collective.kind == "all-reduce" else part
