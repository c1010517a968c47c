"""The command line of the planner."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import functools
import json
import os
import pathlib
import sys
import time

import jax

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.tools.plan import advice, figures, page, planner, plans, topology

DESCRIPTION = "Compiles a training for chips that need not be there; prints what it needs of them."

EPILOG = """\
--config.KEY=VALUE changes a key of the config, as for training.

Compiled with the TPU compiler, which needs no TPU: pip install -r requirements-tpu.txt. The sizes
are those of config.init_from, of which only configs and tokenizer are read, or of BAGEL-7B-MoT.

What the page says:
  memory         what is held all through, and the peak of each phase; the compiler's own figures
  of model FLOPs what the compiled program computes over what the formula says it must; the text
                 phases are counted at full length
  compute, HBM, interconnect
                 seconds that each alone would take at the chip's peak. An iteration at best is the
                 sum over the phases of the largest of the three: a bound, not a forecast

examples:
  python -m unigrpo_jax.plan --config=configs/unigrpo.py --topology=v5p:4x4x4
  python -m unigrpo_jax.plan --config=configs/unigrpo.py:lora --topology v6e:4x4 v6e:4x8
  python -m unigrpo_jax.plan --config=configs/unigrpo.py --topology=v6e:16x16 --json=plan.json"""


def main(argv: Sequence[str] | None = None) -> None:
  args, overrides = _parser().parse_known_args(argv)
  config = config_files.load(args.config, overrides)
  if config.algorithm != "unigrpo":
    raise errors.InputError(
      f"--config={args.config} has algorithm {config.algorithm}; only unigrpo can be planned"
    )
  # There may be no chips here, and the compiler must not look for any.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  jax.config.update("jax_platforms", "cpu")
  spec = rl.read(config)

  records = {}
  for name in args.topology:
    texts = args.texts and args.texts / name.replace(":", "_")
    progress = functools.partial(_print_progress, name, time.monotonic())
    chip, devices = topology.devices(name)
    network = topology.open_network(spec.network, chip, devices)
    plan = planner.Planner(spec, network, progress, args.phases, texts).run()
    records[name] = figures.record(plan, chip)
    print(page.render(name, records[name], chip, topology.summary(spec)))
    print("\n".join(advice.lines(config, plan, records[name], chip)), flush=True)
    if args.json:
      args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
  if len(records) > 1:
    print(page.comparison(records))


def _parser() -> argparse.ArgumentParser:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.plan", description=DESCRIPTION, epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE.py[:VARIANTS]", help="config of UniGRPO")
  add("--topology", required=True, nargs="+", metavar="NAME",
      help="TPU topologies, e.g. v5p:4x4x4 or v6e:16x16")
  add("--phases", nargs="+", default=plans.PHASES, choices=plans.PHASES, metavar="PHASE",
      help=f"compile only these, of {', '.join(plans.PHASES)}; no time of an iteration then")
  add("--texts", type=pathlib.Path, metavar="FOLDER", help="save the compiled texts there")
  add("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
  return parser


def _print_progress(name: str, start: float, phase: str) -> None:
  print(f"{name}: compiling {phase}, {time.monotonic() - start:.0f} s", file=sys.stderr)
