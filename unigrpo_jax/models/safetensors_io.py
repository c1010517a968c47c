"""Reading and writing safetensors files one slice at a time.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. Parsed here and
not through the safetensors library because export has to reproduce the header byte for byte, numpy
there has no bfloat16, and a broken file has to be explained in one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from unigrpo_jax import errors

DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
# The largest header that the safetensors library itself accepts.
_MAX_HEADER_BYTES = 100_000_000
# Rows that are read whole for a slice of their columns, at once.
_ROWS_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class TensorEntry:
  """One tensor of a file. `start` and `stop` are byte offsets into the data section."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Header:
  """A parsed header: `text` is the exact JSON text, padding spaces included."""

  text: str
  entries: dict[str, TensorEntry]

  @property
  def data_bytes(self) -> int:
    return max((entry.stop for entry in self.entries.values()), default=0)

  @property
  def data_offset(self) -> int:
    """Byte offset of the data section in the file."""
    return 8 + len(self.text.encode("utf-8"))


def parse_header(
  text: str, *, source: pathlib.Path | str, advice: str | None = None
) -> Header:
  """Parses a header; errors name `source` and end with `advice`, unless it is to download again.

  Raises:
    InputError: not a safetensors header, an unknown dtype, or offsets that contradict the shapes.
  """
  try:
    raw = json.loads(text)
    if not isinstance(raw, dict):
      raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
    entries = {n: _entry(n, v) for n, v in raw.items() if n != "__metadata__"}
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
      # Bytes that belong to no tensor would be lost when the file is written again.
      if entry.start != end:
        raise ValueError(f"tensor {entry.name} starts at {entry.start}, the last ends at {end}")
      end = entry.stop
  except errors.InputError as error:
    raise errors.InputError(f"{source}: {error}{f'; {advice}' if advice else ''}") from None
  except (ValueError, TypeError, RecursionError) as error:
    raise errors.InputError(
      f"{source}: not a safetensors file (unreadable header: {error}); "
      f"{advice or 'download it again'}"
    ) from None
  return Header(text=text, entries=entries)


def make_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Header:
  """The header of a file that holds `tensors` (name -> dtype, shape), ordered by name."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  start, entries = 0, {}
  for name in sorted(tensors):
    dtype, shape = tensors[name]
    stop = start + math.prod(shape) * dtype.itemsize
    entries[name] = dict(dtype=names[dtype], shape=list(shape), data_offsets=[start, stop])
    start = stop
  text = json.dumps(entries, separators=(",", ":"))
  # The format asks for data that starts at a multiple of eight bytes.
  return parse_header(text + " " * (-len(text.encode()) % 8), source="a new header")


def _entry(name: str, value: Any) -> TensorEntry:
  if not isinstance(value, dict):
    raise ValueError(f"tensor {name} is described by {type(value).__name__}, not by an object")
  for key in ("dtype", "shape", "data_offsets"):
    if key not in value:
      raise ValueError(f"tensor {name} has no {key}")
  if not isinstance(value["dtype"], str):
    raise ValueError(f"tensor {name}: dtype {str(value['dtype'])[:80]} is no text")
  if value["dtype"] not in DTYPES:
    raise errors.InputError(
      f"tensor {name} has dtype {value['dtype']!r}; supported: {', '.join(DTYPES)}"
    )
  dtype = DTYPES[value["dtype"]]
  shape, offsets = (_integers(name, key, value[key]) for key in ("shape", "data_offsets"))
  if len(offsets) != 2:
    raise ValueError(f"data_offsets of {name} are {list(offsets)}, expected two")
  start, stop = offsets
  if stop - start != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"offsets [{start}, {stop}] of {name} do not fit its shape {list(shape)}")
  return TensorEntry(name=name, dtype=dtype, shape=shape, start=start, stop=stop)


def _integers(name: str, key: str, values: Any) -> tuple[int, ...]:
  if not isinstance(values, list) or not all(type(x) is int and 0 <= x < 2**63 for x in values):
    raise ValueError(f"{key} of {name} is {str(values)[:80]}, expected a list of whole numbers")
  return tuple(values)


class SafetensorsFile:
  """An open safetensors file, read a slice at a time.

  Raises:
    InputError: the file is missing, truncated, or not in safetensors format.
  """

  def __init__(self, path: pathlib.Path | str):
    self.path = pathlib.Path(path)
    try:
      self._file: BinaryIO = self.path.open("rb")
    except FileNotFoundError:
      raise errors.InputError(
        f"{self.path}: file not found; a BAGEL folder must contain it"
      ) from None
    except OSError as error:
      raise errors.InputError(f"{self.path}: cannot be read ({error.strerror})") from None
    try:
      self.header = self._read_header()
    except BaseException:
      self._file.close()
      raise

  def _read_header(self) -> Header:
    size = os.fstat(self._file.fileno()).st_size
    prefix = self._file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if length is None or length > _MAX_HEADER_BYTES:
      raise errors.InputError(
        f"{self.path}: not a safetensors file (its first 8 bytes are not a header length); "
        "download it again"
      )
    if 8 + length > size:
      raise errors.InputError(
        f"{self.path}: truncated: {size} bytes, but its header alone ends at byte {8 + length}; "
        "download it again"
      )
    try:
      text = self._file.read(length).decode("utf-8")
    except UnicodeDecodeError:
      raise errors.InputError(
        f"{self.path}: not a safetensors file (its header is not text); download it again"
      ) from None
    header = parse_header(text, source=self.path)
    expected = 8 + length + header.data_bytes
    if size < expected:
      raise errors.InputError(
        f"{self.path}: truncated: {size} bytes, but its header describes {expected}; "
        "download it again"
      )
    if size > expected:
      raise errors.InputError(
        f"{self.path}: {size - expected} bytes too long: {size} bytes, but its header describes "
        f"{expected}; download it again"
      )
    return header

  @property
  def entries(self) -> dict[str, TensorEntry]:
    return self.header.entries

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads `tensor[index]`; slices have no step.

    Rows lie together in the file and are read at once. A slice of columns is cut out of whole rows,
    some rows at a time.

    Raises:
      InputError: the file became shorter since it was opened, or the disk fails.
    """
    entry = self.entries[name]
    whole = tuple(slice(0, size, 1) for size in entry.shape)
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, entry.shape))
    index += whole[len(index):]
    out = np.empty([max(part.stop - part.start, 0) for part in index], _bits(entry.dtype))
    if not out.size:
      return out.view(entry.dtype)
    first = self.header.data_offset + entry.start
    if index[1:] == whole[1:]:
      row_bytes = out.nbytes // out.shape[0] if index else 0
      self._fill(out, first + (index[0].start * row_bytes if index else 0))
      return out.view(entry.dtype)
    row_bytes = (entry.stop - entry.start) // entry.shape[0]
    step = max(_ROWS_BYTES // row_bytes, 1)
    rows = np.empty([min(step, out.shape[0]), *entry.shape[1:]], out.dtype)
    for start in range(0, out.shape[0], step):
      block = out[start : start + step]
      self._fill(rows[: len(block)], first + (index[0].start + start) * row_bytes)
      block[...] = rows[(slice(0, len(block)), *index[1:])]
    return out.view(entry.dtype)

  def _fill(self, out: np.ndarray, offset: int) -> None:
    """Reads the bytes of `out`, which is contiguous, from `offset` on."""
    left = memoryview(out.reshape(-1).view(np.uint8))
    try:
      while left:
        # One call reads at most 2 GiB, and fewer bytes than asked for when a signal arrives.
        count = os.preadv(self._file.fileno(), [left], offset)
        if not count:
          raise errors.InputError(
            f"{self.path}: ends at byte {offset}: it became shorter while it was read"
          )
        left, offset = left[count:], offset + count
    except OSError as error:
      raise errors.InputError(f"{self.path}: cannot be read ({error.strerror})") from None

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> SafetensorsFile:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _bits(dtype: np.dtype) -> np.dtype:
  """The unsigned integer of the same size: numpy copies bfloat16 element by element."""
  return np.dtype(f"u{np.dtype(dtype).itemsize}")


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
  """`target[...] = source` for equal shapes, casting; at memory speed where nothing is cast."""
  if target.dtype == source.dtype:
    target, source = target.view(_bits(target.dtype)), source.view(_bits(source.dtype))
  target[...] = source


def contiguous(array: np.ndarray) -> np.ndarray:
  """`np.ascontiguousarray`, several times as fast for a transposed matrix."""
  if array.flags.c_contiguous:
    return array
  if array.ndim != 2 or abs(array.strides[0]) >= abs(array.strides[1]):
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out
  bits = array.view(_bits(array.dtype))
  out = np.empty(array.shape, bits.dtype)
  # Strips keep both sides of the transpose in the processor's cache.
  for start in range(0, array.shape[1], 128):
    strip = slice(start, start + 128)
    out[:, strip] = bits[:, strip]
  return out.view(array.dtype)


def write(
  path: pathlib.Path, header: Header, pieces: Iterable[tuple[str, int, np.ndarray]]
) -> None:
  """Writes `header` verbatim, then the data, each piece at the offset that the header gives it.

  Args:
    path: the file to make.
    header: describes the whole file.
    pieces: (tensor name, first row, rows of that tensor), consumed one at a time and cast to the
      header's dtype. Together they cover every tensor once.

  Raises:
    ValueError: the pieces do not cover every tensor exactly once, or have another shape.
  """
  remaining = {name: entry.stop - entry.start for name, entry in header.entries.items()}
  with pathlib.Path(path).open("wb") as file:
    text = header.text.encode("utf-8")
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(header.data_offset + header.data_bytes)
    for name, row, piece in pieces:
      entry = header.entries[name]
      if piece.shape[1:] != entry.shape[1:]:
        raise ValueError(f"{name}: a piece of shape {piece.shape} is no slice of {entry.shape}")
      data = contiguous(piece).astype(entry.dtype, copy=False)
      remaining[name] -= data.nbytes
      row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
      file.seek(header.data_offset + entry.start + row * row_bytes)
      file.write(data.reshape(-1).view(np.uint8))
    file.flush()
    # The folder is renamed into place afterwards: a power cut must not leave it with empty files.
    os.fsync(file.fileno())
  partial = sorted(name for name, count in remaining.items() if count)
  if partial:
    raise ValueError(f"{len(partial)} tensors are not covered exactly once, first {partial[0]}")
