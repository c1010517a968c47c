"""What a chip can do, as its maker says."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one chip."""

  name: str  # as topologies are named, "v5p"
  flops: float  # bfloat16 products, FLOP/s
  hbm: float  # bytes that programs may use
  hbm_bandwidth: float  # bytes/s
  axis_bandwidth: float  # bytes/s that leave it along an axis of the torus, both ways together
  torus: int  # axes
  source: str  # of the figures


# Published: bfloat16 TFLOP/s, HBM GB/s, and the interconnect of a chip, of which an axis of the
# torus has its part. `hbm` is the limit that the TPU compiler itself names when a program exceeds
# it, a little less than what is published (95, 32, 16 GB).
_DOCS = "cloud.google.com/tpu/docs/"
CHIPS = {
  chip.name: chip for chip in (
    # 4,800 Gbit/s over six links.
    Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 200e9, 3, _DOCS + "v5p"),
    # 800 GB/s both ways together, over four links.
    Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 200e9, 2, _DOCS + "v6e"),
    # 400 GB/s both ways together, over four links.
    Chip("v5e", 197e12, 15.75 * GIB, 819e9, 100e9, 2, _DOCS + "v5e"),
  )
}
