"""What supervised training learns from: examples of drawing, editing and answering.

A corpus is a function of a NumPy generator, so that the examples of a step depend on the seed and
the step alone, and a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.iconworld import plans, prompts, renderer, tasks

TASKS = ("draw_think", "draw", "answer", "describe", "edit")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One thing to learn.

  Attributes:
    prompt: instruction or question.
    text: reasoning before drawing, or the answer to learn; None for neither.
    target: RGB image to draw (PIL), or None.
    source: RGB image to edit or to answer about (PIL), or None.
  """

  prompt: str
  text: str | None = None
  target: Any = None
  source: Any = None


Corpus = Callable[[np.random.Generator], Example]


def iconworld(
  mixture: Mapping[str, float], *, wrong_plan_rate: float, split: str = "train"
) -> Corpus:
  """Scenes of IconWorld without end.

  Args:
    mixture: relative frequency of each of TASKS.
    wrong_plan_rate: part of the reasonings that go wrong somewhere; the image then follows the
      wrong plan, so that drawing stays honest while reasoning has something to unlearn.
    split: whose combinations to draw from.
  """
  unknown = sorted(set(mixture) - set(TASKS))
  if unknown or not sum(mixture.values()) > 0:
    raise errors.InputError(f"mixture={dict(mixture)}: expected positive weights of {TASKS}")
  names = list(mixture)
  weights = np.array([mixture[name] for name in names], float)
  weights /= weights.sum()

  def draw(rng: np.random.Generator) -> Example:
    task = names[rng.choice(len(names), p=weights)]
    example = prompts.sample(rng, split)
    if task == "answer":
      question, answer = tasks.question(rng, example.scene)
      return Example(question, answer, source=_picture(example.scene, rng))
    if task == "describe":
      question, answer = tasks.description(example.scene)
      return Example(question, answer, source=_picture(example.scene, rng))
    if task == "edit":
      instruction, edited = tasks.edit(rng, example.scene)
      # One brightness and jitter for both, so that what is not edited stays as it is.
      seed = rng.integers(2**63)
      before, after = (
        _picture(scene, np.random.default_rng(seed)) for scene in (example.scene, edited)
      )
      return Example(instruction, target=after, source=before)
    text, scene = example.reasoning, example.scene
    if rng.random() < wrong_plan_rate:
      text = plans.corrupt(rng, example)
      scene = dataclasses.replace(plans.plan_of(text), background=scene.background)
    if task == "draw":
      return Example(example.prompt, target=_picture(example.scene, rng))
    return Example(example.prompt, text, target=_picture(scene, rng))

  return draw


def _picture(scene, rng: np.random.Generator) -> PIL.Image.Image:
  return PIL.Image.fromarray(renderer.render(scene, rng))


def shards(folder: pathlib.Path | str) -> Corpus:
  """Examples of local files: every `*.jsonl` in `folder`, one object a line.

  Keys: "prompt" (text), and of these what the example has: "reasoning" or "answer" (text), "image"
  (file to draw), "source" (file to edit or to answer about). Files are relative to the folder.

  Raises:
    InputError: no shards, or a line that is not such an object; names file, line and key.
  """
  folder = pathlib.Path(folder)
  paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
  if not paths:
    raise errors.InputError(f"{folder}: no *.jsonl shards; expected a folder of them")
  rows = []
  for path in paths:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      if line.strip():
        rows.append(_parse(line, f"{path}, line {number}"))
  if not rows:
    raise errors.InputError(f"{folder}: its shards are empty")

  def draw(rng: np.random.Generator) -> Example:
    row = rows[rng.integers(len(rows))]
    load = lambda key: images_lib.load_rgb(folder / row[key]) if key in row else None
    return Example(
      row["prompt"], row.get("reasoning", row.get("answer")), load("image"), load("source")
    )

  return draw


def _parse(line: bytes, where: str) -> dict[str, str]:
  try:
    row = json.loads(line)
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise errors.InputError(f"{where}: not JSON ({error})") from None
  if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
    raise errors.InputError(f'{where}: expected an object with a text "prompt"')
  for key in ("reasoning", "answer", "image", "source"):
    if key in row and not isinstance(row[key], str):
      raise errors.InputError(f"{where}: {key}={row[key]!r} must be text")
  if "image" not in row and "answer" not in row:
    raise errors.InputError(f'{where}: neither "image" to draw nor "answer" to learn')
  return row
