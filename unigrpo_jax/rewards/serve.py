"""Serves rewards over HTTP: `python -m unigrpo_jax.rewards.serve --help`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import traceback
from typing import Any
import urllib.parse

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import arguments, base, connection, listening, making, wire

DESCRIPTION = """Serves rewards over HTTP, for `http` rewards of a training run elsewhere.

Needs numpy, scipy and Pillow, no accelerator of its own. The protocol is in rewards/wire.py."""

EPILOG = """examples:
  python -m unigrpo_jax.rewards.serve --rewards iconworld_strict iconworld_soft
  python -m unigrpo_jax.rewards.serve --rewards taste=my_rewards:Taste \\
    --reward_options '{"taste": {"device": "cuda"}}' --host 0.0.0.0 --token_env REWARD_TOKEN
  python -m unigrpo_jax.rewards.serve --rewards taste=my_rewards:Taste --warm
  curl http://127.0.0.1:8901/v1/rewards

A reward is a registered name, module:function or another server's URL, after NAME= to serve it
under that name. The connection is not encrypted: a token protects a private network, not a public
one.
"""


class Server(listening.Server):
  """A reward server. A request waits while another one calls the same reward, if that must not be
  called concurrently.

  Attributes:
    rewards: {name: reward}.
    locks: {name: what to hold while calling that reward}.
  """

  def __init__(self, rewards: Mapping[str, base.Reward], **options: Any):
    """Listens, and serves `rewards`; `options` and errors are those of `listening.Server`."""
    self.serve(rewards)
    super().__init__(Handler, **options)

  def serve(self, rewards: Mapping[str, base.Reward]) -> None:
    """Serves these rewards from now on."""
    self.locks = {name: base.reward_lock(reward) for name, reward in rewards.items()}
    self.rewards = dict(rewards)


class Handler(listening.Handler):
  """Answers one request by the protocol of `wire`."""

  server: Server

  def get(self) -> dict[str, Any]:
    if self.path != wire.PREFIX:
      raise listening.Refusal(
        404, f"no {self.path}; there are {wire.PREFIX} and {listening.HEALTH}"
      )
    rewards = self.server.rewards
    return {
      "rewards": sorted(rewards), "encodings": wire.ENCODINGS,
      "settings": base.settings_of(rewards),
    }

  def post(self) -> dict[str, Any]:
    name = None
    if self.path != wire.PREFIX:
      name = urllib.parse.unquote(self.path.removeprefix(f"{wire.PREFIX}/"))
      if not self.path.startswith(f"{wire.PREFIX}/") or name not in self.server.rewards:
        raise listening.Refusal(404, f"no reward at {self.path}; {self._there_are()}")
    length = self.length("send fewer samples")
    with self.server.bodies:
      body = self.read(length)
      try:
        if name is None:
          samples, names = wire.unpack_named(body, self.server.max_bytes)
        else:
          samples, names = wire.unpack(body, self.server.max_bytes), None
      except ValueError as error:
        raise listening.Refusal(400, str(error)) from None
      del body
      scores = {each: self._evaluate(each, samples) for each in names or [name]}
    if name is not None and isinstance(scores[name], str):
      raise listening.Refusal(500, scores[name])
    return wire.answer(scores, names, wire.DETAILS in self.headers)

  def _evaluate(self, name: str, samples: Sequence[base.Sample]) -> base.Scores | str:
    """A reward's scores, or a line that says why there are none."""
    if name not in self.server.rewards:
      return f"no reward {name}; {self._there_are()}"
    try:
      with self.server.locks[name]:
        if self.has_gone():  # Scoring for a client that left would only delay its next request.
          return "the client did not wait for its turn; give it a larger timeout"
        scores = base.evaluate(self.server.rewards[name], samples)
    except BaseException as error:  # SystemExit too: the server goes on, and answers.
      traceback.print_exc()
      return f"reward {name} failed: {errors.describe(error)}"
    if scores.reason is not None:
      self.log_message("reward %s: %s", name, scores.reason)
    return scores

  def _there_are(self) -> str:
    return f"there are {', '.join(sorted(self.server.rewards))}"


def warmed(rewards: Mapping[str, base.Reward]) -> Mapping[str, base.Reward]:
  """Has each reward score a grey image, which makes it load what it loads lazily; returns them.

  Raises:
    InputError: a reward raises. Having no score for such an image is no error.
  """
  sample = base.Sample("a grey square", np.full((256, 256, 3), 127, np.uint8))
  for name, reward in rewards.items():
    with making.made(f"reward {name} failed at a grey image"):
      base.evaluate(reward, [sample])
  return rewards


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.rewards.serve", allow_abbrev=False, description=DESCRIPTION,
    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  arguments.add(parser, required=True)
  listening.add_arguments(parser, port=8901)
  parser.add_argument(
    "--warm", action="store_true",
    help=f"listen at once, with {listening.HEALTH} saying {listening.LOADING}, which clients wait "
    "for, until the models are loaded and each reward has scored a grey image",
  )
  args = parser.parse_args(argv)
  listening.check_arguments(args)

  def make() -> Mapping[str, base.Reward]:
    return arguments.make(args.rewards, args.reward_options)

  server = Server(
    {} if args.warm else make(), host=args.host, port=args.port,
    token=connection.read_token(None, args.token_env), max_bytes=args.max_mb << 20,
  )
  if args.warm:
    server.run(", ".join(args.rewards), lambda: server.serve(warmed(make())))
  else:
    server.run(", ".join(server.rewards))


if __name__ == "__main__":
  errors.report(main)
