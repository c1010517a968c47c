"""Contact sheets of evaluations: one strip per prompt with its pictures, reasonings and rewards."""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
import textwrap
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from unigrpo_jax.data import tokenizer
from unigrpo_jax.runtime import panels

SIDE, GAP, LINE, WORDS = 128, 12, 15, 64  # pixels, pixels, pixels, characters
CUT = 400  # characters of a reasoning that a panel's picture shows
WIDE = 1300  # pixels that a sheet may take to put prompts side by side


def draw(title: str, rows: Sequence[Any], images: dict[str, np.ndarray]) -> PIL.Image.Image:
  """Draws the contact sheet: one strip per prompt, in it one picture per mode.

  With few modes, several strips stand side by side. Pictures have sides of at most `SIDE` pixels;
  small ones are enlarged without smoothing.

  Args:
    title: above the strips.
    rows: `results.Row` objects, of which those with an entry in `images` are shown.
    images: {`Row.image`: [H, W, 3] uint8}.
  """
  blocks = [strip(of_prompt, images) for of_prompt in by_prompt(rows, images)]
  width = max(block.width for block in blocks)
  side_by_side = max(WIDE // width, 1)
  lines = [blocks[i : i + side_by_side] for i in range(0, len(blocks), side_by_side)]
  heights = [max(block.height for block in line) for line in lines]
  sheet = PIL.Image.new(
    "RGB", (width * min(side_by_side, len(blocks)), 2 * LINE + sum(heights)), "white"
  )
  _write(sheet, GAP, GAP // 2, title)
  y = 2 * LINE
  for line, height in zip(lines, heights):
    for place, block in enumerate(line):
      sheet.paste(block, (place * width, y))
    y += height
  return sheet


def by_prompt(rows: Sequence[Any], images: dict[str, np.ndarray]) -> list[tuple[Any, ...]]:
  """For each prompt that has pictures, the rows of its first image (k = 0), one per mode.

  Rows without a prompt's number belong together by their place in their mode.
  """
  prompts: dict[int, list[Any]] = {}
  places = collections.Counter()
  for row in rows:
    if row.image in images and not row.k:
      prompts.setdefault(places[row.mode] if row.number is None else row.number, []).append(row)
      places[row.mode] += 1
  return [tuple(prompts[number]) for number in sorted(prompts)]


def panel(rows: Sequence[Any], images: dict[str, np.ndarray]) -> panels.Panel:
  """A prompt's rows as a panel of a log. Long reasonings are cut in its picture, not its text."""
  cut = [
    dataclasses.replace(row, text=row.text and textwrap.shorten(row.text, CUT, placeholder=" ..."))
    for row in rows
  ]
  return panels.Panel(
    rows[0].prompt,
    tuple(panels.Picture(row.mode, images[row.image], row.text, row.rewards) for row in rows),
    np.asarray(strip(cut, images)),
  )


def strip(rows: Sequence[Any], images: dict[str, np.ndarray]) -> PIL.Image.Image:
  """The strip of one prompt: prompt and reasonings at the left, then one picture per mode, with its
  rewards below.
  """
  left = textwrap.wrap(rows[0].prompt, WORDS)
  for text in dict.fromkeys(row.text for row in rows if row.text is not None):
    modes = ", ".join(row.mode for row in rows if row.text == text)
    words = " ".join(tokenizer.without_tags(text).split())
    left += ["", *textwrap.wrap(f"{modes}: {words}", WORDS)]
  beneath = [[row.mode, *(f"{k} {v:.2f}" for k, v in row.rewards.items())] for row in rows]
  tall = max(len(left) * LINE, SIDE + max(map(len, beneath)) * LINE) + 2 * GAP
  start = WORDS * 7 + 2 * GAP
  made = PIL.Image.new("RGB", (start + len(rows) * (SIDE + GAP), tall), "white")
  _write(made, GAP, GAP, "\n".join(left))
  for place, (row, lines) in enumerate(zip(rows, beneath)):
    x = start + place * (SIDE + GAP)
    made.paste(_fit(images[row.image]), (x, GAP))
    _write(made, x, GAP + SIDE, "\n".join(lines))
  return made


def _fit(image: np.ndarray) -> PIL.Image.Image:
  picture = PIL.Image.fromarray(image)
  scale = SIDE / max(picture.size)
  how = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
  return picture.resize([max(round(side * scale), 1) for side in picture.size], how)


def _write(sheet: PIL.Image.Image, x: int, y: int, words: str) -> None:
  font = PIL.ImageFont.load_default(size=12)
  PIL.ImageDraw.Draw(sheet).multiline_text((x, y), words, fill="black", font=font, spacing=3)
