"""Scenes to pixels."""

from __future__ import annotations

import numpy as np

from unigrpo_jax.iconworld import icons, scenes

SIZE = 32  # Pixels a side of an image.
CELL = 16  # Pixels a side of a cell.
MARGIN = 1  # Pixels from a cell's top left to an icon's mask, before jitter.
JITTER = 1  # Pixels, each way.
BRIGHTNESS = (0.85, 1.0)


def corner(cell: str) -> tuple[int, int]:
  """Row and column, in pixels, of the top left of the mask in `cell`, before jitter."""
  row, column = divmod(scenes.CELLS.index(cell), 2)
  return CELL * row + MARGIN, CELL * column + MARGIN


def blend(
  canvas: np.ndarray, kind: int, color: np.ndarray, brightness: float, top: int, left: int
) -> None:
  """Lays icon `kind` (index in `icons.load()`) over `canvas`, [H, W, 3] float32 in 0..255."""
  alpha, shade = icons.load().alpha[kind][..., None], icons.load().shade[kind][..., None]
  window = canvas[top : top + icons.SIDE, left : left + icons.SIDE]
  window += alpha * (brightness * shade * color - window)


def render(scene: scenes.Scene, rng: np.random.Generator | None = None) -> np.ndarray:
  """A scene as [SIZE, SIZE, 3] uint8.

  `rng` draws the background where the scene leaves it open, and a jitter and a brightness for each
  cell, whatever the scene holds: two scenes rendered from the same state differ only where the
  scenes do. None: the first background, no jitter, full brightness.
  """
  cells = len(scenes.CELLS)
  jitter, brightness, background = np.zeros((cells, 2), int), np.ones(cells), 0
  if rng is not None:
    background = int(rng.integers(len(scenes.BACKGROUNDS)))
    jitter = rng.integers(-JITTER, JITTER + 1, (cells, 2))
    brightness = rng.uniform(*BRIGHTNESS, cells)
  name = scene.background or scenes.BACKGROUNDS[background]
  canvas = np.full((SIZE, SIZE, 3), icons.BACKGROUNDS[name], np.float32)
  for thing in scene.things:
    cell = scenes.CELLS.index(thing.cell)
    top, left = np.add(corner(thing.cell), jitter[cell])
    color = np.array(icons.COLORS[thing.color], np.float32)
    blend(canvas, scenes.KINDS.index(thing.kind), color, brightness[cell], top, left)
  return np.round(canvas).astype(np.uint8)
