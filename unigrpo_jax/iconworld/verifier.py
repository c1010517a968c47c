"""What is in an image, from its pixels alone, and how well that meets what was asked for.

The plain background is the border's colour; coverage is the distance from it; icons are where a
mask overlaps coverage best, their colour is unmixed from the background and compared with the
palette under a free brightness; connected components that are left over are unknown objects.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import scipy.ndimage

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import icons, renderer, scenes, scoring

# Distances are Euclidean in RGB of 0..255.
PLAIN = 45.0  # A pixel this near the background's colour belongs to it.
# Share of the pixels; an image with less has no plain background. Four icons leave 0.4.
PLAIN_SHARE = 0.3
NOISE = 25.0  # Distances below this say nothing.
FAINTEST = 70.0  # Distance that counts as full coverage, at least.
# Least cosine of coverage and mask. Renders blurred by half a pixel and noisy have 0.965 or more;
# all masks on top of each other look like an apple with up to 0.945.
OVERLAP = 0.955
CANDIDATE = 0.84  # The same for one variant of the mask on whole pixels, before a closer look.
APART = 8  # Pixels between two icons, on either axis; in a scene they are 14 apart or more.
MISFIT = 0.12  # Most share of the contrast that mask and one colour leave unexplained.
SPREAD = 50.0  # Most root mean square difference from one colour, where an icon covers fully.
BRIGHTNESS = (0.6, 1.25)
COLOR_ERROR = 60.0  # Most distance from a palette colour at its best brightness.
LEFTOVER = 8  # Pixels of an unexplained blob that make it an object; specks are counted together.

BLURS = (0.0, 0.5, 1.0)  # Pixels: how far a decoder may have blurred the image.
SHIFTS = (0.0, 0.5)  # Pixels, on each axis: icons need not lie on whole pixels.

_EDGE = 1  # Pixels around a mask that should be empty.
_SIDE = icons.SIDE + 2 * _EDGE
_PAD = 1  # Pixels that a window may hang over the image's edge.


@dataclasses.dataclass(frozen=True)
class _Templates:
  """Masks of n icons with an empty edge, in v variants, one for every blur and shift."""

  coverage: np.ndarray  # [_SIDE * _SIDE, n, v] unit columns
  alpha: np.ndarray  # [n, v, _SIDE, _SIDE]
  tint: np.ndarray  # likewise, coverage times shade
  near: np.ndarray  # [n, _SIDE, _SIDE] bool, on the icon or next to it


@functools.cache
def _templates() -> _Templates:
  masks = icons.load()
  edge = ((0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE))
  alpha, tint = (np.pad(values, edge) for values in (masks.alpha, masks.alpha * masks.shade))

  def variants(values: np.ndarray) -> np.ndarray:
    stack = [
      scipy.ndimage.shift(scipy.ndimage.gaussian_filter(values, (0, blur, blur)), (0, *by), order=1)
      for blur in BLURS
      for by in itertools.product(SHIFTS, SHIFTS)
    ]
    return np.stack(stack, axis=1)

  varied = variants(alpha)
  columns = np.moveaxis(varied.reshape(*varied.shape[:2], -1), 2, 0)
  return _Templates(
    coverage=np.ascontiguousarray(columns / np.linalg.norm(columns, axis=0)),
    alpha=varied,
    tint=variants(tint),
    near=scipy.ndimage.maximum_filter(alpha, (1, 3, 3)) > 0.1,
  )


def _shrinking(size: int) -> np.ndarray:
  """[SIZE, size]: averages `size` pixels to the world's size by area."""
  edges = np.linspace(0, size, renderer.SIZE + 1)
  starts = np.arange(size)
  shared = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
  return np.clip(shared, 0, None) * (renderer.SIZE / size)


def standardise(image: np.ndarray) -> np.ndarray | None:
  """[SIZE, SIZE, 3] float32 in 0..255 of any image; None where there is nothing to look at.

  Integers are 0..255, floats 0..1; what is outside or not a number is brought inside. Other sizes
  are resized by area.
  """
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    return None
  scale = 255.0 if np.issubdtype(image.dtype, np.floating) else 1.0
  pixels = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=1e6, neginf=0.0)
  pixels = np.clip(pixels * np.float32(scale), 0, 255)
  if image.shape[:2] != (renderer.SIZE, renderer.SIZE):
    down, across = (_shrinking(size) for size in image.shape[:2])
    pixels = np.einsum("rh,hwc,sw->rsc", down, pixels, across, optimize=True).astype(np.float32)
  return pixels


def _background(pixels: np.ndarray) -> np.ndarray | None:
  """[3], the plain background's colour; None if there is none."""
  ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
  color = np.median(ring, axis=0)
  plain = np.linalg.norm(pixels - color, axis=-1) < PLAIN
  return pixels[plain].mean(axis=0) if plain.mean() >= PLAIN_SHARE else None


def plain_background(image: np.ndarray) -> np.ndarray:
  """[H, W] bool, the pixels of the plain background of an image [H, W, 3] uint8; none without one.
  """
  pixels = image.astype(np.float32)
  background = _background(pixels)
  if background is None:
    return np.zeros(image.shape[:2], bool)
  return np.linalg.norm(pixels - background, axis=-1) < PLAIN


def _color(value: np.ndarray) -> str:
  """The palette's colour nearest to `value`, [3], at any brightness."""
  table = np.array(list(icons.COLORS.values()), np.float32)
  factor = np.clip(table @ value / (table**2).sum(axis=1), *BRIGHTNESS)
  errors = np.linalg.norm(factor[:, None] * table - value, axis=1)
  best = int(errors.argmin())
  return scenes.COLORS[best] if errors[best] <= COLOR_ERROR else rules.UNKNOWN


def _unmix(window: np.ndarray, background: np.ndarray, kind: int) -> tuple[str, float]:
  """The colour of icon `kind` in a [_SIDE, _SIDE, 3] window, and the unexplained share of contrast.

  pixel = (1 - alpha) background + alpha shade colour, least squares for the colour in each variant;
  the best variant counts. The name is `UNKNOWN` for no single or no known colour.
  """
  masks = _templates()
  near = masks.near[kind][..., None]
  alpha, tint = masks.alpha[kind][..., None], masks.tint[kind][..., None]
  lit = window - (1 - alpha) * background  # [v, _SIDE, _SIDE, 3]
  color = (tint * lit).sum(axis=(1, 2)) / (tint**2).sum(axis=(1, 2))
  square = ((lit - tint * color[:, None, None]) * near) ** 2
  error = square.sum(axis=(1, 2, 3))
  best = int(error.argmin())
  contrast = max(float((((window - background) * near) ** 2).sum()), 1e-6)
  solid = alpha[best, ..., 0] > 0.6
  spread = np.sqrt(square[best][solid].sum() / max(solid.sum(), 1))
  name = _color(color[best]) if spread <= SPREAD else rules.UNKNOWN
  return name, float(error[best] / contrast)


def _icons(
  padded: np.ndarray, coverage: np.ndarray, background: np.ndarray
) -> tuple[list[rules.Found], np.ndarray]:
  """Icons, strongest first, and the pixels next to or on one, [S, S] bool.

  Candidates are where one variant of a mask on whole pixels overlaps well, from the strongest down;
  each gets a closer look with all variants at the places around it. `padded` [S, S, 3] has an edge
  of background, `coverage` [S, S] is in [0, 1].
  """
  masks = _templates()
  windows = np.lib.stride_tricks.sliding_window_view(coverage, (_SIDE, _SIDE))
  places = windows.shape[:2]
  windows = windows.reshape(-1, _SIDE * _SIDE)
  windows = windows / np.maximum(np.linalg.norm(windows, axis=1, keepdims=True), 1)
  strength = (windows @ masks.coverage[:, :, BLURS.index(0.5) * len(SHIFTS) ** 2]).max(axis=1)
  strength = strength.reshape(places)
  windows = windows.reshape(*places, -1)
  detections, explained = [], np.zeros(coverage.shape, bool)
  while strength.max() >= CANDIDATE:
    row, column = (int(place) for place in np.unravel_index(strength.argmax(), places))
    top, left = max(row - 1, 0), max(column - 1, 0)
    close = windows[top : row + 2, left : column + 2]
    overlap = np.tensordot(close, masks.coverage, 1)  # [3, 3, n, v], less at the edges.
    down, across, kind, _ = (int(i) for i in np.unravel_index(overlap.argmax(), overlap.shape))
    area = (slice(top + down, top + down + _SIDE), slice(left + across, left + across + _SIDE))
    color, misfit = _unmix(padded[area], background, kind)
    if overlap.max() >= OVERLAP and misfit <= MISFIT:
      x, y = left + across + _EDGE - _PAD, top + down + _EDGE - _PAD
      box = tuple((icons.load().box[kind] + (x, y, x, y)).tolist())
      detections.append(rules.Found(scenes.KINDS[kind], color, box, float(overlap.max())))
      explained[area] |= masks.near[kind]
    strength[tuple(slice(max(i - APART + 1, 0), i + APART) for i in (row, column))] = 0
  return sorted(detections, key=lambda item: -item.score), explained


def detect(image: np.ndarray) -> list[rules.Found]:
  """The objects in an image, [H, W, 3] as of `standardise`, strongest first, unknown ones last.

  `rules.UNKNOWN` is each blob that matches no icon, and for all specks together one for as many
  pixels as make a blob. None for an image that is blank or has no plain background. Boxes are in
  pixels of a SIZE x SIZE image.
  """
  pixels = standardise(image)
  background = None if pixels is None else _background(pixels)
  if background is None:
    return []
  distance = np.linalg.norm(pixels - background, axis=-1)
  # What counts as covered fully differs from icon to icon: a pale one is nearer the background.
  full = np.maximum(scipy.ndimage.maximum_filter(distance, 7), FAINTEST)
  coverage = np.pad(np.clip((distance - NOISE) / (full - NOISE), 0, 1), _PAD)
  padded = np.full((*coverage.shape, 3), background, np.float32)
  padded[_PAD:-_PAD, _PAD:-_PAD] = pixels
  detections, explained = _icons(padded, coverage, background)
  labels, count = scipy.ndimage.label(np.pad(distance > PLAIN, _PAD) & ~explained)
  sizes = np.bincount(labels.ravel(), minlength=count + 1)
  boxes = []
  for index, (rows, columns) in enumerate(scipy.ndimage.find_objects(labels), 1):
    if sizes[index] >= LEFTOVER:
      edges = (columns.start, rows.start, columns.stop, rows.stop)
      boxes.append(tuple(float(edge - _PAD) for edge in edges))
  # Specks are no less there for being apart: so many as make a blob count as one.
  specks = int(sizes[1:][sizes[1:] < LEFTOVER].sum())
  boxes += [(0.0, 0.0, float(renderer.SIZE), float(renderer.SIZE))] * (specks // LEFTOVER)
  unknown = [rules.Found(rules.UNKNOWN, rules.UNKNOWN, box, 0.0) for box in boxes]
  return detections + unknown


def verify(image: np.ndarray, metadata: Mapping[str, Any]) -> tuple[float, float]:
  """Strict (0.0 or 1.0) and soft (in [0, 1]) score of an image; see `scoring.score`."""
  return scoring.score(detect(image), metadata)
