"""What a compiled XLA program does: its FLOPs, its memory traffic and its collectives.

Read from the program's text, `compiled.as_text()`, for one device. XLA's own cost analysis counts
the body of a loop once; here everything is counted as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

from unigrpo_jax.tools.plan import hlo_flops, hlo_loops, hlo_text

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)
# What the compiler resolves before the program runs, or what is counted where it leads to.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "async", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
}
_NO_KERNELS = {"AllocateBuffer"}  # custom calls that do nothing
_NOTED_FLOPS = re.compile(r'"cost_estimate":\{[^{}]*"flops":"(-?\d+)"')
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between devices.

  Attributes:
    kind: One of `KINDS`.
    bytes: Of the whole array on one device: of an all-gather what it gives, of the others what they
      are given.
    groups: Positions of the devices that exchange with each other; of a collective-permute its
      pairs of source and target.
    times: How often it runs.
    name: Of the instruction.
    op_name: The operation of the traced program that it belongs to; may be empty.
    shape: The arrays it gives, such as "bf16[512,1024]".
  """

  kind: str
  bytes: float
  groups: hlo_text.Groups
  times: float
  name: str
  op_name: str
  shape: str


@dataclasses.dataclass(frozen=True)
class CustomCall:
  """A call of a kernel, whose FLOPs the text does not say.

  Attributes:
    name: Of the instruction.
    target: "tpu_custom_call" is a Pallas kernel.
    op_name: As of a `Collective`.
    operands: Its arrays on one device.
    results: What it gives.
    times: How often it runs.
    flops: What its author says that one run does (Pallas: `cost_estimate`); None where none says.
  """

  name: str
  target: str
  op_name: str
  operands: tuple[hlo_text.Array, ...]
  results: tuple[hlo_text.Array, ...]
  times: float
  flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop whose number of trips the text does not say.

  Attributes:
    name: Of the instruction.
    op_name: As of a `Collective`.
    limit: It ends after so many trips at the latest; None where that is not known either.
    times: How often it is entered.
  """

  name: str
  op_name: str
  limit: int | None
  times: float


@dataclasses.dataclass(frozen=True)
class Program:
  """What one device does in one run of a program.

  Attributes:
    flops: Two for each multiply-add of a dot or convolution. The padding of a convolution and the
      holes of a dilated one are not counted: a TPU's batched products are such convolutions.
    bytes: An estimate of what is read from and written to main memory. Each instruction outside a
      fusion reads its operands and writes its results once, without the padding of layouts. A slice
      or gather reads what it gives, alone or in a fusion that needs no more of the operand; an
      update in place reads and writes the update. Scalars and arrays in another memory (VMEM) are
      free, and so is what moves nothing: tuples, parameters, bitcasts. What a kernel or fusion
      reads twice is counted once.
    collectives: In the order of the text.
    custom_calls: Likewise.
    unknown_loops: Loops that were counted with `unknown_trips`.
    devices: How many run it.
  """

  flops: float
  bytes: float
  collectives: tuple[Collective, ...]
  custom_calls: tuple[CustomCall, ...]
  unknown_loops: tuple[Loop, ...]
  devices: int


def read(text: str, unknown_trips: float = 1) -> Program:
  """Reads what a compiled program does.

  Loops count as often as they run (`hlo_loops`), their condition once more than their body. Of a
  conditional the most expensive branch counts.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: Of a loop of which neither is known, such as one that ends early.

  Raises:
    ValueError: The text is not that of a compiled program.
  """
  module = hlo_text.parse(text)
  total = _Reader(module, unknown_trips).cost(module.entry.name, False)
  return Program(
    total.flops, total.bytes, tuple(total.collectives), tuple(total.custom_calls),
    tuple(total.loops), module.devices,
  )


def axes(groups: hlo_text.Groups, mesh_shape: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes that the groups of a collective run along.

  Args:
    groups: Device positions, row-major in the mesh; or pairs of source and target.
    mesh_shape: {axis: size}, in the mesh's order.

  Returns:
    Axes in the mesh's order; ("other",) where the groups are not those of whole axes, or, of pairs,
    some leave the mesh. Groups of one device run along no axis.
  """
  return _axes(tuple(map(tuple, groups)), tuple(mesh_shape.items()))


@functools.lru_cache(maxsize=4096)
def _axes(groups: hlo_text.Groups, mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
  strides = [math.prod(size for _, size in mesh[at + 1:]) for at in range(len(mesh))]
  devices = math.prod(size for _, size in mesh)
  members = [position for group in groups for position in group]
  if any(position >= devices for position in members):
    return ("other",)

  def place(position):
    return tuple(position // stride % size for stride, (_, size) in zip(strides, mesh))

  along = [
    axis for axis in range(len(mesh))
    if any(place(p)[axis] != place(group[0])[axis] for group in groups for p in group)
  ]
  names = tuple(mesh[axis][0] for axis in along)
  if len(set(members)) < len(members):  # A device sends to one and receives from another: pairs.
    return names
  whole = math.prod(mesh[axis][1] for axis in along)
  fixed = [axis for axis in range(len(mesh)) if axis not in along]
  fits = all(
    len(group) == whole and len({tuple(place(p)[a] for a in fixed) for p in group}) == 1
    for group in groups
  )
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


@dataclasses.dataclass
class _Cost:
  """What one run of a computation costs."""

  flops: float = 0.0
  bytes: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)
  loops: list[Loop] = dataclasses.field(default_factory=list)

  def add(self, other: _Cost, times: float, op_name: str) -> None:
    """Adds `times` runs of what `op_name` calls, which names what has no name of its own."""
    self.flops += times * other.flops
    self.bytes += times * other.bytes
    for field in ("collectives", "custom_calls", "loops"):
      getattr(self, field).extend(
        dataclasses.replace(item, times=times * item.times, op_name=item.op_name or op_name)
        for item in getattr(other, field)
      )

  @property
  def weight(self) -> tuple[float, ...]:
    """By which the most expensive of several is found."""
    return self.flops, self.bytes, sum(c.times * wire_bytes(c) for c in self.collectives)


class _Reader:
  """Adds up a module's computations, each of them once."""

  def __init__(self, module: hlo_text.Module, unknown_trips: float):
    self._module = module
    self._computations = module.computations
    self._unknown_trips = unknown_trips
    self._known: dict[tuple[str, bool], _Cost] = {}

  def cost(self, name: str, fused: bool) -> _Cost:
    """Cost of one run of the computation `name`; a fused one has no traffic inside."""
    if (name, fused) not in self._known:
      total = _Cost()
      for instruction in self._computations[name].instructions.values():
        self._count(instruction, self._computations[name], fused, total)
      self._known[name, fused] = total
    return self._known[name, fused]

  def _count(self, instruction, computation, fused, total) -> None:
    opcode = instruction.opcode
    if opcode.endswith(("-done", "-update")):
      return
    if not fused:
      total.bytes += self._traffic(instruction, computation)
    if opcode == "dot":
      total.flops += hlo_flops.dot(instruction, computation)
    elif opcode == "convolution":
      total.flops += hlo_flops.convolution(instruction, computation)
    elif opcode in KINDS:
      total.collectives.append(self._collective(instruction, computation, fused))
    elif opcode == "custom-call" and _target(instruction) not in _NO_KERNELS:
      total.custom_calls.append(_custom_call(instruction, computation))
    elif opcode == "while":
      self._loop(instruction, computation, fused, total)
    elif opcode == "conditional":
      branches = [self.cost(name, fused) for name in _branches(instruction)]
      total.add(max(branches, key=lambda cost: cost.weight), 1, instruction.op_name)
    elif opcode in ("fusion", "call", "async"):
      inside = fused or opcode == "fusion"
      for name in instruction.called("calls") + instruction.called("to_apply"):
        total.add(self.cost(name, inside), 1, instruction.op_name)

  def _collective(self, instruction, computation, fused) -> Collective:
    kind, given = instruction.opcode, _given(instruction, computation)
    key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    groups = hlo_text.groups(instruction.attribute(key), self._module.devices)
    size = len(groups[0])
    results = instruction.arrays
    if kind == "all-reduce" and fused:
      # A TPU writes a reduce-scatter as a fusion of an all-reduce and a device's slice of it.
      kept = tuple(array for leaf in hlo_text.leaves(computation) for array in leaf.arrays)
      if size > 1 and size * sum(array.bytes for array in kept) == given:
        kind, results = "reduce-scatter", kept
    return Collective(
      kind, given * size if kind == "all-gather" else given, groups, 1, instruction.name,
      instruction.op_name, ", ".join(map(str, results)),
    )

  def _loop(self, instruction, computation, fused, total) -> None:
    body, condition = instruction.called("body")[0], instruction.called("condition")[0]
    trips, limit = hlo_loops.trips(instruction, computation, self._computations)
    if trips is None:
      trips = self._unknown_trips
      total.loops.append(Loop(instruction.name, instruction.op_name, limit, 1))
    total.add(self.cost(body, fused), trips, instruction.op_name)
    total.add(self.cost(condition, fused), trips + 1, instruction.op_name)

  def _traffic(self, instruction, computation) -> float:
    """Bytes of main memory that an instruction outside a fusion reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode == "custom-call" and _target(instruction) in _NO_KERNELS:
      return 0
    operands = computation.operands(instruction)
    if opcode == "fusion":
      fused = self._computations[instruction.called("calls")[0]]
      reads = [self._read_inside(parameter, fused) for parameter in fused.parameters]
      writes = self._written_inside(fused)
    else:
      reads = [operand.bytes for operand in operands]
      writes = [array.bytes for array in instruction.arrays]
      if opcode in _SLICES:
        reads[0] = instruction.bytes
      elif opcode in ("dynamic-update-slice", "scatter"):
        update = 1 if opcode == "dynamic-update-slice" else 2
        reads[0], writes[0] = 0, operands[update].bytes
    ours = [all(map(_in_main_memory, operand.arrays)) for operand in operands]
    return sum(size for size, here in zip(reads, ours) if here) + sum(
      size for size, array in zip(writes, instruction.arrays) if _in_main_memory(array)
    )

  def _read_inside(self, value, computation) -> float:
    """Bytes of `value` that the rest of a fused computation needs: at most all of it, once."""
    updated = hlo_text.source(value, computation, {"bitcast"}).opcode == "dynamic-update-slice"
    size = 0.0
    for user in computation.users.get(value.name, ()):
      first = user.operands[0] == value.name
      if user.opcode in _SLICES and first:
        size += user.bytes
      elif user.opcode in ("bitcast", "tuple") and user is computation.root:
        size += 0 if updated else value.bytes
      elif user.opcode == "bitcast" or user.opcode == "dynamic-update-slice" and first:
        size += self._read_inside(user, computation)
      elif user.opcode == "fusion":
        inner = self._computations[user.called("calls")[0]]
        places = [at for at, name in enumerate(user.operands) if name == value.name]
        size += sum(self._read_inside(inner.parameters[at], inner) for at in places)
      else:
        size += value.bytes
    return min(size, value.bytes)

  def _written_inside(self, computation) -> list[float]:
    """Bytes that a fusion writes of each array it gives."""
    sizes = []
    for leaf in hlo_text.leaves(computation):
      value = hlo_text.source(leaf, computation, {"bitcast"})
      if value.opcode == "dynamic-update-slice":
        sizes.append(computation.operands(value)[1].bytes)
      elif value.opcode == "fusion":
        sizes.extend(self._written_inside(self._computations[value.called("calls")[0]]))
      else:
        sizes.extend(array.bytes for array in leaf.arrays)
    return sizes


def _branches(instruction: hlo_text.Instruction) -> list[str]:
  keys = ("branch_computations", "true_computation", "false_computation")
  return [name for key in keys for name in instruction.called(key)]


def _given(instruction, computation) -> float:
  return sum(operand.bytes for operand in computation.operands(instruction))


def _in_main_memory(array: hlo_text.Array) -> bool:
  """Scalars are not: a TPU keeps them in a memory of their own."""
  return array.space == 0 and bool(array.dims)


def _target(instruction: hlo_text.Instruction) -> str:
  return json.loads(instruction.attribute("custom_call_target"))


def _custom_call(instruction, computation) -> CustomCall:
  operands = computation.operands(instruction)
  noted = _NOTED_FLOPS.search(instruction.attributes)
  return CustomCall(
    instruction.name, _target(instruction), instruction.op_name,
    tuple(array for operand in operands for array in operand.arrays), instruction.arrays, 1,
    float(noted[1]) if noted else None,
  )
