"""Writes a checkpoint of a training run as an official folder, a model that every command takes.

Adapters are merged into the weights; with --adapter they are written by themselves, for PEFT.

Works while the run continues: it reads the newest complete checkpoint, or the one of --step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import files

EPILOG = """examples:
  python -m unigrpo_jax.export runs/tiny runs/tiny_model
  python -m unigrpo_jax.export runs/lora adapters --adapter
"""


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.export", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
  )
  parser.add_argument("workdir", type=files.path, help="folder of the run")
  parser.add_argument("out", type=files.path, help="folder to write")
  parser.add_argument(
    "--adapter", action="store_true",
    help="write the run's LoRA adapters alone, as PEFT does (adapter_model.safetensors)",
  )
  parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
  parser.add_argument(
    "--dtype", choices=("bfloat16", "float16", "float32"),
    help="of the weights (default: config.export_dtype of the run; with --adapter float32)",
  )
  parser.add_argument(
    "--init_from", metavar="FOLDER",
    help="where the model that the run began with is now, if it has moved (default: as in the "
    "run's config)",
  )
  parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.tools import export

  export.export(
    args.workdir, args.out, step=args.step, dtype=args.dtype, overwrite=args.overwrite,
    adapter=args.adapter, init_from=args.init_from,
  )


if __name__ == "__main__":
  errors.report(main)
