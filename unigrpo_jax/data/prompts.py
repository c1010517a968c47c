"""Prompt sets to train and evaluate on, and the order in which a run reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import exam_points, files, lines, records, words
from unigrpo_jax.geneval import prompts as geneval_prompts
from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import prompts as iconworld

FILE_ENDINGS = tuple(records.READERS)
PROMPT_KEYS = records.PROMPT_KEYS
TAG_KEYS = ("tag", "Category", "category")
ICONWORLD = "iconworld"
ICONWORLD_COUNTS = {"train": 10_000, "validation": 300, "test": 600}  # Prompts by split.


@dataclasses.dataclass(frozen=True)
class Generated:
  """A set that is made when it is opened, and opened by its name.

  Attributes:
    counts: prompts by split, where no number is given.
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

  def without_tags(self, tags: Collection[str]) -> PromptSet:
    """The prompts whose metadata has another "tag", in their order; raises InputError where there
    are none, or none of a tag.
    """
    if not tags:
      return self
    records = [(prompt.prompt, prompt.metadata) for prompt in self]
    tag_of = lambda record: str(record[1].get("tag"))
    present = dict.fromkeys(map(tag_of, records))
    for tag in tags:
      errors.choose("config.prompts.held_out_tags: a tag", tag, present)
    kept = [record for record in records if tag_of(record) not in tags]
    if not kept:
      raise errors.InputError(
        f"config.prompts.held_out_tags={','.join(tags)} are all tags of the prompts; leave one out"
      )
    return PromptSet(kept)

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
      version; a file with an ending of FILE_ENDINGS, which has all its prompts in every split; a
      folder of such files, one a split, see `records.find`; or a name of `GENERATED`, such as
      "iconworld". What has a slash is a path: "./iconworld" is a folder of that name.
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
  if not files.is_object(path) and os.sep not in str(source):  # a name, not a path
    places.append(default_folder() / path / prompt_folders.VERSION)
  for folder in places:
    if (folder / "dataset_info.json").is_file():
      return PromptSet(prompt_folders.Split(files.local_copy(folder), split))
  if path.is_dir() and any(path.iterdir()):
    return PromptSet(list(read_split(path, split)))
  raise errors.InputError(
    f"{source}: no such prompt set; expected a folder or a name in {default_folder()} that "
    f"python -m unigrpo_jax.data built, a file ({', '.join(FILE_ENDINGS)}), a folder of such, or "
    f"one of {', '.join(GENERATED)}"
  )


def read_split(
  folder: pathlib.Path, split: str, prompt_key: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """As `read_file`, of the files of a split in a folder; see `records.find`."""
  for path in records.find(folder, split):
    yield from read_file(path, prompt_key)


def read_file(
  path: pathlib.Path, prompt_key: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (prompt, metadata) of each record of a file, in order; see `records.read`.

  Args:
    path: with an ending of FILE_ENDINGS. A line of a .txt file is a prompt and has no metadata
      ({}). A .jsonl file has an object a line, .json a list of objects; .csv, .tsv and .parquet
      files have a row a prompt. A record is its prompt's metadata, prompt included, or {} where it
      has no other key.
    prompt_key: which of its keys is the prompt, "prompt" in the metadata; None: the first of
      PROMPT_KEYS. A list of chat messages, as in verl's files, stands for the last of the user,
      and its reward_model.ground_truth, where it is text, is the key "text".

  The first of TAG_KEYS is the tag. "include" and "exclude" must be in GenEval's format, with any
  classes; "points" and "vqa_list" as `exam_points.read` takes them.

  Raises:
    InputError: the file cannot be read, has no prompts, or a record is malformed.
  """
  for where, record in records.read(path):
    record = _canonical(record, where, prompt_key)
    if problem := rules.problem(record):
      raise errors.InputError(f"{where}: {problem}")
    with errors.at(where):
      exam_points.read(record)
    yield record["prompt"], record if len(record) > 1 else {}


def _canonical(record: dict[str, Any], where: str, prompt_key: str | None) -> dict[str, Any]:
  """A record whose prompt and tag are under these keys."""
  key = prompt_key or next((key for key in PROMPT_KEYS if key in record), "prompt")
  if isinstance(record.get(key), list):
    record = _of_chat(record, key, where)
  expected = "--prompt_key of python -m unigrpo_jax.data names another" if prompt_key is None else (
    "name another with --prompt_key")
  lines.check_prompt(record, key, where, expected)
  if key != "prompt":
    record = {"prompt": record[key]} | {k: v for k, v in record.items() if k not in (key, "prompt")}
  tag = next((record[key] for key in TAG_KEYS if key in record), None)
  return record | {"tag": tag} if isinstance(tag, str) and "tag" not in record else record


def _of_chat(record: dict[str, Any], key: str, where: str) -> dict[str, Any]:
  """A row as verl has it, with its prompt as text."""
  try:
    said = [message["content"] for message in record[key] if message["role"] == "user"][-1]
    if isinstance(said, list):  # Parts, of which some may be pictures.
      said = "".join(part["text"] for part in said if "text" in part)
  except (TypeError, KeyError, IndexError):
    raise errors.InputError(
      f"{where}: {key}={errors.shown(record[key])} is neither text nor a list of messages "
      'like {"role": "user", "content": "a red kite"}'
    ) from None
  made = record | {key: said}
  model = record.get("reward_model")
  truth = model.get("ground_truth") if isinstance(model, dict) else None
  return made | {"text": truth} if isinstance(truth, str) else made


def generated(
  name: str, split: str, count: int | None = None
) -> Sequence[tuple[str, dict[str, Any]]]:
  """(prompt, metadata) of the first `count` prompts of a split of a set of `GENERATED`.

  Raises:
    InputError: it has no such split, or `count` is below 1 or beyond what it can make, which of
      iconworld and words is more than their own number.
  """
  made = GENERATED[name]
  errors.choose(f"{name}: split", split, made.counts)
  errors.require("--count", count, low=1, integer=True)
  return made.make(split, made.counts[split] if count is None else count)
