"""Scores a checkpoint on IconWorld's held-out prompts: `python -m unigrpo_jax.evaluate --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np

from unigrpo_jax import errors

DESCRIPTION = """Scores a checkpoint on IconWorld's held-out prompts.

Draws every prompt without thinking, with thinking, and from its correct reasoning, each with and
without guidance; verifies the pictures; scores the reasonings alone; asks questions about pictures
and has pictures edited. Writes results.json, results.md and contact.png into --out."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt under one mode: scores in [0, 1]; `reasoning` None where none was sampled."""

  mode: str
  category: str
  strict: float
  soft: float
  reasoning: float | None = None


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
  """Mean and its 95 % interval: Wilson's for 0/1 scores, the normal one's for others."""
  values = np.asarray(scores, float)
  count, mean = len(values), float(values.mean())
  z = 1.96
  if np.isin(values, (0.0, 1.0)).all():
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(
      mean * (1 - mean) / count + z * z / (4 * count * count)
    )
    return mean, center - half, center + half
  half = z * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
  return mean, mean - half, mean + half


class Evaluation:
  """Runs a pipeline over IconWorld and keeps the scores."""

  def __init__(self, pipeline, settings, *, batch_size: int, seed: int):
    """`settings` has the guidance that the guided modes use."""
    self._pipeline, self._settings = pipeline, settings
    self._batch_size, self._seed = batch_size, seed

  def run(self, requests: Sequence[Any], settings) -> list[Any]:
    """Results of requests, in batches of one shape."""
    results = []
    for first in range(0, len(requests), self._batch_size):
      batch = self._pipeline.prepare(
        requests[first : first + self._batch_size], settings, self._batch_size
      )
      results += self._pipeline.run(batch)
    return results

  def draw(self, examples, mode: str, guided: bool):
    """Draws examples; `mode` is "plain", "think" or "given".

    Returns:
      (rows, results).
    """
    from unigrpo_jax import batches
    from unigrpo_jax.iconworld import plans, verifier

    off = dataclasses.replace(self._settings.guidance, text_scale=1.0)
    settings = dataclasses.replace(
      self._settings, think=mode != "plain",
      guidance=self._settings.guidance if guided else off,
    )
    results = self.run(
      [
        batches.Request(
          e.prompt, seed=self._seed + row, reasoning=e.reasoning if mode == "given" else None
        )
        for row, e in enumerate(examples)
      ],
      settings,
    )
    strict, soft = verifier.verify_batch(
      [result.image for result in results], [e.metadata for e in examples]
    )
    name = mode + (" + guidance" if guided else "")
    rows = [
      Row(
        name, e.category, float(strict[row]), float(soft[row]),
        float(plans.is_correct(results[row].text, e.metadata)) if mode == "think" else None,
      )
      for row, e in enumerate(examples)
    ]
    return rows, results

  def answer(self, examples) -> dict[str, list[float]]:
    """Accuracy of one-word answers about rendered scenes, by kind of question."""
    import PIL.Image

    from unigrpo_jax import batches
    from unigrpo_jax.iconworld import renderer, tasks

    rng, scores, asked, requests = np.random.default_rng(self._seed), {}, [], []
    for row, example in enumerate(examples):
      about = tasks.QUESTIONS[row % len(tasks.QUESTIONS)]
      question, answer = tasks.question(rng, example.scene, about)
      asked.append((about, answer))
      image = PIL.Image.fromarray(renderer.render(example.scene, rng))
      requests.append(batches.Request(question, seed=self._seed + row, image=image))
    settings = dataclasses.replace(
      self._settings, understand=True, temperature=0.0, max_tokens=8
    )
    for (about, answer), result in zip(asked, self.run(requests, settings)):
      scores.setdefault(about, []).append(float(result.text.strip() == answer))
    return scores

  def edit(self, examples) -> dict[str, list[float]]:
    """How often the edited picture shows the edited scene, beside the unedited one as chance."""
    import PIL.Image

    from unigrpo_jax import batches
    from unigrpo_jax.iconworld import renderer, tasks, verifier

    rng, requests, wanted = np.random.default_rng(self._seed), [], []
    for row, example in enumerate(examples):
      instruction, scene = tasks.edit(rng, example.scene)
      image = PIL.Image.fromarray(renderer.render(example.scene, rng))
      requests.append(batches.Request(instruction, seed=self._seed + row, image=image))
      wanted.append(scene)
    off = dataclasses.replace(self._settings.guidance, text_scale=1.0)
    settings = dataclasses.replace(self._settings, guidance=off)
    scores = {"edited": [], "untouched source": []}
    for request, scene, result in zip(requests, wanted, self.run(requests, settings)):
      for name, image in (("edited", result.image), ("untouched source", np.array(request.image))):
        found = {(d.kind, d.color, _cell(d.box, image.shape)) for d in verifier.detect(image)}
        scores[name].append(float(found == {(t.kind, t.color, t.cell) for t in scene.things}))
    return scores


def _cell(box: tuple[float, float, float, float], shape: tuple[int, ...]) -> str:
  """The cell in which the middle of a box lies; the cells are named row by row."""
  from unigrpo_jax.iconworld import scenes

  left, top, right, bottom = box
  return scenes.CELLS[2 * (top + bottom > shape[0]) + (left + right > shape[1])]


def table(rows: Sequence[Row]) -> str:
  """Markdown: a line a mode, strict by category, means with their intervals."""
  from unigrpo_jax.iconworld import prompts

  head = ["mode", *prompts.CATEGORIES, "strict", "soft", "reasoning"]
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
  shown = lambda scores: "{:.3f} [{:.3f}, {:.3f}]".format(*interval(scores))
  for mode in dict.fromkeys(row.mode for row in rows):
    own = [row for row in rows if row.mode == mode]
    cells = [mode]
    for category in prompts.CATEGORIES:
      scores = [row.strict for row in own if row.category == category]
      cells.append(f"{np.mean(scores):.2f}" if scores else "")
    thoughts = [row.reasoning for row in own if row.reasoning is not None]
    cells += [shown([row.strict for row in own]), shown([row.soft for row in own])]
    cells.append(shown(thoughts) if thoughts else "")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def contact_sheet(examples, results, rows: Sequence[Row], columns: int = 3) -> Any:
  """A picture of prompts, reasonings, drawings and rewards."""
  import textwrap

  import PIL.Image
  import PIL.ImageDraw
  import PIL.ImageFont

  side, width, height = 128, 470, 150
  font = PIL.ImageFont.load_default(size=12)
  lines = -(-len(examples) // columns)
  sheet = PIL.Image.new("RGB", (columns * width, lines * height), "white")
  pen = PIL.ImageDraw.Draw(sheet)
  for place, (example, result, row) in enumerate(zip(examples, results, rows)):
    x, y = place % columns * width, place // columns * height
    picture = PIL.Image.fromarray(result.image).resize((side, side), PIL.Image.Resampling.NEAREST)
    sheet.paste(picture, (x + 8, y + 10))
    thought = (result.text or "").replace("<think>", "").replace("</think>", "")
    score = f"strict {row.strict:.0f}, soft {row.soft:.2f}"
    pen.rectangle((x + 7, y + 9, x + 8 + side, y + 10 + side), outline="grey")
    top = textwrap.wrap(example.prompt, 50) + [""] + textwrap.wrap(thought, 50)
    pen.text((x + side + 18, y + 8), "\n".join(top[:8]), fill="black", font=font)
    color = "darkgreen" if row.strict else "firebrick"
    pen.text((x + side + 18, y + height - 26), score, fill=color, font=font)
  return sheet


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.evaluate", description=DESCRIPTION,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", required=True, help="official or converted folder")
  add("--out", type=pathlib.Path, required=True, help="folder for the results")
  add("--split", choices=("validation", "test"), default="test")
  add("--prompts", type=int, default=600, help="how many (default: %(default)s)")
  add("--batch_size", type=int, default=100, help="rows run together (default: %(default)s)")
  add("--seed", type=int, default=0)
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  for name in ("prompts", "batch_size"):
    errors.require(f"--{name}", getattr(args, name), low=1)

  from unigrpo_jax import batches
  from unigrpo_jax import pipeline as pipeline_lib
  from unigrpo_jax.iconworld import prompts
  from unigrpo_jax.sampling import flow

  examples = prompts.fixed(args.split, args.prompts)
  pipeline = pipeline_lib.Pipeline.open(args.checkpoint).load()
  defaults = pipeline.config.generation
  settings = batches.Settings(
    num_timesteps=defaults.num_timesteps, shift=defaults.timestep_shift, temperature=1.0,
    max_tokens=defaults.max_tokens,
    guidance=flow.Guidance(
      text_scale=defaults.cfg_text_scale, interval=defaults.cfg_interval,
      renorm=defaults.cfg_renorm_type,
    ),
  )
  evaluation = Evaluation(pipeline, settings, batch_size=args.batch_size, seed=args.seed)
  rows, start, sheet = [], time.perf_counter(), None
  for mode in ("plain", "think", "given"):
    for guided in (False, True):
      new, results = evaluation.draw(examples, mode, guided)
      rows += new
      print(
        f"{new[0].mode}: strict {np.mean([r.strict for r in new]):.3f}, "
        f"{time.perf_counter() - start:.0f} s", flush=True,
      )
      if mode == "think" and not guided:
        sheet = contact_sheet(examples[:24], results[:24], new[:24])
  others = {"answers": evaluation.answer(examples), "edits": evaluation.edit(examples)}
  text = table(rows)
  for task, scores in others.items():
    for name, values in scores.items():
      text += "\n{} ({}): {:.3f} [{:.3f}, {:.3f}]".format(task, name, *interval(values))
  print(text)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
  (args.out / "results.json").write_text(
    json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **others}), encoding="utf-8"
  )
  sheet.save(args.out / "contact.png")


if __name__ == "__main__":
  errors.report(main)
