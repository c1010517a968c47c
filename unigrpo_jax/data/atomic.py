"""Putting finished files and folders in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import secrets
import shutil
import sys
from typing import Any

from unigrpo_jax import errors


def write(path: pathlib.Path, fill: Callable[[pathlib.Path], Any]) -> None:
  """Has `fill` write a file beside `path` that then takes its place: it is never half written."""
  with _beside(path) as partial:
    fill(partial)
    partial.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file that is at no moment half written."""
  write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def probe(path: pathlib.Path) -> None:
  """Raises InputError unless a file can be written at `path`; leaves nothing behind.

  Better now than after hours of computing what should go there.
  """
  made = []
  try:
    for folder in reversed(path.absolute().parents):
      if not folder.exists():
        folder.mkdir(exist_ok=True)
        made.append(folder)
    with _beside(path) as partial:
      partial.write_bytes(b"")
  except OSError as error:
    raise errors.InputError(f"cannot write there ({error.strerror}); give another place") from None
  finally:
    for folder in reversed(made):
      with contextlib.suppress(OSError):  # Another process uses it by now.
        folder.rmdir()


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name in the folder of `path`; what still has it in the end is removed."""
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield partial
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def replace(staged: pathlib.Path, target: pathlib.Path) -> None:
  """Renames `staged` to `target`; a folder that is there goes only once the new one stands."""
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
  shutil.rmtree(old, ignore_errors=True)  # The new one stands.
  if old.exists():
    print(f"note: {old} could not be removed whole; delete it", file=sys.stderr)
