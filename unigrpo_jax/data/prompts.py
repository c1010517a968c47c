"""Prompt sets to train and evaluate on, and the order that a run takes them in.

`open_set` opens a set that `python -m unigrpo_jax.data` built, a prompt file as it is, or the
embedded "iconworld". `PromptStream` deals a set out step by step, in an order that depends on the
seed alone and continues from one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import prompt_files
from unigrpo_jax.iconworld import prompts as iconworld

ICONWORLD = "iconworld"
# How many prompts of each of IconWorld's splits make the set of that name.
ICONWORLD_COUNTS = {"train": 10_000, "validation": 300, "test": 600}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt of a set.

  Attributes:
    prompt: the text.
    metadata: what a reward may need to know, in GenEval's style; empty where the source has none.
    id: its place in the set, from 0.
  """

  prompt: str
  metadata: dict[str, Any]
  id: int


class PromptSet:
  """The prompts of one split: `len()`, `[i]` and iteration, in the order of their source.

  Attributes:
    name: where it came from, for messages.
    split: which part.
  """

  def __init__(self, name: str, split: str, records: Sequence[tuple[str, dict[str, Any], int]]):
    self.name, self.split, self._records = name, split, records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Prompt:
    """Prompt `i`, from 0.

    Raises:
      IndexError: there are fewer.
      InputError: the file is damaged.
    """
    if not 0 <= i < len(self):
      raise IndexError(f"prompt {i} of {len(self)} in {self.name}, split {self.split}")
    return Prompt(*self._records[int(i)])

  def __iter__(self) -> Iterator[Prompt]:
    return (self[i] for i in range(len(self)))

  def fingerprint(self) -> str:
    """16 hexadecimal digits that other prompts, metadata, or another order would change."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in self:
      digest.update(json.dumps([prompt.prompt, prompt.metadata]).encode() + b"\n")
    return digest.hexdigest()

  def order(self, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one pass: [len] int64 indices, from `seed` and `epoch` alone (both >= 0).

    The sort of raw 64-bit draws rather than `Generator.permutation`, whose stream NumPy may change
    between releases: a checkpoint must find the order it was written in.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(len(self)), kind="stable")


class PromptStream:
  """Deals a set out, `prompts_per_step` at a time; of several hosts each takes all of them.

  The passes over the set follow each other without a gap, so the last step of one may take the
  first prompts of the next.
  """

  def __init__(self, prompts: PromptSet, seed: int, prompts_per_step: int):
    """Starts before the first step.

    Args:
      prompts: the set, the same on every host.
      seed: of the order, at least 0.
      prompts_per_step: at least 1.

    Raises:
      InputError: a number is out of range.
    """
    if seed < 0:
      raise errors.InputError(f"seed={seed} of the prompt order must be at least 0")
    errors.require("prompts_per_step", prompts_per_step, low=1)
    self._prompts, self._seed, self._step_size = prompts, seed, prompts_per_step
    self._position, self._epoch, self._order = 0, None, None

  def next(self) -> list[Prompt]:
    """The prompts of the next step."""
    start = self._position
    self._position += self._step_size
    return [self._prompts[self._index(i)] for i in range(start, self._position)]

  def _index(self, position: int) -> int:
    epoch, place = divmod(position, len(self._prompts))
    if epoch != self._epoch:
      self._epoch, self._order = epoch, self._prompts.order(self._seed, epoch)
    return int(self._order[place])

  def state(self) -> int:
    """How many prompts were taken so far."""
    return self._position

  def restore(self, state: int) -> None:
    """Continues after the prompts that `state` counts.

    Raises:
      InputError: `state` is not a count.
    """
    if isinstance(state, bool) or not isinstance(state, (int, np.integer)) or state < 0:
      raise errors.InputError(f"prompt position={state!r} must be an integer of at least 0")
    self._position = int(state)


def default_folder() -> pathlib.Path:
  """Where sets are built and looked up by name: $TFDS_DATA_DIR, or as TFDS does."""
  given = os.environ.get("TFDS_DATA_DIR")
  return pathlib.Path(given).expanduser() if given else pathlib.Path.home() / "tensorflow_datasets"


def open_set(source: pathlib.Path | str, split: str) -> PromptSet:
  """Opens a prompt set.

  Args:
    source: the name of a set in `default_folder()`; the folder of a set, with or without its
      version; a .txt or .jsonl file, taken whole whatever `split` says; or "iconworld", which
      needs no building ("./iconworld" is a folder of that name).
    split: which part of the set.

  Raises:
    InputError: there is no such set or split, or it cannot be read.
  """
  if str(source) == ICONWORLD:
    return _in_memory(ICONWORLD, split, iconworld_pairs(split))
  path = pathlib.Path(source)
  if path.is_file() or path.suffix.lower() in prompt_files.ENDINGS:
    return _in_memory(str(path), split, prompt_files.read(path))
  from unigrpo_jax.data import builders

  named = default_folder() / path
  for folder in (path, path / builders.VERSION, named / builders.VERSION):
    if (folder / "dataset_info.json").is_file():
      return PromptSet(str(source), split, builders.Split(folder, split))
  raise errors.InputError(
    f"{source}: no such prompt set; expected a folder or a name in {default_folder()} that "
    f"python -m unigrpo_jax.data built, a {' or '.join(prompt_files.ENDINGS)} file, or {ICONWORLD}"
  )


def _in_memory(name: str, split: str, pairs: Iterable[tuple[str, str]]) -> PromptSet:
  records = [(prompt, json.loads(metadata), i) for i, (prompt, metadata) in enumerate(pairs)]
  return PromptSet(name, split, records)


def iconworld_pairs(
  split: str,
  count: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, str]]:
  """Yields (prompt, metadata as JSON) of one of IconWorld's splits.

  Raises:
    InputError: there is no such split, or `count` is not positive.
  """
  if split not in ICONWORLD_COUNTS:
    raise errors.InputError(
      f"{ICONWORLD} has no split {split!r}; it has {', '.join(ICONWORLD_COUNTS)}"
    )
  count = ICONWORLD_COUNTS[split] if count is None else count
  if count < 1:
    raise errors.InputError(f"--count={count} must be at least 1")
  for done, example in enumerate(iconworld.fixed(split, count), 1):
    yield example.prompt, json.dumps(example.metadata, ensure_ascii=False)
    progress(done, count)
