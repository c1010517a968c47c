"""The one error that a user can cause, and how an entry point reports it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import sys


class InputError(Exception):
  """Bad input: the message is one line that names the key or file, the value, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
  """An argument parser whose complaints are `InputError`s: one line, without the usage."""

  def error(self, message: str):
    raise InputError(f"{message}; --help shows the arguments")


def report(main: Callable[[], None]) -> None:
  """Runs an entry point; an `InputError` becomes one line on stderr and exit status 2."""
  try:
    main()
  except InputError as error:
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
