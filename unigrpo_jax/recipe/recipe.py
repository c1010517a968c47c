"""From a config of UniGRPO to the numbers that its parts take; impossible ones are refused here."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, rewards, types
from unigrpo_jax.algorithms import objective, update
from unigrpo_jax.episodes import batches, policy, rollout
from unigrpo_jax.losses import advantages, forward_process
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.recipe import checks
from unigrpo_jax.runtime import optim, runs, sharding
from unigrpo_jax.sampling import flow, sde, windows

# Bounds of numbers; see `checks`.
NUMBERS: checks.Numbers = (
  ({"low": 0}, (
    "eval.every", "eval.keep", "lora.rank", "keep_every", "flow.weight", "flow.clip",
    "flow.regulariser_weight", "flow.dppo_threshold", "text.clip_low", "text.clip_high",
    "text.kl_weight", "advantage.ddof", "advantage.eps", "advantage.clip", "drift.text",
    "drift.flow", "flow.awm_clip", "flow.fpo_clip",
  )),
  ({"low": 1}, (
    "prompts_per_step", "epochs", "minibatches", "eval.prompts", "eval.batch_size",
    "rollout.prompts_at_once", "rollout.max_tokens", "text.chunk", "reward.threads",
  )),
  ({"low": 2}, ("group_size", "rollout.num_timesteps", "eval.num_timesteps")),
  ({"low": 3}, ("rollout.prompt_tokens",)),
  ({"above": 0}, ("rollout.temperature", "lora.alpha", "flow.nft_beta", "flow.nft_bound")),
)
# Largest drift/text_scaled that rounding explains. float32: summation order. bfloat16: activations
# carry 2^-8 of relative error; the embedded BAGEL's five layers make 0.07 of it, and logits of size
# 30 some tenths of a nat.
TEXT_DRIFT = {"float32": 1e-5, "bfloat16": 1.0}
# Errors of a step's mean: float32 rounds it; bfloat16 is off by this in the velocity, two or three
# times what the embedded BAGEL shows.
MEAN_ERROR, VELOCITY_ERROR = 2e-7, 2e-2


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
    "rollout.layout": tuple(sharding.LAYOUTS),
    "advantage.std": advantages.STDS, "old_values": update.OLD_VALUES,
    "eval.cfg_renorm": flow.RENORMS,
  }
  checks.check(config, choices, NUMBERS)
  for section in ("rollout", "eval"):
    low, high = interval = tuple(config[section].cfg_interval)
    if not 0 <= low < high <= 1:
      raise errors.InputError(
        f"config.{section}.cfg_interval={interval} holds no time; give (low, high) with "
        "0 <= low < high <= 1"
      )
  if config.text.dual_clip:
    errors.require("config.text.dual_clip", config.text.dual_clip, above=1)
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
  trained = optim.trained(config.learning_rate)
  for key, group, shared in (("text", "und", "text"), ("flow", "gen", "latent")):
    if config[key].train and not trained & {group, shared} and (
      key != "text" or config.rollout.think
    ):
      raise errors.InputError(
        f"config.{key}.train=True but config.learning_rate.{group}=0; give it one"
      )
  _check_window(config)


def _check_window(config) -> None:
  r = config.rollout
  try:
    window_steps(config, 1)
  except errors.InputError as error:
    raise errors.InputError(
      f"config.rollout.window_range and window_size with num_timesteps={r.num_timesteps}: {error}"
    ) from None
  if not config.flow.train:
    return
  if r.window_size < 1:
    raise errors.InputError(
      "config.rollout.window_size=0 leaves no step to train; set config.flow.train=False"
    )
  if config.flow.objective in objective.SDE_OBJECTIVES:
    errors.require("config.rollout.noise_level", r.noise_level, above=0)
    if r.sde == "cps" and r.window_range[1] >= r.num_timesteps - 1:
      raise errors.InputError(
        f"config.rollout.window_range={tuple(r.window_range)}: the last step of config.rollout.sde="
        f"cps has no noise; let it end at {r.num_timesteps - 2} or before"
      )


def _check_division(config, network: runs.Network) -> None:
  trajectories, ways = trajectories_of(config), sharding.batch_multiple(network.mesh)
  chunk = config.rollout.prompts_at_once * config.group_size
  at_once, micro = "config.rollout.prompts_at_once", config.microbatch * config.minibatches
  for what, number, by, parts in (
    ("config.prompts_per_step", config.prompts_per_step, at_once, config.rollout.prompts_at_once),
    ("the trajectories of an iteration, config.prompts_per_step x group_size", trajectories,
     "config.microbatch x minibatches", micro),
    ("config.microbatch", config.microbatch, "config.mesh data x fsdp", ways),
    (f"{at_once} x group_size", chunk, "config.mesh data x fsdp", ways),
  ):
    if number % parts:
      raise errors.InputError(f"{what}={number} does not divide by {by}={parts}; change one")
  # A reward may compare the trajectories of a prompt, so one host scores all of them.
  groups = sharding.row_hosts(network.mesh, chunk).reshape(-1, config.group_size)
  if (groups != groups[:, :1]).any():
    count = len(np.unique(groups))
    raise errors.InputError(
      f"{at_once}={config.rollout.prompts_at_once}: the {chunk} trajectories of a chunk over "
      f"{count} hosts would split a group of config.group_size={config.group_size}; make "
      f"{at_once} a multiple of {count}"
    )


def trajectories_of(config) -> int:
  """Trajectories of an iteration."""
  return config.prompts_per_step * config.group_size


def rollout_settings(config, mesh) -> rollout.Settings:
  r = config.rollout
  return rollout.Settings(
    group_size=config.group_size, think=r.think, prompt_tokens=r.prompt_tokens,
    max_tokens=r.max_tokens, temperature=r.temperature, height=r.height, width=r.width,
    num_timesteps=r.num_timesteps, shift=r.shift, kind=r.sde, noise_level=r.noise_level,
    guidance=flow.Guidance(
      text_scale=r.cfg_text_scale, interval=tuple(r.cfg_interval), renorm=r.cfg_renorm
    ),
    same_noise=r.same_noise, layout=r.layout, prompt_copies=prompt_copies(config, mesh),
  )


def prompt_copies(config, mesh) -> int:
  """How often a prompt is read, for parts of its group, so that prompts divide over the mesh."""
  ways = sharding.batch_multiple(mesh)
  return ways // math.gcd(config.rollout.prompts_at_once, ways)


def window_steps(config, iteration: int):
  """SDE steps of all trajectories of an iteration, [B, W] int32; W = 0 where none is needed."""
  r = config.rollout
  # Iterations count from 1; a window that moves begins where it is with 0 of them done.
  iteration -= r.window == "progressive"
  wanted = config.flow.train and config.flow.objective in objective.SDE_OBJECTIVES
  return windows.draw(
    r.window, low=r.window_range[0], high=r.window_range[1], size=r.window_size if wanted else 0,
    seed=config.seed, prompts=config.prompts_per_step,
    iteration=iteration, group_size=config.group_size, num_steps=r.num_timesteps - 1,
    rank=0,  # as every host makes the windows of all trajectories
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
  # The ratios of "awm" and "fpo" are of matching losses, whose size no image changes.
  clip = {"awm": f.awm_clip, "fpo": f.fpo_clip}.get(f.objective, f.clip * scale)
  second = float(flow.time_grid(r.num_timesteps, r.shift)[1])
  return objective.Objective(
    aggregation=config.text.aggregation, max_tokens=r.max_tokens,
    text_clip_low=config.text.clip_low, text_clip_high=config.text.clip_high,
    dual_clip=config.text.dual_clip or None, text_kl_weight=config.text.kl_weight,
    flow_weight=f.weight, flow=f.objective, ratio=f.ratio, flow_clip_low=clip,
    flow_clip_high=clip, grad_reweight=f.grad_reweight,
    dppo_threshold=f.dppo_threshold, nft_beta=f.nft_beta, nft_bound=f.nft_bound,
    awm_weighting=f.awm_weighting, regulariser=f.regulariser,
    regulariser_weight=f.regulariser_weight * scale, kind=r.sde,
    noise_level=r.noise_level, t_second=second,
  )


def needs_reference(config) -> bool:
  """Whether a regulariser holds the policy to what it started from."""
  flow_needs = config.flow.train and config.flow.regulariser != "none"
  return flow_needs or bool(config.text.kl_weight and config.text.train and config.rollout.think)


def copies_reference(config) -> bool:
  """Whether the reference has parameters of its own: adapters leave the experts as they were."""
  untouched = config.lora.rank > 0 and optim.trained(config.learning_rate) <= {"und", "gen"}
  return needs_reference(config) and not untouched


def schedule(config, mesh) -> update.Schedule:
  """How an iteration is gone through.

  A microbatch has as few prompts as the devices share evenly, and so as many trajectories of each
  as there are: what they have in common is computed once.

  Raises:
    InputError: no part of the prompts and of their groups makes a microbatch.
  """
  ways, copies = sharding.batch_multiple(mesh), prompt_copies(config, mesh)
  rows, group = config.prompts_per_step * copies, config.group_size // copies
  for prompts in range(ways, rows + 1, ways):
    size = config.microbatch // prompts
    if (
      config.microbatch % prompts == 0 and rows % prompts == 0
      and size <= group and group % size == 0
    ):
      return update.Schedule(
        epochs=config.epochs, minibatches=config.minibatches,
        microbatches=trajectories_of(config) // (config.microbatch * config.minibatches),
        old_values=config.old_values, group_parts=group // size,
      )
  raise errors.InputError(
    f"config.microbatch={config.microbatch} is no part of the {config.prompts_per_step} prompts, a "
    f"multiple of data x fsdp = {ways}, times a part of config.group_size={config.group_size}; "
    f"try {ways * config.group_size}"
  )


def make_update(
  config, network: runs.Network, optimizer, sampler: rollout.Sampler, where: types.TrainState
):
  """The update of a run, jitted, its state donated; see `update.make_update`.

  Args:
    config, network, optimizer, sampler: of the run.
    where: shardings of its state.
  """
  made = update.make_update(
    network.model, optimizer, sampler.grid, reading(config, network, sampler),
    make_objective(config, network), schedule(config, network.mesh),
    trained=optim.trained(config.learning_rate), ema_decay=config.ema_decay or None,
    reference_model=network.model.clone(lora=None) if needs_reference(config) else None,
    reference_context=config.flow.reference_context == "reference",
    drift_limits=drift_limits(config, network),
  )
  return jax.jit(
    made, donate_argnums=0, out_shardings=(where, sharding.replicated(network.mesh))
  )


def drift_limits(config, network: runs.Network) -> dict[str, float]:
  """Largest drift/text_scaled and drift/flow that a run goes on with.

  An error of a step's mean that has nothing to do with its noise moves the log ratio by the error's
  size over sqrt(latent elements), as a standard deviation; the largest of an iteration's steps is
  within five of them.
  """
  r = config.rollout
  error = MEAN_ERROR
  if config.dtype == "bfloat16":
    times = flow.time_grid(r.num_timesteps, r.shift)
    window = slice(*r.window_range)
    t, t_next = times[:-1][window], times[1:][window]
    still = jnp.zeros((*t.shape, 1, 1))
    move = sde.transition(
      still, still, t, t_next, times[1], kind=r.sde, noise_level=r.noise_level
    )
    error = VELOCITY_ERROR * float(jnp.abs(move.slope).max())
  limit = max(1e-8, 5 * error / latent_elements(config, network) ** 0.5)
  return {
    "drift/text_scaled": config.drift.text or TEXT_DRIFT[config.dtype],
    "drift/flow": config.drift.flow or limit,
  }


def transport(config) -> set[str]:
  """The keys of served rewards that say where they are and how they are asked, not what is asked.

  A run may go on with others.
  """
  asked = ("url", "timeout", "retries", "backoff", "batch_size", "token", "token_env")
  return {
    f"reward_options.{name}.{key}" for name, own in config.reward_options.items()
    if own.get("kind", name) == "http" for key in asked
  }


def make_scorer(config) -> rewards.Scorer:
  """The rewards by name; options that name no reward are refused.

  The option `kind` says which reward it is, where its name in the config is another: two served
  rewards are {"a": {"kind": "http", ...}, "b": {"kind": "http", ...}}.
  """
  weights: Mapping[str, float] = dict(config.rewards)
  options: dict[str, Any] = {name: dict(o) for name, o in config.reward_options.items()}
  for name in options:
    errors.choose("config.reward_options", name, list(weights))
  made = {}
  for name in weights:
    own = options.get(name, {})
    if own.get("token") is not None:
      raise errors.InputError(
        f"config.reward_options.{name}.token (not shown) would be kept with the config; put it in "
        "an environment variable, and that one's name in token_env"
      )
    made[name] = rewards.make(own.pop("kind", name), **own)
  return rewards.Scorer(
    made, weights, threads=config.reward.threads,
    max_failed_fraction=config.reward.max_failed_fraction,
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
