"""The same prompts before and after: pictures, reasoning and rewards, and a table by category."""

from __future__ import annotations

import base64
from collections.abc import Sequence
import io
import math
import pathlib

import PIL.Image

from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.tools.report import workdir

SHOWN, SHOWN_OF_MODE = 24, 4  # Prompts in all, and those of one mode at least.
SMALL, SIDE = 256, 384  # Pixels of a side: up to SMALL, a picture is embedded as it is.
ALL = "all"  # categories


def estimate(scores: Sequence[float]) -> str:
  """Mean and 95 % interval of the finite scores; the mean alone of one, a dash for none."""
  finite = [score for score in scores if math.isfinite(score)]
  if not finite:
    return "–"
  mean, low, high = intervals.interval(finite)
  return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(finite) > 1 else f"{mean:.3f}"


def ends(run: workdir.Run) -> list[int]:
  """Steps of the first and the last evaluation; one or none where there are no more."""
  steps = list(run.evaluations)
  return list(dict.fromkeys([*steps[:1], *steps[-1:]]))


def by_mode(run: workdir.Run) -> dict[str, list[list[workdir.Sample]]]:
  """Mode -> a list of samples for each of `ends`."""
  both = [run.evaluations[step] for step in ends(run)]
  return {
    mode: [[sample for sample in samples if sample.mode == mode] for samples in both]
    for mode in dict.fromkeys(sample.mode for samples in both for sample in samples)
  }


def by_category(run: workdir.Run, rewards: Sequence[str]) -> list[tuple]:
  """Rows (mode, category, prompts, an estimate for each reward and end)."""
  rows = []
  for mode, both in by_mode(run).items():
    categories = sorted({sample.category for samples in both for sample in samples})
    for category in [*categories, ALL] if len(categories) > 1 else categories:
      chosen = [[s for s in samples if category in (ALL, s.category)] for samples in both]
      estimates = [
        estimate([s.rewards.get(name, math.nan) for s in samples])
        for name in rewards for samples in chosen
      ]
      rows.append((mode, category, max(map(len, chosen)), estimates))
  return rows


def cards(run: workdir.Run) -> dict[str, list[tuple[workdir.Sample, ...]]]:
  """Mode -> the first prompts with a picture or a text: a sample of each end."""
  cards = {}
  for mode, both in by_mode(run).items():
    pairs = [pair for pair in zip(*both) if len({sample.prompt for sample in pair}) == 1]
    shown = [pair for pair in pairs if any(sample.image or sample.text for sample in pair)]
    cards[mode] = shown[: max(SHOWN_OF_MODE, SHOWN // len(by_mode(run)))]
  return cards


def data_uri(path: pathlib.Path) -> str | None:
  """A picture: a small one as PNG, byte for byte, a large one scaled, as JPEG; None if damaged."""
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
