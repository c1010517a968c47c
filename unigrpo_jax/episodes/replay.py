"""Replaying an experience: one differentiable pass of a policy over its trajectories.

It follows the same script as the sampler, and reads what a group shares once. The policy, the
reference and recomputed old values are all computed here, so they cannot differ in anything but
their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.models import layers
from unigrpo_jax.sampling import direct, flow

# Where gradients of the flow objective go; see `ReplayConfig.routing`.
ROUTINGS = ("expert", "markers", "full")


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
  """How an experience is replayed; all of it static."""

  script: script_lib.Script  # of a trajectory of one round
  system_ids: tuple[int, ...]  # tokens of the system prompt; () where the script has none
  start_id: int  # the tokens around a reasoning
  end_id: int
  temperature: float  # at which the tokens were sampled
  chunk: int  # tokens of a reasoning whose logits are in memory at once
  text: bool  # compute log-probabilities of the sampled text
  flow: bool  # compute velocities at the recorded steps
  guidance: flow.Guidance  # of the velocities; there is none where text_scale is 1
  # Where gradients of the flow objective go. "expert": to the generation expert alone; the context
  # is constant, and so is the understanding expert's part in the image's two markers. "markers": to
  # both experts' parts in the image, but not to the context. "full": everywhere.
  routing: str
  # DRaFT-K: the times from the recorded step to the image, through which gradients flow; else ().
  last_times: tuple[float, ...] = ()


@struct.dataclass
class PolicyOutput:
  """What a policy computes for B trajectories; None for what the config does not ask for."""

  logp: Any = None  # of each sampled token, [B, T] float32, 0 beyond the end
  entropy: Any = None  # of each token's distribution, nats, likewise
  velocity: Any = None  # without guidance, at each recorded step, [B, W, I, C] float32
  # With guidance; equal to `velocity` where there is none. With `last_times` the mean velocity from
  # the recorded step to the image, (x_t - x_0) / t.
  guided: Any = None


def replay(
  model: bagel_lib.Bagel, params, experience: types.Experience, grid: types.LatentGrid,
  config: ReplayConfig, velocity_params=None, velocity_model=None,
) -> PolicyOutput:
  """Runs a policy over the B trajectories of `experience`, which has one round.

  Args:
    model, params: the policy.
    experience: the trajectories.
    grid: latent grid of one image, [1, I].
    config: what is computed, and how.
    velocity_params, velocity_model: another policy that computes the velocities, over the context
      that `model` and `params` read; None: the same one.
  """
  read = functools.partial(model.apply, {"params": params}, method="read_text")
  context, before_prompt = read_shared(model, params, experience, config)
  output = PolicyOutput()
  for segment in config.script.own:
    if isinstance(segment, script_lib.Sampled):
      sampled = experience.only.text
      context, hidden = read(*reasoning_tokens(sampled, config), context)
      if config.text:
        logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
        logp, entropy = text_losses.token_logprobs(
          logits, hidden[:, : sampled.ids.shape[1]], sampled.ids, sampled.mask,
          temperature=config.temperature, chunk=config.chunk,
        )
        output = output.replace(logp=logp, entropy=entropy)
    elif config.flow:
      velocity, guided = _velocities(
        velocity_model or model, params if velocity_params is None else velocity_params,
        context, before_prompt, experience.only.flow, grid, config,
      )
      output = output.replace(velocity=velocity, guided=guided)
  return output


def read_shared(
  model: bagel_lib.Bagel, params, experience: types.Experience, config: ReplayConfig
) -> tuple[types.Context, types.Mark]:
  """Reads the segments that trajectories of a prompt share.

  Returns:
    (context of P rows; the moment before the prompt, for guidance).
  """
  run = functools.partial(model.apply, {"params": params})
  prompts = experience.prompt.ids.shape[0]
  position, place = jnp.zeros(prompts, jnp.int32), jnp.int32(0)
  context, texts, before_prompt = None, [], None

  def read_texts():
    ids, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*texts))
    texts.clear()
    return run(ids, mask, context, method="read_text")[0]

  for segment in config.script.shared:
    if isinstance(segment, script_lib.Seen):
      context = read_texts() if texts else context
      context = _look(model, params, context, experience.source, segment)
      position, place = context.position, context.place
      continue
    if segment.name == script_lib.SYSTEM:
      shape = (prompts, len(config.system_ids))
      ids = jnp.broadcast_to(jnp.array(config.system_ids, jnp.int32), shape)
      texts.append((ids, jnp.ones(shape, bool)))
    else:
      # Only the system prompt may precede it in the same read, and that has no padding.
      length = sum(ids.shape[1] for ids, _ in texts)
      before_prompt = types.Mark(position + length, place + length)
      texts.append((experience.prompt.ids, experience.prompt.mask))
  return read_texts(), before_prompt


def _look(model, params, context, image: types.Seen, segment: script_lib.Seen) -> types.Context:
  """Reads an image after `context`; None: into a new context."""
  run = functools.partial(model.apply, {"params": params})
  wanted = ((image.grid, segment.latents), (image.patches, segment.patches))
  parts = [part for part, reads in wanted if reads]
  rows, room = parts[0].mask.shape[0], sum(part.mask.shape[1] + 2 for part in parts)
  if context is None:
    context = bagel_lib.empty_context(model.config, rows, room, model.dtype)
  else:
    context = bagel_lib.fork(model.config, context, 1, room)
  if segment.latents:
    context = run(context, image.latents, image.grid, method="append_latents")
  if segment.patches:
    context = run(context, image.patches, method="append_patches")
  return context


def _velocities(
  model, params, context: types.Context, before_prompt: types.Mark, drawn: types.FlowRollout, grid,
  config: ReplayConfig,
):
  """Velocities at the recorded steps, [B, W, I, C]: (without guidance, with it)."""
  if config.routing != "full":
    context = jax.lax.stop_gradient(context)
  if config.routing == "expert":
    params = constant_understanding(params)
  rows, steps = drawn.t.shape
  images = lambda a: jnp.broadcast_to(a, (rows * steps, *a.shape[1:]))
  grid = jax.tree.map(images, grid)
  flat = lambda a: a.reshape(rows * steps, *a.shape[2:])
  t = flat(drawn.t)

  def velocity(context):
    v = model.apply({"params": params}, context, flat(drawn.x_t), t, grid, method="velocity")
    return v.reshape(drawn.x_t.shape)

  v, g = velocity(context), config.guidance
  if config.last_times:
    def at(x, t):
      t = jnp.full(len(x), t)
      return model.apply({"params": params}, context, x, t, grid, method="velocity")

    x_0 = direct.finish(at, flat(drawn.x_t), jnp.array(config.last_times, jnp.float32))
    return v, (drawn.x_t - x_0.reshape(v.shape)) / drawn.t[..., None, None]
  if g.text_scale <= 1:
    return v, v
  position = jnp.repeat(before_prompt.position, rows // before_prompt.position.shape[0])
  without_prompt = context.as_of(before_prompt.replace(position=position))
  guided = flow.guide(flat(v), flat(velocity(without_prompt)), None, g)
  low, high = g.interval
  guided = jnp.where(((t > low) & (t <= high))[:, None, None], guided, flat(v))
  return v, guided.reshape(v.shape)


def reasoning_tokens(sampled: types.TextRollout, config: ReplayConfig):
  """Reasonings as the network read them while sampling: ids [B, T + 2] int32, mask [B, T + 2] bool.

  The hidden state at position i predicts sampled token i.
  """
  end = jnp.full_like(sampled.ids[:, :1], config.end_id)
  ids = [jnp.full_like(end, config.start_id), sampled.ids, end]
  # A reasoning that was cut at its length limit gets the end token that it lacks.
  masks = [jnp.ones_like(end, bool), sampled.mask, ~sampled.finished[:, None]]
  return jnp.concatenate(ids, axis=1), jnp.concatenate(masks, axis=1)


def constant_understanding(params: Mapping[str, Any]):
  """`params` with gradients stopped at the understanding expert and at the token embeddings."""
  def stop(path, leaf):
    keys = layers.path_keys(path)
    constant = keys[0] == "embed_tokens" or (keys[0] in ("layers", "norm") and keys[1] == "und")
    return jax.lax.stop_gradient(leaf) if constant else leaf

  return jax.tree_util.tree_map_with_path(stop, params)
