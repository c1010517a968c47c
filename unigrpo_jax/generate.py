"""Draws, edits and answers from the command line: `python -m unigrpo_jax.generate --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.runtime import host_flags
from unigrpo_jax.tools import sampling_flags

EPILOG = """modes:
  (none)                     draw the prompt
  --think                    reason about the prompt first, then draw
  --image=IN.png             edit the image as the prompt says (with --think: reason first)
  --understand               answer the prompt in words, about --image if given
  --understand --think       reason first, then answer

examples:
  python -m unigrpo_jax.generate --checkpoint=tiny --think --out=kites.png --upscale=8 \\
    --prompt="draw half of four kites in the colour of grass"
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompt="a red kite" --out=kite.png
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompts_file=prompts.txt --out=images

"tiny" is the embedded checkpoint of IconWorld, a world of 32-pixel pictures of up to four icons; it
knows nothing else. --upscale makes its pictures large enough to look at.

The defaults of sampling are the released model's; a checkpoint states others under "generation" in
its bagel_config.json. Edits are guided on 0 < t <= 1 with the renorm text_channel by default.
Beside every image NAME.png lies NAME.json with the prompt, the reasoning, the seed, the settings
and the seconds of each phase: read, decode, denoise, vae. A row's result depends on its prompt,
seed and settings alone, not on the batch it ran in (to float rounding).
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.generate",
    description="Draws, edits and answers from the command line.", epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", default="tiny", help="official BAGEL folder, one made by convert, a name "
      "of the Hugging Face hub such as ByteDance-Seed/BAGEL-7B-MoT, which is downloaded once, or "
      '"tiny", the embedded one, which draws 32 x 32 pixels (default: %(default)s)')
  add("--adapter", metavar="FOLDER",
      help="LoRA adapters for the checkpoint, from PEFT or export --adapter")
  add("--prompt", type=errors.text, help="what to draw, change or answer")
  add("--prompts_file", type=files.path, help=".txt with one prompt a line, or .jsonl with "
      'one {"prompt": ...} a line; UTF-8, blank lines are skipped')
  add("--image", type=files.path, help="image to edit, or to talk about with --understand")
  add("--understand", action="store_true", help="answer in words instead of drawing")
  add("--think", action="store_true", help="write reasoning first")
  add("--out", type=files.path,
      help="PNG to write, or a folder for several prompts (default: generated.png or generated/); "
      "with --understand the JSON file (default: answer.json)")
  add("--height", type=int, help="pixels (default: the largest the checkpoint is configured for)")
  add("--width", type=int, help="pixels (default: as --height)")
  add("--upscale", type=int, default=1, metavar="N", help="write every pixel as N x N, to look at "
      "small pictures (default: %(default)s)")
  add("--dtype", choices=("float32", "bfloat16"),
      help="of the network (default: float32 on CPU, bfloat16 elsewhere)")
  sampling_flags.add(parser, batch_size=None)
  add("--cfg_image_scale", type=float, help="guidance by the image; 1 turns it off (default: 1, "
      "editing 2)")
  add("--cfg_renorm_min", type=float, default=0.0, help="least renorm factor; 1 turns it off "
      "(default: %(default)s)")
  add("--cfg_pack_coupled", action="store_true", help="take the global norm over the whole batch, "
      "as the official code does to a pack; an image then depends on its neighbours")
  host_flags.add_arguments(parser)
  args = parser.parse_args(argv)
  errors.refuse_beside(parser, args, "understand", ("height", "width", "upscale"))
  _check_args(args)
  return args


def _check_args(args: argparse.Namespace) -> None:
  """Refuses what cannot work before anything is loaded."""
  if (args.prompt is None) == (args.prompts_file is None):
    raise errors.InputError("give exactly one of --prompt and --prompts_file")
  if args.prompt is not None and not args.prompt.strip():
    raise errors.InputError("--prompt is empty; write what to draw, change or answer")
  if args.image and (args.height or args.width):
    raise errors.InputError(
      "--height and --width cannot be given with --image: an edit keeps its image's (resized) size"
    )
  sampling_flags.check(args)
  errors.require("--height", args.height, low=1)
  errors.require("--width", args.width, low=1)
  errors.require("--upscale", args.upscale, low=1, high=64)
  errors.require("--cfg_image_scale", args.cfg_image_scale, low=0, high=1e6)
  errors.require("--cfg_renorm_min", args.cfg_renorm_min, low=0, high=1)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.tools import generate

  generate.run(args)


if __name__ == "__main__":
  errors.report(main)
