"""Serves a BAGEL's understanding over HTTP: `python -m unigrpo_jax.serve --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.rewards import listening

DESCRIPTION = """Serves a BAGEL's understanding by the OpenAI protocol: answers about a picture.

  POST /v1/chat/completions   one message of text and at most one picture, a data URL of PNG or
                              JPEG; max_tokens, temperature, seed, logprobs, top_logprobs
  GET  /v1/models             the one model
  GET  /healthz               {"status": "ok"}, without a token

Requests that wait at the same time with the same max_tokens and temperature run as one batch."""

EPILOG = """examples:
  python -m unigrpo_jax.serve --checkpoint=BAGEL-7B-MoT
  python -m unigrpo_jax.serve --checkpoint=runs/reward_model/export --port=8001

The folder of a learned reward is that of a BAGEL too. The connection is not encrypted: a token
protects a private network, not a public one.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.serve", allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", default="tiny",
      help="official or converted folder, a name of the Hugging Face hub, downloaded once, "
      '"tiny", the embedded one, or "tiny_reward_model" (default: %(default)s)')
  add("--adapter", metavar="FOLDER",
      help="LoRA adapters for the checkpoint, from PEFT or export --adapter")
  add("--name",
      help="how requests call the model (default: the last part of the checkpoint's path)")
  add("--dtype", choices=("float32", "bfloat16"),
      help="of the network (default: float32 on CPU, bfloat16 elsewhere)")
  add("--batch_size", type=int, default=32,
      help="most requests that run together (default: %(default)s)")
  add("--max_tokens", type=int,
      help="most tokens of an answer, also of a request that sets no limit (default: 1024, or half "
      "of the model's positions where that is less)")
  listening.add_arguments(parser, port=8000)
  args = parser.parse_args(argv)
  errors.require("--batch_size", args.batch_size, low=1, high=1024)
  errors.require("--max_tokens", args.max_tokens, low=1, high=10**6)
  listening.check_arguments(args)
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.tools.serve import command

  command.run(args)


if __name__ == "__main__":
  errors.report(main)
