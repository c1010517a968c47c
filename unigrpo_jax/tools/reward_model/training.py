"""The stage train: a BAGEL learns to answer whether a picture shows a prompt."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import finetune, types
from unigrpo_jax.recipe import sft
from unigrpo_jax.reward_models import learned, readout
from unigrpo_jax.runtime import state
from unigrpo_jax.supervised import corpus

VOCABULARY_WEIGHT = 0.1  # weight of the first token's cross entropy over the whole vocabulary


def answer_loss(
  model, params, batch: types.PackedBatch, share: dict[str, jax.Array], *, yes_id: int, no_id: int,
  vocabulary_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of answers "yes" and "no": a microbatch's share of the whole batch's mean.

    L = -log sigmoid(s z) + vocabulary_weight ce_1 + sum_(k > 1) ce_k,   z = l_yes - l_no

  s is 1 for "yes" and -1 for "no". ce_k is the cross entropy, over the whole vocabulary, of the
  answer's k-th token, including its terminator.

  Args:
    model, params: the network.
    batch: of sequences with one answer each.
    share: see `step.supervised_loss`; the weights of an answer's labels add up to 1.
    yes_id, no_id: first tokens of the answers.
    vocabulary_weight: see above.

  Returns:
    (loss [], {"two_token", "accuracy", "ce": their shares of the batch's means}).
  """
  hidden, _ = model.apply({"params": params}, batch, method="packed")
  logits = model.apply({"params": params}, hidden, method="logits")  # [B, Y, V]
  picked = jnp.take_along_axis(logits, batch.label_ids[..., None], axis=-1)[..., 0]
  ce = jnp.where(batch.label_weight > 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
  z = readout.margin(logits[:, 0], yes_id=yes_id, no_id=no_id)
  signed = jnp.where(batch.label_ids[:, 0] == yes_id, z, -z)
  real = batch.label_weight[:, 0] > 0
  scale = share["labels"] / jnp.maximum(real.sum(), 1)
  mean = lambda values: scale * jnp.where(real, values, 0).sum()
  two_token = -jax.nn.log_sigmoid(signed)
  loss = mean(two_token + vocabulary_weight * ce[:, 0] + ce[:, 1:].sum(axis=1))
  return loss, {
    "two_token": mean(two_token), "accuracy": mean(signed > 0), "ce": mean(ce.sum(axis=1)),
  }


def train(
  config, workdir: pathlib.Path, examples: corpus.Corpus, *, vit_max: int | None,
  pinned: Mapping[str, Any],
) -> types.TrainState:
  """Trains the network on questions and answers; see `finetune.learn`.

  Args:
    config: see the reward model's variants of `configs/sft.py`.
    workdir: of the run's checkpoints and metrics.
    examples: their texts are "yes" and "no".
    vit_max: longest side of the ViT's input, in pixels; None: the checkpoint's.
    pinned: further values that must be the same when the run is resumed.
  """
  spec = sft.read(config)
  network = state.open_network(spec.network)
  sft.check_fits(spec, network)
  yes_id, no_id = learned.answer_ids(network.tokenizer)
  if vit_max is not None:
    network = _seeing(network, vit_max)
  run = dataclasses.replace(spec.run, shown=("two_token", "accuracy", "ce"))
  return finetune.learn(
    dataclasses.replace(spec, run=run), workdir, network, examples, pinned=pinned,
    loss=answer_loss, yes_id=yes_id, no_id=no_id, vocabulary_weight=VOCABULARY_WEIGHT,
  )


def _seeing(network: state.Network, vit_max: int) -> state.Network:
  """The network with another longest side of its ViT's input."""
  config = network.config
  config = dataclasses.replace(config, vit_image=learned.vit_rule(config, vit_max))
  return dataclasses.replace(network, folder=dataclasses.replace(network.folder, config=config))
