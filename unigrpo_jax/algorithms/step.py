"""One optimizer step: losses composed over microbatches, gradients applied, health measured."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unigrpo_jax import types
from unigrpo_jax.losses import supervised
from unigrpo_jax.runtime import optim

LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


def supervised_loss(
  model, params, batch: types.PackedBatch, share: dict[str, jax.Array], *,
  ce_weight: float, mse_weight: float, label_chunk: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """ce_weight CE + mse_weight MSE of one microbatch, as its share of the whole batch's means.

  Args:
    model: the `Bagel`.
    params: its parameters.
    batch: the microbatch.
    share: {"labels", "latents"}: the part of all label weight, and of all latent tokens that
      count, that lies in this microbatch; so that the losses of the microbatches add up.
    ce_weight, mse_weight: of the two terms.
    label_chunk: labels a row whose logits exist at once.
  """
  hidden, velocity = model.apply({"params": params}, batch, method="packed")
  logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
  ce, _ = supervised.cross_entropy(
    logits, hidden, batch.label_ids, batch.label_weight, chunk=label_chunk
  )
  ce = ce * share["labels"]
  mse = jnp.zeros(())
  if velocity is not None:
    mse, _ = supervised.velocity_mse(velocity, batch.target, batch.noise, batch.noisy_mask)
    mse = mse * share["latents"]
  return ce_weight * ce + mse_weight * mse, {"ce": ce, "mse": mse}


def shares(batches: types.PackedBatch) -> dict[str, jax.Array]:
  """What part of the labels and of the latent tokens each microbatch holds, [microbatches] each."""
  part = lambda counts: counts / jnp.maximum(counts.sum(), 1e-8)
  by_microbatch = lambda a: a.astype(jnp.float32).sum(axis=tuple(range(1, a.ndim)))
  labels = part(by_microbatch(batches.label_weight))
  masks = batches.noisy_mask
  return {
    "labels": labels,
    "latents": jnp.zeros_like(labels) if masks is None else part(by_microbatch(masks)),
  }


def make_supervised_step(
  model, optimizer: optax.GradientTransformation, *, ema_decay: float | None, **weights
):
  """The step of supervised training, to be jitted.

  Args:
    model: the `Bagel`.
    optimizer: see `optim.adamw_by_group`.
    ema_decay: of the moving average; None for none.
    weights: keywords of `supervised_loss`.

  Returns:
    (state, batches) -> (state, metrics); `batches` is a PackedBatch with a leading axis of
    microbatches.
  """
  loss_fn = functools.partial(supervised_loss, model, **weights)

  def step(state: types.TrainState, batches: types.PackedBatch):
    def accumulate(carry, inputs):
      grads, metrics = carry
      microbatch, share = inputs
      new_grads, new = jax.grad(loss_fn, has_aux=True)(state.params, microbatch, share)
      return jax.tree.map(jnp.add, (grads, metrics), (new_grads, new)), None

    zero = jax.tree.map(jnp.zeros_like, state.params)
    start = (zero, {"ce": jnp.zeros(()), "mse": jnp.zeros(())})
    with jax.named_scope("loss"):
      (grads, metrics), _ = jax.lax.scan(accumulate, start, (batches, shares(batches)))
    return apply_gradients(state, grads, optimizer, ema_decay=ema_decay, metrics=metrics)

  return step


def apply_gradients(
  state: types.TrainState, grads, optimizer: optax.GradientTransformation, *,
  ema_decay: float | None, metrics: dict[str, jax.Array],
) -> tuple[types.TrainState, dict[str, jax.Array]]:
  """The optimizer's step and the moving average's; adds the gradient norm of each group."""
  with jax.named_scope("update"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
      ema = optim.periodic_ema(ema, params, state.step, decay=ema_decay, every=1)
  norms = {f"grad_norm_{group}": norm for group, norm in optim.group_norms(grads).items()}
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
  return state, metrics | norms
