"""Progress with the time that is left, on standard error: a bar, or a line now and then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import sys
from typing import Any

import tqdm

SECONDS = 10.0  # Between two lines where standard error is no terminal.


def bar(total: int | None, label: str, *, unit: str, enabled: bool = True) -> tqdm.tqdm:
  """A bar on standard error; where that is no terminal, a line every SECONDS.

    with progress.bar(len(files), "copying", unit="files", enabled=hosts.first()) as bar:
      for file in files:
        ...
        bar.update(1)

  `total` is None where nobody knows it. `bar.set_description_str` changes the label. The unit is
  plural; "B" is shown as kB, MB, GB.
  """
  options = dict(
    total=total, desc=label, disable=not enabled,
    unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B",
  )
  if sys.stderr.isatty():
    return tqdm.tqdm(**options)
  return tqdm.tqdm(
    **options, file=_Lines(), miniters=1, mininterval=SECONDS, delay=SECONDS,
    bar_format="{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} elapsed, {remaining} left",
  )


def each(items: Iterable[Any], total: int | None, label: str, *, unit: str) -> Iterator[Any]:
  """Yields `items` under a bar."""
  with bar(total, label, unit=unit) as shown:
    for item in items:
      yield item
      shown.update(1)


class _Lines:
  """A file for tqdm that makes a line of what it would draw in place, but not of the same again."""

  def __init__(self):
    self._last = ""

  def write(self, text: str) -> None:
    if text.strip() not in ("", self._last):
      self._last = text.strip()
      print(self._last, file=sys.stderr, flush=True)
