"""Runs jobs as processes, several at a time, each on a core of its own, until none is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1  # of Linux
WAIT, REPORT = 0.5, 60.0  # seconds between polls of the processes, and between reports


@dataclasses.dataclass(frozen=True)
class Job:
  """Commands that run one after the other.

  Attributes:
    name: unique among the jobs; is printed.
    commands: of the processes; the job fails if one does not end with status 0.
    log: file to which their output is appended.
    cost: expected duration, in any unit.
    ready: whether it can begin now; what it needs may still be missing.
  """

  name: str
  commands: Sequence[Sequence[str]]
  log: pathlib.Path
  cost: float
  ready: bool = True


class Stopped(Exception):
  """A signal stopped the jobs; they saved their state."""


class _Running:
  """A running job.

  Attributes:
    job: the job.
    core: of its processes; None: any.
    status: exit status of the process that ended last.
  """

  def __init__(self, job: Job, core: int | None, environment: Mapping[str, str]):
    self.job, self.core, self.status = job, core, 0
    self._environment, self._left = environment, list(job.commands)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    self._begin()

  def _begin(self) -> None:
    """Starts the process of the next command."""
    with self.job.log.open("ab") as log:
      self._process = subprocess.Popen(
        self._left.pop(0), env=dict(self._environment), stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, preexec_fn=self._enter if sys.platform == "linux" else None,
      )

  def _enter(self) -> None:
    """Runs in the new process: it gets SIGTERM when its parent dies, and is bound to its core."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if self.core is not None:
      os.sched_setaffinity(0, {self.core})

  def ended(self) -> bool:
    """Whether the job has ended, in failure or not; starts its next command when one is done."""
    status = self._process.poll()
    if status is None:
      return False
    self.status = status
    if status == 0 and self._left:
      self._begin()
      return False
    return True

  def stop(self) -> None:
    """Asks the process to save its state and end; starts no further command."""
    self._left.clear()
    if self._process.poll() is None:
      self._process.terminate()

  def wait(self) -> None:
    self._process.wait()


def run(
  plan: Callable[[], Sequence[Job]], *, cores: Sequence[int | None],
  environment: Mapping[str, str], on_end: Callable[[], None],
  failed: dict[str, str] | None = None,
) -> dict[str, str]:
  """Runs jobs until none is left that can be run.

  Args:
    plan: returns all jobs that are not done, in the order in which they should begin. It is called
      again whenever a job ends, since that may allow new ones.
    cores: so many jobs run at a time, each on one of these cores; None: on any core.
    environment: of the processes.
    on_end: called after each job.
    failed: what is returned is added to it as it happens, for `on_end` to read.

  Returns:
    {name: why it failed} of the failed jobs; they do not stop the others.

  Raises:
    Stopped: SIGTERM or SIGINT was received; it was passed on, and all processes have ended.
  """
  running: list[_Running] = []
  free = list(cores)
  failed = {} if failed is None else failed
  stopped = False

  def stop(*_) -> None:
    nonlocal stopped
    stopped = True
    for each in running:
      each.stop()

  handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  start = reported = time.monotonic()
  done_cost, done, left = 0.0, 0, list(plan())
  try:
    while not stopped:
      names = {each.job.name for each in running} | failed.keys()
      for job in [job for job in left if job.ready and job.name not in names][: len(free)]:
        if stopped:
          break
        print(f"== {job.name}", flush=True)
        running.append(_Running(job, free.pop(0), environment))
      if not running:
        break
      time.sleep(WAIT)
      if stopped:
        break
      ended = [each for each in running if each.ended()]
      running = [each for each in running if each not in ended]
      for each in ended:
        free.append(each.core)
        done, done_cost = done + 1, done_cost + each.job.cost
        if each.status:
          failed[each.job.name] = last_line(each.job.log, None) or f"status {each.status}"
          print(f"failed: {each.job.name}: {failed[each.job.name]}", flush=True)
        on_end()
      if ended:
        left = list(plan())
        for each in ended:  # A job that succeeds but stays in the plan would be repeated endlessly.
          if each.job.name in {job.name for job in left} and each.job.name not in failed:
            failed[each.job.name] = last_line(each.job.log) or "it made nothing"
      if ended or time.monotonic() - reported > REPORT:
        reported = time.monotonic()
        rest = sum(job.cost for job in left if job.name not in failed)
        print(_progress(running, done, len(left), done_cost, rest, reported - start), flush=True)
  finally:
    if stopped:
      for each in running:
        each.stop()  # One of them may have begun while the signal came.
        each.wait()
    for number, handler in handlers.items():
      signal.signal(number, handler)
  if stopped:
    raise Stopped
  return failed


def _progress(
  running: Sequence[_Running], done: int, left: int, done_cost: float, rest: float, seconds: float
) -> str:
  """A report: jobs done and left, an estimate of the time, and the last line of each running job.

  `done_cost` and `rest` are the costs of both, `seconds` the time so far.
  """
  time_left = ""
  if done_cost:
    time_left = f", about {seconds / done_cost * rest / 60:.0f} min left"
  lines = [f"{done} done, {left} to do{time_left}"]
  lines += [f"  {each.job.name}: {last_line(each.job.log)}" for each in running]
  return "\n".join(lines)


def last_line(log: pathlib.Path, most: int | None = 200) -> str:
  """The last line of a log with a letter or digit, cut after `most` characters; "" without a log.

  Of a progress bar that is its latest state.
  """
  if not log.exists():
    return ""
  with log.open("rb") as file:
    file.seek(max(log.stat().st_size - 4096, 0))
    text = file.read().decode("utf-8", "replace").replace("\r", "\n")
  lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
  return lines[-1][:most] if lines else ""


def cores(jobs: int) -> list[int | None]:
  """A core for each of `jobs` jobs, or None (any core) where there is a single job."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return [None] * jobs
  available = sorted(os.sched_getaffinity(0))
  return [available[number % len(available)] for number in range(jobs)]
