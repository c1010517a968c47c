"""Prompts from a user's file: one a line (.txt), or GenEval's one object a line (.jsonl)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import pathlib
from typing import Any

from unigrpo_jax import errors

ENDINGS = (".txt", ".jsonl")
_EXPECTED = 'expected an object with a prompt, like {"prompt": "a red kite"}'
_JSON_KINDS = {
  dict: "an object", list: "a list", str: "text", int: "a number", float: "a number",
  bool: "true or false", type(None): "null",
}


def read(
  path: pathlib.Path, progress: Callable[[int, int], None] = lambda found, nbytes: None
) -> Iterator[tuple[str, str]]:
  """Yields (prompt, metadata as JSON) of each line that is not blank, in order.

  A .txt line is the prompt, without the space around it, and has the metadata "{}". A .jsonl line
  is an object with the key "prompt"; the object as it is, prompt included, is its metadata, or "{}"
  where it has no other key. Prompts that repeat are kept. A byte order mark and CRLF are taken.

  Args:
    path: UTF-8 file.
    progress: called after each line with the prompts and bytes read so far.

  Raises:
    InputError: the file cannot be read, has no prompts, or a line is not what it should be; the
      message has the line's number.
  """
  parse = {".txt": _parse_text, ".jsonl": _parse_json}.get(path.suffix.lower())
  if parse is None:
    raise errors.InputError(
      f"{path}: the ending {path.suffix!r} is not known; expected .txt (one prompt a line) or "
      ".jsonl (one JSON object a line)"
    )
  found, nbytes = 0, 0
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, 1):
        nbytes += len(line)
        where = f"{path}, line {number}"
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where).strip()
        if text:
          found += 1
          yield parse(text, where)
        progress(found, nbytes)
  except OSError as error:
    raise errors.InputError(f"{path}: cannot be read: {error.strerror or error}") from None
  if not found:
    raise errors.InputError(f"{path}: no prompts in it; expected one a line")


def _decode(line: bytes, where: str) -> str:
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{where}: byte {error.start + 1} is not UTF-8 text; save the file as UTF-8"
    ) from None


def _parse_text(text: str, where: str) -> tuple[str, str]:
  return text, "{}"


def _parse_json(text: str, where: str) -> tuple[str, str]:
  try:
    record = json.loads(text, parse_constant=_refuse_constant)
  # RecursionError: brackets without end. ValueError: all else, a number of 5,000 digits included.
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f"{where}: not JSON ({error}); {_EXPECTED}") from None
  if not isinstance(record, dict):
    raise errors.InputError(f"{where}: {_JSON_KINDS[type(record)]}; {_EXPECTED}")
  if "prompt" not in record:
    keys = ", ".join(record) or "none"
    raise errors.InputError(f"{where}: no key \"prompt\" (its keys: {keys[:100]}); {_EXPECTED}")
  prompt = record["prompt"]
  if not isinstance(prompt, str):
    raise errors.InputError(
      f"{where}: prompt={json.dumps(prompt)[:60]} is {_JSON_KINDS[type(prompt)]}; expected text"
    )
  if not prompt.strip():
    raise errors.InputError(f"{where}: the prompt is empty; write what to draw, or delete the line")
  metadata = json.dumps(record, ensure_ascii=False) if len(record) > 1 else "{}"
  for name, value in (("prompt", prompt), ("line", metadata)):
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise errors.InputError(
        f"{where}: the {name} holds {value[error.start]!r}, half of a character; write it whole"
      ) from None
  return prompt, metadata


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a JSON value")
