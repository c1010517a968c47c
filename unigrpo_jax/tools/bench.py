"""Times a joint iteration on random weights: `python -m unigrpo_jax.bench --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
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
import types as builtin_types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.algorithms import update
from unigrpo_jax.episodes import batches, phases, policy
from unigrpo_jax.models import attention, bagel, layers
from unigrpo_jax.recipe import recipe
from unigrpo_jax.runtime import metrics, runs, sharding
from unigrpo_jax.sampling import text
from unigrpo_jax.tools import workloads

DESCRIPTION = """Times one joint iteration of UniGRPO for a group of one prompt, on random weights.

Phases, each the very program that training runs:
  matmul         a plain product of two 2048 x 2048 matrices, to compare the others with; twelve a
                 round, two before each phase
  read           the system prompt and the prompt, once for the group
  decode         the reasonings: as many tokens as the shape says, none ends earlier
  denoise        the images, without guidance, with a window of SDE steps; no VAE, no reward
  image_update   the window's velocities forward and backward, the context included; the
                 generation expert trains
  text_update    the reasonings teacher-forced; the understanding expert trains
  joint_update   both at once over one reading of the context, as training does it

An iteration is all of them but matmul and joint_update; a joint one has joint_update in place of
the two. Each number is the median of --repeats after a round that compiles. FLOPs are the model's,
by formula (flops.py): what a program computes twice, or computes and masks, does not count."""

EPILOG = """shapes:
{shapes}

examples:
  python -m unigrpo_jax.bench --shape=tiny --json=bench.json
  python -m unigrpo_jax.bench --shape=all --repeats=5 --json=bench.json

A busy machine slows everything: compare the column "of matmul", which the same rounds measured.
One device is used. With --shape=all every shape has a process, and so a peak memory, of its own."""


# Fed after the last token, as the last row of the embeddings; no sampled id is ever equal to it.
NEVER = -1
START = 1


class Bench:
  """A network with random weights, and the programs of an iteration."""

  def __init__(self, work: workloads.Workload, *, dtype: str, remat: bool, device: jax.Device):
    config, sizes = workloads.training_config(work, dtype, remat), workloads.network_config(work)
    self.work, self.config = work, config
    self.mesh = sharding.make_mesh(devices=[device])
    self.model = bagel.Bagel(
      sizes, (work.vocab - 3, work.vocab - 2), dtype=jnp.dtype(dtype), remat=remat,
      backend=attention.choose_backend("auto", device.platform, dtype),
    )
    folder = builtin_types.SimpleNamespace(config=sizes)
    network = runs.Network(folder, None, self.model, self.mesh)
    self.settings = recipe.rollout_settings(config, self.mesh)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(3, work.vocab - 3, shape).astype(np.int32)
    self.prompt_ids, self.system_ids = draw(1, work.prompt), draw(work.system)
    self.adv = jnp.asarray(rng.normal(size=work.group), jnp.float32)
    pixels = (config.rollout.height, config.rollout.width)
    one = batches.latent_grid(sizes, [pixels])
    self.grid = jax.tree.map(lambda a: np.repeat(a, work.group, axis=0), one)
    self.updates, self.opt_states = {}, {}
    with sharding.activate(self.mesh):
      self.params = jax.jit(self._init)(jax.random.key(0))
      for name, trained in workloads.TRAINED.items():
        own = config.copy_and_resolve_references()
        own.learning_rate = {group: config.learning_rate[group] for group in trained}
        optimizer = runs.make_optimizer(own)
        reading = policy.Reading(
          system_ids=tuple(int(i) for i in self.system_ids), start_id=START, end_id=NEVER,
          temperature=self.settings.temperature, chunk=config.text.chunk, text="und" in trained,
          flow="gen" in trained, guidance=self.settings.guidance, routing=config.flow.routing,
        )
        self.updates[name] = jax.jit(
          update.make_update(
            self.model, optimizer, one, reading, recipe.make_objective(config, network),
            recipe.schedule(config, self.mesh), trained=trained, ema_decay=None,
          ),
          donate_argnums=0,
        )
        self.opt_states[name] = jax.jit(optimizer.init)(self.params)
    self.matrix = jnp.asarray(rng.normal(size=(workloads.MATMUL_SIDE,) * 2), dtype)
    precision = layers.matmul_precision(dtype)
    self.product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))

  def _init(self, key):
    key, head = jax.random.split(key)
    boxed = self.model.init(key, bagel.example_batch(self.model.config))["params"]
    params = sharding.unbox(boxed)
    # Otherwise it starts at zero: no velocity, and no gradient to what lies under it.
    kernel = params["llm2vae"]["kernel"]
    params["llm2vae"]["kernel"] = 0.02 * jax.random.normal(head, kernel.shape, kernel.dtype)
    return params

  def iteration(self, number: int, timer) -> dict[str, float]:
    """Runs every phase once and tells `timer` its seconds; returns the updates' metrics."""
    work, s = self.work, self.settings
    key = jax.random.fold_in(jax.random.key(1), number)
    keys = [jax.random.split(jax.random.fold_in(key, use), work.group) for use in range(2)]
    steps = jnp.asarray(recipe.window_steps(self.config, number))
    mask = np.ones(self.prompt_ids.shape, bool)
    again = lambda a: jnp.repeat(jnp.asarray(a), work.group, axis=0)
    prompt_ids, prompt_mask = again(self.prompt_ids), again(mask)
    jax.block_until_ready((keys, steps, prompt_ids, prompt_mask))
    self._multiply(timer)
    with timer("read"):
      inputs = phases.Inputs(
        prompt_ids=self.prompt_ids, prompt_mask=mask, system_ids=self.system_ids
      )
      contexts = phases.read(
        self.model, self.params, inputs, capacity=work.system + work.prompt
      )
      jax.block_until_ready(contexts)
    self._multiply(timer)
    with timer("decode"):
      contexts = phases.fork(
        self.model, contexts, copies=work.group, capacity=work.tokens + text.EXTRA_SLOTS
      )
      written, main = phases.write(
        self.model, self.params, contexts.main, keys[0], None, start_id=START, end_id=NEVER,
        max_tokens=work.tokens, temperature=s.temperature,
      )
      contexts = contexts.replace(main=main)
      jax.block_until_ready(written)
    self._multiply(timer)
    with timer("denoise"):
      drawn = phases.explore(
        self.model, self.params, contexts, keys[1], steps, self.grid,
        num_timesteps=s.num_timesteps, shift=s.shift, guidance=s.guidance, kind=s.kind,
        noise_level=s.noise_level,
      )
      jax.block_until_ready(drawn)
    experience = types.Experience(
      prompt_ids, prompt_mask, written, drawn, self.adv, jnp.ones(work.group, bool)
    )
    values = {"tokens": int(written.mask.sum())}
    for name, run in self.updates.items():
      state = types.TrainState(
        step=jnp.int32(number), params=self.params, opt_state=self.opt_states[name], ema=None
      )
      self._multiply(timer)
      with timer(name):
        state, found = jax.block_until_ready(run(state, experience))
      self.params, self.opt_states[name] = state.params, state.opt_state
      # By the joint update both experts have moved on from the policy that sampled.
      if name != "joint_update":
        values |= {key: float(v[-1]) for key, v in found.items() if key.startswith("drift/")}
    return values

  def _multiply(self, timer) -> None:
    """The matmul, before every phase: what else the machine does changes within a round."""
    with timer("matmul"):
      for _ in range(workloads.MATMULS):
        jax.block_until_ready(self.product(self.matrix))


def measure(
  name: str, work: workloads.Workload, *, repeats: int, dtype: str, remat: bool
) -> dict[str, Any]:
  """Times a workload; returns its part of the JSON file.

  Args:
    name: of the shape.
    work: what is timed.
    repeats: rounds after the one that compiles.
    dtype: of activations and of the matmul.
    remat: recomputes each layer in the backward pass.

  Raises:
    InputError: the trainer does not compute what the sampler did.
  """
  load = os.getloadavg()[0]
  timer, compiled = metrics.PhaseTimer(), {}
  seconds, values = [], []  # of each round
  with runs.CompileTimer() as compiling:
    bench = Bench(work, dtype=dtype, remat=remat, device=jax.devices()[0])

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
      compiling.take()
      with timer(phase):
        yield
      compiled.setdefault(phase, []).append(compiling.take())

    with sharding.activate(bench.mesh):
      for number in range(repeats + 1):
        timer.read_and_reset()
        values.append(bench.iteration(number, timed))
        seconds.append(timer.read_and_reset())
        what = f"round {number} of {repeats}" if number else "compiled"
        print(f"{name}: {what}, {seconds[-1]['seconds/total']:.1f} s", file=sys.stderr, flush=True)
  return {
    "shape": name, "workload": dataclasses.asdict(work), "load_average": load,
    "trajectory_tokens": values[-1].pop("tokens") // work.group,
    "drift": largest_drift(values, dtype),
    "warm_compile_seconds": sum(sum(parts[1:]) for parts in compiled.values()),
    "peak_memory_bytes": peak_memory(),
  } | summary(
    work, {phase: [each[f"seconds/{phase}"] for each in seconds[1:]] for phase in compiled},
    {phase: parts[0] for phase, parts in compiled.items()},
  )


def largest_drift(rounds: Sequence[Mapping[str, float]], dtype: str) -> dict[str, float]:
  """Largest difference of sampler and trainer by kind: what is timed must also be right.

  Raises:
    InputError: it is more than `dtype` explains, or not finite.
  """
  # np.max is NaN where a round's is.
  drift = {
    kind: float(np.max([values[f"drift/{kind}"] for values in rounds])) for kind in ("text", "flow")
  }
  if not drift["text"] <= recipe.TEXT_DRIFT[dtype] or not math.isfinite(drift["flow"]):
    raise errors.InputError(
      f"the trainer does not compute what the sampler did: drift {drift}; nothing was measured"
    )
  return drift


def summary(
  work: workloads.Workload, seconds: Mapping[str, Sequence[float]], compiled: Mapping[str, float]
) -> dict[str, Any]:
  """Medians, shares, rates and ratios of measured seconds.

  Args:
    work: what was timed.
    seconds: of each phase, a number a round.
    compiled: seconds that each phase compiled.
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
  """Largest resident memory of this process so far, in bytes; compiling included."""
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used if sys.platform == "darwin" else used * 1024


def table(result: Mapping[str, Any]) -> str:
  """A measured shape as text."""
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
  """What the numbers were measured with."""
  return {
    "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind, "cpus": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "dtype": args.dtype, "remat": args.remat, "repeats": args.repeats,
  }


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
  """Every shape in a process of its own, one after the other."""
  report: dict[str, Any] = {}
  for name in workloads.SHAPES:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "bench.json"
      command = [
        sys.executable, "-m", "unigrpo_jax.bench", f"--shape={name}", f"--json={path}",
        f"--repeats={args.repeats}", f"--dtype={args.dtype}", *["--remat"] * args.remat,
      ]
      if subprocess.run(command, check=False).returncode:
        raise errors.InputError(f"--shape={name} failed; its error is above")
      one = json.loads(path.read_text())
    report = one | {"shapes": [*report.get("shapes", []), *one["shapes"]]}
  return report


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  columns = [field.name for field in dataclasses.fields(workloads.Workload)]
  widths = [max(len(name), 5) for name in columns]
  row = lambda name, cells: f"  {name:<14}" + " ".join(
    f"{cell:>{width}}" for cell, width in zip(cells, widths)
  )
  shapes = [row("", columns)]
  shapes += [row(name, dataclasses.astuple(work)) for name, work in workloads.SHAPES.items()]
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.bench", description=DESCRIPTION,
    epilog=EPILOG.format(shapes="\n".join(shapes)),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", choices=(*workloads.SHAPES, "all"), default="tiny", help="default: %(default)s")
  add("--json", type=pathlib.Path, metavar="OUT.json", help="file to write every number to")
  add("--repeats", type=int, default=3,
      help="rounds that are timed, at least 3 for a meaningful median (default: %(default)s)")
  add("--dtype", choices=tuple(recipe.TEXT_DRIFT), default="float32",
      help="of activations and of the matmul; parameters are float32 (default: %(default)s)")
  add("--remat", action="store_true",
      help="recompute each layer in the backward pass, as the released size needs")
  args = parser.parse_args(argv)
  errors.require("--repeats", args.repeats, low=1)
  if args.json is not None and not args.json.parent.is_dir():
    raise errors.InputError(f"--json={args.json}: no such folder; create it first")
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.shape == "all":
    report = measure_all(args)
  else:
    result = measure(
      args.shape, workloads.SHAPES[args.shape], repeats=args.repeats, dtype=args.dtype,
      remat=args.remat,
    )
    print(table(result), flush=True)
    report = environment(args) | {"shapes": [result]}
  if args.json is not None:
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
