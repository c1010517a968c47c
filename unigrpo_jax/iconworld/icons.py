"""The icons, tiny masks made from Noto Emoji by `make_icons`, and the colours of the world.

The licence of the masks is in NOTO_EMOJI_LICENSE.txt.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("icons.npz")
SIDE = 13  # Pixels a side of a mask.
# Far from each other and from every background whatever the brightness and shade that an icon is
# drawn with. Names are GenEval's, whose other three (black, white, grey) are taken by backgrounds.
COLORS: dict[str, tuple[int, int, int]] = {
  "red": (222, 28, 36), "orange": (255, 138, 0), "yellow": (252, 214, 40), "green": (36, 162, 62),
  "blue": (36, 92, 226), "purple": (132, 44, 186), "pink": (255, 128, 190), "brown": (138, 80, 44),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
  "white": (255, 255, 255), "grey": (206, 208, 212), "cream": (252, 240, 214),
  "black": (14, 14, 16),
}


@dataclasses.dataclass(frozen=True)
class Icons:
  """All masks."""

  names: tuple[str, ...]  # [n] classes, GenEval's names
  alpha: np.ndarray  # [n, SIDE, SIDE] float32 in [0, 1], coverage
  shade: np.ndarray  # [n, SIDE, SIDE] float32 in [0, 1], factor on the colour; 0 without coverage
  box: np.ndarray  # [n, 4] float64, left, top, right and bottom edge of the coverage, in pixels


@functools.cache
def load() -> Icons:
  """The package's icons. The arrays are shared and read-only."""
  with np.load(PATH) as file:
    alpha, shade = (file[name].astype(np.float32) / 255 for name in ("alpha", "shade"))
    names = tuple(str(name) for name in file["names"])
  boxes = []
  for mask in alpha > 0.3:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
  box = np.array(boxes, float)
  for array in (alpha, shade, box):
    array.flags.writeable = False
  return Icons(names, alpha, shade, box)
