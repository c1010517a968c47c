"""The command-line arguments `--rewards` and `--reward_options`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from unigrpo_jax import errors
from unigrpo_jax.data import lines
from unigrpo_jax.rewards import base, making


def add(parser: argparse.ArgumentParser, *, required: bool, default: str = "") -> None:
  """Adds the arguments that `make` reads.

  Args:
    parser: gets the arguments.
    required: whether `--rewards` must be given.
    default: appended to its help: what is done without it.
  """
  parser.add_argument(
    "--rewards", nargs="+", required=required, metavar="[NAME=]REWARD",
    help=f"what scores the pictures; REWARD is module:function, the URL of a server that has NAME, "
    f"or one of {', '.join(making.names())}{default}",
  )
  parser.add_argument(
    "--reward_options", default="{}", metavar="JSON",
    help='their options by NAME, such as {"NAME": {"scale": 2.0}}',
  )


def make(items: Sequence[str], options: str) -> dict[str, base.Reward]:
  """Makes the rewards of a command line.

  Args:
    items: values of `--rewards`, each [NAME=]REWARD; REWARD may be the URL of a reward server.
    options: value of `--reward_options`: JSON {name: {option: value}}.

  Returns:
    {name: reward}.

  Raises:
    InputError: a name is given twice or its reward does not exist, or the options are malformed.
  """
  by_name = lines.parse(options, "--reward_options", 'write {"NAME": {"option": value}}')
  if not all(isinstance(of_reward, dict) for of_reward in by_name.values()):
    raise errors.InputError(f"--reward_options={options} must be an object of objects, by reward")
  rewards: dict[str, base.Reward] = {}
  for item in items:
    name, _, reward = item.rpartition("=")
    served = reward.startswith(("http://", "https://"))
    if served and not name:
      raise errors.InputError(f"--rewards {item}: write NAME={item}, a reward that is served there")
    name = name or reward
    if name in rewards:
      raise errors.InputError(f"--rewards names {name} twice; write OTHER={reward}")
    reward_options = by_name.pop(name, {})
    if served:
      reward_options = {"reward": name} | reward_options | {"url": reward}
      reward = "http"
    rewards[name] = making.make(reward, **reward_options)
  if by_name:
    raise errors.InputError(
      f"--reward_options has {', '.join(by_name)}, which --rewards does not name"
    )
  return rewards
