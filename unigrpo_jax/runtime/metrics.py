"""What a run tells: numbers a step for a file, TensorBoard or W&B; a line on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import json
import math
import pathlib
import re
import time
from typing import Any, Protocol

from unigrpo_jax import errors
from unigrpo_jax.data import atomic

WRITERS = ("jsonl", "tensorboard", "wandb")


# Never passed on: a page, or W&B, is for others to read.
_SECRET = re.compile(r"(token|password|secret|api_?key)$", re.IGNORECASE)


def without_secrets(tree: Any, name: str = "") -> Any:
  """A config, nested mappings, in which tokens, passwords and keys are "(hidden)"."""
  if isinstance(tree, Mapping):
    return {key: without_secrets(value, str(key)) for key, value in tree.items()}
  return "(hidden)" if tree and _SECRET.search(name) else tree


class Writer(Protocol):
  """Takes the numbers of one step after the other."""

  def write(self, step: int, values: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


def writers(
  names: Sequence[str],
  workdir: pathlib.Path,
  run_id: str,
  config: Mapping[str, Any],
  *,
  first_step: int = 0,
) -> Writer:
  """One writer that passes every step on to those named.

  Args:
    names: of `WRITERS`; none of them writes nothing. On a pod, give them to one host only.
    workdir: of the run: holds `metrics.jsonl` and the folders `tensorboard` and `wandb`.
    run_id: the same for a run and its resumptions.
    config: of the run, plain values.
    first_step: step of the checkpoint that the run goes on from; what was told after it is dropped.

  Raises:
    InputError: an unknown name, or one whose library is not installed.
  """
  for name in names:
    if name not in WRITERS:
      raise errors.InputError(f"metrics writer {name!r} is none of {', '.join(WRITERS)}")
  make = {
    "jsonl": lambda: MetricsLog(workdir / "metrics.jsonl", first_step),
    "tensorboard": lambda: TensorBoard(workdir / "tensorboard", first_step),
    "wandb": lambda: WandB(workdir, run_id, config),
  }
  return _Several([make[name]() for name in dict.fromkeys(names)])


class _Several:
  """Passes everything on to each of several writers."""

  def __init__(self, parts: Sequence[Writer]):
    self._parts = parts

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for part in self._parts:
      part.write(step, values)

  def close(self) -> None:
    for part in self._parts:
      part.close()


class MetricsLog:
  """Appends to `metrics.jsonl`; a resumed run first drops what comes after its checkpoint.

  JSON knows no NaN and no infinity: both are written as null, and `read` gives NaN for it.
  """

  def __init__(self, path: pathlib.Path, first_step: int):
    self._path = path
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A killed run may leave half a line.
    rows = [(_parse(line), line) for line in lines]
    kept = [line + "\n" for row, line in rows if row is not None and row["step"] <= first_step]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Put in place whole: a run that is killed here would otherwise lose its history.
    atomic.write_text(path, "".join(kept))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    row = {name: v if math.isfinite(v) else None for name, v in floats(values).items()}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")

  def close(self) -> None:
    pass


class TensorBoard:
  """Writes event files with tensorboardX, which needs no TensorFlow."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    library = _optional("tensorboardX", "tensorboard")
    # Tells TensorBoard to hide what an earlier process wrote from this step on.
    self._writer = library.SummaryWriter(logdir=str(folder), purge_step=first_step + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in floats(values).items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Sends to W&B. A resumed run goes on under its id; W&B keeps the first row of a step it sees."""

  def __init__(self, workdir: pathlib.Path, run_id: str, config: Mapping[str, Any]):
    library = _optional("wandb", "wandb")
    workdir.mkdir(parents=True, exist_ok=True)
    self._run = library.init(
      project="unigrpo_jax", id=run_id, name=run_id, dir=str(workdir),
      config=without_secrets(config), resume="allow",
    )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(floats(values), step=step)

  def close(self) -> None:
    self._run.finish()


def read(path: pathlib.Path) -> tuple[list[dict[str, float]], int]:
  """Rows of a `metrics.jsonl`, NaN where it has null; half a last line is ignored.

  Returns:
    (rows in the order of the file, each with an int `step`; number of other unreadable lines).
  """
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  rows = [_parse(line) for line in lines]
  return [row for row in rows if row is not None], sum(row is None for row in rows[:-1])


def _parse(line: str) -> dict[str, Any] | None:
  """One row, or None where the line holds none."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError:
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  number = lambda value: type(value) in (int, float) or value is None
  return {
    name: math.nan if value is None else value for name, value in row.items() if number(value)
  }


def floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Plain floats of numbers and of arrays without axes."""
  found = {}
  for name, value in values.items():
    if not isinstance(value, (int, float)) and getattr(value, "ndim", None) != 0:
      raise TypeError(f"metric {name} is {value!r}, not one number")
    found[name] = float(value)
  return found


def _optional(library: str, extra: str) -> Any:
  try:
    return importlib.import_module(library)
  except ImportError as error:
    raise errors.InputError(
      f"metrics writer {extra!r} needs {library}: pip install {library}, or leave {extra!r} out"
    ) from error


class PhaseTimer:
  """Seconds by phase of an iteration.

    timer = PhaseTimer()
    with timer("rollout"):
      ...
    log.write(step, timer.take())

  A phase inside a phase interrupts it, so no second counts twice. JAX returns before its devices
  are done: a phase must end by waiting for its result (`jax.block_until_ready`), else the next one
  pays for it.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic):
    self._now = now
    self._seconds: dict[str, float] = {}
    self._open: list[str] = []
    self._start = self._last = now()

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    self._tick()
    self._open.append(phase)
    self._seconds.setdefault(phase, 0.0)
    try:
      yield
    finally:
      self._tick()
      self._open.pop()

  def take(self) -> dict[str, float]:
    """`seconds/<phase>` and `share/<phase>` since the last call, and `seconds/total`; starts anew.

    The total is wall time, so the shares add up to less than 1 by what lies outside every phase.
    """
    self._tick()
    total = self._last - self._start
    taken = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
    for phase, seconds in self._seconds.items():
      taken[f"share/{phase}"] = seconds / total if total > 0 else 0.0
    self._seconds, self._start = dict.fromkeys(self._open, 0.0), self._last
    return taken | {"seconds/total": total}

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
    """One line about the step just taken."""
    now = time.monotonic()
    if self._start is None:
      self._start, self._first = now, step
    taken = step - self._first
    pace = (now - self._start) / taken if taken else float("nan")
    left = pace * (self._last - step)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    timing = f"{pace:.2f} s/step  {left / 60:.1f} min left" if taken else "first step compiled"
    return f"step {step}/{self._last}  {shown}  {timing}"
