"""Triples (picture, prompt, yes or no) in files, for training and for measuring."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files, lines
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.reward_models import learned
from unigrpo_jax.supervised import corpus

_EXPECTED = (
  'expected {"prompt": "a red kite", "image": "kite.png", "answer": "yes"}, or a pair {"prompt": '
  '"a red kite", "chosen": "a.png", "rejected": "b.png"}'
)
_KEYS = ("prompt", "image", "answer", "chosen", "rejected")
BALANCE = 0.1  # Most difference of the share of "yes" from 1/2.


@dataclasses.dataclass(frozen=True, eq=False)
class Triples:
  """N triples of M pictures of one size.

  Attributes:
    pixels: of the pictures, [M, H, W, 3] uint8.
    image: number of each triple's picture, [N] int32.
    prompt: what is asked about the picture, [N] text.
    yes: whether the right answer is yes, [N] bool.
    source: origin of the picture, a key of `world.SOURCES`, "group" or "file", [N] text.
    category: of the prompt, [N] text.
    group: number of the prompt of a policy's pictures, equal for all of them, [N] int32; -1: none.
    verbatim: the user's own words, which may be a riddle, [N] text; "": none.
  """

  pixels: np.ndarray
  image: np.ndarray
  prompt: np.ndarray
  yes: np.ndarray
  source: np.ndarray
  category: np.ndarray
  group: np.ndarray
  verbatim: np.ndarray

  def __len__(self) -> int:
    return len(self.image)

  def save(self, path: pathlib.Path) -> None:
    """Writes an .npz file atomically."""
    with errors.storage(path):
      atomic.write_binary(path, lambda file: np.savez_compressed(file, **vars(self)))

  @classmethod
  def load(cls, path: pathlib.Path) -> Triples:
    """Reads an .npz file; raises InputError where it is missing or damaged."""
    try:
      with np.load(path, allow_pickle=False) as arrays:
        return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
    except FileNotFoundError:
      raise errors.InputError(
        f"{path}: there is no such file; run the stage make first, with the same --workdir"
      ) from None
    except Exception as error:  # A damaged archive raises whatever zipfile or numpy met first.
      raise errors.InputError(
        f"{path}: not readable ({errors.first_line(error)}); delete it and run the stage make again"
      ) from None

  def balance(self) -> dict[tuple[str, str], tuple[int, int]]:
    """{(source, category): (number of triples, number of those whose answer is yes)}."""
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    for source, category, yes in zip(self.source, self.category, self.yes):
      count, positive = cells.get((str(source), str(category)), (0, 0))
      cells[str(source), str(category)] = (count + 1, positive + int(yes))
    return cells


class Collected:
  """Collects triples one by one."""

  def __init__(self):
    self._numbers: dict[Any, int] = {}  # of the pictures
    self._rows: list[tuple] = []

  def add(
    self, picture, prompt: str, yes: bool, *, source: str, category: str, group: int = -1,
    verbatim: str = "",
  ) -> None:
    """Appends a triple; fields as in `Triples`.

    `picture` has `pixels`, and must be the same object in all triples of a picture.
    """
    number = self._numbers.setdefault(picture, len(self._numbers))
    self._rows.append((number, prompt, yes, source, category, group, verbatim))

  def triples(self) -> Triples:
    """All triples so far."""
    image, prompt, yes, source, category, group, verbatim = zip(*self._rows)
    text = lambda values: np.array(values, dtype=np.str_)
    return Triples(
      np.stack([picture.pixels for picture in self._numbers]), np.array(image, np.int32),
      text(prompt), np.array(yes, bool), text(source), text(category), np.array(group, np.int32),
      text(verbatim),
    )


def learnt(triples: Triples, question: str, seed: int) -> corpus.Corpus:
  """Triples as examples of answering; every epoch has each of them once, shuffled."""
  def example(number: int) -> corpus.Example:
    image = PIL.Image.fromarray(triples.pixels[triples.image[number]])
    asked = learned.asked(question, str(triples.prompt[number]))
    return corpus.Example(asked, _answer(triples.yes[number]), source=image)

  return corpus.epochs(len(triples), example, seed)


def _rows(path: pathlib.Path) -> list[tuple[str, str, pathlib.Path, bool]]:
  """[(where, prompt, path of the picture, whether the answer is yes)]; see `read_lines`."""
  rows: list[tuple[str, str, str, bool]] = []
  for where, text in lines.read(path):
    row = lines.parse_object(text, where, _EXPECTED)
    for key in row:
      errors.choose(f"{where}: key", key, _KEYS)
      lines.check_text(row, key, where)
    match sorted(row.keys() - {"prompt"}):
      case ["answer", "image"]:
        errors.choose(f"{where}: answer", row["answer"], (learned.YES, learned.NO))
        rows.append((where, row["prompt"], row["image"], row["answer"] == learned.YES))
      case ["chosen", "rejected"]:
        rows.append((where, row["prompt"], row["chosen"], True))
        rows.append((where, row["prompt"], row["rejected"], False))
      case _:
        raise errors.InputError(f"{where}: keys {', '.join(row)}; {_EXPECTED}")
  if not rows:
    raise errors.InputError(f"{path}: is empty; {_EXPECTED}")
  for where, _, image, _ in rows:
    if not (path.parent / image).is_file():
      raise errors.InputError(
        f"{where}: image={image!r} is no file in {path.parent}; give the path of an image from "
        "there"
      )
  check_balance(str(path), [yes for *_, yes in rows])
  return [(where, prompt, path.parent / image, yes) for where, prompt, image, yes in rows]


def read_lines(
  path: pathlib.Path | str, question: str, seed: int
) -> tuple[corpus.Corpus, int]:
  """Reads examples of answering from a file of JSON lines.

  A line is {"prompt", "image", "answer": "yes" or "no"}, or a pair {"prompt", "chosen", "rejected"}
  of pictures, of which just the first one shows the prompt. Paths are relative to the file.

  Args:
    path: of the file.
    question: about a picture; contains "{prompt}".
    seed: of the order.

  Returns:
    (the examples, their number).

  Raises:
    InputError: a line is malformed, a picture is missing, or the answers are not balanced; names
      file, line and key. Later the corpus raises it for a picture that cannot be read.
  """
  rows = _rows(files.path(path))
  for where, prompt, *_ in rows:
    with errors.at(where):
      learned.asked(question, prompt)

  def example(number: int) -> corpus.Example:
    where, prompt, image, yes = rows[number]
    with errors.at(where):
      picture = images_lib.load_rgb(image)
    asked = learned.asked(question, prompt)
    return corpus.Example(asked, _answer(yes), source=picture, where=where)

  return corpus.epochs(len(rows), example, seed), len(rows)


def load_lines(path: pathlib.Path | str) -> Triples:
  """Reads a file of JSON lines as triples to measure on; see `read_lines`.

  Raises:
    InputError: as in `read_lines`; or pictures, which are scored in batches, differ in size.
  """
  rows, pixels = _rows(files.path(path)), []
  for where, _, image, _ in rows:
    with errors.at(where):
      pixels.append(np.asarray(images_lib.load_rgb(image)))
    if pixels[-1].shape != pixels[0].shape:
      sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (pixels[-1], pixels[0])]
      raise errors.InputError(
        f"{where}: {image} has {sizes[0]} pixels, the first picture {sizes[1]}; give pictures of "
        "one size to measure on"
      )
  count, text = len(rows), lambda value: np.array([value] * len(rows), dtype=np.str_)
  return Triples(
    np.stack(pixels), np.arange(count, dtype=np.int32),
    np.array([prompt for _, prompt, *_ in rows], dtype=np.str_),
    np.array([yes for *_, yes in rows], bool), text("file"), text("all"),
    np.full(count, -1, np.int32), text(""),
  )


def check_balance(where: str, yes: Sequence[bool]) -> None:
  """Raises InputError if one answer is much more frequent: a model would learn to guess it."""
  share = float(np.mean(yes))
  if abs(share - 0.5) > BALANCE:
    raise errors.InputError(
      f"{where}: {share:.0%} of its {len(yes)} answers are yes, which must be half of them, give "
      f"or take {BALANCE:.0%}; leave some out, or add pictures of the other kind"
    )


def _answer(yes: bool) -> str:
  return learned.YES if yes else learned.NO
