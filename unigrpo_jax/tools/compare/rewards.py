"""The one reward that all methods of a comparison are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.reward_models import judge as judge_lib
from unigrpo_jax.tools.compare import methods, scores

# Logged beside the learned reward: what it stands for.
VERIFIER = ("iconworld_strict", "iconworld_soft", "iconworld_reasoning")


def overrides(judge: str) -> list[str]:
  """`--config.KEY=VALUE` that make a learned reward the only one that counts; [] for none."""
  if not judge:
    return []
  weights = {scores.JUDGE: 1.0} | dict.fromkeys(VERIFIER, 0.0)
  return [
    f"--config.rewards={weights}", f"--config.reward_options={ {scores.JUDGE: {'folder': judge}} }",
    f"--config.refl.judge={judge}",
  ]


def described(config: Mapping[str, Any]) -> str:
  """The rewards of a config with their weights."""
  return " + ".join(f"{weight:g} {name}" for name, weight in config["rewards"].items() if weight)


def checksum(judge: str) -> str:
  """Of a learned reward, which another question or other weights would change; "" for none.

  Raises:
    InputError: it is no folder of a learned reward.
  """
  if not judge:
    return ""
  with errors.at(f"--judge={judge}"):
    return judge_lib.fingerprint(judge)


def check(judge: str, names: Sequence[str]) -> None:
  """Refuses a comparison whose methods cannot all be trained on the same reward.

  Raises:
    InputError: see `checksum`; or a method needs a gradient that the config's rewards have not.
  """
  checksum(judge)
  if not judge and (refl := [name for name in names if methods.ALL[name].config == "refl"]):
    raise errors.InputError(
      f"--methods {refl[0]!r} needs a reward with a gradient, and all methods get the same; give "
      "--judge, or leave it out"
    )
