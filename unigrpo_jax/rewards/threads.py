"""Calls in daemon threads, which do not keep the program from ending as ThreadPoolExecutor's do.

Whatever a call raises, even SystemExit and KeyboardInterrupt, is stored in its future and ends
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
import contextlib
import queue
import threading
import time
from typing import Any

try:
  import threadpoolctl
except ImportError:  # A reward server needs no more than numpy, scipy and Pillow.
  threadpoolctl = None


def start(call: Callable[..., Any], *args: Any, name: str) -> futures.Future:
  """Calls `call(*args)` in a new thread called `name`; returns its future."""
  future: futures.Future = futures.Future()
  threading.Thread(target=_run, args=(future, call, args), name=name, daemon=True).start()
  return future


class Pool:
  """Runs calls in a fixed number of threads, in the order in which they were submitted.

  From then on numpy multiplies in the thread that calls it: its library would divide a product over
  all cores, and threads of its own wait by spinning, for cores that have other calls to make or,
  without an accelerator, a network to compute. Without threadpoolctl numpy is left as it is.
  """

  def __init__(self, threads: int, name: str):
    if threadpoolctl is not None:
      threadpoolctl.ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._closing, self._closed = threading.Lock(), False
    self._threads, self._name, self._workers = threads, name, []

  def submit(self, call: Callable[..., Any], *args: Any) -> futures.Future:
    """Queues `call(*args)`; returns its future, which is cancelled if the pool is closed."""
    future: futures.Future = futures.Future()
    with self._closing:
      if self._closed:
        _cancel(future)
        return future
      if len(self._workers) < self._threads:  # No more than there are calls.
        name = f"{self._name}-{len(self._workers)}"
        worker = threading.Thread(target=self._work, name=name, daemon=True)
        worker.start()
        self._workers.append(worker)
      self._queue.put((future, call, args))
    return future

  def close(self) -> None:
    """Cancels the calls that have not begun; the threads end after their running calls."""
    with self._closing:
      if self._closed:
        return
      self._closed = True
    with contextlib.suppress(queue.Empty):
      while True:
        _cancel(self._queue.get_nowait()[0])
    for _ in self._workers:
      self._queue.put(None)

  def join(self, seconds: float) -> bool:
    """To be called after `close`: waits at most `seconds`; returns whether all threads ended."""
    end = time.monotonic() + seconds
    for worker in self._workers:
      worker.join(max(end - time.monotonic(), 0))
    return not any(worker.is_alive() for worker in self._workers)

  def _work(self) -> None:
    while _run_next(self._queue):
      pass


def _run_next(calls: queue.SimpleQueue) -> bool:
  """Waits for a call and makes it; False at the end.

  It is a function of its own so that arguments and results, maybe large arrays, are freed before
  the thread waits again.
  """
  item = calls.get()
  if item is not None:
    _run(*item)
  return item is not None


def _cancel(future: futures.Future) -> None:
  future.cancel()
  future.set_running_or_notify_cancel()  # Without this, `futures.wait` would not see it as done.


def _run(future: futures.Future, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
  if future.set_running_or_notify_cancel():
    try:
      future.set_result(call(*args))
    except BaseException as error:
      future.set_exception(error)
