"""CLIP: images and texts as vectors in one space (Radford et al., arXiv 2103.00020).

Modules and parameters have the names of transformers' CLIPModel, so that parameters and tensors in
files have the same names (see `convert`). Letters: B batch, T tokens, D width, S side of an image
in pixels, P features of both towers' projections.
"""

from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp

from unigrpo_jax.models import attention, layers, siglip
from unigrpo_jax.reward_models.clip import config as config_lib

_ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


def _linear(features: int, *, use_bias: bool = True, name: str | None = None) -> layers.Linear:
  return layers.Linear((features,), (None, None), use_bias=use_bias, name=name)


def _norm(config: config_lib.Tower, name: str | None = None) -> nn.LayerNorm:
  return siglip.layer_norm(config.layer_norm_eps, jnp.float32, jnp.float32, name)


class Attention(nn.Module):
  """Self-attention, bidirectional or causal."""

  config: config_lib.Tower
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> the same."""
    B, T, D = x.shape
    heads = (B, T, self.config.num_heads, D // self.config.num_heads)
    q, k, v = (
      _linear(D, name=name)(x).reshape(heads)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    reach = order if self.causal else jnp.full_like(order, T)
    out = attention.attend(
      q, reach, [attention.Keys.of(k, v, order)], precision=jax.lax.Precision.HIGHEST
    )
    return _linear(D, name="out_proj")(out.reshape(B, T, D))


class MLP(nn.Module):
  """fc2(act(fc1(x)))."""

  config: config_lib.Tower

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> the same."""
    x = _linear(self.config.intermediate_size, name="fc1")(x)
    x = _ACTIVATIONS[self.config.act](x)
    return _linear(self.config.hidden_size, name="fc2")(x)


class Block(nn.Module):
  """Pre-norm transformer block, with the signature of a scan body."""

  config: config_lib.Tower
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    y = _norm(self.config, "layer_norm1")(x)
    x = x + Attention(self.config, self.causal, name="self_attn")(y)
    y = _norm(self.config, "layer_norm2")(x)
    return x + MLP(self.config, name="mlp")(y), None


class Encoder(nn.Module):
  """All blocks of a tower."""

  config: config_lib.Tower
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> the same."""
    stack = layers.scan_layers(Block, self.config.num_layers, in_axes=nn.broadcast, remat="none")
    return stack(self.config, self.causal, name="layers")(x, None)[0]


class VisionEmbeddings(nn.Module):
  """Embeddings of the class token and the patches (row by row), with their positions."""

  config: config_lib.Vision

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """[B, S, S, 3] normalised -> [B, T, D]."""
    c = self.config
    side, D = c.image_size // c.patch_size, c.hidden_size
    # [B, rows, y, columns, x, 3] -> [B, rows, columns, y, x, 3]
    x = pixels.reshape(-1, side, c.patch_size, side, c.patch_size, 3).swapaxes(2, 3)
    x = x.reshape(-1, side * side, c.patch_size**2 * 3)
    x = _linear(D, use_bias=False, name="patch_embedding")(x)
    first = self.param("class_embedding", nn.initializers.normal(0.02), (D,), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, D)), x], axis=1)
    place = layers.Table(c.num_positions, D, (None, None), name="position_embedding")
    return x + place(jnp.arange(c.num_positions))


class VisionModel(nn.Module):
  """The image tower."""

  config: config_lib.Vision

  @nn.compact
  def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S, S, 3] -> all tokens [B, T, D] before the last norm, and the class token after it."""
    x = VisionEmbeddings(self.config, name="embeddings")(pixels)
    x = _norm(self.config, "pre_layrnorm")(x)  # as the files spell it
    x = Encoder(self.config, False, name="encoder")(x)
    return x, _norm(self.config, "post_layernorm")(x[:, 0])


class TextEmbeddings(nn.Module):
  """Embeddings of tokens, with their positions."""

  config: config_lib.Text

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """[B, T] int32 -> [B, T, D]."""
    c = self.config
    table = lambda rows, name: layers.Table(rows, c.hidden_size, (None, None), name=name)
    place = table(c.max_positions, "position_embedding")(jnp.arange(ids.shape[1]))
    return table(c.vocab_size, "token_embedding")(ids) + place


class TextModel(nn.Module):
  """The text tower."""

  config: config_lib.Text

  @nn.compact
  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T] -> outputs at all tokens [B, T, D], and at the first end token [B, D]."""
    x = TextEmbeddings(self.config, name="embeddings")(ids)
    x = Encoder(self.config, True, name="encoder")(x)
    x = _norm(self.config, "final_layer_norm")(x)
    eos = self.config.eos_token_id
    end = jnp.argmax(ids if eos == 2 else ids == eos, axis=1)
    return x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class CLIP(nn.Module):
  """Both towers; everything is computed in float32.

  Parameters may be stored in a smaller dtype. Products are exact in float32 even then: to round the
  activations too would increase the error of a logit by half.
  """

  config: config_lib.Config

  def setup(self):
    c = self.config
    self.vision_model = VisionModel(c.vision)
    self.text_model = TextModel(c.text)
    self.visual_projection = _linear(c.projection_size, use_bias=False)
    self.text_projection = _linear(c.projection_size, use_bias=False)
    self.logit_scale = self.param("logit_scale", nn.initializers.zeros, (), jnp.float32)

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """Images [B, S, S, 3], normalised by `preprocess.Pixels` -> features [B, P]."""
    return self.visual_projection(self.vision_model(pixels)[1])

  def text_features(self, ids: jax.Array) -> jax.Array:
    """Texts [B, T] int32, with start and end tokens and padding -> features [B, P]."""
    return self.text_projection(self.text_model(ids)[1])

  def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
    """B images and their texts -> exp(logit_scale) times the cosine of their features, [B]."""
    image, text = unit(self.image_features(pixels)), unit(self.text_features(ids))
    return jnp.exp(self.logit_scale) * (image * text).sum(-1)


def unit(x: jax.Array) -> jax.Array:
  """Vectors [..., P], scaled to length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
