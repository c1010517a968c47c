"""Scores a checkpoint on held-out prompts: `python -m unigrpo_jax.evaluate --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.rewards import arguments
from unigrpo_jax.runtime import host_flags
from unigrpo_jax.tools import sampling_flags

DESCRIPTION = """Scores a checkpoint on held-out prompts.

Draws every prompt under every mode, from noise that depends on --seed, the prompt's number and the
image's alone, and writes into --out:
  results.md      means of each reward by mode and category, with 95 % intervals over prompts
  results.json    every image's prompt, reasoning, rewards and their details
  benchmarks.json GenEval and TA by mode, of prompts that have them (see below)
  images/         the pictures of the first --keep prompts, written while it runs
  contact.png     the first 24 of these prompts: pictures side by side by mode, reasonings, rewards
While it runs, unfinished.jsonl has the rows so far: after a kill, the same command continues."""

EPILOG = """modes:
  plain           draws the prompt
  think           reasons about it first, then draws
  given           draws from the correct reasoning (IconWorld only)
  ...+guidance    any of them with classifier-free guidance
  answer          answers questions about rendered pictures (IconWorld only)
  edit            edits rendered pictures (IconWorld only)

The defaults of sampling are the released model's; a checkpoint states others under "generation" in
its bagel_config.json.

rewards without --rewards, of --prompts_from=iconworld alone:
  strict, soft    IconWorld's verifier of the picture, 0 or 1 and in [0, 1]
  geneval         GenEval's verdict, 0 or 1, which forgives objects that were not asked for
  points          share of the prompt's exam points that the picture meets
  reasoning       whether the plan that the reasoning ends in is correct
Other prompts are then drawn, not scored. A reward's settings (its detector, its thresholds ...) are
above its table and in results.json.

benchmarks:
  GenEval         the mean of its six tags, by any reward of prompts with its tags, as its own
                  summary has it. --keep_official writes the pictures as its detector script wants
                  them, and --geneval_results summarises what that wrote
  TA              the mean over pictures of the share of exam points that are met: of IconWorld's
                  prompts by its verifier; of JSON lines {"prompt": ..., "points": ["...", ...]} by
                  --rewards ta=judge, a model on a server (docs/judge.md), or by the model of
                  --points_judge

examples:
  python -m unigrpo_jax.evaluate --out=runs/eval
  python -m unigrpo_jax.evaluate --checkpoint=runs/tiny_model --modes think think+guidance \\
    --out=runs/tiny_eval
  python -m unigrpo_jax.evaluate --checkpoint=BAGEL-7B-MoT --prompts_from=mine.txt --out=runs/mine
  python -m unigrpo_jax.evaluate --checkpoint=BAGEL-7B-MoT --prompts_from=geneval --samples=4 \\
    --modes think+guidance --keep=all --keep_official=runs/official --out=runs/drawn
  python -m unigrpo_jax.evaluate --images=runs/drawn --rewards=brightness --out=runs/again
  python -m unigrpo_jax.evaluate --geneval_results=results.jsonl --out=runs/geneval
  python -m unigrpo_jax.evaluate --checkpoint=BAGEL-7B-MoT --prompts_from=mine.jsonl \\
    --rewards red=my_rewards:redness taste=http://127.0.0.1:8901 --out=runs/rated
"""


# Flags about how pictures are drawn, which existing ones do not take, and about those to score.
_OF_DRAWING = (
  "checkpoint", "adapter", "prompts_from", "split", "samples", "modes", "keep", "size", "seed",
  "keep_official", "num_timesteps", "shift", "cfg_text_scale", "cfg_interval", "cfg_renorm",
  "temperature", "max_tokens", "batch_size",
)
_WITHOUT = {
  "images": _OF_DRAWING,
  "geneval_results": (*_OF_DRAWING, "prompts", "points_judge", "rewards"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.evaluate", description=DESCRIPTION, epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint",
      help="official or converted folder, a name of the Hugging Face hub, downloaded once, "
      'or "tiny", the embedded one (default: tiny)')
  add("--adapter", metavar="FOLDER",
      help="LoRA adapters for the checkpoint, from PEFT or export --adapter")
  add("--out", type=files.path, required=True, metavar="FOLDER", help="where the results go")
  add("--overwrite", action="store_true", help="replace a finished evaluation in --out")
  add("--prompts_from", default="iconworld",
      help="iconworld, geneval or another generated set, or a file or folder that "
      "unigrpo_jax.data reads "
      "(default: %(default)s)")
  add("--split", default="test",
      help="split of the prompts, of a set or a folder (default: %(default)s)")
  add("--prompts", type=int, metavar="COUNT",
      help="take only the first COUNT prompts (default: 600 of iconworld, else all)")
  add("--samples", type=int, help="images of each prompt (default: 1); image K of prompt I, both "
      "counted from 0, has the seed --seed + I + K * 2**20")
  add("--modes", nargs="+", metavar="MODE",
      help="how to draw, see below (default: of iconworld all modes, else plain and think, each "
      "without and with guidance)")
  add("--keep", type=number_or_all, default=24, metavar="COUNT",
      help='save the pictures of the first COUNT prompts, or "all" (default: %(default)s)')
  add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
      help="of the images, in pixels (default: the largest that the checkpoint is configured for)")
  add("--points_judge", metavar="FOLDER",
      help="a learned reward, a folder with reward.json, that answers the prompts' exam points")
  add("--keep_official", type=files.local_path, metavar="FOLDER",
      help="also write all pictures for GenEval's own script: FOLDER/00000/samples/0000.png, or "
      "with several modes FOLDER/MODE/00000/...")
  add("--images", type=files.local_path, metavar="FOLDER",
      help="draw nothing; score the pictures of another evaluation's --out, or of a folder as "
      "--keep_official writes, by --rewards")
  add("--geneval_results", type=files.local_path, metavar="FILE",
      help="draw nothing; summarise the results.jsonl of GenEval's own script")
  sampling_flags.add(parser, batch_size=100)
  arguments.add(parser, required=False, default=" (default: IconWorld's, see below)")
  host_flags.add_arguments(parser)
  args = parser.parse_args(argv)
  sampling_flags.check(args)
  errors.require("--prompts", args.prompts, low=1)
  if args.keep != "all":
    errors.require("--keep", args.keep, low=0)
  errors.require("--samples", args.samples, low=1, high=1000)
  if args.images is not None and args.geneval_results is not None:
    raise errors.InputError("--images and --geneval_results: give one of them")
  for flag, names in _WITHOUT.items():
    errors.refuse_beside(parser, args, flag, names)
  args.checkpoint = args.checkpoint or "tiny"
  return args


def number_or_all(text: str) -> int | str:
  if text == "all":
    return text
  try:
    return int(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all") from None


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)

  if args.images is not None or args.geneval_results is not None:
    from unigrpo_jax.tools import rescore

    rescore.run(args)
    return

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.tools import evaluate

  evaluate.run(args)


if __name__ == "__main__":
  errors.report(main)
