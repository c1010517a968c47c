"""Rewards of pixels alone, which ignore the prompt: brightness and jpeg_size."""

from __future__ import annotations

from collections.abc import Sequence
import io

import numpy as np
import PIL.Image

from unigrpo_jax.rewards import base, making


@making.register("brightness")
def brightness(samples: Sequence[base.Sample]) -> np.ndarray:
  """Mean of all pixels and channels, from 0 (black) to 1 (white): [N] float32."""
  return np.array([sample.image.mean() / 255 for sample in samples], np.float32)


@making.register("jpeg_size")
def jpeg_size(samples: Sequence[base.Sample], *, quality: int = 95) -> np.ndarray:
  """Size of the picture as JPEG of `quality` 1 to 95, in kilobytes (1000 bytes): [N] float32.

  A positive weight rewards detail, a negative one compressibility. Source: the
  (in)compressibility tasks of DDPO, Black et al. (arXiv 2305.13301), section 5.1.
  """
  sizes = []
  for sample in samples:
    file = io.BytesIO()
    PIL.Image.fromarray(sample.image).save(file, "JPEG", quality=quality)
    sizes.append(file.tell() / 1000)
  return np.array(sizes, np.float32)
