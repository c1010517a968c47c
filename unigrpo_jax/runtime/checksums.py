"""Checksums of files: those of a complete checkpoint, compared later, show that it is damaged."""

from __future__ import annotations

import json
import pathlib
import zlib

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files

FILE = "checksums.json"
# A file that is larger is known by its size, its beginning and its end, this many bytes in all: a
# checkpoint of 7B parameters has 80 GB.
_READ_BYTES = 2**24


def write(folder: pathlib.Path) -> None:
  """Writes FILE into a complete checkpoint."""
  values = {name: of(path) for name, path in _files(folder).items()}
  atomic.write_text(folder / FILE, json.dumps(values, indent=1, sort_keys=True) + "\n")


def verify(folder: pathlib.Path) -> None:
  """Compares a checkpoint with its FILE; one without, whose run was killed, is not compared.

  Raises:
    Damaged: names the first file that is missing or is not what it was.
  """
  if not any(folder.iterdir()):
    raise errors.Damaged(f"{folder} is damaged: it is empty")
  try:
    values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    expected = {str(name): (size, crc) for name, (size, crc) in values.items()}
  except FileNotFoundError:
    return
  except (AttributeError, TypeError, ValueError, RecursionError, IsADirectoryError):
    raise errors.Damaged(f"{folder} is damaged: {FILE} cannot be read") from None
  found = _files(folder)
  for name, value in expected.items():
    if name not in found:
      raise errors.Damaged(f"{folder} is damaged: {name} is missing")
    if (size := found[name].stat().st_size) != value[0]:
      raise errors.Damaged(f"{folder} is damaged: {name} has {size} bytes, not {value[0]}")
    if of(found[name]) != value:
      raise errors.Damaged(f"{folder} is damaged: the checksum of {name} is not its own")


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{name within the folder: path} of all files but FILE."""
  return {str(path.relative_to(folder)): path for path in files.tree(folder) if path.name != FILE}


def of(path: pathlib.Path) -> tuple[int, int]:
  """(size in bytes, crc32) of a file; of a large one, crc32 of its beginning and its end."""
  size = path.stat().st_size
  with path.open("rb") as file:
    if size <= _READ_BYTES:
      return size, zlib.crc32(file.read())
    first = zlib.crc32(file.read(_READ_BYTES // 2))
    file.seek(-(_READ_BYTES // 2), 2)
    return size, zlib.crc32(file.read(), first)
