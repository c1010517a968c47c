"""The icons: tiny masks made from Noto Emoji by `make_icons` (licence: NOTO_EMOJI_LICENSE.txt)."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("icons.npz")
SIDE = 13  # Pixels a side of a mask.


@dataclasses.dataclass(frozen=True)
class Icons:
  """All masks.

  Attributes:
    names: [n] classes, GenEval's names.
    alpha: [n, SIDE, SIDE] float32 in [0, 1], coverage.
    shade: [n, SIDE, SIDE] float32 in [0, 1], factor on the colour; 0 where nothing is covered.
    box: [n, 4] float64, left, top, right and bottom edge of what is covered, in pixels.
  """

  names: tuple[str, ...]
  alpha: np.ndarray
  shade: np.ndarray
  box: np.ndarray


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
