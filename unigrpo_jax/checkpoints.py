"""A thin layer over Orbax v1: trees of arrays on disk, whole, sharded, or a slice at a time.

Whole trees go through Orbax alone. A tree larger than memory is created by Orbax from the first
piece of each leaf, then grown through TensorStore, the library that Orbax stores arrays with: Orbax
itself holds a leaf twice while writing it, and one leaf of a 7B model is 3.5 GiB. What comes out is
an ordinary Orbax checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
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
  context = ocp.Context()
  saving = context.array_options.saving
  saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  # Weights are incompressible noise to zstd: it would cost minutes and save a few per cent.
  saving.use_compression = False
  saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
  context.memory_options.deepcopy_host_arrays = False
  return context


def save_tree(path: pathlib.Path | str, tree: Mapping[str, Any]) -> None:
  """Saves a tree of (sharded) arrays as an Orbax checkpoint; all processes call it together."""
  with _context():
    ocp.save(pathlib.Path(path).absolute(), tree)


def describe(path: pathlib.Path | str) -> dict[str, Any]:
  """The stored tree, its leaves `jax.ShapeDtypeStruct`s; reads no array.

  Raises:
    InputError: `path` is not a readable Orbax checkpoint.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such checkpoint folder")
  try:
    stored = ocp.metadata(path).metadata
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
  for name, wanted in _flatten(abstract):
    if name not in stored:
      raise errors.InputError(f"{path}: parameter {'/'.join(name)} {list(wanted.shape)} is missing")
    if tuple(stored[name].shape) != tuple(wanted.shape):
      raise errors.InputError(
        f"{path}: parameter {'/'.join(name)} is stored as {list(stored[name].shape)}, but its "
        f"config asks for {list(wanted.shape)}; use the config that belongs to the checkpoint"
      )
  context = _context()
  context.pytree_options.loading.partial_load = True
  try:
    with context:
      return ocp.load(path, abstract)
  except Exception as error:
    raise errors.InputError(
      f"{path}: cannot be loaded ({_first_line(error)}); convert or save it again"
    ) from error


def save_streaming(
  path: pathlib.Path | str,
  leaves: Sequence[StreamedLeaf],
  *,
  progress: Callable[[str, int], None] = lambda name, done: None,
) -> None:
  """Saves a tree that does not fit in memory; holds two pieces of a leaf at a time. One process.

  Not atomic: an interrupted save leaves an incomplete folder, which the caller removes.

  Args:
    path: a folder that does not exist yet.
    leaves: the whole tree.
    progress: called with the name of a leaf and the bytes written of it just now.

  Raises:
    InputError: a write fails.
  """
  path = pathlib.Path(path).absolute()
  batch: dict[Path, np.ndarray] = {}

  def save_batch() -> None:
    with _writing(path):
      ocp.partial.save(path, _nest(batch))
    for name, array in batch.items():
      progress("/".join(name), array.nbytes)
    batch.clear()

  with _context():
    for leaf in leaves:
      batch[leaf.path] = leaf.read(0, min(leaf.step, leaf.shape[leaf.axis]))
      # One call costs about 20 ms however little it writes.
      if sum(array.nbytes for array in batch.values()) >= _BATCH_BYTES:
        save_batch()
    if batch:
      save_batch()
    with _writing(path):
      ocp.partial.finalize(path)
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
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Turns a failed write, of whatever kind the libraries raise, into one line."""
  try:
    yield
  except Exception as error:
    raise errors.InputError(
      f"{path}: cannot be written ({_first_line(error)}); check free disk space and permissions"
    ) from error


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


def _nest(values: Mapping[Path, Any]) -> dict[str, Any]:
  root: dict[str, Any] = {}
  for path, value in values.items():
    node = root
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return root


def _flatten(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, (*path, key))
    else:
      yield (*path, key), value


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
