"""SigLIP vision tower: patches of an image to one feature vector a patch.

The tower is BAGEL's: linear patch embedding, an absolute learned position table addressed by
row * table_side + column, pre-norm blocks with tanh-GELU, then `post_norm`. No class token, no
pooling. The released checkpoint uses all SigLIP layers but the last, *followed by* the final norm.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import attention, layers
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import lowering as lowering_lib

# A 980 px image is 4900 patches: 16 heads of float32 scores for all pairs would be 1.5 GB. A block
# of this many queries holds a tenth of that.
QUERY_BLOCK = 512


class Attention(nn.Module):
  """Full self-attention among the patches of one image; projections with bias."""

  config: config_lib.ViTConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lowering: lowering_lib.Lowering

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """[M, P, D], [M, P] bool -> [M, P, D]."""
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    N, H = self.config.num_heads, self.config.head_dim
    # [M, P, D] -> [M, P, N, H]
    q, k, v = (
      nn.with_logical_constraint(
        layers.Linear((N, H), ("embed", "heads", "head_dim"), name=name, **kinds)(x),
        ("batch", "length", "heads", "head_dim"),
      )
      for name in ("q", "k", "v")
    )
    order = jnp.where(mask, 0, types.UNSEEN)
    reach = jnp.where(mask, types.EVERYTHING, types.BLIND)
    out = attention.attend(
      q, reach, [attention.Keys.of(k, v, order)],
      precision=layers.matmul_precision(self.dtype), query_block=QUERY_BLOCK,
      backend=self.lowering.attention, one_reach=True,
    )
    return layers.Linear(
      (self.config.hidden_size,), ("heads", "head_dim", "embed"), name="out", **kinds
    )(out)


class MLP(nn.Module):
  """`fc2(gelu_tanh(fc1(x)))`. The exact (erf) GELU differs by 5e-4 and is not what was trained."""

  config: config_lib.ViTConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[M, P, D] -> [M, P, D]."""
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    wide, width = self.config.intermediate_size, self.config.hidden_size
    x = nn.gelu(layers.Linear((wide,), ("embed", "mlp"), name="fc1", **kinds)(x), approximate=True)
    x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
    return layers.Linear((width,), ("mlp", "embed"), name="fc2", **kinds)(x)


def layer_norm(
  epsilon: float, dtype: jnp.dtype, param_dtype: jnp.dtype, name: str
) -> nn.LayerNorm:
  """LayerNorm in float32 for a network in bfloat16 too; two-pass variance, so no cancellation."""
  return nn.LayerNorm(
    epsilon=epsilon, dtype=layers.at_least_float32(dtype), param_dtype=param_dtype,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    use_fast_variance=False, name=name,
  )


class Block(nn.Module):
  """Pre-norm transformer block, shaped as a scan body: `(x, mask) -> (x, None)`."""

  config: config_lib.ViTConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lowering: lowering_lib.Lowering

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    sizes = (self.config, self.dtype, self.param_dtype)
    norm = (self.config.layer_norm_eps, self.dtype, self.param_dtype)
    with jax.named_scope("attention"):
      y = layer_norm(*norm, "norm1")(x)
      x = x + Attention(*sizes, self.lowering, name="attention")(y, mask)
    with jax.named_scope("mlp"):
      x = x + MLP(*sizes, name="mlp")(layer_norm(*norm, "norm2")(x))
    return nn.with_logical_constraint(x, ("batch", "length", "features")), None


class SigLIP(nn.Module):
  """The vision tower. Activations in `dtype`, norms and softmax in float32."""

  config: config_lib.ViTConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  lowering: lowering_lib.Lowering = lowering_lib.Lowering()

  @nn.compact
  def __call__(self, patches: jax.Array, position_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Features of every patch, [M, P, D] in `dtype`; rows of padding carry no meaning.

    Args:
      patches: [M, P, patch_dim] float32 in [-1, 1], features ordered (py, px, rgb).
      position_ids: [M, P] int32, row * table_side + column.
      mask: [M, P] bool, False = padding, which is never read; an image that is all padding gives
        finite numbers.
    """
    config = self.config
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    with jax.named_scope("vit_embed"):
      # A hidden key still meets its value in the weighted sum, and 0 * NaN is NaN.
      patches = jnp.where(mask[..., None], patches, 0)
      x = layers.Linear((config.hidden_size,), ("patch", "embed"), name="patch_embed", **kinds)(
        patches
      )
      # Its features stay whole on every chip (23 MB): a sharded table read by a sharded batch would
      # be gathered and cut again at every call.
      x = x + layers.Table(
        config.num_positions, config.hidden_size, ("position", "features"), name="position_embed",
        **kinds,
      )(position_ids)
    with jax.named_scope("vit_layers"):
      stack = layers.scan_layers(
        Block, config.num_layers, in_axes=nn.broadcast, unroll=self.lowering.unroll
      )
      x, _ = stack(config, self.dtype, self.param_dtype, self.lowering, name="layers")(x, mask)
    norm = layer_norm(config.layer_norm_eps, self.dtype, self.param_dtype, "post_norm")
    return norm(x).astype(self.dtype)
