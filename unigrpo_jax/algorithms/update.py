"""The update of UniGRPO: what a rollout's experience changes in the state. One jitted function.

  for each epoch, for each minibatch:         one optimizer step
    for each microbatch:                      gradients add up
      say -> joint_loss -> gradient

With one minibatch, the first epoch's own values are the old policy's: every ratio is exactly 1, at
no cost, and they are kept for the epochs after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unigrpo_jax import types
from unigrpo_jax.algorithms import objective as objective_lib
from unigrpo_jax.algorithms import step
from unigrpo_jax.episodes import policy
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.runtime import optim

OLD_VALUES = ("first_epoch", "recomputed", "rollout")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How an experience is gone through.

  Attributes:
    epochs: passes over it.
    minibatches: optimizer steps a pass.
    microbatches: that a minibatch is cut into; their gradients add up.
    old_values: one of OLD_VALUES.
    group_parts: that a group is cut into, at least; a prompt is read once for each of them. Divides
      `microbatches` and the group's size.
  """

  epochs: int
  minibatches: int
  microbatches: int
  old_values: str
  group_parts: int = 1


def make_update(
  model, optimizer: optax.GradientTransformation, grid: types.LatentGrid,
  reading: policy.Reading, objective: objective_lib.Objective, schedule: Schedule, *,
  trained: Collection[str], ema_decay: float | None, reference_model=None,
  reference_context: bool = True, drift_limits: Mapping[str, float] | None = None,
):
  """The update, to be jitted with its state donated.

  Args:
    model: the `Bagel` that is trained.
    optimizer: see `optim.adamw_by_group`.
    grid: of one image, [1, I].
    reading, objective, schedule: what is computed.
    trained: groups of parameters that are.
    ema_decay: of the moving average; None for none.
    reference_model: the network of the reference; its parameters are `state.reference`, or where
      there are none the policy's own, which without adapters are what training started from. None
      where nothing needs a reference.
    reference_context: the reference reads the trajectory itself; otherwise its velocities are over
      the policy's context.
    drift_limits: {metric: the most that the first step may show}, beyond which nothing moves.

  Returns:
    (state, experience) -> (state, metrics); each metric is [optimizer steps] float32.
  """
  total = schedule.minibatches * schedule.microbatches

  def loss_fn(trained_params, frozen, micro, old, weights, first):
    params = optim.join(trained_params, frozen)
    said = policy.say(model, params, micro, grid, reading)
    return objective_lib.joint_loss(said, micro, old, weights, grid, objective, first)

  def consult(state, micro):
    """The experience with the reference's values, and the values that ratios start from."""
    if reference_model is not None:
      micro = _with_reference(
        reference_model, model, state, micro, grid, reading, objective, reference_context
      )
    old = objective_lib.Old(
      logp=micro.text.logp if reading.text else None, flow=_recorded(micro, reading, objective)
    )
    if schedule.old_values == "recomputed":
      said = policy.say(model, state.params, micro, grid, reading)
      blank = {"text": jnp.zeros_like(old.logp) if reading.text else None,
               "flow": jnp.zeros_like(micro.flow.t) if reading.flow else None}
      _, (_, old, _) = objective_lib.joint_loss(
        said, micro, old, blank, grid, objective, None
      )
    return micro, old

  def update(state: types.TrainState, experience: types.Experience):
    parts = _cut(experience, total, schedule.group_parts)
    with jax.named_scope("consult"):
      micros, old = jax.lax.map(lambda micro: consult(state, micro), parts)
    by_minibatch = (schedule.minibatches, schedule.microbatches)
    micros, old = jax.tree.map(lambda a: a.reshape(*by_minibatch, *a.shape[1:]), (micros, old))

    def optimizer_step(carry, index):
      state, old, sound = carry
      place = index % schedule.minibatches
      here = jax.tree.map(lambda a: a[place], (micros, old))
      first = index < schedule.minibatches if schedule.old_values == "first_epoch" else None
      trained_params, frozen = optim.split(state.params, trained)

      def accumulate(grads, inputs):
        micro, old, weights = inputs
        new, aux = jax.grad(loss_fn, has_aux=True)(
          trained_params, frozen, micro, old, weights, first
        )
        return jax.tree.map(jnp.add, grads, new), aux

      weights = _weights(here[0], objective, reading)
      with jax.named_scope("loss"):
        grads, (terms, own, signals) = jax.lax.scan(
          accumulate, jax.tree.map(jnp.zeros_like, trained_params), (*here, weights)
        )
      metrics = {f"loss/{name}": values.sum() for name, values in terms.items()}
      metrics |= _summaries(signals, here[0], reading)
      grads = optim.join(grads, jax.tree.map(jnp.zeros_like, frozen))
      new_state, metrics = step.apply_gradients(
        state, grads, optimizer, ema_decay=ema_decay, metrics=metrics
      )
      for name in [name for name in metrics if name.startswith("grad_norm_")]:
        value, name = metrics.pop(name), name.removeprefix("grad_norm_")
        if name in trained:
          metrics[f"grad_norm/{name}"] = value
      # Where a number is not finite, or the sampler was not this policy, the state stays as it was
      # from here on: the run saves it and stops.
      sound &= jnp.array([
        jnp.isfinite(value) for name, value in metrics.items()
        if name.startswith(("loss/", "grad_norm/"))
      ]).all()
      for name, limit in (drift_limits or {}).items():
        if name in metrics:
          sound &= (index > 0) | (metrics[name] <= limit)
      state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new_state, state)
      if first is not None:
        old = jax.tree.map(lambda new, old: jnp.where(first, new[None], old), own, old)
      return (state, old, sound), metrics

    steps = jnp.arange(schedule.epochs * schedule.minibatches)
    (state, *_), metrics = jax.lax.scan(optimizer_step, (state, old, jnp.array(True)), steps)
    return state, metrics

  return update


def _cut(experience: types.Experience, parts: int, group_parts: int) -> types.Experience:
  """[B, ...] -> [parts, B / parts, ...]: some prompts each, with a part of their trajectories.

  Strided: a part takes its share of every device's rows.
  """
  prompts, rows = experience.prompt_ids.shape[0], experience.adv.shape[0]
  size, prompt_parts = rows // prompts // group_parts, parts // group_parts
  few = prompts // prompt_parts

  def trajectories(a):
    a = a.reshape(few, prompt_parts, size, group_parts, *a.shape[1:])
    return jnp.moveaxis(a, (1, 3), (0, 1)).reshape(parts, few * size, *a.shape[4:])

  def of_prompts(a):
    a = jnp.moveaxis(a.reshape(few, prompt_parts, *a.shape[1:]), 1, 0)
    return jnp.repeat(a, group_parts, axis=0)

  cut = jax.tree.map(trajectories, experience.replace(prompt_ids=None, prompt_mask=None))
  return cut.replace(
    prompt_ids=of_prompts(experience.prompt_ids), prompt_mask=of_prompts(experience.prompt_mask)
  )


def _recorded(micro: types.Experience, reading, objective):
  """What the rollout recorded of the images that ratios can be taken against."""
  if not reading.flow:
    return None
  if objective.flow in objective_lib.FORWARD_OBJECTIVES:
    return jnp.zeros_like(micro.flow.x_t)  # a rollout knows no velocities of noised images
  return micro.flow.mean


def _with_reference(
  reference_model, model, state, micro: types.Experience, grid, reading: policy.Reading,
  objective: objective_lib.Objective, own_context: bool,
) -> types.Experience:
  """The experience with the reference's velocities and log-probabilities, where they are needed."""
  wants = dataclasses.replace(
    reading, text=reading.text and objective.text_kl_weight > 0,
    flow=reading.flow and objective.regulariser != "none",
    guidance=dataclasses.replace(reading.guidance, text_scale=1.0),
  )
  params = state.params if state.reference is None else state.reference
  own = dataclasses.replace(wants, flow=wants.flow and own_context)
  said = policy.say(reference_model, params, micro, grid, own)
  if wants.flow and not own_context:
    images = policy.say(
      model, state.params, micro, grid, dataclasses.replace(wants, text=False),
      velocity_params=params, velocity_model=reference_model,
    )
    said = said.replace(velocity=images.velocity)
  return micro.replace(velocity_ref=said.velocity, logp_ref=said.logp)


def _weights(micros: types.Experience, objective, reading) -> dict[str, Any]:
  """Weights of tokens and steps over a whole minibatch, [microbatches, rows, ...]."""
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  valid, shape = flat(micros.valid), micros.valid.shape
  weights = {"text": None, "flow": None}
  if reading.text:
    weights["text"] = text_losses.token_weights(
      flat(micros.text.mask), valid, aggregation=objective.aggregation,
      max_tokens=objective.max_tokens,
    )
  if reading.flow:
    weights["flow"] = flow_losses.step_weights(valid, micros.flow.t.shape[-1])
  return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), weights)


def _summaries(signals: Mapping[str, Any], micros: types.Experience, reading) -> dict[str, Any]:
  """Means, extremes and percentiles over the tokens and steps of a minibatch that count."""
  out = {}
  valid = micros.valid[..., None]
  if reading.text:
    mask = micros.text.mask & valid
    ratio = jnp.exp(signals["text/log_ratio"])
    out |= _ratio("text", ratio, signals["text/clipped"], mask)
    log_ratio = signals["text/log_ratio"]
    out["text/approx_kl"] = _mean(jnp.expm1(log_ratio) - log_ratio, mask)
    out["text/entropy"] = _mean(signals["text/entropy"], mask)
    out |= {name: signals[name].max() for name in ("drift/text", "drift/text_scaled")}
    if "text/kl" in signals:
      out["text/kl_ref"] = _mean(signals["text/kl"], mask)
  if reading.flow:
    mask = jnp.broadcast_to(valid, micros.flow.t.shape)
    if "flow/log_ratio" in signals:
      log_ratio = signals["flow/log_ratio"]
      steps = jnp.broadcast_to(valid, log_ratio.shape)
      # Ratios differ from 1 by less than float32 can show: their logarithms are told instead.
      out |= _ratio("flow", log_ratio, signals["flow/clipped"], steps, name="log_ratio")
    for name in ("flow/mse", "flow/latent_kl"):
      if name in signals:
        out[name] = _mean(signals[name], mask)
    if "drift/flow" in signals:
      out["drift/flow"] = signals["drift/flow"].max()
  return out


def _ratio(kind: str, ratio, clipped, mask, name: str = "ratio") -> dict[str, Any]:
  shown = jnp.where(mask, ratio, jnp.nan)
  size = jnp.abs(shown) if name == "log_ratio" else shown
  some = lambda value: jnp.where(mask.any(), value, 0.0)  # a minibatch may have no valid group
  return {
    f"{kind}/{name}_mean": _mean(ratio, mask),
    f"{kind}/{name}_max": some(jnp.nanmax(size)),
    f"{kind}/{name}_p99": some(jnp.nanpercentile(size, 99)),
    f"{kind}/clip_fraction": _mean(clipped.astype(jnp.float32), mask),
  }


def _mean(values, mask):
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)
