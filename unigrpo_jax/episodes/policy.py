"""What a policy says about an experience: one forward pass over its trajectories.

A prompt is read once for its trajectories, [system] prompt; each reads its reasoning over that,
whose hidden states give its log-probabilities; and the recorded steps of its image run as rows over
the same context. Training, the reference and recomputed old values all come from here, so they
cannot differ.
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
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.sampling import flow

# Which parameters the flow objective moves, besides the generation expert's.
ROUTINGS = ("expert", "markers", "full")


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a policy reads an experience; all of it static.

  Attributes:
    system_ids: of the system prompt, or None.
    start_id, end_id: the tokens around a reasoning.
    temperature: that the tokens were sampled at.
    chunk: tokens of a reasoning whose logits exist at once.
    text, flow: what is wanted.
    guidance: of the velocities; a text_scale of 1 is none.
    routing: where gradients of the flow go. "expert": the generation expert alone, the context is
      constant and so is what the understanding expert adds to the image's two markers; "markers":
      not to the context; "full": wherever the value came from.
  """

  system_ids: tuple[int, ...] | None
  start_id: int
  end_id: int
  temperature: float
  chunk: int
  text: bool
  flow: bool
  guidance: flow.Guidance
  routing: str


@struct.dataclass
class Said:
  """What a policy says about B trajectories.

  Attributes:
    logp, entropy: of each sampled token, [B, T] float32, 0 beyond the end; or None.
    velocity: without guidance, at each recorded step, [B, W, I, C] float32; or None.
    guided: with it, which is the same without guidance.
  """

  logp: Any = None
  entropy: Any = None
  velocity: Any = None
  guided: Any = None


def say(
  model: bagel_lib.Bagel, params, experience: types.Experience, grid: types.LatentGrid,
  reading: Reading, velocity_params=None, velocity_model=None,
) -> Said:
  """Runs the policy over the trajectories of `experience`.

  Args:
    model: the network.
    params: its parameters.
    experience: B trajectories.
    grid: of one image, [1, I].
    reading: what is wanted and how.
    velocity_params, velocity_model: for the images alone, over the context of `params`; None: the
      same.
  """
  read = functools.partial(model.apply, {"params": params}, method="read_text")
  context, _ = read(*prompt_tokens(experience, reading))
  if experience.text is not None:
    context, hidden = read(*reasoning_tokens(experience.text, reading), context)
  said = Said()
  if reading.text:
    rollout = experience.text
    count = rollout.ids.shape[1]
    logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
    logp, entropy = text_losses.token_logprobs(
      logits, hidden[:, :count], rollout.ids, rollout.mask,
      temperature=reading.temperature, chunk=reading.chunk,
    )
    said = said.replace(logp=logp, entropy=entropy)
  if not reading.flow:
    return said
  own = params if velocity_params is None else velocity_params
  network = model if velocity_model is None else velocity_model
  if reading.routing != "full":
    context = jax.lax.stop_gradient(context)
  if reading.routing == "expert":
    own = constant_understanding(own)
  x_t, t = experience.flow.x_t, experience.flow.t
  rows, steps = t.shape
  images = lambda a: jnp.broadcast_to(a, (rows * steps, *a.shape[1:]))
  grid = jax.tree.map(images, grid)
  flat = lambda a: a.reshape(rows * steps, *a.shape[2:])

  def velocity(context):
    v = network.apply(
      {"params": own}, context, flat(x_t), flat(t), grid, method="velocity"
    )
    return v.reshape(x_t.shape)

  v = velocity(context)
  return said.replace(velocity=v, guided=_guide(velocity, v, context, flat(t), reading))


def _guide(velocity, v, context: types.Context, t, reading: Reading):
  """Guides v [B, W, I, C] at times t [B * W] against the context before the prompt."""
  g = reading.guidance
  if g.text_scale <= 1:
    return v
  system = len(reading.system_ids or ())
  before = types.Mark(jnp.full_like(context.position, system), jnp.int32(system))
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  guided = flow.guide(flat(v), flat(velocity(context.as_of(before))), None, g)
  low, high = g.interval
  inside = ((t > low) & (t <= high))[:, None, None]
  return jnp.where(inside, guided, flat(v)).reshape(v.shape)


def prompt_tokens(experience: types.Experience, reading: Reading):
  """What the trajectories of a prompt read together: ids [P, S] int32, mask [P, S] bool."""
  ids, mask = experience.prompt_ids, experience.prompt_mask
  if reading.system_ids is None:
    return ids, mask
  shape = (ids.shape[0], len(reading.system_ids))
  system = jnp.broadcast_to(jnp.array(reading.system_ids, jnp.int32), shape)
  joined = jnp.concatenate([system, ids], axis=1)
  return joined, jnp.concatenate([jnp.ones(shape, bool), mask], axis=1)


def reasoning_tokens(rollout: types.TextRollout, reading: Reading):
  """A reasoning exactly as it was fed while sampling: ids [B, T + 2] int32, mask [B, T + 2] bool.

  The hidden state at place i predicts sampled token i.
  """
  end = jnp.full_like(rollout.ids[:, :1], reading.end_id)
  ids = [jnp.full_like(end, reading.start_id), rollout.ids, end]
  # A reasoning that was cut is closed all the same.
  masks = [jnp.ones_like(end, bool), rollout.mask, ~rollout.finished[:, None]]
  return jnp.concatenate(ids, axis=1), jnp.concatenate(masks, axis=1)


def constant_understanding(params: Mapping[str, Any]):
  """`params` with no gradient to the understanding expert, nor to the markers it embeds."""
  def stop(path, leaf):
    keys = [entry.key for entry in path]
    mine = keys[0] == "embed_tokens" or (keys[0] in ("layers", "norm") and keys[1] == "und")
    return jax.lax.stop_gradient(leaf) if mine else leaf

  return jax.tree_util.tree_map_with_path(stop, params)
