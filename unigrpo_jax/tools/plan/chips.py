"""Peak figures of TPU chips, as published."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one chip."""

  name: str  # in names of topologies, such as "v5p"
  flops: float  # of bfloat16 products, FLOP/s
  hbm: float  # memory that programs can use, bytes
  hbm_bandwidth: float  # bytes/s
  axis_bandwidth: float  # sent along an axis of the torus, both directions together, bytes/s
  torus: int  # number of the torus's axes
  source: str  # of the figures


# Published figures, where each axis of the torus has its share of the chip's interconnect. `hbm` is
# not the published size (95, 32, 16 GB) but the limit that the TPU compiler reports when a program
# exceeds it.
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
