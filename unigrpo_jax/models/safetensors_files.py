"""Reading and writing safetensors files one slice at a time.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. The safetensors
library has no bfloat16 for numpy, and maps whole files into memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import io
import json
import math
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from unigrpo_jax import errors

DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
# Of the format, and of no weights of BAGEL: quantised, or indices.
_OTHER_DTYPES = {
  "F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F8_E5M2",
  "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "C64",
}
# Of tensors that are left out: numbers of positions, say.
_INTEGERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # The largest that the safetensors library accepts.
_ROWS_BYTES = 16 * 2**20  # Of the whole rows that are read at once for a slice of columns.


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file; `start` is the byte offset in the file of its data."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def row_bytes(self) -> int:
    return math.prod(self.shape[1:]) * self.dtype.itemsize

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
  """An open safetensors file: `entries` {tensor name: Entry}, and `metadata` of its header or None.

  `entries` leaves the names in `ignored` out, which may be integers.

  Raises:
    InputError: the file is missing, truncated, or not in safetensors format.
  """

  def __init__(self, path: pathlib.Path, ignored: Collection[str] = ()):
    self.path, self._ignored = path, ignored
    try:
      self._file = self.path.open("rb")
    except FileNotFoundError:
      raise errors.InputError(
        f"{self.path}: file not found; a BAGEL folder must contain it"
      ) from None
    except OSError as error:
      raise errors.unreadable(
        error, self.path, f"{self.path}: cannot be read ({error.strerror})"
      ) from None
    try:
      with errors.at(str(self.path)):
        self._read_header()
    except BaseException:
      self._file.close()
      raise

  def _read_header(self) -> None:
    size = self._file.seek(0, os.SEEK_END)
    self._file.seek(0)
    head = self._file.read(len(errors.LFS))
    if head == errors.LFS:
      raise errors.InputError(errors.POINTER)
    length = int.from_bytes(head[:8], "little")
    self._file.seek(8)
    if size < 8 or length > _MAX_HEADER_BYTES:
      raise errors.InputError(
        "not a safetensors file (its first 8 bytes are not a header length); download it again"
      )
    if 8 + length > size:
      raise errors.InputError(
        f"truncated: {size} bytes, but its header ends at byte {8 + length}; download it again"
      )
    try:
      header = json.loads(self._file.read(length).decode("utf-8"))
      if not isinstance(header, dict):
        raise ValueError(f"expected a JSON object, got {type(header).__name__}")
      self.metadata = header.pop("__metadata__", None)
      self.entries, end = _parse_entries(header, 8 + length, self._ignored)
    except (ValueError, RecursionError) as error:
      raise errors.InputError(
        f"not a safetensors file (unreadable header: {error}); download it again"
      ) from None
    if size != end:
      problem = "truncated" if size < end else f"{size - end} bytes too long"
      raise errors.InputError(
        f"{problem}: {size} bytes, but its header describes {end}; download it again"
      )

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads `tensor[index]`; slices have no step.

    Rows are read at once; a slice of columns is cut out of whole rows, some of them at a time.

    Raises:
      InputError: the file became shorter since it was opened, or the disk fails.
    """
    entry = self.entries[name]
    full = tuple(slice(0, size, 1) for size in entry.shape)
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, entry.shape))
    index += full[len(index):]
    out = np.empty([max(part.stop - part.start, 0) for part in index], entry.dtype)
    if not out.size:
      return out
    first = entry.start + (index[0].start * entry.row_bytes if index else 0)
    if index[1:] == full[1:]:
      self._fill(out, first)
      return out
    step = max(_ROWS_BYTES // entry.row_bytes, 1)
    rows = np.empty([min(step, len(out)), *entry.shape[1:]], entry.dtype)
    for start in range(0, len(out), step):
      block = out[start : start + step]
      self._fill(rows[: len(block)], first + start * entry.row_bytes)
      block[...] = rows[(slice(0, len(block)), *index[1:])]
    return out

  def _fill(self, out: np.ndarray, offset: int) -> None:
    """Reads the bytes of `out`, which is contiguous, from `offset` on."""
    left = memoryview(out.reshape(-1).view(np.uint8))
    try:
      while left:
        # One call reads at most 2 GiB, and fewer bytes than asked for when a signal arrives.
        count = self._read_at(left, offset)
        if not count:
          raise errors.InputError(
            f"{self.path}: ends at byte {offset}: it became shorter while it was read"
          )
        left, offset = left[count:], offset + count
    except OSError as error:
      raise errors.unreadable(
        error, self.path, f"{self.path}: cannot be read ({error.strerror})"
      ) from None

  def _read_at(self, buffer: memoryview, offset: int) -> int:
    try:
      return os.preadv(self._file.fileno(), [buffer], offset)
    except io.UnsupportedOperation:  # An object of a bucket.
      self._file.seek(offset)
      return self._file.readinto(buffer)

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> SafetensorsFile:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _parse_entries(
  header: Mapping[str, Any], first: int, ignored: Collection[str]
) -> tuple[dict[str, Entry], int]:
  """The tensors of a header and the byte where the last ends; the data starts at byte `first`."""
  entries = {
    name: _parse_entry(name, value, first, DTYPES | _INTEGERS if name in ignored else DTYPES)
    for name, value in header.items()
  }
  end = first
  for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
    # Bytes that belong to no tensor would be lost when the file is written again.
    if entry.start != end:
      raise ValueError(
        f"tensor {name} starts at {entry.start - first}, the one before ends at {end - first}"
      )
    end += entry.nbytes
  return {name: entry for name, entry in entries.items() if name not in ignored}, end


def _parse_entry(
  name: str, value: Any, first: int, dtypes: Mapping[str, np.dtype]
) -> Entry:
  if isinstance(value, dict) and str(value.get("dtype")) in _OTHER_DTYPES - dtypes.keys():
    raise errors.InputError(
      f"tensor {name} has the dtype {value['dtype']}, as quantised checkpoints have; take one in "
      "bfloat16, float16 or float32"
    )
  try:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    entry = Entry(dtypes[dtype], shape, first + start)
    integers = all(type(size) is int and 0 <= size < 2**63 for size in (*shape, start, stop))
    if integers and stop - start == entry.nbytes:
      return entry
  except (KeyError, TypeError, ValueError, OverflowError):
    pass
  raise ValueError(
    f"tensor {name} is described by {str(value)[:120]}, not by a dtype of {', '.join(DTYPES)}, a "
    "shape and the two data_offsets that fit it"
  )


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a file is made of.

  `tensors` is {name: (dtype, shape)}. `pieces` are (name, first row, rows), which are consumed one
  at a time, cast to the tensor's dtype, and cover every tensor once. `metadata` is for the header's
  `__metadata__`, which None leaves out.
  """

  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
  pieces: Iterable[tuple[str, int, np.ndarray]]
  metadata: Any = None


def total_bytes(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> int:
  """Of the data of tensors, {name: (dtype, shape)}."""
  return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def write(path: pathlib.Path, contents: Contents) -> None:
  """Writes a file a piece at a time."""
  header = {} if contents.metadata is None else {"__metadata__": contents.metadata}
  starts, end = {}, 0
  # As the safetensors library orders them: aligned data, then names.
  for name, (dtype, shape) in sorted(
    contents.tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])
  ):
    starts[name], end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # The data starts at a multiple of eight bytes.
  first = 8 + len(text)
  missing = {name: math.prod(shape) for name, (_, shape) in contents.tensors.items()}
  with errors.storage(path), path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(first + end)
    for name, row, piece in contents.pieces:
      dtype, shape = contents.tensors[name]
      if piece.shape[1:] != shape[1:]:
        raise ValueError(f"{name}: a piece of shape {piece.shape} is no slice of {shape}")
      data = contiguous(piece).astype(dtype, copy=False)
      missing[name] -= data.size
      file.seek(first + starts[name] + row * math.prod(shape[1:]) * dtype.itemsize)
      file.write(data.reshape(-1).view(np.uint8))
    file.flush()
    # The folder is renamed into place afterwards: a power cut must not leave it with empty files.
    os.fsync(file.fileno())
  incomplete = [name for name, count in missing.items() if count]
  if incomplete:
    raise ValueError(f"not covered exactly once: {', '.join(incomplete[:10])}")


def contiguous(array: np.ndarray) -> np.ndarray:
  """`np.ascontiguousarray`, several times as fast for a transposed matrix."""
  if array.ndim != 2 or array.flags.c_contiguous:
    return np.ascontiguousarray(array)
  out = np.empty(array.shape, array.dtype)
  # Strips keep both sides of the transpose in the processor's cache.
  for start in range(0, array.shape[1], 128):
    strip = slice(start, start + 128)
    out[:, strip] = array[:, strip]
  return out
