"""Parser for the text of a compiled XLA program: computations, instructions, shapes, groups.

The text of a large program, and even a single line of it, may have several megabytes, so every line
is scanned a fixed number of times.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
import functools
import itertools
import math
import re

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types name their size: bf16, s4, f8e4m3fn, c64
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([^\s,(){}=]+)")
_CONTINUED = re.compile(r'\n(?="|\}[^\n])')
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_AXIS = re.compile(r"'?([^\[\]',]+?)'?=(\d+)")
_GROUP_AXIS = re.compile(r"'?([^',{}]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
  """Type and size of one array of a program, on one device."""

  dtype: str  # as XLA writes it, such as "bf16"
  dims: tuple[int, ...]
  space: int = 0  # 0 is the device's main memory (HBM); on a TPU 1 is VMEM, 5 the host's

  @property
  def bytes(self) -> float:
    """Size without the padding of the layout."""
    digits = re.search(r"\d+", self.dtype)
    bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 0
    return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(eq=False, repr=False)
class Instruction:
  """One instruction, a line of a computation."""

  name: str  # without the percent sign; unique in the program
  opcode: str  # such as "dot"; without the "-start" of asynchronous operations
  # The result, or the leaves of a tuple; of a "-start", the result of its "-done".
  arrays: tuple[Array, ...]
  operands: tuple[Instruction, ...]  # in the same computation
  attributes: str  # the rest of the line
  literal: str  # value of a constant, or number of a parameter; "" for other opcodes
  is_root: bool  # whether it is the computation's result
  computations: dict[str, Computation]  # all computations of the program, by name
  users: list[Instruction] = dataclasses.field(default_factory=list)  # whose operand it is

  @property
  def bytes(self) -> float:
    """Size of all arrays of the result."""
    return sum(array.bytes for array in self.arrays)

  @functools.cached_property
  def target(self) -> str:
    """The target of a custom call; "" for other opcodes."""
    is_call = self.opcode == "custom-call"
    return self.attribute("custom_call_target").strip('"') if is_call else ""

  def attribute(self, key: str) -> str:
    """The value after `key=`, up to the next comma outside brackets and quotes; "" without it."""
    match = re.search(rf"(?:^|[\s,]){key}=", self.attributes)
    if not match:
      return ""
    start, depth = match.end(), 0
    if self.attributes.startswith("mesh[", start):
      # Groups along mesh axes: `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}` is one value.
      return self.attributes[start:self.attributes.index("}", start) + 1]
    for mark in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]', self.attributes[start:]):
      depth += (mark[0] in "{([") - (mark[0] in "})]")
      if mark[0] == "," and depth == 0:
        return self.attributes[start:start + mark.start()]
    return self.attributes[start:]

  def called(self, *keys: str) -> list[Computation]:
    """The computations that the attributes `keys` name."""
    return [self.computations[name] for key in keys for name in _NAME.findall(self.attribute(key))]

  def source(self, through: Collection[str]) -> Instruction:
    """Follows first operands as long as the opcode is in `through`, such as copies."""
    value = self
    while value.opcode in through and value.operands:
      value = value.operands[0]
    return value


@dataclasses.dataclass(eq=False, repr=False)
class Computation:
  """A computation: a function that other instructions call, or the program itself."""

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)  # in text order

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction that is the result."""
    return next(value for value in self.instructions.values() if value.is_root)

  @property
  def results(self) -> tuple[Instruction, ...]:
    """The root, or the operands of a root that makes a tuple."""
    return self.root.operands if self.root.opcode == "tuple" else (self.root,)

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """The parameters, in the order in which a caller passes them."""
    parameters = [value for value in self.instructions.values() if value.opcode == "parameter"]
    return sorted(parameters, key=lambda parameter: int(parameter.literal))


def parse(text: str) -> tuple[Computation, int]:
  """(the entry computation of a compiled program, number of devices that run it).

  Raises:
    ValueError: it is not the text of a compiled program.
  """
  computations: dict[str, Computation] = {}
  entry = current = None
  # A kernel's metadata may break an instruction into several lines.
  for line in _CONTINUED.sub(" ", text).splitlines():
    if not line.startswith(" "):
      if line.endswith("{") and "->" in line:
        current = Computation(_NAME.search(line)[1])
        computations[current.name] = current
        entry = current if line.startswith("ENTRY") else entry
      elif line.startswith("}"):
        current = None
    elif current is not None and " = " in line:
      _add_instruction(line.strip(), current, computations)
  if entry is None:
    raise ValueError("this is not the text of a compiled program: it has no ENTRY")
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:text.find("\n")])
  return entry, math.prod(map(int, counts))


def _add_instruction(
  line: str, computation: Computation, computations: dict[str, Computation]
) -> None:
  """Adds the instruction `[ROOT] %name = shape opcode(operands), attributes`."""
  name, _, rest = line.partition(" = ")
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opening = rest.index("(", end)
  opcode = rest[end:opening].strip()
  # The literal of a constant may contain parentheses.
  closing = rest.index(")", opening) if opcode == "constant" else _closing(rest, opening)
  inside = rest[opening + 1:closing]
  instruction = Instruction(
    name=name.removeprefix("ROOT ").removeprefix("%"), opcode=opcode.removesuffix("-start"),
    arrays=_arrays(rest[:end]),
    operands=tuple(computation.instructions[operand] for operand in _NAME.findall(inside)),
    attributes=rest[closing + 1:],
    literal=inside if opcode in ("constant", "parameter") else "",
    is_root=name.startswith("ROOT "), computations=computations,
  )
  for operand in dict.fromkeys(instruction.operands):
    operand.users.append(instruction)
  computation.instructions[instruction.name] = instruction
  if opcode.endswith("-done"):
    # The tuple of a "-start" also holds operands and semaphores, so its "-done" has the result.
    start = instruction.operands[0]
    while start.opcode.endswith("-update"):
      start = start.operands[0]
    start.arrays = instruction.arrays


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for mark in re.compile(r"[()]").finditer(text, start):
    depth += 1 if mark[0] == "(" else -1
    if depth == 0:
      return mark.start()
  return len(text)


def _arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape, such as `(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[])`."""
  arrays = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = _SPACE.search(layout)
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    arrays.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(arrays)


def integers(text: str) -> list[int]:
  """All integers in a text."""
  return [int(number) for number in re.findall(r"\d+", text)]


def groups(text: str, devices: int) -> Groups:
  """The groups of a collective, as positions of devices.

  Args:
    text: of `replica_groups` or `source_target_pairs`: `{{0,1},{2,3}}`, `[4,2]<=[2,4]T(1,0)`, or
      axes of a mesh; `{}` is one group of all devices.
    devices: number of devices.
  """
  if text.startswith("["):
    shape, _, iota = text.partition("<=")
    return _as_tuples(_iota(iota), integers(shape)[-1])
  if "mesh[" in text:
    return _mesh_groups(text)
  listed = tuple(tuple(integers(group)) for group in re.findall(r"\{([\d,\s]+)\}", text))
  return listed or (tuple(range(devices)),)


def _as_tuples(ids: np.ndarray, size: int) -> Groups:
  return tuple(map(tuple, ids.reshape(-1, size).tolist()))


def _iota(text: str) -> np.ndarray:
  """Device positions `[4,2]T(1,0)`: 0, 1, 2, ... in that shape, transposed."""
  dims, order = _IOTA.search(text).groups()
  ids = np.arange(math.prod(integers(dims))).reshape(integers(dims))
  return ids.transpose(integers(order)) if order else ids


def _mesh_groups(text: str) -> Groups:
  """The groups `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2,'b'}`.

  Written as (p)s, an axis of size n is split into p x s x n/(p s), and its middle part is meant.
  """
  sizes = {name: int(size) for name, size in _MESH_AXIS.findall(text.split("]")[0])}
  device_ids = re.search(r"device_ids=\((.*)\) \{", text)
  if device_ids and "[" not in device_ids[1]:
    ids = np.array(integers(device_ids[1]))
  else:
    ids = _iota(device_ids[1]) if device_ids else np.arange(math.prod(sizes.values()))
  grouped = [
    (name, int(before or 1), int(size or sizes[name]))
    for name, before, size in _GROUP_AXIS.findall(text[text.rindex("{") + 1:text.rindex("}")])
  ]
  dims, place = [], {}  # every axis is split wherever a part of it begins or ends
  for name, size in sizes.items():
    parts = [(p, p * s) for other, p, s in grouped if other == name]
    for low, high in itertools.pairwise(sorted({1, size, *itertools.chain(*parts)})):
      place[name, low] = len(dims)
      dims.append(high // low)
  inside = [place[name, before] for name, before, _ in grouped if (name, before) in place]
  outside = [axis for axis in range(len(dims)) if axis not in inside]
  size = math.prod(dims[axis] for axis in inside)
  return _as_tuples(ids.reshape(dims).transpose(outside + inside), size)
