"""How much of an iteration the devices have nothing to do.

  python -m tests.idle_share CHECKOUT [--chunks=8] [--reward-seconds=1] [--config.KEY=VALUE ...]

Trains four iterations of `configs/unigrpo.py:tiny` in a checkout, by its own code, in chunks of 16
prompts / CHUNKS, with a reward that sleeps so many seconds a chunk, and prints what a profile of
the last two says: the share of time in which no operation ran on any thread of the devices, and the
longest of these gaps. Those shorter than GAP are not counted: they are the overhead between small
operations of a program. Choose a reward as slow as drawing: the line of each step says what a chunk
took.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
import os
import pathlib
import subprocess
import sys
import tempfile
import time

GAP = 0.3e-3  # seconds
PROMPTS = 16
FIRST, LAST = 2, 4  # the step whose end begins the profile, and the one whose end ends it
PHASES = ("read", "decode", "denoise", "vae")


def slow(samples) -> list[float]:
  """A reward that sleeps; it tells pictures apart."""
  time.sleep(slow.seconds)
  return [float(sample.image.mean()) / 255 for sample in samples]


slow.seconds = 0.0


def gaps(intervals: Iterable[tuple[float, float]], start: float, end: float,
         shortest: float = GAP) -> list[tuple[float, float]]:
  """The (start, length) between `start` and `end` that no interval (start, end) covers."""
  found, at = [], start
  for first, last in [*sorted(intervals), (end, end)]:
    if min(first, end) - at >= shortest:
      found.append((at, min(first, end) - at))
    at = max(at, last)
  return found


def operations(folder: pathlib.Path) -> list[tuple[float, float]]:
  """(start, end) in seconds of what a profile says that threads of the CPU devices computed."""
  import jax
  [path] = folder.rglob("*.xplane.pb")
  return [
    (event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines if line.name.startswith("tf_XLA")
    for event in line.events if event.duration_ns
  ]


def _train(chunks: int, reward: float, overrides: list[str]) -> None:
  """In the process of its own: prints the figures."""
  import idle_share
  import jax

  from unigrpo_jax import train
  from unigrpo_jax.recipe import config_files
  from unigrpo_jax.runtime import metrics

  idle_share.slow.seconds = reward  # of the module that the config names; this is __main__
  write = metrics.MetricsLog.write
  profile = pathlib.Path(tempfile.mkdtemp())
  times = {}

  def listen(self, step, values):
    write(self, step, values)
    times[step] = time.monotonic()
    phases = {name: values[f"seconds/{name}"] for name in (*PHASES, "reward", "update")}
    drawing = sum(phases[name] for name in PHASES) / chunks
    print(f"step {step}: {values['seconds/total']:.2f} s; " + ", ".join(
      f"{name} {seconds:.2f}" for name, seconds in phases.items()
    ) + f"; a chunk {drawing:.2f}", flush=True)
    if step == FIRST:
      options = jax.profiler.ProfileOptions()
      options.host_tracer_level, options.python_tracer_level = 1, 0
      jax.profiler.start_trace(str(profile), profiler_options=options)
      times["start"] = time.monotonic()
    if step == LAST:
      jax.profiler.stop_trace()

  metrics.MetricsLog.write = listen
  config = config_files.load("configs/unigrpo.py:tiny", [
    f"--config.steps={LAST}", "--config.eval.every=0", "--config.checkpoint_every=100",
    "--config.rewards={'idle_share:slow': 1.0}",
    f"--config.rollout.prompts_at_once={PROMPTS // chunks}", *overrides,
  ])
  with tempfile.TemporaryDirectory() as workdir:
    train.train(config, pathlib.Path(workdir), jax.devices()[:1])
  intervals = operations(profile)
  # The trace has a clock of its own; the last operation is of the last update, just before its end.
  end = max(last for _, last in intervals)
  start = end - (times[LAST] - times["start"])
  found = gaps(intervals, start, end)
  idle = sum(length for _, length in found)
  print(f"{len(intervals)} operations in {end - start:.2f} s; idle {idle / (end - start):.1%}, "
        f"a reward takes {reward:.2f} s; longest gaps, ms: "
        + ", ".join(f"{1e3 * length:.0f}" for length in
                    sorted((length for _, length in found), reverse=True)[:12]))


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("checkout", type=pathlib.Path)
  parser.add_argument("--chunks", type=int, default=8, help="of an iteration (default: 8)")
  parser.add_argument("--reward-seconds", type=float, default=1.0, help="a chunk (default: 1)")
  args, overrides = parser.parse_known_args(argv)
  checkout = args.checkout.absolute()
  numbers = [str(args.chunks), str(args.reward_seconds)]
  command = [checkout / ".venv/bin/python", __file__, *numbers, *overrides]
  environ = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=checkout, env=environ, check=False).returncode


if __name__ == "__main__":
  if sys.argv[1:] and sys.argv[1].isdigit():
    _train(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
  else:
    sys.exit(main())
