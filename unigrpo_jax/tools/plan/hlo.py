"""What a compiled XLA program does: its FLOPs, its memory traffic and its collectives.

Read from the program's text, `compiled.as_text()`, for one device. XLA's own cost analysis counts
the body of a loop once; here everything is counted as often as it runs.
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
_NOTED_FLOPS = re.compile(r'"cost_estimate":\{[^{}]*"flops":"(-?\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between devices.

  `groups` are positions of the devices that exchange with each other; of a collective-permute its
  pairs of source and target.
  """

  kind: str  # of `KINDS`
  bytes: float  # of the whole array on one device: the result of an all-gather, else the operands
  groups: hlo_text.Groups
  times: float  # how often it runs


@dataclasses.dataclass(frozen=True)
class CustomCall:
  """A call of a kernel, whose FLOPs the text does not say."""

  name: str  # of the instruction
  operands: tuple[hlo_text.Array, ...]  # on one device
  times: float  # how often it runs
  flops: float | None = None  # of one run, by its author (Pallas: `cost_estimate`)


@dataclasses.dataclass
class Program:
  """What one device does in one run of a program or of one of its computations.

  `flops` are two for each multiply-add of a dot or convolution, its padding and holes not counted:
  a TPU's batched products are such convolutions. `bytes` is an estimate of the traffic of main
  memory: an instruction outside a fusion reads its operands and writes its results once, without
  the padding of layouts. A slice or gather, alone or in a fusion, reads the size of its result; an
  update in place reads and writes the update. Scalars, arrays in another memory (VMEM) and what
  moves nothing are free. What a kernel or fusion reads twice is counted once.
  """

  flops: float = 0.0
  bytes: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)

  def add(self, called: Program, times: float) -> None:
    """Adds `times` runs of what is called."""
    self.flops += times * called.flops
    self.bytes += times * called.bytes
    for field in ("collectives", "custom_calls"):
      getattr(self, field).extend(
        dataclasses.replace(item, times=times * item.times) for item in getattr(called, field)
      )


def read(text: str, unknown_trips: float = 1) -> Program:
  """What a compiled program does, from its `compiled.as_text()`.

  Loops count as often as they run, `unknown_trips` where the text does not say, their condition
  once more than their body. Of a conditional the most expensive branch counts.
  """
  entry, devices = hlo_text.parse(text)
  return _Reader(devices, unknown_trips).program(entry, fused=False)


class _Reader:
  """Adds up computations, each of them once."""

  def __init__(self, devices: int, unknown_trips: float):
    self._devices = devices
    self._unknown_trips = unknown_trips
    self._programs: dict[tuple[str, bool], Program] = {}

  def program(self, computation: hlo_text.Computation, fused: bool) -> Program:
    """One run of a computation; a fused one has no memory traffic inside."""
    key = computation.name, fused
    if key not in self._programs:
      self._programs[key] = total = Program()
      for instruction in computation.instructions.values():
        if not instruction.opcode.endswith(("-done", "-update")):
          self._add(instruction, computation, fused, total)
    return self._programs[key]

  def _add(self, instruction, computation, fused: bool, total: Program) -> None:
    opcode = instruction.opcode
    total.flops += hlo_costs.flops(instruction)
    if not fused:
      total.bytes += hlo_costs.traffic(instruction)
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
    elif opcode in ("fusion", "call", "async"):
      for called in instruction.called("calls", "to_apply"):
        total.add(self.program(called, fused or opcode == "fusion"), 1)

  def _collective(self, instruction, computation, fused: bool) -> Collective:
    kind = instruction.opcode
    key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    groups = hlo_text.groups(instruction.attribute(key), self._devices)
    size, sent = len(groups[0]), sum(operand.bytes for operand in instruction.operands)
    if kind == "all-reduce" and fused and size > 1:
      # A TPU writes a reduce-scatter as a fusion of an all-reduce and a device's slice of it.
      if size * sum(result.bytes for result in computation.results) == sent:
        kind = "reduce-scatter"
    return Collective(kind, sent * size if kind == "all-gather" else sent, groups, 1)


def _custom_call(instruction: hlo_text.Instruction) -> CustomCall:
  noted = _NOTED_FLOPS.search(instruction.attributes)
  operands = tuple(array for operand in instruction.operands for array in operand.arrays)
  return CustomCall(instruction.name, operands, 1, float(noted[1]) if noted else None)


def _weight(branch: Program) -> tuple[float, ...]:
  """By which branches are compared."""
  return branch.flops, branch.bytes, sum(c.times * wire_bytes(c) for c in branch.collectives)


def axes(groups: hlo_text.Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes, in order, that the groups of device positions, or pairs, run along.

  ("other",) where the groups are not those of whole axes, or, of pairs, some leave the mesh. Groups
  of one device run along no axis.
  """
  if len({len(group) for group in groups}) > 1:
    return ("other",)
  ids = np.array(groups)  # [groups, devices of a group]
  if ids.max() >= math.prod(mesh_shape.values()):
    return ("other",)
  places = np.array(np.unravel_index(ids, tuple(mesh_shape.values())))  # [axes, groups, devices]
  varies = (places != places[:, :, :1]).any(axis=(1, 2))
  names = tuple(axis for axis, along in zip(mesh_shape, varies) if along)
  # In pairs a device sends to one and receives from another.
  are_pairs = np.unique(ids).size < ids.size
  fits = are_pairs or ids.shape[1] == math.prod(mesh_shape[axis] for axis in names)
  return names if fits else ("other",)


def wire_bytes(collective: Collective) -> float:
  """Bytes that a device sends in one run of a collective over n devices in a ring.

  (n - 1) / n of the array for an all-gather, reduce-scatter or all-to-all, twice that for an
  all-reduce, the array itself for a permute.
  """
  if collective.kind in ("collective-permute", "collective-broadcast"):
    return collective.bytes
  devices = max(len(group) for group in collective.groups)
  part = (devices - 1) / devices * collective.bytes
  return 2 * part if collective.kind == "all-reduce" else part
