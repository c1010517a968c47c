"""The error that a user can cause, its kinds, and how an entry point reports it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
import contextlib
import difflib
import math
import sys
from typing import Any


class InputError(Exception):
  """Bad input: the message is one line that names the key or file, the value, and what to do."""


class Diverged(InputError):
  """A policy whose numbers are not finite: its state is not worth saving."""


class Storage(InputError):
  """A checkpoint that could not be written: the same command may do better next time."""


class UpdateRejected(InputError):
  """An update whose numbers are not finite, or whose sampler drifted from the trainer.

  Attributes:
    state: the state before, where nothing moved; None where an earlier optimizer step moved it.
  """

  def __init__(self, message: str, state: Any = None):
    super().__init__(message)
    self.state = state


# Those that one host may find alone and all others then raise.
KINDS = {kind.__name__: kind for kind in (InputError, Diverged, Storage)}


def require(
  name: str, value: float | None, *, low: float | None = None, above: float | None = None,
  high: float | None = None,
) -> None:
  """Raises InputError unless `value` is None, or finite and low <= value, above < value <= high."""
  if value is None:
    return
  bounds = [
    (low is not None, f"at least {low}", low is None or value >= low),
    (above is not None, f"more than {above}", above is None or value > above),
    (high is not None, f"at most {high}", high is None or value <= high),
  ]
  if not math.isfinite(value) or not all(holds for _, _, holds in bounds):
    wanted = " and ".join(words for asked, words, _ in bounds if asked) or "finite"
    raise InputError(f"{name}={value} must be {wanted}")


def choose(name: str, value: str, options: Collection[str]) -> None:
  """Refuses a value that is none of `options`, with the nearest one."""
  if value not in options:
    near = difflib.get_close_matches(str(value), options, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name}={value!r} is none of {', '.join(options)}{hint}")


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
  """Puts a place, such as "PATH, line N", before an `InputError` within it; "" is no place."""
  try:
    yield
  except InputError as error:
    if not where:
      raise
    raise InputError(f"{where}: {error}") from None


class ArgumentParser(argparse.ArgumentParser):
  """An argument parser whose complaints are `InputError`s: one line, without the usage."""

  def error(self, message: str):
    raise InputError(f"{message}; --help shows the arguments")


def report(main: Callable[[], Any]) -> Any:
  """Runs an entry point; an `InputError` becomes one line on stderr and exit status 2, or 1 where
  trying again may help.

  Returns what it returns.
  """
  try:
    return main()
  except InputError as error:
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1 if isinstance(error, Storage) else 2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
