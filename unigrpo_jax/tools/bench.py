"""The command line of the benchmark: `python -m unigrpo_jax.bench --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files
from unigrpo_jax.models import layers
from unigrpo_jax.runtime import state
from unigrpo_jax.tools import device_check, scaling, timing, workloads

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
  python -m unigrpo_jax.bench --scaling --json=scaling.json
  python -m unigrpo_jax.bench --device-check --dtype=bfloat16 --remat=full --json=device.json

A busy machine slows everything: compare the column "of matmul", which the same rounds measured.
One device is used. With --shape=all every shape has a process, and so a peak memory, of its own."""


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
  """Times every shape, each in a process of its own; returns the joint report."""
  report: dict[str, Any] = {}
  for name in workloads.SHAPES:
    one = timing.in_process(args, f"--shape={name}", [f"--shape={name}"])
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
  add("--shape", choices=(*workloads.SHAPES, "all"), default="tiny",
      help="sizes of the network and of the iteration, see below (default: %(default)s)")
  add("--json", type=files.local_path, metavar="OUT.json", help="file to write every number to")
  add("--repeats", type=int, default=3,
      help="rounds that are timed, at least 3 for a meaningful median (default: %(default)s)")
  add("--dtype", choices=state.DTYPES, default="float32",
      help="of activations and of the matmul; parameters are float32 (default: %(default)s)")
  add("--remat", choices=tuple(layers.REMAT), default="none",
      help="what the backward pass computes again, as config.remat (default: %(default)s)")
  what = parser.add_mutually_exclusive_group()
  what.add_argument(
    "--scaling", action="store_true",
    help="how seconds and bytes of each phase grow with trajectories, image tokens, the length of "
    "the reasonings and devices, on CPU; with --json it goes on where it was stopped")
  what.add_argument(
    "--device-check", action="store_true",
    help="blocks of BAGEL's width on one device, beside its measured limits; no round begins after "
    "ten minutes")
  add("--point", choices=scaling.points(), help=argparse.SUPPRESS)  # one process of --scaling
  add("--layers", type=int, default=0,
      help="layers of --device-check; 0: as many as fit (default: %(default)s)")
  add("--toy", action="store_true",
      help="with --device-check: a tiny width, to try the script on a CPU")
  args = parser.parse_args(argv)
  errors.require("--layers", args.layers, low=0)
  if not args.device_check and (args.layers or args.toy):
    flag = "--layers" if args.layers else "--toy"
    raise errors.InputError(f"{flag} is only with --device-check; leave it out")
  if args.device_check and args.shape != parser.get_default("shape"):
    raise errors.InputError("--shape has no effect with --device-check; leave it out")
  if args.shape == "all" and args.scaling:
    raise errors.InputError("--shape=all: --scaling starts from one shape; name it")
  errors.require("--repeats", args.repeats, low=1)
  if args.json is not None:
    with errors.at(f"--json={args.json}"):
      if not args.json.parent.is_dir():
        raise errors.InputError("no such folder; create it first")
      atomic.probe(args.json)
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.scaling:
    return scaling.main(args)
  if args.device_check:
    return device_check.main(args)
  if args.shape == "all":
    report = measure_all(args)
  else:
    result = timing.measure(
      args.shape, workloads.SHAPES[args.shape], repeats=args.repeats, dtype=args.dtype,
      remat=args.remat,
    )
    print(timing.table(result), flush=True)
    report = timing.environment(args) | {"shapes": [result]}
  if args.json is not None:
    atomic.write_text(args.json, json.dumps(report, indent=2) + "\n")
