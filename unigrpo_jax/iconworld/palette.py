"""The colours of icons and of backgrounds."""

from __future__ import annotations

import numpy as np

# Far from each other and from every background whatever the brightness and shade that an icon is
# drawn with. Names are GenEval's, whose other three (black, white, grey) are taken by backgrounds.
COLORS: dict[str, tuple[int, int, int]] = {
  "red": (222, 28, 36),
  "orange": (255, 138, 0),
  "yellow": (252, 214, 40),
  "green": (36, 162, 62),
  "blue": (36, 92, 226),
  "purple": (132, 44, 186),
  "pink": (255, 128, 190),
  "brown": (138, 80, 44),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
  "white": (255, 255, 255),
  "grey": (206, 208, 212),
  "cream": (252, 240, 214),
  "black": (14, 14, 16),
}


def rgb(names: dict[str, tuple[int, int, int]]) -> np.ndarray:
  """[n, 3] float32 in 0..255, in the table's order."""
  return np.array(list(names.values()), np.float32)
