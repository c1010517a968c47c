"""The command line of the planner: `python -m unigrpo_jax.plan --help`."""

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
from unigrpo_jax.data import atomic, files
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.tools.plan import (
  advice,
  figures,
  page,
  planner,
  plans,
  ranking,
  search,
  topology,
)

BEST = 3  # default of --best
RESULTS = pathlib.Path("plan_search.jsonl")  # default of --results

DESCRIPTION = """\
Compiles a training for chips that need not be there; prints what it needs of them, or with --search
which layout of it is the fastest."""

EPILOG = """\
--config.KEY=VALUE changes a key of the config, as for training.

Compiled with the TPU compiler, which needs no TPU: pip install "jax[tpu]". The sizes
are those of config.init_from, of which only configs and tokenizer are read, or of BAGEL-7B-MoT.

What the page says:
  memory         what is held all through, and the peak of each phase; the compiler's own figures
  of model FLOPs what the compiled program computes over what the formula says it must; the text
                 phases are counted at full length
  compute, HBM, interconnect
                 seconds that each alone would take at the chip's peak. An iteration at best is the
                 sum over the phases of the largest of the three: a bound, not a forecast

--search compiles sampling with every value of --tensor, --rollout_tensor and --prompts_at_once,
then the update with every value of --microbatch and --remat for the fastest layouts that fit, and
prints the ranking, what to paste, and what was dropped. Each result is a line of --results, which
no later search compiles again; after a change of the programs, give a new file.

examples:
  python -m unigrpo_jax.plan --config=configs/unigrpo.py --topology=v5p:4x4x4
  python -m unigrpo_jax.plan --config=configs/unigrpo.py:lora --topology v6e:4x4 v6e:4x8
  python -m unigrpo_jax.plan --config=configs/unigrpo.py --topology=v6e:16x16 --json=plan.json
  python -m unigrpo_jax.plan --config=configs/unigrpo.py --topology=v5p:4x4x4 --search \\
    --tensor=2,4 --microbatch=32,64 --remat=full,layer"""


def main(argv: Sequence[str] | None = None) -> None:
  args, overrides = _parse(argv)
  config = config_files.load(args.config, overrides)
  if config.algorithm != "unigrpo":
    raise errors.InputError(
      f"--config={args.config} has algorithm {config.algorithm}; only unigrpo can be planned"
    )
  # Keeps the TPU compiler from looking for chips, which need not exist.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  jax.config.update("jax_platforms", "cpu")
  spec = rl.read(config)
  if args.search:
    _search(args, overrides, config)
    return

  records = {}
  for name in args.topology:
    texts = args.texts and args.texts / name.replace(":", "_")
    progress = functools.partial(_print_progress, name, time.monotonic())
    chip, devices = topology.devices(name)
    network = topology.open_network(spec.network, chip, devices)
    plan = planner.Planner(spec, network, progress, args.phases, texts).run()
    records[name] = figures.record(plan, chip)
    if args.json:
      atomic.write_text(args.json, json.dumps(records, indent=1) + "\n")
    print(page.render(name, records[name], chip, topology.summary(spec)))
    print("\n".join(advice.lines(config, plan, records[name], chip)), flush=True)
  if len(records) > 1:
    print(page.comparison(records))


def _search(args: argparse.Namespace, overrides: Sequence[str], config) -> None:
  """Searches each topology, one after the other."""
  store = search.Store(args.results)
  print(f"{args.results}: {len(store)} results so far", file=sys.stderr)
  for name in args.topology:
    space = search.Space(config, search.chip_count(name), _given(args))
    compile_point = search.compiler(args.config, overrides, name)
    report = functools.partial(print, file=sys.stderr, flush=True)
    found = search.Search(name, space, compile_point, store, report, args.best).run()
    print(ranking.render(name, *found, space.of_config()), flush=True)


def _given(args: argparse.Namespace) -> dict[str, tuple]:
  """{dimension of the search: values}, of those that the command names."""
  texts = {d.name: getattr(args, d.name) for d in search.DIMENSIONS}
  return {name: search.parse(name, text) for name, text in texts.items() if text is not None}


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """(arguments, overrides of the config); raises InputError for flags that do not go together."""
  args, overrides = _parser().parse_known_args(argv)
  of_search = {d.name: None for d in search.DIMENSIONS} | {"best": BEST, "results": RESULTS}
  of_page = {"phases": plans.PHASES, "texts": None, "json": None}
  for name, default in (of_page if args.search else of_search).items():
    if getattr(args, name) != default:
      words = "not with --search" if args.search else "only with --search"
      raise errors.InputError(f"--{name} is {words}; leave it out")
  errors.require("--best", args.best, low=1)
  for name in args.topology:  # Before any is compiled, which takes long.
    search.chip_count(name)
  for name, path in (
    ("json", args.json), ("results", args.search and args.results),
    ("texts", args.texts and args.texts / "read.txt"),
  ):
    if path:
      with errors.at(f"--{name}={getattr(args, name)}"):
        atomic.probe(path)
  return args, overrides


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
  add("--texts", type=files.local_path, metavar="FOLDER", help="save the compiled texts there")
  add("--json", type=files.local_path, metavar="FILE", help="write the figures there too")
  add("--search", action="store_true",
      help="find the fastest layout; the flags below restrict what is tried")
  for dimension in search.DIMENSIONS:
    add(f"--{dimension.name}", metavar="VALUES",
        help=f"values of config.{dimension.key}, joined by commas")
  add("--best", type=int, default=BEST, metavar="N",
      help="compile the update for at most so many layouts (default: %(default)s)")
  add("--results", type=files.local_path, default=RESULTS, metavar="FILE",
      help="JSON lines of the results of searches (default: %(default)s)")
  return parser


def _print_progress(name: str, start: float, phase: str) -> None:
  print(f"{name}: compiling {phase}, {time.monotonic() - start:.0f} s", file=sys.stderr)
