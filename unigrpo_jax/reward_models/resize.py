"""A differentiable resize that Pillow's bicubic agrees with to about a level of 255."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax.models import layers

SHARPNESS = -0.5  # a of Keys's cubic (1981); Pillow's, and PyTorch's where it antialiases


@functools.lru_cache(maxsize=64)
def weights(size: int, new_size: int) -> np.ndarray:
  """What each new pixel takes of each old one along an axis: [new_size, size] float64, rows sum to
  1.

  Where an image becomes smaller the cubic is as much wider (antialiasing): without, thin lines
  would vanish or double.
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
  a, x = SHARPNESS, np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize(
  pixels: jax.Array, height: int, width: int, bounds: tuple[float, float] | None = (-1.0, 1.0)
) -> jax.Array:
  """Pixels [..., H, W, C] -> [..., height, width, C], in their dtype, at least float32.

  Bicubic with antialiasing, first along the width, then along the height, clipped to `bounds` after
  each: Pillow clips there too, but rounds as well, which would leave no gradient. `bounds` None
  clips nothing. An axis that keeps its size is not touched, nor clipped.
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
