"""Replaying an experience: one differentiable pass of a policy over its trajectories.

It follows the script that the sampler followed; what a group shares is read once for its
trajectories. The policy, the reference and recomputed old values all come from here, so they cannot
differ.
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
from unigrpo_jax.sampling import direct, flow

# Which parameters the flow objective moves, besides the generation expert's.
ROUTINGS = ("expert", "markers", "full")


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
  """How an experience is replayed; all of it static."""

  script: script_lib.Script  # of the trajectories, of one round
  system_ids: tuple[int, ...]  # of the system prompt; () where the script has none
  start_id: int  # the tokens around a reasoning
  end_id: int
  temperature: float  # that the tokens were sampled at
  chunk: int  # tokens of a reasoning whose logits exist at once
  text: bool  # what is wanted
  flow: bool
  guidance: flow.Guidance  # of the velocities; a text_scale of 1 is none
  # Where gradients of the flow go. "expert": the generation expert alone, the context is constant
  # and so is what the understanding expert adds to the image's two markers; "markers": not to the
  # context; "full": wherever the value came from.
  routing: str
  # Of the steps from the recorded one on, where all of them are differentiated; () for none.
  last_times: tuple[float, ...] = ()


@struct.dataclass
class PolicyOutput:
  """What a policy computes for B trajectories."""

  logp: Any = None  # of each sampled token, [B, T] float32, 0 beyond the end
  entropy: Any = None  # likewise
  velocity: Any = None  # without guidance, at each recorded step, [B, W, I, C] float32
  # With it; the same where there is none. With `last_times` the mean velocity from the recorded
  # step to the image, (x_t - x_0) / t.
  guided: Any = None


def replay(
  model: bagel_lib.Bagel, params, experience: types.Experience, grid: types.LatentGrid,
  config: ReplayConfig, velocity_params=None, velocity_model=None,
) -> PolicyOutput:
  """Runs a policy over the B trajectories of `experience`, of one round; `grid` is of one image.

  `velocity_params` and `velocity_model` are for the images alone, over the context of `params`;
  None: the same.
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
  """What trajectories of a prompt share: (context of P rows, the moment before the prompt)."""
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
      # Texts before it in the same read have no padding.
      length = sum(ids.shape[1] for ids, _ in texts)
      before_prompt = types.Mark(position + length, place + length)
      texts.append((experience.prompt.ids, experience.prompt.mask))
  return read_texts(), before_prompt


def _look(model, params, context, image: types.Seen, segment: script_lib.Seen) -> types.Context:
  """Reads an image after `context`, or first."""
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
  """A reasoning exactly as it was fed while sampling: ids [B, T + 2] int32, mask [B, T + 2] bool.

  The hidden state at place i predicts sampled token i.
  """
  end = jnp.full_like(sampled.ids[:, :1], config.end_id)
  ids = [jnp.full_like(end, config.start_id), sampled.ids, end]
  # A reasoning that was cut is closed all the same.
  masks = [jnp.ones_like(end, bool), sampled.mask, ~sampled.finished[:, None]]
  return jnp.concatenate(ids, axis=1), jnp.concatenate(masks, axis=1)


def constant_understanding(params: Mapping[str, Any]):
  """`params` with no gradient to the understanding expert, nor to the markers it embeds."""
  def stop(path, leaf):
    keys = [entry.key for entry in path]
    constant = keys[0] == "embed_tokens" or (keys[0] in ("layers", "norm") and keys[1] == "und")
    return jax.lax.stop_gradient(leaf) if constant else leaf

  return jax.tree_util.tree_map_with_path(stop, params)
