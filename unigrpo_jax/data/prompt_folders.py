"""Prompt sets on disk: TFDS folders of ArrayRecord files, without TensorFlow; slow to import.

A set is the folder NAME/1.0.0 with one or more splits, which
`tfds.builder_from_directory(folder).as_data_source(split)` reads too. A record holds `prompt`, a
text, and `metadata`, a JSON object in GenEval's style; "{}" where the source has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json
import os
import pathlib
import re
from typing import Any

import tensorflow_datasets as tfds

from unigrpo_jax import errors
from unigrpo_jax.data import locks

VERSION = "1.0.0"
_PROMPTS_PER_FILE = 1_000_000
_BUILD_AGAIN = "build it again with python -m unigrpo_jax.data"

Pairs = Iterable[tuple[str, dict[str, Any]]]  # (prompt, metadata), in order.


def build(
  name: str, splits: Mapping[str, Pairs], out: pathlib.Path, *, overwrite: bool = False
) -> pathlib.Path:
  """Writes a set and returns its folder in `out`; on any error nothing is left behind.

  With `overwrite`, it replaces a set of this name, after success only.

  Raises:
    InputError: a name is not possible, the folder exists, or `out` cannot be written to; Storage
      where trying again may help.
  """
  for kind, value in [("name", name), *(("split", split) for split in splits)]:
    # What TFDS would refuse only when the set is read.
    if not re.fullmatch(r"[a-z][a-z0-9_]*", value) or (kind, value) == ("split", "all"):
      raise errors.InputError(
        f"--{kind}={value}: a name has lower-case letters, digits and _, and starts with a letter; "
        "a split is not called 'all'"
      )
  target = out / name
  if target.exists() and not overwrite:
    raise errors.InputError(
      f"{target}: exists already; choose another --name or --out, or pass --overwrite"
    )
  if target.exists() and not (target / VERSION / "dataset_info.json").is_file():
    raise errors.InputError(
      f"{target}: is not a prompt set, so --overwrite does not replace it; choose another "
      "--name or --out"
    )
  try:
    with locks.staging(target) as staged:
      (staged / VERSION).mkdir()
      _write(name, splits, staged / VERSION)
      for split in splits:
        Split(staged / VERSION, split)  # Refuses what cannot be read back.
  except RuntimeError as error:
    if type(error) is not RuntimeError:
      raise
    # ArrayRecord's error where the disk is full.
    raise errors.of_storage(error, target, "written", errors.first_line(error)) from error
  return target / VERSION


def _write(name: str, splits: Mapping[str, Pairs], folder: pathlib.Path) -> None:
  text = tfds.features.Text()
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name, version=tfds.core.Version(VERSION), data_dir=os.fspath(folder), module_name=""
    ),
    features=tfds.features.FeaturesDict({"prompt": text, "metadata": text}),
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(info, _PROMPTS_PER_FILE, file_format="array_record")
  writer.initialize_splits(list(splits))
  for split, pairs in splits.items():
    writer.add_examples({split: (
      {"prompt": prompt, "metadata": json.dumps(metadata, ensure_ascii=False)}
      for prompt, metadata in pairs
    )})
  writer.close_all()


class Split:
  """The (prompt, metadata) pairs of one split: `len()` and `[i]`, read when asked for."""

  def __init__(self, folder: pathlib.Path, split: str):
    """Opens `folder` (NAME/1.0.0); raises InputError where it, the split or a file is missing."""
    self._folder, self._split = folder, split
    try:
      builder = tfds.builder_from_directory(folder)
      fields = sorted(builder.info.features)
    except Exception as error:  # TFDS raises whatever its parsers raise.
      raise errors.unreadable(
        error, folder,
        f"{folder}: not a readable TFDS folder ({errors.first_line(error)}); {_BUILD_AGAIN}",
      ) from None
    if not {"prompt", "metadata"} <= set(fields):
      raise errors.InputError(
        f"{folder}: its records hold {', '.join(fields)}; a prompt set has prompt and metadata; "
        "build it with python -m unigrpo_jax.data"
      )
    errors.choose(f"{folder}: split", split, sorted(builder.info.splits))
    for path in builder.info.splits[split].filepaths:
      if not pathlib.Path(path).is_file():
        raise errors.InputError(f"{path}: no such file, though the set lists it; {_BUILD_AGAIN}")
    self._records = builder.as_data_source(split)
    self[len(self) - 1]  # A damaged file fails here rather than in the middle of a run.

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> tuple[str, dict[str, Any]]:
    """Record `i`, from 0; raises InputError where the file is damaged."""
    try:
      record = self._records[i]
      return record["prompt"].decode("utf-8"), json.loads(record["metadata"])
    except Exception as error:  # Of ArrayRecord, protobuf or JSON.
      raise errors.unreadable(
        error, self._folder,
        f"{self._folder}: record {i} of split {self._split} cannot be read "
        f"({errors.first_line(error)}); {_BUILD_AGAIN}",
      ) from None
