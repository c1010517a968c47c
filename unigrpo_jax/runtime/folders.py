"""Model folders: an official BAGEL folder, or what `unigrpo_jax.convert` makes of one.

A converted folder holds
  unigrpo_jax.json   format version; headers and checksums of the official weight files
  official/          every file of the official folder but the weights, unchanged
  params/            the parameter tree, an Orbax checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
import signal
import sys
import time
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import atomic
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import safetensors_io, weights
from unigrpo_jax.runtime import checkpoints

MANIFEST, OFFICIAL, PARAMS = "unigrpo_jax.json", "official", "params"
FORMAT_VERSION = 1
AGAIN = "convert the official folder again"
# The embedded checkpoint: its name, wherever a folder is expected, and where it lies.
TINY = "tiny"
TINY_FOLDER = pathlib.Path(__file__).parents[1] / "assets" / "tiny_bagel"


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

  Args:
    path: the folder, or "tiny" for the embedded checkpoint (a folder of that name is "./tiny").

  Raises:
    InputError: the folder does not exist, is neither kind, or its config cannot be read.
  """
  if path == TINY:
    if not TINY_FOLDER.is_dir():
      raise errors.InputError(
        f"{TINY}: {TINY_FOLDER} is missing from this installation; install again, or make a tiny "
        "checkpoint with python -m unigrpo_jax.build and give its folder"
      )
    path = TINY_FOLDER
  path = pathlib.Path(path)
  if path.exists() and not path.is_dir():
    raise errors.InputError(f"{path}: is a file; expected the folder of a BAGEL")
  if not path.is_dir():
    raise errors.InputError(
      f"{path}: no such folder; expected an official BAGEL folder, or one made by "
      "python -m unigrpo_jax.convert"
    )
  if (path / MANIFEST).is_file():
    version = read_manifest(path).get("format_version")
    if version != FORMAT_VERSION:
      raise errors.InputError(
        f"{path / MANIFEST}: format_version={version!r}, this program reads {FORMAT_VERSION}; "
        + AGAIN
      )
    files = path / OFFICIAL
    return ModelFolder(path, "converted", files, config_lib.read_config(files))
  if is_folder(path):
    return ModelFolder(path, "official", path, config_lib.read_config(path))
  raise errors.InputError(
    f"{path}: not a BAGEL folder: it holds neither {config_lib.LLM_FILE} and "
    f"{' and '.join(weights.FILES.values())} (official) nor {MANIFEST} (converted)"
  )


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Reads `unigrpo_jax.json` of a converted folder; raises InputError if it is damaged."""
  try:
    return config_lib.read_json(path / MANIFEST)
  except errors.InputError as error:
    raise errors.InputError(f"{error}; {AGAIN}") from None


def other_files(folder: pathlib.Path, *, note: bool = False) -> list[pathlib.Path]:
  """The files of a folder beside the official weights, sorted by name.

  Args:
    folder: an official folder, or the `files` of a converted one.
    note: whether to say on stderr what is no file and so belongs to no copy of the folder.
  """
  names = set(weights.FILES.values())
  others = sorted(path for path in folder.iterdir() if path.name not in names)
  dropped = [
    f"{path.name} ({'sub-folder' if path.is_dir() else 'dangling link or special file'})"
    for path in others if not path.is_file()
  ]
  if note and dropped:
    print(f"note: not copied from {folder}: {', '.join(dropped)}", file=sys.stderr)
  return [path for path in others if path.is_file()]


def check_target(
  source: pathlib.Path, target: pathlib.Path, *, overwrite: bool, needed_bytes: int = 0
) -> list[pathlib.Path]:
  """Refuses a place where no model folder can be made; arguments as of `staging`.

  Returns:
    The parents of `target` that are still to be made, the innermost first.

  Raises:
    InputError: the target exists, overlaps the source, or the disk is too full.
  """
  source, target = source.resolve(), pathlib.Path(target).resolve()
  if target == source or source in target.parents or target in source.parents:
    raise errors.InputError(
      f"target {target} overlaps its source {source}; choose a folder outside the source"
    )
  if target.exists():
    _refuse_overwrite(target, overwrite)
  parent, missing = target.parent, []
  while not parent.exists():
    missing.append(parent)
    parent = parent.parent
  if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
    why = "cannot be written to" if parent.is_dir() else "is a file, not a folder"
    raise errors.InputError(f"target {target}: {parent} {why}; choose another place")
  free = shutil.disk_usage(parent).free
  if free < needed_bytes * 1.01 + 2**24:
    raise errors.InputError(
      f"target {target}: needs {needed_bytes / 1e9:.2f} GB on its disk, {free / 1e9:.2f} GB are "
      "free; free some space or choose another disk"
    )
  return missing


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
  created = check_target(source, target, overwrite=overwrite, needed_bytes=needed_bytes)
  target = pathlib.Path(target).resolve()
  prefix = f"{target.name}.partial-"
  for other in target.parent.iterdir() if target.parent.is_dir() else ():
    if other.name.startswith(prefix):
      print(f"note: {other} belongs to a run that still runs or was killed", file=sys.stderr)
  # No number of a process: those of containers repeat.
  staged = target.parent / f"{prefix}{secrets.token_hex(4)}"
  with _interruptible() as ignore:
    try:
      staged.mkdir(parents=True)
      yield staged
      atomic.replace(staged, target)
    except BaseException as error:
      # A closing terminal sends more than one signal: the second must not stop the cleaning.
      ignore()
      _remove(staged)
      for folder in created:
        with contextlib.suppress(OSError):
          folder.rmdir()
      if isinstance(error, errors.InputError):
        raise errors.InputError(str(error).replace(str(staged), str(target))) from None
      raise


def _refuse_overwrite(target: pathlib.Path, overwrite: bool) -> None:
  if not overwrite:
    raise errors.InputError(
      f"target {target} exists already; choose another folder, or pass --overwrite"
    )
  empty = target.is_dir() and not any(target.iterdir())
  if not empty and not is_folder(target):
    raise errors.InputError(
      f"target {target} is not a model folder, so nothing replaces it; delete it yourself or "
      "choose another folder"
    )


def _remove(staged: pathlib.Path) -> None:
  """Removes a folder; goes on until it stays away, should a library still be adding files to it."""
  absent, deadline = 0, time.monotonic() + 10
  while absent < 3:
    absent = 0 if staged.exists() else absent + 1
    # Unlike shutil.rmtree, this works where no more than one more file can be opened.
    for folder, names, files in os.walk(staged, topdown=False):
      with contextlib.suppress(OSError):
        for name in files:
          os.unlink(os.path.join(folder, name))
        for name in names:
          os.rmdir(os.path.join(folder, name))
    with contextlib.suppress(OSError):
      staged.rmdir()
    if time.monotonic() > deadline:
      print(f"note: {staged} could not be removed; delete it", file=sys.stderr)
      return
    time.sleep(0.1)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
  """Lets SIGTERM and SIGHUP clean up as Ctrl-C does; yields what makes all three do nothing."""

  def interrupt(number, frame):
    raise KeyboardInterrupt

  numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
  before = {number: signal.getsignal(number) for number in numbers if number is not None}
  # What is ignored stays so: SIGHUP under nohup, SIGINT in a script's background job.
  before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}

  def set_all(handlers: Mapping[int, Any]) -> None:
    with contextlib.suppress(ValueError):  # not the main thread: the process is not ours to manage
      for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)

  set_all(dict.fromkeys(before, interrupt))
  try:
    yield lambda: set_all(dict.fromkeys(before, signal.SIG_IGN))
  finally:
    set_all(before)


def write_official(
  target: pathlib.Path, folder: ModelFolder, params: dict[str, Any], *, dtype: Any
) -> None:
  """Writes parameters in memory as an official folder, replacing `target` on success.

  Args:
    target: the folder to make.
    folder: where the configs, the tokenizer and the parts that `params` lacks come from.
    params: {"bagel": ...}, {"vae": ...} or both, arrays whole on this host.
    dtype: of the written parts of `params`; the other parts keep theirs.

  Raises:
    InputError: the target cannot be made.
  """
  missing = [part for part in weights.PARTS if part not in params]
  kept = folder.load_params(parts=missing) if missing else {}
  others = other_files(folder.files, note=True)
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
  needed += sum(leaf.size * np.dtype(dtype).itemsize for leaf in jax.tree.leaves(params))
  with staging(folder.path, target, overwrite=True, needed_bytes=needed) as staged:
    for path in others:
      shutil.copyfile(path, staged / path.name)
    for part in weights.PARTS:
      tree, kind = (params[part], dtype) if part in params else (kept[part], None)
      leaves = weights.table(folder.config, (part,))
      entries = {
        name: (np.dtype(kind or weights.lookup({part: tree}, leaf.path).dtype), leaf.official_shape)
        for leaf in leaves for name in leaf.names
      }
      header = safetensors_io.make_header(entries)
      safetensors_io.write(staged / weights.FILES[part], header, _pieces(leaves, {part: tree}))


def _pieces(leaves, tree) -> Iterator[tuple[str, int, np.ndarray]]:
  """The official tensors of parameters in memory, whole: (name, 0, tensor)."""
  for leaf in leaves:
    value = np.asarray(weights.lookup(tree, leaf.path))
    for layer, name in enumerate(leaf.names):
      yield name, 0, leaf.to_official(value[layer] if leaf.stacked else value)
