"""The parameters of a converted folder: an Orbax checkpoint, written and read a slice at a time.

Orbax makes the checkpoint, with a small array for every parameter; TensorStore, the library that
Orbax stores arrays with, puts the parameters in their place and reads them. Orbax itself would hold
a parameter twice while writing it, and one of a 7B model is 3.5 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import math
import pathlib
import threading
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.models import weights
from unigrpo_jax.runtime import checkpoints

_CHUNK_BYTES = 16 * 2**20  # Small: a device of a large mesh reads little beyond its own slice.
_DATA_FILE_BYTES = 128 * 2**20  # Gathered in memory before it is written; the default is 2 GiB.
_COMMIT_BYTES = 128 * 2**20  # Of one transaction; each costs some milliseconds, however small.
_ITEM = "state"  # Under which Orbax keeps the tree in a checkpoint folder, keys joined with dots.
# Saves that overlap would signal each other's threads.
_orbax_lock = threading.Lock()
AGAIN = "convert the official folder again"


class NewArray(NamedTuple):
  """A parameter to be written in pieces of one shape; the last of an axis may be smaller."""

  shape: tuple[int, ...]
  piece: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Writer:
  """Writes parameters in pieces; a context that waits for all writes when it is left.

  Holds about two transactions in memory. Not atomic: an interrupted one leaves an incomplete
  folder, which the caller removes.

  Raises:
    InputError: a write fails.
  """

  def __init__(self, path: pathlib.Path, arrays: Mapping[weights.Path, NewArray]):
    """Makes the checkpoint folder `path` for `arrays`, which are zero until they are written."""
    self._path = path.absolute()
    checkpoints.check_name(path)
    small = {name: np.zeros(1, array.dtype) for name, array in arrays.items()}
    with checkpoints.writing(self._path):
      checkpoints.drop_lost_traces()
      with _orbax_lock:
        _uninterrupted(lambda: ocp.save(
          checkpoints.for_orbax(self._path), traverse_util.unflatten_dict(small)
        ))
      context, making = tensorstore.Context(), tensorstore.Transaction(atomic=True)
      futures = {
        name: tensorstore.open(
          _spec(self._path, name), create=True, delete_existing=True, shape=array.shape,
          dtype=array.dtype, context=context, transaction=making,
          chunk_layout=tensorstore.ChunkLayout(chunk_shape=_chunk_shape(array)),
        )
        for name, array in arrays.items()
      }
      stores = {name: future.result() for name, future in futures.items()}
      making.commit_sync()
    self._stores = {name: store.with_transaction(None) for name, store in stores.items()}
    self._transaction, self._bytes = tensorstore.Transaction(atomic=True), 0
    self._commit: tensorstore.Future | None = None

  def write(self, name: weights.Path, index: tuple[slice, ...], piece: np.ndarray) -> None:
    """Sets `parameter[index]`; may return before it is on disk."""
    with checkpoints.writing(self._path):
      store = self._stores[name].with_transaction(self._transaction)
      store[(*index, ...)].write(piece).result()
      self._bytes += piece.nbytes
      if self._bytes >= _COMMIT_BYTES:
        self._start_commit()

  def _start_commit(self) -> None:
    if self._commit is not None:
      self._commit.result()
    self._commit = self._transaction.commit_async()
    self._transaction, self._bytes = tensorstore.Transaction(atomic=True), 0

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    try:
      if kind is None:
        with checkpoints.writing(self._path):
          self._start_commit()
          self._commit.result()
    finally:
      if self._commit is not None:
        _uninterrupted(self._commit.exception)


class Reader:
  """The stored parameters of `leaves`.

  Raises:
    InputError: `path` is not a readable Orbax checkpoint, or lacks a parameter or has it in another
      shape.
  """

  def __init__(self, path: pathlib.Path, leaves: Sequence[weights.Leaf]):
    self.path, self.leaves = path.absolute(), leaves
    checkpoints.check_name(path)
    if not self.path.is_dir():
      raise errors.InputError(f"{self.path}: no such checkpoint folder; {AGAIN}")
    context = tensorstore.Context()
    futures = {
      leaf: tensorstore.open(_spec(self.path, leaf.path), open=True, read=True, context=context)
      for leaf in leaves
    }
    self._stores = {}
    for leaf, future in futures.items():
      with self._reading(leaf):
        self._stores[leaf] = future.result()
      stored = self._stores[leaf].shape
      if stored != leaf.shape:
        raise errors.InputError(
          f"{self.path}: parameter {'/'.join(leaf.path)} is stored as {list(stored)}, but "
          f"{weights.config_file(leaf.names[0])} asks for {list(leaf.shape)}; use the config that "
          "belongs to the checkpoint"
        )

  def dtype(self, leaf: weights.Leaf) -> np.dtype:
    return self._stores[leaf].dtype.numpy_dtype

  def read(
    self, leaf: weights.Leaf, index: tuple[slice | int, ...] = (), dtype: Any = None
  ) -> np.ndarray:
    """`parameter[index]`, cast to `dtype`; raises InputError if it cannot be read."""
    with self._reading(leaf):
      store = self._stores[leaf]
      if dtype is not None:
        store = tensorstore.cast(store, tensorstore.dtype(np.dtype(dtype)))
      return np.asarray(store[(*index, ...)].read().result())

  @contextlib.contextmanager
  def _reading(self, leaf: weights.Leaf) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      raise errors.unreadable(
        error, self.path,
        f"{self.path}: parameter {'/'.join(leaf.path)} cannot be read "
        f"({checkpoints.first_line(error)}); {AGAIN}",
      ) from error

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *_: object) -> None:
    self._stores.clear()


def _uninterrupted(call: Callable[[], Any]) -> None:
  """Calls in a thread, which Ctrl-C does not reach; one that comes meanwhile is raised at its end.

  However often it comes: what writes would go on adding files to a folder that is about to be
  removed.
  """
  interrupt = None
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    future = thread.submit(call)
    while not future.done():
      try:
        concurrent.futures.wait([future])
      except KeyboardInterrupt as error:
        interrupt = error
  if interrupt is not None:
    raise interrupt
  future.result()


def _spec(path: pathlib.Path, name: weights.Path) -> dict[str, Any]:
  # Not a "file://" URL, in which some characters of a name would mean something else.
  base = {"driver": "file", "path": f"{path / _ITEM}/"}
  if files.is_object(path):
    base = {"driver": "gcs", "bucket": path.bucket, "path": f"{(path / _ITEM).key}/"}
  kvstore = {
    "driver": "ocdbt", "base": base, "path": ".".join(name) + "/",
    "target_data_file_size": _DATA_FILE_BYTES,
  }
  return {"driver": "zarr3", "kvstore": kvstore}


def _chunk_shape(array: NewArray) -> tuple[int, ...]:
  """A piece with its longest sides halved until it is small, so that chunks divide pieces."""
  chunk = list(array.piece)
  while math.prod(chunk) * array.dtype.itemsize > _CHUNK_BYTES:
    longest = int(np.argmax(chunk))
    chunk[longest] = -(-chunk[longest] // 2)
  return tuple(chunk)
