"""How the network is written for its devices: the one place where platforms differ.

The numbers are the same up to rounding. Accelerators have kernels, and compilers that schedule a
loop over layers and fuse gradients well; a CPU has none of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from unigrpo_jax import errors

# How attention may be computed, by name: "auto" is for `choose` to decide.
ATTENTION = ("auto", "plain", "blocked", "splash", "cudnn")
# Options for a program of convolutions, by platform. On CPUs those of the library that XLA calls by
# default run on one core, those of Eigen on all. The TPU compiler spends long on each exact
# convolution: at O1 (openxla.org/xla/effort_levels) the decoder compiles in a sixth of the time or
# less, and takes 3 % longer by the compiler's own estimate. Products need what O1 leaves out.
CONVOLUTIONS = {
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}, "tpu": {"optimization_level": 19},
}
# XLA's options for a program whose products are with parameters that it gathers, by platform. For
# v5p it would cut such a product into one with each device's share, and gather a share while it
# multiplies with another; but each reads and writes the sum so far in main memory, which takes
# longer than to gather all of them first. This threshold, in MiB, says never.
GATHERED_PARAMETERS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}
# What a kernel runs on.
_PLATFORMS = {"blocked": "cpu", "splash": "tpu", "cudnn": "gpu"}


@dataclasses.dataclass(frozen=True)
class Lowering:
  """What a network's modules ask; see `choose`.

  Attributes:
    attention: one of ATTENTION but "auto"; see `attention.attend`.
    unroll: layers are compiled one after the other, not as a loop.
    unroll_gradients: so are they where a gradient is taken.
    own_gradients: products and the gated activation have gradients of their own, which write no
      wide array in transposed order (`layers.product`, `layers.gated`); in float32.
    keep_angles: cosines and sines of positions are kept in memory; see `attention.rotation`.
  """

  attention: str = "plain"
  unroll: bool = False
  unroll_gradients: bool = False
  own_gradients: bool = False
  keep_angles: bool = False


def platform(mesh: jax.sharding.Mesh) -> str:
  """That of a mesh's devices: "cpu", "gpu" or "tpu"."""
  return mesh.devices.flat[0].platform


def choose(attention: str, mesh: jax.sharding.Mesh, dtype) -> Lowering:
  """The lowering for the devices of a mesh and a dtype of activations.

  On CPUs layers are unrolled where a gradient is taken, since a loop would stack what the backward
  pass needs. Elsewhere they are a loop: it compiles sooner, and decoding would copy the whole cache
  for each layer. But over several CPU devices a loop would deadlock, since XLA does not keep the
  collectives of a loop and those beside it in order.
  `attention` is one of ATTENTION. The kernels of accelerators round the products of float32 arrays
  or do not take them, so "auto" has exact products there by the plain path. Blocks of rows are of
  one device and of float32: XLA's CPU backend has not all of their products in bfloat16.

  Raises:
    InputError: the attention asked for is none of these devices', or not of this dtype.
  """
  errors.choose("config.attention", attention, ATTENTION)
  given, exact = platform(mesh), jnp.dtype(dtype) == jnp.float32
  wanted = _PLATFORMS.get(attention, given)
  if given != wanted:
    raise errors.InputError(
      f"config.attention={attention!r} runs on a {wanted}, but the devices are {given}; set auto"
    )
  if attention in ("splash", "cudnn") and exact:
    raise errors.InputError(
      f"config.attention={attention!r} is not exact in config.dtype=float32; set plain or bfloat16"
    )
  if attention == "blocked" and mesh.size > 1:
    raise errors.InputError(
      f"config.attention='blocked' is for one device, but there are {mesh.size}; set auto"
    )
  if attention == "blocked" and not exact:
    raise errors.InputError(
      f"config.attention='blocked' is for config.dtype=float32, not {jnp.dtype(dtype)}; set auto"
    )
  on_cpu = given == "cpu"
  if attention == "auto":
    kernel = {"tpu": not exact and "splash", "cpu": exact and mesh.size == 1 and "blocked"}
    attention = kernel.get(given) or "plain"
  return Lowering(
    attention, unroll=on_cpu and mesh.size > 1, unroll_gradients=on_cpu,
    own_gradients=on_cpu and exact, keep_angles=on_cpu,
  )
