"""Users' files of lines, text or one JSON object a line; every complaint names file and line."""

from __future__ import annotations

from collections.abc import Iterator
import json
import math
import pathlib
import re
from typing import Any

from unigrpo_jax import errors

_BYTE_ORDER_MARK = "\ufeff"
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # All but the tab.
_JSON_KINDS = {
  dict: "an object", list: "a list", str: "text", int: "a number", float: "a number",
  bool: "true or false", type(None): "null",
}


def read(path: pathlib.Path) -> Iterator[tuple[str, str, int]]:
  """Yields (place, text, bytes read so far) of every line, those that are blank included.

  The place is "PATH, line N", for messages. The text is without the space around it; a byte order
  mark and CRLF are taken.

  Raises:
    InputError: the file cannot be read, or a line is not UTF-8 text.
  """
  nbytes = 0
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        nbytes += len(line)
        where = f"{path}, line {number}"
        # Files that were put together have a mark in the middle.
        text = _decode(line, where).removeprefix(_BYTE_ORDER_MARK).strip()
        if control := _CONTROL.search(text):
          raise errors.InputError(
            f"{where}: holds the control character {control[0]!r}; save the file as UTF-8 text "
            "whose lines end in \\n"
          )
        yield where, text, nbytes
  except OSError as error:
    raise errors.InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(line: bytes, where: str) -> str:
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{where}: byte {error.start + 1} is not UTF-8 text; save the file as UTF-8"
    ) from None


def parse_object(text: str, where: str, expected: str) -> dict[str, Any]:
  """The JSON object of a line, which has a "prompt" that says something.

  Args:
    text, where: see `read`.
    expected: words for messages, such as 'expected an object like {"prompt": "a red kite"}'.

  Raises:
    InputError: it is no JSON, no object, names a key twice, holds what JSON or UTF-8 cannot, or has
      no text as its prompt.
  """
  try:
    record = json.loads(
      text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once
    )
    json.dumps(record, ensure_ascii=False).encode("utf-8")
  except UnicodeEncodeError as error:
    raise errors.InputError(
      f"{where}: holds {error.object[error.start]!r}, half of a character; write it whole"
    ) from None
  # RecursionError: brackets without end. ValueError: all else, a number of 5,000 digits included.
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f"{where}: not JSON ({error}); {expected}") from None
  if not isinstance(record, dict):
    raise errors.InputError(f"{where}: {_JSON_KINDS[type(record)]}; {expected}")
  if "prompt" not in record:
    keys = ", ".join(record) or "none"
    raise errors.InputError(f"{where}: no key \"prompt\" (its keys: {keys[:100]}); {expected}")
  check_text(record, "prompt", where)
  return record


def check_text(record: dict[str, Any], key: str, where: str) -> None:
  """Raises InputError unless `record[key]` is text that is not blank."""
  value = record[key]
  if not isinstance(value, str):
    raise errors.InputError(
      f"{where}: {key}={json.dumps(value)[:60]} is {_JSON_KINDS[type(value)]}; expected text"
    )
  if not value.strip():
    raise errors.InputError(f"{where}: the {key} is empty; write it, or delete the line")


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
  if not math.isfinite(float(digits)):
    raise ValueError(f"{digits[:20]} is too large")
  return float(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = dict(pairs)
  if len(record) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
  return record
