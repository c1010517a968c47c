"""Users' files of prompts as records, one a line, row or item; the files of a split in a folder.

Errors name the file and the line, row or item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import csv
import io
import math
import pathlib
import re
import sys
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import files, lines

Record = dict[str, Any]
PROMPT_KEYS = ("prompt", "Prompt", "caption", "text", "prompt_en")  # The first that is there.
_EXPECTED = 'expected an object with a prompt, like {"prompt": "a red kite"}'
_STUB = "; a Git LFS pointer or an incomplete download?"
_LICENCE = re.compile(
  r"(the )?(mit|apache|bsd|isc|mozilla public|gnu [\w ]+|creative commons[\w .-]*) licen[cs]e\b.*"
  r"|copyright (\(c\)|\u00a9|\d{4}).*|permission is hereby granted.*", re.IGNORECASE,
)
# Columns of tables whose cells are JSON.
_JSON_COLUMNS = ("include", "exclude", "points", "vqa_list", "metadata")
_DOUBLED = re.compile(r'"(?=.*"")(?:[^"]|"")*"')
_SHARD = re.compile(r"[-_.]?\d+(?:-of-(\d+))?(?:-[0-9a-f]+)?")


def read(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """Yields ("PATH, line N", record) of a file by its ending, see READERS; blank lines are none.

  Raises:
    InputError: the file cannot be read, holds nothing, or a record is malformed.
  """
  if path.suffix.lower() not in READERS:
    raise errors.InputError(
      f"{path}: the ending {path.suffix!r} is not known; expected {', '.join(READERS)}"
    )
  try:
    with path.open("rb") as file:
      head = file.read(len(errors.LFS))
  except OSError as error:
    raise errors.unreadable(
      error, path, f"{path}: cannot be read: {error.strerror or error}"
    ) from None
  if head == errors.LFS:
    raise errors.InputError(f"{path}: {errors.POINTER}")
  empty = True
  for item in READERS[path.suffix.lower()](path) if head else ():
    empty = False
    yield item
  if empty:
    raise errors.InputError(
      f"{path}: no prompts in it; expected at least one{'' if head else _STUB}"
    )


def _text(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  warned = False
  for where, text in lines.read(path):
    if not warned and _LICENCE.fullmatch(text):
      warned = True
      print(f"note: {where}: {text[:40]!r} looks like a licence; every line of a .txt file is "
            "taken for a prompt", file=sys.stderr)
    yield where, {"prompt": text}


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  for where, text in lines.read(path):
    yield where, lines.parse(text, where, _EXPECTED)


def _json_list(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  expected = "expected a list of objects; one object a line is a .jsonl file"
  items = lines.parse(decoded(path), str(path), expected, list)
  for number, item in enumerate(items, 1):
    if not isinstance(item, dict):
      raise errors.InputError(f"{path}, item {number}: {errors.shown(item)} is not an object")
    yield f"{path}, item {number}", item


def _csv(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  return _table(path, csv.reader(io.StringIO(decoded(path), newline=""), strict=True))


def _tsv(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """Quotes are what they are in PartiPrompts, but for a cell that is quoted as in a .csv file."""
  rows = csv.reader(io.StringIO(decoded(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
  return _table(path, rows, _unquoted)


def _unquoted(cell: str) -> str:
  return cell[1:-1].replace('""', '"') if _DOUBLED.fullmatch(cell) else cell


def _table(
  path: pathlib.Path, rows: Any, cell_of: Callable[[str], str] = str
) -> Iterator[tuple[str, Record]]:
  """Records of a csv.reader's rows, of which the first names the columns; empty cells are none."""
  names: list[str] = []
  try:
    for row in rows:
      where = f"{path}, line {rows.line_num}"
      cells = [cell_of(cell).strip() for cell in row]
      if not any(cells):
        continue
      if not names:
        names = cells
        prompt = next((key for key in PROMPT_KEYS if key in names), None)
        if twice := next((name for name in names if name and names.count(name) > 1), None):
          raise errors.InputError(f"{where}: the column {twice!r} is there twice")
        continue
      if len(cells) != len(names):
        raise errors.InputError(
          f"{where}: {len(cells)} cells, and the first line names {len(names)} columns"
        )
      # An empty prompt is one all the same: no other column is taken for it.
      row = {n: cell for n, cell in zip(names, cells) if n and (cell or n == prompt)}
      yield where, _columns(row, where)
  except csv.Error as error:
    raise errors.InputError(f"{path}, line {rows.line_num}: not a table ({error})") from None


def _columns(row: Record, where: str) -> Record:
  """A row of a table: cells that hold JSON are read, and those of `metadata` are columns too."""
  for name in _JSON_COLUMNS:
    if isinstance(row.get(name), str):
      expected = f"expected JSON in the column {name}"
      kind = dict if name == "metadata" else list
      row[name] = lines.parse(row[name], where, expected, kind)
  metadata = row.pop("metadata", {})
  if not isinstance(metadata, dict):
    raise errors.InputError(f"{where}: metadata={errors.shown(metadata)} must be an object")
  return {**row, **metadata, **row}


def _parquet(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """Columns that hold bytes, such as pictures, are left out; nulls are no values."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise errors.InputError(
      f"{path}: .parquet files need pyarrow; pip install 'unigrpo_jax[parquet]'"
    ) from None
  try:
    source = pyarrow.BufferReader(path.read_bytes()) if files.is_object(path) else path
    with parquet.ParquetFile(source) as file:
      names = [field.name for field in file.schema_arrow if not _has_bytes(field.type, pyarrow)]
      row, prompt = 0, next((key for key in PROMPT_KEYS if key in names), None)
      for batch in file.iter_batches(columns=names):
        for record in batch.to_pylist():
          row += 1
          where, record = f"{path}, row {row}", _plain(record)
          if prompt is not None:
            record.setdefault(prompt, "")  # As an empty cell of a table.
          yield where, _columns(record, where)
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise errors.InputError(
      f"{path}: not a readable parquet file ({errors.first_line(error)}); an incomplete download?"
    ) from None


def _has_bytes(kind: Any, pyarrow: Any) -> bool:
  """Whether a column's type is of bytes, or of what holds some."""
  if pyarrow.types.is_dictionary(kind):
    kind = kind.value_type
  return any(
    test(kind) for test in (
      pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_fixed_size_binary)
  ) or any(_has_bytes(kind.field(i).type, pyarrow) for i in range(kind.num_fields))


def _plain(value: Any) -> Any:
  """A value as JSON has it: without nulls in objects; times, decimals and UUIDs are text."""
  if isinstance(value, dict):
    plain = {key: _plain(item) for key, item in value.items()}
    return {key: item for key, item in plain.items() if item is not None}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, str | int | float):
    return value
  return str(value)


READERS: dict[str, Callable[[pathlib.Path], Iterator[tuple[str, Record]]]] = {
  ".txt": _text, ".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".tsv": _tsv,
  ".parquet": _parquet,
}


def decoded(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{path}: byte {error.start + 1} is not UTF-8 text; save the file as UTF-8"
    ) from None


def find(folder: pathlib.Path, split: str) -> Sequence[pathlib.Path]:
  """The file of a split in a folder, or the shards of it in order.

  SPLIT.txt and other endings, SPLIT_metadata.jsonl, SPLIT*.parquet, or data/SPLIT-*.parquet, of
  which numbered ones are shards of one.

  Raises:
    InputError: there is none or there are two, or a shard is missing or there twice.
  """
  if not split:
    raise errors.InputError(f"{folder}: the name of the split is empty; give one, such as train")
  found: dict[str, list[pathlib.Path]] = {}
  here = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
  data = folder / "data"
  below = sorted(data.iterdir()) if data.is_dir() else []
  for path in (*here, *(path for path in below if path.suffix == ".parquet")):
    start, _, rest = path.stem.partition(split)
    if start or (path in below and not rest.startswith("-")):
      continue
    shard = path.suffix == ".parquet" and _SHARD.fullmatch(rest)
    if shard:
      found.setdefault(f"{path.parent}/{split}*.parquet", []).append(path)
    elif not rest or path.name == f"{split}_metadata.jsonl" or (
      path.suffix == ".parquet" and not rest[0].isalpha()
    ):
      found[path.name] = [path]
  if not found:
    if any(map(any, map(folder.glob, ("dataset_info.json", "*/dataset_info.json")))):
      raise errors.InputError(
        f"{folder}: a set that unigrpo_jax.data built, not prompts to build one of; give the files "
        "that it was built of"
      )
    names = ", ".join(path.name for path in here[:8]) or "none"
    raise errors.InputError(
      f"{folder}: no file of the split {split!r}, such as {split}.txt, {split}_metadata.jsonl or "
      f"{split}-00000-of-00001.parquet (its files: {names}); name another split, or give a file"
    )
  if len(found) > 1:
    names = " and ".join(str(paths[0].relative_to(folder)) for paths in found.values())
    raise errors.InputError(f"{folder}: {names} are both the split {split!r}; give one of them")
  [paths] = found.values()
  # By number: train-10 follows train-9.
  paths.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem.removeprefix(split))])
  for path in paths:
    shard = _SHARD.fullmatch(path.stem.removeprefix(split))
    if shard and shard[1] and int(shard[1]) != len(paths):
      few = len(paths) < int(shard[1])
      raise errors.InputError(
        f"{path}: is of {int(shard[1])} files, of which {len(paths)} are there; "
        + ("download the rest" if few else "remove those of another version")
      )
  return paths
