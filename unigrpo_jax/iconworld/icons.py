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
    names: classes, GenEval's names; the order of the leading axis.
    alpha: [n, SIDE, SIDE] float32 in [0, 1], coverage.
    shade: [n, SIDE, SIDE] float32 in [0, 1], factor on the colour; 0 where nothing is covered.
  """

  names: tuple[str, ...]
  alpha: np.ndarray
  shade: np.ndarray


@functools.cache
def load() -> Icons:
  """The package's icons. The arrays are shared and read-only."""
  with np.load(PATH) as file:
    alpha, shade = (file[name].astype(np.float32) / 255 for name in ("alpha", "shade"))
    names = tuple(str(name) for name in file["names"])
  alpha.flags.writeable = shade.flags.writeable = False
  return Icons(names=names, alpha=alpha, shade=shade)
