"""The device programs that every use of BAGEL is made of: read, write, draw, encode, decode.

Each is one jitted function of parameters and arrays. A row reads, in this order, what its mode
asks for:

  S  the system prompt, when it thinks
  V  its image through the VAE, when it edits
  T  its image through the ViT
  P  its prompt
  K  the reasoning it writes itself

and the image is drawn from S V T P K. Guidance compares with the context before the prompt
(S V T: the same cache as of an earlier moment) and with one that never saw an image (S P).
"""

from __future__ import annotations

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.sampling import flow, sde, text

# Pixels that a device encodes or decodes at once; decoding them takes 3.5 GiB of temporaries.
VAE_PIXELS = 1024 * 1024


@struct.dataclass
class Inputs:
  """What B rows read, on the device; None where the mode has none of it.

  Attributes:
    system_ids: [T] int32, the same for all rows.
    latents: clean latents of the rows' images, [B, I, C] float32, with their `grid`.
    patches: of the rows' images.
    prompt_ids, prompt_mask: [B, T] int32 and bool.
    given_ids, given_mask: reasoning that was given, not sampled, likewise.
  """

  prompt_ids: Any
  prompt_mask: Any
  system_ids: Any = None
  latents: Any = None
  grid: types.LatentGrid | None = None
  patches: types.Patches | None = None
  given_ids: Any = None
  given_mask: Any = None


@struct.dataclass
class Contexts:
  """What the rows have read.

  Attributes:
    main: everything so far.
    before_prompt, after_prompt: moments of `main`.
    without_image: a context that never saw an image; None where `main` has none.
  """

  main: types.Context
  before_prompt: types.Mark
  after_prompt: types.Mark
  without_image: types.Context | None


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capacity",))
def read(model: bagel_lib.Bagel, params, inputs: Inputs, *, capacity: int) -> Contexts:
  """Prefills the contexts; `capacity` slots leave room for what is written later."""
  run = functools.partial(model.apply, {"params": params})
  rows = inputs.prompt_ids.shape[0]

  def with_system(context):
    if inputs.system_ids is None:
      return context
    ids = jnp.broadcast_to(inputs.system_ids, (rows, *inputs.system_ids.shape))
    return run(context, ids, jnp.ones(ids.shape, bool), method="append_text")[0]

  def with_text(context, ids, mask):
    return run(context, ids, mask, method="append_text")[0]

  def with_prompt(context):
    return with_text(context, inputs.prompt_ids, inputs.prompt_mask)

  empty = functools.partial(bagel_lib.empty_context, model.config, rows, dtype=model.dtype)
  main = with_system(empty(capacity))
  if inputs.latents is not None:
    main = run(main, inputs.latents, inputs.grid, method="append_latents")
  if inputs.patches is not None:
    main = run(main, inputs.patches, method="append_patches")
  before_prompt = main.mark()
  main = with_prompt(main)
  after_prompt = main.mark()
  if inputs.given_ids is not None:
    main = with_text(main, inputs.given_ids, inputs.given_mask)
  without_image = None
  if inputs.latents is not None:
    system = 0 if inputs.system_ids is None else inputs.system_ids.shape[0]
    without_image = with_prompt(with_system(empty(system + inputs.prompt_ids.shape[1])))
  return Contexts(main, before_prompt, after_prompt, without_image)


@functools.partial(
  jax.jit, static_argnums=0, donate_argnames=("context",),
  static_argnames=("start_id", "end_id", "max_tokens", "temperature", "on_step"),
)
def write(
  model: bagel_lib.Bagel, params, context: types.Context, keys, active, **options
) -> tuple[types.TextRollout, types.Context]:
  """Samples text after what was read; see `text.sample`."""

  def step(context, ids, active):
    context, hidden = model.apply(
      {"params": params}, context, ids[:, None], active[:, None], method="append_text"
    )
    return context, model.apply({"params": params}, hidden[:, 0], method="logits")

  return text.sample(step, context, keys=keys, active=active, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("copies", "capacity"))
def fork(
  model: bagel_lib.Bagel, contexts: Contexts, *, copies: int, capacity: int
) -> Contexts:
  """Continues every row `copies` times over the same past; see `bagel.fork`."""
  main = bagel_lib.fork(model.config, contexts.main, copies, capacity)
  return contexts.replace(main=main)


def _velocity_fn(model, params, contexts: Contexts, grid, guidance) -> flow.VelocityFn:
  """The guided velocity of the rows' images, a multiple of the rows of `contexts`."""

  def under(context):
    def velocity(x, t):
      t = jnp.full(x.shape[0], t)
      return model.apply({"params": params}, context, x, t, grid, method="velocity")

    return velocity

  main = contexts.main
  without_image = contexts.without_image
  if without_image is None:
    without_image = main.as_of(contexts.after_prompt)
  return flow.guided(
    under(main), under(main.as_of(contexts.before_prompt)), under(without_image), guidance
  )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("num_timesteps", "shift", "guidance", "on_step")
)
def draw(
  model: bagel_lib.Bagel, params, contexts: Contexts, noise, grid: types.LatentGrid, *,
  num_timesteps: int, shift: float, guidance: flow.Guidance, on_step=None,
):
  """Denoises one image a row: noise [B, I, C] float32 -> latents [B, I, C]."""
  velocity = _velocity_fn(model, params, contexts, grid, guidance)
  return flow.integrate(velocity, noise, flow.time_grid(num_timesteps, shift), on_step=on_step)


@functools.partial(
  jax.jit, static_argnums=0,
  static_argnames=("num_timesteps", "shift", "guidance", "kind", "noise_level", "same_noise"),
)
def explore(
  model: bagel_lib.Bagel, params, contexts: Contexts, keys, steps, grid: types.LatentGrid, *,
  num_timesteps: int, shift: float, guidance: flow.Guidance, kind: str, noise_level: float,
  same_noise: int = 1,
) -> types.FlowRollout:
  """Denoises one image a row, stochastically at its `steps`; see `sde.integrate`.

  Args:
    keys: [B] typed PRNG keys.
    steps: [B, W] int32.
    same_noise: so many consecutive rows start from the noise of the first of them.
  """
  shape = (grid.ids.shape[1], model.config.latent_dim)
  starts = jax.vmap(jax.random.fold_in, (0, None))(keys[::same_noise], 0)
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(starts)
  noise = jnp.repeat(noise, same_noise, axis=0)
  return sde.integrate(
    _velocity_fn(model, params, contexts, grid, guidance), noise,
    flow.time_grid(num_timesteps, shift), steps,
    jax.vmap(jax.random.fold_in, (0, None))(keys, 1), grid.mask,
    kind=kind, noise_level=noise_level,
  )


@functools.partial(jax.jit, static_argnums=0)
def encode_images(vae: vae_lib.VAE, params, pixels, noise):
  """Pixels [M, H, W, 3] in [-1, 1], noise [M, h, w, z] -> sampled latents [M, h, w, z]."""
  mean, logvar = vae.apply({"params": params}, pixels, method="encode")
  c = vae.config
  return vae_lib.latents_from_moments(
    mean, logvar, noise, scale=c.scale_factor, shift=c.shift_factor
  )


@functools.partial(jax.jit, static_argnums=0)
def decode_images(vae: vae_lib.VAE, params, latents):
  """Latents [M, h, w, z] -> pixels [M, H, W, 3] uint8."""
  return vae_lib.to_uint8(vae.apply({"params": params}, latents, method="decode"))
