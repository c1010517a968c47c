"""The error that a user can cause, its kinds, how an entry point reports it, and safe printing."""

from __future__ import annotations

import argparse
import atexit
from collections.abc import Callable, Collection, Iterable, Iterator
import contextlib
import difflib
import errno
import functools
import io
import math
import numbers
import os
import select
import sys
import threading
import time
import traceback
from typing import Any


class InputError(Exception):
  """Bad input: the message is one line that names the key or file, the value, and what to do.

  Attributes:
    status: of a command that ends with it: 2, bad input; 1 where the same command may do better
      next time.
  """

  status = 2

  def __str__(self) -> str:
    # Half a character, of a damaged file or of a file's name, is no text that could be printed.
    return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class Diverged(InputError):
  """A policy whose numbers are not finite: its state is not worth saving."""


class Storage(InputError):
  """Something could not be read or written."""

  status = 1


class Damaged(InputError):
  """A checkpoint whose files are not those that were saved."""


class Unavailable(InputError):
  """Something outside, such as a reward's server, that did not answer."""

  status = 1


class UpdateRejected(InputError):
  """An update whose numbers are not finite, or whose sampler drifted from the trainer.

  Attributes:
    state: the state before, where nothing moved; None where an earlier optimizer step moved it.
  """

  def __init__(self, message: str, state: Any = None):
    super().__init__(message)
    self.state = state


# What the file system says, and what to do. Where it is the state of the machine, not a wrong name,
# trying again may help.
_FULL = "free disk space, then run the same command again"
_AGAIN = "run the same command again"
_TEMPORARY = {
  errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
  **dict.fromkeys((
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV,
    errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO,
  ), _AGAIN),
}
_OTHER = "give another place, or change its permissions"

# What a file begins with, and is, where a repository was cloned without its large files.
LFS = b"version https://git-lfs.github.com/spec/"
POINTER = (
  "a Git LFS pointer, not the file itself; run git lfs pull where it was cloned, or download the "
  "file"
)

# Bounds of a seed: with the number of a row added to it, it is still a seed of `jax.random.key`,
# which would take the lowest 32 bits of another.
SEED = {"low": 0, "high": 2**31 - 1}
LEAST_TEMPERATURE = 1e-6
# The longest limit of time, in seconds: the system takes a few times more.
MAX_SECONDS = 1e9
# In which threads and processes end that a reward began, after the program's last line.
ENDING_SECONDS = 5.0
# Those that one host may find alone and all others then raise.
KINDS = {
  kind.__name__: kind for kind in (InputError, Diverged, Storage, Damaged, Unavailable)
}


def require(
  name: str, value: Any, *, low: float | None = None, above: float | None = None,
  high: float | None = None, integer: bool = False,
) -> None:
  """Raises InputError unless `value` is None, or a finite number with low <= value,
  above < value <= high; True and False are no numbers.
  """
  if value is None:
    return
  kind = numbers.Integral if integer else numbers.Real
  is_number = isinstance(value, kind) and not isinstance(value, bool)
  bounds = [
    (f"at least {low}", low is None or (is_number and value >= low), low),
    (f"more than {above}", above is None or (is_number and value > above), above),
    (f"at most {high}", high is None or (is_number and value <= high), high),
  ]
  if is_number and _is_finite(value) and all(holds for _, holds, _ in bounds):
    return
  wanted = [words for words, _, bound in bounds if bound is not None]
  if not is_number:
    wanted.insert(0, "an integer" if integer else "a number")
  raise InputError(f"{name}={shown(value)} must be {' and '.join(wanted) or 'finite'}")


def refuse_beside(
  parser: argparse.ArgumentParser, args: argparse.Namespace, flag: str, others: Iterable[str]
) -> None:
  """Raises InputError where one of `others` is given beside a flag with which it has no effect.

  Flags whose value is their default count as not given.
  """
  given = lambda name: getattr(args, name) != parser.get_default(name)
  for name in others if given(flag) else ():
    if given(name):
      raise InputError(f"--{name} has no effect with --{flag}; leave it out")


def require_temperature(name: str, value: Any, *, high: float | None = None) -> None:
  """Raises InputError unless `value` is None or the temperature of a softmax: 0, which stands for
  the likeliest token, or one by which float32 can divide logits."""
  require(name, value, low=0, high=high)
  if value and value < LEAST_TEMPERATURE:
    raise InputError(
      f"{name}={value:g} must be at least {LEAST_TEMPERATURE:g}, or 0, which takes the likeliest "
      "token"
    )


def _is_finite(value: numbers.Real) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer beyond float64
    return False


def choose(name: str, value: Any, options: Collection[str]) -> None:
  """Refuses a value that is none of `options`, with the nearest one."""
  if not isinstance(value, str) or value not in options:
    near = difflib.get_close_matches(str(value), options, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name}={shown(value)} is none of {', '.join(options)}{hint}")


def first_line(error: BaseException, default: str = "") -> str:
  """The first line of an error's message, at most 200 characters; without one `default`, or else
  the kind of the error.
  """
  return (str(error).strip() or default or type(error).__name__).splitlines()[0][:200]


def line(error: BaseException) -> str:
  """The message of an error in one line; of a long one, which quotes a damaged file, both ends."""
  text = " ".join(str(error).split())
  return text if len(text) <= 3000 else f"{text[:2000]} ... {text[-900:]}"


def shown(value: Any) -> str:
  """A value in a message: one line that is not long."""
  text = " ".join(repr(value).split())
  return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
  """Puts a place, such as "PATH, line N", before an `InputError` within it; "" is no place."""
  try:
    yield
  except InputError as error:
    if not where:
      raise
    raise reworded(error, f"{where}: {error}") from None


def reworded(error: InputError, message: str) -> InputError:
  """An error of the same kind with another message."""
  return KINDS.get(type(error).__name__, InputError)(message)


def of_storage(
  error: Exception, path: Any = None, did: str = "used", reason: str = ""
) -> InputError:
  """A failed read or write in one line: `Storage` where trying again may help, else `InputError`.

  Args:
    error: an `OSError`, or what a library made of one, which quotes it.
    path: of the file or folder; None: as the error names it; "": none.
    did: what could not be done to it: "read", "written", "used".
    reason: what the error says; "": all of it.
  """
  text = str(error)
  number = getattr(error, "errno", None)
  if number not in _TEMPORARY:
    number = next((n for n in _TEMPORARY if os.strerror(n) in text), number)
  reason = reason or getattr(error, "strerror", None) or text or type(error).__name__
  place = getattr(error, "filename", None) if path is None else path
  kind = Storage if number in _TEMPORARY else InputError
  advice = _TEMPORARY.get(number, _OTHER)
  return kind(f"{f'{place}: ' if place else ''}cannot be {did} ({reason}); {advice}")


def unreadable(error: Exception, path: Any, message: str) -> InputError:
  """Of a read that failed: `Unavailable` where trying again may help, else bad input, `message`."""
  failed = of_storage(error, path, "read")
  return Unavailable(str(failed)) if isinstance(failed, Storage) else InputError(message)


@contextlib.contextmanager
def storage(path: Any = None, did: str = "written") -> Iterator[None]:
  """Raises `of_storage` of an `OSError` within; without `path`, of those that name a file or say
  that something is full or out of order."""
  try:
    yield
  except OSError as error:
    if path is None and error.filename is None and error.errno not in _TEMPORARY:
      raise  # Of a socket, or a fault of the program.
    raise of_storage(error, path, did) from error


def describe(error: BaseException) -> str:
  """The kind and the message of any error, in one line."""
  return " ".join("".join(traceback.format_exception_only(error)).split())


class ArgumentParser(argparse.ArgumentParser):
  """An argument parser whose complaints are `InputError`s: one line, without the usage."""

  def error(self, message: str):
    raise InputError(f"{message}; --help shows the arguments")

  def parse_known_args(self, args=None, namespace=None):
    for argument in sys.argv[1:] if args is None else args:
      try:
        text(argument)
      except ValueError:
        raise InputError(
          f"{argument!r} is not UTF-8, which no library would read; rename it"
        ) from None
    return super().parse_known_args(args, namespace)

  def _get_value(self, action, arg_string):
    with at("" if arg_string else "/".join(action.option_strings)):
      return super()._get_value(action, arg_string)


def report(main: Callable[[], Any]) -> Any:
  """Runs an entry point; an `InputError`, or an `OSError` of a file, becomes one line on stderr and
  its exit status.

  Printing raises nothing within, see `make_streams_safe`, and the program ends soon after, see
  `_end_soon`. Returns what it returns.
  """
  global _home
  make_streams_safe()
  status: Any = 1
  try:
    _home = _current_folder()
    with storage(did="used"):
      result = main()
    status = 0
    return result
  except InputError as error:
    sys.stdout.flush()
    print(f"error: {line(error)}", file=sys.stderr)
    status = error.status
    sys.exit(status)
  except MemoryError as error:
    print(f"error: too little memory ({line(error)}); give smaller numbers", file=sys.stderr)
    sys.exit(status)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    status = 130
    sys.exit(status)
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else int(error.code is not None)
    raise
  finally:
    _home = None
    _end_soon(status)


@functools.cache
def _end_soon(status: int) -> None:
  """Has the program end with `status` within ENDING_SECONDS of its last line.

  Python would wait without a limit for threads of an executor in which a reward hangs, and for
  processes that are no daemons.
  """
  begun, threads_ended = threading.Event(), threading.Event()

  def children() -> list[Any]:
    library = sys.modules.get("multiprocessing")
    return library.active_children() if library is not None else []

  def after_threads() -> None:
    threads_ended.set()
    deadline = time.monotonic() + ENDING_SECONDS
    for child in children():
      child.join(max(deadline - time.monotonic(), 0))
      child.kill()

  def watch() -> None:
    begun.wait()
    if threads_ended.wait(ENDING_SECONDS):
      return
    print("note: ended without waiting longer for what still runs", file=sys.stderr, flush=True)
    for child in children():
      child.kill()
    os._exit(status)

  # The last ones are called first. Python has no public name for what comes before the threads.
  threading._register_atexit(begun.set)
  atexit.register(after_threads)
  threading.Thread(target=watch, name="ending", daemon=True).start()


_home: str | None = None  # While `report` runs: the folder that was current when it began.


def _current_folder() -> str:
  try:
    return os.getcwd()
  except OSError as error:
    raise InputError(
      f"the current folder cannot be used ({error.strerror}); change to another"
    ) from None


def make_streams_safe() -> None:
  """From now on printing raises nothing, whatever the terminal's encoding and its reader do.

  What the encoding cannot represent is printed as an escape, such as \\u4e2d. Where the reader has
  gone (`| head`), the disk is full or the stream is closed, what is printed is dropped. Streams
  that are no file descriptors, those of a notebook, stay as they are.
  """
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:  # closed by the shell: `>&-`
      null = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
      setattr(sys, name, null)
      continue
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Descriptor):
      continue
    try:
      descriptor = _Descriptor(stream)
    except (AttributeError, OSError, ValueError):
      continue
    with contextlib.suppress(OSError):
      stream.flush()
    _safe_streams[name] = _Stream(
      io.BufferedWriter(descriptor), encoding=stream.encoding, errors="backslashreplace",
      line_buffering=True,
    )
    setattr(sys, name, _safe_streams[name])


_safe_streams: dict[str, _Stream] = {}


def undo_changes() -> None:
  """Undoes what the code of a reward did to the program.

  - A safe stream comes back in the place of one that is closed. A reward closes it, or leaves one:
    two that each redirect to a file of their own at a time do.
  - Within `report` the current folder is again that in which it began, since the program's paths
    are relative to it.
  """
  for name, safe in _safe_streams.items():
    if getattr(getattr(sys, name), "closed", False):
      setattr(sys, name, safe)
  # Of another thread's reward `report` may have ended meanwhile.
  if (home := _home) is None:
    return
  try:
    moved = not os.path.samefile(os.curdir, home)
  except OSError:  # A folder that is gone is not the one that is wanted.
    moved = True
  if moved:
    with contextlib.suppress(OSError):
      os.chdir(home)
      _say_moved(home)


@functools.cache
def _say_moved(home: str) -> None:
  print(f"note: a reward changed the current folder; it is {home} again", file=sys.stderr)


class _Stream(io.TextIOWrapper):
  """A stream that stays open."""

  def close(self) -> None:
    with contextlib.suppress(ValueError):
      self.flush()


class _Descriptor(io.FileIO):
  """A stream's file descriptor, whose writes do not fail: after the first that does, it is the
  null device.

  The descriptor itself is replaced, so it holds for native code and for older stream objects too.
  """

  def __init__(self, stream):
    super().__init__(stream.fileno(), "wb", closefd=False)
    self._stream = stream  # Which would close the descriptor when nothing refers to it.

  def write(self, data) -> int:
    try:
      while (written := super().write(data)) is None:  # non-blocking, and full
        select.select([], [self], [])
      return written
    except OSError as error:
      with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), self.fileno())
      if error.errno != errno.EPIPE and self.fileno() != 2:
        print(f"note: nothing more is printed ({error.strerror})", file=sys.stderr)
      return memoryview(data).nbytes


def text(argument: str) -> str:
  """A command line argument that is text, not a path: UTF-8 where the locale could not read it.

  Raises:
    ValueError: it is not UTF-8.
  """
  return argument.encode("utf-8", "surrogateescape").decode("utf-8")
