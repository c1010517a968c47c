"""Trajectories of the golden BAGEL, sampled as training samples them, for the joint objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import types
from unigrpo_jax.algorithms import objective, update
from unigrpo_jax.episodes import batches, phases, policy
from unigrpo_jax.runtime import optim
from unigrpo_jax.sampling import flow

PROMPTS = ([280, 40, 41, 42, 281], [280, 50, 281], [280, 60, 61, 281], [280, 70, 71, 72, 73, 281])
END = 40  # Random weights hardly ever say 281: a token that they do say is the terminator.
SYSTEM = (280, 100, 101, 281)
GROUP, MAX_TOKENS, POINTS, SHIFT, NOISE = 2, 5, 6, 3.0, 0.8
STEPS = (0, 2)  # The first, where t = 1, and another.
NO_GUIDANCE = flow.Guidance(text_scale=1.0)
GUIDANCE = flow.Guidance(text_scale=3.0, interval=(0.9, 1.0))  # One step within, one without.


def grid(config, side=2) -> types.LatentGrid:
  """Of one image of side x side latent tokens."""
  return jax.tree.map(jnp.asarray, batches.latent_grid(config, [(16 * side, 16 * side)]))


def reading(**changes) -> policy.Reading:
  start = policy.Reading(
    system_ids=SYSTEM, start_id=280, end_id=END, temperature=1.0, chunk=3, text=True, flow=True,
    guidance=NO_GUIDANCE, routing="expert",
  )
  return dataclasses.replace(start, **changes)


def numbers(**changes) -> objective.Objective:
  """Clips that bind only where the second epoch goes far, and weights that leave no term out."""
  start = objective.Objective(
    aggregation="seq-mean-token-mean", max_tokens=MAX_TOKENS, text_clip_low=0.2, text_clip_high=0.2,
    dual_clip=None, text_kl_weight=0.0, flow_weight=0.7, flow="grpo", ratio="norm",
    flow_clip_low=1e-2, flow_clip_high=1e-2, grad_reweight="none", dppo_threshold=1e-5,
    nft_beta=1.0, nft_bound=5.0, awm_weighting="uniform", regulariser="velocity_mse",
    regulariser_weight=0.1, kind="flow", noise_level=NOISE,
    t_second=float(flow.time_grid(POINTS, SHIFT)[1]),
  )
  return dataclasses.replace(start, **changes)


def schedule(**changes) -> update.Schedule:
  start = update.Schedule(epochs=1, minibatches=1, microbatches=2, old_values="first_epoch")
  return dataclasses.replace(start, **changes)


def optimizer(rates=None, *, eps=1e-2, clip_norm=10.0):
  """A large epsilon: an update is as exact as its gradient, and not the sign of a rounding."""
  rates = dict(und=1e-2, gen=1e-2) if rates is None else rates
  constant = lambda rate: lambda _: rate
  schedules = {group: constant(rate) if rate else None for group, rate in rates.items()}
  return optim.adamw_by_group(
    schedules, b1=0.9, b2=0.99, eps=eps, weight_decay=0.0, clip_norm=clip_norm
  )


def sample(model, params, *, think=True, guidance=NO_GUIDANCE, side=2):
  """An experience of 4 prompts x 2; with thinking, some reasonings end and some are cut."""
  rows = len(PROMPTS) * GROUP
  length = max(map(len, PROMPTS)) + 1
  ids, mask = np.zeros((len(PROMPTS), length), np.int32), np.zeros((len(PROMPTS), length), bool)
  for row, prompt in enumerate(PROMPTS):
    ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
  system = np.array(SYSTEM, np.int32) if think else None
  keys = jax.random.split(jax.random.key(0), rows)
  inputs = phases.Inputs(prompt_ids=ids, prompt_mask=mask, system_ids=system)

  contexts = phases.read(model, params, inputs, capacity=length + len(SYSTEM))
  text = None
  if think:
    contexts = phases.fork(model, contexts, copies=GROUP, capacity=MAX_TOKENS + 2)
    text, main = phases.write(
      model, params, contexts.main, keys, None, start_id=280, end_id=END, max_tokens=MAX_TOKENS,
      temperature=1.0,
    )
    contexts = contexts.replace(main=main)
  drawn = phases.explore(
    model, params, contexts, keys, jnp.tile(jnp.array(STEPS, jnp.int32), (rows, 1)),
    jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), grid(model.config, side)),
    num_timesteps=POINTS, shift=SHIFT, guidance=guidance, kind="flow", noise_level=NOISE,
  )
  again = lambda a: jnp.repeat(jnp.asarray(a), GROUP, axis=0)
  # Not the same size in every group, so that no order of rows is like another.
  adv = jnp.array([1.0, -1.0, 0.5, -0.5, -1.5, 1.5, 0.8, -0.8])
  return types.Experience(again(ids), again(mask), text, drawn, adv, jnp.ones(rows, bool))


def state(params, transformation, *, ema=False) -> types.TrainState:
  return types.TrainState(
    jnp.int32(0), params, transformation.init(params), params if ema else None
  )


def runner(model, params):
  """run(experience, ...) -> (state after one update, state before it, metrics on the host)."""
  usual = {"reading": reading(), "numbers": numbers(), "schedule": schedule()}

  @functools.cache
  def jitted(model, reading, numbers, schedule, rates, reference_model, context, ema_decay):
    transformation = optimizer(dict(rates))
    return transformation, jax.jit(update.make_update(
      model, transformation, grid(model.config), reading, numbers, schedule,
      trained={group for group, rate in rates if rate}, ema_decay=ema_decay,
      reference_model=reference_model, reference_context=context,
    ))

  def run(
    experience, *, reading=usual["reading"], numbers=usual["numbers"], schedule=usual["schedule"],
    rates=None, model=model, start=params, reference=params, context=True, ema_decay=None,
  ):
    """`reference`: its parameters, {} for the policy's own, None for none."""
    rates = dict(und=1e-2, gen=1e-2) if rates is None else rates
    other = None if reference is None else model.clone(lora=None)
    transformation, fn = jitted(
      model, reading, numbers, schedule, tuple(rates.items()), other, context, ema_decay)
    before = state(start, transformation, ema=ema_decay is not None)
    after, metrics = fn(before.replace(reference=reference or None), experience)
    return after, before, jax.device_get(metrics)

  return run


def moved(before, after) -> dict[str, float]:
  """The largest change of each group of parameters."""
  largest = dict.fromkeys(optim.GROUPS, 0.0)
  labels = jax.tree.leaves(optim.groups(before))
  for group, a, b in zip(labels, jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    largest[group] = max(largest[group], float(jnp.abs(a - b).max()))
  return largest
