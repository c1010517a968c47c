"""Image statistics that show when a reward is gamed: colours, contrast, fine texture, diversity.

Letters: N images, H, W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import math

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import verifier

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709, of red, green, blue
HALF_NYQUIST = 0.25  # cycles a pixel
# The statistics of `of_image`; "unknown" uses IconWorld's verifier.
NAMES = ("saturation", "luminance_std", "high_frequency", "clipped", "entropy", "unknown")


def of_image(image: np.ndarray) -> dict[str, float]:
  """{name of NAMES: value} of an image, [H, W, 3] uint8.

  saturation: mean over pixels of (max - min) / max over channels; 0 for black.
  luminance_std: standard deviation of the luminance, in [0, 1].
  high_frequency: share of the luminance's spectral power (without its mean) above half the Nyquist
    frequency; 0 for an image of one luminance.
  clipped: share of pixels with a channel at 0 or 255, plain background left out.
  entropy: of the colours at 4 bits per channel, in bits per pixel.
  unknown: number of blobs that are no icon; specks below a blob's size are added up, and count one
    for each blob's size.
  """
  pixels = image.astype(np.float64) / 255
  high, low = pixels.max(axis=-1), pixels.min(axis=-1)
  luminance = pixels @ LUMINANCE
  power = np.abs(np.fft.fft2(luminance - luminance.mean())) ** 2
  frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, luminance.shape), indexing="ij"))
  extreme = ((image == 0) | (image == 255)).any(axis=-1) & ~verifier.plain_background(image)
  coarse = (image >> 4).astype(int) @ np.array([256, 16, 1])
  _, counts = np.unique(coarse, return_counts=True)
  shares = counts / counts.sum()
  # The power of an image of one luminance is only rounding.
  total = power.sum() if luminance.std() > 1e-9 else 0.0
  return {
    "saturation": float(((high - low) / np.maximum(high, 1 / 255)).mean()),
    "luminance_std": float(luminance.std()),
    "high_frequency": float(power[frequency > HALF_NYQUIST].sum() / total) if total else 0.0,
    "clipped": float(extreme.mean()),
    "entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
    "unknown": float(
      sum(item.kind == rules.UNKNOWN for item in verifier.detect(image))
    ),
  }


def quick(image: np.ndarray) -> dict[str, float]:
  """Three statistics of an image, [H, W, 3] uint8; about 30 ms for 1024 x 1024 pixels.

  saturation: mean over pixels of (max - min) / max over channels; 0 for black.
  sharpness: standard deviation of the luminance's Laplacian, the luminance in [0, 1].
  clipped: share of pixels with a channel at 0 or 255.
  """
  red, green, blue = (np.ascontiguousarray(image[..., channel]) for channel in range(3))
  high = np.maximum(np.maximum(red, green), blue)
  low = np.minimum(np.minimum(red, green), blue)
  luminance = sum(
    np.float32(weight / 255) * channel for weight, channel in zip(LUMINANCE, (red, green, blue))
  )
  middle = luminance[1:-1, 1:-1]
  around = luminance[:-2, 1:-1] + luminance[2:, 1:-1] + luminance[1:-1, :-2] + luminance[1:-1, 2:]
  return {
    "saturation": float(((high - low) / np.maximum(high, 1).astype(np.float32)).mean()),
    "sharpness": float((around - 4 * middle).std()) if middle.size else 0.0,
    "clipped": float(((high == 255) | (low == 0)).mean()),
  }


def diversity(latents: np.ndarray, prompts: Sequence[Hashable]) -> float:
  """Mean Euclidean distance of two images of a prompt, averaged over prompts.

  Args:
    latents: of the images, [N, ...].
    prompts: of the images, [N].

  Returns:
    The mean over prompts with at least two images; NaN where there is none.
  """
  flat = np.asarray(latents, float).reshape(len(latents), -1)
  by_prompt: dict[Hashable, list[int]] = {}
  for row, prompt in enumerate(prompts):
    by_prompt.setdefault(prompt, []).append(row)
  means = []
  for rows in by_prompt.values():
    distances = np.linalg.norm(flat[rows][:, None] - flat[rows], axis=-1)
    if len(rows) > 1:
      means.append(distances.sum() / (len(rows) * (len(rows) - 1)))
  return float(np.mean(means)) if means else math.nan


def frechet(a: np.ndarray, b: np.ndarray) -> float:
  """The Frechet distance of two sets of features, [N, F] and [M, F], taken as normal distributions:

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

  with means m and covariances C (ddof 1).
  """
  a, b = np.asarray(a, float), np.asarray(b, float)
  c_a, c_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
  values, vectors = np.linalg.eigh(c_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  # tr (C_a C_b)^(1/2) is that of the symmetric root C_b root.
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_b @ root), 0)).sum()
  offset = a.mean(axis=0) - b.mean(axis=0)
  return float(offset @ offset + np.trace(c_a) + np.trace(c_b) - 2 * cross)
