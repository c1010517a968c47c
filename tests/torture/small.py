"""A small training run and the commands that follow it, in processes that start at little cost and
say where they are."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
from multiprocessing import forkserver
import os
import pathlib
import signal
import time

ROOT = pathlib.Path(__file__).parents[2]
# Imported once, by the server that all processes are forked from; none of it starts a backend.
PRELOADED = [
  *(f"unigrpo_jax.{name}" for name in ("train", "export", "convert", "evaluate")),
  "unigrpo_jax.tools.evaluate", "unigrpo_jax.tools.export", "unigrpo_jax.runtime.conversion",
  "tests.torture.small", "tests.torture.toy",
]
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  # Programs that compile soon and run slower: torture is of everything else.
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  # One heap: those that glibc gives to threads take hundreds of iterations to reach their size.
  "MALLOC_ARENA_MAX": "1",
}
SMALL = {
  "prompts_per_step": 2, "rollout.prompts_at_once": 1, "group_size": 2, "microbatch": 4,
  "rollout.max_tokens": 6, "rollout.num_timesteps": 5, "rollout.window_range": (0, 3),
  "rollout.window_size": 1, "text.chunk": 8, "epochs": 1, "rewards": {"brightness": 1.0},
  "checkpoint_every": 1, "keep_checkpoints": 2, "ema_decay": 0.9, "warmup_steps": 0,
  # Of 24 tokens, in programs that are not optimised: more rounding than a training's limit allows.
  "drift.text": 1e-4, "schedule": "constant",
  "eval.every": 3, "eval.prompts": 2, "eval.batch_size": 2,
  "eval.num_timesteps": 4, "eval.keep": 1, "eval.modes": ("think",), "export_dtype": "float32",
}
# (what is entered and left, where it is): functions and methods.
PHASES = (
  ("step", "unigrpo_jax.runtime.run", "Run.commit"),
  ("save", "unigrpo_jax.runtime.checkpoints", "TrainCheckpoints.save"),
  ("evaluation", "unigrpo_jax.benchmarks.evaluation", "Evaluation.run"),
  ("evaluation", "tests.torture.toy", "evaluate"),
  ("export", "unigrpo_jax.runtime.state", "export"),
  ("conversion", "unigrpo_jax.runtime.stored_params", "Writer.write"),
)


@dataclasses.dataclass(frozen=True)
class Job:
  """The module of a command, its arguments, and the folder it runs in."""

  command: str
  arguments: tuple[str, ...]
  folder: str = "."


def training(workdir, init_from, out, steps: int, **changes) -> Job:
  """A small run of UniGRPO that exports to `out`, "" for nowhere."""
  values = SMALL | {"steps": steps, "init_from": init_from, "export_to": out} | changes
  return Job("unigrpo_jax.train", (
    f"--config={ROOT / 'configs' / 'unigrpo.py'}:tiny", f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in values.items()),
  ))


class Process:
  """A job under way.

  Attributes:
    seen: (phase, seconds since the start), in the order in which they were entered.
  """

  def __init__(self, job: Job, log: pathlib.Path, server):
    self._pipe, other = server.Pipe(duplex=False)
    self.seen: list[tuple[str, float]] = []
    self._process = server.Process(target=_run, args=(job, str(log), other))
    self._start = time.monotonic()
    self._process.start()
    other.close()

  @property
  def pid(self) -> int:
    return self._process.pid

  def wait_for(self, phase: str, count: int = 1, timeout: float = 1e5) -> bool:
    """Waits until `phase` is entered for the so many-th time; False where the process ends first.
    """
    deadline = time.monotonic() + timeout
    while sum(name == phase for name, _ in self.seen) < count:
      if not self._pipe.poll(max(deadline - time.monotonic(), 0)):
        raise TimeoutError(f"no {phase} in {timeout} s")
      try:
        self.seen.append((self._pipe.recv(), time.monotonic() - self._start))
      except EOFError:
        return False
    return True

  def send(self, number: signal.Signals) -> bool:
    """Sends a signal; False where the process has ended."""
    try:
      os.kill(self._process.pid, number)
    except ProcessLookupError:
      return False
    return True

  def end(self, timeout: float = 1e5) -> int:
    """Waits for the end; the exit status, negative for a signal."""
    self.wait_for("", timeout=timeout)
    self._process.join(60)
    return self._process.exitcode


def server(cache: pathlib.Path):
  """What `Process` starts processes with; `cache` holds their compiled programs."""
  context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
  context.set_forkserver_preload(PRELOADED)
  os.environ.update(ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
  try:
    forkserver.ensure_running()
  finally:
    os.environ.clear()
    os.environ.update(before)
  return context


def _run(job: Job, log: str, pipe) -> None:
  """Runs a job in its process: prints into `log`, and says which phases it enters."""
  with open(log, "a", encoding="utf-8") as file:
    for number in (1, 2):
      os.dup2(file.fileno(), number)
  os.chdir(job.folder)
  for phase, module, name in PHASES:
    owner = importlib.import_module(module)
    *classes, method = name.split(".")
    for cls in classes:
      owner = getattr(owner, cls)
    setattr(owner, method, _announced(getattr(owner, method), phase, pipe))
  errors = importlib.import_module("unigrpo_jax.errors")
  main = importlib.import_module(job.command).main
  errors.report(lambda: main(list(job.arguments)))


def _announced(function, phase: str, pipe):
  @functools.wraps(function)
  def announced(*args, **options):
    pipe.send(phase)
    return function(*args, **options)

  return announced
