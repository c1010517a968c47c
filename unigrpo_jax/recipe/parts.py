"""The parts of a run of UniGRPO, made from its spec and its network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.algorithms import base, update
from unigrpo_jax.episodes import replay, requests, rollout
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.models import lowering
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.recipe import config_files, rl, sft
from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import optim, sharding, state
from unigrpo_jax.sampling import flow, sde
from unigrpo_jax.supervised import corpus, step

# Drift between sampler and trainer that rounding explains, as measured with the five layers of the
# embedded BAGEL (`configs/unigrpo.py:tiny`, seed 0: 32 iterations in float32, 4 in bfloat16).
MEASURED_LAYERS = 5
# Largest 99th percentile of |log-probability difference| / max(1, |log-probability|).
TEXT_DRIFT = {"float32": 1.2e-6, "bfloat16": 5.7e-3}
# Standard deviation of an element's error: of a step's mean in float32, of the velocity in
# bfloat16. They gave 99th percentiles of drift/flow of 9.3e-9 and 1.1e-4.
STEP_ERROR = {"float32": 8.2e-8, "bfloat16": 8.5e-3}
PERCENTILE_99 = 2.58  # of the absolute value of a normal variable, in standard deviations
MARGIN = 3  # times what was measured
FIRST_PROMPTS = 64  # of a set, that say whether IconWorld's verifier can score it


def check_fits(spec: rl.Spec, network: state.Network) -> None:
  """Refuses what cannot run on these devices, before anything is loaded or compiled.

  Raises:
    InputError: names the key, its value, and what to do.
  """
  ways = sharding.batch_multiple(network.mesh)
  sampling_ways = sharding.batch_multiple(spec.rollout.mesh(network))
  prompts_at_once = spec.rollout.prompts_at_once
  micro = spec.update.microbatch * spec.update.minibatches
  at_once = "config.rollout.prompts_at_once"
  for what, number, by, parts in (
    ("config.prompts_per_step", spec.prompts.per_step, at_once, prompts_at_once),
    ("the trajectories of an iteration, config.prompts_per_step x group_size", spec.trajectories,
     "config.microbatch x minibatches", micro),
    ("config.microbatch", spec.update.microbatch, "config.mesh data x fsdp", ways),
    (f"{at_once} x group_size", prompts_at_once * spec.rollout.group_size,
     "devices / tensor ways of sampling (config.rollout.tensor)", sampling_ways),
  ):
    if number % parts:
      raise errors.InputError(f"{what}={number} does not divide by {by}={parts}; change one")
  schedule(spec, network.mesh)


def schedule(spec: rl.Spec, mesh) -> update.Schedule:
  """How an iteration is gone through.

  A microbatch has as few prompts as the devices share evenly, and so as many trajectories of each
  as there are: what they have in common is computed once.

  Raises:
    InputError: no part of the prompts and of their groups makes a microbatch.
  """
  u, ways = spec.update, sharding.batch_multiple(mesh)
  copies = spec.rollout.prompt_copies(mesh)
  rows, group = spec.prompts.per_step * copies, spec.rollout.group_size // copies
  for prompts in range(ways, rows + 1, ways):
    size = u.microbatch // prompts
    if (
      u.microbatch % prompts == 0 and rows % prompts == 0 and size <= group and group % size == 0
    ):
      return update.Schedule(
        epochs=u.epochs, minibatches=u.minibatches,
        microbatches=spec.trajectories // (u.microbatch * u.minibatches),
        old_values=u.old_values, group_parts=group // size,
      )
  raise errors.InputError(
    f"config.microbatch={u.microbatch} is no part of the {spec.prompts.per_step} prompts, a "
    f"multiple of data x fsdp = {ways}, times a part of "
    f"config.group_size={spec.rollout.group_size}; try {ways * spec.rollout.group_size}"
  )


def latent_elements(spec: rl.Spec, network: state.Network) -> int:
  """Numbers of one image's latents."""
  grid = requests.latent_grid(network.config, [(spec.rollout.height, spec.rollout.width)])
  return int(grid.mask.sum()) * network.config.latent_dim


def make_scorer(spec: rl.RewardsSpec) -> rewards.Scorer:
  """The rewards by name; options that name no reward are refused.

  The option `kind` says which reward it is, where its name in the config is another: two served
  rewards are {"a": {"kind": "http", ...}, "b": {"kind": "http", ...}}.
  """
  for name, options in spec.options.items():
    errors.choose("config.reward_options", name, list(spec.weights))
    if options.get("token") is not None:
      raise errors.InputError(
        f"config.reward_options.{name}.token (not shown) would be kept with the config; put it in "
        "an environment variable, and that one's name in token_env"
      )
  made = {}
  for name in spec.weights:
    options = dict(spec.options.get(name, {}))
    made[name] = rewards.make(options.pop("kind", name), **options)
  return rewards.Scorer(
    made, spec.weights, threads=spec.threads, max_failed_fraction=spec.max_failed_fraction
  )


def check_prompts(spec: rl.Spec, prompts: Sequence[Any]) -> None:
  """Refuses prompts that IconWorld's verifier, the default reward, cannot score.

  Before anything is sampled; `prompts` have `prompt` and `metadata`.

  Raises:
    InputError: of the first ones, more have no score than may fail.
  """
  r, count = spec.rewards, min(len(prompts), FIRST_PROMPTS)
  blank = np.zeros((32, 32, 3), np.uint8)
  first = [prompts[i] for i in range(count)]
  samples = [rewards.Sample(one.prompt, blank, "", one.metadata) for one in first]
  for name, kind in r.kinds.items():
    if r.weights[name] and kind.startswith("iconworld_"):
      missing = int(np.isnan(rewards.evaluate(rewards.make(kind), samples).values).sum())
      if missing > r.max_failed_fraction * count:
        raise errors.InputError(
          f"config.rewards: {name} scores scenes of IconWorld, for which {missing} of the first "
          f"{count} prompts of config.prompts.source={spec.prompts.source} do not ask; set "
          "config.rewards"
        )


def pinned(spec: rl.Spec, network: state.Network) -> dict[str, Any]:
  """{key of the config: fingerprint} of what a run's loss reads besides; see `Run`.

  That is a frozen network, and the ways of the mesh where they say what is learnt: a mesh that
  takes all devices has others where their number is another.
  """
  found = {}
  if "mesh" not in spec.run.mutable_keys:
    found["mesh"] = f"{sharding.batch_multiple(network.mesh)} data x fsdp ways"
  if not spec.by_gradient:
    return found
  if not spec.refl.reward_model:
    raise errors.InputError(
      f"config.flow.objective={spec.flow.objective} needs a differentiable reward; set "
      "config.refl.reward_model to the folder of a reward model"
    )
  with errors.at("config.refl.reward_model"):
    found["refl.reward_model"] = learned.fingerprint(spec.refl.reward_model)
  examples = supervised(spec)
  if examples is not None:  # The file may change while its name stays.
    folder = examples.data.folder
    found["refl.sft_config"] = [examples.run.config, folder and corpus.fingerprint(folder)]
  return found


def supervised(spec: rl.Spec) -> sft.Spec | None:
  """Of the supervised examples beside a gradient of a reward; None where there are none.

  Raises:
    InputError: their config is impossible, or its microbatches are no multiple of the optimizer
      steps that share them out.
  """
  if not spec.by_gradient or not spec.refl.sft_weight:
    return None
  with errors.at("config.refl.sft_config"):
    examples = sft.read(config_files.load(spec.refl.sft_config))
    parts, steps = examples.sequences_per_step // examples.microbatch, spec.update.minibatches
    if parts % steps:
      raise errors.InputError(
        f"its sequences_per_step={examples.sequences_per_step} are {parts} microbatch(es) of "
        f"{examples.microbatch}, which config.minibatches={steps} optimizer steps do not share "
        "evenly; change one of them"
      )
  return examples


def make_algorithm(
  spec: rl.Spec, network: state.Network, sampled: rollout.Rollout, prompts: Iterable[Any] = (),
  reward_model: tuple[learned.RewardModel, Any] | None = None,
) -> base.Algorithm:
  """What is learnt from the trajectories that `sampled` gives.

  Args:
    spec, network: of the run.
    sampled: what samples.
    prompts: of the whole run, with `prompt` and `metadata`; a reward's gradient asks about them.
    reward_model: of a reward's gradient, with its parameters; None: that of the config.

  Raises:
    InputError: the reward model cannot be opened, or cannot be asked about one of the prompts.
  """
  f, settings, tokenizer = spec.flow, spec.rollout.settings, network.tokenizer
  of_sde = f.objective in rl.SDE_OBJECTIVES
  scale = 1.0
  if f.scale_with_size:
    scale = float(flow_losses.scaled_clip(1.0, latent_elements(spec, network)))
  common = dict(
    replay=replay.ReplayConfig(
      script=sampled.script, system_ids=sampled.system_ids, start_id=tokenizer.im_start,
      end_id=tokenizer.im_end, temperature=settings.temperature, chunk=spec.text.chunk,
      text=spec.trains_text, flow=f.train, guidance=settings.guidance, routing=f.routing,
    ),
    text=base.TextObjective(
      aggregation=spec.text.aggregation, max_tokens=settings.max_tokens, ratio=spec.text.ratio,
      clip_low=spec.text.clip_low, clip_high=spec.text.clip_high,
      dual_clip=spec.text.dual_clip or None, kl_weight=spec.text.kl_weight,
    ),
    flow_weight=f.weight, regulariser=f.regulariser,
    # The ratios of forward processes are of matching errors, whose size no image changes.
    regulariser_weight=f.regulariser_weight * (scale if of_sde else 1.0),
    anchor_weight=f.anchor_weight * (scale if of_sde else 1.0),
  )
  if spec.by_gradient:
    return _by_gradient(spec, network, sampled, prompts, reward_model, common)
  if of_sde:
    common |= dict(
      ratio=f.ratio, clip=f.clip * scale, grad_reweight=f.grad_reweight,
      kind=spec.rollout.sde.kind, noise_level=spec.rollout.sde.noise_level,
      t_second=float(flow.time_grid(settings.num_timesteps, settings.shift)[1]),
    )
  else:
    common |= dict(draws=spec.times)
  own = {
    "grpo": {}, "dppo": dict(threshold=f.dppo_threshold),
    "nft": dict(beta=f.nft_beta, bound=f.nft_bound),
    "awm": dict(
      weighting=f.awm_weighting, ratio=f.awm_ratio, clip=f.awm_clip or math.inf,
      bound=f.awm_bound or None,
    ),
    "fpo": dict(
      weighting=f.fpo_weighting, ratio=f.fpo_ratio, surrogate=f.fpo_surrogate, clip=f.fpo_clip,
      cap=f.fpo_cap or math.inf,
    ),
  }[f.objective]
  return (rl.SDE_OBJECTIVES | rl.FORWARD_OBJECTIVES)[f.objective](**common, **own)


def _by_gradient(
  spec: rl.Spec, network: state.Network, sampled: rollout.Rollout, prompts, reward_model, common
) -> base.Algorithm:
  if reward_model is None:
    reward_model = learned.open_folder(spec.refl.reward_model, network.mesh)
  made, params = reward_model
  model = made.model.clone(remat=spec.network.remat)
  made = dataclasses.replace(made, model=model)
  put = lambda a: sharding.put_rows(network.mesh, a)
  rows, ways = spec.update.microbatch, sharding.batch_multiple(network.mesh)
  size = (spec.rollout.height, spec.rollout.width)
  # An image at a time, or few, a device: those of all tensor ways, where rows divide over them.
  share = rows // (network.mesh.size if rows % network.mesh.size == 0 else ways)
  at_once = min(sampled.sampler.images_at_once(size), share)
  parts = next(n for n in range(-(-share // at_once), share + 1) if share % n == 0)
  settings = spec.rollout.settings
  times = tuple(flow.time_grid(settings.num_timesteps, settings.shift).tolist())
  words = lambda prompt: made.words(prompt.prompt, prompt.metadata)
  # As long as the longest in every iteration, so that the update compiles once.
  room = max((made.questions([words(prompt)]).ids.shape[1] for prompt in prompts), default=0)
  if spec.refl.gradient_steps != 1:
    last_times = times[spec.window.low :]
    common["replay"] = dataclasses.replace(common["replay"], last_times=last_times)
  return rl.GRADIENT_OBJECTIVES[spec.flow.objective](
    **common, align_times=times if spec.refl.direct_align else (), per_batch=spec.refl.per_batch,
    reward=reward_of_latents(network, made, size),
    ask=lambda prompts: jax.tree.map(put, made.questions([*map(words, prompts)], room)),
    parts=parts, ways=ways, weight=spec.refl.weight, margin=spec.refl.margin,
    fixed={"reward_model": params, "vae": sampled.sampler.vae_params},
  )


def reward_of_latents(
  network: state.Network, reward_model: learned.RewardModel, size: tuple[int, int]
) -> Callable[..., jax.Array]:
  """A reward model's reward as a function of images' latents, differentiable in them.

  Args:
    network: whose autoencoder decodes them, in float32, on all devices of its mesh.
    reward_model: which scores the pixels, without uint8 between.
    size: height and width of the images.

  Returns:
    ({"reward_model", "vae"}: parameters, latents [n, I, C], questions of n rows) -> [n] float32.
  """
  c, mesh = network.config, network.mesh
  vae = vae_lib.VAE(c.vae)
  h, w = (side // c.latent_stride for side in size)

  def reward(fixed, latents, questions):
    # Their gradient likewise: spread as images are, it would meet a network whose rows are not, and
    # whose backward pass the partitioner would then have each device compute for all rows.
    latents = jax.lax.with_sharding_constraint(latents, sharding.along_batch(mesh))
    grids = vae_lib.unpack_latents(latents, h, w, c.latent_patch_size)
    spread = sharding.along_all if len(grids) % mesh.size == 0 else sharding.along_batch
    grids = jax.lax.with_sharding_constraint(grids, spread(mesh))
    pixels = vae.apply({"params": fixed["vae"]}, grids, method="decode")
    pixels = jax.lax.with_sharding_constraint(pixels, sharding.along_batch(mesh))
    return reward_model.score(fixed["reward_model"], pixels, questions)

  return reward


def make_update(
  spec: rl.Spec, network: state.Network, algorithm: base.Algorithm, optimizer, grid, layout
) -> update.Update:
  """The update of a run; see `update.make_update`.

  Args:
    spec, network, algorithm, optimizer: of the run.
    grid: of one image.
    layout: of its state.
  """
  limits, examples = drift_limits(spec, network), supervised(spec)
  # What training starts from: adapters that come with it belong to the reference, fresh ones not.
  reference_model = network.model if spec.network.adapter else network.model.clone(lora=None)
  functions = update.make_update(
    network.model, optimizer, grid, algorithm, schedule(spec, network.mesh),
    trained=spec.optimizer.trained, ema_decay=spec.optimizer.ema_decay,
    reference_model=reference_model if spec.needs_reference else None,
    reference_context=spec.flow.reference_context == "reference",
    anchor=update.Anchor(
      frozenset(spec.anchored), spec.flow.anchor_rise, spec.flow.anchor_decay
    ) if spec.anchored else None, drift_limits=limits,
    beside=None if examples is None else _velocity_error(spec, network, examples),
  )
  return update.Update(
    *functions, fixed=algorithm.fixed, row_sharding=sharding.along_batch(network.mesh),
    out_shardings=(layout.shardings, sharding.replicated(network.mesh)), drift_limits=limits,
    compiler_options=lowering.GATHERED_PARAMETERS.get(lowering.platform(network.mesh)),
  )


def _velocity_error(spec: rl.Spec, network: state.Network, examples: sft.Spec):
  """`beside` of `update.make_update`: the supervised error of velocities, and no words."""
  def loss_fn(trained, frozen, batch, share):
    loss, _ = step.supervised_loss(
      network.model.for_gradients(), optim.join(trained, frozen), batch, share, ce_weight=0.0,
      mse_weight=spec.refl.sft_weight, label_chunk=examples.label_chunk,
    )
    return loss, loss

  def beside(trained, frozen, batches):
    grads, losses = update.accumulate(loss_fn, trained, frozen, (batches, step.shares(batches)))
    return grads, {"sft": losses.sum()}

  return beside


def drift_limits(spec: rl.Spec, network: state.Network) -> dict[str, float]:
  """Largest 99th percentiles of drift/text_scaled, and drift/flow of an SDE, to continue with.

  Rounding errors of layers are independent, so they grow with the square root of their number. An
  error that has nothing to do with a step's noise moves the log ratio, a mean over D latent
  elements, by the element's error over sqrt(D).
  """
  settings, w, dtype = spec.rollout.settings, spec.window, spec.network.dtype
  growth = MARGIN * max(network.config.llm.num_layers / MEASURED_LAYERS, 1.0) ** 0.5
  limits = {"drift/text_scaled_p99": spec.update.drift_text or growth * TEXT_DRIFT[dtype]}
  if not w.size:
    return limits
  step_error = STEP_ERROR[dtype]
  if dtype == "bfloat16" and spec.rollout.sde is not None:
    times = flow.time_grid(settings.num_timesteps, settings.shift)
    t, t_next = times[:-1][w.low : w.high], times[1:][w.low : w.high]
    still = jnp.zeros((*t.shape, 1, 1))
    step = sde.transition(
      still, still, t, t_next, times[1], kind=spec.rollout.sde.kind,
      noise_level=spec.rollout.sde.noise_level,
    )
    step_error *= float(jnp.abs(step.slope).max())
  flow_drift = PERCENTILE_99 * step_error / latent_elements(spec, network) ** 0.5
  return limits | {"drift/flow_p99": spec.update.drift_flow or max(growth * flow_drift, 1e-8)}


def _differentiated(spec: rl.Spec) -> str:
  w, steps = spec.window, spec.rollout.settings.num_timesteps - 1
  if spec.refl.direct_align:
    return "one step of each noised image"
  if spec.refl.gradient_steps != 1:
    return f"the last {steps - w.low}"
  return f"one of steps {w.low} to {w.high - 1}"


def describe(spec: rl.Spec, network: state.Network, train_state) -> list[str]:
  """What an iteration is, before it compiles."""
  r, settings, parts = spec.rollout, spec.rollout.settings, schedule(spec, network.mesh)
  ways = r.mesh(network).shape["tensor"]
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(train_state))
  return [
    f"a step: {spec.prompts.per_step} prompts x {r.group_size} = {spec.trajectories:,} "
    f"trajectories of {r.height} x {r.width} pixels, "
    + (f"up to {settings.max_tokens} tokens of reasoning" if settings.think
       else "without reasoning"),
    f"        {settings.num_timesteps - 1} velocity evaluations, {_trained_steps(spec)}"
    f"; {parts.epochs} epoch(s) x {parts.minibatches} "
    f"minibatch(es) x {parts.microbatches} microbatch(es)",
    f"state: {held / 2**30:.2f} GiB a device (parameters, optimizer"
    + (", moving average" if train_state.ema is not None else "")
    + (", reference" if train_state.reference is not None else "")
    + (", anchor)" if train_state.anchor is not None else ")"),
    f"tensor ways: {network.mesh.shape['tensor']} in the update, {ways} while sampling",
  ] + [
    f"warning: config.learning_rate.{group} is not 0, but no loss reaches these parameters: weight "
    "decay alone moves them; set it to 0" for group in sorted(spec.idle)
  ]


def _trained_steps(spec: rl.Spec) -> str:
  if not spec.flow.train:
    return "none of them trained"
  if spec.by_gradient:
    return f"{_differentiated(spec)} differentiated"
  if spec.window.size:
    return f"SDE window of {spec.window.size} in {(spec.window.low, spec.window.high)}"
  return f"each image noised again at {spec.times.count} times ({spec.times.kind})"
