"""The small layers that the networks share, each with logical axis names on its parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

# Qwen2's `initializer_range`; only training from nothing sees it.
_INIT = nn.initializers.normal(0.02)


def matmul_precision(dtype):
  """Full float32 products where float32 was asked for (a TPU would round them to bf16)."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def at_least_float32(dtype):
  """The dtype of what bfloat16 would blur: float32, or float64 where that was asked for."""
  return jnp.promote_types(dtype, jnp.float32)


LORA_DOWN, LORA_UP = "lora_down", "lora_up"


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adaptation (Hu et al. 2022): W + (alpha / rank) A B, with B = 0 at the start."""

  rank: int
  alpha: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, kernel, inputs: int):
  """x [..., *in] times kernel [*in, *out], exact in float32; `inputs` axes are contracted.

  A dot_general with a gradient of its own, for CPUs: of the two operands of the kernel's gradient
  it transposes the narrower one. JAX's transposes that of the output, and XLA's CPU backend then
  writes it, and whatever it was computed from, in transposed order too.
  """
  return _contract(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs))


def _contract(a, b, a_axes, b_axes, precision=jax.lax.Precision.HIGHEST, out_dtype=None):
  axes = ((tuple(a_axes), tuple(b_axes)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=out_dtype)


def _product_forward(x, kernel, inputs):
  return product(x, kernel, inputs), (x, kernel)


def _product_backward(inputs, residuals, dy):
  x, kernel = residuals
  outputs, rows = kernel.ndim - inputs, range(x.ndim - inputs)
  dx = _contract(dy, kernel, range(dy.ndim - outputs, dy.ndim), range(inputs, kernel.ndim))
  if math.prod(kernel.shape[:inputs]) <= math.prod(kernel.shape[inputs:]):
    return dx, _contract(x, dy, rows, rows)
  dkernel = _contract(dy, x, rows, rows)
  return dx, jnp.transpose(dkernel, (*range(outputs, kernel.ndim), *range(outputs)))


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def gated(gate, up):
  """silu(gate) * up, with a gradient that keeps its arguments alone; for CPUs, see `product`."""
  return nn.silu(gate) * up


def _gated_backward(residuals, dy):
  gate, up = residuals
  sigmoid = nn.sigmoid(gate)
  dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
  return dgate, dy * gate * sigmoid


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


class Linear(nn.Module):
  """Contraction of the last axes of x with a kernel of any rank."""

  features: Sequence[int]  # output axes
  axes: tuple[str | None, ...]  # logical name of every kernel axis, input axes first
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32  # of the operands
  param_dtype: jnp.dtype = jnp.float32
  out_dtype: jnp.dtype | None = None  # of the product; None is `dtype`
  zero: bool = False  # starts the kernel at zero (output heads of a flow model)
  lora: Lora | None = None
  own_gradient: bool = False  # that of `product`; in float32

  @nn.compact
  def __call__(self, x):
    inputs = len(self.axes) - len(self.features)
    shape = (*x.shape[x.ndim - inputs :], *self.features)
    init = nn.initializers.zeros if self.zero else _INIT
    kernel = self.param(
      "kernel", nn.with_logical_partitioning(init, self.axes), shape, self.param_dtype
    )
    operands = (x.astype(self.dtype), kernel.astype(self.dtype))
    if self.own_gradient:
      y = product(*operands, inputs)
    else:
      y = _contract(
        *operands, range(x.ndim - inputs, x.ndim), range(inputs), matmul_precision(self.dtype),
        self.out_dtype,
      )
    if self.lora is not None:
      y += self._adapter(x, inputs, shape).astype(y.dtype)
    if self.use_bias:
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[inputs:])
      y += self.param("bias", bias_init, tuple(self.features), self.param_dtype).astype(y.dtype)
    return y

  def _adapter(self, x, inputs: int, shape):
    """(alpha / rank) x A B, over the same axes as the kernel."""
    rank, axes = self.lora.rank, self.axes
    down_init = nn.with_logical_partitioning(
      nn.initializers.normal(1 / rank), (*axes[:inputs], None)
    )
    up_init = nn.with_logical_partitioning(nn.initializers.zeros, (None, *axes[inputs:]))
    down = self.param(LORA_DOWN, down_init, (*shape[:inputs], rank), self.param_dtype)
    up = self.param(LORA_UP, up_init, (rank, *shape[inputs:]), self.param_dtype)
    precision = matmul_precision(self.dtype)
    x = _contract(
      x.astype(self.dtype), down.astype(self.dtype), range(x.ndim - inputs, x.ndim), range(inputs),
      precision,
    )
    y = jnp.tensordot(x, up.astype(self.dtype), axes=1, precision=precision)
    return y * (self.lora.alpha / rank)


def merge_lora(params: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
  """Adds the adapters into their kernels: the same network as plain parameters."""
  merged = {
    name: merge_lora(value, lora) if isinstance(value, Mapping) else value
    for name, value in params.items() if name not in (LORA_DOWN, LORA_UP)
  }
  if LORA_DOWN in params:
    down, up = params[LORA_DOWN], params[LORA_UP]
    # The kernels of a scanned stack have a leading axis of layers.
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest"))
    merged["kernel"] = params["kernel"] + product(down, up) * (lora.alpha / lora.rank)
  return merged


def without(params: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
  """A tree of parameters without what lies under any of `names`."""
  return {
    name: without(value, names) if isinstance(value, Mapping) else value
    for name, value in params.items() if name not in names
  }


def path_keys(path: Sequence[Any]) -> list[str]:
  """The names along the path of a parameter in a tree, of `jax.tree_util`.

  Without the entries that are none: of parameters boxed with their axis names, and of `Unstacked`.
  """
  return [entry.key for entry in path if hasattr(entry, "key")]


# What a layer keeps for its backward pass besides its input, by the name of the policy: the rest is
# computed again. Names are those of `checkpoint_name` in `mot` and `kernels`.
_only = jax.checkpoint_policies.save_only_these_names
REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": _only("residual", "attention"),
  "mlp": _only("residual", "mlp"),
  "layer": _only("residual", "attention", "mlp"),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "none": None,  # nothing is computed again
}


def scan_layers(block, length: int, *, in_axes, remat: str = "full", unroll: bool = False):
  """`length` layers of `block`: scanned, so that they trace as one; `remat` is one of `REMAT`.

  With `unroll` the compiled program has the layers one after the other in place of a loop.
  """
  policy = REMAT[remat]
  if policy is not None:
    block = nn.remat(block, prevent_cse=False, policy=policy)
  return nn.scan(
    block,
    variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=length,
    unroll=length if unroll else 1, metadata_params={nn.PARTITION_NAME: "layers"},
  )


@struct.dataclass
class Unstacked:
  """One array [...] of each layer, in the place of one [layers, ...]."""

  arrays: tuple[jax.Array, ...]


def _map_unstacked(fn, tree):
  return jax.tree.map(fn, tree, is_leaf=lambda leaf: isinstance(leaf, Unstacked))


def unstack(tree):
  """Takes the layers of a tree's arrays [layers, ...] apart; those that are stay.

  Their gradients are put together once. That of an index is as large as the whole stack, and
  those of all layers are added up.
  """
  def apart(leaf):
    if isinstance(leaf, Unstacked):
      return leaf
    parts = jax.lax.split(leaf, (1,) * len(leaf))
    return Unstacked(tuple(jnp.squeeze(part, 0) for part in parts))

  return _map_unstacked(apart, tree)


def of_layer(tree, layer: int):
  """One layer's arrays of what `unstack` returns."""
  return _map_unstacked(lambda leaf: leaf.arrays[layer], tree)


def stack(tree):
  """Undoes `unstack`."""
  return _map_unstacked(lambda leaf: jnp.stack(leaf.arrays), tree)


class Table(nn.Module):
  """An embedding table, [rows, features]; `axes` names both."""

  rows: int
  features: int
  axes: tuple[str | None, str | None]
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  init: nn.initializers.Initializer = _INIT

  @nn.compact
  def __call__(self, ids):
    table = self.param(
      "embedding", nn.with_logical_partitioning(self.init, self.axes),
      (self.rows, self.features), self.param_dtype,
    )
    # An id outside the table gives NaN, where clipping would quietly train on the last row.
    # Rows are gathered whole: where width and batch lie along the same mesh axis, the partitioner
    # would otherwise replicate the gathered activations instead of the table.
    table = nn.with_logical_constraint(table, (self.axes[0], None))
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, statistics in float32 (Zhang and Sennrich 2019)."""

  epsilon: float
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  axis: str | None = "norm"

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      "scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)),
      (x.shape[-1],), self.param_dtype,
    )
    x = x.astype(at_least_float32(x.dtype))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    # The official code rounds before it multiplies by the weight.
    return x.astype(self.dtype) * scale.astype(self.dtype)


class TwoLayer(nn.Module):
  """fc2(activation(fc1(x))): the time embedder and the ViT connector."""

  features: int
  activation: str
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    activation = {"silu": nn.silu, "gelu_tanh": lambda y: nn.gelu(y, approximate=True)}
    x = Linear((self.features,), (None, "embed"), name="fc1", **kinds)(x)
    x = activation[self.activation](x)
    return Linear((self.features,), ("embed", None), name="fc2", **kinds)(x)


def time_features(t, size: int = 256):
  """[cos(t f), sin(t f)], f_k = 10000^(-2k/size): [..., size] float32, t in [0, 1] unscaled."""
  half = size // 2
  frequency = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sincos_table(side: int, features: int) -> np.ndarray:
  """The fixed 2-D table [side * side, features]: first half encodes the column, second the row.

  Each half is [sin(p w), cos(p w)] with w_k = 10000^(-k / (features/4)). float64, then float32.
  """
  quarter = features // 4
  omega = 10_000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
  row, column = np.divmod(np.arange(side * side), side)
  encode = lambda place: np.concatenate(
    [np.sin(place[:, None] * omega), np.cos(place[:, None] * omega)], axis=1
  )
  return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def sincos_init(side: int):
  """Initializer that fills a table with `sincos_table`."""
  return lambda key, shape, dtype: jnp.asarray(sincos_table(side, shape[1]), dtype)
