"""A cache of answers on disk, so that an evaluation that was killed asks only what is missing."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import json
import pathlib
import threading
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.rewards.judge import answers

MEMORY = 64 << 20  # Most bytes of lines that are kept in memory; the most recently used ones stay.


class Cache:
  """{key: reply}, in a file of JSON lines that is only appended to."""

  def __init__(self, path: pathlib.Path):
    """Opens or makes the file; lines that a kill cut off, or a disk damaged, are ignored.

    Raises:
      InputError: the file cannot be read or written.
    """
    self._lines: collections.OrderedDict[str, str] = collections.OrderedDict()
    self._bytes, self._lock = 0, threading.Lock()
    with errors.storage(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open("a+", encoding="utf-8", errors="replace")
      self._file.seek(0)
      line = "\n"
      for line in self._file:
        try:
          _reply(record := json.loads(line))
          self._remember(record["key"], line)
        except (ValueError, KeyError, TypeError, RecursionError):
          pass
      if not line.endswith("\n"):
        self._file.write("\n")

  def get(self, key: str) -> answers.Reply | None:
    """The reply of a key; None where it is not in memory."""
    with self._lock:
      line = self._lines.get(key)
      if line is None:
        return None
      self._lines.move_to_end(key)
    return _reply(json.loads(line))

  def put(self, key: str, reply: answers.Reply) -> None:
    """Stores a reply; raises InputError or its subclass Storage where it cannot be written."""
    record = {"key": key, "text": reply.text, "cut": reply.cut, "top": reply.top}
    line = json.dumps(record) + "\n"
    with self._lock, errors.storage(self._file.name):
      self._remember(key, line)
      self._file.write(line)
      self._file.flush()

  def close(self) -> None:
    with self._lock:
      self._file.close()

  def _remember(self, key: str, line: str) -> None:
    self._bytes += len(line) - len(self._lines.pop(key, ""))
    self._lines[key] = line
    while self._bytes > MEMORY:
      self._bytes -= len(self._lines.popitem(last=False)[1])


def _reply(record: Mapping[str, Any]) -> answers.Reply:
  return answers.Reply(record["text"], record["cut"], tuple(map(tuple, record["top"])))
