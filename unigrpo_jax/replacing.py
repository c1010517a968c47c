"""Putting finished files and folders in the place of others."""

from __future__ import annotations

import os
import pathlib
import shutil


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file that is at no moment half written."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def replace(staged: pathlib.Path, target: pathlib.Path) -> None:
  """Renames `staged` to `target`; a folder that is there goes only once the new one stands."""
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
