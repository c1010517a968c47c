"""Costs of an instruction of a compiled XLA program: FLOPs, memory traffic, cycles, trips."""

from __future__ import annotations

import functools
import math
import re

from unigrpo_jax.tools.plan import hlo_text

NO_KERNELS = {"AllocateBuffer"}  # targets of custom calls that do nothing
# Instructions without costs: the compiler resolves them, or what they call is counted instead.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "async", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_NOTED_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME_INTEGER = {"copy", "bitcast", "convert", "reshape"}


def flops(instruction: hlo_text.Instruction) -> float:
  """Two for each multiply-add of a dot or a convolution; 0 for other instructions."""
  if instruction.opcode == "dot":
    left = instruction.operands[0].arrays[0].dims
    summed = hlo_text.integers(instruction.attribute("lhs_contracting_dims"))
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[axis] for axis in summed)
  return _convolution(instruction) if instruction.opcode == "convolution" else 0.0


def _convolution(instruction: hlo_text.Instruction) -> float:
  """FLOPs of a convolution: two for each product of a kernel value and an input value.

  Products with padding, or with the holes of a dilated input, are not counted.
  """
  labels = re.split("_|->", instruction.attribute("dim_labels"))
  inputs, kernel, result = (
    dict(zip(label, value.arrays[0].dims))
    for label, value in zip(labels, (*instruction.operands, instruction))
  )
  count = 2.0 * result["b"] * result["f"] * kernel["i"]
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window")))

  def along(key, axis, default):
    return int(window[key].split("x")[axis].split("_")[0]) if key in window else default

  for label in sorted(set(kernel) - {"i", "o"}):
    axis = int(label)
    count *= _pairs(
      inputs[label], kernel[label], result[label], stride=along("stride", axis, 1),
      pad=along("pad", axis, 0), input_step=along("lhs_dilate", axis, 1),
      kernel_step=along("rhs_dilate", axis, 1),
    )
  return count


@functools.lru_cache(maxsize=4096)
def _pairs(inputs, kernel, result, *, stride, pad, input_step, kernel_step) -> int:
  """Number of pairs (result position, kernel position) that use an input value, along one axis.

  Result o and kernel position k use an input value if o stride + k kernel_step - pad is one of
  0, input_step, ..., (inputs - 1) input_step.
  """
  common = math.gcd(stride, input_step)
  period = input_step // common
  count = 0
  for position in range(kernel):
    offset = position * kernel_step - pad
    if offset % common:
      continue
    first = -offset // common * pow(stride // common, -1, period) % period
    low = max(0, -(offset // stride))
    high = min(result - 1, ((inputs - 1) * input_step - offset) // stride)
    start = low + (first - low) % period
    count += max(0, (high - start) // period + 1)
  return count


def traffic(instruction: hlo_text.Instruction) -> float:
  """Bytes of main memory that an instruction outside a fusion reads and writes."""
  opcode, operands = instruction.opcode, instruction.operands
  if opcode in _FREE or instruction.target in NO_KERNELS:
    return 0.0
  if opcode == "fusion":
    (fused,) = instruction.called("calls")
    reads = [_bytes_read(parameter) for parameter in fused.parameters]
    writes = _bytes_written(fused)
  else:
    reads = [operand.bytes for operand in operands]
    writes = [array.bytes for array in instruction.arrays]
    if opcode in _SLICES:
      reads[0] = instruction.bytes
    elif opcode in ("dynamic-update-slice", "scatter"):
      update = 1 if opcode == "dynamic-update-slice" else 2
      reads[0], writes[0] = 0, operands[update].bytes
  sizes = [
    size for size, operand in zip(reads, operands) if all(map(_in_main_memory, operand.arrays))
  ]
  sizes += [size for size, array in zip(writes, instruction.arrays) if _in_main_memory(array)]
  return sum(sizes)


def cycles(instruction: hlo_text.Instruction) -> float:
  """The TPU compiler's estimate for an instruction outside a fusion; 0 where it noted none."""
  noted = _NOTED_CYCLES.search(instruction.attributes)
  return float(noted[1]) if noted and instruction.opcode not in _FREE else 0.0


def _in_main_memory(array: hlo_text.Array) -> bool:
  """Whether an array is in main memory. Scalars are not: a TPU has a memory of their own for them.
  """
  return array.space == 0 and bool(array.dims)


def _bytes_read(value: hlo_text.Instruction) -> float:
  """Bytes of `value`, a parameter of a fused computation, that the computation reads.

  At most all of it, once.
  """
  is_updated = value.source({"bitcast"}).opcode == "dynamic-update-slice"
  size = 0.0
  for user in value.users:
    is_first = user.operands[0] is value
    if user.opcode in _SLICES and is_first:
      size += user.bytes
    elif user.opcode in ("bitcast", "tuple") and user.is_root:
      size += 0 if is_updated else value.bytes
    elif user.opcode == "bitcast" or user.opcode == "dynamic-update-slice" and is_first:
      size += _bytes_read(user)
    elif user.opcode == "fusion":
      (inner,) = user.called("calls")
      size += sum(
        _bytes_read(parameter)
        for parameter, operand in zip(inner.parameters, user.operands) if operand is value
      )
    else:
      size += value.bytes
  return min(size, value.bytes)


def _bytes_written(fused: hlo_text.Computation) -> list[float]:
  """Bytes that a fusion writes to each array of its result."""
  sizes = []
  for result in fused.results:
    value = result.source({"bitcast"})
    if value.opcode == "dynamic-update-slice":
      sizes.append(value.operands[1].bytes)
    elif value.opcode == "fusion":
      sizes.extend(_bytes_written(value.called("calls")[0]))
    else:
      sizes.extend(array.bytes for array in result.arrays)
  return sizes


def trips(loop: hlo_text.Instruction) -> int | None:
  """Number of trips of a "while"; None where it cannot be read from the text.

  It is what XLA noted at the loop, or follows from its condition, if that compares a counter, which
  starts at a constant and grows by a constant, with a constant bound.
  """
  if known := _KNOWN_TRIPS.search(loop.attributes):
    return int(known[1])
  condition = loop.called("condition")[0].root
  direction = condition.attribute("direction")
  if condition.opcode != "compare" or direction not in ("LT", "LE"):
    return None
  counter, bound = (operand.source(_SAME_INTEGER) for operand in condition.operands)
  if counter.opcode != "get-tuple-element":
    return None
  index = _index(counter)
  start, step, end = _initial(index, loop), _step(index, loop), _integer(bound)
  if bound.opcode == "get-tuple-element" and _step(_index(bound), loop) == 0:
    end = _initial(_index(bound), loop)
  if start is None or end is None or step is None or step < 1:
    return None
  return max(0, -(-(end + (direction == "LE") - start) // step))


def _initial(index: int, loop: hlo_text.Instruction) -> int | None:
  """The initial value of element `index` of a loop's tuple; None if it is no integer constant."""
  carry = loop.operands[0].source(_SAME_INTEGER)
  return _integer(carry.operands[index]) if carry.opcode == "tuple" else None


def _step(index: int, loop: hlo_text.Instruction) -> int | None:
  """What each trip adds to element `index` of a loop's tuple; None if it is no constant."""
  (body,) = loop.called("body")
  if body.root.opcode != "tuple":
    return None

  def is_element(value):
    return (
      value.opcode == "get-tuple-element" and _index(value) == index
      and value.operands[0] is body.parameters[0]
    )

  value = body.root.operands[index].source(_SAME_INTEGER)
  if is_element(value):
    return 0
  if value.opcode != "add":
    return None
  parts = [operand.source(_SAME_INTEGER) for operand in value.operands]
  steps = [_integer(part) for part in parts if not is_element(part)]
  return steps[0] if len(steps) == 1 else None


def _index(element: hlo_text.Instruction) -> int:
  """Which element a get-tuple-element takes."""
  return int(element.attribute("index"))


def _integer(value: hlo_text.Instruction) -> int | None:
  """The value of an integer constant, maybe copied or converted; None for anything else."""
  constant = value.source(_SAME_INTEGER)
  is_integer = constant.opcode == "constant" and re.fullmatch(r"-?\d+", constant.literal)
  return int(constant.literal) if is_integer else None
