"""The FLUX autoencoder: images to latents and back. Everything is float32, images are NHWC.

Pixels are in [-1, 1]. A latent in *model units* is `scale * (moment - shift)`, about unit variance;
it is what the flow transports. Only images of one size belong in a batch: padding smaller ones
changes their latents, because convolutions near the border, group norms and the mid attention see
it. H, W are pixels; h, w latents (H / downsample), of z channels; p is the latent patch side.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.models import attention
from unigrpo_jax.models import config as config_lib

# Without HIGHEST a TPU would multiply these float32 operands in one bf16 pass.
PRECISION = jax.lax.Precision.HIGHEST

# The mid attention of a 1024 px image has 16384 positions: all scores would be 1 GB an image. A
# block of this many queries holds a thirty-second of it.
QUERY_BLOCK = 512

# Two-pass variance: the one-pass form cancels on nearly constant images, where it matters most.
group_norm = functools.partial(
  nn.GroupNorm, num_groups=config_lib.GROUPS, epsilon=1e-6, dtype=jnp.float32,
  use_fast_variance=False,
)


def _convolve(x, kernel, stride=1, padding="SAME"):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=PRECISION,
  )


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[M, H, W, C] * [k, k, C, D] -> [M, H, W, D], k odd, zeros around the images.

  Its gradient in `x` is a convolution with the turned kernel, written as one: within a loop XLA's
  own takes some forty times as long on a CPU.
  """
  return _convolve(x, kernel)


def _convolve_backward(inputs, cotangent):
  x, kernel = inputs
  turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  of_kernel, = jax.linear_transpose(functools.partial(_convolve, x), kernel)(cotangent)
  return convolve(cotangent, turned), of_kernel


convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), _convolve_backward)


class Conv(nn.Module):
  """A convolution with a bias that keeps the size of images, or with stride 2 halves it."""

  features: int
  side: int = 3  # of the kernel
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[M, H, W, C] -> [M, H / stride, W / stride, features]."""
    shape = (self.side, self.side, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(x.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
    if self.stride == 1:
      return convolve(x, kernel) + bias
    # Padded on the right and bottom only: symmetric padding would shift the latent grid by half a
    # pixel a level and still look almost right.
    return _convolve(x, kernel, self.stride, ((0, 1), (0, 1))) + bias


conv_1x1 = functools.partial(Conv, side=1)


class ResBlock(nn.Module):
  """Two 3x3 convolutions, each after group norm and SiLU, around a shortcut."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[M, H, W, C] -> [M, H, W, channels]."""
    y = Conv(self.channels, name="conv1")(nn.silu(group_norm(name="norm1")(x)))
    y = Conv(self.channels, name="conv2")(nn.silu(group_norm(name="norm2")(y)))
    if x.shape[-1] != self.channels:
      x = conv_1x1(self.channels, name="nin_shortcut")(x)
    return x + y


class MidAttention(nn.Module):
  """One attention head as wide as the layer, over all positions of an image."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[M, h, w, C] -> [M, h, w, C]."""
    num_images, height, width, channels = x.shape
    y = group_norm(name="norm")(x)
    # [M, h, w, C] -> [M, h w, 1, C]: a single head.
    q, k, v = (
      conv_1x1(channels, name=name)(y).reshape(num_images, height * width, 1, channels)
      for name in ("q", "k", "v")
    )
    order = jnp.zeros((num_images, height * width), jnp.int32)
    reach = jnp.full_like(order, types.EVERYTHING)
    out = attention.attend(
      q, reach, [attention.Keys.of(k, v, order)], precision=PRECISION, query_block=QUERY_BLOCK
    )
    return x + conv_1x1(channels, name="proj_out")(out.reshape(x.shape))


class Encoder(nn.Module):
  """Pixels to the moments of the latent posterior."""

  config: config_lib.VAEConfig

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """[M, H, W, in_channels] -> [M, h, w, 2 z]: means, then log-variances."""
    config = self.config
    x = Conv(config.ch, name="conv_in")(images)
    for i, multiple in enumerate(config.ch_mult):
      channels = config.ch * multiple
      for j in range(config.num_res_blocks):
        x = ResBlock(channels, name=f"down_{i}_block_{j}")(x)
      if i < len(config.ch_mult) - 1:
        x = Conv(channels, stride=2, name=f"down_{i}_downsample")(x)
    x = ResBlock(channels, name="mid_block_1")(x)
    x = MidAttention(name="mid_attention")(x)
    x = ResBlock(channels, name="mid_block_2")(x)
    return Conv(2 * config.z_channels, name="conv_out")(nn.silu(group_norm(name="norm_out")(x)))


# Of a block that is differentiated its input alone is kept. At 1024 px one float32 array of the
# outermost level is 512 MiB an image, and a block makes seven.
RematResBlock, RematMidAttention = nn.remat(ResBlock), nn.remat(MidAttention)


class Decoder(nn.Module):
  """Latents (posterior units) to pixels. Nothing bounds the result to [-1, 1].

  Each block is computed again in the backward pass; where there is none, that changes nothing.
  """

  config: config_lib.VAEConfig

  @nn.compact
  def __call__(self, latents: jax.Array) -> jax.Array:
    """[M, h, w, z] -> [M, H, W, out_channels]."""
    config = self.config
    channels = config.ch * config.ch_mult[-1]
    x = Conv(channels, name="conv_in")(latents)
    x = RematResBlock(channels, name="mid_block_1")(x)
    x = RematMidAttention(name="mid_attention")(x)
    x = RematResBlock(channels, name="mid_block_2")(x)
    for i, multiple in reversed(list(enumerate(config.ch_mult))):
      channels = config.ch * multiple
      for j in range(config.num_res_blocks + 1):
        x = RematResBlock(channels, name=f"up_{i}_block_{j}")(x)
      if i > 0:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = Conv(channels, name=f"up_{i}_upsample")(x)
    return nn.remat(Decoder._to_pixels)(self, x)

  def _to_pixels(self, x: jax.Array) -> jax.Array:
    y = nn.silu(group_norm(name="norm_out")(x))
    return Conv(self.config.out_channels, name="conv_out")(y)


class VAE(nn.Module):
  """The autoencoder, as shipped in `ae.safetensors`. Frozen; a gradient flows through it at most.

  At 1024 px one float32 activation of the outermost level is 512 MiB an image. The parameters
  (84 M) carry no logical axes: every chip holds them whole.
  """

  config: config_lib.VAEConfig

  def setup(self) -> None:
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [M, H, W, in_channels] -> mean and log-variance of the posterior, [M, h, w, z] each.

    H and W are multiples of `config.downsample`; the moments are float32, in posterior units.
    """
    with jax.named_scope("vae_encode"):
      mean, logvar = jnp.split(self.encoder(images.astype(jnp.float32)), 2, axis=-1)
    return mean, logvar

  def decode(self, latents: jax.Array) -> jax.Array:
    """[M, h, w, z] in model units -> images [M, H, W, out_channels] float32, not clipped."""
    with jax.named_scope("vae_decode"):
      latents = latents.astype(jnp.float32)
      return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes and decodes the posterior mean: touches every parameter, for initialisation."""
    mean, logvar = self.encode(images)
    scale, shift = self.config.scale_factor, self.config.shift_factor
    return self.decode(latents_from_moments(mean, logvar, None, scale=scale, shift=shift))


def latents_from_moments(
  mean: jax.Array, logvar: jax.Array, noise: jax.Array | None, *, scale: float, shift: float
) -> jax.Array:
  """A latent in model units: `scale * (mean + exp(logvar / 2) * noise - shift)`.

  The log-variance is not clamped, as officially. noise None gives the mean; BAGEL always samples.
  """
  mean = mean.astype(jnp.float32)
  if noise is not None:
    mean = mean + jnp.exp(0.5 * logvar.astype(jnp.float32)) * noise.astype(jnp.float32)
  return scale * (mean - shift)


def to_uint8(images: jax.Array) -> jax.Array:
  """Pixels in [-1, 1] to uint8 `trunc(255 clip(x / 2 + 1/2, 0, 1))`: truncated, not rounded."""
  unit = jnp.clip(0.5 * images.astype(jnp.float32) + 0.5, 0.0, 1.0)
  return (255.0 * unit).astype(jnp.uint8)


def pack_latents(latents: jax.Array, patch_size: int) -> jax.Array:
  """[M, h p, w p, z] -> tokens [M, h w, p p z]: row-major grid, features (py, px, channel)."""
  num_images, height, width, channels = latents.shape
  p = patch_size
  h, w = height // p, width // p
  # [M, h, py, w, px, z] -> [M, h, w, py, px, z]
  grid = latents.reshape(num_images, h, p, w, p, channels).transpose(0, 1, 3, 2, 4, 5)
  return grid.reshape(num_images, h * w, p * p * channels)


def unpack_latents(
  tokens: jax.Array, height_tokens: int, width_tokens: int, patch_size: int
) -> jax.Array:
  """Inverse of `pack_latents`: [M, h w, p p z] -> [M, h p, w p, z]."""
  num_images, _, features = tokens.shape
  h, w, p = height_tokens, width_tokens, patch_size
  # [M, h, w, py, px, z] -> [M, h, py, w, px, z]
  grid = tokens.reshape(num_images, h, w, p, p, features // (p * p)).transpose(0, 1, 3, 2, 4, 5)
  return grid.reshape(num_images, h * p, w * p, features // (p * p))
