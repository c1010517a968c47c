"""What a run tells: one JSON object a step in a file, one line a step on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
import json
import pathlib
import time
from typing import Any


class MetricsLog:
  """Appends to `metrics.jsonl`; a resumed run first drops what comes after its checkpoint."""

  def __init__(self, path: pathlib.Path, first_step: int):
    self._path = path
    kept = []
    if path.exists():
      for line in path.read_text(encoding="utf-8").splitlines():
        # A killed run may leave half a line.
        try:
          row = json.loads(line)
        except json.JSONDecodeError:
          break
        if row["step"] <= first_step:
          kept.append(line + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(kept), encoding="utf-8")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    row = {"step": step} | {name: float(value) for name, value in values.items()}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")


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
