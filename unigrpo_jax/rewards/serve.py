"""Serves rewards over HTTP: `python -m unigrpo_jax.rewards.serve --help`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import math
import traceback
from typing import Any
import urllib.parse

from unigrpo_jax import errors
from unigrpo_jax.rewards import arguments, base, listening, wire
from unigrpo_jax.rewards import http as client

DESCRIPTION = """Serves rewards over HTTP, for `http` rewards of a training run elsewhere.

Needs numpy, scipy and Pillow, no accelerator of its own. The protocol is in rewards/wire.py."""

EPILOG = """examples:
  python -m unigrpo_jax.rewards.serve --rewards iconworld_strict iconworld_soft
  python -m unigrpo_jax.rewards.serve --rewards taste=my_rewards:Taste \\
    --reward_options '{"taste": {"device": "cuda"}}' --host 0.0.0.0 --token_env REWARD_TOKEN
  curl http://127.0.0.1:8901/v1/rewards

A reward is a registered name, module:function or another server's URL, after NAME= to serve it
under that name. The connection is not encrypted: a token protects a private network, not a public
one.
"""

class Server(listening.Server):
  """A reward server: a thread a request, which waits while another calls the same reward."""

  def __init__(self, rewards: Mapping[str, base.Reward], **options: Any):
    """`options` are those of `listening.Server`, which raises the same."""
    self.rewards = dict(rewards)
    self.locks = {name: base.reward_lock(reward) for name, reward in rewards.items()}
    super().__init__(Handler, **options)


class Handler(listening.Handler):
  """One request; see `wire` for the protocol."""

  server: Server

  def get(self) -> dict[str, Any]:
    if self.path != wire.PREFIX:
      raise listening.Refusal(
        404, f"no {self.path}; there are {wire.PREFIX} and {listening.HEALTH}"
      )
    return {"rewards": sorted(self.server.rewards)}

  def post(self) -> dict[str, Any]:
    name = urllib.parse.unquote(self.path.removeprefix(f"{wire.PREFIX}/"))
    if not self.path.startswith(f"{wire.PREFIX}/") or name not in self.server.rewards:
      names = ", ".join(sorted(self.server.rewards))
      raise listening.Refusal(404, f"no reward at {self.path}; there are {names}")
    length = self.length("send fewer samples")
    with self.server.bodies:
      body = self.read(length)
      try:
        samples = wire.unpack(body)
      except ValueError as error:
        raise listening.Refusal(400, str(error)) from None
      del body
      try:
        with self.server.locks[name]:
          scores = base.evaluate(self.server.rewards[name], samples)
      except BaseException as error:  # SystemExit too: the server goes on, and answers.
        traceback.print_exc()
        raise listening.Refusal(
          500, f"reward {name} failed: {errors.describe(error)}"
        ) from None
    if scores.reason is not None:
      self.log_message("reward %s: %s", name, scores.reason)
    return {"scores": [None if math.isnan(value) else value for value in scores.values.tolist()]}


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.rewards.serve", allow_abbrev=False, description=DESCRIPTION,
    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  arguments.add(parser, required=True)
  listening.add_arguments(parser, port=8901)
  args = parser.parse_args(argv)
  listening.check_arguments(args)
  server = Server(
    arguments.make(args.rewards, args.reward_options), host=args.host, port=args.port,
    token=client.read_token(None, args.token_env), max_bytes=args.max_mb << 20,
  )
  server.run(", ".join(server.rewards))


if __name__ == "__main__":
  errors.report(main)
