"""A thin layer over Orbax v1: trees of arrays on disk, whole, sharded, or a slice at a time.

Whole trees go through Orbax alone. A tree larger than memory is created by Orbax from the first
piece of each leaf, then grown through TensorStore, the library that Orbax stores arrays with: Orbax
itself holds a leaf twice while writing it, and one leaf of a 7B model is 3.5 GiB. What comes out is
an ordinary Orbax checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore

from unigrpo_jax import errors

Path = tuple[str, ...]
# Stored chunks: small enough that a device of a large mesh reads little beyond its own slice.
_CHUNK_BYTES = 16 * 2**20
# A data file is gathered in memory before it is written; Orbax's default is 2 GiB.
_DATA_FILE_BYTES = 128 * 2**20
# Small leaves are saved together, up to this size.
_BATCH_BYTES = 128 * 2**20
# Leaves are loaded together until they reach this size; 2 GiB take some seconds.
_LOAD_BYTES = 2 * 2**30
# Orbax keeps the tree under this name inside a checkpoint folder, and joins keys with dots.
_ITEM = "state"


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
  """An array that is written in pieces along one axis.

  Attributes:
    path: keys into the tree.
    shape: of the whole array.
    dtype: of the whole array.
    axis: the axis that the pieces divide.
    step: length of a piece along `axis`; the last may be shorter.
    read: `read(start, stop)` returns the piece `[start, stop)` along `axis`.
  """

  path: Path
  shape: tuple[int, ...]
  dtype: np.dtype
  axis: int
  step: int
  read: Callable[[int, int], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def _context() -> ocp.Context:
  _mute()
  context = ocp.Context()
  saving = context.array_options.saving
  saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  # Weights are incompressible noise to zstd: it would cost minutes and save a few per cent.
  saving.use_compression = False
  saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
  context.memory_options.deepcopy_host_arrays = False
  context.pytree_options.loading.partial_load = True
  return context


@functools.cache
def _mute() -> None:
  """Keeps the traces of Orbax's threads and event loops off the screen, for the whole process.

  A failed read or write leaves hundreds of them, some seconds later: when TensorStore answers a
  loop that is closed, or a task is collected. What failed is raised by the functions of this module
  all the same, in one line.
  """
  logging.getLogger("absl").addFilter(
    lambda record: "orbax" not in pathlib.PurePath(record.pathname).parts
  )
  lost = ("was never retrieved", "was destroyed but it is pending")
  logging.getLogger("asyncio").addFilter(
    lambda record: not any(words in record.getMessage() for words in lost)
  )
  show = sys.unraisablehook

  def filtered(unraisable) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    dropped = code is not None and "orbax" in pathlib.PurePath(code.co_filename).parts
    if not dropped and str(unraisable.exc_value) != "Event loop is closed":
      show(unraisable)

  sys.unraisablehook = filtered


class _PatientLoop(asyncio.SelectorEventLoop):
  """An event loop that, when closed, waits for the tasks that still run in it.

  Orbax closes a loop on the first failure, while other reads or writes are under way: writes would
  make files in a folder that the caller has already removed.
  """

  def close(self) -> None:
    tasks = [] if self.is_closed() else asyncio.all_tasks(self)
    if tasks:
      self.run_until_complete(asyncio.wait(tasks))
      for task in tasks:
        task.cancelled() or task.exception()  # seen, so not reported as lost
    super().close()


def _to_the_end(call: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function of Orbax, and returns or raises once nothing of it is under way any more.

  In a thread of its own, which Ctrl-C does not reach: an interrupted call would write on, or take
  the interruption for a broken checkpoint.
  """

  def in_context() -> Any:
    with _context():
      return call(*arguments)

  original = asyncio.new_event_loop
  asyncio.new_event_loop = _PatientLoop
  try:
    with concurrent.futures.ThreadPoolExecutor(1, "checkpoint") as thread:
      return thread.submit(in_context).result()
  finally:
    asyncio.new_event_loop = original


def save_tree(path: pathlib.Path | str, tree: Mapping[str, Any]) -> None:
  """Saves a tree of (sharded) arrays as an Orbax checkpoint; all processes call it together.

  Raises:
    InputError: a write fails.
  """
  path = pathlib.Path(path).absolute()
  with _writing(path):
    _to_the_end(ocp.save, path, tree)


def describe(path: pathlib.Path | str) -> dict[str, Any]:
  """The stored tree, its leaves `jax.ShapeDtypeStruct`s; reads no array.

  Raises:
    InputError: `path` is not a readable Orbax checkpoint.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such checkpoint folder")
  try:
    stored = _to_the_end(ocp.metadata, path).metadata
    if not isinstance(stored, Mapping):  # Orbax logs what is wrong, and returns None
      raise ValueError("its arrays cannot be opened")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
  except Exception as error:  # Orbax raises many kinds for a folder that is damaged or not its own
    raise errors.InputError(
      f"{path}: not a readable Orbax checkpoint ({_first_line(error)}); convert or save it again"
    ) from error


def load_tree(path: pathlib.Path | str, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Loads the leaves that `abstract` names, each straight into its own shards.

  Args:
    path: the checkpoint folder.
    abstract: `jax.ShapeDtypeStruct`s with shardings; stored arrays are cast to their dtypes. Parts
      of the stored tree that it does not name are not read.

  Raises:
    InputError: a leaf is absent or has another shape, or the checkpoint cannot be read.
  """
  path = pathlib.Path(path).absolute()
  stored = dict(_flatten(describe(path)))
  wanted = dict(_flatten(abstract))
  for name, leaf in wanted.items():
    if name not in stored:
      raise errors.InputError(f"{path}: parameter {'/'.join(name)} {list(leaf.shape)} is missing")
    if tuple(stored[name].shape) != tuple(leaf.shape):
      raise errors.InputError(
        f"{path}: parameter {'/'.join(name)} is stored as {list(stored[name].shape)}, but its "
        f"config asks for {list(leaf.shape)}; use the config that belongs to the checkpoint"
      )
  loaded: dict[Path, jax.Array] = {}
  batch: dict[Path, jax.ShapeDtypeStruct] = {}
  size = 0
  try:
    for number, (name, leaf) in enumerate(wanted.items(), 1):
      batch[name], size = leaf, size + leaf.size * leaf.dtype.itemsize
      # Ctrl-C takes effect between two of these.
      if size >= _LOAD_BYTES or number == len(wanted):
        loaded |= _flatten(_to_the_end(ocp.load, path, _cut(abstract, batch)))
        batch, size = {}, 0
    return _cut(abstract, loaded)
  except Exception as error:
    if is_full(error):
      raise errors.InputError(f"{path}: {TOO_SMALL}") from None
    raise errors.InputError(
      f"{path}: cannot be loaded ({_first_line(error)}); convert or save it again"
    ) from error


TOO_SMALL = "its weights do not fit in device memory; take more devices, or bfloat16"


def is_full(error: BaseException) -> bool:
  """Whether an error of JAX says that a device has no memory left."""
  return "RESOURCE_EXHAUSTED" in str(error)


def save_streaming(
  path: pathlib.Path | str,
  leaves: Sequence[StreamedLeaf],
  nest: Callable[[dict[Path, np.ndarray]], dict[str, Any]],
  *,
  progress: Callable[[str, int], None] = lambda name, done: None,
) -> None:
  """Saves a tree that does not fit in memory; holds two pieces of a leaf at a time. One process.

  Not atomic: an interrupted save leaves an incomplete folder, which the caller removes.

  Args:
    path: a folder that does not exist yet.
    leaves: the whole tree.
    nest: {path: array} -> nested dicts.
    progress: called with the name of a leaf and the bytes written of it just now.

  Raises:
    InputError: a write fails.
  """
  path = pathlib.Path(path).absolute()
  batch: dict[Path, np.ndarray] = {}

  def save_batch() -> None:
    with _writing(path):
      _to_the_end(ocp.partial.save, path, nest(batch))
    for name, array in batch.items():
      progress("/".join(name), array.nbytes)
    batch.clear()

  for leaf in leaves:
    batch[leaf.path] = leaf.read(0, min(leaf.step, leaf.shape[leaf.axis]))
    # One call costs about 20 ms however little it writes.
    if sum(array.nbytes for array in batch.values()) >= _BATCH_BYTES:
      save_batch()
  if batch:
    save_batch()
  with _writing(path):
    _to_the_end(ocp.partial.finalize, path)
  for leaf in leaves:
    if leaf.step < leaf.shape[leaf.axis]:
      _grow(path, leaf, progress)


def _grow(
  path: pathlib.Path, leaf: StreamedLeaf, progress: Callable[[str, int], None]
) -> None:
  """Extends a stored first piece to the whole leaf."""
  with _writing(path):
    store = _open_array(path, leaf.path, write=True)
    store = store.resize(exclusive_max=leaf.shape, expand_only=True).result()
  size, pending, written = leaf.shape[leaf.axis], None, 0

  def finish() -> None:
    with _writing(path):
      pending.result()
    progress("/".join(leaf.path), written)

  try:
    for start in range(leaf.step, size, leaf.step):
      stop = min(start + leaf.step, size)
      piece = leaf.read(start, stop)  # while the piece before it is being written
      if pending is not None:
        finish()
      region = (*(slice(None),) * leaf.axis, slice(start, stop))
      pending, written = store[region].write(piece), piece.nbytes
    finish()
  except BaseException:
    # Left alone, the write would go on adding files to a folder that is about to be removed.
    if pending is not None:
      pending.exception()
    raise


@contextlib.contextmanager
def _writing(path: pathlib.Path, kind: type = errors.InputError) -> Iterator[None]:
  """Turns a failed write, of whatever sort the libraries raise, into one line."""
  try:
    yield
  except Exception as error:
    raise kind(
      f"{path}: cannot be written ({_first_line(error)}); check free disk space and permissions"
    ) from None


class StoredTree:
  """A checkpoint that is read a slice at a time.

  Raises:
    InputError: `path` is not a readable Orbax checkpoint.
  """

  def __init__(self, path: pathlib.Path | str):
    self.path = pathlib.Path(path).absolute()
    self.leaves = dict(_flatten(describe(self.path)))
    self._open: tuple[Path, Any] | None = None

  def read(self, leaf: Path, index: tuple[slice | int, ...] = ()) -> np.ndarray:
    """Reads `tree[leaf][index]` in the stored dtype; raises InputError if it cannot be read."""
    try:
      if self._open is None or self._open[0] != leaf:
        self._open = (leaf, _open_array(self.path, leaf))
        expected = self.leaves[leaf]
        if tuple(self._open[1].shape) != tuple(expected.shape):
          raise ValueError(f"stored shape {self._open[1].shape}, metadata {expected.shape}")
      return np.asarray(self._open[1][(*index, ...)].read().result())
    except Exception as error:
      raise errors.InputError(
        f"{self.path}: parameter {'/'.join(leaf)} cannot be read ({_first_line(error)}); "
        "convert or save it again"
      ) from error


def _open_array(path: pathlib.Path, leaf: Path, *, write: bool = False) -> tensorstore.TensorStore:
  kvstore = {
    "driver": "ocdbt",
    "base": f"file://{path / _ITEM}/",
    "path": ".".join(leaf) + "/",
  }
  if write:
    kvstore["target_data_file_size"] = _DATA_FILE_BYTES
  spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_metadata": "open"}
  return tensorstore.open(spec, open=True, read=True, write=write).result()


def _flatten(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, (*path, key))
    else:
      yield (*path, key), value


def _cut(tree: Mapping[str, Any], leaves: Mapping[Path, Any], path: Path = ()) -> dict[str, Any]:
  """Nested dicts of the shape of `tree`, with only `leaves` in them."""
  found = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      inner = _cut(value, leaves, (*path, key))
      if inner:
        found[key] = inner
    elif (*path, key) in leaves:
      found[key] = leaves[(*path, key)]
  return found


def _first_line(error: BaseException) -> str:
  """What went wrong; TensorStore puts the system's own words last, and its settings after them."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  line = re.split(r" \[\w+=| See full TensorStore details", line)[0]
  return line if len(line) <= 200 else f"{line[:60]} ... {line[-130:]}"


class TrainCheckpoints:
  """The checkpoints of a training run: saved in the background, atomic, the last few kept.

  Besides those, every so many-th may be kept, and the one with the best number.

  Raises:
    InputError: `folder` cannot be used.
  """

  def __init__(
    self, folder: pathlib.Path | str, *, keep: int | None, every: int = 0,
    best: str | None = None, clean: bool = True,
  ):
    """Opens the folder.

    Args:
      folder: of the checkpoints.
      keep: how many of the latest stay; None for all.
      every: the steps that are multiples of it stay; 0 for none.
      best: of the checkpoints saved with this number, the one where it is highest stays.
      clean: removes what a killed save left behind; not where another process may be saving.
    """
    _mute()
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if every:
      kept.append(policies.EveryNSteps(every))
    if best is not None:
      kept.append(policies.BestN(
        get_metric_fn=lambda numbers: numbers[best], n=1, keep_checkpoints_without_metrics=False
      ))
    self._checkpointer = ocp.training.Checkpointer(
      pathlib.Path(folder).absolute(),
      preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=clean,
    )

  @property
  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  @property
  def steps(self) -> list[int]:
    """The steps of all complete checkpoints."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def save(
    self, step: int, state: Any, record: Mapping[str, Any],
    numbers: Mapping[str, float] | None = None,
  ) -> None:
    """Saves `state` and the JSON object `record`; returns once the arrays are copied.

    Args:
      step: of the checkpoint.
      state: a tree of arrays.
      record: what else the run needs to go on.
      numbers: by which the best checkpoint is found.

    Raises:
      Storage: the previous save failed, or this one cannot start.
    """
    with _writing(self._checkpointer.directory, errors.Storage):
      # A failed save must not go unnoticed until the run needs it.
      self._checkpointer.wait()
      self._checkpointer.save_async(
        step, state, custom_metadata=dict(record), force=True,
        metrics=None if numbers is None else dict(numbers),
      )

  def record(self, step: int) -> dict[str, Any]:
    """The JSON object that was saved with `step`."""
    return dict(self._checkpointer.metadata(step).custom_metadata or {})

  def load(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
    """The state of `step`, each array straight into the sharding that `abstract` gives it.

    With `partial`, `abstract` is a mapping from names of the state's fields, and the others are not
    read.
    """
    try:
      with _context() if partial else contextlib.nullcontext():
        return self._checkpointer.load(step, abstract)
    except Exception as error:
      raise errors.InputError(
        f"{self._checkpointer.directory}: checkpoint {step} cannot be loaded "
        f"({_first_line(error)}); remove it to resume from the one before"
      ) from error

  def close(self) -> None:
    """Waits for the save under way; raises Storage if it fails."""
    with _writing(self._checkpointer.directory, errors.Storage):
      self._checkpointer.wait()
      self._checkpointer.close()
