"""Attention by kernels that never hold the scores in a device's main memory.

The plain path writes and reads [N, T, S] float32 scores several times: at 1024 pixels 2.6 GB an
image and layer, which takes longer than the products themselves. A kernel goes through the keys in
blocks with a running softmax, and computes the scores again backward (Dao et al. 2022).
"""

from __future__ import annotations

import math

import chex
from flax import linen as nn
import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unigrpo_jax import types
from unigrpo_jax.models import plain

# Rows of keys are repeated for the rows of queries that share them, and the parts of the keys
# concatenated: a temporary of one layer, 12 MB an image at 1024 pixels. Partial softmaxes could not
# be merged instead: the kernels have no gradient for the log-sum-exp.

# Fewer queries are the plain path's: their scores are small, and padding to a block is not.
LEAST_QUERIES = 512
# Block sizes are multiples of a register's lanes.
LANES = 128
# Largest blocks. Each block of queries reads all keys from HBM, and has to be large enough for its
# products to take longer than that. The backward pass holds four float32 arrays of a block of
# queries by a block of keys in VMEM, 12 MB; compiled for v5p and v6e.
QUERY_BLOCK = 1536
KEY_BLOCK = 512


def cudnn(q, reach, parts, *, implementation: str = "cudnn"):
  """Attention by cuDNN's kernel for GPUs, which takes any mask; see `attention.attend`.

  The mask is one for all heads, [B, 1, T, S] in the dtype of `q`.
  """
  chex.assert_rank([q, reach], [4, 2])
  length = q.shape[1]
  k, v, order = plain.own_keys(parts, q.shape[0])
  k, v = (jnp.moveaxis(a, 1, 2) for a in (k, v))
  visible = order[:, None, :] <= reach[:, :, None]
  # With a mask, cuDNN has no gradient for odd lengths.
  q, k, v, mask = (_pad(a, 2) for a in (q, k, v, visible))
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % 2)))[:, None]
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
  return jnp.where(visible.any(-1)[..., None, None], out[:, :length], 0)


def splash(q, reach, parts, *, interpret: bool = False):
  """Attention by jax's Pallas kernel for TPUs: in each row, queries see the same keys or none.

  It masks by segment, so it serves images (noisy, clean, or cut into patches); text after its
  context and packed sequences stay with the plain path. Under a mesh each device attends for its
  own rows and heads. Arguments and result are those of `attention.attend`; `reach` is the same
  for all of a row but for `types.BLIND`. With `interpret` it runs on a device that is no TPU.
  """
  chex.assert_rank([q, reach], [4, 2])
  rows, parts = q.shape[0], [tuple(part) for part in parts]
  mesh = jax.sharding.get_abstract_mesh()
  local = lambda q, reach, parts: _splash_on_one(q, reach, parts, interpret)
  if mesh.empty or mesh.size == 1:
    return local(q, reach, parts)
  batch = _mesh_axes(mesh, "batch", rows)
  heads = _mesh_axes(mesh, "kv_heads", parts[0][0].shape[1])
  # Shared keys too few to be divided over the devices are repeated before they are divided.
  parts = [
    part if _mesh_axes(mesh, "batch", len(part[2])) == batch else plain.own_keys([part], rows)
    for part in parts
  ]
  by_row, of_keys = PartitionSpec(batch), PartitionSpec(batch, heads)
  of_queries = PartitionSpec(batch, None, heads)
  return jax.shard_map(
    local, in_specs=(of_queries, by_row, [(of_keys, of_keys, by_row)] * len(parts)),
    out_specs=of_queries,
    # The kernel does not say how its outputs vary over the mesh.
    check_vma=False,
  )(q, reach, parts)


def _mesh_axes(mesh, name: str, size: int) -> tuple[str, ...] | None:
  """The mesh axes of a logical axis, or None where they do not divide `size`."""
  axes = nn.logical_to_mesh_axes((name,))[0] or ()
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _splash_on_one(q, reach, parts, interpret: bool):
  """`splash` on one device."""
  rows, length, num_heads, head_dim = q.shape
  k, v, order = plain.own_keys(parts, rows)
  visible = order <= reach.max(axis=1, keepdims=True)  # [B, S]
  query_block = block_size(length, QUERY_BLOCK)
  key_block = block_size(order.shape[1], KEY_BLOCK)
  # The kernel does not scale. The second rounding of q is as large as the first one was.
  q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
  q = _pad(jnp.moveaxis(q, 1, 2), query_block, axis=2)
  k, v = (_pad(a, key_block, axis=2) for a in (k, v))
  shape = (q.shape[2], k.shape[2])
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([splash_attention.FullMask(shape)] * num_heads),
    block_sizes=splash_attention.BlockSizes(
      block_q=query_block, block_kv=key_block,
      block_q_dkv=query_block, block_kv_dkv=key_block,
      block_q_dq=query_block, block_kv_dq=key_block,
    ),
    head_shards=1, q_seq_shards=1, interpret=interpret, residual_checkpoint_name="attention",
  )
  segments = splash_attention.SegmentIds(
    q=jnp.ones((rows, shape[0]), jnp.int32),
    kv=_pad(visible.astype(jnp.int32), key_block),
  )
  out = jnp.moveaxis(jax.vmap(kernel)(q, k, v, segments), 1, 2)[:, :length]
  # Of a row without visible keys the kernel gives the mean of all.
  sees = (reach > types.BLIND) & visible.any(axis=1, keepdims=True)
  return jnp.where(sees[..., None, None], out, 0)


def block_size(length: int, largest: int) -> int:
  """The multiple of `LANES` up to `largest` that goes through `length` at the least cost.

  A block costs its size and an overhead of about `LANES`, so that 4,098 queries are not 33 blocks
  of 128 but 3 of 1,408.
  """
  cost = lambda size: -(-length // size) * (size + LANES)
  return min(range(LANES, largest + 1, LANES), key=lambda size: (cost(size), -size))


def _pad(a, multiple: int, axis: int = 1):
  """`a` with zeros up to a multiple of positions along an axis."""
  room = [(0, 0)] * a.ndim
  room[axis] = (0, -a.shape[axis] % multiple)
  return jnp.pad(a, room)
