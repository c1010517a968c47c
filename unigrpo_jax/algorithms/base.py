"""The interface of an algorithm: it turns episodes into an experience, and defines its loss.

  J = J_text + lambda J_flow    (UniGRPO eq. 7), with one advantage per trajectory for both terms

J_text is the clipped surrogate of GRPO for every algorithm; a subclass defines J_flow.
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
# {metric: its value at each token [B, T] or step [B, W]}; summarised over a minibatch for the log.
Signals = dict[str, jax.Array]


@struct.dataclass
class Values:
  """One policy's side of an importance ratio; the new and the old policy have one of these each.

  A field is None where that modality is not trained.
  """

  logp: Any = None  # log-probabilities of the sampled tokens, [B, T] float32
  # Means of the SDE's steps, or velocities for forward processes, [B, W, I, C] float32.
  flow: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextObjective:
  """Hyper-parameters of the text objective; see `losses.text`."""

  aggregation: str  # how tokens are weighted; see `losses.text.token_weights`
  max_tokens: int  # length limit of a reasoning, which some aggregations divide by
  clip_low: float  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
  clip_high: float
  dual_clip: float | None  # bound on the loss where the advantage is negative; None: no bound
  kl_weight: float  # of the KL divergence from the reference; 0: not computed
  ratio: str = "token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
  """An algorithm with its hyper-parameters; clips and weights are final, already rescaled."""

  replay: replay.ReplayConfig  # how trajectories are replayed, and which of text and flow train
  text: TextObjective
  flow_weight: float  # lambda
  regulariser: str  # one of REGULARISERS
  regulariser_weight: float
  anchor_weight: float = 0.0  # of the squared distance from the anchor's velocities; 0 for none
  # Parameters of frozen networks that the loss evaluates, such as a reward model. They are an
  # argument of the update and no part of the training state.
  fixed: Any = None
  term_norms_every: int = 0  # iterations between logs of each loss term's gradient norm; 0: never

  def experience(
    self, episodes: Sequence[sampler.Episode], prompts: Sequence[Any], key
  ) -> types.Experience:
    """Joins the episodes of an iteration into one experience, without advantages yet.

    Args:
      episodes: chunks of the iteration's B trajectories, in order.
      prompts: the iteration's P prompts; each has B / P consecutive trajectories.
      key: the iteration's PRNG key, for algorithms that draw noise of their own.
    """
    shared = lambda inputs: (inputs.texts[script.PROMPT], inputs.images.get(script.SOURCE))
    return join([(*shared(e.inputs), e.text, e.flow) for e in episodes])

  def weights(self, micros: types.Experience) -> dict[str, Any]:
    """Weights of tokens and steps, computed over a whole minibatch so that microbatches add up.

    Args:
      micros: a minibatch with a leading axis of microbatches, [M, rows, ...].

    Returns:
      {"text": [M, rows, T], "flow": [M, rows, W]} float32; None for a modality that does not train.
    """
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
    """The sampling policy's `Values` as the sampler recorded them."""
    text, flow = micro.only.text, micro.only.flow
    return Values(
      logp=text.logp if self.replay.text else None,
      flow=self._recorded_flow(flow) if self.replay.flow else None,
    )

  def values(self, output: replay.PolicyOutput, micro: types.Experience) -> Values:
    """A policy's `Values`, from its replay of the same trajectories."""
    guided, flow = output.guided, micro.only.flow
    return Values(output.logp, None if guided is None else self._flow_values(guided, flow))

  def loss(
    self, output: replay.PolicyOutput, micro: types.Experience, old: Values,
    weights: dict[str, Any], grid: types.LatentGrid, is_first_epoch: jax.Array | None,
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Values, Signals]]:
    """The loss of a microbatch of B trajectories: its share of the minibatch's loss.

    Args:
      output: the policy's replay of the trajectories.
      micro: the trajectories, with their advantages.
      old: values of the policy that sampled.
      weights: of the microbatch, [B, T] and [B, W]; see `weights`.
      grid: latent grid of one image, [1, I].
      is_first_epoch: [] bool. Where True, the policy's own values (without gradient) replace
        `old`, so that every ratio is exactly 1. None: `old` is always used.

    Returns:
      (loss, (terms of the loss by name, the policy's own values, `Signals`)).
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
        # The distance from the reference in one unit for all regularisers.
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
    # A log-probability is a difference of logits, so its rounding error grows with their size.
    scaled = drift / jnp.maximum(jnp.abs(sampled.logp), 1.0)
    signals |= {"text/entropy": output.entropy, "drift/text": drift, "drift/text_scaled": scaled}
    return loss, signals

  def _penalty(self, velocity, micro: types.Experience, mask):
    """Regulariser: the distance from the reference at each step, [B, W]; None without one."""
    reference = micro.only.velocity_ref
    if self.regulariser == "none" or reference is None:
      return None
    if self.regulariser == "velocity_mse":
      return regularizers.velocity_mse(velocity, reference, mask)
    return self._latent_kl(velocity, reference, micro.only.flow, mask)

  @abc.abstractmethod
  def _recorded_flow(self, flow: types.FlowRollout):
    """`Values.flow` of the sampling policy, as recorded: [B, W, I, C] float32, or None."""

  @abc.abstractmethod
  def _flow_values(self, velocity, flow: types.FlowRollout):
    """`Values.flow` of a policy, from its guided velocities [B, W, I, C]: the same shape, or None.
    """

  @abc.abstractmethod
  def _flow_loss(self, velocity, old, micro: types.Experience, weights, mask):
    """J_flow with its sign turned: (loss [] float32, signals of each step).

    Args:
      velocity: the policy's, with guidance, [B, W, I, C].
      old: the sampling policy's `Values.flow`, [B, W, I, C].
      micro: the trajectories, with their advantages.
      weights: of the steps, [B, W].
      mask: latent tokens that count, [1, 1, I].
    """

  def _latent_kl(self, velocity, reference, flow: types.FlowRollout, mask):
    """The KL divergence of each step's transition from the reference's, [B, W]."""
    raise ValueError(f"{type(self).__name__} has no steps with noise for {self.regulariser}")


@jax.jit
def join(parts) -> types.Experience:
  """Concatenates chunks (prompt, source, text, flow) along their rows into one experience."""
  prompt, source, text, flow = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
  return types.Experience(prompt, source, (types.Round(text, flow),))
