"""The update: from an iteration's experience to the new training state, in two jitted functions.

  precompute:                                 what needs no advantages; runs during the rewards
    for each microbatch:                      replay of the reference, and of old values
  update:
    for each epoch, for each minibatch:       one optimizer step
      for each microbatch:                    replay -> loss -> gradient; gradients add up
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unigrpo_jax import errors, types
from unigrpo_jax.algorithms import base
from unigrpo_jax.episodes import replay
from unigrpo_jax.runtime import optim

# Where the old policy's values come from. "first_epoch": with one minibatch, the policy of the
# first epoch is the one that sampled, so its own values are the old ones; every ratio is exactly 1,
# at no cost, and later epochs use the kept values. "recomputed": a replay before the update.
# "rollout": what the sampler recorded.
OLD_VALUES = ("first_epoch", "recomputed", "rollout")
# Gradient norms of the reward's loss term and of the regulariser's; they cost a further pass.
TERM_NORMS = ("refl/grad_reward", "refl/grad_regulariser")
NOT_MEASURED = -1.0  # their placeholder in iterations that do not measure them


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How an experience is split into optimizer steps and microbatches."""

  epochs: int  # passes over the experience
  minibatches: int  # optimizer steps per epoch
  microbatches: int  # per minibatch; their gradients add up
  old_values: str  # one of OLD_VALUES
  # Parts that each group is cut into, in different microbatches; each part reads the prompt once.
  # Divides `microbatches` and the group's size.
  group_parts: int = 1


@dataclasses.dataclass(frozen=True)
class Anchor:
  """A moving average of what the flow trains; the policy's velocities are held near its own (AWM).

  Once per iteration, after the update: average <- d average + (1 - d) parameters, where d is
  `optim.rising_decay` of the optimizer steps taken.
  """

  groups: frozenset[str]  # parameter groups that are averaged; for the others the policy's are used
  rise: float  # growth of d per optimizer step
  highest: float  # upper bound of d


def accumulate(loss_fn, trained_params, frozen, inputs) -> tuple[Any, Any]:
  """Gradients summed over microbatches, one after the other; the only accumulator of the package.

  Args:
    loss_fn: (trained parameters, frozen parameters, *inputs of a microbatch) -> (loss, aux).
    trained_params, frozen: the two parts of the parameters; see `optim.split`.
    inputs: of all microbatches, on a leading axis.

  Returns:
    (gradients of all parameters, 0 for frozen ones; aux stacked over microbatches).
  """
  def add(grads, micro):
    new, aux = jax.grad(loss_fn, has_aux=True)(trained_params, frozen, *micro)
    return jax.tree.map(jnp.add, grads, new), aux

  with jax.named_scope("loss"):
    grads, aux = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained_params), inputs)
  return optim.join(grads, jax.tree.map(jnp.zeros_like, frozen)), aux


def apply_gradients(
  state: types.TrainState, grads, optimizer: optax.GradientTransformation, *,
  ema_decay: float | None, trained: Collection[str],
) -> tuple[types.TrainState, dict[str, jax.Array]]:
  """One optimizer step and one step of the moving average.

  Returns:
    (the new state, {"grad_norm/GROUP": gradient norm before clipping} of the trained groups).
  """
  with jax.named_scope("update"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
      # Frozen parameters are not averaged: in bfloat16 the rounding errors would add up.
      (average, frozen), (new, _) = (optim.split(tree, trained) for tree in (ema, params))
      ema = optim.join(optim.update_average(average, new, state.step, decay=ema_decay), frozen)
  norms = optim.group_norms(grads).items()
  norms = {f"grad_norm/{group}": norm for group, norm in norms if group in trained}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), norms


def make_update(
  model, optimizer: optax.GradientTransformation, grid: types.LatentGrid,
  algorithm: base.Algorithm, schedule: Schedule, *,
  trained: Collection[str], ema_decay: float | None, reference_model=None,
  reference_context: bool = True, anchor: Anchor | None = None,
  drift_limits: Mapping[str, float] | None = None,
  beside: Callable[..., Any] | None = None,
):
  """Makes the two functions of the module's docstring; jit them, `update` with its state donated.

  Args:
    model: the policy's network.
    optimizer: the optimizer of all parameters.
    grid: latent grid of one image, [1, I].
    algorithm: what is optimised.
    schedule: how the experience is split.
    trained: parameter groups that train.
    ema_decay: decay of the parameters' moving average; None: there is none.
    reference_model: network of the reference policy; None where nothing needs it. Its parameters
      are `state.reference`, or, where that is None, the policy's own with their adapters left out.
    reference_context: whether the reference reads the trajectory itself. Otherwise its velocities
      are computed over the policy's context.
    anchor: how `state.anchor` moves; `precompute` then also computes its velocities, over the
      policy's context. None: there is none.
    drift_limits: {metric: largest value at the first optimizer step}. Above it, the update is
      rejected and the state does not change.
    beside: a second, supervised loss added at each optimizer step: (trained parameters, frozen
      parameters, the step's examples) -> (gradients of all parameters, {term: loss}).

  Returns:
    (precompute, update):
      precompute: (state, experience) -> {field of `types.Round`: [B, ...] float32}: velocities and
        log-probabilities of the reference, velocities of the anchor, and `old`, as far as the
        update needs them. They do not change during the update and need no advantages.
      update: (state, experience with these fields, parameters of frozen networks, examples of
        `beside`) -> (state, {metric: [optimizer steps] float32}). Examples have a leading axis of
        microbatches, which is divided over the minibatches.
  """
  total = schedule.minibatches * schedule.microbatches

  run = lambda model, params, micro: replay.replay(model, params, micro, grid, algorithm.replay)
  learning = model.for_gradients()

  def loss_fn(learner, trained_params, frozen, micro, old, weights, is_first_epoch):
    output = run(learning, optim.join(trained_params, frozen), micro)
    return learner.loss(output, micro, old, weights, grid, is_first_epoch)

  def precompute(state: types.TrainState, experience: types.Experience):
    def of_microbatch(micro):
      values = {}
      if reference_model is not None:
        values |= _reference(
          reference_model, model, state, micro, grid, algorithm, reference_context
        )
      if anchor is not None:
        away = optim.join(state.anchor, optim.split(state.params, anchor.groups)[1])
        values["velocity_anchor"] = _velocities(
          model, model, state.params, away, micro, grid, algorithm
        )
      if schedule.old_values == "recomputed":
        values["old"] = algorithm.values(run(model, state.params, micro), micro)
      return values

    with jax.named_scope("precompute"):
      values = jax.lax.map(of_microbatch, cut(experience, total, schedule.group_parts))
    prompts = experience.prompt.ids.shape[0]
    return jax.tree.map(lambda a: _joined(a, prompts, schedule.group_parts), values)

  def update(
    state: types.TrainState, experience: types.Experience, fixed: Any = None, examples: Any = None
  ):
    learner = dataclasses.replace(algorithm, fixed=jax.lax.stop_gradient(fixed))
    micros = cut(experience, total, schedule.group_parts)
    by_minibatch = (schedule.minibatches, schedule.microbatches)
    micros = jax.tree.map(lambda a: a.reshape(*by_minibatch, *a.shape[1:]), micros)
    examples = jax.tree.map(
      lambda a: a.reshape(schedule.minibatches, -1, *a.shape[1:]), examples
    )
    old = micros.only.old or algorithm.recorded(micros)
    steps = jnp.arange(schedule.epochs * schedule.minibatches)
    micros = micros.with_only(old=None)

    def optimizer_step(carry, index):
      state, old, update_ok = carry
      place = index % schedule.minibatches
      micro, old_here = jax.tree.map(lambda a: a[place], (micros, old))
      is_first = index < schedule.minibatches if schedule.old_values == "first_epoch" else None
      loss_of = lambda *arguments: loss_fn(learner, *arguments, is_first)
      params = optim.split(learning.unstacked(state.params), trained)
      arguments = (*params, (micro, old_here, algorithm.weights(micro)))
      grads, (terms, new_values, signals) = accumulate(loss_of, *arguments)
      metrics = {f"loss/{name}": values.sum() for name, values in terms.items()}
      if algorithm.term_norms_every and "regulariser" in terms:
        # Of the iteration's last optimizer step, which is the one that is logged.
        done, last = state.step // len(steps), index == len(steps) - 1
        metrics |= jax.lax.cond(
          last & (done % algorithm.term_norms_every == 0),
          lambda: _term_norms(loss_of, arguments, grads, algorithm.flow_weight),
          lambda: dict.fromkeys(TERM_NORMS, jnp.float32(NOT_MEASURED)),
        )
      if beside is not None:
        more, losses = beside(*arguments[:2], jax.tree.map(lambda a: a[place], examples))
        grads = jax.tree.map(jnp.add, grads, more)
        metrics |= {f"loss/{name}": value for name, value in losses.items()}
        metrics["loss/total"] += sum(losses.values())
      metrics |= _summaries(signals, micro, algorithm.replay)
      new_state, norms = apply_gradients(
        state, learning.stacked(grads), optimizer, ema_decay=ema_decay, trained=trained
      )
      metrics |= norms
      # From the first step with a number that is not finite, or with too much drift between sampler
      # and trainer, the state no longer changes; the run then saves it and stops.
      update_ok &= jnp.array([
        jnp.isfinite(value) for name, value in metrics.items()
        if name.startswith(("loss/", "grad_norm/"))
      ]).all()
      for name, limit in (drift_limits or {}).items():
        if name in metrics:
          update_ok &= (index > 0) | (metrics[name] <= limit)
      state = jax.tree.map(lambda new, old: jnp.where(update_ok, new, old), new_state, state)
      if is_first is not None:
        old = jax.tree.map(lambda new, old: jnp.where(is_first, new[None], old), new_values, old)
      return (state, old, update_ok), metrics

    carry = state, old, jnp.array(True)
    (state, _, update_ok), metrics = jax.lax.scan(optimizer_step, carry, steps)
    if anchor is not None:
      trained_now, _ = optim.split(state.params, anchor.groups)
      d = optim.rising_decay(state.step, rise=anchor.rise, highest=anchor.highest)
      moved = optim.move_average(state.anchor, trained_now, d)
      state = state.replace(anchor=jax.tree.map(
        lambda new, old: jnp.where(update_ok, new, old), moved, state.anchor
      ))
    return state, metrics

  return precompute, update


class Update:
  """The jitted update of a run: donates the state, returns metrics as floats, rejects bad updates.
  """

  def __init__(
    self, precompute, update, *, row_sharding=None, out_shardings=None,
    drift_limits: Mapping[str, float], fixed: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
  ):
    """Jits both functions; compiles nothing yet.

    Args:
      precompute, update, drift_limits: see `make_update`.
      row_sharding: sharding of what `precompute` returns.
      out_shardings: shardings of (state, metrics).
      fixed: parameters of frozen networks, `Algorithm.fixed`.
      compiler_options: XLA's, of both.
    """
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    self.jitted_precompute = jit(precompute, out_shardings=row_sharding)
    self.jitted = jit(update, donate_argnums=0, out_shardings=out_shardings)
    self._limits, self._fixed = drift_limits, fixed

  def precompute(
    self, state: types.TrainState, experience: types.Experience
  ) -> types.Experience:
    """Adds to the experience what the update needs besides advantages; returns without waiting.

    The devices compute it while the caller waits for rewards. If they fail, the error is raised by
    the update that receives the experience, before it donates the state.
    """
    with jax.transfer_guard("disallow"):
      return experience.with_only(**self.jitted_precompute(state, experience))

  def __call__(
    self, state: types.TrainState, experience: types.Experience, examples: Any = None
  ) -> tuple[types.TrainState, dict[str, float]]:
    """Updates the state, which is donated.

    Args:
      state: the training state.
      experience: as returned by `precompute`, with advantages.
      examples: for the supervised loss `beside`; see `make_update`.

    Returns:
      (new state, {metric: value}); see `summarise`.

    Raises:
      UpdateRejected: a number is not finite, or the trainer's values drifted from the sampler's.
        It carries the unchanged state where no optimizer step was taken.
    """
    jax.block_until_ready(experience)  # An error in it must be raised before the state is donated.
    step = int(state.step)
    with jax.transfer_guard("disallow"):
      state, metrics = jax.block_until_ready(self.jitted(state, experience, self._fixed, examples))
    metrics = summarise(jax.device_get(metrics))
    # Where the first optimizer step was rejected, this is the state from before the update.
    unmoved = state if int(state.step) == step else None
    if bad := sorted(name for name, value in metrics.items() if not np.isfinite(value)):
      raise errors.UpdateRejected(
        f"{', '.join(bad)} not finite; lower the learning rate and resume", unmoved
      )
    for name, limit in self._limits.items():
      if metrics.get(name, 0.0) > limit:
        key = name.replace("/", ".").removesuffix("_p99").removesuffix("_scaled")
        raise errors.UpdateRejected(
          f"{name}={metrics[name]:.3g}, at most {limit:.3g} is rounding: the trainer does not "
          "compute what the sampler did for the same parameters; if the dtype explains it, raise "
          f"config.{key}", unmoved,
        )
    return state, metrics


def summarise(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  """Reduces each metric [optimizer steps] to one float for the log.

  That is the value of the last step, where ratios are widest; for "drift/" the value of the first,
  when the policy still is the one that sampled. A value that is not finite, at any step, takes
  precedence. `TERM_NORMS` that were not measured are left out.
  """
  def one(name, values):
    bad = values[~np.isfinite(values)]
    return float(bad[0] if bad.size else values[0 if name.startswith("drift/") else -1])

  summary = {name: one(name, values) for name, values in metrics.items()}
  return {
    name: value for name, value in summary.items()
    if name not in TERM_NORMS or value != NOT_MEASURED
  }


def cut(experience: types.Experience, parts: int, group_parts: int) -> types.Experience:
  """Cuts an experience into microbatches: [B, ...] -> [parts, B / parts, ...].

  Each holds some of the prompts, with 1 / group_parts of each one's trajectories. The cut is
  strided, so that each microbatch takes its share of every device's rows.
  """
  prompts, prompt_parts = experience.prompt.ids.shape[0], parts // group_parts
  few = prompts // prompt_parts  # prompts of a microbatch

  def trajectories(a):
    # Prompt p goes to prompt part p % prompt_parts, its trajectory k to group part k % group_parts.
    size = a.shape[0] // prompts // group_parts  # trajectories of each
    a = a.reshape(few, prompt_parts, size, group_parts, *a.shape[1:])
    return jnp.moveaxis(a, (1, 3), (0, 1)).reshape(parts, few * size, *a.shape[4:])

  def of_prompts(a):
    a = jnp.moveaxis(a.reshape(few, prompt_parts, *a.shape[1:]), 1, 0)
    return jnp.repeat(a, group_parts, axis=0)

  shared = jax.tree.map(of_prompts, {"prompt": experience.prompt, "source": experience.source})
  own = jax.tree.map(trajectories, experience.replace(prompt=None, source=None))
  return own.replace(**shared)


def _joined(array: jax.Array, prompts: int, group_parts: int) -> jax.Array:
  """The inverse of `cut` for one array: [parts, B / parts, ...] -> [B, ...]."""
  parts, rows = array.shape[:2]
  few = prompts * group_parts // parts
  array = array.reshape(parts // group_parts, group_parts, few, rows // few, *array.shape[2:])
  return jnp.moveaxis(array, (0, 1), (1, 3)).reshape(parts * rows, *array.shape[4:])


def _reference(
  reference_model, model, state, micro: types.Experience, grid, algorithm: base.Algorithm,
  reference_context: bool,
) -> dict[str, Any]:
  """The reference's `velocity_ref` and `logp_ref` of a microbatch; None where not needed."""
  config = algorithm.replay
  flow = config.flow and algorithm.regulariser != "none"
  params = state.params if state.reference is None else state.reference
  own = dataclasses.replace(
    config, text=config.text and algorithm.text.kl_weight > 0, flow=flow and reference_context,
    guidance=dataclasses.replace(config.guidance, text_scale=1.0),
  )
  output = replay.replay(reference_model, params, micro, grid, own)
  if flow and not reference_context:
    velocity = _velocities(
      model, reference_model, state.params, params, micro, grid, algorithm
    )
    output = output.replace(velocity=velocity)
  return {"velocity_ref": output.velocity, "logp_ref": output.logp}


def _velocities(
  model, velocity_model, params, velocity_params, micro: types.Experience, grid,
  algorithm: base.Algorithm,
):
  """Velocities without guidance of `velocity_params`, over the context that `params` read.

  Returns [B, W, I, C] float32.
  """
  config = dataclasses.replace(
    algorithm.replay, text=False,
    guidance=dataclasses.replace(algorithm.replay.guidance, text_scale=1.0),
  )
  return replay.replay(
    model, params, micro, grid, config, velocity_params=velocity_params,
    velocity_model=velocity_model,
  ).velocity


def _term_norms(loss_of, arguments, grads, flow_weight: float) -> dict[str, jax.Array]:
  """`TERM_NORMS`. The two terms' gradients add up to `grads`, so only one of them is computed."""
  def regulariser(*inputs):
    _, (terms, *_) = loss_of(*inputs)
    return flow_weight * terms["regulariser"], ()

  of_regulariser, _ = accumulate(regulariser, *arguments)
  of_reward = jax.tree.map(jnp.subtract, grads, of_regulariser)
  return dict(zip(TERM_NORMS, map(optax.tree.norm, (of_reward, of_regulariser))))


def _summaries(
  signals: Mapping[str, Any], micros: types.Experience, config: replay.ReplayConfig
) -> dict[str, Any]:
  """{metric: [] float32}: means, maxima and percentiles of signals over a minibatch.

  Only tokens and steps of valid trajectories count.
  """
  metrics = {}
  valid = micros.valid[..., None]
  if config.text:
    mask = micros.only.text.mask & valid
    log_ratio = signals["text/log_ratio"]
    metrics |= _ratio("text", jnp.exp(log_ratio), signals["text/clipped"], mask)
    metrics["text/approx_kl"] = _mean(jnp.expm1(log_ratio) - log_ratio, mask)
    metrics["text/entropy"] = _mean(signals["text/entropy"], mask)
    for name in ("drift/text", "drift/text_scaled"):
      metrics |= _drift(name, signals[name], mask)
    if "text/kl" in signals:
      metrics["text/kl_ref"] = _mean(signals["text/kl"], mask)
  if config.flow:
    mask = jnp.broadcast_to(valid, micros.only.flow.t.shape)
    signals = dict(signals)
    if "flow/log_ratio" in signals:
      log_ratio = signals.pop("flow/log_ratio")
      clipped, outside = (signals.pop(f"flow/{name}") for name in ("clipped", "outside"))
      steps = jnp.broadcast_to(valid, log_ratio.shape)
      # These ratios differ from 1 by less than float32 resolves, so their logarithms are logged.
      metrics |= _ratio("flow", log_ratio, clipped, steps, name="log_ratio")
      metrics["flow/outside_fraction"] = _mean(outside.astype(jnp.float32), steps)
    for name, values in signals.items():
      if name.startswith(("flow/", "refl/")):
        metrics[name] = _mean(values, jnp.broadcast_to(valid, values.shape))
    if "flow/matching" in signals:  # Unbounded where the advantage is negative, so watched apart.
      negative = mask & (micros.adv < 0)[..., None]
      metrics["flow/matching_negative"] = _mean(signals["flow/matching"], negative)
    if "drift/flow" in signals:
      metrics |= _drift("drift/flow", signals["drift/flow"], mask)
  return metrics


def _ratio(kind: str, ratio, clipped, mask, name: str = "ratio") -> dict[str, Any]:
  size = jnp.abs(ratio) if name == "log_ratio" else ratio
  return {
    f"{kind}/{name}_mean": _mean(ratio, mask),
    f"{kind}/{name}_max": _of_counted(jnp.nanmax, size, mask),
    f"{kind}/{name}_p99": _percentile_99(size, mask),
    f"{kind}/clip_fraction": _mean(clipped.astype(jnp.float32), mask),
  }


def _drift(name: str, drift, mask) -> dict[str, Any]:
  """The maximum over all entries; mean and 99th percentile over those that count."""
  return {
    name: drift.max(), f"{name}_mean": _mean(drift, mask),
    f"{name}_p99": _percentile_99(drift, mask),
  }


def _of_counted(reduce, values, mask):
  """`reduce` of the values that count; 0 where none does: a minibatch may have no valid group."""
  return jnp.where(mask.any(), reduce(jnp.where(mask, values, jnp.nan)), 0.0)


def _percentile_99(values, mask):
  return _of_counted(lambda values: jnp.nanpercentile(values, 99), values, mask)


def _mean(values, mask):
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)
