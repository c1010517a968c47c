"""The text of a compiled XLA program, taken apart: computations, instructions, shapes, groups.

What the parts mean for time and memory is `hlo.py`'s business. The text of a large program has
several megabytes, and one line of it may have one: every line is looked at a fixed number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # the others say their size: bf16, s4, f8e4m3fn, c64
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([^\s,(){}=]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CONTINUED = re.compile(r'\n(?="|\}[^\n])')
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'?([^',{}]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
  """Type and size of one array of a program, on one device.

  Attributes:
    dtype: As XLA writes it, such as "bf16".
    dims: Its sizes.
    space: Memory space: 0 is the device's main memory (HBM); on a TPU 1 is VMEM, 5 the host's.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> float:
    """Its size without the padding of its layout."""
    digits = re.search(r"\d+", self.dtype)
    bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 0
    return math.prod(self.dims) * bits / 8

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: Without the percent sign; unique in the program.
    opcode: Such as "dot"; of a "-start" the name of what it starts, which is what it does.
    arrays: What it gives: one array, or a tuple's leaves. Of a start, what its "-done" gives.
    operands: Names of instructions of the same computation.
    attributes: The rest of the line.
    started: It is the start of an asynchronous operation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  started: bool = False
  literal: str = ""

  @property
  def bytes(self) -> float:
    return sum(array.bytes for array in self.arrays)

  @functools.cached_property
  def op_name(self) -> str:
    """Where the program that was compiled has it from; empty where the text does not say."""
    found = _OP_NAME.search(self.attributes)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

  def attribute(self, key: str) -> str:
    """The value behind `key=`, up to the next comma outside brackets and quotes; "" without one."""
    found = re.search(rf"(?:^|[\s,]){key}=", self.attributes)
    if not found:
      return ""
    start, depth = found.end(), 0
    if self.attributes.startswith("mesh[", start):
      # Axes of a mesh: `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}` is one value.
      return self.attributes[start:self.attributes.index("}", start) + 1]
    for mark in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]', self.attributes[start:]):
      depth += (mark[0] in "{([") - (mark[0] in "})]")
      if mark[0] == "," and depth == 0:
        return self.attributes[start:start + mark.start()]
    return self.attributes[start:]

  def called(self, key: str) -> list[str]:
    """Names of the computations behind `key=`."""
    return _NAME.findall(self.attribute(key))


class Computation:
  """Instructions in the order of the text, by name.

  Attributes:
    name: Without the percent sign.
    instructions: {name: Instruction}.
    root: What the computation gives.
    parameters: Its parameters in their order.
  """

  def __init__(self, name: str):
    self.name = name
    self.instructions: dict[str, Instruction] = {}
    self.root: Instruction | None = None

  def add(self, instruction: Instruction, root: bool) -> None:
    if instruction.opcode.endswith("-done"):
      self._finish(instruction)
    self.instructions[instruction.name] = instruction
    if root:
      self.root = instruction

  def _finish(self, done: Instruction) -> None:
    """Gives a start what its end gives: its own tuple also holds operands and signals."""
    start = self.instructions.get(done.operands[0]) if done.operands else None
    while start and start.opcode.endswith("-update"):
      start = self.instructions.get(start.operands[0])
    if start:
      self.instructions[start.name] = dataclasses.replace(start, arrays=done.arrays)

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    found = [i for i in self.instructions.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda parameter: int(parameter.literal))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """{name: the instructions that have it as an operand}."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users.setdefault(operand, []).append(instruction)
    return users

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """{name: Computation}, the one that runs first, and how many devices run it."""

  computations: dict[str, Computation]
  entry: Computation
  devices: int


def arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape, such as `(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[])`."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = _SPACE.search(layout)
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    found.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _close(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for mark in re.compile(r"[()]").finditer(text, start):
    depth += 1 if mark[0] == "(" else -1
    if depth == 0:
      return mark.start()
  return len(text)


def _instruction(line: str) -> Instruction:
  """Reads `%name = shape opcode(operands), attributes`."""
  name, _, rest = line.partition(" = ")
  end = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opening = rest.index("(", end)
  opcode = rest[end:opening].strip()
  # A literal may hold parentheses of its own, and is no operand.
  closing = rest.index(")", opening) if opcode == "constant" else _close(rest, opening)
  inside = rest[opening + 1:closing]
  started = opcode.endswith("-start")
  return Instruction(
    name=name.strip().removeprefix("%"), opcode=opcode.removesuffix("-start"),
    arrays=arrays(rest[:end]), operands=tuple(_NAME.findall(inside)),
    attributes=rest[closing + 1:], started=started,
    literal=inside if opcode in ("constant", "parameter") else "",
  )


def parse(text: str) -> Module:
  """Takes the text of a compiled program apart.

  Args:
    text: What `compiled.as_text()` gives.

  Raises:
    ValueError: The text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = current = None
  # A kernel's own metadata stands on lines of its own in the middle of an instruction.
  for line in _CONTINUED.sub(" ", text).splitlines():
    if not line.startswith(" "):
      if line.endswith("{") and "->" in line:
        current = Computation(_NAME.search(line)[1])
        computations[current.name] = current
        entry = current if line.startswith("ENTRY") else entry
      elif line.startswith("}"):
        current = None
    elif current is not None and " = " in line:
      body = line.strip()
      root = body.startswith("ROOT ")
      current.add(_instruction(body.removeprefix("ROOT ")), root)
  if entry is None:
    raise ValueError("this is not the text of a compiled program: it has no ENTRY")
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:text.find("\n")])
  return Module(computations, entry, math.prod(map(int, counts)))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _transposed(ids: list[int], dims: list[int], order: list[int]) -> list[int]:
  """`ids`, row-major in `dims`, in row-major order after the transposition to `order`."""
  strides = [math.prod(dims[axis + 1:]) for axis in range(len(dims))]
  places = itertools.product(*(range(dims[axis]) for axis in order))
  return [ids[sum(i * strides[a] for i, a in zip(place, order))] for place in places]


def _iota(text: str) -> list[int]:
  """Device positions of `[4,2]T(1,0)`: counted up in that shape, then transposed."""
  dims, order = _IOTA.search(text).groups()
  sizes = _numbers(dims)
  ids = list(range(math.prod(sizes)))
  return _transposed(ids, sizes, _numbers(order)) if order else ids


def _cut(ids: list[int], size: int) -> Groups:
  return tuple(tuple(ids[at:at + size]) for at in range(0, len(ids), size))


def _mesh_groups(text: str) -> Groups:
  """Groups of `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2,'b'}`.

  An axis of n that is given as (p)s is one of p x s x n/(p s), of which the middle one is meant.
  """
  named = re.findall(r"'?([^\[\]',]+?)'?=(\d+)", text.split("]")[0])
  sizes = {name: int(size) for name, size in named}
  listed = re.search(r"device_ids=\((.*)\) \{", text)
  ids = list(range(math.prod(sizes.values())))
  if listed:
    ids = _iota(listed[1]) if "[" in listed[1] else _numbers(listed[1])
  meant = [
    (name, int(before or 1), int(size or sizes[name]))
    for name, before, size in _AXIS.findall(text[text.rindex("{") + 1:text.rindex("}")])
  ]
  dims, place = [], {}
  for name, size in sizes.items():
    bounds = sorted({1, size, *(b for n, p, s in meant if n == name for b in (p, p * s))})
    for low, high in itertools.pairwise(bounds):
      place[name, low] = len(dims)
      dims.append(high // low)
  inside = [place[name, before] for name, before, size in meant if (name, before) in place]
  outside = [axis for axis in range(len(dims)) if axis not in inside]
  return _cut(
    _transposed(ids, dims, outside + inside), math.prod(dims[axis] for axis in inside)
  )


@functools.lru_cache(maxsize=4096)
def groups(text: str, devices: int) -> Groups:
  """Device positions of each group of a collective.

  Args:
    text: The value of `replica_groups` or `source_target_pairs`: `{{0,1},{2,3}}`,
      `[4,2]<=[2,4]T(1,0)`, or axes of a mesh; `{}` is one group of all.
    devices: How many there are.
  """
  if text.startswith("["):
    shape, _, iota = text.partition("<=")
    return _cut(_iota(iota), _numbers(shape)[-1])
  if "mesh[" in text:
    return _mesh_groups(text)
  listed = tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,\s]+)\}", text))
  return listed or (tuple(range(devices)),)


def leaves(computation: Computation) -> Iterator[Instruction]:
  """What a computation gives: its root, or the elements of the tuple that its root is."""
  root = computation.root
  yield from computation.operands(root) if root.opcode == "tuple" else (root,)


def source(value: Instruction, computation: Computation, through: set[str]) -> Instruction:
  """What `value` is a copy of: its first operand's, where its opcode is in `through`."""
  while value.opcode in through and value.operands:
    value = computation.instructions[value.operands[0]]
  return value
