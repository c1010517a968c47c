"""How a run is asked to stop, and how it waits for what may never come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time

import numpy as np

from unigrpo_jax.data import locks
from unigrpo_jax.runtime import hosts

POLL_SECONDS = 1.0  # A stop is seen within so long,
GRACE_SECONDS = 3.0  # and what is waited for may still end.
PROGRESS_SECONDS = 30.0
END_SECONDS = 15.0  # Schedulers kill 30 s after SIGTERM.


class Stopped(Exception):
  """SIGTERM or SIGINT reached a host: the run saves itself and ends."""


def wait(
  finished: Callable[[float], bool], awaited: Callable[[], str],
  stop_requested: Callable[[], bool] = lambda: False,
) -> None:
  """Waits, on all hosts together, until each has `finished`; prints every 30 s what for.

  Args:
    finished: (seconds) -> whether this host has, after waiting so long for it at most.
    awaited: names what this host waits for; "" for nothing.
    stop_requested: whether this host was asked to stop.

  Raises:
    Stopped: a host was asked to stop some seconds before all had finished.
  """
  start, printed, stopped = time.monotonic(), 0.0, math.inf
  while True:
    done = finished(POLL_SECONDS)
    table = hosts.gather(np.float32([done, stop_requested(), time.monotonic() - start]))
    if table[:, 0].all():
      return
    # By the first host's clock, so that all of them print, or stop, in the same round.
    seconds = float(table[0, 2])
    if table[:, 1].any():
      stopped = min(stopped, seconds)
    ends = seconds >= stopped + GRACE_SECONDS
    if ends or seconds >= printed + PROGRESS_SECONDS:
      printed = seconds
      names = ", ".join(dict.fromkeys(filter(None, hosts.gather_texts(awaited()))))
      hosts.print_first(f"{'no longer ' * ends}waiting for {names}, after {seconds:.0f} s")
    if ends:
      raise Stopped


@contextlib.contextmanager
def stop_on_signal(
  stop_requested: threading.Event, loses_nothing: Callable[[], bool] = lambda: False
) -> Iterator[None]:
  """SIGTERM and SIGINT set the event while this is entered; a second SIGINT ends the process.

  A thread sees them too: Python calls a handler only when the main thread returns from native code,
  such as a compilation. Where the end then `loses_nothing`, the thread brings it after END_SECONDS.
  """
  signalled: list[float] = []  # when
  interrupted = 0

  def received(number: int) -> None:
    nonlocal interrupted
    stop_requested.set()
    signalled.append(time.monotonic())
    if number == signal.SIGINT:
      interrupted += 1
      if interrupted > 1:
        _say("interrupted again: ended at once")
        os._exit(130)
      _say("stopping: the run saves itself; another Ctrl-C ends it at once, without saving")

  def poll() -> None:
    if signalled and time.monotonic() > signalled[0] + END_SECONDS and loses_nothing():
      _end()

  with _watching((signal.SIGTERM, signal.SIGINT), stop_requested.set, received, poll):
    yield


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
  """SIGTERM ends the process with status 0 while this is entered and no run is: before the first
  step and after the last one nothing is lost."""
  with _watching((signal.SIGTERM,), lambda: None, lambda number: _end(), lambda: None):
    yield


@contextlib.contextmanager
def _watching(
  numbers: Sequence[signal.Signals], handler: Callable[[], None], received: Callable[[int], None],
  poll: Callable[[], None],
) -> Iterator[None]:
  """Has a thread call `received` with each signal of `numbers`, and `poll` now and then.

  `handler` is called in the main thread. In other threads than that, nothing is handled.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  receiver, sender = socket.socketpair()
  sender.setblocking(False)
  receiver.settimeout(POLL_SECONDS)

  def watch() -> None:
    while True:
      try:
        data = receiver.recv(1)
      except TimeoutError:
        poll()
        continue
      if not data:
        return
      if data[0] in numbers:
        received(data[0])

  before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
  handlers = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
  watching = threading.Thread(target=watch, name="signals", daemon=True)
  watching.start()
  try:
    yield
  finally:
    for number, old in handlers.items():
      signal.signal(number, old or signal.SIG_DFL)
    signal.set_wakeup_fd(before)
    sender.close()  # ends the thread
    watching.join()
    receiver.close()


def _end() -> None:
  """Ends the process, from any thread: what it is at is not finished."""
  _say("stopped by a signal between two checkpoints; run the same command again to continue")
  locks.release_all()
  os._exit(0)


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # There may be no reader any more.
    print(text, file=sys.stderr, flush=True)
