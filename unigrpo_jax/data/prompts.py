"""Prompt sets to train and evaluate on, and the order in which a run reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import exam_points, files, lines, words
from unigrpo_jax.geneval import prompts as geneval_prompts
from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import prompts as iconworld

FILE_ENDINGS = (".txt", ".jsonl")
ICONWORLD = "iconworld"
ICONWORLD_COUNTS = {"train": 10_000, "validation": 300, "test": 600}  # Prompts by split.


@dataclasses.dataclass(frozen=True)
class Generated:
  """A set that is made when it is opened, and opened by its name.

  Attributes:
    counts: prompts by split.
    make: (split, count) -> the first so many (prompt, metadata) of the split.
  """

  counts: Mapping[str, int]
  make: Callable[[str, int], Sequence[tuple[str, dict[str, Any]]]]


def _iconworld(split: str, count: int) -> list[tuple[str, dict[str, Any]]]:
  return [(example.prompt, example.metadata) for example in iconworld.fixed(split, count)]


def _geneval(name: str, counts: Mapping[str, int]) -> Generated:
  def make(split: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    errors.require("--count", count, low=1, high=counts[split])
    return [(record["prompt"], record) for record in geneval_prompts.make(name, split, count)]

  return Generated(counts, make)


GENERATED = {
  ICONWORLD: Generated(ICONWORLD_COUNTS, _iconworld),
  **{name: _geneval(name, counts) for name, counts in geneval_prompts.COUNTS.items()},
  "words": Generated(words.COUNTS, words.make),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt of a set."""

  prompt: str
  metadata: dict[str, Any]  # for rewards, in GenEval's style; empty where the source has none


class PromptSet:
  """The prompts of one split: `len()`, `[i]` and iteration, in the order of their source."""

  def __init__(self, records: Sequence[tuple[str, dict[str, Any]]]):
    """From (prompt, metadata) pairs, which may be read when asked for."""
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Prompt:
    """Prompt `i`, from 0; raises InputError where the set's file is damaged."""
    if not 0 <= i < len(self):
      raise IndexError(f"prompt {i} of {len(self)}")
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
    """The permutation of one epoch: [len] int64 indices, from `seed` and `epoch` alone (both >= 0).
    """
    # Not `Generator.permutation`, whose stream NumPy may change between releases.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(len(self)), kind="stable")


class PromptStream:
  """Yields the prompts of each step, the same on every host; epochs follow without a gap.

  Raises:
    InputError: `seed`, of the order, is negative or `prompts_per_step` is not positive.
  """

  def __init__(self, prompts: PromptSet, seed: int, prompts_per_step: int):
    errors.require("seed", seed, low=0)
    errors.require("prompts_per_step", prompts_per_step, low=1)
    self._prompts, self._seed, self._step_size = prompts, seed, prompts_per_step
    self._position, self._epoch, self._order = 0, None, None

  def next(self) -> list[Prompt]:
    """The prompts of the next step."""
    start = self._position
    self._position += self._step_size
    return [self._prompts[self._index(i)] for i in range(start, self._position)]

  def _index(self, position: int) -> int:
    epoch, offset = divmod(position, len(self._prompts))
    if epoch != self._epoch:
      self._epoch, self._order = epoch, self._prompts.order(self._seed, epoch)
    return int(self._order[offset])

  def state(self) -> int:
    """The number of prompts used so far."""
    return self._position

  def restore(self, state: int) -> None:
    """Continues after the first `state` prompts; raises InputError if that is no count."""
    if isinstance(state, bool) or not isinstance(state, (int, np.integer)) or state < 0:
      raise errors.InputError(f"prompt position={state!r} must be an integer of at least 0")
    self._position = int(state)


def default_folder() -> pathlib.Path:
  """Where sets are built and looked up by name: $TFDS_DATA_DIR, or TFDS's own default."""
  return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_set(source: pathlib.Path | str, split: str) -> PromptSet:
  """Opens a split of a prompt set.

  Args:
    source: the name of a set in `default_folder()`; the folder of a set, with or without its
      version; a .txt or .jsonl file, which has all its prompts in every split; or a name of
      `GENERATED`, such as "iconworld" ("./iconworld" is a folder of that name).
    split: which part of the set.

  Raises:
    InputError: there is no such set or split, or it cannot be read.
  """
  if str(source) in GENERATED:
    return PromptSet(generated(str(source), split))
  path = files.path(source)
  if path.is_file() or path.suffix.lower() in FILE_ENDINGS:
    return PromptSet(list(read_file(path)))
  from unigrpo_jax.data import prompt_folders  # Imports TFDS, which takes a second.

  places = [path, path / prompt_folders.VERSION]
  if not files.is_object(path):
    places.append(default_folder() / path / prompt_folders.VERSION)
  for folder in places:
    if (folder / "dataset_info.json").is_file():
      return PromptSet(prompt_folders.Split(files.local_copy(folder), split))
  raise errors.InputError(
    f"{source}: no such prompt set; expected a folder or a name in {default_folder()} that "
    f"python -m unigrpo_jax.data built, a {' or '.join(FILE_ENDINGS)} file, or one of "
    + ", ".join(GENERATED)
  )


def read_file(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (prompt, metadata) of each line of a file that is not blank, in order.

  A .txt line is the prompt and has no metadata ({}). A .jsonl line is an object with the key
  "prompt"; the whole object, prompt included, is its metadata, or {} where it has no other key. Its
  "include" and "exclude" must be in GenEval's format, with any classes; "points" and "vqa_list" as
  `exam_points.read` takes them.

  Raises:
    InputError: the file cannot be read, has no prompts, or a line is malformed.
  """
  ending = path.suffix.lower()
  if ending not in FILE_ENDINGS:
    raise errors.InputError(
      f"{path}: the ending {path.suffix!r} is not known; expected .txt (one prompt a line) or "
      ".jsonl (one JSON object a line)"
    )
  expected = 'expected an object with a prompt, like {"prompt": "a red kite"}'
  empty = True
  for where, text in lines.read(path):
    empty = False
    if ending == ".txt":
      yield text, {}
      continue
    record = lines.parse_object(text, where, expected)
    if problem := rules.problem(record):
      raise errors.InputError(f"{where}: {problem}")
    with errors.at(where):
      exam_points.read(record)
    yield record["prompt"], record if len(record) > 1 else {}
  if empty:
    raise errors.InputError(f"{path}: no prompts in it; expected one a line")


def generated(
  name: str, split: str, count: int | None = None
) -> Sequence[tuple[str, dict[str, Any]]]:
  """(prompt, metadata) of the first `count` prompts of a split of a set of `GENERATED`.

  Raises:
    InputError: it has no such split, or `count` is not from 1 to its prompts.
  """
  made = GENERATED[name]
  errors.choose(f"{name}: split", split, made.counts)
  errors.require("--count", count, low=1, integer=True)
  return made.make(split, made.counts[split] if count is None else count)
