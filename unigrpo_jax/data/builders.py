"""Prompt sets on disk: TFDS builders whose records lie in ArrayRecord files, without TensorFlow.

A set is the folder NAME/1.0.0 that TFDS makes, with one or more splits, so that
`tfds.builder_from_directory(folder).as_data_source(split)` reads it too. A record holds
  prompt    text
  metadata  a JSON object in GenEval's style; "{}" where the source has none
  id        its place in the source, from 0
Records lie in the order of their ids; whoever trains on them permutes indices.

Importing this takes a second, so `prompts` imports it when a set is built or opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from unigrpo_jax import errors
from unigrpo_jax.data import atomic

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FIELDS = ("id", "metadata", "prompt")
_BUILD_AGAIN = "build it again with python -m unigrpo_jax.data"


class _Info(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Nothing is looked up elsewhere; TFDS's own would leave an empty folder in /tmp each time."""


class PromptBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds one set.

  Attributes:
    name: of the set.
    splits: {split: function that gives its (prompt, metadata as JSON) pairs in order}.
    data_dir: where the folder `name` is made.
  """

  VERSION = tfds.core.Version(VERSION)
  # Nothing is downloaded. TFDS would look for checksums beside this file, by way of a package
  # (importlib_resources) that it uses without requiring it.
  url_infos = {}

  def __init__(
    self,
    name: str,
    splits: Mapping[str, Callable[[], Iterable[tuple[str, str]]]],
    data_dir: pathlib.Path,
  ):
    self.name, self._splits = name, splits
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"prompt": text, "metadata": text, "id": np.int64})
    return _Info(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    return {split: self._generate_examples(source()) for split, source in self._splits.items()}

  def _generate_examples(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Any]:
    for i, (prompt, metadata) in enumerate(pairs):
      yield i, {"prompt": prompt, "metadata": metadata, "id": i}


def check_name(kind: str, name: str) -> None:
  """Raises InputError where TFDS would not take `name` as the name of a `kind` (set or split)."""
  if not _NAME.fullmatch(name) or (kind == "split" and name == "all"):
    raise errors.InputError(
      f"--{kind}={name}: a name has lower-case letters, digits and _, starts with a letter"
      + (", and is not 'all'" if kind == "split" else "")
    )


def build(
  name: str,
  splits: Mapping[str, Callable[[], Iterable[tuple[str, str]]]],
  out: pathlib.Path,
  *,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a set and returns its folder; on any error nothing is left behind.

  Args:
    name: of the set.
    splits: {split: function that gives its (prompt, metadata as JSON) pairs in order}.
    out: the folder `name` is made in this one.
    overwrite: replaces a set of this name, after success only.

  Raises:
    InputError: a name is not possible, the folder exists, or the disk is full; and what a source
      raises.
    OSError: `out` cannot be written to.
  """
  check_name("name", name)
  for split in splits:
    check_name("split", split)
  target = out / name
  if target.exists():
    _refuse_overwrite(target, overwrite)
  created = [folder for folder in (out, *out.parents) if not folder.exists()]
  staged = out / f"{name}.partial-{os.getpid()}"
  try:
    staged.mkdir(parents=True)
    with _silent():
      PromptBuilder(name, splits, staged).download_and_prepare()
    for split in splits:
      Split(staged / name / VERSION, split)  # What cannot be read back is not worth a name.
    atomic.replace(staged / name, target)
    shutil.rmtree(staged, ignore_errors=True)
  except BaseException as error:
    shutil.rmtree(staged, ignore_errors=True)
    for folder in created:
      with contextlib.suppress(OSError):
        folder.rmdir()
    if type(error) is RuntimeError:  # what ArrayRecord raises for a full disk
      raise errors.InputError(
        f"{target}: cannot be written ({_first_line(error)}); check permissions and free space"
      ) from error
    raise
  return target / VERSION


def _refuse_overwrite(target: pathlib.Path, overwrite: bool) -> None:
  if not overwrite:
    raise errors.InputError(
      f"{target}: exists already; choose another --name or --out, or pass --overwrite"
    )
  if not (target / VERSION / "dataset_info.json").is_file():
    raise errors.InputError(
      f"{target}: is not a prompt set, so --overwrite does not replace it; delete it yourself or "
      "choose another --name or --out"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """TFDS would announce a download that there is not, in bold, and draw bars of its own."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()


class Split:
  """The records of one split of a set: `len()` and `[i]`, read when asked for."""

  def __init__(self, folder: pathlib.Path, split: str):
    """Opens `folder` (NAME/1.0.0).

    Raises:
      InputError: it is not a prompt set, lacks the split, or lacks a file.
    """
    self._folder, self._split = folder, split
    # Of a folder that is broken in ways of its own TFDS raises what its parsers raise.
    try:
      builder = tfds.builder_from_directory(folder)
      fields = tuple(sorted(builder.info.features))
    except Exception as error:
      raise errors.InputError(
        f"{folder}: not a readable TFDS folder ({_first_line(error)}); {_BUILD_AGAIN}"
      ) from None
    if fields != _FIELDS:
      raise errors.InputError(
        f"{folder}: its records hold {', '.join(fields)}; a prompt set has {', '.join(_FIELDS)}; "
        "build it with python -m unigrpo_jax.data"
      )
    if split not in builder.info.splits:
      raise errors.InputError(
        f"{folder}: has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}"
      )
    for path in builder.info.splits[split].filepaths:
      if not pathlib.Path(path).is_file():
        raise errors.InputError(f"{path}: no such file, though the set lists it; {_BUILD_AGAIN}")
    self._records = builder.as_data_source(split)
    self[len(self) - 1]  # A damaged or cut file fails here rather than in the middle of a run.

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> tuple[str, dict[str, Any], int]:
    """(prompt, metadata, id) of record `i`, from 0.

    Raises:
      InputError: the file is damaged.
    """
    try:
      record = self._records[i]
      metadata = json.loads(record["metadata"])
      return record["prompt"].decode("utf-8"), metadata, int(record["id"])
    except Exception as error:  # of ArrayRecord, protobuf or JSON
      raise errors.InputError(
        f"{self._folder}: record {i} of split {self._split} cannot be read "
        f"({_first_line(error)}); {_BUILD_AGAIN}"
      ) from None


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
