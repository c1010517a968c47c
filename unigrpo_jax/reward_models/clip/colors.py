"""The colours of objects by zero-shot CLIP ViT-L/14, for the reward `geneval`.

Source: djghosh13/geneval, `evaluation/evaluate_images.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import zlib

import jax.numpy as jnp
import numpy as np
import PIL.Image

from unigrpo_jax.geneval import classes
from unigrpo_jax.reward_models.clip import host, network
from unigrpo_jax.rewards import colors


class Colors:
  """The colour whose texts have the highest cosine with a crop; see `rewards.colors.Colors`."""

  def __init__(self, *, folder: str = "", batch_size: int = 16, dtype: str = "float32"):
    """Loads the folder of a CLIP, and compiles; arguments as in `host.ClipScore`."""
    clip = host.Clip.open(folder, host.LARGE, dtype)
    features = lambda name: lambda params, rows: network.unit(
      clip.model.apply({"params": params}, rows, method=name)
    )
    self._clip = clip
    self._images = clip.compile(
      features("image_features"), [(clip.pixel_shape, jnp.float32)], batch_size
    )
    self._texts = clip.compile(
      features("text_features"), [(clip.text_shape, jnp.int32)], len(_texts("thing"))
    )
    self._weights_of: dict[str, np.ndarray] = {}  # by class
    sums = json.dumps(clip.settings["checksums"], sort_keys=True)
    self.name = f"clip {host.LARGE.hub} {zlib.crc32(sums.encode()):08x} {dtype}"

  def __call__(self, crops: Sequence[PIL.Image.Image], kind: str) -> list[str]:
    """The colour, of `classes.COLORS`, of each crop of an object of class `kind`."""
    if not crops:
      return []
    seen = self._images(np.stack([self._clip.pixels(np.asarray(crop)) for crop in crops]))
    if kind not in self._weights_of:
      self._weights_of[kind] = self._weights(kind)
    best = (seen @ self._weights_of[kind].T).argmax(axis=1)
    return [classes.COLORS[i] for i in best]

  def _weights(self, kind: str) -> np.ndarray:
    """Classifier weights of the 10 colours, [10, P]: unit means of their texts' unit features."""
    read = self._texts(self._clip.words(_texts(kind))).reshape(len(classes.COLORS), 3, -1)
    mean = read.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def _texts(kind: str) -> list[str]:
  """The texts of all colours of a class, colour by colour."""
  return [text for color in classes.COLORS for text in colors.templates(color, kind)]
