"""Pictures with their words for TensorBoard and W&B: one prompt's, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import html
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Picture:
  """One drawing of a prompt.

  Attributes:
    label: what tells it from the others: a mode, or its number in a group.
    image: [H, W, 3] uint8.
    text: its reasoning, or None.
    rewards: by name.
  """

  label: str
  image: np.ndarray
  text: str | None
  rewards: Mapping[str, float]

  @property
  def scores(self) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in self.rewards.items())


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
  """The drawings of a prompt; `sheet`, [H, W, 3] uint8, shows them side by side with their words.

  A value of a row of metrics, beside its numbers.
  """

  prompt: str
  pictures: Sequence[Picture]
  sheet: np.ndarray

  def markdown(self) -> str:
    """The prompt, and a table of reasonings and rewards."""
    cell = lambda text: html.escape(" ".join(text.split())).replace("|", "\\|")
    lines = [f"**{cell(self.prompt)}**", "", "| picture | rewards | reasoning |", "|---|---|---|"]
    lines += [
      f"| {cell(p.label)} | {cell(p.scores)} | {cell(p.text or '')} |" for p in self.pictures
    ]
    return "\n".join(lines)

  def captioned(self, library: Any) -> list[Any]:
    """The pictures as those of W&B, each with prompt, scores and reasoning as its caption."""
    captions = (
      "\n".join(filter(None, (self.prompt, f"{p.label}: {p.scores}", p.text)))
      for p in self.pictures
    )
    return [library.Image(p.image, caption=c) for p, c in zip(self.pictures, captions)]
