"""Putting a finished folder in the place of another."""

from __future__ import annotations

import os
import pathlib
import shutil


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
