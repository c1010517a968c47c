"""The reward of a comparison, on which all of its methods are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.reward_models import learned
from unigrpo_jax.tools.compare import methods, scores

# Logged beside the learned reward, which stands for them.
STRICT = "iconworld_strict"
VERIFIER = (STRICT, "iconworld_soft", "iconworld_reasoning")


def overrides(reward_model: str) -> list[str]:
  """`--config.KEY=VALUE` that make a learned reward the only one with a weight; [] without one."""
  if not reward_model:
    return []
  weights = {scores.REWARD_MODEL: 1.0} | dict.fromkeys(VERIFIER, 0.0)
  return [
    f"--config.rewards={weights}",
    f"--config.reward_options={ {scores.REWARD_MODEL: {'folder': reward_model}} }",
    f"--config.refl.reward_model={reward_model}",
  ]


def described(config: Mapping[str, Any]) -> str:
  """A config's rewards with their weights, such as "0.5 ocr + 1 pickscore"."""
  return " + ".join(f"{weight:g} {name}" for name, weight in config["rewards"].items() if weight)


def checksum(reward_model: str) -> str:
  """`learned.fingerprint` of the learned reward; "" without one.

  Raises:
    InputError: it is no folder of a learned reward.
  """
  if not reward_model:
    return ""
  with errors.at(f"--reward_model={reward_model}"):
    return learned.fingerprint(reward_model)


def check(reward_model: str, names: Sequence[str]) -> None:
  """Checks that all methods can be trained on the same reward.

  Raises:
    InputError: see `checksum`; or a method needs the gradient of a reward, without a learned one.
  """
  checksum(reward_model)
  if not reward_model and (refl := [name for name in names if methods.ALL[name].config == "refl"]):
    raise errors.InputError(
      f"--methods {refl[0]!r} needs a reward with a gradient, and all methods get the same; give "
      "--reward_model, or leave it out"
    )
