"""How a run is asked to stop, and how it waits for what may never come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time

import numpy as np

from unigrpo_jax.runtime import hosts

POLL_SECONDS = 1.0  # A stop is seen within so long,
GRACE_SECONDS = 3.0  # and what is waited for may still end.
PROGRESS_SECONDS = 30.0


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
def stop_on_signal(stop_requested: threading.Event) -> Iterator[None]:
  """SIGTERM and SIGINT set the event while this is entered; a second SIGINT ends the process.

  A thread sees them too: Python calls a handler only when the main thread returns from native code,
  such as a compilation.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  receiver, sender = socket.socketpair()
  sender.setblocking(False)
  before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
  handlers = {
    number: signal.signal(number, lambda *_: stop_requested.set())
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  watching = threading.Thread(
    target=_watch, args=(receiver, stop_requested), name="signals", daemon=True
  )
  watching.start()
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler or signal.SIG_DFL)
    signal.set_wakeup_fd(before)
    sender.close()  # ends the thread
    watching.join()
    receiver.close()


def _watch(receiver: socket.socket, stop_requested: threading.Event) -> None:
  interrupted = 0
  for [number] in iter(lambda: receiver.recv(1), b""):
    if number not in (signal.SIGTERM, signal.SIGINT):
      continue
    stop_requested.set()
    if number == signal.SIGINT:
      interrupted += 1
      if interrupted > 1:
        _say("interrupted again: ended at once")
        os._exit(130)
      _say("stopping: the run saves itself; another Ctrl-C ends it at once, without saving")


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # There may be no reader any more.
    print(text, file=sys.stderr, flush=True)
