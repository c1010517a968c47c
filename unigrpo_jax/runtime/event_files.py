"""TensorBoard's event files, written so that a full disk is an error and not a wait without end."""

from __future__ import annotations

import io
import pathlib
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import files

# An object is written anew as a whole for each row, so a long run has one after the other.
OBJECT_BYTES = 1 << 22
_PREFIX = "unigrpo"  # Of a file's name for tensorboardX, which chooses by it who writes the file.


class EventFile:
  """A file that tensorboardX's thread writes to.

  An error would end that thread, and the run would wait for it for ever. So it is kept here.
  """

  def __init__(self, path: pathlib.Path):
    self._path, self._failed, self._is_object = path, None, files.is_object(path)
    self._first, self._objects = path, 1
    self._file = io.BytesIO() if self._is_object else path.open("wb")

  def write(self, data: bytes) -> None:
    self._attempt(self._file.write, data)

  def flush(self) -> None:
    if self._is_object:
      self._attempt(self._path.write_bytes, self._file.getvalue())
      if self._file.tell() > OBJECT_BYTES:
        # TensorBoard reads the files of a folder in the order of their names.
        self._path = self._first.with_name(f"{self._first.name}.{self._objects:06d}")
        self._file, self._objects = io.BytesIO(), self._objects + 1
    self._attempt(self._file.flush)

  def close(self) -> None:
    self._attempt(self._file.close)

  def _attempt(self, call: Any, *arguments: bytes) -> None:
    try:
      if self._failed is None:
        call(*arguments)
    except OSError as error:
      self._failed = error

  def raise_failed(self) -> None:
    """Raises InputError, or Storage where trying again may help, if a write failed."""
    if self._failed is not None:
      raise errors.of_storage(self._failed, self._path, "written")


class EventFiles(list[EventFile]):
  """The event files of a writer of tensorboardX; what tensorboardX asks for them."""

  def directory_check(self, name: str) -> None:
    _path(name).mkdir(parents=True, exist_ok=True)

  def open(self, name: str) -> EventFile:
    self.append(EventFile(_path(name)))
    return self[-1]


def _path(name: str) -> pathlib.Path:
  return files.path(name.removeprefix(f"{_PREFIX}:"))


def open_board(library: Any, folder: pathlib.Path, purge_step: int) -> tuple[Any, EventFiles]:
  """tensorboardX's writer into `folder`, and its files.

  Args:
    library: tensorboardX.
    folder: for the files.
    purge_step: TensorBoard hides older events from it on.

  Raises:
    InputError: the folder cannot be written to; or Storage.
  """
  opened = EventFiles()
  library.record_writer.register_writer_factory(_PREFIX, opened)
  with errors.storage(folder):
    logdir = f"{_PREFIX}:{folder.absolute()}"
    return library.SummaryWriter(logdir=logdir, purge_step=purge_step), opened
