"""Images on the host: loading, the official resize rule, patches and their position ids.

The rules are those of the official BAGEL transforms, bit for bit; only `crop` is not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
import pathlib
import warnings

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.models import config as config_lib

MAX_STRETCH = 2.0  # By which rounding a side to one patch or latent token may stretch an image.
MAX_ASPECT_RATIO = 128  # Where the rule of the released VAE table of 64 tokens passes MAX_STRETCH.


def load_rgb(path: pathlib.Path | str) -> PIL.Image.Image:
  """Opens an image as RGB, upright, see `to_rgb`.

  Raises:
    InputError: the file is missing, not an image, truncated, above Pillow's limit (about 89 million
      pixels) or `MAX_ASPECT_RATIO`, or has pixels without bounds.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
      with files.path(path).open("rb") as file, PIL.Image.open(file) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
          raise errors.InputError(
            f"{path}: {image.width}x{image.height} pixels: one side is more than "
            f"{MAX_ASPECT_RATIO} times the other; crop it first"
          )
        if image.mode in ("I", "F"):
          raise errors.InputError(
            f"{path}: its pixels are numbers without bounds (Pillow's mode {image.mode}); save it "
            "as a PNG of 8 or 16 bits"
          )
        image.load()
        return to_rgb(image)
  except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
    raise errors.InputError(
      f"{path}: more than {PIL.Image.MAX_IMAGE_PIXELS} pixels; give a smaller image"
    ) from None
  except errors.InputError:
    raise
  # Decoders report damaged data by whichever exception the damaged byte leads to.
  except Exception as error:
    raise errors.unreadable(
      error, path,
      f"{path}: not readable as an image ({getattr(error, 'strerror', None) or error}); give the "
      "path of an image, and copy it again if it is truncated or damaged",
    ) from None


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """RGB as a viewer shows it: turned as its EXIF orientation says, with transparency composited on
  white; 16-bit grey is rounded to 8 bits.

  Like the official `pil_img2rgb`, which however ignores the orientation and the alpha channel of
  grey images, and turns 16-bit grey images white.
  """
  image = _upright(image)
  if image.mode.startswith("I;16"):
    grey = np.asarray(image)
    white = grey == image.info.get("transparency")
    # Pillow would turn every value above 255 white.
    grey = np.where(white, 255, np.round(grey / 257)).astype(np.uint8)
    return PIL.Image.fromarray(grey).convert("RGB")
  if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white
  return image.convert("RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
  """The image turned and mirrored as its EXIF orientation says; as it is where that is damaged."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of a damaged EXIF block
      if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        return PIL.ImageOps.exif_transpose(image)
  except Exception:  # Pillow raises many kinds for one; the pixels are sound.
    pass
  return image


def resized_size(
  width: int, height: int, rule: config_lib.ImageSizeRule, num_images: int = 1
) -> tuple[int, int]:
  """(width, height) in pixels of an image after the official resize rule.

  The long side is brought down to `max_size`, else the short side up to `min_size`; then, where it
  has too many pixels, both sides are multiplied by the ratio of the *areas* (no square root); then
  the long side is brought down to `max_size` again. After each step both sides are rounded to the
  nearest pixel and then to the nearest multiple of `stride`, halves to even both times, but never
  below one stride. The `num_images` of a sample share the pixel budget.

  Source: official BAGEL `MaxLongEdgeMinShortEdgeResize`.
  """

  def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    sides = (round(round(side * scale) / rule.stride) * rule.stride for side in (width, height))
    return tuple(max(side, rule.stride) for side in sides)

  scale = max(min(rule.max_size / max(width, height), 1.0), rule.min_size / min(width, height))
  width, height = scaled(width, height, scale)
  budget = rule.max_pixels / num_images
  if width * height > budget:
    width, height = scaled(width, height, budget / (width * height))
  if max(width, height) > rule.max_size:
    width, height = scaled(width, height, rule.max_size / max(width, height))
  return width, height


def resize(image: PIL.Image.Image, rule: config_lib.ImageSizeRule) -> PIL.Image.Image:
  """Resizes an RGB image to `resized_size`, by Pillow's bicubic on uint8.

  `jax.image.resize` does not agree bit for bit: Pillow clamps and rounds to uint8.

  Raises:
    InputError: the image would be stretched beyond `MAX_STRETCH`, or a side beyond `rule.max_size`.
  """
  width, height = image.size
  new_width, new_height = resized_size(width, height, rule)
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


def crop(image: PIL.Image.Image, sizes: Sequence[tuple[int, int]]) -> PIL.Image.Image:
  """Crops an RGB image around its centre to the shape of one of `sizes`, and resizes it to that.

  It is the (height, width) in pixels whose shape is nearest, and of several the nearest in pixels.
  """
  def distance(size: tuple[int, int]) -> tuple[float, float]:
    height, width = (math.log(new / old) for new, old in zip(size, (image.height, image.width)))
    return round(abs(height - width), 9), abs(height + width)

  height, width = min(sizes, key=distance)
  return PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BICUBIC)


def to_array(image: PIL.Image.Image) -> np.ndarray:
  """An RGB image -> [H, W, 3] float32 in [-1, 1], `(x / 255 - 0.5) / 0.5`."""
  pixels = np.asarray(image, dtype=np.float32)
  return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def patchify(array: np.ndarray, patch: int) -> np.ndarray:
  """[H, W, C] -> [n, patch patch C]: patches row by row, features ordered (py, px, channel)."""
  height, width, channels = array.shape
  if height % patch or width % patch:
    raise ValueError(f"an image of {height}x{width} does not divide into {patch} px patches")
  # [rows, py, columns, px, C] -> [rows, columns, py, px, C]
  grid = array.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
  return grid.reshape(-1, patch * patch * channels)


def position_ids(
  height: int, width: int, patch_pixels: int, table_side: int, interpolate: bool = False
) -> np.ndarray:
  """Rows of a position table for the patches of an image, row by row: [n] int32.

  Args:
    height, width: pixels, multiples of `patch_pixels`.
    patch_pixels: pixels a patch (or latent token) side.
    table_side: of the table, in patches. An id is row * table_side + column.
    interpolate: spread the image over the whole table, patch k of n at floor(k table_side / n),
      instead of using its corner. The release does not.

  Raises:
    InputError: the image has more patches a side than the table.
  """
  rows, columns = height // patch_pixels, width // patch_pixels
  if max(rows, columns) > table_side:
    raise errors.InputError(
      f"an image of {width}x{height} pixels is beyond the position table of {table_side} x "
      f"{table_side} patches of {patch_pixels} px; at most {table_side * patch_pixels} px a side"
    )
  row, column = np.arange(rows), np.arange(columns)
  if interpolate:
    row, column = row * table_side // rows, column * table_side // columns
  return (row[:, None] * table_side + column).astype(np.int32).reshape(-1)
