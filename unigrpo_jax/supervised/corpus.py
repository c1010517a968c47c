"""What supervised training learns from: examples of drawing, editing and answering.

A corpus is a function of the number of a row, counted over all steps and hosts, and of that row's
NumPy generator: it has no position that a resumed run would have to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import files, lines
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.iconworld import plans, prompts, renderer, tasks

TASKS = ("draw_think", "draw", "answer", "describe", "edit")

# What a generator is for: the second number of its seed.
ROWS, EPOCHS = 0, 1

# Of a line of a shard.
_KEYS = ("prompt", "reasoning", "answer", "image", "source")
_EXPECTED = 'expected an object like {"prompt": "a red kite", "image": "kite.png"}'


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One thing to learn."""

  prompt: str  # instruction or question
  text: str | None = None  # reasoning before drawing, or the answer to learn; None for neither
  target: Any = None  # RGB image to draw (PIL), or None
  source: Any = None  # RGB image to edit or to answer about (PIL), or None
  where: str = ""  # "PATH, line N" of a file, for messages


# (number of the row, its generator) -> its example.
Corpus = Callable[[int, np.random.Generator], Example]


def iconworld(mixture: Mapping[str, float], *, wrong_plan_rate: float) -> Corpus:
  """Endless scenes of IconWorld, which depend on a row's generator alone.

  Args:
    mixture: relative frequency of each of TASKS.
    wrong_plan_rate: part of the reasonings that go wrong somewhere; the image then follows the
      wrong plan, so that drawing stays honest while reasoning has something to unlearn.

  Raises:
    InputError: a task is unknown, a weight is negative, or none is positive, or the rate is no
      part; names the key of the config.
  """
  for name, weight in mixture.items():
    errors.choose("config.data.mixture", name, TASKS)
    errors.require(f"config.data.mixture.{name}", weight, low=0)
  if not sum(mixture.values()) > 0:
    raise errors.InputError(
      f"config.data.mixture={dict(mixture)} has no task; give one of them a positive weight"
    )
  errors.require("config.data.wrong_plan_rate", wrong_plan_rate, low=0, high=1)
  names = list(mixture)
  weights = np.array([mixture[name] for name in names], float)
  weights /= weights.sum()

  def example_of(row_number: int, rng: np.random.Generator) -> Example:
    del row_number
    task = names[rng.choice(len(names), p=weights)]
    example = prompts.sample(rng, "train")
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

  return example_of


def _picture(scene, rng: np.random.Generator) -> PIL.Image.Image:
  return PIL.Image.fromarray(renderer.render(scene, rng))


def fingerprint(folder: pathlib.Path | str) -> str:
  """16 hexadecimal digits that other examples of `shards` would change; pictures by their names."""
  digest = hashlib.blake2b(digest_size=8)
  for path in sorted(files.path(folder).glob("*.jsonl")):
    digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    with path.open("rb") as file:
      while part := file.read(2**20):
        digest.update(part)
  return digest.hexdigest()


def shards(folder: pathlib.Path | str, *, seed: int) -> Corpus:
  """Examples of local files: every `*.jsonl` in `folder`, one object a line.

  An object has a "prompt", and either an "image" (file to draw), with a "reasoning" or without, or
  an "answer"; and a "source" (file to edit or to answer about) or none. Files are relative to the
  folder. Texts are learnt exactly as they are: a reasoning has the tags that it is to be written
  with, "<think>" and "</think>" for what the system prompt of thinking asks for.

  Every epoch, so many rows as there are examples, has each of them once, in an order of its own.

  Args:
    folder: of the shards.
    seed: of the orders.

  Raises:
    InputError: no shards, a line that is not such an object, or a file that it names is not there;
      names file, line and key. The corpus raises it for an image that cannot be read.
  """
  folder = files.path(folder)
  paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
  if not paths:
    raise errors.InputError(f"{folder}: no *.jsonl shards; expected a folder of them")
  rows = [
    (where, _parse(text, where, folder))
    for path in paths for where, text in lines.read(path)
  ]
  if not rows:
    raise errors.InputError(f"{folder}: its shards are empty; expected one example a line")

  def example_of(place: int) -> Example:
    where, row = rows[place]
    load = lambda key: images_lib.load_rgb(folder / row[key]) if key in row else None
    with errors.at(where):
      return Example(
        row["prompt"], row.get("reasoning", row.get("answer")), load("image"), load("source"), where
      )

  return epochs(len(rows), example_of, seed)


def epochs(count: int, example_of: Callable[[int], Example], seed: int) -> Corpus:
  """A corpus of `count` examples, of which every epoch has each once, in an order of its own."""
  @functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, EPOCHS, epoch)).permutation(count)

  def example_of_row(row_number: int, rng: np.random.Generator) -> Example:
    del rng
    epoch, place = divmod(row_number, count)
    return example_of(int(order(epoch)[place]))

  return example_of_row


def _parse(text: str, where: str, folder: pathlib.Path) -> dict[str, str]:
  row = lines.parse_object(text, where, _EXPECTED)
  for key in row:
    errors.choose(f"{where}: key", key, _KEYS)
    lines.check_text(row, key, where)
  if ("image" in row) == ("answer" in row):
    number = "both" if "image" in row else "none"
    raise errors.InputError(
      f'{where}: has {number} of "image" to draw and "answer" to learn; give one of them'
    )
  if "reasoning" in row and "answer" in row:
    raise errors.InputError(
      f'{where}: "reasoning" beside "answer"; only what is drawn is reasoned about, leave one out'
    )
  for key in ("image", "source"):
    if key in row and not _is_file(folder / row[key]):
      raise errors.InputError(
        f"{where}: {key}={row[key]!r} is no file in {folder}; give the path of an image from there"
      )
  return row


def _is_file(path: pathlib.Path) -> bool:
  """As `os.path.isfile`, but asks a mounted bucket once a folder, rather than once an image."""
  return path.name in _files(path.parent) or not files.is_object(path) and os.path.isfile(path)


@functools.cache
def _files(folder: pathlib.Path) -> frozenset[str]:
  if files.is_object(folder):
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
  try:
    return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
  except (OSError, ValueError):  # ValueError: its name holds a zero byte.
    return frozenset()
