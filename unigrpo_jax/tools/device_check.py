"""How close a device comes to its limits with layers of BAGEL's width: `bench --device-check`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import errors
from unigrpo_jax.models import layers
from unigrpo_jax.runtime import checkpoints, compile_timer, sharding
from unigrpo_jax.tools import flops, timing, workloads

# Layers of BAGEL-7B-MoT with a small vocabulary, which leaves memory for more of them. Images of
# 512 x 512 pixels.
FULL = workloads.Workload(
  layers=1, width=3584, heads=28, kv_heads=4, ffn=18944, vocab=16384, system=48, prompt=16,
  tokens=64, latents=1024, points=9, window=3, group=8,
)
TOY = dataclasses.replace(
  FULL, layers=2, width=64, heads=4, kv_heads=2, ffn=96, vocab=64, tokens=4, latents=16, points=4,
  window=2, group=2,
)
SHAPES = {"full": FULL, "toy": TOY}
# Per trained parameter: its value, its gradient and two moments of AdamW, in float32.
TRAINED_BYTES = 16
MEMORY = 0.8  # share of the device's memory for parameters; the rest is for activations
LIMIT = 600  # seconds; what has not begun by then is left out, but a round is not interrupted
SIDES = {"full": (8192, 2**28), "toy": (64, 2**12)}  # (side of the matmul, numbers to copy)
KERNELS = {"gpu": "cudnn", "tpu": "splash"}
TORCH_BLOCK = pathlib.Path(__file__).parents[2] / "launch" / "torch_block.py"  # of a clone


def layers_that_fit(work: workloads.Workload, limit: int | None) -> int:
  """The number of layers whose training takes at most MEMORY of `limit` bytes, at least 1.

  Raises:
    InputError: `limit` is None: the device does not report its memory.
  """
  if limit is None:
    raise errors.InputError(
      "--device-check: this device does not say how much memory it has; give --layers, or --toy"
    )
  fixed = 2 * work.vocab * work.width
  layer = 2 * flops.Sizes.of(workloads.network_config(work)).expert // work.layers  # both experts
  return max(int((MEMORY * limit / TRAINED_BYTES - fixed) // layer), 1)


def decode_bytes(work: workloads.Workload, itemsize: int) -> float:
  """Bytes that decoding must read, on average, per step: one token of each trajectory of a group.

  These are the understanding expert and the head, the keys and values of the prompt (once, since
  the group shares them), and those of each trajectory's own tokens so far, on average a half of
  them. `itemsize` is the number of bytes of an element.
  """
  sizes = flops.Sizes.of(workloads.network_config(work))
  tokens = work.system + work.prompt + work.group * work.tokens / 2
  cache = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * tokens
  return itemsize * (sizes.expert + work.width * work.vocab + cache)


def copy_rate(count: int) -> float:
  """Measured bytes per second, read and written, of a copy of `count` float32 numbers."""
  function, array = jax.jit(lambda a: a + 1), jnp.zeros(count, jnp.float32)
  return 2 * array.nbytes / _median(lambda: function(array))


def matmul_rate(side: int, dtype: str) -> float:
  """Measured FLOP per second of products of two [side, side] matrices, eight in a row."""
  precision = layers.matmul_precision(dtype)
  matrix = jnp.full((side, side), 1 / side, dtype)

  @jax.jit
  def function(a):
    return jax.lax.fori_loop(0, 8, lambda _, x: jnp.matmul(x, a, precision=precision), a)

  return 8 * 2 * side**3 / _median(lambda: function(matrix))


def _median(function: Callable[[], Any]) -> float:
  """Median seconds of five runs of a function, after one that compiles."""
  taken = []
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:])


def measure_phases(
  work: workloads.Workload, *, attention: str, dtype: str, remat: str, repeats: int,
  deadline: float,
) -> dict[str, float]:
  """Median seconds of the rollout's phases and of the joint update, {phase: seconds}.

  Args:
    work: what is run.
    attention: the attention backend.
    dtype, remat: see `timing.measure`.
    repeats: rounds after the one that compiles.
    deadline: value of `time.monotonic()` after which no round begins.

  Raises:
    TimeoutError: no round after the one that compiles began in time.
  """
  with compile_timer.CompileTimer() as compiling:
    made = timing.Bench(
      work, dtype=dtype, remat=remat, compiling=compiling, updates=("joint_update",),
      attention=attention,
    )
    failure = f"attention {attention} was not measured"
    seconds = [each for _, each in timing.rounds(made, repeats, failure, deadline)]
  if len(seconds) < 2:
    raise TimeoutError
  return timing.medians(seconds)


def rates(
  work: workloads.Workload, seconds: Mapping[str, float], *, copied: float, peak: float,
  itemsize: int,
) -> dict[str, float]:
  """Rates of the phases, and their shares of the device's limits.

  Args:
    work: what was run.
    seconds: of each phase.
    copied, peak: measured limits, bytes per second and FLOP per second.
    itemsize: bytes of an activation, and of a parameter during sampling.
  """
  counted = workloads.phase_flops(work)
  tokens = work.group * work.tokens / seconds["decode"]
  bound = work.group * copied / decode_bytes(work, itemsize)
  result = {
    "decode_tokens_per_second": tokens, "decode_bound": bound, "decode_of_bound": tokens / bound,
  }
  for name, phase in (("denoise", "denoise"), ("update", "joint_update")):
    rate = counted[phase] / seconds[phase]
    result |= {f"{name}_flops_per_second": rate, f"{name}_of_peak": rate / peak}
  return result


def table(report: Mapping[str, Any]) -> str:
  """The report of `check` as text."""
  work = workloads.Workload(**report["workload"])
  lines = [
    f"{report['device']}: {work.layers} layers x {work.width}, {work.group} images of "
    f"{work.latents} latents, {report['dtype']}, remat {report['remat']}",
    f"  copy {report['copy_bytes_per_second'] / 1e9:,.1f} GB/s, matmul "
    f"{report['matmul_flops_per_second'] / 1e12:,.3f} TFLOP/s",
    f"  {'attention':<10} {'decode tokens/s':>15} {'of bound':>9} {'denoise TFLOP/s':>15} "
    f"{'of peak':>8} {'update TFLOP/s':>15} {'of peak':>8}",
  ]
  for name, row in report["attention"].items():
    r = row["rates"]
    lines.append(
      f"  {name:<10} {r['decode_tokens_per_second']:>15,.0f} {r['decode_of_bound']:>9.3f} "
      f"{r['denoise_flops_per_second'] / 1e12:>15.4f} {r['denoise_of_peak']:>8.3f} "
      f"{r['update_flops_per_second'] / 1e12:>15.4f} {r['update_of_peak']:>8.3f}"
    )
  if block := report.get("pytorch"):
    lines.append(
      f"  PyTorch: a block of the image's tokens {1e3 * block['forward']:.2f} ms, here "
      f"{1e3 * block['here']:.2f} ms; forward and backward {1e3 * block['forward_backward']:.2f} ms"
    )
  return "\n".join([*lines, *(f"  left out: {line}" for line in report["left_out"])])


def check(args: argparse.Namespace) -> dict[str, Any]:
  """Runs all measurements; returns the report that is written as JSON.

  Raises:
    InputError: not even one layer fits in the device's memory.
  """
  start, device, left_out = time.monotonic(), jax.devices()[0], []
  deadline, over = start + LIMIT, f"{LIMIT} s were over"
  shape = "toy" if args.toy else "full"
  work = SHAPES[shape]
  if not args.toy and not args.layers:
    limit = sharding.device_memory([device])
    work = dataclasses.replace(work, layers=layers_that_fit(work, limit))
  elif args.layers:
    work = dataclasses.replace(work, layers=args.layers)

  def say(text: str) -> None:
    print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)

  side, count = SIDES[shape]
  report = timing.environment(args) | {
    "device": device.device_kind, "copy_bytes_per_second": copy_rate(count),
    "matmul_flops_per_second": matmul_rate(side, args.dtype), "attention": {},
    "left_out": left_out,
  }
  say(f"copy and matmul measured; {work.layers} layers")
  kernel = KERNELS.get(device.platform)
  if kernel and args.dtype == "float32":
    left_out.append(f"{kernel}, which needs bfloat16")
    kernel = None
  elif kernel is None:
    left_out.append(f"an attention kernel: there is none for {device.platform}")
  for attention in filter(None, (kernel, "plain")):
    if time.monotonic() - start > LIMIT / 2 and report["attention"]:
      left_out.append(f"attention {attention}: {LIMIT / 2:.0f} s were over")
      continue
    say(f"attention {attention}: compiling and measuring")
    try:
      work, seconds = _largest_that_fits(work, attention, args, deadline, say)
    except TimeoutError:
      left_out.append(f"attention {attention}: {over}")
      continue
    measured = rates(
      work, seconds, copied=report["copy_bytes_per_second"],
      peak=report["matmul_flops_per_second"], itemsize=jnp.dtype(args.dtype).itemsize,
    )
    report["attention"][attention] = {"layers": work.layers, "seconds": seconds, "rates": measured}
  report["workload"] = dataclasses.asdict(work)
  if importlib.util.find_spec("torch") is None:
    left_out.append("PyTorch, which is not installed")
  elif not TORCH_BLOCK.exists():
    left_out.append(f"PyTorch: {TORCH_BLOCK.name} is only in a clone")
  elif time.monotonic() > deadline or not report["attention"]:
    left_out.append(f"PyTorch: {over}")
  else:
    say("PyTorch's block")
    best = min(row["seconds"]["denoise"] / row["layers"] for row in report["attention"].values())
    try:
      report["pytorch"] = _torch_seconds(work, args, deadline) | {"here": best / (work.points - 1)}
    except subprocess.SubprocessError as error:
      left_out.append(f"PyTorch: {error}")
  say("done")
  return report


def _largest_that_fits(
  work, attention: str, args, deadline: float, say
) -> tuple[workloads.Workload, dict]:
  """(the workload with as many layers as fit, its seconds by phase).

  Layers are removed as long as memory runs out. Raises TimeoutError after `deadline`.
  """
  while True:
    if time.monotonic() > deadline:
      raise TimeoutError
    try:
      return work, measure_phases(
        work, attention=attention, dtype=args.dtype, remat=args.remat, repeats=args.repeats,
        deadline=deadline,
      )
    except (jax.errors.JaxRuntimeError, errors.InputError) as error:
      if not checkpoints.is_full(error):
        raise
    if work.layers == 1:
      raise errors.InputError("one layer does not fit in the device's memory; take a larger device")
    work = dataclasses.replace(work, layers=work.layers * 3 // 4)
    say(f"out of memory; {work.layers} layers")


def _torch_seconds(work: workloads.Workload, args, deadline: float) -> dict[str, float]:
  """What TORCH_BLOCK measures; raises SubprocessError if it fails or runs beyond `deadline`."""
  workload = json.dumps(dataclasses.asdict(work))
  command = [sys.executable, str(TORCH_BLOCK), workload, args.dtype, str(args.repeats)]
  done = subprocess.run(
    command, check=True, stdout=subprocess.PIPE, text=True, timeout=deadline - time.monotonic()
  )
  return json.loads(done.stdout)


def main(args: argparse.Namespace) -> None:
  """Prints the report, and writes it to `args.json` where that is given."""
  report = check(args)
  print(table(report), flush=True)
  if args.json is not None:
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
