"""Reading and writing safetensors files one slice at a time.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. Parsed here and
not through the safetensors library because export has to reproduce the header byte for byte, numpy
there has no bfloat16, and a broken file has to be explained in one line.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import json
import math
import mmap
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


def parse_header(text: str, *, source: pathlib.Path | str) -> Header:
  """Parses a header; `source` is named in errors.

  Raises:
    InputError: not a safetensors header, an unknown dtype, or offsets that contradict the shapes.
  """
  try:
    raw = json.loads(text)
    if not isinstance(raw, dict):
      raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
    entries = {n: _entry(n, v, source) for n, v in raw.items() if n != "__metadata__"}
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
      # Bytes that belong to no tensor would be lost when the file is written again.
      if entry.start != end:
        raise ValueError(f"tensor {entry.name} starts at {entry.start}, the last ends at {end}")
      end = entry.stop
  except (ValueError, KeyError, TypeError) as error:
    raise errors.InputError(
      f"{source}: not a safetensors file (unreadable header: {error}); download it again"
    ) from None
  return Header(text=text, entries=entries)


def _entry(name: str, value: dict[str, Any], source: pathlib.Path | str) -> TensorEntry:
  if value["dtype"] not in DTYPES:
    raise errors.InputError(
      f"{source}: tensor {name} has dtype {value['dtype']!r}; supported: {', '.join(DTYPES)}"
    )
  dtype = DTYPES[value["dtype"]]
  shape = tuple(int(size) for size in value["shape"])
  start, stop = (int(offset) for offset in value["data_offsets"])
  if start < 0 or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"offsets [{start}, {stop}] of {name} do not fit its shape {list(shape)}")
  return TensorEntry(name=name, dtype=dtype, shape=shape, start=start, stop=stop)


class SafetensorsFile:
  """An open safetensors file; `read` copies one slice and maps nothing afterwards.

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
    # A mapped read past the end of a short file kills the process with SIGBUS: refuse it here.
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
    """Copies `tensor[index]` into memory, touching only the pages that hold it.

    The mapping is closed again before returning: file pages that stay mapped would count as this
    process's resident memory until the kernel needed them.
    """
    entry = self.entries[name]
    if entry.stop == entry.start:
      return np.empty(entry.shape, entry.dtype)[index]
    rows = slice(0, 1, 1)
    inner_bytes = entry.stop - entry.start
    if entry.shape:
      rows = slice(*index[0].indices(entry.shape[0])) if index else slice(0, entry.shape[0], 1)
      inner_bytes //= entry.shape[0]
    first = self.header.data_offset + entry.start + rows.start * inner_bytes
    length = (rows.stop - rows.start) * inner_bytes
    skip = first % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(
      self._file.fileno(), skip + length, access=mmap.ACCESS_READ, offset=first - skip
    ) as mapped:
      flat = np.frombuffer(mapped, _bits(entry.dtype), length // entry.dtype.itemsize, skip)
      shape = (rows.stop - rows.start, *entry.shape[1:]) if entry.shape else ()
      view = flat.reshape(shape)[(slice(None), *index[1:]) if index else ()]
      copy = np.array(view, order="C")
      del view, flat  # a mapping that is still viewed cannot be closed
    return copy.view(entry.dtype)

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
