"""Scores a checkpoint on held-out prompts: `python -m unigrpo_jax.evaluate --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import atomic
from unigrpo_jax.rewards import arguments
from unigrpo_jax.runtime import host_flags

DESCRIPTION = """Scores a checkpoint on held-out prompts.

Draws every prompt under every mode, from noise that depends on --seed and the prompt's number
alone, and writes into --out:
  results.md      means of each reward by mode and category, with 95 % intervals
  results.json    every prompt, reasoning and reward
  contact.png     the first --keep prompts: pictures side by side by mode, reasonings, rewards
  images/         those pictures"""

EPILOG = """modes:
  plain           draws the prompt
  think           reasons about it first, then draws
  given           draws from the correct reasoning (IconWorld only)
  ...+guidance    any of them with classifier-free guidance
  answer          answers questions about rendered pictures (IconWorld only)
  edit            edits rendered pictures (IconWorld only)

rewards without --rewards, of prompts whose metadata asks for IconWorld's classes:
  strict, soft    IconWorld's verifier of the picture, 0 or 1 and in [0, 1]
  reasoning       whether the plan that the reasoning ends in is correct
Other prompts are then drawn, not scored.

examples:
  python -m unigrpo_jax.evaluate --out=runs/eval
  python -m unigrpo_jax.evaluate --checkpoint=runs/tiny --modes think think+guidance --out=runs/eval
  python -m unigrpo_jax.evaluate --checkpoint=BAGEL-7B-MoT --prompts_from=mine.txt --out=runs/eval
  python -m unigrpo_jax.evaluate --checkpoint=BAGEL-7B-MoT --prompts_from=mine.jsonl \\
    --rewards red=my_rewards:redness taste=http://127.0.0.1:8901 --out=runs/eval
"""
DRAWING = ["plain", "plain+guidance", "think", "think+guidance"]
ICONWORLD = [*DRAWING, "given", "given+guidance", "answer", "edit"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.evaluate", description=DESCRIPTION, epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  own = "(default: the checkpoint's own)"
  add("--checkpoint", default="tiny",
      help='official or converted folder, or "tiny", the embedded one (default: %(default)s)')
  add("--out", type=pathlib.Path, required=True, help="folder for the results")
  add("--prompts_from", default="iconworld",
      help="iconworld, a .txt or .jsonl file, or a set that unigrpo_jax.data built "
      "(default: %(default)s)")
  add("--split", default="test", help="of the prompts (default: %(default)s)")
  add("--prompts", type=int, help="how many, from the first (default: 600 of iconworld, else all)")
  add("--modes", nargs="+", metavar="MODE",
      help="see below (default: all of iconworld, else plain and think, without and with guidance)")
  add("--batch_size", type=int, default=100, help="rows run together (default: %(default)s)")
  add("--keep", type=int, default=24, help="prompts whose pictures are kept (default: %(default)s)")
  add("--seed", type=int, default=0, help="of the first row; row i has seed + i")
  add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
      help="pixels (default: the largest the checkpoint is configured for)")
  add("--num_timesteps", type=int, help=f"points of the time grid {own}")
  add("--shift", type=float, help=f"timestep shift {own}")
  add("--cfg_text_scale", type=float, help=f"of the guided modes {own}")
  add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
      help=f"guide where LOW < t <= HIGH {own}")
  add("--cfg_renorm", choices=("global", "channel", "text_channel"),
      help=f"norm that guidance may not exceed {own}")
  add("--temperature", type=float, help=f"of sampled text; 0 is greedy {own}")
  add("--max_tokens", type=int, help=f"most tokens of a reasoning {own}")
  arguments.add(parser, required=False, default=" (default: IconWorld's, see below)")
  host_flags.add_arguments(parser)
  args = parser.parse_args(argv)
  for name in ("prompts", "batch_size", "max_tokens"):
    errors.require(f"--{name}", getattr(args, name), low=1)
  errors.require("--keep", args.keep, low=0)
  errors.require("--seed", args.seed, low=0, high=2**31 - 1)
  errors.require("--num_timesteps", args.num_timesteps, low=2, high=100_000)
  errors.require("--shift", args.shift, above=0, high=1e6)
  errors.require("--cfg_text_scale", args.cfg_text_scale, low=0, high=1e6)
  errors.require("--temperature", args.temperature, low=0, high=1e6)
  if args.cfg_interval and not 0 <= args.cfg_interval[0] < args.cfg_interval[1]:
    low, high = args.cfg_interval
    raise errors.InputError(f"--cfg_interval={low} {high} must have 0 <= LOW < HIGH")
  return args


def check_out(folder: pathlib.Path) -> None:
  """Refuses a folder that cannot be written to; better now than after the drawing."""
  if folder.exists() and not folder.is_dir():
    raise errors.InputError(f"--out={folder} is a file; give a folder")
  with errors.at(f"--out={folder}"):
    atomic.probe(folder / "results.json")


def read_examples(args: argparse.Namespace):
  """The prompts; IconWorld's own with their scenes and reasonings."""
  from unigrpo_jax.data import prompts as prompt_sets
  from unigrpo_jax.iconworld import prompts

  if args.prompts_from == prompt_sets.ICONWORLD:
    return prompts.fixed(args.split, args.prompts or prompt_sets.ICONWORLD_COUNTS["test"])
  examples = list(prompt_sets.open_set(args.prompts_from, args.split))
  if args.prompts is not None and args.prompts > len(examples):
    raise errors.InputError(
      f"--prompts={args.prompts}: {args.prompts_from}, split {args.split}, has {len(examples)}"
    )
  return examples[: args.prompts]


def settings_of(args: argparse.Namespace, defaults):
  """The settings: what was given, else the checkpoint's own."""
  from unigrpo_jax.episodes import batches
  from unigrpo_jax.sampling import flow

  given = lambda value, default: default if value is None else value
  return batches.Settings(
    num_timesteps=given(args.num_timesteps, defaults.num_timesteps),
    shift=given(args.shift, defaults.timestep_shift),
    temperature=given(args.temperature, defaults.temperature),
    max_tokens=given(args.max_tokens, defaults.max_tokens),
    guidance=flow.Guidance(
      text_scale=given(args.cfg_text_scale, defaults.cfg_text_scale),
      interval=tuple(given(args.cfg_interval, defaults.cfg_interval)),
      renorm=given(args.cfg_renorm, defaults.cfg_renorm_type),
    ),
  )


def make_scorer(args: argparse.Namespace):
  """The rewards that `--rewards` asks for; None where it asks for none."""
  from unigrpo_jax import rewards

  if args.rewards is None:
    if args.reward_options != "{}":
      raise errors.InputError("--reward_options needs --rewards")
    return None
  made = arguments.make(args.rewards, args.reward_options)
  return rewards.Scorer(made, dict.fromkeys(made, 1.0))


def draw(drawing, total: int):
  """The results of an `Evaluation` of `total` pictures, with a bar on the first host."""
  from unigrpo_jax.runtime import hosts, metrics

  with metrics.progress(total, "drawing", unit="pictures", enabled=hosts.first()) as bar:
    def report(mode: str, done: int, _: int) -> None:
      bar.set_description_str(mode, refresh=False)
      bar.update(done - bar.n)

    return drawing.run(progress=report)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.runtime import hosts

  hosts.from_flags(args)
  hosts.run(lambda: evaluate(args), lambda: "nothing was written")


def evaluate(args: argparse.Namespace) -> None:
  """Draws and scores on all hosts; the first of them tells and writes."""
  from unigrpo_jax.benchmarks import evaluation
  from unigrpo_jax.benchmarks import iconworld as iconworld_evaluation
  from unigrpo_jax.data import prompts as prompt_sets
  from unigrpo_jax.episodes import pipeline as pipeline_lib
  from unigrpo_jax.runtime import hosts

  iconworld = args.prompts_from == prompt_sets.ICONWORLD
  names = args.modes or (ICONWORLD if iconworld else DRAWING)
  tasks = [name for name in iconworld_evaluation.TASKS if name in names]
  modes = [evaluation.Mode.parse(name) for name in names if name not in tasks]
  if args.rewards and not modes:
    raise errors.InputError(f"--modes {' '.join(names)}: nothing is drawn for --rewards to score")
  if tasks and not iconworld:
    raise errors.InputError(f"--modes {tasks[0]} needs --prompts_from=iconworld")
  hosts.compare(vars(args) | {"process": None})
  with hosts.raise_on_all_hosts():
    if hosts.first():
      check_out(args.out)
    examples = read_examples(args)
    scorer = make_scorer(args)
    pipeline = pipeline_lib.Pipeline.open(args.checkpoint)
  hosts.compare({"prompts": [[example.prompt, example.metadata] for example in examples]})
  settings = settings_of(args, pipeline.config.generation)
  drawing = modes and evaluation.Evaluation(
    pipeline, examples, scorer.score if scorer else iconworld_evaluation.score,
    settings=settings, modes=modes, batch_size=args.batch_size, seed=args.seed, keep=args.keep,
    size=args.size and tuple(args.size),
  )
  hosts.print_first(
    f"{args.checkpoint}: {len(examples)} prompts of {args.prompts_from}, {', '.join(names)}"
  )
  pipeline.load()
  total = len(modes) * len(examples)
  results = draw(drawing, total) if modes else evaluation.Results([], {})
  for task in tasks:
    hosts.print_first(f"{task}: {len(examples)} pictures")
    run = getattr(iconworld_evaluation, task)
    results.rows += run(
      pipeline, examples, settings=settings, batch_size=args.batch_size, seed=args.seed
    )
  if scorer:
    scorer.close()
    for name, failures in scorer.failures.items():
      reasons = filter(None, hosts.gather_texts(failures.last))
      if left := sum(name not in row.rewards for row in results.rows if row.mode not in tasks):
        reason = next(reasons, "")
        hosts.print_first(f"note: reward {name} did not score {left} pictures: {reason}")
  elif unscored := sum(not row.rewards for row in results.rows):
    hosts.print_first(
      f"note: {unscored} of {len(results.rows)} pictures were not scored: their prompts have no "
      "metadata of IconWorld; --rewards names other rewards"
    )
  hosts.print_first("\n" + "\n".join(map(results.table, results.rewards)))
  with hosts.raise_on_all_hosts():
    if hosts.first():
      results.save(args.out, f"{args.checkpoint} on {args.prompts_from}, {args.split}")
  hosts.print_first(f"wrote {args.out}")


if __name__ == "__main__":
  errors.report(main)
