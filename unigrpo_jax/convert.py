"""Official BAGEL folder <-> Orbax folder, streaming: `python -m unigrpo_jax.convert --help`.

`--export` gives back every tensor and every other file bit for bit. Memory stays near 1 GiB for any
size of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.runtime import hub

EPILOG = """examples:
  python -m unigrpo_jax.convert --source=ByteDance-Seed/BAGEL-7B-MoT --target=bagel
  python -m unigrpo_jax.convert --check --source=BAGEL-7B-MoT --target=bagel
  python -m unigrpo_jax.convert --export --source=bagel --target=bagel_official
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.convert",
    description="Converts an official BAGEL folder to an Orbax checkpoint that loads sharded, and "
    "back, bit for bit.\nStreams: about 1 GiB of memory, and disk for one copy of the model.",
    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
  )
  parser.add_argument(
    "--source", required=True,
    help="folder to read: official (with ema.safetensors and ae.safetensors), or converted with "
    "--export; or a name of the Hugging Face hub, which is downloaded once, to HF_HOME; or "
    '"tiny", the embedded one',
  )
  parser.add_argument("--target", required=True, type=files.path, help="folder to make")
  parser.add_argument(
    "--missing_from", metavar="FOLDER",
    help="official folder, or name on the hub, of the model that --source was tuned from: what "
    "--source lacks, as fine-tunes for drawing lack the vision tower, is taken from it",
  )
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument(
    "--export", action="store_true", help="from a converted folder back to official files"
  )
  mode.add_argument(
    "--check", action="store_true",
    help="write nothing: compare official --source with converted --target, tensor by tensor and "
    "by a forward pass; exit status 1 if they differ",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing model folder, after success only"
  )
  args = parser.parse_args(argv)
  errors.refuse_beside(parser, args, "export", ["missing_from"])
  errors.refuse_beside(parser, args, "check", ["overwrite"])
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)
  source, missing_from = (
    name if name in (None, "tiny") else hub.find(name) for name in (args.source, args.missing_from)
  )

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.runtime import conversion

  if args.check:
    if not conversion.check(source, args.target, missing_from):
      sys.exit(1)
  elif args.export:
    conversion.export(source, args.target, overwrite=args.overwrite)
  else:
    conversion.convert(
      source, args.target, overwrite=args.overwrite, missing_from=missing_from
    )


if __name__ == "__main__":
  errors.report(main)
