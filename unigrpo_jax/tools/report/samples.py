"""The same prompts before and after training: pictures, reasonings, rewards, means by category."""

from __future__ import annotations

import base64
from collections.abc import Sequence
import io
import math
import pathlib

import PIL.Image

from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.tools.report import workdir

SHOWN, SHOWN_OF_MODE = 24, 4  # Prompts shown in all modes together, and at least in each mode.
# Pictures with sides of up to SMALL pixels are embedded as they are, larger ones reduced to SIDE.
SMALL, SIDE = 256, 384
ALL = "all"  # all categories together


def estimate(scores: Sequence[float]) -> str:
  """Mean and 95 % interval of the prompts' scores; the mean alone where it has none, a dash
  without scores."""
  if not scores:
    return "–"
  mean, low, high = intervals.interval(scores)
  return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def ends(run: workdir.Run) -> list[int]:
  """The steps of the first and the last evaluation; fewer where there are not two."""
  steps = list(run.evaluations)
  return list(dict.fromkeys([*steps[:1], *steps[-1:]]))


def by_mode(run: workdir.Run) -> dict[str, list[list[workdir.Sample]]]:
  """{mode: [samples of each evaluation in `ends`]}."""
  both = [run.evaluations[step] for step in ends(run)]
  return {
    mode: [[sample for sample in samples if sample.mode == mode] for samples in both]
    for mode in dict.fromkeys(sample.mode for samples in both for sample in samples)
  }


def by_category(run: workdir.Run, rewards: Sequence[str]) -> list[tuple]:
  """Rows (mode, category, number of prompts, [estimate of each reward at each of `ends`])."""
  rows = []
  for mode, both in by_mode(run).items():
    categories = sorted({sample.category for samples in both for sample in samples})
    for category in [*categories, ALL] if len(categories) > 1 else categories:
      chosen = [[s for s in samples if category in (ALL, s.category)] for samples in both]
      estimates = [
        estimate(workdir.prompt_scores(samples, name)) for name in rewards for samples in chosen
      ]
      prompts = max(len({sample.key for sample in samples}) for samples in chosen)
      rows.append((mode, category, prompts, estimates))
  return rows


def cards(run: workdir.Run) -> dict[str, list[tuple[workdir.Sample, ...]]]:
  """{mode: [samples of a prompt at `ends`]}, of the first prompts with a picture or a text."""
  cards = {}
  for mode, both in by_mode(run).items():
    pairs = [pair for pair in zip(*both) if len({sample.prompt for sample in pair}) == 1]
    shown = [pair for pair in pairs if any(sample.image or sample.text for sample in pair)]
    cards[mode] = shown[: max(SHOWN_OF_MODE, SHOWN // len(by_mode(run)))]
  return cards


def data_uri(path: pathlib.Path) -> str | None:
  """A picture file as data URI; None if it is damaged.

  A small PNG file is embedded unchanged; a large picture is reduced and becomes a JPEG.
  """
  try:
    data = path.read_bytes()
    with PIL.Image.open(io.BytesIO(data)) as image:
      image.load()
      kind = "PNG" if max(image.size) <= SMALL else "JPEG"
      if image.format != kind or kind == "JPEG":
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=85)
        data = buffer.getvalue()
  except Exception:  # Pillow raises many kinds for damaged files; none may cost the page.
    return None
  return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
