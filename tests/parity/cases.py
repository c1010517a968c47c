"""Bookkeeping of a parity run: what was compared, how far off it was, and what nobody looked at.

A case is a group of arrays of one recording that share a tolerance. Every recorded result that no
case compares ends in a NOT COVERED line with its name, and so does what the folder's README.md
describes but the folder does not hold: nothing is skipped in silence.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

PASS, FAIL, NOT_COVERED = "PASS", "FAIL", "NOT COVERED"


class NotCovered(Exception):
  """A case that cannot be tried because the folder does not hold what it needs."""


class NoArray(NotCovered):
  """A case whose arrays the file does not hold; what it leaves uncompared is listed anyway."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """When two arrays agree: |a - b| <= absolute + relative * |b|.

  Attributes:
    absolute, relative: of the rule above.
    of_norm: |.| is the L2 norm of the whole array instead of an element.
    of_largest: |b| is that of the array's largest element.
  """

  absolute: float
  relative: float
  of_norm: bool = False
  of_largest: bool = False

  def __str__(self) -> str:
    if not self.absolute and not self.relative:
      return "exact"
    absolute = [f"{self.absolute:.0e}"] if self.absolute else []
    size = "norm" if self.of_norm else "max|b|" if self.of_largest else "|b|"
    relative = [f"{self.relative:.0e}*{size}"] if self.relative else []
    return "+".join(absolute + relative)

  def compare(self, a: np.ndarray, b: np.ndarray) -> tuple[float, float, bool]:
    """(worst |a - b|, the same over the largest |b|, whether a agrees with the recorded b)."""
    a, b = (x.astype(np.float64) for x in (a, b))
    if not a.size:
      return 0.0, 0.0, True
    difference = np.abs(a - b)
    size = np.linalg.norm(b) if self.of_norm else np.abs(b)
    size = np.max(size) if self.of_largest else size
    error = np.linalg.norm(difference) if self.of_norm else difference
    # Written so that a NaN on either side fails.
    agrees = bool(np.all(error <= self.absolute + self.relative * size))
    worst, scale = float(np.max(error)), float(np.max(size))
    return worst, worst / scale if scale else (0.0 if worst == 0 else np.inf), agrees


MODEL = Tolerance(1e-4, 1e-4)
LOOP = Tolerance(5e-4, 5e-4)
EXACT = Tolerance(0.0, 0.0)
PIXELS = Tolerance(1.0, 0.0)
GRADIENT = Tolerance(0.0, 1e-3, of_norm=True)
FORMULA = Tolerance(0.0, 1e-6)


@dataclasses.dataclass
class Line:
  """One printed case."""

  name: str
  tolerance: str = "-"
  worst_abs: float | None = None
  worst_rel: float | None = None
  result: str = PASS
  notes: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    numbers = ("-" if n is None else f"{n:.2e}" for n in (self.worst_abs, self.worst_rel))
    notes = f"  {'; '.join(self.notes)}" if self.notes else ""
    return f"{self.name}  {'  '.join(numbers)}  {self.tolerance}  {self.result}{notes}"


class Report:
  """What the cases of one file found.

  Attributes:
    name: the file's name without suffix.
    lines: the cases so far, in the order in which they were first compared.
  """

  def __init__(self, name: str):
    self.name = name
    self.lines: list[Line] = []

  def check_equal(
    self, case: str, what: str, actual: Any, expected: Any, tolerance: Tolerance
  ) -> None:
    """Compares two arrays, of which `expected` is recorded or follows from what is."""
    line = self._line(f"{self.name}/{case}", str(tolerance))
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
      line.result = FAIL
      line.notes.append(f"{what}: shape {list(actual.shape)}, recorded {list(expected.shape)}")
      return
    if expected.dtype.kind == "U":
      actual, expected = actual != expected, np.zeros(expected.shape)
    worst_abs, worst_rel, agrees = tolerance.compare(actual, expected)
    # np.fmax would let a NaN vanish behind a number.
    line.worst_abs = float(np.maximum(worst_abs, line.worst_abs or 0.0))
    line.worst_rel = float(np.maximum(worst_rel, line.worst_rel or 0.0))
    if not agrees:
      line.result = FAIL
      line.notes.append(f"{what}: {worst_abs:.2e}")

  def not_covered(self, case: str, reason: str) -> None:
    """Adds a line for what cannot be compared."""
    self.lines.append(Line(f"{self.name}/{case}", result=NOT_COVERED, notes=[reason]))

  def run(self, case: Callable[[Any, Any], None], given: Any) -> None:
    """Runs a case; what it raises becomes a line, and the other cases go on."""
    try:
      case(given, self)
    except NoArray:
      pass  # `close` lists what is described but missing, and what was left uncompared.
    except NotCovered as reason:
      self.not_covered(case.__name__, str(reason))
    except Exception as error:  # Whatever it is, it is this case's failure.
      note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      self.lines.append(Line(f"{self.name}/{case.__name__}", result=FAIL, notes=[note]))

  def _line(self, name: str, tolerance: str) -> Line:
    for line in self.lines:
      if (line.name, line.tolerance) == (name, tolerance):
        return line
    self.lines.append(Line(name, tolerance))
    return self.lines[-1]


class Recording(Report):
  """The arrays of one npz file, and which of them have been compared.

  Attributes:
    keys: names of the arrays.
  """

  def __init__(self, path: pathlib.Path, described: Iterable[str] = ()):
    """Reads a file that should hold the arrays `described`."""
    super().__init__(path.stem)
    self._described = set(described)
    self._compared: set[str] = set()
    with np.load(path, allow_pickle=False) as arrays:
      self._arrays = {key: arrays[key] for key in arrays.files}
    self.keys = list(self._arrays)

  def __contains__(self, key: str) -> bool:
    return key in self._arrays

  def __getitem__(self, key: str) -> np.ndarray:
    """An array that a case starts from. Reading a result is not comparing it."""
    if key not in self._arrays:
      raise NoArray(key)
    # The names in recordings of formulas do not tell what is given: there it is what a case reads.
    if "/" in key:
      self._compared.add(key)
    return self._arrays[key]

  def get(self, key: str, default: Any) -> Any:
    """An array that a file may do without."""
    return self._arrays.get(key, default)

  def number(self, key: str) -> Any:
    """The only element of an array, as a Python number."""
    return self[key].reshape(-1)[0].item()

  def matches(self, pattern: str) -> Iterator[re.Match[str]]:
    """Keys that match `pattern` whole, in the file's order."""
    return (m for m in map(re.compile(pattern).fullmatch, self.keys) if m)

  def check(self, case: str, key: str, actual: Any, tolerance: Tolerance) -> None:
    """Compares `actual` with the recorded array `key`, if there is one."""
    if key in self._arrays:
      self._compared.add(key)
      self.check_equal(case, key, actual, self._arrays[key], tolerance)

  def close(self) -> None:
    """Adds lines for results that no case compared, and for arrays that should be there."""
    left = [key for key in self.keys if key not in self._compared and not GIVEN.match(key)]
    if left:
      # Keys such as guard/i1/clip come by the hundred: their first part and count stand for them.
      groups = collections.Counter(f"{k.split('/')[0]}/*" if "/" in k else k for k in left)
      names = [f"{name} ({count})" if "/" in name else name for name, count in groups.items()]
      self.not_covered("rest", ", ".join(names))
    missing = sorted(self._described - set(self.keys))
    if missing:
      self.not_covered("missing", f"README.md describes {', '.join(missing)}")


# Arrays that a recording starts from, and data beside it: they need no comparison.
GIVEN = re.compile(r"in_|aux_|call\d+_\w+_noise$")


class Readme:
  """What the README.md of a folder says about its arrays: the only record of some settings."""

  def __init__(self, folder: pathlib.Path):
    path = folder / "README.md"
    self._text = path.read_text(encoding="utf-8") if path.is_file() else ""
    self._sections = dict(re.findall(r"^## (\S+)\.npz\n(.*?)(?=^## |\Z)", self._text, re.M | re.S))

  @property
  def files(self) -> set[str]:
    """The npz files it describes, in a section each or in one table."""
    listed = re.findall(r"^\| (\w+) \|", self._text, re.M)
    return {*self._sections, *listed} - {"array", "file"}

  def section(self, file: str) -> str:
    """The text on one npz file; empty where there is none."""
    return self._sections.get(file, "")

  def title(self, file: str) -> str:
    """The text on one npz file before its table of arrays."""
    return self.section(file).partition("\n|")[0]

  def arrays(self, file: str) -> list[str]:
    """The arrays it describes of one npz file."""
    return re.findall(r"^\| `([^`]+)` \|", self.section(file), re.M)

  def meaning(self, file: str, key: str) -> str:
    """The line on one array; empty where there is none."""
    found = re.search(rf"^\| `{re.escape(key)}` \|(.*)$", self.section(file), re.M)
    return found[1] if found else ""


# Cases by the npz file that they read.
CASES: dict[str, list[Callable[[Any, Recording], None]]] = {}


def case(*files: str):
  """Registers a function (folder, recording) as a case of some npz files."""

  def register(function):
    for file in files:
      CASES.setdefault(file, []).append(function)
    return function

  return register


@dataclasses.dataclass(frozen=True)
class FileCase:
  """A case of a file that is no archive of arrays: function (path, report)."""

  pattern: str
  given: tuple[str, ...]
  run: Callable[[pathlib.Path, Report], None]


FILE_CASES: list[FileCase] = []


def file_case(pattern: str, *, given: Iterable[str] = ()):
  """Registers a function (path, report) as a case of the files whose path matches `pattern`.

  Args:
    pattern: of the path below the folder, in which * matches / too.
    given: patterns of files that such cases read and that hold no result.
  """

  def register(function):
    FILE_CASES.append(FileCase(pattern, tuple(given), function))
    return function

  return register
