"""Paths that users give: of a file system, or of an object store, gs://BUCKET/NAME."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
import os
import pathlib
import re
import shutil
import tempfile

from unigrpo_jax import errors

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def path(name: str | os.PathLike) -> pathlib.Path:
  """The path of a name, of which "~/" is the user's home, as shells have it after a space, but not
  in --flag=~/name; of gs:// one with the same methods, see `buckets.ObjectPath`.

  Raises:
    InputError: it is empty, of another object store, impossible, or gcsfs is not installed.
  """
  if not isinstance(name, str):
    return name
  if not name:
    raise errors.InputError("the path is empty; give one, or . for the current folder")
  scheme = _SCHEME.match(name)
  if scheme is None:
    path = pathlib.Path(name)
    return path.expanduser() if path.parts[:1] == ("~",) else path
  if scheme[1] != "gs":
    raise errors.InputError(f"{name}: of object stores, gs:// is supported; give such a path")
  from unigrpo_jax.data import buckets  # Of what it imports, most need nothing.

  return buckets.open_path(name)


def local_path(name: str) -> pathlib.Path:
  """The path of a name of a file system; raises InputError for gs:// and others."""
  if _SCHEME.match(name):
    raise errors.InputError(f"{name}: only files and folders of this machine can be given here")
  return path(name)


def is_object(path: pathlib.Path) -> bool:
  """Whether a path is of an object store, where nothing is renamed or appended to."""
  return not isinstance(path, pathlib.Path)


def append_text(path: pathlib.Path, text: str) -> None:
  """Adds to the end of a text file; an object is written anew."""
  if is_object(path):
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(before + text, encoding="utf-8")
    return
  with path.open("a", encoding="utf-8") as file:
    file.write(text)


def tree(folder: pathlib.Path) -> Iterable[pathlib.Path]:
  """All files in a folder and its folders, in no order."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from tree(path)
    else:
      yield path


def local_copy(folder: pathlib.Path, leave_out: Iterable[str] = ()) -> pathlib.Path:
  """`folder` where libraries read files only: itself, or a copy of the objects right in it.

  Args:
    folder: any.
    leave_out: names that are not copied.

  Raises:
    InputError: it cannot be read; Storage where trying again may help.
  """
  if not is_object(folder):
    return folder
  copy = pathlib.Path(tempfile.mkdtemp(prefix="unigrpo_jax."))
  atexit.register(shutil.rmtree, copy, ignore_errors=True)
  with errors.storage(did="read"):
    for source in folder.iterdir():
      if source.name not in leave_out and source.is_file():
        (copy / source.name).write_bytes(source.read_bytes())
  return copy


def upload(folder: pathlib.Path, target: pathlib.Path, last: Iterable[str] = ()) -> None:
  """Writes the files of a folder as objects of `target`, and removes what else that has.

  Args:
    folder: of a file system.
    target: of an object store.
    last: names of files that tell others what the target is: they are removed first and written
      last, so that an incomplete one is not taken for a whole.
  """
  files = {str(file.relative_to(folder)): file for file in tree(folder)}
  before = {}
  if target.is_dir():
    before = {str(path.relative_to(target)): path for path in tree(target)}
  for name in sorted(before.keys(), key=lambda name: name not in last):
    if name in last or name not in files:
      before[name].unlink(missing_ok=True)
  for name in sorted(files, key=lambda name: name in last):
    (target / name).upload(files[name])
