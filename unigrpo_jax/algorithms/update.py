"""The update: what an iteration's experience changes in the state. Two jitted functions.

  precompute:                                 what needs no advantages, while rewards are computed
    for each microbatch:                      the reference's replay, and that of old values
  update:
    for each epoch, for each minibatch:       one optimizer step
      for each microbatch:                    replay -> loss -> gradient, which add up
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unigrpo_jax import errors, types
from unigrpo_jax.algorithms import base
from unigrpo_jax.episodes import replay
from unigrpo_jax.runtime import optim

# With one minibatch, the first epoch's own values are those of the policy that sampled: every ratio
# is exactly 1, at no cost, and they are kept for the epochs after it.
OLD_VALUES = ("first_epoch", "recomputed", "rollout")
# Norms of the gradients of the reward's term and of the regulariser's, which cost a further pass.
TERM_NORMS = ("refl/grad_reward", "refl/grad_regulariser")
NOT_MEASURED = -1.0  # what stands for them in other iterations


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How an experience is gone through."""

  epochs: int  # passes over it
  minibatches: int  # optimizer steps a pass
  microbatches: int  # that a minibatch is cut into; their gradients add up
  old_values: str  # one of OLD_VALUES
  # That a group is cut into, at least; a prompt is read once for each of them. Divides
  # `microbatches` and the group's size.
  group_parts: int = 1


@dataclasses.dataclass(frozen=True)
class Anchor:
  """A moving average of what the flow trains, which its velocities are held near (AWM).

  After a rollout's update it is d average + (1 - d) parameters, d as `optim.rising_decay` says of
  the optimizer steps taken.
  """

  groups: frozenset[str]  # of parameters; the others are the policy's own
  rise: float  # of d, an optimizer step
  highest: float  # that d can be


def accumulate(loss_fn, trained_params, frozen, inputs) -> tuple[Any, Any]:
  """The sum of gradients over microbatches: the one place where they add up.

  loss_fn is (trained parameters, frozen ones, *a microbatch's inputs) -> (loss, aux); see
  `optim.split`. Inputs have a leading axis of microbatches. Returns (gradients of all parameters,
  0 for frozen ones; aux stacked over microbatches).
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
  """The optimizer's step and the moving average's; returns the gradient norm of each group too."""
  with jax.named_scope("update"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
      # Frozen parameters are their own average; in bfloat16 its rounding would add up.
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
  """What goes before the update and the update, to be jitted; the update with its state donated.

  Args:
    grid: of one image, [1, I].
    trained: groups of parameters that are.
    ema_decay: of the moving average; None for none.
    reference_model: the network of the reference, or None where nothing needs it; its parameters
      are `state.reference`, or where there are none the policy's own, which without adapters are
      what training started from.
    reference_context: the reference reads the trajectory itself; otherwise its velocities are over
      the policy's context.
    anchor: `state.anchor` is moved so, and `precompute` gives its velocities, over the policy's
      context; None: there is none.
    drift_limits: {metric: the most that the first step may show}, beyond which nothing moves.
    beside: another loss of each optimizer step, of supervised examples: (trained parameters, frozen
      ones, their part of the examples) -> (gradients of all, {term: loss}), which are added.

  Returns:
    precompute: (state, experience) -> fields of its round that stay what they are through the
      update, {name: [B, ...] float32}: the reference's velocities and log-probabilities, the
      anchor's velocities, and `old`.
      It reads no advantages; {} where the update needs none of them.
    update: (state, experience with these fields, parameters of frozen networks, examples of
      `beside` with a leading axis of microbatches, which the minibatches share out) -> (state,
      metrics); each metric is [optimizer steps] float32.
  """
  total = schedule.minibatches * schedule.microbatches

  run = lambda model, params, micro: replay.replay(model, params, micro, grid, algorithm.replay)

  def loss_fn(learner, trained_params, frozen, micro, old, weights, is_first_epoch):
    output = run(model.for_gradients(), optim.join(trained_params, frozen), micro)
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
      arguments = (
        *optim.split(state.params, trained), (micro, old_here, algorithm.weights(micro))
      )
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
        state, grads, optimizer, ema_decay=ema_decay, trained=trained
      )
      metrics |= norms
      # Where a number is not finite, or the sampler was not this policy, the state stays as it was
      # from here on: the run saves it and stops.
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
  """A run's update on its devices: jitted, its state donated, its metrics as floats."""

  def __init__(
    self, precompute, update, *, row_sharding=None, out_shardings=None,
    drift_limits: Mapping[str, float], fixed: Any = None,
  ):
    """Compiles nothing yet; the functions and `drift_limits` are those of `make_update`.

    `row_sharding` is of what the first gives, `out_shardings` of the state and of the metrics;
    `fixed` are the parameters of frozen networks, `Algorithm.fixed`.
    """
    self.jitted_precompute = jax.jit(precompute, out_shardings=row_sharding)
    self.jitted = jax.jit(update, donate_argnums=0, out_shardings=out_shardings)
    self._limits, self._fixed = drift_limits, fixed

  def precompute(
    self, state: types.TrainState, experience: types.Experience
  ) -> types.Experience:
    """The experience with what the update needs and advantages do not change; waits for nothing.

    The devices compute it while the caller waits for rewards. An error of theirs is raised by the
    update that takes it, before that changes anything.
    """
    with jax.transfer_guard("disallow"):
      return experience.with_only(**self.jitted_precompute(state, experience))

  def __call__(
    self, state: types.TrainState, experience: types.Experience, examples: Any = None
  ) -> tuple[types.TrainState, dict[str, float]]:
    """Returns (state, one number of each metric); `state` is donated.

    Args:
      experience: as `precompute` gives it, with its advantages.
      examples: of a supervised loss beside; see `make_update`.

    Raises:
      UpdateRejected: a number is not finite, or the trainer does not compute what the sampler did.
    """
    jax.block_until_ready(experience)  # An error in it is not to cost the state, which is donated.
    step = int(state.step)
    with jax.transfer_guard("disallow"):
      state, metrics = jax.block_until_ready(self.jitted(state, experience, self._fixed, examples))
    metrics = summarise(jax.device_get(metrics))
    # Nothing moved where the first optimizer step was rejected; then it is the state before.
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
  """One number of each metric of the update: of its last optimizer step, where ratios are widest.

  The drift is that of the first, when the trainer still is the policy that sampled. A number that
  is not finite in any step comes before those that are.
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
  """[B, ...] -> [parts, B / parts, ...]: some prompts each, with a part of their trajectories.

  Strided: a part takes its share of every device's rows.
  """
  prompts, prompt_parts = experience.prompt.ids.shape[0], parts // group_parts
  few = prompts // prompt_parts

  def trajectories(a):
    size = a.shape[0] // prompts // group_parts
    a = a.reshape(few, prompt_parts, size, group_parts, *a.shape[1:])
    return jnp.moveaxis(a, (1, 3), (0, 1)).reshape(parts, few * size, *a.shape[4:])

  def of_prompts(a):
    a = jnp.moveaxis(a.reshape(few, prompt_parts, *a.shape[1:]), 1, 0)
    return jnp.repeat(a, group_parts, axis=0)

  shared = jax.tree.map(of_prompts, {"prompt": experience.prompt, "source": experience.source})
  own = jax.tree.map(trajectories, experience.replace(prompt=None, source=None))
  return own.replace(**shared)


def _joined(array: jax.Array, prompts: int, group_parts: int) -> jax.Array:
  """[parts, B / parts, ...] -> [B, ...]: trajectories in the order that they had before `cut`."""
  parts, rows = array.shape[:2]
  few = prompts * group_parts // parts
  array = array.reshape(parts // group_parts, group_parts, few, rows // few, *array.shape[2:])
  return jnp.moveaxis(array, (0, 1), (1, 3)).reshape(parts * rows, *array.shape[4:])


def _reference(
  reference_model, model, state, micro: types.Experience, grid, algorithm: base.Algorithm,
  own_context: bool,
) -> dict[str, Any]:
  """The reference's velocities and log-probabilities, where they are needed: fields of a round."""
  config = algorithm.replay
  flow = config.flow and algorithm.regulariser != "none"
  params = state.params if state.reference is None else state.reference
  own = dataclasses.replace(
    config, text=config.text and algorithm.text.kl_weight > 0, flow=flow and own_context,
    guidance=dataclasses.replace(config.guidance, text_scale=1.0),
  )
  output = replay.replay(reference_model, params, micro, grid, own)
  if flow and not own_context:
    velocity = _velocities(
      model, reference_model, state.params, params, micro, grid, algorithm
    )
    output = output.replace(velocity=velocity)
  return {"velocity_ref": output.velocity, "logp_ref": output.logp}


def _velocities(
  model, velocity_model, params, velocity_params, micro: types.Experience, grid,
  algorithm: base.Algorithm,
):
  """Velocities of other parameters over the policy's context, without guidance: [B, W, I, C]."""
  config = dataclasses.replace(
    algorithm.replay, text=False,
    guidance=dataclasses.replace(algorithm.replay.guidance, text_scale=1.0),
  )
  return replay.replay(
    model, params, micro, grid, config, velocity_params=velocity_params,
    velocity_model=velocity_model,
  ).velocity


def _term_norms(loss_of, arguments, grads, flow_weight: float) -> dict[str, jax.Array]:
  """TERM_NORMS: gradients of the terms add up to `grads`, so one of them is computed."""
  def regulariser(*inputs):
    _, (terms, *_) = loss_of(*inputs)
    return flow_weight * terms["regulariser"], ()

  of_regulariser, _ = accumulate(regulariser, *arguments)
  of_reward = jax.tree.map(jnp.subtract, grads, of_regulariser)
  return dict(zip(TERM_NORMS, map(optax.tree.norm, (of_reward, of_regulariser))))


def _summaries(
  signals: Mapping[str, Any], micros: types.Experience, config: replay.ReplayConfig
) -> dict[str, Any]:
  """Means, extremes and percentiles over the tokens and steps of a minibatch that count."""
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
      # Ratios differ from 1 by less than float32 can show: their logarithms are logged instead.
      metrics |= _ratio("flow", log_ratio, clipped, steps, name="log_ratio")
      metrics["flow/outside_fraction"] = _mean(outside.astype(jnp.float32), steps)
    for name, values in signals.items():
      if name.startswith(("flow/", "refl/")):
        metrics[name] = _mean(values, jnp.broadcast_to(valid, values.shape))
    if "flow/matching" in signals:  # Nothing bounds the error of images that are pushed away.
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
  """The largest difference of all, and mean and 99th percentile of those that count."""
  return {
    name: drift.max(), f"{name}_mean": _mean(drift, mask),
    f"{name}_p99": _percentile_99(drift, mask),
  }


def _of_counted(reduce, values, mask):
  """0 where nothing counts: a minibatch may have no valid group."""
  return jnp.where(mask.any(), reduce(jnp.where(mask, values, jnp.nan)), 0.0)


def _percentile_99(values, mask):
  return _of_counted(lambda values: jnp.nanpercentile(values, 99), values, mask)


def _mean(values, mask):
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)
