"""FLOPs of one instruction of a compiled XLA program."""

from __future__ import annotations

import functools
import math
import re

from unigrpo_jax.tools.plan import hlo_text


def _dims(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def dot(instruction: hlo_text.Instruction, computation: hlo_text.Computation) -> float:
  """Two for each multiply-add of a dot."""
  left = computation.operands(instruction)[0].arrays[0]
  summed = _dims(instruction.attribute("lhs_contracting_dims"))
  depth = math.prod(left.dims[axis] for axis in summed)
  return 2.0 * math.prod(instruction.arrays[0].dims) * depth


def convolution(instruction: hlo_text.Instruction, computation: hlo_text.Computation) -> float:
  """Two for each product of a value of the input, which is no padding, and one of the kernel."""
  labels = re.split("_|->", instruction.attribute("dim_labels"))
  shapes = [o.arrays[0].dims for o in computation.operands(instruction)]
  given, kernel, result = (
    dict(zip(label, dims)) for label, dims in zip(labels, [*shapes, instruction.arrays[0].dims])
  )
  flops = 2.0 * result["b"] * result["f"] * kernel["i"]
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window")))
  for axis in sorted(set(kernel) - {"i", "o"}):
    flops *= _pairs(given[axis], kernel[axis], result[axis], **_along(window, int(axis)))
  return flops


def _along(window: dict[str, str], axis: int) -> dict[str, int]:
  """A convolution's window along one of its axes."""
  def value(key, default):
    return window[key].split("x")[axis] if key in window else default

  return {
    "stride": int(value("stride", 1)), "pad": int(value("pad", "0_0").split("_")[0]),
    "given_step": int(value("lhs_dilate", 1)), "kernel_step": int(value("rhs_dilate", 1)),
  }


@functools.lru_cache(maxsize=4096)
def _pairs(given, kernel, result, *, stride, pad, given_step, kernel_step) -> int:
  """How many pairs of a result and a kernel position meet a value of the input, along one axis.

  Result o and kernel position k meet the input where o stride + k kernel_step - pad is one of
  0, given_step, ..., (given - 1) given_step.
  """
  common = math.gcd(stride, given_step)
  period = given_step // common
  count = 0
  for position in range(kernel):
    offset = position * kernel_step - pad
    if offset % common:
      continue
    first = -offset // common * pow(stride // common, -1, period) % period
    low = max(0, -(offset // stride))
    high = min(result - 1, ((given - 1) * given_step - offset) // stride)
    start = low + (first - low) % period
    count += max(0, (high - start) // period + 1)
  return count
