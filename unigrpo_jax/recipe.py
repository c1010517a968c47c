"""From a config of UniGRPO to the numbers that its parts take; impossible ones are refused here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import batches, errors, objective, policy, rewards, rollout, runs, sharding, update
from unigrpo_jax.losses import advantages, forward_process
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.sampling import flow, sde, windows

# Latent elements of the images that clip and regulariser weight are given for.
REFERENCE_ELEMENTS = 262_144
# Largest drift of the sampler from the trainer. float32: summation order. bfloat16: its activations
# carry 2^-8 of relative error, which logits of size 30 turn into some tenths of a nat, and
# velocities off by 1e-2 into a log ratio of about 4e-7 at 262,144 elements.
DRIFT = {"float32": (1e-5, 1e-8), "bfloat16": (1.0, 1e-6)}


def check(config, network: runs.Network) -> None:
  """Refuses what cannot run, before anything is loaded or compiled.

  Raises:
    InputError: names the key, its value, and what to do.
  """
  choices = {
    "flow.objective": objective.SDE_OBJECTIVES + objective.FORWARD_OBJECTIVES,
    "flow.ratio": ("norm", "plain"), "flow.grad_reweight": flow_losses.REWEIGHTS,
    "flow.regulariser": objective.REGULARISERS, "flow.routing": policy.ROUTINGS,
    "flow.reference_context": ("reference", "policy"),
    "flow.awm_weighting": forward_process.WEIGHTINGS,
    "text.aggregation": text_losses.AGGREGATIONS, "rollout.sde": sde.KINDS,
    "rollout.window": windows.CONVENTIONS, "rollout.cfg_renorm": flow.RENORMS,
    "advantage.std": advantages.STDS, "old_values": update.OLD_VALUES, "dtype": tuple(DRIFT),
  }
  for key, options in choices.items():
    section, _, name = key.rpartition(".")
    runs.choose(f"config.{key}", (config[section] if section else config)[name], options)
  least = {
    "steps": 1, "prompts_per_step": 1, "group_size": 2, "epochs": 1, "minibatches": 1,
    "microbatch": 1, "eval.every": 0, "eval.prompts": 1, "checkpoint_every": 1,
    "keep_checkpoints": 1, "lora.rank": 0, "rollout.prompts_at_once": 1,
  }
  for key, low in least.items():
    section, _, name = key.rpartition(".")
    errors.require(f"config.{key}", (config[section] if section else config)[name], low=low)
  errors.require("config.rollout.temperature", config.rollout.temperature, above=0)
  _check_division(config, network)
  schedule(config, network.mesh)
  if not config.text.train and not config.flow.train:
    raise errors.InputError("config.text.train and config.flow.train are both False; set one")
  if config.text.train and not config.rollout.think and not config.flow.train:
    raise errors.InputError(
      "config.rollout.think=False leaves no text to train; set config.flow.train=True"
    )
  if config.minibatches > 1 and config.old_values == "first_epoch":
    raise errors.InputError(
      f"config.minibatches={config.minibatches}: after the first of them the policy is no longer "
      "the one that sampled; set config.old_values=recomputed"
    )
  if config.old_values == "rollout" and config.flow.objective in objective.FORWARD_OBJECTIVES:
    raise errors.InputError(
      f"config.flow.objective={config.flow.objective} compares velocities that no rollout records; "
      "set config.old_values=first_epoch"
    )
  latent = config.flow.regulariser.startswith("latent_kl")
  if latent and config.flow.objective in objective.FORWARD_OBJECTIVES:
    raise errors.InputError(
      f"config.flow.regulariser={config.flow.regulariser} needs the steps of an SDE, which "
      f"config.flow.objective={config.flow.objective} has not; set velocity_mse"
    )
  trained = {group for group, rate in config.learning_rate.items() if rate}
  for key, group in (("text", "und"), ("flow", "gen")):
    if config[key].train and not trained & {group, "text", "latent"} and (
      key != "text" or config.rollout.think
    ):
      raise errors.InputError(
        f"config.{key}.train=True but config.learning_rate.{group}=0; give it one"
      )
  if config.flow.train and config.rollout.window_size < 1:
    raise errors.InputError(
      "config.rollout.window_size=0 leaves no step to train; set config.flow.train=False"
    )


def _check_division(config, network: runs.Network) -> None:
  trajectories, ways = trajectories_of(config), sharding.batch_multiple(network.mesh)
  chunk = config.rollout.prompts_at_once * config.group_size
  for what, number, parts in (
    ("config.prompts_per_step", config.prompts_per_step, config.rollout.prompts_at_once),
    ("the trajectories of an iteration", trajectories, config.microbatch * config.minibatches),
    ("config.microbatch", config.microbatch, ways),
    ("config.rollout.prompts_at_once x group_size", chunk, ways),
  ):
    if number % parts:
      by = {
        config.rollout.prompts_at_once: "config.rollout.prompts_at_once", ways: "data x fsdp",
      }.get(parts, "config.microbatch x minibatches")
      raise errors.InputError(f"{what}={number} does not divide by {by}={parts}; change one")


def trajectories_of(config) -> int:
  """Trajectories of an iteration."""
  return config.prompts_per_step * config.group_size


def rollout_settings(config) -> rollout.Settings:
  r = config.rollout
  return rollout.Settings(
    group_size=config.group_size, think=r.think, prompt_tokens=r.prompt_tokens,
    max_tokens=r.max_tokens, temperature=r.temperature, height=r.height, width=r.width,
    num_timesteps=r.num_timesteps, shift=r.shift, kind=r.sde, noise_level=r.noise_level,
    guidance=flow.Guidance(
      text_scale=r.cfg_text_scale, interval=tuple(r.cfg_interval), renorm=r.cfg_renorm
    ),
    same_noise=r.same_noise,
  )


def window_steps(config, iteration: int):
  """SDE steps of all trajectories of an iteration, [B, W] int32; W = 0 where none is needed."""
  r = config.rollout
  wanted = config.flow.train and config.flow.objective in objective.SDE_OBJECTIVES
  return windows.draw(
    r.window, low=r.window_range[0], high=r.window_range[1], size=r.window_size if wanted else 0,
    seed=config.seed, iteration=iteration, prompts=config.prompts_per_step,
    group_size=config.group_size, num_steps=r.num_timesteps - 1, rank=jax.process_index(),
    moving=windows.Moving(iterations=r.moving_iterations, roll_back=r.moving_roll_back),
  )


def latent_elements(config, network: runs.Network) -> int:
  """Numbers of one image's latents."""
  grid = batches.latent_grid(network.folder.config, [(config.rollout.height, config.rollout.width)])
  return int(grid.mask.sum()) * network.folder.config.latent_dim


def reading(config, network: runs.Network, sampler: rollout.Sampler) -> policy.Reading:
  tokenizer = network.tokenizer
  system = sampler.system_ids
  return policy.Reading(
    system_ids=None if system is None else tuple(int(i) for i in system),
    start_id=tokenizer.im_start, end_id=tokenizer.im_end, temperature=config.rollout.temperature,
    chunk=config.text.chunk, text=config.text.train and config.rollout.think,
    flow=config.flow.train, guidance=sampler.settings.guidance, routing=config.flow.routing,
  )


def make_objective(config, network: runs.Network) -> objective.Objective:
  f, r = config.flow, config.rollout
  scale = 1.0
  if f.scale_with_size:
    scale = float(flow_losses.scaled_clip(1.0, latent_elements(config, network)))
  # The latent KL's weight is that of another loss, which does not shrink with the image.
  weight_scale = scale if f.regulariser == "velocity_mse" else 1.0
  second = float(flow.time_grid(r.num_timesteps, r.shift)[1])
  return objective.Objective(
    aggregation=config.text.aggregation, max_tokens=r.max_tokens,
    text_clip_low=config.text.clip_low, text_clip_high=config.text.clip_high,
    dual_clip=config.text.dual_clip or None, text_kl_weight=config.text.kl_weight,
    flow_weight=f.weight, flow=f.objective, ratio=f.ratio, flow_clip_low=f.clip * scale,
    flow_clip_high=f.clip * scale, grad_reweight=f.grad_reweight,
    dppo_threshold=f.dppo_threshold, nft_beta=f.nft_beta, nft_bound=f.nft_bound,
    awm_weighting=f.awm_weighting, regulariser=f.regulariser,
    regulariser_weight=f.regulariser_weight * weight_scale, kind=r.sde,
    noise_level=r.noise_level, t_second=second,
  )


def needs_reference(config) -> bool:
  """Whether a regulariser holds the policy to what it started from."""
  flow_needs = config.flow.train and config.flow.regulariser != "none"
  return flow_needs or bool(config.text.kl_weight and config.text.train and config.rollout.think)


def schedule(config, mesh) -> update.Schedule:
  """How an iteration is gone through.

  A microbatch has as few prompts as the devices share evenly, and so as many trajectories of each
  as there are: what they have in common is computed once.

  Raises:
    InputError: no part of the prompts and of their groups makes a microbatch.
  """
  ways = sharding.batch_multiple(mesh)
  for prompts in range(ways, config.prompts_per_step + 1, ways):
    size = config.microbatch // prompts
    if (
      config.microbatch % prompts == 0 and config.prompts_per_step % prompts == 0
      and size <= config.group_size and config.group_size % size == 0
    ):
      return update.Schedule(
        epochs=config.epochs, minibatches=config.minibatches,
        microbatches=trajectories_of(config) // (config.microbatch * config.minibatches),
        old_values=config.old_values, group_parts=config.group_size // size,
      )
  raise errors.InputError(
    f"config.microbatch={config.microbatch} is no part of the {config.prompts_per_step} prompts, a "
    f"multiple of data x fsdp = {ways}, times a part of config.group_size={config.group_size}; "
    f"try {ways * config.group_size}"
  )


def drift_limits(config, network: runs.Network) -> dict[str, float]:
  """Largest drift/text and drift/flow that a run goes on with."""
  text, flow_limit = DRIFT[str(jnp.dtype(config.dtype))]
  elements = latent_elements(config, network)
  if config.dtype == "bfloat16":
    flow_limit *= (REFERENCE_ELEMENTS / elements) ** 0.5
  return {
    "drift/text": config.drift.text or text, "drift/flow": config.drift.flow or flow_limit
  }


def make_scorer(config) -> rewards.Scorer:
  """The rewards by name; options that name no reward are refused."""
  weights: Mapping[str, float] = dict(config.rewards)
  options: dict[str, Any] = {name: dict(o) for name, o in config.reward_options.items()}
  for name in options:
    runs.choose("config.reward_options", name, list(weights))
  return rewards.Scorer(
    {name: rewards.make(name, **options.get(name, {})) for name in weights}, weights,
    threads=config.reward.threads, max_failed_fraction=config.reward.max_failed_fraction,
  )


def evaluation_settings(config) -> batches.Settings:
  e = config.eval
  return batches.Settings(
    num_timesteps=e.num_timesteps, shift=config.rollout.shift, temperature=e.temperature,
    max_tokens=config.rollout.max_tokens,
    guidance=flow.Guidance(
      text_scale=e.cfg_text_scale, interval=tuple(e.cfg_interval), renorm=e.cfg_renorm
    ),
  )
