"""What a checkpoint can do in IconWorld: rewards of its pictures, and two tasks besides drawing."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import batches, evaluation
from unigrpo_jax.iconworld import plans, renderer, scenes, tasks, verifier

TASKS = ("answer", "edit")


def can_score(examples: Sequence[Any]) -> bool:
  """Whether IconWorld's verifier knows everything that the examples' metadata asks for."""
  wanted = [example.metadata.get("include") for example in examples]
  return all(
    isinstance(items, list) and items and all(item.get("class") in scenes.KINDS for item in items)
    for items in wanted
  )


def score(samples: Sequence[Any]) -> dict[str, np.ndarray]:
  """Rewards of drawings by IconWorld's verifier.

  Args:
    samples: see `evaluation.Sample`.

  Returns:
    {"strict": 0 or 1, "soft": in [0, 1], "reasoning": whether the text's plan is correct, NaN
    without a text}, [samples] float32 each.
  """
  strict, soft = verifier.verify_batch(
    [sample.image for sample in samples], [sample.metadata for sample in samples]
  )
  correct = [
    math.nan if sample.text is None else plans.is_correct(sample.text, sample.metadata)
    for sample in samples
  ]
  return {"strict": strict, "soft": soft, "reasoning": np.array(correct, np.float32)}


def answer(pipeline, examples: Sequence[Any], *, settings, batch_size: int, seed: int):
  """Asks a question about each example's rendered scene; reward "answer": the word is right.

  Args:
    pipeline: see `pipeline.Pipeline`.
    examples: see `iconworld.prompts.Example`.
    settings: see `batches.Settings`.
    batch_size: rows run together.
    seed: of scenes and questions.

  Returns:
    [rows] `evaluation.Row`, whose category is what was asked about.
  """
  rng, asked, requests = np.random.default_rng(seed), [], []
  for row, example in enumerate(examples):
    about = tasks.QUESTIONS[row % len(tasks.QUESTIONS)]
    question, right = tasks.question(rng, example.scene, about)
    asked.append((about, right))
    image = PIL.Image.fromarray(renderer.render(example.scene, rng))
    requests.append(batches.Request(question, seed=seed + row, image=image))
  settings = dataclasses.replace(
    settings, think=False, understand=True, temperature=0.0, max_tokens=8
  )
  results = _run(pipeline, requests, settings, batch_size)
  return [
    evaluation.Row(
      "answer", about, request.prompt, result.text,
      {"answer": float(result.text.strip() == right)}, None,
    )
    for request, (about, right), result in zip(requests, asked, results)
  ]


def edit(pipeline, examples: Sequence[Any], *, settings, batch_size: int, seed: int):
  """Has each example's rendered scene edited; arguments as of `answer`.

  Returns:
    [rows] `evaluation.Row` with the rewards "edit", whether the picture shows the edited scene and
    nothing else, and "untouched", the same of the unedited picture: what doing nothing would score.
  """
  rng, requests, wanted = np.random.default_rng(seed), [], []
  for row, example in enumerate(examples):
    instruction, scene = tasks.edit(rng, example.scene)
    image = PIL.Image.fromarray(renderer.render(example.scene, rng))
    requests.append(batches.Request(instruction, seed=seed + row, image=image))
    wanted.append(scene)
  off = dataclasses.replace(settings.guidance, text_scale=1.0)
  settings = dataclasses.replace(settings, think=False, understand=False, guidance=off)
  results = _run(pipeline, requests, settings, batch_size)
  return [
    evaluation.Row(
      "edit", request.prompt.split()[0], request.prompt, None,
      {"edit": _shows(result.image, scene), "untouched": _shows(np.array(request.image), scene)},
      None,
    )
    for request, scene, result in zip(requests, wanted, results)
  ]


def _run(pipeline, requests, settings, batch_size: int) -> list[Any]:
  rows = evaluation.batch_rows(pipeline, batch_size, len(requests))
  batch = pipeline.prepare(requests, settings, rows)
  return [result for part in batches.split(batch, rows) for result in pipeline.run(part)]


def _shows(image: np.ndarray, scene: scenes.Scene) -> float:
  """1.0 if a picture shows a scene's things in their cells, and nothing else."""
  found = {(d.kind, d.color, _cell(d.box, image.shape)) for d in verifier.detect(image)}
  return float(found == {(t.kind, t.color, t.cell) for t in scene.things})


def _cell(box: tuple[float, float, float, float], shape: tuple[int, ...]) -> str:
  """The cell in which the middle of a box lies; the cells are named row by row."""
  left, top, right, bottom = box
  return scenes.CELLS[2 * (top + bottom > shape[0]) + (left + right > shape[1])]
