"""Trajectories of the golden BAGEL, sampled as training samples them, and updates by them."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from unigrpo_jax import types
from unigrpo_jax.algorithms import base, forward, grpo, update
from unigrpo_jax.episodes import programs, replay, requests
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.runtime import optim
from unigrpo_jax.sampling import flow, sde, times

PROMPTS = ([280, 40, 41, 42, 281], [280, 50, 281], [280, 60, 61, 281], [280, 70, 71, 72, 73, 281])
END = 40  # Random weights hardly ever sample 281: a token that they do sample is the terminator.
SYSTEM = (280, 100, 101, 281)
GROUP, MAX_TOKENS, POINTS, SHIFT, NOISE = 2, 5, 6, 3.0, 0.8
STEPS = (0, 2)  # The first, where t = 1, and another.
NO_GUIDANCE = flow.Guidance(text_scale=1.0)
GUIDANCE = flow.Guidance(text_scale=3.0, interval=(0.9, 1.0))  # One step within, one without.
THINK, PLAIN = script_lib.make(think=True), script_lib.make(think=False)
THINK_EDIT = script_lib.make(think=True, source=True)
EDIT = script_lib.make(think=False, source=True)
ANSWER = script_lib.make(think=False, answer=True, source=True)
T_SECOND = float(flow.time_grid(POINTS, SHIFT)[1])
_SDE = dict(
  ratio="norm", clip=1e-2, grad_reweight="none", kind="flow", noise_level=NOISE, t_second=T_SECOND
)
# Of each algorithm, besides what all have.
NUMBERS = {
  grpo.GRPO: _SDE,
  grpo.DPPO: _SDE | dict(threshold=1e-5),
  forward.NFT: dict(draws=times.Times(3), beta=1.0, bound=5.0),
  forward.AWM: dict(
    draws=times.Times(3), weighting="ghuber", ratio="exp_first", clip=1e-2, bound=5.0),
  forward.FPO: dict(
    draws=times.Times(3), weighting="one_minus_t2", ratio="mean_first", surrogate="ppo", clip=1e-2,
    cap=math.inf),
}


def grid(config, side=2) -> types.LatentGrid:
  """Of one image of side x side latent tokens."""
  return jax.tree.map(jnp.asarray, requests.latent_grid(config, [(16 * side, 16 * side)]))


def replay_config(script: script_lib.Script = THINK, **changes) -> replay.ReplayConfig:
  start = replay.ReplayConfig(
    script=script, system_ids=SYSTEM if script.has(script_lib.Given(script_lib.SYSTEM)) else (),
    start_id=280, end_id=END, temperature=1.0, chunk=3, text=script.has(script_lib.Sampled),
    flow=script.has(script_lib.Drawn), guidance=NO_GUIDANCE, routing="expert",
  )
  return dataclasses.replace(start, **changes)


def text_objective(**changes) -> base.TextObjective:
  start = base.TextObjective(
    aggregation="seq-mean-token-mean", max_tokens=MAX_TOKENS, clip_low=0.2, clip_high=0.2,
    dual_clip=None, kl_weight=0.0,
  )
  return dataclasses.replace(start, **changes)


def algorithm(kind: type[base.Algorithm] = grpo.GRPO, **changes) -> base.Algorithm:
  """Clips that bind only where the second epoch goes far, and weights that leave no term out."""
  start = kind(
    replay=replay_config(), text=text_objective(), flow_weight=0.7, regulariser="velocity_mse",
    regulariser_weight=0.1, **NUMBERS[kind],
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


def source(config) -> types.Seen:
  """An image a prompt, of different sizes: as latents and as patches, padded."""
  rng = np.random.default_rng(0)
  sizes = [(32, 32), (16, 32), (32, 16), (16, 16)]
  places = requests.latent_grid(config, sizes)
  latents = rng.normal(size=(*places.ids.shape, config.latent_dim)).astype(np.float32)
  images = [
    PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes
  ]
  return types.Seen(latents, places, requests.image_patches(config, images))


def inputs(config, script: script_lib.Script) -> programs.Inputs:
  """Padded prompts, and where the script has them the system prompt and source images."""
  length = max(map(len, PROMPTS)) + 1
  ids, mask = np.zeros((len(PROMPTS), length), np.int32), np.zeros((len(PROMPTS), length), bool)
  for row, prompt in enumerate(PROMPTS):
    ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
  texts = {script_lib.PROMPT: types.Text(ids, mask)}
  if script.has(script_lib.Given(script_lib.SYSTEM)):
    texts[script_lib.SYSTEM] = types.Text(
      np.array([SYSTEM], np.int32), np.ones((1, len(SYSTEM)), bool)
    )
  seen = any(isinstance(segment, script_lib.Seen) for segment in script.shared)
  return programs.Inputs(texts, {script_lib.SOURCE: source(config)} if seen else {})


def sample(
  model, params, script: script_lib.Script = THINK, *, guidance=NO_GUIDANCE, side=2
) -> types.Experience:
  """An experience of 4 prompts x 2; of the texts that are sampled some end and some are cut.

  Prompts without a source image are repeated for every trajectory.
  """
  rows, given = len(PROMPTS) * GROUP, inputs(model.config, script)
  image = given.images.get(script_lib.SOURCE)
  keys = jax.random.split(jax.random.key(0), rows)
  fold = lambda number: jax.vmap(jax.random.fold_in, (0, None))(keys, number)
  capacity = sum(text.ids.shape[1] for text in given.texts.values())
  if image is not None:
    capacity += sum(part.mask.shape[1] + 2 for part in (image.grid, image.patches))
  contexts = programs.prefill(model, params, given, script=script, capacity=capacity)
  text = drawn = None
  if script.has(script_lib.Sampled):
    contexts = programs.fork(model, contexts, copies=GROUP, capacity=MAX_TOKENS + 2)
    text, main = programs.decode_text(
      model, params, contexts.main, keys, None, start_id=280, end_id=END, max_tokens=MAX_TOKENS,
      temperature=1.0,
    )
    contexts = contexts.replace(main=main)
  if script.has(script_lib.Drawn):
    shape = (side * side, model.config.latent_dim)
    drawn = programs.denoise(
      model, params, contexts, jax.vmap(lambda key: jax.random.normal(key, shape))(fold(0)),
      jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), grid(model.config, side)), fold(1),
      jnp.tile(jnp.array(STEPS, jnp.int32), (rows, 1)),
      num_timesteps=POINTS, shift=SHIFT, guidance=guidance, kind="flow", noise_level=NOISE,
    )
  prompt, image = jax.tree.map(jnp.asarray, (given.texts[script_lib.PROMPT], image))
  if image is None:
    prompt = jax.tree.map(lambda a: jnp.repeat(a, GROUP, axis=0), prompt)
  # Not the same size in every group, so that no order of rows is like another.
  adv = jnp.array([1.0, -1.0, 0.5, -0.5, -1.5, 1.5, 0.8, -0.8])
  return types.Experience(
    prompt, image, (types.Round(text, drawn),), adv, jnp.ones(rows, bool)
  )


def flow_drift(model, output: replay.PolicyOutput, experience: types.Experience, side=2) -> float:
  """Largest |log ratio| of the replayed velocities and the recorded means."""
  drawn = experience.only.flow
  step = sde.transition(
    drawn.x_t, output.guided, drawn.t, drawn.t_next, jnp.float32(T_SECOND), kind="flow",
    noise_level=NOISE,
  )
  mask = grid(model.config, side).mask[:, None]
  return float(jnp.abs(
    flow_losses.log_ratio(step.mean, drawn.mean, drawn.x_next, step.std, mask)
  ).max())


def state(params, transformation, *, ema=False) -> types.TrainState:
  return types.TrainState(
    jnp.int32(0), params, transformation.init(params), params if ema else None
  )


def whole(functions):
  """(state, experience) -> (state, metrics) of the functions that `make_update` returns."""
  precompute, change = functions
  return lambda state, experience: change(
    state, experience.with_only(**precompute(state, experience))
  )


def runner(model, params):
  """run(experience, ...) -> (state after one update, state before it, metrics on the host)."""
  usual = {"algorithm": algorithm(), "schedule": schedule()}

  @functools.cache
  def jitted(model, algorithm, schedule, rates, reference_model, context, ema_decay, anchor):
    transformation = optimizer(dict(rates))
    return transformation, jax.jit(whole(update.make_update(
      model, transformation, grid(model.config), algorithm, schedule,
      trained={group for group, rate in rates if rate}, ema_decay=ema_decay,
      reference_model=reference_model, reference_context=context, anchor=anchor,
    )))

  def run(
    experience, *, algorithm=usual["algorithm"], schedule=usual["schedule"], rates=None,
    model=model, start=params, reference=params, context=True, ema_decay=None, anchor=None,
    anchored=None,
  ):
    """`reference`: its parameters, {} for the policy's own, None for none. `anchor`: an
    `update.Anchor`, whose average is `anchored` before."""
    rates = dict(und=1e-2, gen=1e-2) if rates is None else rates
    other = None if reference is None else model.clone(lora=None)
    transformation, fn = jitted(
      model, algorithm, schedule, tuple(rates.items()), other, context, ema_decay, anchor)
    before = state(start, transformation, ema=ema_decay is not None)
    before = before.replace(anchor=anchored)
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
