"""What an algorithm is: the experience that it makes of episodes, and the loss of a microbatch.

  J = J_text + lambda J_flow    (UniGRPO eq. 7), one advantage a trajectory for both

J_text is the clipped surrogate of GRPO for all of them; a subclass brings J_flow.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.episodes import replay, sampler, script
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import regularizers
from unigrpo_jax.losses import text as text_losses

REGULARISERS = ("velocity_mse", "latent_kl", "latent_kl_exact", "none")
Signals = dict[str, jax.Array]


@struct.dataclass
class Values:
  """What ratios are taken of: the policy's own values, or those of the policy that sampled."""

  logp: Any = None  # of the sampled tokens, [B, T]
  # Means of the SDE's steps, or velocities for forward processes, [B, W, I, C].
  flow: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextObjective:
  """Numbers of the text's objective; see `losses.text`."""

  aggregation: str
  max_tokens: int
  clip_low: float
  clip_high: float
  dual_clip: float | None
  kl_weight: float
  ratio: str = "token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
  """An algorithm and its numbers; clips and weights are as they are applied."""

  replay: replay.ReplayConfig  # how, and which of text and flow are trained
  text: TextObjective
  flow_weight: float  # lambda
  regulariser: str  # one of REGULARISERS
  regulariser_weight: float
  anchor_weight: float = 0.0  # of the squared distance from the anchor's velocities; 0 for none
  # Parameters of frozen networks that the loss runs: an argument of the update, not of the state.
  fixed: Any = None
  term_norms_every: int = 0  # iterations between norms of the gradients of single terms; 0: never

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    """What episodes, chunks of B trajectories, leave to learn from but for their advantages.

    `prompts` are those of the iteration, of B / P neighbouring trajectories each.
    """
    shared = lambda inputs: (inputs.texts[script.PROMPT], inputs.images.get(script.SOURCE))
    return join([(*shared(e.inputs), e.text, e.flow) for e in episodes])

  def weights(self, micros: types.Experience) -> dict[str, Any]:
    """Weights of tokens and steps over a whole minibatch, [microbatches, rows, ...]."""
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    valid, shape = flat(micros.valid), micros.valid.shape
    weights = {"text": None, "flow": None}
    if self.replay.text:
      weights["text"] = text_losses.token_weights(
        flat(micros.only.text.mask), valid, aggregation=self.text.aggregation,
        max_tokens=self.text.max_tokens,
      )
    if self.replay.flow:
      weights["flow"] = flow_losses.step_weights(valid, micros.only.flow.t.shape[-1])
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), weights)

  def recorded(self, micro: types.Experience) -> Values:
    """What the sampler recorded of the values that ratios are taken of."""
    text, flow = micro.only.text, micro.only.flow
    return Values(
      logp=text.logp if self.replay.text else None,
      flow=self._recorded_flow(flow) if self.replay.flow else None,
    )

  def values(self, output: replay.PolicyOutput, micro: types.Experience) -> Values:
    """A policy's own values that ratios are taken of."""
    guided, flow = output.guided, micro.only.flow
    return Values(output.logp, None if guided is None else self._flow_values(guided, flow))

  def loss(
    self, output: replay.PolicyOutput, micro: types.Experience, old: Values,
    weights: dict[str, Any], grid: types.LatentGrid, is_first_epoch: jax.Array | None,
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Values, Signals]]:
    """The loss of a microbatch of B trajectories, as its share of the whole batch's.

    Args:
      old: values of the policy that sampled.
      weights: see `weights`; [B, T] and [B, W].
      grid: of one image.
      is_first_epoch: [] bool: the policy's own values take the place of `old`, so that every ratio
        is exactly 1; None: never.

    Returns:
      (loss, (terms of the loss, the policy's own values, signals of each token and step)).
    """
    terms, signals = {}, {}
    new = jax.lax.stop_gradient(self.values(output, micro))
    if is_first_epoch is not None:
      old = jax.tree.map(lambda new, old: jnp.where(is_first_epoch, new, old), new, old)
    text_loss = flow_loss = jnp.zeros(())
    if output.logp is not None:
      text_loss, metrics = self._text_loss(output, old.logp, micro, weights["text"])
      signals |= metrics
      terms["text"] = text_loss
    if output.guided is not None:
      mask = grid.mask[:, None]
      flow_loss, metrics = self._flow_loss(
        output.guided, old.flow, micro, weights["flow"], mask
      )
      signals |= metrics
      terms["flow"] = flow_loss
      penalty = self._penalty(output.velocity, micro, mask)
      if penalty is not None:
        # How far the policy is from its reference, whatever holds it back.
        signals["flow/mse"] = regularizers.velocity_mse(
          output.velocity, micro.only.velocity_ref, mask
        )
        if self.regulariser != "velocity_mse":
          signals["flow/latent_kl"] = penalty
        terms["regulariser"] = self.regulariser_weight * jnp.sum(weights["flow"] * penalty)
        flow_loss += terms["regulariser"]
      if micro.only.velocity_anchor is not None:
        apart = regularizers.velocity_mse(output.velocity, micro.only.velocity_anchor, mask)
        signals["flow/anchor_mse"] = apart
        terms["anchor"] = self.anchor_weight * jnp.sum(weights["flow"] * apart)
        flow_loss += terms["anchor"]
    loss = text_loss + self.flow_weight * flow_loss
    terms["total"] = loss
    return loss, (terms, new, jax.lax.stop_gradient(signals))

  def _text_loss(self, output, logp_old, micro: types.Experience, weights):
    sampled = micro.only.text
    loss, metrics = text_losses.policy_loss(
      output.logp, logp_old, micro.adv, weights, clip_low=self.text.clip_low,
      clip_high=self.text.clip_high, dual_clip=self.text.dual_clip, ratio=self.text.ratio,
      logp_ref=micro.only.logp_ref, kl_weight=self.text.kl_weight,
    )
    drift = jnp.abs(jnp.where(sampled.mask, output.logp - sampled.logp, 0.0))
    signals = {f"text/{name}": value for name, value in metrics.items()}
    # A log-probability is a difference of logits, whose rounding grows with them.
    scaled = drift / jnp.maximum(jnp.abs(sampled.logp), 1.0)
    signals |= {"text/entropy": output.entropy, "drift/text": drift, "drift/text_scaled": scaled}
    return loss, signals

  def _penalty(self, velocity, micro: types.Experience, mask):
    """Distance from the reference at each step, [B, W], or None."""
    reference = micro.only.velocity_ref
    if self.regulariser == "none" or reference is None:
      return None
    if self.regulariser == "velocity_mse":
      return regularizers.velocity_mse(velocity, reference, mask)
    return self._latent_kl(velocity, reference, micro.only.flow, mask)

  @abc.abstractmethod
  def _recorded_flow(self, flow: types.FlowRollout):
    """The flow's part of `recorded`, [B, W, I, C]."""

  @abc.abstractmethod
  def _flow_values(self, velocity, flow: types.FlowRollout):
    """The flow's part of `values`, [B, W, I, C], of a policy's velocities with guidance."""

  @abc.abstractmethod
  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    """The objective of the images: (loss, signals of each step).

    Args:
      velocity: of the policy, with guidance, [B, W, I, C].
      old: what ratios are taken of, [B, W, I, C].
      weights: of the steps, [B, W].
      mask: latent tokens that count, [1, 1, I].
    """

  def _latent_kl(self, velocity, reference, flow: types.FlowRollout, mask):
    raise ValueError(f"{type(self).__name__} has no steps with noise for {self.regulariser}")


@jax.jit
def join(parts) -> types.Experience:
  """Chunks of (prompt, source, text, flow), one after the other, as one experience."""
  prompt, source, text, flow = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
  return types.Experience(prompt, source, (types.Round(text, flow),))
