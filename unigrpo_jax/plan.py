"""Plans a run before a chip is rented: `python -m unigrpo_jax.plan --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import sys
import time

import jax

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files
from unigrpo_jax.tools.plan import advice, page, programs, topology

EPILOG = """\
--config.KEY=VALUE changes a key of the config, as for training; VALUE is JSON.

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
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.plan", epilog=EPILOG,
    description="Compiles every phase of a training for chips that need not be there, and says "
    "what it needs of them.", formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:VARIANTS]", help="config of UniGRPO")
  add("--topology", required=True, nargs="+", metavar="NAME",
      help="TPU topologies, e.g. v5p:4x4x4 or v6e:16x16")
  add("--phases", nargs="+", default=programs.PHASES, choices=programs.PHASES, metavar="PHASE",
      help=f"compiles these alone, of {', '.join(programs.PHASES)}; says no time of an iteration")
  add("--texts", type=pathlib.Path, metavar="FOLDER", help="keeps what was compiled there, as text")
  add("--json", type=pathlib.Path, metavar="FILE", help="writes the figures there too")
  args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  if unknown := [text for text in rest if not text.startswith("--config.") or "=" not in text]:
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
  path, _, variants = args.config.partition(":")
  overrides = [text.removeprefix("--config.") for text in rest]
  config = config_files.load(pathlib.Path(path), variants, overrides)
  if config.algorithm != "unigrpo":
    raise errors.InputError(
      f"--config={args.config} is of algorithm {config.algorithm}; only unigrpo is planned"
    )
  # There may be no chips here, and the compiler must not look for any.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  jax.config.update("jax_platforms", "cpu")

  told = {}
  for name in args.topology:
    start = time.monotonic()

    def progress(phase, name=name, start=start):
      print(f"{name}: compiling {phase}, {time.monotonic() - start:.0f} s", file=sys.stderr)

    texts = args.texts and args.texts / name.replace(":", "_")
    plan, chip = topology.plan(config, name, progress, args.phases, texts)
    told[name] = page.record(plan, chip)
    print(page.text(name, told[name], chip, topology.summary(config)))
    print("\n".join(advice.changes(config, plan, told[name], chip)), flush=True)
    if args.json:
      args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
  if len(told) > 1:
    print(page.comparison(told))


if __name__ == "__main__":
  errors.report(main)
