"""Trains the methods of the paper from the same start and makes its Tables 1 and 2.

  python -m unigrpo_jax.compare --workdir=runs/compare

Every method and seed is a run of `unigrpo_jax.train` in a folder of its own, with the same start,
reward, prompts and budget. Its last checkpoint and its best one by the learned reward are evaluated
on the test prompts, with and without guidance. Rows that share checkpoints are trained once. --jobs
runs at a time, each on a core of its own. The same command resumes an interrupted comparison, and
does not repeat what is finished.

It writes into the workdir: results.md, the tables; results.json, all numbers with the hashes of
checkpoints and configs; curves.json, what the runs logged; figures/; and runs/, models/,
evaluations/, logs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
import sys

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import evaluation
from unigrpo_jax.data import files, locks
from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.tools.compare import comparison, methods, processes, scores

# Keys that the comparison sets, and how.
OWN_KEYS = {
  "init_from": "; give --start", "seed": "; give --seeds",
  "eval.modes": ", by the method: without guidance and as it was trained first",
}
EPILOG = """--config.KEY=VALUE changes a key of every method's config: --config.steps=8, say.

methods of the tables:
  {methods}
further ones, whose rows stand below a rule:
  {extras}
"""


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.compare", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=EPILOG.format(
      methods="\n  ".join(methods.METHODS), extras="\n  ".join(methods.EXTRAS)
    ),
  )
  add = parser.add_argument
  add("--workdir", type=files.local_path, required=True,
      help="folder of the runs and of the tables")
  add("--methods", nargs="+", choices=list(methods.ALL), metavar="METHOD",
      help="what to compare, see below (default: those of the tables; without a learned reward "
      "not ReFL's)")
  add("--seeds", nargs="+", type=int, default=[0, 1, 2],
      help="each method is trained once with each (default: 0 1 2)")
  add("--variants", default="tiny",
      help="variants of the configs, joined by commas (default: %(default)s)")
  add("--start", default="tiny",
      help="folder of the SFT checkpoint, from which all begin (default: the embedded one)")
  add("--bagel", default="",
      help="folder of the model before SFT, for the first two rows; of unigrpo_jax.build it is "
      "WORKDIR/first (default: these rows are dashes)")
  add("--reward_model", default=learned.TINY if learned.TINY_FOLDER.is_dir() else "",
      help="folder of the learned reward, on which all methods are trained; empty: the config's "
      f"rewards, from which ReFL cannot learn (default: {learned.TINY} where it is installed)")
  add("--sweep", action="store_true",
      help="first train each method with three learning rates, by the first seed, and go on with "
      "the one whose learned reward is the highest on validation")
  add("--jobs", type=int, default=min(2, os.cpu_count() or 1),
      help="runs at a time, each on a core of its own; 1: a run has all devices (default: "
      "%(default)s)")
  add("--prompts", type=int, default=600, help="test prompts for GenEval (default: 600)")
  add("--ta_prompts", type=int, default=150,
      help="test prompts for TA, the first of these (default: 150)")
  add("--samples", type=int, default=4, help="images of each prompt (default: 4)")
  add("--noise_seed", type=int, default=0, help="seed of the noise of all evaluations (default: 0)")
  args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  if args.methods is None:
    args.methods = list(methods.METHODS) if args.reward_model else methods.without_gradient()
  for name, values, bounds in (
    ("--seeds", args.seeds, errors.SEED), ("--noise_seed", [args.noise_seed], errors.SEED),
    ("--jobs", [args.jobs], dict(low=1)),
    ("--samples", [args.samples], dict(low=1, high=evaluation.MOST_IMAGES)),
    ("--prompts", [args.prompts], dict(low=1)),
    ("--ta_prompts", [args.ta_prompts], dict(low=1, high=args.prompts)),
  ):
    for value in values:
      errors.require(name, value, **bounds)
  for argument in overrides:
    key = argument.partition("=")[0].removeprefix("--config.")
    if key in OWN_KEYS or (args.reward_model and key.startswith("reward")):
      raise errors.InputError(
        f"{argument}: the comparison sets config.{key}"
        f"{OWN_KEYS.get(key, '; it is of --reward_model')}"
      )
  for name, values in (("--seeds", args.seeds), ("--methods", args.methods)):
    if len(set(values)) < len(values):
      raise errors.InputError(f"{name} {' '.join(map(str, values))}: each may be given only once")
  return args, overrides


def main(argv: Sequence[str] | None = None) -> None:
  args, overrides = parse_args(argv)
  benchmark = scores.Benchmark(
    args.prompts, args.ta_prompts, args.samples, args.noise_seed, args.reward_model
  )
  made = comparison.Comparison(
    args.workdir, names=args.methods, seeds=args.seeds, variants=args.variants, start=args.start,
    bagel=args.bagel, sweep=args.sweep, benchmark=benchmark, overrides=overrides,
  )
  made.check()  # All of them, so that a mistake in the last one is found before the first begins.
  run_lib.check_workdir(args.workdir)
  # Not `hosts.hold`, which would take the devices that the runs need.
  with locks.hold(locks.inside(args.workdir), f"--workdir={args.workdir}"):
    # Unbuffered, so that the last line of a log is what a run does.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(args.workdir / "compiled")}
    environment = cache | os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
      processes.run(
        made.jobs, cores=processes.cores(args.jobs), environment=environment, on_end=made.write,
        failed=made.failed,
      )
    except processes.Stopped:
      made.write()
      print("stopped; run the same command again to continue", file=sys.stderr)
      sys.exit(130)
    print(made.write())
    drawn = made.draw()
  for path in (args.workdir / "results.md", *drawn):
    print(f"wrote {path}")
  if made.failed:
    names = "; ".join(f"{name}: {reason}" for name, reason in made.failed.items())
    print(f"error: {len(made.failed)} of the runs failed: {names}", file=sys.stderr)
    sys.exit(1)
