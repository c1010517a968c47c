"""Model folders: an official BAGEL folder, or what `unigrpo_jax.convert` makes of one.

A converted folder holds
  unigrpo_jax.json   format version and the headers of the official weight files
  official/          every file of the official folder but the weights, unchanged
  params/            the parameter tree, an Orbax checkpoint
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import Any

import jax

from unigrpo_jax import checkpoints, errors, weights
from unigrpo_jax.models import config as config_lib

MANIFEST, OFFICIAL, PARAMS = "unigrpo_jax.json", "official", "params"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A folder with a BAGEL in it.

  Attributes:
    path: the folder.
    kind: "official" or "converted".
    files: the folder with the configs and the tokenizer.
    config: the sizes, read from `files`.
  """

  path: pathlib.Path
  kind: str
  files: pathlib.Path
  config: config_lib.BagelConfig

  def load_params(
    self, dtype: Any = None, shardings: Any = None, parts: Sequence[str] = weights.PARTS
  ) -> dict[str, Any]:
    """Loads the parameter tree, each array straight into its own shards.

    Args:
      dtype: one for all, or {part: dtype}; None keeps the stored one.
      shardings: one `jax.sharding.Sharding` for all, or a tree of them like the result; None is the
        first device.
      parts: top-level keys to load, of ("bagel", "vae").

    Raises:
      InputError: the weights are missing, broken, or do not agree with the config.
    """
    if self.kind == "official":
      return weights.load_official(
        self.path, self.config, dtype=dtype, shardings=shardings, parts=parts
      )
    if shardings is None:
      shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = checkpoints.describe(self.path / PARAMS)
    abstract = {}
    for leaf in weights.table(self.config, parts):
      own = weights.part_dtype(dtype, leaf.path[0])
      if own is None:
        own = _stored_dtype(stored, leaf, self.path / PARAMS)
      one = isinstance(shardings, jax.sharding.Sharding)
      abstract[leaf.path] = jax.ShapeDtypeStruct(
        leaf.shape, own, sharding=shardings if one else weights.lookup(shardings, leaf.path)
      )
    return checkpoints.load_tree(self.path / PARAMS, weights.tree(abstract))


def _stored_dtype(stored: Any, leaf: weights.Leaf, path: pathlib.Path) -> Any:
  try:
    return weights.lookup(stored, leaf.path).dtype
  except (KeyError, AttributeError, TypeError):
    raise errors.InputError(
      f"{path}: parameter {'/'.join(leaf.path)} {list(leaf.shape)} is missing; convert again"
    ) from None


def is_folder(path: pathlib.Path) -> bool:
  """Whether `path` is a model folder of either kind, complete or not."""
  return any(
    (path / name).is_file() for name in (MANIFEST, config_lib.LLM_FILE, *weights.FILES.values())
  )


def open_folder(path: pathlib.Path | str) -> ModelFolder:
  """Recognises a model folder and reads its config.

  Raises:
    InputError: the folder does not exist, is neither kind, or its config cannot be read.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise errors.InputError(
      f"{path}: no such folder; expected an official BAGEL folder, or one made by "
      "python -m unigrpo_jax.convert"
    )
  if (path / MANIFEST).is_file():
    version = config_lib.read_json(path / MANIFEST).get("format_version")
    if version != FORMAT_VERSION:
      raise errors.InputError(
        f"{path / MANIFEST}: format_version={version!r}, this program reads {FORMAT_VERSION}; "
        "convert the official folder again"
      )
    files = path / OFFICIAL
    return ModelFolder(path, "converted", files, config_lib.read_config(files))
  if is_folder(path):
    return ModelFolder(path, "official", path, config_lib.read_config(path))
  raise errors.InputError(
    f"{path}: not a BAGEL folder: it holds neither {config_lib.LLM_FILE} and "
    f"{' and '.join(weights.FILES.values())} (official) nor {MANIFEST} (converted)"
  )


@contextlib.contextmanager
def staging(
  source: pathlib.Path, target: pathlib.Path, *, overwrite: bool, needed_bytes: int
) -> Iterator[pathlib.Path]:
  """A new folder beside `target` that becomes `target` on success and is removed otherwise.

  Args:
    source: the folder that is read; never written to.
    target: replaced, only on success, when `overwrite` and it is itself a model folder.
    overwrite: whether an existing target may be replaced.
    needed_bytes: size of what will be written.

  Yields:
    The path of the temporary folder.

  Raises:
    InputError: the target exists, overlaps the source, or the disk is too full.
  """
  source, target = source.resolve(), pathlib.Path(target).resolve()
  if target == source or source in target.parents or target in source.parents:
    raise errors.InputError(
      f"--target={target}: overlaps --source={source}; choose a folder outside the source"
    )
  if target.exists():
    _refuse_overwrite(target, overwrite)
  parent, created = target.parent, []
  while not parent.exists():
    created.append(parent)
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  if free < needed_bytes * 1.01 + 2**24:
    raise errors.InputError(
      f"--target={target}: needs {needed_bytes / 1e9:.2f} GB on its disk, {free / 1e9:.2f} GB are "
      "free; free some space or choose another disk"
    )
  prefix = f"{target.name}.partial-"
  for other in target.parent.iterdir() if target.parent.is_dir() else ():
    if other.name.startswith(prefix):
      print(f"note: {other} belongs to a run that still runs or was killed", file=sys.stderr)
  staged = target.parent / f"{prefix}{os.getpid()}"
  with _terminate_as_interrupt():
    try:
      staged.mkdir(parents=True)
      yield staged
      _replace(staged, target)
    except BaseException:
      _remove(staged)
      for folder in created:
        with contextlib.suppress(OSError):
          folder.rmdir()
      raise


def _refuse_overwrite(target: pathlib.Path, overwrite: bool) -> None:
  if not overwrite:
    raise errors.InputError(
      f"--target={target}: exists already; choose another folder, or pass --overwrite"
    )
  empty = target.is_dir() and not any(target.iterdir())
  if not empty and not is_folder(target):
    raise errors.InputError(
      f"--target={target}: is not a model folder, so --overwrite does not replace it; "
      "delete it yourself or choose another folder"
    )


def _replace(staged: pathlib.Path, target: pathlib.Path) -> None:
  if not target.exists():
    staged.rename(target)
    return
  old = target.with_name(f"{target.name}.old-{os.getpid()}")
  target.rename(old)
  try:
    staged.rename(target)
  except BaseException:
    old.rename(target)
    raise
  shutil.rmtree(old)


def _remove(staged: pathlib.Path) -> None:
  """Removes a folder that background writers may still be adding files to, for a few seconds."""
  for _ in range(20):
    shutil.rmtree(staged, ignore_errors=True)
    if not staged.exists():
      return
    time.sleep(0.25)
  print(f"note: {staged} could not be removed; delete it", file=sys.stderr)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
  """Lets SIGTERM clean up as Ctrl-C does."""

  def interrupt(number, frame):
    raise KeyboardInterrupt

  try:
    before = signal.signal(signal.SIGTERM, interrupt)
  except ValueError:  # not the main thread: the process is not ours to manage
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
