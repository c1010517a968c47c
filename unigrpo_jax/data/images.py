"""Images on the host: loading, the official resize rule, patches and their position ids.

numpy and Pillow only. The rules are those of the official BAGEL transforms, bit for bit: an image a
pixel larger, or resized by another bicubic, is another image to the network.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import warnings

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib

# Rounding a side to one patch or latent token stretches an image by up to this; what the resize
# rule would stretch further no longer shows the picture that was given.
MAX_STRETCH = 2.0
# The released VAE table is 64 tokens long, so this is where its rule passes MAX_STRETCH.
MAX_ASPECT_RATIO = 128


def load_rgb(path: pathlib.Path | str) -> PIL.Image.Image:
  """Opens an image as RGB; transparency is composited on white, EXIF rotation is not applied.

  Both as the official `pil_img2rgb`, except that grey images with an alpha channel, whose alpha it
  forgets, are composited like the others, and that grey images of 16 bits, of which it makes white
  ones, keep their greys.

  Raises:
    InputError: the file is missing, not an image, truncated, larger than Pillow's decompression
      limit (about 89 million pixels), more than `MAX_ASPECT_RATIO` times as long as wide, or holds
      numbers of which none is known to be white.
  """
  path = pathlib.Path(path)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
      with PIL.Image.open(path) as image:
        _check_aspect_ratio(path, *image.size)
        if image.mode in ("I", "F"):
          raise errors.InputError(
            f"{path}: its pixels are numbers without bounds (Pillow's mode {image.mode}); save it "
            "as a PNG of 8 or 16 bits"
          )
        image.load()
        return to_rgb(image)
  except FileNotFoundError:
    raise errors.InputError(f"{path}: no such file; give the path of an image") from None
  except IsADirectoryError:
    raise errors.InputError(f"{path}: is a folder; give the path of an image") from None
  except PIL.UnidentifiedImageError:
    raise errors.InputError(f"{path}: not an image in a format that Pillow reads") from None
  except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
    raise errors.InputError(
      f"{path}: more than {PIL.Image.MAX_IMAGE_PIXELS} pixels; give a smaller image"
    ) from None
  # Decoders report broken data by whichever exception the broken byte leads to.
  except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
    raise errors.InputError(
      f"{path}: not readable as an image ({error}); if it is truncated or damaged, copy it again"
    ) from None


def _check_aspect_ratio(path: pathlib.Path, width: int, height: int) -> None:
  if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
    raise errors.InputError(
      f"{path}: {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the "
      "other; crop it first"
    )


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """RGB, with transparency composited on white; greys of 16 bits are rounded to 8."""
  if image.mode.startswith("I;16"):
    grey = np.asarray(image)
    white = grey == image.info.get("transparency")
    # Pillow would make white of whatever is above 255.
    grey = np.where(white, 255, np.round(grey / 257)).astype(np.uint8)
    return PIL.Image.fromarray(grey).convert("RGB")
  if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
  return image.convert("RGB")


def resized_size(
  width: int, height: int, rule: config_lib.ImageSizeRule, num_images: int = 1
) -> tuple[int, int]:
  """Size of an image after the official resize rule.

  The long side is brought down to `max_size`, else the short side up to `min_size`; then, where it
  has too many pixels, both sides are multiplied by the ratio of the *areas* (no square root); then
  the long side is brought down to `max_size` again. After each step both sides are rounded to the
  nearest pixel and then to the nearest multiple of `stride`, halves to even both times, but never
  below one stride.

  Args:
    width, height: pixels.
    rule: bounds, stride and pixel budget.
    num_images: images of the sample, which share the pixel budget.

  Returns:
    (width, height) in pixels, multiples of `rule.stride`.

  Source: official BAGEL `MaxLongEdgeMinShortEdgeResize`.
  """

  def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    sides = (round(round(side * scale) / rule.stride) * rule.stride for side in (width, height))
    new_width, new_height = (max(side, rule.stride) for side in sides)
    return new_width, new_height

  scale = max(min(rule.max_size / max(width, height), 1.0), rule.min_size / min(width, height))
  width, height = scaled(width, height, scale)
  budget = rule.max_pixels / num_images
  if width * height > budget:
    width, height = scaled(width, height, budget / (width * height))
  if max(width, height) > rule.max_size:
    width, height = scaled(width, height, rule.max_size / max(width, height))
  return width, height


def resize(
  image: PIL.Image.Image, rule: config_lib.ImageSizeRule, num_images: int = 1
) -> PIL.Image.Image:
  """Resizes an RGB image to `resized_size`, by Pillow's bicubic on uint8.

  `jax.image.resize` does not agree bit for bit: Pillow clamps and rounds to uint8.

  Raises:
    InputError: the rule cannot keep the image's shape within `MAX_STRETCH`, or leaves a side beyond
      `rule.max_size`, where the position table ends.
  """
  width, height = image.size
  new_width, new_height = resized_size(width, height, rule, num_images)
  stretch = (new_width * height) / (new_height * width)
  if max(stretch, 1 / stretch) > MAX_STRETCH:
    raise errors.InputError(
      f"image of {width}x{height} pixels is too narrow: sides of at most {rule.max_size} px in "
      f"steps of {rule.stride} px would make it {new_width}x{new_height}; crop it first"
    )
  if max(new_width, new_height) > rule.max_size:
    raise errors.InputError(
      f"max_image_size={rule.max_size} is not a multiple of image_stride={rule.stride}: an image "
      f"of {width}x{height} pixels would become {new_width}x{new_height}; make it a multiple"
    )
  return image.resize((new_width, new_height), PIL.Image.Resampling.BICUBIC)


def to_array(image: PIL.Image.Image) -> np.ndarray:
  """An RGB image -> [H, W, 3] float32 in [-1, 1], `(x / 255 - 0.5) / 0.5`."""
  pixels = np.asarray(image, dtype=np.float32)
  return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def pad_to_canvas(arrays: Sequence[np.ndarray]) -> np.ndarray:
  """Images [H, W, 3] -> [M, H', W', 3], zero-padded right and below to the largest sides.

  What the official code does to the images of a pack before it encodes them together. The padding
  changes the latents (convolutions, group norms and attention see it), so images are encoded by
  size here; this reproduces the official latents of a pack.
  """
  height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
  return np.stack([
    np.pad(array, ((0, height - array.shape[0]), (0, width - array.shape[1]), (0, 0)))
    for array in arrays
  ])


def patchify(array: np.ndarray, patch: int) -> np.ndarray:
  """[H, W, C] -> [n, patch patch C]: patches row by row, features ordered (py, px, channel).

  Raises:
    ValueError: a side is not a multiple of `patch`.
  """
  height, width, channels = array.shape
  if height % patch or width % patch:
    raise ValueError(f"an image of {height}x{width} does not divide into {patch} px patches")
  # [rows, py, columns, px, C] -> [rows, columns, py, px, C]
  grid = array.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
  return grid.reshape(-1, patch * patch * channels)


def position_ids(
  height: int, width: int, patch_pixels: int, table_side: int, interpolate: bool = False
) -> np.ndarray:
  """Rows of a position table for the patches of an image, row by row.

  Args:
    height, width: pixels, multiples of `patch_pixels`.
    patch_pixels: pixels a patch (or latent token) side.
    table_side: the table covers table_side x table_side patches. An id is
      row * table_side + column: the stride is the table's, not the image's.
    interpolate: spread the image over the whole table, place k of n at floor(k table_side / n),
      instead of using its corner. The release does not.

  Returns:
    [n] int32.

  Raises:
    InputError: the image has more patches a side than the table; its last columns would silently
      take the ids of the next row.
  """
  rows, columns = height // patch_pixels, width // patch_pixels
  if max(rows, columns) > table_side:
    raise errors.InputError(
      f"an image of {width}x{height} pixels is beyond the position table of {table_side} x "
      f"{table_side} patches of {patch_pixels} px; at most {table_side * patch_pixels} px a side"
    )

  def places(count: int) -> np.ndarray:
    place = np.arange(count)
    return place * table_side // count if interpolate else place

  ids = places(rows)[:, None] * table_side + places(columns)[None, :]
  return ids.astype(np.int32).reshape(-1)
