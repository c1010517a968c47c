"""Times an iteration of UniGRPO on random weights, phase by phase."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import prompts
from unigrpo_jax.episodes import rollout
from unigrpo_jax.models import layers
from unigrpo_jax.recipe import parts, rl
from unigrpo_jax.runtime import compile_timer, sharding, state
from unigrpo_jax.runtime import metrics as metrics_lib
from unigrpo_jax.tools import workloads


class Bench:
  """A network with random weights, and all that an iteration needs.

  Attributes:
    timer: seconds of the phases since it was last read.
    compiled: {phase: [seconds that each of its runs spent compiling]}.
  """

  def __init__(
    self, work: workloads.Workload, *, dtype: str, remat: str,
    compiling: compile_timer.CompileTimer,
    updates: Collection[str] = tuple(workloads.TRAINED), devices: Sequence | None = None,
    attention: str = "auto",
  ):
    """Initialises the weights.

    Args:
      work: what an iteration consists of.
      dtype: of activations and of the matmul.
      remat: one of `layers.REMAT`.
      compiling: running timer of compilations.
      updates: which updates to run, keys of `workloads.TRAINED`.
      devices: None: one device.
      attention: the attention backend.
    """
    config = functools.partial(
      workloads.training_config, work, dtype, remat, attention=attention
    )
    self.timer, self.compiled, self._compiling = metrics_lib.PhaseTimer(), {}, compiling
    self.work, self.spec = work, rl.read(config())
    network = workloads.network(work, self.spec.network, devices or jax.devices()[:1])
    self.network, self.mesh = network, network.mesh
    self.rollout = rollout.Rollout(network, None, self.spec.rollout)
    self.updates, self.opt_states = {}, {}
    for name in updates:
      spec = rl.read(config(workloads.TRAINED[name]))
      optimizer = spec.optimizer.make()
      layout = state.layout(network, optimizer, ema=False, reference=False)
      self.algorithm = parts.make_algorithm(spec, network, self.rollout)
      self.updates[name] = parts.make_update(
        spec, network, self.algorithm, optimizer, self.rollout.grid, layout
      )
      first = state.first_state(network, optimizer, layout, random_init=True, seed=0)
      self.params, self.opt_states[name] = first.params, first.opt_state
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    # The velocity head is initialised to 0, where it passes no gradient to the layers below it.
    kernel = self.params["llm2vae"]["kernel"]
    self.params["llm2vae"]["kernel"] = jax.device_put(0.02 * draw(*kernel.shape), kernel.sharding)
    self.adv = draw(work.group)
    self.matrix = jnp.asarray(draw(workloads.MATMUL_SIDE, workloads.MATMUL_SIDE), dtype)
    precision = layers.matmul_precision(dtype)
    self.product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Times a phase, and a matmul just before it, as the machine's load changes within a round."""
    with self._timed("matmul"):
      for _ in range(workloads.MATMULS):
        jax.block_until_ready(self.product(self.matrix))
    with self._timed(phase):
      yield

  @contextlib.contextmanager
  def _timed(self, phase: str) -> Iterator[None]:
    self._compiling.read_and_reset()
    with self.timer(phase):
      yield
    self.compiled.setdefault(phase, []).append(self._compiling.read_and_reset())

  def _window(self, iteration: int) -> np.ndarray:
    return rl.window_steps(self.spec, iteration, sharding.batch_multiple(self.mesh))

  def iteration(self, number: int) -> dict[str, float]:
    """Runs and times every phase once; returns the tokens and the updates' metrics.

    Raises:
      UpdateRejected: a number is not finite, or the trainer does not compute what the sampler did.
    """
    key, window = jax.random.key(number), self._window(number + 1)
    params = self.rollout.sampler.cast_and_reshard(self.params)
    prompt = prompts.Prompt("a prompt", {})
    episode = self.rollout.sample(params, [prompt], key, 0, window, self.timed)
    rows = (self.adv, np.ones(self.work.group, bool))
    adv, valid = (sharding.put_rows(self.mesh, a) for a in rows)
    experience = self.algorithm.experience([episode], [prompt], key).replace(adv=adv, valid=valid)
    metrics = {"tokens": int(episode.text.mask.sum())}
    for name, update in self.updates.items():
      # Each update starts from the policy that sampled; the last one's result samples next.
      alone = len(self.updates) == 1  # Then the update may take over (donate) the policy's memory.
      params = self.params if alone else jax.tree.map(jnp.copy, self.params)
      before = types.TrainState(jnp.int32(number), params, self.opt_states[name], ema=None)
      with self.timed(name):
        after, update_metrics = update(before, update.precompute(before, experience))
      self.opt_states[name] = after.opt_state
      metrics |= update_metrics
    self.params = after.params
    return metrics


def rounds(
  bench: Bench, repeats: int, failure: str, deadline: float = math.inf
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
  """Runs a round that compiles and `repeats` more; yields (metrics, seconds by phase) of each.

  Args:
    bench: what is run.
    repeats: rounds after the one that compiles.
    failure: begins the message of an InputError: what was not measured.
    deadline: value of `time.monotonic()` after which no round begins.
  """
  with sharding.activate(bench.mesh), errors.at(failure):
    for number in range(repeats + 1):
      if time.monotonic() > deadline:
        return
      bench.timer.read_and_reset()
      metrics = bench.iteration(number)
      yield metrics, bench.timer.read_and_reset()


def medians(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """{phase of a joint iteration: median seconds}, without the first round, which compiled."""
  return {
    phase: statistics.median(each[f"seconds/{phase}"] for each in seconds[1:])
    for phase in workloads.JOINT_ITERATION
  }


def in_process(
  args: argparse.Namespace, what: str, flags: Sequence[str],
  environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Runs the benchmark in a new process; returns the JSON that it writes.

  Args:
    args: whose repeats, dtype and remat are passed on.
    what: is measured, for the error message.
    flags: further ones.
    environ: environment of the process; None: this one's.

  Raises:
    InputError: it failed.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "bench.json"
    command = [
      sys.executable, "-m", "unigrpo_jax.bench", *flags, f"--json={path}",
      f"--repeats={args.repeats}", f"--dtype={args.dtype}", f"--remat={args.remat}",
    ]
    if subprocess.run(command, check=False, env=environ).returncode:
      raise errors.InputError(f"{what} failed; its error is above")
    return json.loads(path.read_text(encoding="utf-8"))


def measure(
  name: str, work: workloads.Workload, *, repeats: int, dtype: str, remat: str
) -> dict[str, Any]:
  """Times a workload; returns its part of the JSON report.

  Args:
    name: of the workload.
    work: the workload.
    repeats: rounds after the one that compiles.
    dtype: of activations and of the matmul.
    remat: what the backward pass recomputes, one of `layers.REMAT`.

  Raises:
    InputError: an update was rejected: values are not finite, or sampler and trainer differ.
  """
  load = os.getloadavg()[0]
  seconds, metrics = [], []  # of each round
  with compile_timer.CompileTimer() as compiling:
    bench = Bench(work, dtype=dtype, remat=remat, compiling=compiling)
    for number, (values, taken) in enumerate(rounds(bench, repeats, "nothing was measured")):
      metrics.append(values)
      seconds.append(taken)
      what = f"round {number} of {repeats}" if number else "compiled"
      left = (repeats - number) * taken["seconds/total"]
      left = f", {left:.0f} s left" if number and number < repeats else ""
      print(f"{name}: {what}, {taken['seconds/total']:.1f} s{left}", file=sys.stderr, flush=True)
  drift = {kind: max(each[f"drift/{kind}"] for each in metrics) for kind in ("text", "flow")}
  return {
    "shape": name, "workload": dataclasses.asdict(work), "load_average": load,
    "trajectory_tokens": metrics[-1]["tokens"] // work.group, "drift": drift,
    "warm_compile_seconds": sum(sum(each[1:]) for each in bench.compiled.values()),
    "peak_memory_bytes": peak_memory(),
  } | summary(
    work, {phase: [each[f"seconds/{phase}"] for each in seconds[1:]] for phase in bench.compiled},
    {phase: each[0] for phase, each in bench.compiled.items()},
  )


def summary(
  work: workloads.Workload, seconds: Mapping[str, Sequence[float]], compiled: Mapping[str, float]
) -> dict[str, Any]:
  """Medians, shares, rates and ratios of measured seconds.

  Args:
    work: what was timed.
    seconds: {phase: [seconds of each round]}.
    compiled: {phase: seconds of compiling}.
  """
  median = {phase: statistics.median(values) for phase, values in seconds.items()}
  flops = workloads.phase_flops(work)
  matmul_rate = flops["matmul"] / median["matmul"]

  def rates(count: int, duration: float) -> dict[str, float]:
    rate = count / duration
    return {
      "seconds": duration, "flops": count, "gflops_per_second": rate / 1e9,
      "of_matmul": rate / matmul_rate,
    }

  totals = {
    name: rates(*(sum(values[phase] for phase in phases) for values in (flops, median)))
    for name, phases in workloads.TOTALS.items()
  }
  duration = {name: total["seconds"] for name, total in totals.items()}
  rows = {
    phase: rates(flops[phase], value) | {
      "rounds": list(seconds[phase]), "compile_seconds": compiled[phase],
      "share": value / duration["iteration"] if phase in workloads.ITERATION else None,
    }
    for phase, value in median.items()
  }
  return {
    "phases": rows, "totals": totals,
    "rates": {
      "images_per_second": work.group / duration["rollout"],
      "reasoning_tokens_per_second": work.group * work.tokens / median["decode"],
      "velocity_evaluations_per_second": work.group * (work.points - 1) / median["denoise"],
      "trajectories_per_second": work.group / duration["iteration"],
      "trajectories_per_second_joint": work.group / duration["joint_iteration"],
    },
  }


def peak_memory() -> int:
  """Largest resident memory of this process so far, in bytes, including compilation."""
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used if sys.platform == "darwin" else used * 1024


def table(result: Mapping[str, Any]) -> str:
  """The result of `measure` as text."""
  work = workloads.Workload(**result["workload"])
  lines = [
    f"{result['shape']}: {work.layers} layers x {work.width}, vocabulary {work.vocab}; one prompt "
    f"x {work.group} trajectories",
    f"  text {work.system} + {work.prompt} + {work.tokens} tokens, {work.latents} latents, "
    f"{work.points - 1} velocity evaluations, {work.window} SDE steps",
    f"  {'phase':<15} {'seconds':>9} {'share':>6} {'compile s':>9} {'GFLOP':>9} {'GFLOP/s':>8} "
    f"{'of matmul':>9}",
  ]
  for name, row in (result["phases"] | result["totals"]).items():
    share = "" if row.get("share") is None else f"{row['share']:.1%}"
    compiled = f"{row['compile_seconds']:.2f}" if "compile_seconds" in row else ""
    lines.append(
      f"  {name:<15} {row['seconds']:>9.4f} {share:>6} {compiled:>9} {row['flops'] / 1e9:>9.2f} "
      f"{row['gflops_per_second']:>8.1f} {row['of_matmul']:>9.3f}"
    )
  rates = result["rates"]
  lines += [
    f"  {rates['images_per_second']:.3g} images/s of the rollout, "
    f"{rates['trajectories_per_second']:.3g} trajectories/s of an iteration "
    f"({rates['trajectories_per_second_joint']:.3g} of a joint one)",
    f"  {rates['reasoning_tokens_per_second']:.4g} reasoning tokens/s, "
    f"{rates['velocity_evaluations_per_second']:.4g} velocity evaluations/s",
    f"  peak resident memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB, load average "
    f"{result['load_average']:.1f}, drift of text {result['drift']['text']:.1e}, of flow "
    f"{result['drift']['flow']:.1e}",
  ]
  return "\n".join(lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
  """Software, device and settings of a measurement, for its JSON report."""
  return {
    "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind, "cpus": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "dtype": args.dtype, "remat": args.remat, "repeats": args.repeats,
  }
