"""BAGEL: one network that reads text and images, writes text, and predicts latent velocities.

A sequence is a list of splits: text, [im_start] ids [im_end], causal; or an image, [vision_start]
tokens [vision_end], which sees itself whole. Text, markers and ViT patches run through the
understanding expert, latents through the generation expert. Text advances the RoPE position by its
length, an image by one. Time runs from data (t = 0) to noise (t = 1); dx/dt = noise - data.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import attention, layers, mot, siglip
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import lowering as lowering_lib

# Modules that only draw: who reads and writes text can do without their parameters.
DRAWING = frozenset(("gen", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed"))


class Bagel(nn.Module):
  """The network without its VAE."""

  config: config_lib.BagelConfig
  image_markers: tuple[int, int]  # ids of <|vision_start|> and <|vision_end|>
  # Of activations and caches. float32 also asks for exact float32 products.
  dtype: jnp.dtype = jnp.bfloat16
  param_dtype: jnp.dtype = jnp.float32  # of parameters made by `init`
  remat: str = "full"  # what the backward pass computes again: see `layers.REMAT`
  # Adapters on every projection of both experts. Without them the same parameters are the network
  # that the adapters started from.
  lora: layers.Lora | None = None
  lowering: lowering_lib.Lowering = lowering_lib.Lowering()

  def setup(self):
    c, width = self.config, self.config.llm.hidden_size
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    self.embed_tokens = layers.Table(c.llm.vocab_size, width, ("vocab", "embed"), **kinds)
    self.layers = layers.scan_layers(
      mot.Block, c.llm.num_layers, in_axes=(0, nn.broadcast), remat=self.remat
    )(c.llm, self.dtype, self.param_dtype, self.lora, self.lowering)
    self.norm = FinalNorms(c.llm.rms_norm_eps, self.dtype, self.param_dtype)
    # What the heads say stays in float32: bf16 would move a log-probability by up to 0.06.
    wide = layers.at_least_float32(self.dtype)
    heads = kinds | dict(out_dtype=wide, own_gradient=self.lowering.own_gradients)
    self.lm_head = layers.Linear((c.llm.vocab_size,), ("embed", "vocab"), use_bias=False, **heads)
    self.time_embedder = layers.TwoLayer(width, "silu", **kinds)
    self.vae2llm = layers.Linear((width,), (None, "embed"), **kinds)
    self.llm2vae = layers.Linear((c.latent_dim,), ("embed", None), zero=True, **heads)
    self.latent_pos_embed = self._position_table(c.max_latent_size)
    self.vit = siglip.SigLIP(c.vit, self.dtype, self.param_dtype, self.lowering)
    self.connector = layers.TwoLayer(width, "gelu_tanh", **kinds)
    self.vit_pos_embed = self._position_table(c.vit_max_patches_per_side)

  def _position_table(self, side: int):
    return layers.Table(
      side * side, self.config.llm.hidden_size, ("position", "features"), dtype=self.dtype,
      param_dtype=self.param_dtype, init=layers.sincos_init(side),
    )

  def for_gradients(self) -> Bagel:
    """The same network, as it is written where its gradient is taken."""
    unroll = self.lowering.unroll or self.lowering.unroll_gradients
    return self.clone(lowering=dataclasses.replace(self.lowering, unroll=unroll))

  def unstacked(self, params):
    """Parameters, or gradients of them, with the layers taken apart where they are unrolled.

    The network takes them as it takes stacked ones. Taken apart outside a loop, the layers are the
    same program but for its arguments, and XLA compiles what they have in common once.
    """
    if not self.lowering.unroll:
      return params
    return {**params, "layers": layers.unstack(params["layers"])}

  def stacked(self, params):
    """Undoes `unstacked`."""
    if not self.lowering.unroll:
      return params
    return {**params, "layers": layers.stack(params["layers"])}

  def __call__(self, batch: types.PackedBatch):
    """Touches every parameter; for `init`."""
    hidden, velocity = self.packed(batch)
    return self.logits(hidden), velocity

  # Embeddings.

  def embed_text(self, ids):
    """[B, T] int32 -> [B, T, D]."""
    return self.embed_tokens(ids)

  def embed_patches(self, patches: types.Patches):
    """ViT, connector and position table: [M, P, D]."""
    features = self.vit(patches.pixels, patches.ids, patches.mask)
    return self.connector(features) + self.vit_pos_embed(patches.ids)

  def embed_latents(self, x, t, ids):
    """Latents x [M, I, C] at times t ([M] or [M, I]) and places ids [M, I] -> [M, I, D]."""
    t = t[:, None] if t.ndim == 1 else t
    time = self.time_embedder(layers.time_features(t))
    return self.vae2llm(x) + time + self.latent_pos_embed(ids)

  # The decoder.

  def decode(
    self, und: types.Tokens | None, gen: types.Tokens | None, context: types.Context | None, *,
    keep_kv: bool = False, one_reach: bool = False,
  ):
    """Runs one stream of tokens for each expert over `context`.

    `one_reach`: that of all tokens of a row, but for padding, is the same. Returns (hidden of und
    [B, T, D] or None, hidden of gen or None, after their expert's final norm; new (k, v) or None).
    """
    tokens = {"und": und, "gen": gen}
    axes = ("batch", "length", "features")
    enter = lambda x: nn.with_logical_constraint(x.astype(self.dtype), axes)
    xs = {e: None if s is None else enter(s.x) for e, s in tokens.items()}
    parts = () if context is None else context.parts
    rotation = functools.partial(
      attention.rotation, head_dim=self.config.llm.head_dim, theta=self.config.llm.rope_theta,
      keep=self.lowering.keep_angles,
    )
    layout = mot.Layout(
      streams={
        e: None if s is None else s.replace(x=None, position=None) for e, s in tokens.items()
      },
      rotations={e: None if s is None else rotation(s.position) for e, s in tokens.items()},
      context_orders=tuple(part.order for part in parts), keep_kv=keep_kv, one_reach=one_reach,
    )
    xs, kv = self._run_layers(xs, tuple((part.k, part.v) for part in parts), layout)
    normed = self.norm(xs)
    return normed["und"], normed["gen"], kv

  def _run_layers(self, xs, context_kvs, layout: mot.Layout):
    """As a loop, or one after the other."""
    if self.is_initializing() or not self.lowering.unroll:
      return self.layers(xs, context_kvs, layout)
    block = mot.Block(
      self.config.llm, self.dtype, self.param_dtype, self.lora, self.lowering, parent=None
    )
    # Jitted, so that JAX traces layers of the same shapes once; XLA gets them one after the other.
    run = jax.jit(lambda params, *args: block.apply({"params": params}, *args))
    policy = layers.REMAT[self.remat]
    run = run if policy is None else jax.checkpoint(run, policy=policy)
    apart = layers.unstack((self.variables["params"]["layers"], context_kvs))
    kvs = []
    for layer in range(self.config.llm.num_layers):
      params, context_kv = layers.of_layer(apart, layer)
      xs, kv = run(params, xs, context_kv, layout)
      kvs.append(kv)
    return xs, jax.tree.map(lambda *a: jnp.stack(a), *kvs)

  def logits(self, hidden):
    """Understanding-expert hidden states [..., D] -> [..., V] float32."""
    return self.lm_head(hidden)

  # Growing a context.

  def append_text(self, context: types.Context, ids, mask):
    """Appends tokens to each row: [B, T] ids, [B, T] bool mask -> (context, hidden [B, T, D]).

    A row's real tokens come first. Sampled, given and forced tokens all enter here.
    """
    slots = context.place + jnp.arange(ids.shape[1])
    count = jnp.cumsum(mask, axis=1)
    position = context.position[:, None] + count - 1
    tokens = _tokens(self.embed_text(ids), mask, position, slots, slots)
    hidden, _, kv = self.decode(tokens, None, context, keep_kv=True)
    return _extend(context, kv, tokens.order, advance=count[:, -1]), hidden

  def read_text(self, ids, mask, prefix: types.Context | None = None):
    """What `append_text` makes of an empty context, without empty slots to attend to.

    Rows [B, T] may have padding anywhere, and go on from `prefix`, see `Context`. Returns (context
    without room for more, hidden [B, T, D]).
    """
    rows, length = ids.shape
    place = 0 if prefix is None else prefix.place
    position = jnp.zeros(rows, jnp.int32)
    if prefix is not None:
      position = jnp.repeat(prefix.position, rows // prefix.position.shape[0])
    slots = place + jnp.arange(length, dtype=jnp.int32)
    count = position[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    tokens = _tokens(self.embed_text(ids), mask, count - 1, slots, slots)
    hidden, _, kv = self.decode(tokens, None, prefix, keep_kv=True)
    context = types.Context(
      *kv, order=tokens.order, position=count[:, -1], cursor=jnp.int32(length), prefix=prefix
    )
    return context, hidden

  def append_patches(self, context: types.Context, patches: types.Patches):
    """Appends one image a row, as the ViT sees it; a row without patches stays as it was."""
    start, end = self._embed_markers(patches.mask.shape[0])
    x = jnp.concatenate([start, self.embed_patches(patches), end], axis=1)
    present = patches.mask.any(axis=1, keepdims=True)
    mask = jnp.concatenate([present, patches.mask, present], axis=1)
    slots = context.place + jnp.arange(mask.shape[1])
    tokens = _image_split(x, mask, slots, context)
    _, _, kv = self.decode(tokens, None, context, keep_kv=True, one_reach=True)
    return _extend(context, kv, tokens.order, advance=present[:, 0].astype(jnp.int32))

  def append_latents(self, context: types.Context, latents, grid: types.LatentGrid):
    """Appends one clean image a row: latents [B, I, C] f32, at t = 0."""
    rows, count = grid.mask.shape
    markers = jnp.concatenate(self._embed_markers(rows), axis=1)
    present = jnp.repeat(grid.mask.any(axis=1, keepdims=True), 2, axis=1)
    x = self.embed_latents(latents, jnp.zeros(rows), grid.ids)
    slots = context.place + 1 + jnp.arange(count)
    gen = _image_split(x, grid.mask, slots, context, last=slots[-1] + 1)
    marker_slots = context.place + jnp.array([0, count + 1])
    und = _image_split(markers, present, marker_slots, context)
    _, _, kv = self.decode(und, gen, context, keep_kv=True, one_reach=True)
    order = jnp.concatenate([und.order, gen.order], axis=1)
    return _extend(context, kv, order, advance=present[:, 0].astype(jnp.int32))

  # Predicting an image.

  def velocity(
    self, context: types.Context | None, x, t, grid: types.LatentGrid, *,
    reach=None, position=None, return_hidden: bool = False,
  ):
    """Velocity of noisy images that see their context and themselves.

    Args:
      context: B rows; None means that the images see only themselves, at position 0.
      x: noisy latents, [M, I, C] float32; M = B * R, the R images of a row consecutive.
      t: flow time, [M] float32.
      reach: last place of the context that each image sees, [M] int32; None: all of it.
      position: RoPE position of each image, [M] int32; None: its context's next.

    Returns:
      [M, I, C] float32, zero at padding; with `return_hidden` a pair with what the heads see, the
      hidden states ([M, 2, D], [M, I, D]).
    """
    images = x.shape[0]
    if position is None:
      here = jnp.zeros(1, jnp.int32) if context is None else context.position
      position = jnp.repeat(here, images // here.shape[0])
    if reach is None:
      reach = jnp.full(images, types.EVERYTHING)

    tokens = lambda x, mask: _tokens(x, mask, position[:, None], types.OWN, reach[:, None])
    markers = jnp.concatenate(self._embed_markers(images), axis=1)
    und = tokens(markers, jnp.ones((images, 2), bool))
    gen = tokens(self.embed_latents(x, t, grid.ids), grid.mask)
    und_hidden, gen_hidden, _ = self.decode(und, gen, context, one_reach=True)
    velocity = jnp.where(grid.mask[..., None], self.llm2vae(gen_hidden), 0.0)
    return (velocity, (und_hidden, gen_hidden)) if return_hidden else velocity

  # Training.

  def packed(self, batch: types.PackedBatch):
    """The training forward of B sequences, equal to the official packed mask.

    Everything that later tokens may see runs once as a context; then every image to denoise runs
    as a row of its own over that context, none of whose keys is copied. Returns (hidden states at
    the label slots [B, Y, D], velocities [B, R, I, C] float32 or None).
    """
    x = self.embed_text(batch.und_ids)
    if batch.vit is not None:
      x = x.at[batch.vit_row[:, None], batch.vit_slot].set(
        self.embed_patches(batch.vit), mode="drop"
      )
    und = types.Tokens(x, batch.und_position, batch.und_order, batch.und_reach)
    gen = None
    if batch.clean_latents is not None:
      x = self.embed_latents(batch.clean_latents, jnp.zeros(x.shape[0]), batch.clean_ids)
      gen = types.Tokens(x, batch.clean_position, batch.clean_order, batch.clean_reach)
    hidden, _, kv = self.decode(und, gen, None, keep_kv=batch.target is not None)
    labelled = jnp.take_along_axis(hidden, batch.label_slot[..., None], axis=1, mode="clip")
    if batch.target is None:
      return labelled, None
    rows, per_row = batch.t.shape
    order = und.order if gen is None else jnp.concatenate([und.order, gen.order], axis=1)
    context = types.Context(*kv, order=order, position=None, cursor=None)
    flat = lambda a: a.reshape(rows * per_row, *a.shape[2:])
    t = batch.t[..., None, None]
    x_t = (1 - t) * batch.target + t * batch.noise
    grid = types.LatentGrid(flat(batch.noisy_ids), flat(batch.noisy_mask))
    velocity = self.velocity(
      context, flat(x_t), flat(batch.t), grid,
      reach=flat(batch.noisy_reach), position=flat(batch.noisy_position),
    )
    return labelled, velocity.reshape(batch.target.shape)

  def _embed_markers(self, rows: int):
    """Embedded <|vision_start|> and <|vision_end|>, [rows, 1, D] each."""
    return tuple(self.embed_text(jnp.full((rows, 1), marker)) for marker in self.image_markers)


class FinalNorms(nn.Module):
  """The final norm of each expert."""

  epsilon: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  def setup(self):
    self.und = layers.RMSNorm(self.epsilon, self.dtype, self.param_dtype)
    self.gen = layers.RMSNorm(self.epsilon, self.dtype, self.param_dtype)

  def __call__(self, xs):
    norms = {"und": self.und, "gen": self.gen}
    return {e: None if x is None else norms[e](x) for e, x in xs.items()}


def empty_context(
  config: config_lib.BagelConfig, rows: int, capacity: int, dtype=jnp.bfloat16
) -> types.Context:
  """A context of `rows` empty sequences with room for `capacity` tokens each."""
  llm = config.llm
  shape = (llm.num_layers, rows, llm.num_kv_heads, capacity, llm.head_dim)
  # Spread from the start: an empty cache that every device held whole would be the largest array.
  by_row = lambda a: nn.with_logical_constraint(a, ("batch", "length")[: a.ndim])
  return types.Context(
    k=_spread(jnp.zeros(shape, dtype)),
    v=_spread(jnp.zeros(shape, dtype)),
    order=by_row(jnp.full((rows, capacity), types.UNSEEN, jnp.int32)),
    position=by_row(jnp.zeros(rows, jnp.int32)),
    cursor=jnp.zeros((), jnp.int32),
  )


def _spread(cache):
  """Keys or values of all layers, [L, B, K, S, H], along the devices."""
  return nn.with_logical_constraint(cache, ("layers", "batch", "kv_heads", "length", "head_dim"))


def fork(
  config: config_lib.BagelConfig, context: types.Context, copies: int, capacity: int
) -> types.Context:
  """Continues every row `copies` times, with room for `capacity` tokens each.

  The rows of a group share what they have read: its keys and values are not copied.
  """
  rows = context.position.shape[0] * copies
  own = empty_context(config, rows, capacity, context.k.dtype)
  return own.replace(position=jnp.repeat(context.position, copies), prefix=context)


def _image_split(x, mask, slots, context: types.Context, last=None) -> types.Tokens:
  """Tokens of an image split: one position, everything up to the split's last slot in reach."""
  last = slots[-1] if last is None else last
  return _tokens(x, mask, context.position[:, None], slots, last)


def _tokens(x, mask, position, order, reach) -> types.Tokens:
  """Tokens x [B, T, D] where mask is True; of padding elsewhere."""
  return types.Tokens(
    x=x, position=jnp.broadcast_to(position, mask.shape),
    order=jnp.where(mask, order, types.UNSEEN), reach=jnp.where(mask, reach, types.BLIND),
  )


def _extend(context: types.Context, kv, order, advance) -> types.Context:
  """Writes new keys and values, once, at the cursor. The caller provides the room."""
  at = context.cursor
  chex.assert_axis_dimension_gteq(context.order, 1, order.shape[1])

  def write(cache, new):
    return _spread(jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, 0, 0, at, 0)))

  return context.replace(
    k=write(context.k, kv[0]), v=write(context.v, kv[1]),
    order=jax.lax.dynamic_update_slice(context.order, order, (0, at)),
    position=context.position + advance, cursor=at + order.shape[1],
  )


def example_batch(config: config_lib.BagelConfig) -> types.PackedBatch:
  """The smallest batch that touches every parameter; for `Bagel.init`, usually under eval_shape."""
  integers = jnp.zeros((1, 1), jnp.int32)
  latents = jnp.zeros((1, 1, 1, config.latent_dim))
  return types.PackedBatch(
    und_ids=integers, und_position=integers, und_order=integers, und_reach=integers,
    label_slot=integers, label_ids=integers, label_weight=jnp.ones((1, 1)),
    vit=types.Patches(jnp.zeros((1, 1, config.vit.patch_dim)), integers, integers == 0),
    vit_row=integers[0], vit_slot=integers,
    clean_latents=latents[0], clean_ids=integers, clean_position=integers, clean_order=integers,
    clean_reach=integers,
    target=latents, noise=latents, t=jnp.ones((1, 1)), noisy_ids=integers[None],
    noisy_mask=integers[None] == 0, noisy_position=integers, noisy_reach=integers,
  )
