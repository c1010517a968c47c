"""Mixture of transformers: two experts, one attention (Qwen2 decoder of BAGEL).

A token belongs to one expert, which owns every weight that touches it; the softmax is shared. The
decoder takes a stream of tokens for each expert, either of them None: an absent stream costs
nothing, and no token passes through the expert it does not use.
"""

from __future__ import annotations

import chex
from flax import linen as nn
from flax import struct
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import attention, layers
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import lowering as lowering_lib

# The order in which the tokens of the experts stand in keys and queries.
EXPERTS = ("und", "gen")


class Attention(nn.Module):
  """Projections of one expert: q, k, v with bias, q and k normed by head and rotated; o."""

  config: config_lib.LLMConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lora: layers.Lora | None = None
  own_gradients: bool = False

  def setup(self):
    c = self.config
    kinds = dict(
      dtype=self.dtype, param_dtype=self.param_dtype, lora=self.lora,
      own_gradient=self.own_gradients,
    )
    heads = lambda n, name: layers.Linear((n, c.head_dim), ("embed", name, "head_dim"), **kinds)
    self.q = heads(c.num_heads, "heads")
    self.k = heads(c.num_kv_heads, "kv_heads")
    self.v = heads(c.num_kv_heads, "kv_heads")
    self.o = layers.Linear(
      (c.hidden_size,), ("heads", "head_dim", "embed"), use_bias=False, **kinds
    )
    wide = layers.at_least_float32(self.dtype)
    norm = lambda: layers.RMSNorm(c.rms_norm_eps, wide, self.param_dtype)
    self.q_norm, self.k_norm = norm(), norm()

  def project(self, x, rotation: attention.Rotation):
    """x [B, T, D] -> q [B, T, N, H], k and v [B, K, T, H] as they are cached."""
    q = attention.rotate(self.q_norm(self.q(x)), rotation).astype(self.dtype)
    k = attention.rotate(self.k_norm(self.k(x)), rotation).astype(self.dtype)
    k, v = (jnp.moveaxis(a, 1, 2) for a in (k, self.v(x)))
    q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
    k = nn.with_logical_constraint(k, ("batch", "kv_heads", "length", "head_dim"))
    v = nn.with_logical_constraint(v, ("batch", "kv_heads", "length", "head_dim"))
    return ad_checkpoint.checkpoint_name((q, k, v), "attention")


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x)), no biases."""

  config: config_lib.LLMConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lora: layers.Lora | None = None
  own_gradients: bool = False

  @nn.compact
  def __call__(self, x):
    kinds = dict(
      dtype=self.dtype, param_dtype=self.param_dtype, use_bias=False, lora=self.lora,
      own_gradient=self.own_gradients,
    )
    wide, width = self.config.intermediate_size, self.config.hidden_size
    gate = layers.Linear((wide,), ("embed", "mlp"), name="gate", **kinds)(x)
    up = layers.Linear((wide,), ("embed", "mlp"), name="up", **kinds)(x)
    gate, up = ad_checkpoint.checkpoint_name((gate, up), "mlp")
    hidden = layers.gated(gate, up) if self.own_gradients else nn.silu(gate) * up
    hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
    return layers.Linear((width,), ("mlp", "embed"), name="down", **kinds)(hidden)


class Expert(nn.Module):
  """One expert's half of a block."""

  config: config_lib.LLMConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lora: layers.Lora | None = None
  own_gradients: bool = False

  def setup(self):
    norm = lambda: layers.RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype)
    self.input_norm, self.post_attention_norm = norm(), norm()
    kinds = (self.config, self.dtype, self.param_dtype, self.lora, self.own_gradients)
    self.attention, self.mlp = Attention(*kinds), GatedMLP(*kinds)

  def project(self, x, rotation: attention.Rotation):
    return self.attention.project(self.input_norm(x), rotation)

  def finish(self, x, attended):
    """Residual and MLP: x [B, T, D], attended [B, T, N, H] -> [B, T, D]."""
    x = ad_checkpoint.checkpoint_name(x + self.attention.o(attended), "residual")
    x = x + self.mlp(self.post_attention_norm(x))
    return nn.with_logical_constraint(x, ("batch", "length", "features"))


@struct.dataclass
class Layout:
  """What every layer is told about the tokens, besides their activations."""

  streams: dict[str, types.Tokens | None]  # by expert, without embeddings and positions
  rotations: dict[str, attention.Rotation | None]  # of the streams' positions
  context_orders: tuple[chex.Array, ...]  # of the cached keys of each part, [Bc, S] int32
  keep_kv: bool = struct.field(pytree_node=False)  # whether layers return their keys and values
  one_reach: bool = struct.field(pytree_node=False, default=False)  # see `attention.attend`


class Block(nn.Module):
  """One decoder layer over a stream for each expert."""

  config: config_lib.LLMConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lora: layers.Lora | None = None
  lowering: lowering_lib.Lowering = lowering_lib.Lowering()

  def setup(self):
    kinds = (
      self.config, self.dtype, self.param_dtype, self.lora, self.lowering.own_gradients
    )
    self.und, self.gen = Expert(*kinds), Expert(*kinds)

  def __call__(self, xs, context_kvs, layout: Layout):
    """xs {expert: [B, T, D] or None}, context_kvs (k, v) [Bc, K, S, H] each -> (xs, kv or None)."""
    # In this order everywhere: a dict that has been through a pytree comes back sorted.
    streams = {e: layout.streams[e] for e in EXPERTS if layout.streams[e] is not None}
    experts = {"und": self.und, "gen": self.gen}
    with jax.named_scope("project"):
      projected = [experts[e].project(xs[e], layout.rotations[e]) for e in streams]
    q, k, v = map(_join, zip(*projected), (1, 2, 2))
    parts = [attention.Keys(k, v, _join([s.order for s in streams.values()]))]
    parts += [attention.Keys(*kv, order) for kv, order in zip(context_kvs, layout.context_orders)]
    with jax.named_scope("attend"):
      reach = _join([s.reach for s in streams.values()])
      out = attention.attend(
        q, reach, parts, precision=layers.matmul_precision(self.dtype),
        backend=self.lowering.attention, one_reach=layout.one_reach,
      )
    lengths = [projection[0].shape[1] for projection in projected]
    outs = [out] if len(lengths) == 1 else jnp.split(out, lengths[:1], axis=1)
    with jax.named_scope("finish"):
      xs = xs | {e: experts[e].finish(xs[e], attended) for e, attended in zip(streams, outs)}
    return xs, (k, v) if layout.keep_kv else None


def _join(arrays, axis: int = 1):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)

