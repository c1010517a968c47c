"""Processes that run beside each other, one core each, until nothing is left to do."""

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
WAIT, REPORT = 0.5, 60.0  # seconds between two looks at the processes, and between two reports


@dataclasses.dataclass(frozen=True)
class Job:
  """Commands that run one after the other.

  Attributes:
    name: is printed, and unlike those of the other jobs.
    commands: of processes; each must end with status 0.
    log: file that gets what they print.
    cost: expected relative duration.
    ready: whether what it needs is there.
  """

  name: str
  commands: Sequence[Sequence[str]]
  log: pathlib.Path
  cost: float
  ready: bool = True


class Stopped(Exception):
  """A signal ended the jobs, which saved themselves."""


class _Running:
  """A job on its core."""

  def __init__(self, job: Job, core: int | None, environment: Mapping[str, str]):
    self.job, self.core, self.status = job, core, 0
    self._environment, self._left = environment, list(job.commands)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    self._begin()

  def _begin(self) -> None:
    with self.job.log.open("ab") as log:
      self._process = subprocess.Popen(
        self._left.pop(0), env=dict(self._environment), stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, preexec_fn=self._enter if sys.platform == "linux" else None,
      )

  def _enter(self) -> None:
    """In the new process: it ends, saving itself, when this one is killed; it gets its core."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if self.core is not None:
      os.sched_setaffinity(0, {self.core})

  def ended(self) -> bool:
    """Whether its last command has ended, or one failed; begins the next one."""
    status = self._process.poll()
    if status is None:
      return False
    self.status = status
    if status == 0 and self._left:
      self._begin()
      return False
    return True

  def stop(self) -> None:
    """Lets the process save itself and end, and begins no other."""
    self._left.clear()
    if self._process.poll() is None:
      self._process.terminate()

  def wait(self) -> None:
    self._process.wait()


def run(
  plan: Callable[[], Sequence[Job]], *, cores: Sequence[int | None],
  environment: Mapping[str, str], on_end: Callable[[], None],
) -> dict[str, str]:
  """Runs jobs until none is left that can be run.

  Args:
    plan: all jobs that are not done, in the order in which they should begin; asked again whenever
      one ends, as what it made may allow others.
    cores: as many jobs run at a time, each on one of these; None: not bound to one.
    environment: of the processes.
    on_end: called after each job.

  Returns:
    {name: why it failed} of the jobs that did; others went on without them.

  Raises:
    Stopped: SIGTERM or SIGINT came; it was passed on, and all processes have ended.
  """
  running: list[_Running] = []
  free = list(cores)
  failed: dict[str, str] = {}
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
          failed[each.job.name] = last_line(each.job.log) or f"status {each.status}"
          print(f"failed: {each.job.name}: {failed[each.job.name]}", flush=True)
        on_end()
      if ended:
        left = list(plan())
        for each in ended:  # One that ended well and left nothing would begin again for ever.
          if each.job.name in {job.name for job in left} and each.job.name not in failed:
            failed[each.job.name] = last_line(each.job.log) or "it made nothing"
      if ended or time.monotonic() - reported > REPORT:
        reported = time.monotonic()
        rest = sum(job.cost for job in left if job.name not in failed)
        print(_progress(running, done, len(left), done_cost, rest, reported - start), flush=True)
  finally:
    if stopped:
      for each in running:
        each.wait()
    for number, handler in handlers.items():
      signal.signal(number, handler)
  if stopped:
    raise Stopped
  return failed


def _progress(
  running: Sequence[_Running], done: int, left: int, done_cost: float, rest: float, seconds: float
) -> str:
  time_left = ""
  if done_cost:
    time_left = f", about {seconds / done_cost * rest / 60:.0f} min left"
  lines = [f"{done} done, {left} to do{time_left}"]
  lines += [f"  {each.job.name}: {last_line(each.job.log)}" for each in running]
  return "\n".join(lines)


def last_line(log: pathlib.Path) -> str:
  """The last line of a log with a letter or digit, at most 200 characters; of a bar its last state.
  """
  if not log.exists():
    return ""
  with log.open("rb") as file:
    file.seek(max(log.stat().st_size - 4096, 0))
    text = file.read().decode("utf-8", "replace").replace("\r", "\n")
  lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
  return lines[-1][:200] if lines else ""


def cores(jobs: int) -> list[int | None]:
  """A core for each of so many jobs; a single job has all of them."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return [None] * jobs
  available = sorted(os.sched_getaffinity(0))
  return [available[number % len(available)] for number in range(jobs)]
