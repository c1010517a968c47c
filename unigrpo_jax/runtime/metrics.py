"""Metrics of a run, for a file, TensorBoard or W&B; seconds by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files
from unigrpo_jax.runtime import event_files, panels

WRITERS = ("jsonl", "tensorboard", "wandb")
_SECRET = re.compile(r"(token|password|secret|api_?key)$", re.IGNORECASE)


def without_secrets(tree: Any, name: str = "") -> Any:
  """A config, nested mappings, to publish: tokens, passwords and keys in it are "(hidden)"."""
  if isinstance(tree, Mapping):
    return {key: without_secrets(value, str(key)) for key, value in tree.items()}
  return "(hidden)" if tree and _SECRET.search(name) else tree


class MetricsLog:
  """Writes rows of metrics to those of WRITERS that are named.

  A step may have several rows: that of the training step, and one of an evaluation after it.
  """

  def __init__(
    self, names: Sequence[str], workdir: pathlib.Path, run_id: str, config: Mapping[str, Any], *,
    first_step: int = 0,
  ):
    """Opens the writers in `workdir`; on a pod, name them on one host only.

    A resumption has the run's `run_id`, and as `first_step` that of its checkpoint: rows of later
    steps are dropped. W&B cannot drop any: it ignores those that the run writes again.

    Raises:
      InputError: an unknown name, or one whose library is not installed; or the folder cannot be
        written to, Storage where trying again may help.
    """
    for name in names:
      errors.choose("metrics writer", name, WRITERS)
    self._path = self._board = self._wandb = None
    if "jsonl" in names:
      self._path = workdir / "metrics.jsonl"
      _drop_after(self._path, first_step)
    if "tensorboard" in names:
      library = _import("tensorboardX", "tensorboard")  # It needs no TensorFlow.
      self._board, self._event_files = event_files.open_board(
        library, workdir / "tensorboard", purge_step=first_step + 1
      )
    if "wandb" in names:
      library = self._wandb_library = _import("wandb", "wandb")
      workdir.mkdir(parents=True, exist_ok=True)
      with _wandb_advice():
        self._wandb = library.init(
          project="unigrpo_jax", id=run_id, name=run_id,
          dir=None if files.is_object(workdir) else str(workdir),
          config=without_secrets(config), resume="allow",
        )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends a row of numbers or arrays without axes, and panels, which a file does not keep.

    Raises:
      Storage: it cannot be written.
    """
    pictures = {name: v for name, v in values.items() if isinstance(v, panels.Panel)}
    values = floats({name: v for name, v in values.items() if name not in pictures})
    if self._path:
      # JSON has no NaN and no infinity: `read` gives NaN for null.
      row = {name: v if math.isfinite(v) else None for name, v in values.items()}
      text = json.dumps({"step": step} | row, allow_nan=False) + "\n"
      with errors.storage(self._path):
        files.append_text(self._path, text)
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
      for name, panel in pictures.items():
        self._board.add_image(name, panel.sheet, step, dataformats="HWC")
        self._board.add_text(name, panel.markdown(), step)
      self._board.flush()
      for file in self._event_files:
        file.raise_failed()
    if self._wandb:
      with self._without_wandb():
        shown = {name: panel.captioned(self._wandb_library) for name, panel in pictures.items()}
        self._wandb.log(values | shown, step=step)

  def close(self) -> None:
    if self._board:
      self._board.close()
    if self._wandb:
      with self._without_wandb():
        self._wandb.finish()

  @contextlib.contextmanager
  def _without_wandb(self) -> Iterator[None]:
    """Goes on without W&B after an error of its client: the run is worth more than its copy."""
    try:
      yield
    except Exception as error:
      print(f"note: nothing more goes to W&B ({errors.describe(error)})", file=sys.stderr)
      self._wandb = None


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Removes the rows of later steps, and the half line that a killed run may leave."""
  with errors.storage(path):
    lines = []
    if path.exists():
      lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [(_parse(line), line + "\n") for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Atomic: a run that is killed here would otherwise lose its history.
    atomic.write_text(path, "".join(line for row, line in rows if row and row["step"] <= step))


def read(path: pathlib.Path) -> tuple[list[dict[str, float]], int]:
  """Rows of a `metrics.jsonl`, and how many lines but half a last one are unreadable.

  Rows are in the order of the file, each with an int `step` that several may share; null is NaN.
  """
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  rows = [_parse(line) for line in lines]
  return [row for row in rows if row is not None], sum(row is None for row in rows[:-1])


def by_step(rows: Sequence[Mapping[str, float]]) -> dict[int, dict[str, float]]:
  """{step: all metrics of it}: training and an evaluation may have a row each for the same step."""
  steps: dict[int, dict[str, float]] = {}
  for row in rows:
    steps.setdefault(row["step"], {}).update(row)
  return steps


def _parse(line: str) -> dict[str, Any] | None:
  """The row of a line; None where it has none."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  row = {name: math.nan if value is None else value for name, value in row.items()}
  return {name: value for name, value in row.items() if type(value) in (int, float)}


def floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Plain floats of numbers and of arrays without axes."""
  for name, value in values.items():
    if not isinstance(value, (int, float)) and getattr(value, "ndim", None) != 0:
      raise TypeError(f"metric {name} is {value!r}, not one number")
  return {name: float(value) for name, value in values.items()}


def not_finite(values: Mapping[str, Any]) -> list[str]:
  """The names of the numbers among the values that are not finite."""
  return sorted(
    name for name, value in values.items()
    if not isinstance(value, panels.Panel) and not math.isfinite(value)
  )


def check_writers(names: Sequence[str]) -> None:
  """Refuses writers that could not be opened, before a run has done any work; W&B logs in here.

  Raises:
    InputError: a library is missing or does not work, or W&B has no key.
  """
  if "tensorboard" in names:
    _import("tensorboardX", "tensorboard")
  if "wandb" in names:
    library = _import("wandb", "wandb")
    with _wandb_advice():
      library.login()


@contextlib.contextmanager
def _wandb_advice() -> Iterator[None]:
  try:
    yield
  except Exception as error:  # its own kinds, and those of what it connects with
    reason = errors.line(error).rstrip(".")
    raise errors.InputError(
      f"metrics writer 'wandb': {type(error).__name__}: {reason}; run `wandb login` or set "
      "WANDB_API_KEY, or set WANDB_MODE=offline to upload later, or leave 'wandb' out"
    ) from error


def _import(library: str, writer: str) -> Any:
  try:
    return importlib.import_module(library)
  except ModuleNotFoundError as error:
    missing = error.name or library
    needs = f"needs {missing}" if missing == library else f"needs {library}, which needs {missing}"
    raise errors.InputError(
      f"metrics writer {writer!r} {needs}: pip install {missing}, or leave {writer!r} out"
    ) from error
  except Exception as error:  # an installation that is broken, by whichever error it leads to
    raise errors.InputError(
      f"metrics writer {writer!r}: {library} cannot be imported ({type(error).__name__}: {error}); "
      f"pip install --force-reinstall {library}, or leave {writer!r} out"
    ) from error


class PhaseTimer:
  """Seconds by phase of an iteration.

    timer = PhaseTimer()
    with timer("rollout"):
      ...
    log.write(step, timer.read_and_reset())

  A phase inside a phase interrupts it, so no second counts twice. A phase must end by waiting for
  its result (`jax.block_until_ready`), otherwise the next one is charged for it.
  """

  def __init__(
    self, now: Callable[[], float] = time.monotonic,
    begins: Callable[[str], None] = lambda phase: None,
  ):
    """Starts now.

    Args:
      now: the time in seconds.
      begins: called with a phase that begins for the first time since the last reset.
    """
    self._now, self._begins = now, begins
    self._seconds: dict[str, float] = {}
    self._open: list[str] = []
    self._start = self._last = now()

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    self._tick()
    self._open.append(phase)
    if phase not in self._seconds:
      self._seconds[phase] = 0.0
      self._begins(phase)
    try:
      yield
    finally:
      self._tick()
      self._open.pop()

  def read_and_reset(self) -> dict[str, float]:
    """`seconds/<phase>` and `share/<phase>` since the last call, and `seconds/total`, wall time."""
    self._tick()
    total = self._last - self._start
    values = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
    for phase, seconds in self._seconds.items():
      values[f"share/{phase}"] = seconds / total if total > 0 else 0.0
    self._seconds, self._start = dict.fromkeys(self._open, 0.0), self._last
    return values | {"seconds/total": total}

  def _tick(self) -> None:
    """Credits the time since the last change to the innermost open phase."""
    now = self._now()
    if self._open:
      self._seconds[self._open[-1]] += now - self._last
    self._last = now


class Clock:
  """Steps, seconds a step, and time left; the first step, which compiles, is left out."""

  def __init__(self, first: int, last: int):
    self._first, self._last, self._start = first, last, None

  def line(self, step: int, values: Mapping[str, float]) -> str:
    """One line about the step that has just ended."""
    now = time.monotonic()
    if self._start is None:
      self._start, self._first = now, step
    timing = "first step compiled"
    if steps := step - self._first:
      pace = (now - self._start) / steps
      timing = f"{pace:.2f} s/step  {pace * (self._last - step) / 60:.1f} min left"
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    return f"step {step}/{self._last}  {shown}  {timing}"
