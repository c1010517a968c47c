"""Atomic writes: finished files and folders take the place of others, never half written.

On a file system that is a rename. An object of a bucket is written whole in any case; a folder is
made in the place for temporary files, and its objects are written when it is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from typing import Any, BinaryIO

from unigrpo_jax import errors
from unigrpo_jax.data import files

_PROBE_BYTES = 2**16  # A full disk may still take a file without any.


def write(path: pathlib.Path, fill: Callable[[pathlib.Path], Any]) -> None:
  """Has `fill` write a file beside `path`, which then takes its place."""
  if files.is_object(path):
    with tempfile.TemporaryDirectory() as folder:
      fill(pathlib.Path(folder, path.name))
      path.upload(pathlib.Path(folder, path.name))
    return
  with _beside(path) as partial:
    fill(partial)
    partial.replace(path)


def write_binary(path: pathlib.Path, fill: Callable[[BinaryIO], Any]) -> None:
  """The same with an open file, whose name says nothing: numpy adds a suffix to a path's."""
  def fill_path(partial: pathlib.Path) -> None:
    with partial.open("wb") as file:
      fill(file)

  write(path, fill_path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file, UTF-8, that is at no moment half written.

  What UTF-8 has no bytes for, of file names, becomes an escape, which JSON reads back.
  """
  data = text.encode("utf-8", errors="backslashreplace")
  if files.is_object(path):
    path.write_bytes(data)
    return
  write(path, lambda partial: partial.write_bytes(data))


def probe(path: pathlib.Path) -> None:
  """Raises InputError, or Storage, unless a file can be written at `path`; leaves nothing behind.
  """
  made = []
  try:
    if files.is_object(path):
      probed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
      probed.write_bytes(bytes(_PROBE_BYTES))
      probed.unlink()
      return
    for folder in reversed(path.absolute().parents):
      if folder.is_symlink() and not folder.exists():
        raise errors.InputError(f"{folder} is a link to a place that does not exist; make it first")
      if not folder.exists():
        folder.mkdir(exist_ok=True)
        made.append(folder)
    with _beside(path) as partial:
      partial.write_bytes(bytes(_PROBE_BYTES))
  except OSError as error:
    raise errors.of_storage(error, "", "written to") from None
  finally:
    remove_empty(reversed(made))


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name in the folder of `path`; what still has it in the end is removed."""
  # Not the process id: those of containers repeat.
  partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  try:
    yield partial
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def remove_unfinished(folder: pathlib.Path) -> None:
  """Removes the files in a folder that `write` had not finished when its process was killed."""
  if files.is_object(folder) or not folder.is_dir():
    return
  for path in folder.iterdir():
    if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
      path.unlink(missing_ok=True)


def replace(staged: pathlib.Path, target: pathlib.Path) -> None:
  """Renames `staged` to `target`; an existing folder is removed only after that."""
  if not target.exists():
    staged.rename(target)
    return
  old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
  target.rename(old)
  try:
    staged.rename(target)
  except BaseException:
    old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)
  if old.exists():
    print(f"note: {old} could not be removed completely; delete it", file=sys.stderr)


def remove_leftovers(target: pathlib.Path) -> None:
  """Removes what `staging` and `replace` of killed processes left beside `target`, of which no
  other is under way; a target that was just being replaced comes back. In a bucket there is none.
  """
  target = target.resolve()
  if files.is_object(target) or not target.parent.is_dir():
    return
  left = re.compile(re.escape(target.name) + r"\.(partial|old)-[0-9a-f]{8}")
  for path in sorted(target.parent.iterdir()):
    if found := left.fullmatch(path.name):
      if found[1] == "old" and not target.exists():
        path.rename(target)
      else:
        print(f"note: removing {path}, which a killed process left", file=sys.stderr)
        _remove(path)


@contextlib.contextmanager
def staging(target: pathlib.Path, last: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """A new folder beside `target` that replaces it on success and is removed otherwise.

  Its parents are made too, and removed with it. SIGTERM and SIGHUP clean up as Ctrl-C does.
  Where `target` is of a bucket, the folder's files are written there on success, those of the names
  `last` in the end; see `files.upload`.
  """
  is_object = files.is_object(target)
  target = target.resolve()
  place = pathlib.Path(tempfile.gettempdir(), target.name) if is_object else target
  missing = [folder for folder in place.parents if not folder.exists()]
  # Not the process id: those of containers repeat.
  staged = place.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
  with _interruptible() as ignore_signals:
    try:
      with errors.storage():
        staged.mkdir(parents=True)
        yield staged
        if is_object:
          files.upload(staged, target, last)
          _remove(staged)
        else:
          replace(staged, target)
    except BaseException as error:
      # A closing terminal sends more than one signal: the second must not stop the cleaning.
      ignore_signals()
      _remove(staged)
      remove_empty(missing)
      if isinstance(error, errors.InputError):
        message = str(error).replace(str(staged), str(target))
        raise errors.reworded(error, message) from None
      raise


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
  """Makes SIGTERM and SIGHUP interrupt as SIGINT does; yields what makes all three do nothing."""

  def interrupt(number, frame):
    raise KeyboardInterrupt

  def set_all(handlers: Mapping[int, Any]) -> None:
    with contextlib.suppress(ValueError):  # Not the main thread: the process is not ours to manage.
      for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)

  before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  # What is ignored stays ignored: SIGHUP under nohup, SIGINT in a script's background job.
  before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
  set_all(dict.fromkeys(before, interrupt))
  try:
    yield lambda: set_all(dict.fromkeys(before, signal.SIG_IGN))
  finally:
    set_all(before)


def _remove(folder: pathlib.Path) -> None:
  """Removes a folder, again while a library's threads still add files to it, at most 10 s."""
  deadline, times_absent = time.monotonic() + 10, 0
  while times_absent < 3:
    if time.monotonic() > deadline:
      print(f"note: {folder} could not be removed; delete it", file=sys.stderr)
      return
    times_absent = 0 if folder.exists() else times_absent + 1
    # Unlike shutil.rmtree, this works where no more than one more file can be opened.
    for parent, names, others in os.walk(folder, topdown=False):
      with contextlib.suppress(OSError):
        for name in others:
          os.unlink(os.path.join(parent, name))
        for name in names:
          os.rmdir(os.path.join(parent, name))
    remove_empty([folder])
    time.sleep(0.1)


def remove_empty(folders: Iterator[pathlib.Path]) -> None:
  """Removes those of `folders` that are empty, one after the other."""
  for folder in folders:
    with contextlib.suppress(OSError):  # Another process uses it by now.
      folder.rmdir()
