"""The device programs that every use of BAGEL consists of; each is one jitted function.

Those of the autoencoder are one for each platform: `decode_images("tpu")`.
"""

from __future__ import annotations

import functools

from flax import struct
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.models import bagel as bagel_lib
from unigrpo_jax.models import lowering
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.sampling import flow, sde, text

# Pixels that a device encodes or decodes at once. Decoding them needs 3.5 GiB for temporaries.
VAE_PIXELS = 1024 * 1024


@struct.dataclass
class Inputs:
  """The arrays of a script's given and seen segments, by name, with B rows each.

  The system prompt, which all rows share, has a single row.
  """

  texts: dict[str, types.Text]
  images: dict[str, types.Seen] = struct.field(default_factory=dict)


@struct.dataclass
class Contexts:
  """The key-value caches of B rows, with what classifier-free guidance needs."""

  main: types.Context  # all segments that were read so far
  before_prompt: types.Mark  # `main.as_of(before_prompt)` is the context without the prompt
  after_prompt: types.Mark  # and this one the context up to the prompt, without a reasoning
  # The texts up to the prompt, read without the image; None where no latents of an image were seen.
  without_image: types.Context | None


@functools.partial(jax.jit, static_argnums=0, static_argnames=("script", "capacity"))
def prefill(
  model: bagel_lib.Bagel, params, inputs: Inputs, *, script: script_lib.Script, capacity: int
) -> Contexts:
  """Reads the script's shared segments into new caches.

  Args:
    inputs: arrays of the segments.
    script: their order.
    capacity: slots of the main cache; includes room for text that is sampled later without `fork`.
  """
  run = functools.partial(model.apply, {"params": params})
  rows = inputs.texts[script_lib.PROMPT].ids.shape[0]
  empty = functools.partial(bagel_lib.empty_context, model.config, rows, dtype=model.dtype)

  def read(context, segment):
    if isinstance(segment, script_lib.Given):
      given = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (rows, a.shape[1])), inputs.texts[segment.name]
      )
      return run(context, given.ids, given.mask, method="append_text")[0]
    image = inputs.images[segment.name]
    if segment.latents:
      context = run(context, image.latents, image.grid, method="append_latents")
    if segment.patches:
      context = run(context, image.patches, method="append_patches")
    return context

  context, prompt = empty(capacity), script_lib.Given(script_lib.PROMPT)
  before = after = None
  for segment in script.shared:
    if segment == prompt:
      before = context.mark()
    context = read(context, segment)
    if segment == prompt:
      after = context.mark()
  without_image = None
  if any(isinstance(segment, script_lib.Seen) and segment.latents for segment in script.shared):
    texts = [s for s in script.shared[: script.shared.index(prompt) + 1]
             if isinstance(s, script_lib.Given)]
    room = sum(inputs.texts[s.name].ids.shape[1] for s in texts)
    without_image = functools.reduce(read, texts, empty(room))
  return Contexts(context, before, after, without_image)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("copies", "capacity"))
def fork(model: bagel_lib.Bagel, contexts: Contexts, *, copies: int, capacity: int) -> Contexts:
  """Continues every row as `copies` rows over its cache, which is not copied; see `bagel.fork`.

  `capacity` is the number of new slots of each row.
  """
  main = bagel_lib.fork(model.config, contexts.main, copies, capacity)
  return contexts.replace(main=main)


@functools.partial(
  jax.jit, static_argnums=0, donate_argnames=("context",),
  static_argnames=("start_id", "end_id", "max_tokens", "temperature", "top", "on_step"),
)
def decode_text(
  model: bagel_lib.Bagel, params, context: types.Context, keys, active, **options
) -> tuple[types.TextRollout, types.Context]:
  """Samples a text after `context`; returns it and the context with it. See `text.sample`."""

  def step(context, ids, active):
    context, hidden = model.apply(
      {"params": params}, context, ids[:, None], active[:, None], method="append_text"
    )
    return context, model.apply({"params": params}, hidden[:, 0], method="logits")

  return text.sample(step, context, keys=keys, active=active, **options)


@functools.partial(
  jax.jit, static_argnums=0,
  static_argnames=("num_timesteps", "shift", "guidance", "kind", "noise_level", "on_step"),
)
def denoise(
  model: bagel_lib.Bagel, params, contexts: Contexts, noise, grid: types.LatentGrid, keys=None,
  window=None, *, num_timesteps: int, shift: float, guidance: flow.Guidance,
  kind: str | None = None, noise_level: float = 0.0, on_step=None,
) -> types.FlowRollout:
  """Denoises B images, a multiple of the rows of `contexts`, which they share.

  Without `window` by the ODE; with `window` and `kind` by the SDE in the window's steps; with
  `window` alone by the ODE, of which the window's steps are recorded.

  Args:
    contexts: what the images are conditioned on.
    noise: the latents at t = 1, [B, I, C] float32.
    grid: latent grids of the images, B rows.
    keys, window, kind, noise_level, on_step: see `sde.integrate`.
    num_timesteps, shift: of the time grid; see `flow.time_grid`.
    guidance: classifier-free guidance; none where its text_scale is 1.
  """
  times = flow.time_grid(num_timesteps, shift)
  velocity = _velocity_fn(model, params, contexts, grid, guidance)
  if window is None:
    return types.FlowRollout(latents=flow.integrate(velocity, noise, times, on_step=on_step))
  if kind is None:
    return flow.integrate_recording(velocity, noise, times, window, on_step=on_step)
  return sde.integrate(
    velocity, noise, times, window, keys, grid.mask, kind=kind, noise_level=noise_level,
    on_step=on_step,
  )


def _velocity_fn(model, params, contexts: Contexts, grid, guidance) -> flow.VelocityFn:
  """(x, t) -> velocity with guidance, both [B, I, C]."""

  def velocity(context, x, t):
    t = jnp.full(x.shape[0], t)
    return model.apply({"params": params}, context, x, t, grid, method="velocity")

  under = lambda context: functools.partial(velocity, context)
  main, without_image = contexts.main, contexts.without_image
  if without_image is None:
    without_image = main.as_of(contexts.after_prompt)
  return flow.guided(
    under(main), under(main.as_of(contexts.before_prompt)), under(without_image), guidance
  )


def _for_platform(fn):
  """Platform -> `fn(vae, params, ...)` jitted for it, always the same function."""
  return functools.cache(lambda platform: jax.jit(
    fn, static_argnums=0, compiler_options=lowering.CONVOLUTIONS.get(platform)
  ))


@_for_platform
def encode_images(vae: vae_lib.VAE, params, pixels, noise):
  """Encodes images: pixels [M, H, W, 3] in [-1, 1] -> posterior samples [M, h, w, z] float32.

  `noise`, [M, h, w, z], is the standard normal noise of the samples; 0 gives the posterior's mean.
  """
  mean, logvar = vae.apply({"params": params}, pixels, method="encode")
  c = vae.config
  scale, shift = c.scale_factor, c.shift_factor
  return vae_lib.latents_from_moments(mean, logvar, noise, scale=scale, shift=shift)


@_for_platform
def decode_images(vae: vae_lib.VAE, params, latents):
  """Decodes images: latents [M, h, w, z] -> pixels [M, H, W, 3] uint8."""
  return vae_lib.to_uint8(vae.apply({"params": params}, latents, method="decode"))
