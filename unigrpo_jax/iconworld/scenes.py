"""Scenes, and the drawing plan that puts one into words."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from unigrpo_jax.iconworld import icons

KINDS = icons.load().names
COLORS = tuple(icons.COLORS)
BACKGROUNDS = tuple(icons.BACKGROUNDS)
# Reading order; a cell's index is 2 row + column.
CELLS = ("top left", "top right", "bottom left", "bottom right")

_ITEM = re.compile(rf"({'|'.join(KINDS)}) ({'|'.join(COLORS)}) ({'|'.join(CELLS)})")


@dataclasses.dataclass(frozen=True)
class Thing:
  """One icon: a class of `KINDS`, a colour of `COLORS`, a cell of `CELLS`."""

  kind: str
  color: str
  cell: str


@dataclasses.dataclass(frozen=True)
class Scene:
  """Things in cells; sorted by `CELLS`, whatever order they are given in.

  Raises:
    ValueError: a name that the world does not have, or two things in one cell.
  """

  things: tuple[Thing, ...]  # none to four, at most one a cell
  background: str | None = None  # of `BACKGROUNDS`; None where any will do, as in a plan

  def __post_init__(self):
    for thing in self.things:
      if thing.kind not in KINDS or thing.color not in COLORS or thing.cell not in CELLS:
        raise ValueError(f"{thing} is not of this world")
    if len({thing.cell for thing in self.things}) < len(self.things):
      raise ValueError(f"two things in one cell: {to_text(self)}")
    if self.background is not None and self.background not in BACKGROUNDS:
      raise ValueError(f"background={self.background!r} is none of {', '.join(BACKGROUNDS)}")
    ordered = tuple(sorted(self.things, key=lambda thing: CELLS.index(thing.cell)))
    object.__setattr__(self, "things", ordered)


def to_text(scene: Scene) -> str:
  """The drawing plan: "umbrella blue top left, kite red bottom right"; "" for an empty scene."""
  return ", ".join(f"{thing.kind} {thing.color} {thing.cell}" for thing in scene.things)


def parse(text: str) -> Scene | None:
  """The scene of a drawing plan, in any order; None if `text` is not a plan of at least a thing.

  `parse(to_text(scene)) == scene` for a scene that has things and leaves the background open.
  """
  items = [_ITEM.fullmatch(item) for item in text.strip().split(", ")]
  if not all(items):
    return None
  things = tuple(Thing(*item.groups()) for item in items)
  return Scene(things) if len({thing.cell for thing in things}) == len(things) else None


def sample(rng: np.random.Generator, count: int | None = None) -> Scene:
  """A random scene of `count` things, by default one to four, on a background of its own."""
  count = int(rng.integers(1, len(CELLS) + 1)) if count is None else count
  cells = rng.permutation(CELLS)[:count]
  things = tuple(
    Thing(KINDS[rng.integers(len(KINDS))], COLORS[rng.integers(len(COLORS))], str(cell))
    for cell in cells
  )
  return Scene(things, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
