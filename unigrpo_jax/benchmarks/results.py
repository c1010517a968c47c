"""Results of an evaluation: rows, pictures and tables; and their files, also while it runs.

This module does not import jax, so that existing pictures can be scored without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import contact_sheet, intervals, markdown
from unigrpo_jax.data import atomic, files
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.runtime import panels

FINISHED, UNFINISHED, SHEET = "results.json", "unfinished.jsonl", "contact.png"
ON_SHEET = 24  # prompts on the contact sheet
_PICTURE = re.compile(r"(plain|think|given)(_guidance)?_\d{5,}(_\d+)?\.png")


def file_name(mode: str) -> str:
  """The name of a mode in names of files and folders."""
  return mode.replace(" + ", "_")


# What the members of a row are in a file.
_KINDS = {
  "mode": str, "category": str, "prompt": str, "text": str | None, "rewards": dict,
  "image": str | None, "number": int | None, "k": int, "details": dict, "metadata": dict,
}


@dataclasses.dataclass
class Row:
  """One image of a prompt, drawn in one mode.

  Attributes:
    mode: name of the mode.
    category: of the prompt; a column of the tables.
    prompt: what was drawn.
    text: the reasoning; None without one.
    rewards: {reward: score}, without rewards that could not score the image.
    image: path of the picture in the saved folder; None where it is not saved.
    number: of the prompt, from 0; None where each row has a prompt of its own.
    k: number of the image among the prompt's images, from 0.
    details: {reward: `rewards.Scores.detail`}, of rewards that have details.
    metadata: of the prompt.
  """

  mode: str
  category: str
  prompt: str
  text: str | None
  rewards: dict[str, float]
  image: str | None
  number: int | None = None
  k: int = 0
  details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def key(self) -> Hashable:
    """Identifies the prompt: equal for all its images, also if the prompt set repeats it.

    Images with equal keys are not independent; see `intervals`.
    """
    if self.number is None:
      return id(self)
    return intervals.prompt_key(self.prompt, self.metadata)


# Called after each batch with its rows and samples, on all hosts with those of all hosts.
Observe = Callable[[Sequence[Row], Sequence[rewards.Sample]], None]


def details_of(scores: Mapping[str, rewards.Scores], row: int) -> dict[str, dict[str, Any]]:
  """{reward: `rewards.Scores.detail`} of sample number `row`, of the rewards that have details."""
  return {name: detail for name, part in scores.items() if (detail := part.detail(row))}


def scored(rows: Sequence[Row], scores: Mapping[str, np.ndarray], details) -> list[Row]:
  """The rows with their scores and details.

  Args:
    rows: without scores.
    scores: {reward: [rows] float}; NaN where a reward could not score a row.
    details: of each row, `Row.details`.

  Raises:
    InputError: a score is infinite.
  """
  made = []
  for place, row in enumerate(rows):
    values = {name: float(column[place]) for name, column in scores.items()}
    for name, value in values.items():
      if math.isinf(value):
        raise errors.InputError(f"reward {name} of {row.prompt!r} is {value}")
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    made.append(dataclasses.replace(row, rewards=values, details=details[place]))
  return made


class Pictures(MutableMapping):
  """{path in a folder: picture [H, W, 3] uint8}, kept as PNG files rather than in memory.

  Setting an item writes its file; looking it up reads the file.
  """

  def __init__(self, folder: pathlib.Path | None, names: Sequence[str] = ()):
    """`folder`: None writes nothing (other hosts than the first); `names`: files already there."""
    self.folder, self._names = folder, dict.fromkeys(names)

  def __setitem__(self, name: str, image: np.ndarray) -> None:
    self._names[name] = None
    if self.folder is not None:
      write_picture(self.folder / name, image)

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    return read_picture(self.folder / name)

  def __delitem__(self, name: str) -> None:
    del self._names[name]

  def __contains__(self, name) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def write_picture(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes a picture, [H, W, 3] uint8, as a PNG file; makes missing folders."""
  picture = PIL.Image.fromarray(image)
  with errors.storage(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda aside: picture.save(aside, format="PNG"))


def read_picture(path: pathlib.Path) -> np.ndarray:
  """The picture in a file, [H, W, 3] uint8; raises InputError where it cannot be read."""
  return np.array(images_lib.load_rgb(path))


class Results:
  """The rows of an evaluation, mode by mode, and the saved pictures.

  Attributes:
    rows: see `Row`.
    images: {`Row.image`: [H, W, 3] uint8}.
  """

  def __init__(self, rows: Sequence[Row], images: Mapping[str, np.ndarray]):
    self.rows, self.images = list(rows), images

  @property
  def modes(self) -> list[str]:
    return list(dict.fromkeys(row.mode for row in self.rows))

  @property
  def rewards(self) -> list[str]:
    return list(dict.fromkeys(name for row in self.rows for name in row.rewards))

  def mean(self, mode: Any, reward: str) -> float:
    """Mean of a reward over the prompts of a mode that have it; NaN where none has."""
    return self.interval(mode, reward)[0]

  def interval(self, mode: Any, reward: str) -> tuple[float, float, float]:
    """(mean, low, high) of a reward over the prompts of a mode; see `intervals.interval`.

    `mode` is the name of a mode, or an `evaluation.Mode`.
    """
    return intervals.interval(self._scores(mode, reward))

  def _scores(self, mode: Any, reward: str, category: str | None = None) -> list[float]:
    """The mean over its images of each prompt, of one category or (None) of all."""
    name = getattr(mode, "name", mode)
    found = [
      (row.rewards[reward], row.key) for row in self.rows
      if row.mode == name and reward in row.rewards and category in (None, row.category)
    ]
    return list(intervals.prompt_means(*zip(*found)).values()) if found else []

  def panels(self, count: int) -> list[panels.Panel]:
    """Panels of the first `count` prompts that have saved pictures, for a log."""
    prompts = contact_sheet.by_prompt(self.rows, self.images)[:count]
    return [contact_sheet.panel(rows, self.images) for rows in prompts]

  def table(self, reward: str) -> str:
    """Markdown: one line per mode; the mean of each category, and of all with its interval."""
    rows = [row for row in self.rows if reward in row.rewards]
    categories = list(dict.fromkeys(row.category for row in rows))
    categories = [] if len(categories) < 2 else categories
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
      cells = [self._scores(mode, reward, category) for category in categories]
      mean, low, high = self.interval(mode, reward)
      lines.append([
        mode, *[f"{np.mean(scores):z.2f}" if scores else "" for scores in cells], f"{mean:z.3f}",
        "" if math.isnan(low) else f"{low:z.3f} to {high:z.3f}",
        str(len(self._scores(mode, reward))),
      ])
    return markdown.table([reward, *categories, "all", "95 %", "prompts"], lines) + "\n"

  def save(
    self, folder: pathlib.Path | str, title: str, *, about: Mapping[str, Any] | None = None,
    tables: Sequence[str] | None = None,
  ) -> None:
    """Writes results.json, results.md, images/*.png and contact.png; replaces older ones.

    Args:
      folder: where to; made if it is missing.
      title: heading of results.md and of the contact sheet.
      about: further members of results.json.
      tables: Markdown tables of results.md; None: `table` of each reward.

    Raises:
      InputError: the folder cannot be written to; its subclass Storage where trying again may help.
    """
    folder = files.path(folder)
    record = {"title": title, "modes": self.modes, **(about or {})}
    record["rows"] = [dataclasses.asdict(row) for row in self.rows]
    tables = list(map(self.table, self.rewards)) if tables is None else tables
    shown = [row for row in self.rows if not row.k and (row.number or 0) < ON_SHEET]
    with errors.storage(folder):
      older = older_pictures(folder)
      if not (isinstance(self.images, Pictures) and self.images.folder == folder):
        Pictures(folder).update(self.images)
      kept = {folder / name for name in self.images}
      if any(row.image in self.images for row in shown):
        sheet = contact_sheet.draw(title, shown, self.images)
        atomic.write(folder / SHEET, lambda aside: sheet.save(aside, format="PNG"))
        kept.add(folder / SHEET)
      folder.mkdir(parents=True, exist_ok=True)
      atomic.write_text(folder / "results.md", "\n".join([f"# {title}\n", *tables]))
      atomic.write_text(
        folder / FINISHED, json.dumps(record, indent=1, ensure_ascii=False) + "\n"
      )
      for path in older - kept:
        path.unlink(missing_ok=True)


def older_pictures(folder: pathlib.Path) -> set[pathlib.Path]:
  """Files of the pictures and the contact sheet that an earlier evaluation saved in a folder."""
  if not (folder / FINISHED).exists():
    return set()
  pictures = {path for path in folder.glob("images/*.png") if _PICTURE.fullmatch(path.name)}
  return pictures | {folder / SHEET}


class Unfinished:
  """The rows of an evaluation that is still running, in FOLDER/unfinished.jsonl.

  The first line identifies the evaluation. Every further line has the rows of one batch, and is
  written after its pictures. So after a kill, only the batch that was being drawn is lost.

  Attributes:
    rows: of the batches that an interrupted run of the same evaluation finished.
  """

  def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
    """Reads what an interrupted run left.

    Args:
      folder: of the evaluation.
      about: what identifies the evaluation, as JSON.

    Raises:
      InputError: the folder holds an unfinished evaluation with another `about`.
    """
    self._folder, self._path = folder, folder / UNFINISHED
    self._about = json.loads(json.dumps(about))
    before, self._batches = _read_unfinished(self._path)
    self.rows = [row for batch in self._batches for row in batch]
    for key in self._about | before if self._batches else ():
      if before.get(key) != self._about.get(key):
        raise errors.InputError(
          f"--out={folder} holds an unfinished evaluation of {key}="
          f"{errors.shown(before.get(key))}, not {errors.shown(self._about.get(key))}: end it with "
          f"the flags that it began with, give another --out, or delete {self._path}"
        )

  def begin(self) -> None:
    """Writes the file anew with the batches so far, without a line that a kill cut off."""
    with errors.storage(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      atomic.remove_unfinished(self._folder / "images")
      lines = [json.dumps(self._about, ensure_ascii=False), *map(_line, self._batches)]
      atomic.write_text(self._path, "".join(f"{line}\n" for line in lines))

  def add(self, rows: Sequence[Row]) -> None:
    """Appends the rows of a batch; removes the results of an older evaluation, if there are any."""
    with errors.storage(self._folder):
      for name in (FINISHED, "results.md", "benchmarks.json"):
        (self._folder / name).unlink(missing_ok=True)
      files.append_text(self._path, _line(rows) + "\n")

  def end(self) -> None:
    """Deletes the file; to be called after the results were saved."""
    with errors.storage(self._folder):
      self._path.unlink(missing_ok=True)


def _line(rows: Sequence[Row]) -> str:
  """A batch as a line of UNFINISHED."""
  return json.dumps([dataclasses.asdict(row) for row in rows], ensure_ascii=False)


def _row(values: Mapping[str, Any]) -> Row:
  """A row of a file; raises TypeError where a member is of another kind."""
  row = Row(**values)
  for name, kind in _KINDS.items():
    if not isinstance(getattr(row, name), kind):
      raise TypeError(f"a row has {name}={errors.shown(getattr(row, name))}")
  for name, value in row.rewards.items():
    if not isinstance(value, int | float):
      raise TypeError(f"a row has the reward {name}={errors.shown(value)}")
  return row


def _read_unfinished(path: pathlib.Path) -> tuple[dict[str, Any], list[list[Row]]]:
  """(what identifies the evaluation, rows of each batch) of a file; ({}, []) without one."""
  if not path.exists():
    return {}, []
  with errors.storage(path, "read"):
    text = path.read_text(encoding="utf-8", errors="replace")
  whole = text.split("\n")[:-1]  # What follows the last end of a line was cut off by a kill.
  try:
    about, *batches = [json.loads(line) for line in whole] or [{}]
    return dict(about), [[_row(row) for row in batch] for batch in batches]
  except (ValueError, TypeError, RecursionError):
    raise errors.InputError(f"{path}: damaged; delete it to begin the evaluation anew") from None


def is_finished(
  folder: pathlib.Path, about: Mapping[str, Any], names: Sequence[str], modes: Sequence[str]
) -> bool:
  """Whether a folder holds this evaluation, finished, and with every score.

  Args:
    folder: of the evaluation.
    about: what identifies it, as JSON.
    names, modes: rewards that every row of these modes should have.

  Raises:
    InputError: it holds the results of another evaluation.
  """
  # Of both files the unfinished one is newer: a kill came before it could be deleted.
  if not (folder / FINISHED).exists() or (folder / UNFINISHED).exists():
    return False
  before, rows = read(folder)
  for key, value in json.loads(json.dumps(about)).items():
    if before.get(key) != value:
      raise errors.InputError(
        f"--out={folder} holds a finished evaluation of {key}={errors.shown(before.get(key))}, not "
        f"{errors.shown(value)}; give another --out, or --overwrite"
      )
  return all(name in row.rewards for row in rows if row.mode in modes for name in names)


def of_run(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """{step: folder} of the evaluations that a run saved, in order."""
  places = (workdir / "evaluations").glob("*")
  return dict(sorted((int(place.name), place) for place in places if place.name.isdecimal()))


def read(folder: pathlib.Path) -> tuple[dict[str, Any], list[Row]] | None:
  """Reads the results in a folder, finished or not.

  Returns:
    (members of results.json without its rows, rows); None where the folder holds no evaluation.

  Raises:
    InputError: the file is damaged.
  """
  path = folder / FINISHED
  if not path.exists():
    about, batches = _read_unfinished(folder / UNFINISHED)
    return (about, [row for batch in batches for row in batch]) if batches else None
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    return record, [_row(row) for row in record.pop("rows")]
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise errors.InputError(
      f"{path}: not the results of an evaluation ({errors.first_line(error)})"
    ) from None
