"""Which keys of a config of UniGRPO do not go together."""

from __future__ import annotations

from ml_collections import ConfigDict

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import evaluation


def check(config: ConfigDict, *, forward: bool, by_gradient: bool) -> None:
  """Refuses a config of UniGRPO whose keys do not go together.

  Args:
    config: every key of which is of its kind; see `checks.read`.
    forward: the flow's objective noises finished images again.
    by_gradient: it is trained, by the gradient of a reward.

  Raises:
    InputError: names the keys, their values, and what to do.
  """
  with errors.at("config.eval.modes"):
    if config.eval.every and not config.eval.modes:
      raise errors.InputError("there is none; give one, such as think, or set config.eval.every=0")
    for mode in config.eval.modes:
      evaluation.Mode.parse(mode)
  for section in ("rollout", "eval"):
    low, high = interval = tuple(config[section].cfg_interval)
    if not 0 <= low < high <= 1:
      raise errors.InputError(
        f"config.{section}.cfg_interval={interval} holds no time; give (low, high) with "
        "0 <= low < high <= 1"
      )
  if config.text.dual_clip:
    errors.require("config.text.dual_clip", config.text.dual_clip, above=1)
  if not config.text.train and not config.flow.train:
    raise errors.InputError("config.text.train and config.flow.train are both False; set one")
  if config.text.train and not config.rollout.think and not config.flow.train:
    raise errors.InputError(
      "config.rollout.think=False leaves no text to train; set config.flow.train=True"
    )
  if by_gradient:
    _check_by_gradient(config)
  else:
    errors.require("config.group_size", config.group_size, integer=True, low=2)
  if config.minibatches > 1 and config.old_values == "first_epoch" and not by_gradient:
    raise errors.InputError(
      f"config.minibatches={config.minibatches}: after the first of them the policy is no longer "
      "the one that sampled; set config.old_values=recomputed"
    )
  if config.old_values == "rollout" and forward:
    raise errors.InputError(
      f"config.flow.objective={config.flow.objective} compares velocities that no rollout records; "
      "set config.old_values=first_epoch"
    )
  if config.flow.regulariser.startswith("latent_kl") and forward:
    raise errors.InputError(
      f"config.flow.regulariser={config.flow.regulariser} needs the steps of an SDE, which "
      f"config.flow.objective={config.flow.objective} has not; set velocity_mse"
    )
  if config.flow.objective == "fpo" and config.flow.fpo_surrogate != "ppo":
    errors.require(
      f"with config.flow.fpo_surrogate={config.flow.fpo_surrogate}, config.flow.fpo_clip",
      config.flow.fpo_clip, above=0,
    )
  trained = {group for group, rate in config.learning_rate.items() if rate}
  for key, group, shared in (("text", "und", "text"), ("flow", "gen", "latent")):
    if config[key].train and not trained & {group, shared} and (
      key != "text" or config.rollout.think
    ):
      raise errors.InputError(
        f"config.{key}.train=True but config.learning_rate.{group}=0; give it one"
      )


def _check_by_gradient(config: ConfigDict) -> None:
  name = f"config.flow.objective={config.flow.objective}"
  for key, wanted, reason in (
    ("text.train", False, "has no loss of the text"),
    ("epochs", 1, "takes each trajectory once, since its late step is that of the policy"),
    ("old_values", "first_epoch", "compares no old values"),
  ):
    section, _, leaf = key.rpartition(".")
    value = (config[section] if section else config)[leaf]
    if value != wanted:
      raise errors.InputError(f"config.{key}={value}: {name} {reason}; set it to {wanted}")
  if config.refl.direct_align and config.refl.gradient_steps != 1:
    raise errors.InputError(
      f"config.refl.gradient_steps={config.refl.gradient_steps}: config.refl.direct_align "
      "differentiates one step; set it to 1"
    )
  if config.refl.sft_weight and not config.refl.sft_config:
    raise errors.InputError(
      f"config.refl.sft_weight={config.refl.sft_weight} needs examples; set config.refl.sft_config "
      "to a config of supervised training, such as configs/sft.py:tiny"
    )
  if config.rollout.cfg_text_scale > 1:
    raise errors.InputError(
      f"config.rollout.cfg_text_scale={config.rollout.cfg_text_scale}: {name} would differentiate "
      "the branch without the prompt too; set it to 1.0"
    )
  if config.flow.regulariser.startswith("latent_kl"):
    raise errors.InputError(
      f"config.flow.regulariser={config.flow.regulariser} needs the steps of an SDE, which {name} "
      "has not; set velocity_mse"
    )
