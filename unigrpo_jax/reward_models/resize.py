"""A differentiable bicubic resize; it agrees with Pillow's to about one level of 255."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax.models import layers

SHARPNESS = -0.5  # a of Keys's cubic (1981), as in Pillow, and in PyTorch with antialiasing


@functools.lru_cache(maxsize=64)
def weights(size: int, new_size: int) -> np.ndarray:
  """The weight of each old pixel in each new one along an axis: [new_size, size] float64.

  Rows sum to 1. Where the image shrinks, the cubic is widened by the same factor (antialiasing), or
  thin lines would vanish or double.
  """
  scale = size / new_size
  width = max(scale, 1.0)
  center = (np.arange(new_size)[:, None] + 0.5) * scale
  # Pixels whose centre is within two widths, cut at the borders.
  first = np.maximum((center - 2 * width + 0.5).astype(int), 0)
  last = np.minimum((center + 2 * width + 0.5).astype(int), size)
  pixel = np.arange(size)[None]
  taps = _cubic((pixel + 0.5 - center) / width) * ((first <= pixel) & (pixel < last))
  return taps / taps.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys's cubic convolution kernel."""
  a, x = SHARPNESS, np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize(
  pixels: jax.Array, height: int, width: int, bounds: tuple[float, float] | None = (-1.0, 1.0)
) -> jax.Array:
  """Pixels [..., H, W, C] -> [..., height, width, C], in their dtype, but at least float32.

  Bicubic with antialiasing, along the width and then along the height. After each, values are
  clipped to `bounds` (None: not at all). Pillow does the same, but also rounds, which would leave
  no gradient. An axis that keeps its size is neither resized nor clipped.
  """
  pixels = pixels.astype(layers.at_least_float32(pixels.dtype))
  for axis, new_size in ((-2, width), (-3, height)):
    size = pixels.shape[axis]
    if size == new_size:
      continue
    taps = jnp.asarray(weights(size, new_size), pixels.dtype)
    letters = "oi,...hic->...hoc" if axis == -2 else "oi,...iwc->...owc"
    pixels = jnp.einsum(letters, taps, pixels, precision=jax.lax.Precision.HIGHEST)
    if bounds is not None:
      pixels = jnp.clip(pixels, *bounds)
  return pixels
