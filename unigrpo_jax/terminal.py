"""Standard output and error that take whatever is printed: printing never costs work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys


def make_streams_safe() -> None:
  """From now on printing raises nothing, whatever the terminal's encoding and its reader do.

  What the encoding cannot represent is printed as an escape, such as \\u4e2d. Where the reader has
  gone (`| head`), the disk is full or the stream is closed, what is printed is dropped. Streams
  that are no file descriptors, those of a notebook, stay as they are.
  """
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:  # closed by the shell: `>&-`
      null = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
      setattr(sys, name, null)
      continue
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Descriptor):
      continue
    try:
      descriptor = _Descriptor(stream)
    except (AttributeError, OSError, ValueError):
      continue
    with contextlib.suppress(OSError):
      stream.flush()
    setattr(sys, name, io.TextIOWrapper(
      io.BufferedWriter(descriptor), encoding=stream.encoding, errors="backslashreplace",
      line_buffering=True,
    ))


class _Descriptor(io.FileIO):
  """A stream's file descriptor, whose writes do not fail: after the first that does, it is the
  null device.

  The descriptor itself is replaced, so it holds for native code and for older stream objects too.
  """

  def __init__(self, stream):
    super().__init__(stream.fileno(), "wb", closefd=False)
    self._stream = stream  # Which would close the descriptor when nothing refers to it.

  def write(self, data) -> int:
    try:
      while (written := super().write(data)) is None:  # non-blocking, and full
        select.select([], [self], [])
      return written
    except OSError as error:
      with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), self.fileno())
      if error.errno != errno.EPIPE and self.fileno() != 2:
        print(f"note: nothing more is printed ({error.strerror})", file=sys.stderr)
      return memoryview(data).nbytes


def text(argument: str) -> str:
  """A command line argument that is text, not a path: UTF-8 where the locale could not read it.

  Raises:
    ValueError: it is not UTF-8.
  """
  return argument.encode("utf-8", "surrogateescape").decode("utf-8")
