"""IconWorld's tasks besides drawing: answering a question about a picture, and editing one."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import progress
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.iconworld import prompts, renderer, scenes, tasks, verifier
from unigrpo_jax.runtime import hosts


def answer(pipeline, examples: Sequence[Any], *, settings, batch_size: int, seed: int):
  """Asks a question about each example's rendered scene.

  Args:
    pipeline: a `pipeline.Pipeline`.
    examples: `iconworld.prompts.Example` objects.
    settings: of sampling, `requests.Settings`.
    batch_size: rows sampled together.
    seed: of rendering and of the questions.

  Returns:
    One `results.Row` per example: its category is "color" or "count", its reward "answer" is 1.0
    for the right word and 0.0 for another.
  """
  rng, expected, requests = np.random.default_rng(seed), [], []
  for row, example in enumerate(examples):
    # The categories of prompts take turns; every sort of question is asked about each of them.
    about = tasks.QUESTIONS[row // len(prompts.CATEGORIES) % len(tasks.QUESTIONS)]
    question, right = tasks.question(rng, example.scene, about)
    expected.append(("color" if right in scenes.COLORS else "count", right))
    image = PIL.Image.fromarray(renderer.render(example.scene, rng))
    requests.append(requests_lib.Request(question, seed=seed + row, image=image))
  settings = dataclasses.replace(
    settings, think=False, understand=True, temperature=0.0, max_tokens=8
  )
  results = _run("answer", pipeline, requests, settings, batch_size)
  return [
    results_lib.Row(
      "answer", about, request.prompt, result.text,
      {"answer": float(result.text.strip() == right)}, None,
    )
    for request, (about, right), result in zip(requests, expected, results)
  ]


def edit(pipeline, examples: Sequence[Any], *, settings, batch_size: int, seed: int):
  """Has each example's rendered scene edited; arguments as for `answer`.

  Returns:
    One `results.Row` per example: its category is the instruction's verb. Its reward "edit" is 1.0
    where the picture shows the edited scene and nothing else; "untouched" is the same of the
    picture before the edit, a baseline.
  """
  rng, requests, edited = np.random.default_rng(seed), [], []
  for row, example in enumerate(examples):
    instruction, scene = tasks.edit(rng, example.scene)
    image = PIL.Image.fromarray(renderer.render(example.scene, rng))
    requests.append(requests_lib.Request(instruction, seed=seed + row, image=image))
    edited.append(scene)
  off = dataclasses.replace(settings.guidance, text_scale=1.0)
  settings = dataclasses.replace(settings, think=False, understand=False, guidance=off)
  results = _run("edit", pipeline, requests, settings, batch_size)
  return [
    results_lib.Row(
      "edit", request.prompt.split()[0], request.prompt, None,
      {"edit": _shows(result.image, scene), "untouched": _shows(np.array(request.image), scene)},
      None,
    )
    for request, scene, result in zip(requests, edited, results)
  ]


# Both take the same arguments.
TASKS = {"answer": answer, "edit": edit}


def _run(name: str, pipeline, requests, settings, batch_size: int) -> list[Any]:
  rows = pipeline.batch_rows(batch_size, len(requests))
  batch = pipeline.prepare(requests, settings, rows)
  results = []
  with progress.bar(len(requests), name, unit="pictures", enabled=hosts.first()) as bar:
    for part in requests_lib.split(batch, rows):
      results += pipeline.run(part)
      bar.update(len(results) - bar.n)
  return results


def _shows(image: np.ndarray, scene: scenes.Scene) -> float:
  """1.0 if a picture shows exactly the things of a scene, each in its cell; else 0.0."""
  detected = {(d.kind, d.color, _cell(d.box)) for d in verifier.detect(image)}
  return float(detected == {(t.kind, t.color, t.cell) for t in scene.things})


def _cell(box: tuple[float, float, float, float]) -> str:
  """The cell in which the middle of a detection's box lies; the cells are named row by row."""
  left, top, right, bottom = box
  return scenes.CELLS[2 * (top + bottom > renderer.SIZE) + (left + right > renderer.SIZE)]
