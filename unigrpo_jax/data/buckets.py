"""Objects of Google Cloud Storage as paths, gs://BUCKET/NAME, with the methods of `pathlib.Path`.

A folder is what names have in common: it need not be made, and is gone with its last object. An
object is written as a whole or not at all. Nothing is renamed or appended to; see `atomic`.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import functools
import io
import logging
import os
import pathlib
import posixpath
import re
import types
from typing import Any

from etils import epath

from unigrpo_jax import errors

# Google advises against the first five; the others mean something to fsspec or TensorStore.
_WRONG = re.compile(r"[#\[\]*?%|\\\x00-\x1f\x7f\ud800-\udfff]")
_BUFFER_BYTES = 2**20
_SILENCE_SECONDS = 60


class ObjectPath(epath.gpath.PosixGPath):
  """A path of an object or a folder. Whatever fails is an `OSError` with the path."""

  @property
  def _backend(self) -> _Backend:
    return _backend

  @property
  def bucket(self) -> str:
    return self.parts[2]

  @property
  def key(self) -> str:
    """The name within the bucket; "" is the bucket itself."""
    return "/".join(self.parts[3:])

  def absolute(self) -> ObjectPath:
    return self

  def resolve(self, strict: bool = False) -> ObjectPath:
    """Without "..", which may lead to another bucket."""
    return self._new(f"gs://{posixpath.normpath('/'.join(self.parts[2:]))}")

  def is_symlink(self) -> bool:
    return False

  def iterdir(self) -> Iterator[ObjectPath]:
    # An empty object whose name ends in "/" stands for the folder in some programs.
    return (path for path in super().iterdir() if path != self)

  def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing."""

  def stat(self) -> Any:
    found = super().stat()
    return types.SimpleNamespace(st_size=found.length, st_mtime=found.mtime, **vars(found))

  def open(self, mode: str = "r", **options: Any) -> Any:
    if mode != "rb":
      return super().open(mode, **options)
    return io.BufferedReader(_Reader(self), _BUFFER_BYTES)

  def read_bytes(self) -> bytes:
    with _failing(self):
      return _store().cat_file(str(self))

  def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
    return self.read_bytes().decode("utf-8", errors or "strict")

  def write_bytes(self, data: bytes) -> int:
    with _failing(self):
      _store().pipe_file(str(self), data)
    return len(data)

  def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
    return self.write_bytes(data.encode("utf-8", errors or "strict"))

  def rename(self, target: ObjectPath) -> ObjectPath:
    """Copies the object, or all of a folder, one after the other, and removes the old ones."""
    with _failing(self):
      _store().mv(str(self), str(target), recursive=True)
    return target

  def upload(self, file: pathlib.Path) -> None:
    """Writes the object from a file."""
    with _failing(self):
      _store().put_file(str(file), str(self))

  def create(self, data: bytes) -> bool:
    """Writes the object unless there is one; returns whether it did."""
    with _failing(self), contextlib.suppress(FileExistsError):
      _store().pipe_file(str(self), data, mode="create")
      return True
    return False


class _Reader(io.RawIOBase):
  """Reads an object, exactly the bytes that are asked for."""

  def __init__(self, path: ObjectPath):
    self._path, self._size, self._position = path, path.stat().st_size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
    self._position = start + offset
    return self._position

  def readinto(self, buffer: Any) -> int:
    view = memoryview(buffer).cast("B")
    end = min(self._position + len(view), self._size)
    if end <= self._position:
      return 0
    with _failing(self._path):
      data = _store().cat_file(str(self._path), start=self._position, end=end)
    view[: len(data)] = data
    self._position += len(data)
    return len(data)


class _Backend:
  """What epath asks the store for, by fsspec even where TensorFlow is installed."""

  def __getattr__(self, name: str) -> Any:
    call = getattr(epath.backend.fsspec_backend, name)

    @functools.wraps(call)
    def call_store(path: Any, *arguments: Any, **options: Any) -> Any:
      with _failing(path):
        return call(path, *arguments, **options)

    return call_store


_backend = _Backend()


def _store() -> Any:
  return epath.backend.fsspec_backend.fs("gs://")


@contextlib.contextmanager
def _failing(path: Any) -> Iterator[None]:
  """Whatever the libraries raise becomes an `OSError` with its number and the path."""
  try:
    yield
  except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
    number = {
      FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST,
      IsADirectoryError: errno.EISDIR, NotADirectoryError: errno.ENOTDIR,
    }[type(error)]
    text = "no such bucket or object" if number == errno.ENOENT else os.strerror(number)
    raise OSError(number, text, str(path)) from error
  except Exception as error:
    text = errors.first_line(error, "no answer" if isinstance(error, TimeoutError) else "")
    if str(getattr(error, "code", "")) in ("401", "403") or "Forbidden" in text:
      text = f"{text}: does this need gcloud auth application-default login?"
      raise OSError(errno.EACCES, text, str(path)) from error
    raise OSError(errno.EIO, text, str(path)) from error


@functools.cache
def _prepare() -> None:
  """Before the first use: what gcsfs remembers of a folder would hide what others write there."""
  # Its way to buckets of another kind, which asks for them with credentials first.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  try:
    import aiohttp
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError:
    raise errors.InputError(
      "gs:// needs gcsfs: pip install gcsfs, or unigrpo_jax[gcs]"
    ) from None
  # After the last of its attempts it prints a trace beside the exception.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  for scheme in ("gs", "gcs"):
    options = fsspec.config.conf.setdefault(scheme, {})
    options["use_listings_cache"] = False
    # Of a connection that went dead; it is tried six times. Without it, a run would wait for ever.
    timeout = aiohttp.ClientTimeout(sock_connect=30, sock_read=_SILENCE_SECONDS)
    options.setdefault("requests_timeout", timeout)


def open_path(text: str) -> ObjectPath:
  """The path of gs://BUCKET/NAME.

  Raises:
    InputError: the name is impossible, or gcsfs is not installed.
  """
  bucket, _, name = text.removeprefix("gs://").partition("/")
  if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket) or (
    {"", ".", ".."} & set(name.rstrip("/").split("/"))
  ):
    raise errors.InputError(f"{text}: give gs://BUCKET/NAME")
  if wrong := _WRONG.search(name):
    raise errors.InputError(f"{text}: {wrong[0]!r} is not for names of objects; choose another")
  _prepare()
  return ObjectPath(text)
