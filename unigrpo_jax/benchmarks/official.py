"""The files of GenEval's own scripts: folders of pictures, and results.jsonl.

Source: djghosh13/geneval, `generation/diffusers_generate.py`, `evaluation/evaluate_images.py`:

  FOLDER/00000/metadata.jsonl      metadata of prompt 0, one JSON object
  FOLDER/00000/samples/0000.png    its pictures
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import results
from unigrpo_jax.data import atomic, lines
from unigrpo_jax.geneval import rules

MODE = "images"  # of pictures whose mode is not known
_LAYOUT = "a folder like 00000 with metadata.jsonl and samples/0000.png"


def folder_of(folder: pathlib.Path, mode: str, modes: int) -> pathlib.Path:
  """The folder of a mode's pictures: `folder` itself, or a subfolder where there are several modes.
  """
  return folder if modes == 1 else folder / results.file_name(mode)


def begin(folder: pathlib.Path, prompts: Sequence[Mapping[str, Any]], samples: int) -> None:
  """Makes the folders of prompts, with their metadata, for `samples` pictures each.

  Raises:
    InputError: metadata lacks a tag, include or prompt; or the folder holds other pictures, which
      GenEval's script would judge as well.
  """
  for number, metadata in enumerate(prompts):
    for key in ("tag", "include", "prompt"):
      if key not in metadata:
        raise errors.InputError(
          f"prompt {number + 1}: its metadata has no {key!r}, so GenEval's script cannot judge it; "
          "draw --prompts_from=geneval, or of its evaluation_metadata.jsonl"
        )
  texts = [json.dumps(metadata) for metadata in prompts]
  with errors.storage(folder):
    for path in _numbered(folder):
      atomic.remove_unfinished(path / "samples")
      number, file = int(path.name), path / "metadata.jsonl"
      before = file.read_text(encoding="utf-8") if file.exists() else None
      if (
        number >= len(texts) or before not in (None, texts[number])
        or any(not _is_number(one) or int(one.stem) >= samples for one in path.glob("samples/*"))
      ):
        raise errors.InputError(
          f"--keep_official={folder}: {path} is of other prompts or pictures; give another folder, "
          "or delete it"
        )
    for number, text in enumerate(texts):
      path = folder / f"{number:05d}"
      (path / "samples").mkdir(parents=True, exist_ok=True)
      atomic.write_text(path / "metadata.jsonl", text)


def write_image(folder: pathlib.Path, number: int, k: int, image: np.ndarray) -> None:
  """Writes picture `k`, [H, W, 3] uint8, of prompt `number`."""
  results.write_picture(folder / f"{number:05d}" / "samples" / f"{k:04d}.png", image)


def read(folder: pathlib.Path) -> list[results.Row]:
  """Rows, without rewards, of the pictures in a folder or in its subfolders of modes.

  `Row.image` is relative to the folder.

  Raises:
    InputError: there are no pictures, or metadata is missing or malformed; says where.
  """
  rows = _read(folder, folder, MODE)
  if not rows:
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
      rows += _read(folder, path, path.name.replace("_guidance", " + guidance"))
  if not rows:
    raise errors.InputError(
      f"--images={folder}: neither results of unigrpo_jax.evaluate nor {_LAYOUT}"
    )
  return rows


def _read(root: pathlib.Path, folder: pathlib.Path, mode: str) -> list[results.Row]:
  rows = []
  for path in _numbered(folder):
    expected = f"expected {_LAYOUT}"
    objects = [
      (where, lines.parse_object(text, where, expected))
      for where, text in lines.read(path / "metadata.jsonl")
    ]
    if len(objects) != 1:
      raise errors.InputError(f"{path / 'metadata.jsonl'}: {len(objects)} lines; {expected}")
    [(where, metadata)] = objects
    if problem := rules.problem(metadata):
      raise errors.InputError(f"{where}: {problem}")
    pictures = [file for file in sorted(path.glob("samples/*.png")) if _is_number(file)]
    rows += [
      results.Row(
        mode, str(metadata.get("tag", "all")), metadata["prompt"], None, {},
        str(file.relative_to(root)), int(path.name), int(file.stem), metadata=metadata,
      ) for file in pictures
    ]
  return rows


def _numbered(folder: pathlib.Path) -> list[pathlib.Path]:
  """The subfolders whose names are numbers, in order; [] where there is no such folder."""
  if not folder.is_dir():
    return []
  return sorted(
    (path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()),
    key=lambda path: int(path.name),
  )


def _is_number(file: pathlib.Path) -> bool:
  return file.suffix == ".png" and re.fullmatch(r"\d+", file.stem, re.ASCII) is not None


def read_results(path: pathlib.Path) -> list[results.Row]:
  """Rows, with the reward "geneval", of a results.jsonl of GenEval's `evaluate_images.py`.

  Raises:
    InputError: a line is no object with "prompt", "tag" and "correct"; says which.
  """
  expected = "give the results.jsonl that GenEval's evaluate_images.py wrote"
  rows: list[results.Row] = []
  numbers: dict[str, int] = {}
  images: dict[int, int] = {}
  for where, text in lines.read(path):
    row = lines.parse_object(text, where, expected)
    if type(row.get("correct")) not in (bool, int, float) or not isinstance(row.get("tag"), str):
      raise errors.InputError(f"{where}: needs a text tag, and correct true or false; {expected}")
    # GenEval groups images by their whole metadata, a JSON text within the JSON.
    given = row.get("metadata", row["prompt"])
    number = numbers.setdefault(json.dumps(given, sort_keys=True), len(numbers))
    images[number] = images.get(number, -1) + 1
    details = {key: row[key] for key in ("filename", "reason", "details") if row.get(key)}
    rows.append(results.Row(
      "official", row["tag"], row["prompt"], None, {"geneval": float(row["correct"])}, None, number,
      images[number], {"geneval": details} if details else {}, {"official": given},
    ))
  if not rows:
    raise errors.InputError(f"{path}: holds no judged image")
  return rows
