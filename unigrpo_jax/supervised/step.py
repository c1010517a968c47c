"""One step of supervised training: the losses of packed microbatches."""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

from unigrpo_jax import types
from unigrpo_jax.algorithms import update
from unigrpo_jax.losses import supervised
from unigrpo_jax.runtime import optim


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
  model, optimizer: optax.GradientTransformation, *, trained: Collection[str],
  ema_decay: float | None, loss: Callable = supervised_loss, **weights,
):
  """The step of supervised training, to be jitted.

  Args:
    model: the `Bagel`.
    optimizer: see `optim.adamw_by_group`.
    trained: groups of parameters that are.
    ema_decay: of the moving average; None for none.
    loss: (model, params, batch, share, **weights) -> (its share of the loss, of the metrics).
    weights: keywords of `loss`.

  Returns:
    (state, batches) -> (state, metrics); `batches` is a PackedBatch with a leading axis of
    microbatches.
  """
  learning = model.for_gradients()

  def loss_fn(trained_params, frozen, batch, share):
    params = optim.join(trained_params, frozen)
    return loss(learning, params, batch, share, **weights)

  def step(state: types.TrainState, batches: types.PackedBatch):
    grads, terms = update.accumulate(
      loss_fn, *optim.split(learning.unstacked(state.params), trained), (batches, shares(batches))
    )
    state, norms = update.apply_gradients(
      state, learning.stacked(grads), optimizer, ema_decay=ema_decay, trained=trained
    )
    return state, {name: values.sum() for name, values in terms.items()} | norms

  return step
