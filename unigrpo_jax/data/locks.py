"""One writer a folder: a lock file that says who holds it.

The file is only created, read and replaced as a whole, since shared file systems and object stores
have nothing else in common. Its holder rewrites it every BEAT_SECONDS. A holder on this machine is
dead where its process is gone; one of another machine where its file stands still for DEAD_SECONDS,
which needs no clocks that agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import re
import secrets
import shlex
import socket
import sys
import threading
import time

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files

BEAT_SECONDS = 10
DEAD_SECONDS = 60
ABANDONED_SECONDS = 3600  # A beat that old, by any clock, needs no watching.
SETTLE_SECONDS = 0.5  # Of two processes that replace a dead holder's file, the last one wins.
POLL_SECONDS = 1
_SECRET = re.compile(
  r"(token|password|secret|api_?key)([\\'\"\s]*[:=][\\'\"\s]*)[^\s'\",}]+", re.IGNORECASE
)

_holding: dict[pathlib.Path, Holder] = {}  # by this process


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who holds a lock.

  Attributes:
    token: of this holding, never used again.
    host, pid, command: of the process.
    machine: equal for two processes that see each other's process ids.
    started: of the process, to tell it from a later one with its id; "" where it is not known.
    since: ISO time.
    beat: seconds since the epoch, of the last sign of life.
  """

  token: str
  host: str
  pid: int
  command: str
  machine: str
  started: str
  since: str
  beat: float

  def __str__(self) -> str:
    return f"{self.host}, process {self.pid}, since {self.since}: {self.command}"


def inside(folder: pathlib.Path) -> pathlib.Path:
  """The lock file of a folder that one command fills."""
  return folder / "lock.json"


def beside(folder: pathlib.Path) -> pathlib.Path:
  """The lock file of a folder that is replaced as a whole."""
  folder = folder.resolve()  # "." has no name.
  return folder.with_name(f"{folder.name}.lock.json")


@contextlib.contextmanager
def hold(path: pathlib.Path, name: str) -> Iterator[None]:
  """Holds the lock file `path` of what messages call `name`; makes missing folders.

  A holder that another has taken for dead, because it stood still for DEAD_SECONDS, ends at once.

  Raises:
    InputError: another process holds it, or the file cannot be written; see `errors.of_storage`.
  """
  path, mine = path.absolute(), _this_process()
  missing = []
  if not files.is_object(path):
    missing = [folder for folder in path.parents if not folder.exists()]
  stop = threading.Event()
  beats = threading.Thread(target=_beat, args=(path, name, mine, stop), daemon=True)
  try:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      _claim(path, name, mine)
    except OSError as error:
      raise errors.of_storage(error, name, "written to") from None
    _holding[path] = mine
    beats.start()
    yield
  finally:
    stop.set()
    if beats.ident is not None:
      beats.join()
    _release(path, mine)
    atomic.remove_empty(missing)


def _release(path: pathlib.Path, mine: Holder) -> None:
  """Removes the file, unless it has become another's."""
  _holding.pop(path, None)
  with contextlib.suppress(OSError):
    holder = _read(path)
    if holder is not None and holder.token == mine.token:
      path.unlink()


def release_all() -> None:
  """Releases what this process holds, for a process that ends without leaving `hold`."""
  for path, mine in list(_holding.items()):
    _release(path, mine)


@contextlib.contextmanager
def staging(target: pathlib.Path, last: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """`atomic.staging` of a target that no other command replaces meanwhile; see `hold`."""
  with hold(beside(target), f"target {target}"):
    atomic.remove_leftovers(target)
    with atomic.staging(target, last) as staged:
      yield staged


def _this_process() -> Holder:
  # Others read the file: a token in the options of a reward is none of their business.
  command = _SECRET.sub(r"\1\2(hidden)", shlex.join(sys.orig_argv))
  return Holder(
    token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(),
    command=command if len(command) <= 200 else f"{command[:200]} ...",
    machine=_machine(), started=_started(os.getpid()) or "",
    since=datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    beat=time.time(),
  )


@functools.cache
def _machine() -> str:
  """Host name, boot and namespace of process ids: containers share the first or the second."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    parts.append(boot.strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def _started(pid: int) -> str | None:
  """When a process of this machine started, "" where that is not known; None where it is gone."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except OSError:  # of another user
    return ""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
  except OSError:
    return ""
  state, *fields = text.rpartition(")")[2].split()
  return None if state in "ZX" else fields[18]  # a zombie is gone


def _claim(path: pathlib.Path, name: str, mine: Holder) -> None:
  """Makes the file `mine`; raises InputError where it has a living holder."""
  if _create(path, mine):
    return
  other = _read(path)
  if other is not None and _is_alive(path, name, other, mine):
    raise _held(name, other)
  _write(path, mine)
  time.sleep(SETTLE_SECONDS)
  winner = _read(path)
  if winner is not None and winner.token != mine.token:
    raise _held(name, winner)


def _held(name: str, holder: Holder) -> errors.InputError:
  return errors.InputError(
    f"{name} is in use by {holder}; wait for it, stop it, or choose another one"
  )


def _is_alive(path: pathlib.Path, name: str, other: Holder, mine: Holder) -> bool:
  if other.machine == mine.machine:
    return _started(other.pid) in ("", other.started)
  if abs(time.time() - other.beat) > ABANDONED_SECONDS:
    return False
  print(
    f"{name} is locked by {other}; waiting at most {DEAD_SECONDS} s for a sign of life",
    file=sys.stderr, flush=True,
  )
  deadline = time.monotonic() + DEAD_SECONDS
  while time.monotonic() < deadline:
    time.sleep(POLL_SECONDS)
    now = _read(path)
    if now is None:
      return False
    if now != other:
      return True
  return False


def _beat(path: pathlib.Path, name: str, mine: Holder, stop: threading.Event) -> None:
  """Rewrites the file until `stop`; ends the program where another process has taken it."""
  while not stop.wait(BEAT_SECONDS):
    with contextlib.suppress(OSError):
      other = _read(path)
      if other is not None and other.token != mine.token:
        print(
          f"error: {name} was taken over by {other}, because this process stood still",
          file=sys.stderr, flush=True,
        )
        os._exit(1)  # Whatever else it did would be written among the other's files.
      _write(path, dataclasses.replace(mine, beat=time.time()))


def _text(holder: Holder) -> str:
  return json.dumps(dataclasses.asdict(holder), indent=1) + "\n"


def _create(path: pathlib.Path, holder: Holder) -> bool:
  """Writes the file unless there is one; returns whether it did."""
  if files.is_object(path):
    return path.create(_text(holder).encode())
  try:
    file = path.open("x", encoding="utf-8")
  except FileExistsError:
    if path.is_dir():
      raise
    return False
  try:
    with file:
      file.write(_text(holder))
  except OSError:
    path.unlink(missing_ok=True)
    raise
  return True


def _write(path: pathlib.Path, holder: Holder) -> None:
  atomic.write_text(path, _text(holder))


def _read(path: pathlib.Path) -> Holder | None:
  """The holder; None where there is none, or nothing that can be read for a second."""
  for _ in range(10):
    try:
      holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
      is_pid = type(holder.pid) is int and 0 < holder.pid < 2**31
      if not is_pid or not 0 <= holder.beat < math.inf:
        raise ValueError("no process")
      return holder
    except FileNotFoundError:
      return None
    except (ValueError, TypeError, RecursionError):  # It is being written, or damaged.
      time.sleep(0.1)
  return None
