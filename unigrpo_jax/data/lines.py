"""Users' files of lines, text or one JSON object a line; errors name the file and the line."""

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


def read(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields ("PATH, line N", stripped text) of every line that is not blank.

  A byte order mark and CRLF are accepted.

  Raises:
    InputError: the file cannot be read, or a line is not UTF-8 text.
  """
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        # Concatenated files have a byte order mark in the middle.
        text = line.decode("utf-8").removeprefix(_BYTE_ORDER_MARK).strip()
        if control := _CONTROL.search(text):
          raise errors.InputError(
            f"{where}: holds the control character {control[0]!r}; save the file as UTF-8 text "
            "whose lines end in \\n"
          )
        if text:
          yield where, text
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{where}: byte {error.start + 1} is not UTF-8 text; save the file as UTF-8"
    ) from None
  except OSError as error:
    raise errors.unreadable(
      error, path, f"{path}: cannot be read: {error.strerror or error}"
    ) from None


def parse(text: str, where: str, expected: str, kind: type = dict) -> Any:
  """A JSON object, or what else `kind` is: list.

  Raises:
    InputError: it is not JSON or of another kind, has a key twice, or holds a value that JSON or
      UTF-8 cannot represent. The message ends in `expected`.
  """
  try:
    value = json.loads(
      text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique_keys
    )
    json.dumps(value, ensure_ascii=False).encode("utf-8")
  except UnicodeEncodeError as error:
    raise errors.InputError(
      f"{where}: holds {error.object[error.start]!r}, half of a surrogate pair; write both halves"
    ) from None
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f"{where}: not JSON ({error}); {expected}") from None
  if not isinstance(value, kind):
    name = "an object" if kind is dict else "a list"
    raise errors.InputError(f"{where}: {text[:60]} is not {name}; {expected}")
  return value


def parse_object(text: str, where: str, expected: str) -> dict[str, Any]:
  """The JSON object of a line, see `read`; its "prompt" is text that is not blank.

  Raises:
    InputError: see `parse`; or its prompt is not text.
  """
  record = parse(text, where, expected)
  check_prompt(record, "prompt", where, expected)
  return record


def check_prompt(record: dict[str, Any], key: str, where: str, expected: str) -> None:
  """Raises InputError unless `record[key]` is there, and text that is not blank."""
  if key not in record:
    keys = ", ".join(map(str, record)) or "none"
    raise errors.InputError(f"{where}: no key \"{key}\" (its keys: {keys[:100]}); {expected}")
  check_text(record, key, where)


def check_text(record: dict[str, Any], key: str, where: str) -> None:
  """Raises InputError unless `record[key]` is text that is not blank."""
  value = record[key]
  if not isinstance(value, str):
    raise errors.InputError(f"{where}: {key}={json.dumps(value)[:60]} must be text")
  if not value.strip():
    raise errors.InputError(f"{where}: the {key} is empty; write it, or delete the line")


def _finite(text: str) -> float:
  if not math.isfinite(float(text)):
    raise ValueError(f"{text[:20]} is not a finite number")
  return float(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = {}
  for key, value in pairs:
    if key in record:
      raise ValueError(f"the key {key!r} is there twice")
    record[key] = value
  return record
