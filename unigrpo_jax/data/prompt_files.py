"""Prompts from a user's file: one a line (.txt), or GenEval's one object a line (.jsonl)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import pathlib

from unigrpo_jax import errors
from unigrpo_jax.data import lines
from unigrpo_jax.iconworld import geneval

ENDINGS = (".txt", ".jsonl")
_EXPECTED = 'expected an object with a prompt, like {"prompt": "a red kite"}'


def read(
  path: pathlib.Path, progress: Callable[[int, int], None] = lambda found, nbytes: None
) -> Iterator[tuple[str, str]]:
  """Yields (prompt, metadata as JSON) of each line that is not blank, in order.

  A .txt line is the prompt, without the space around it, and has the metadata "{}". A .jsonl line
  is an object with the key "prompt"; the object as it is, prompt included, is its metadata, or "{}"
  where it has no other key. What it includes and excludes must be in GenEval's format, whatever the
  classes. Prompts that repeat are kept. A byte order mark and CRLF are taken.

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
  found = 0
  for where, text, nbytes in lines.read(path):
    if text:
      found += 1
      yield parse(text, where)
    progress(found, nbytes)
  if not found:
    raise errors.InputError(f"{path}: no prompts in it; expected one a line")


def _parse_text(text: str, where: str) -> tuple[str, str]:
  return text, "{}"


def _parse_json(text: str, where: str) -> tuple[str, str]:
  record = lines.parse_object(text, where, _EXPECTED)
  if problem := geneval.problem(record):
    raise errors.InputError(f"{where}: {problem}")
  return record["prompt"], json.dumps(record, ensure_ascii=False) if len(record) > 1 else "{}"
