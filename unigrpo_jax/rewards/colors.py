"""The colours of objects that a detector found, for the reward `geneval`.

Source: djghosh13/geneval, `evaluation/evaluate_images.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from unigrpo_jax.geneval import classes, rules
from unigrpo_jax.rewards import making

NAMED = {
  "hsv": "unigrpo_jax.rewards.colors:Hsv",
  "clip": "unigrpo_jax.reward_models.clip.colors:Colors",
}
FILL = (0x99, 0x99, 0x99)  # what the surroundings of a mask become


class Colors(Protocol):
  """Interface of a method that names the colours of objects.

  Attributes:
    name: method and weights, for reports.
  """

  name: str

  def __call__(self, crops: Sequence[PIL.Image.Image], kind: str) -> list[str]:
    """The colour of each crop of an object of class `kind`.

    Each is one of `classes.COLORS`, or `rules.UNKNOWN`.
    """


def make(name: str, options: Mapping[str, Any]) -> Colors:
  """Makes a method by its name in `NAMED`, or "module:Class"; InputError as `making.make`."""
  return making.make_part("color", name, NAMED, options)


def templates(color: str, kind: str) -> list[str]:
  """The texts that CLIP compares with a crop to recognise a colour of a class.

  A colour's classifier weights are the mean of the texts' unit features, normalised again.
  """
  return [f"a photo of a {color} {kind}", f"a photo of a {color}-colored {kind}",
          f"a photo of a {color} object"]


def crop(image: np.ndarray, found: rules.Found) -> PIL.Image.Image | None:
  """The part of an image by which an object's colour is judged.

  Args:
    image: [H, W, 3] uint8.
    found: the object. The image is cut to its box, rounded to pixels; what lies outside its mask,
      if it has one, becomes `FILL`.

  Returns:
    The crop; None where it is empty.
  """
  picture = PIL.Image.fromarray(image)
  if found.mask is not None:
    blank = PIL.Image.new("RGB", picture.size, FILL)
    picture = PIL.Image.composite(picture, blank, PIL.Image.fromarray(found.mask.astype(bool)))
  left, top, right, bottom = (round(side) for side in found.box)
  return picture.crop((left, top, right, bottom)) if right > left and bottom > top else None


# Names of hues: each ends at so many degrees, where the next one begins.
HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (295, "purple"),
        (345, "pink"), (360, "red"))
GREY = 0.2  # saturation below which a pixel has no hue
DARK, BRIGHT = 0.2, 0.75  # value below which a pixel is black, and above which a grey one is white
SHARE = 0.25  # least share of the pixels that the most frequent colour must have


class Hsv:
  """The most frequent colour of a crop's pixels, by hue, saturation and value; needs no model.

  Without a mask, the surroundings within the box count like the object itself.
  """

  name = "hsv"
  concurrent = True

  def __call__(self, crops: Sequence[PIL.Image.Image], kind: str) -> list[str]:
    return [self._color(np.asarray(picture)) for picture in crops]

  def _color(self, pixels: np.ndarray) -> str:
    pixels = pixels.reshape(-1, 3)
    pixels = pixels[(pixels != FILL).any(axis=1)]
    names = np.array([*classes.COLORS, rules.UNKNOWN])
    counts = np.bincount(pixel_colors(pixels), minlength=len(names))
    best = int(counts[:-1].argmax())
    share = counts[best] / max(1, counts.sum())
    return str(names[best]) if share >= SHARE and counts[best] > counts[-1] else rules.UNKNOWN


def pixel_colors(pixels: np.ndarray) -> np.ndarray:
  """The colours of N pixels, [N, 3] uint8 -> [N] int.

  They are numbers in `classes.COLORS`; 10 for a grey between black and white, which has no name.
  """
  rgb = pixels.astype(np.float32) / 255
  value, low = rgb.max(axis=1), rgb.min(axis=1)
  spread = value - low
  saturation = spread / np.maximum(value, 1 / 255)
  red, green, blue = rgb.T
  safe = np.maximum(spread, 1 / 1024)
  hue = 60 * np.select(
    [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2],
    (red - green) / safe + 4,
  )
  number = {name: i for i, name in enumerate(classes.COLORS)}
  limits = np.array([limit for limit, _ in HUES])
  named = np.array([number[name] for _, name in HUES])
  result = named[np.minimum(np.searchsorted(limits, hue, side="right"), len(HUES) - 1)]
  warm = (hue < 45) | (hue >= 345)
  # A dark orange is brown, a pale red is pink.
  result[(hue >= 10) & (hue < 45) & (value < 0.7)] = number["brown"]
  result[warm & ((hue < 15) | (hue >= 345)) & (saturation < 0.55) & (value > 0.7)] = number["pink"]
  grey = saturation < GREY
  result[grey] = len(classes.COLORS)
  result[grey & (value > BRIGHT)] = number["white"]
  result[value < DARK] = number["black"]
  return result
