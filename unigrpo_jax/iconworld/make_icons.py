r"""Makes icons.npz from the Noto Color Emoji font; run once, its result is part of the package.

    apt-get install fonts-noto-color-emoji
    python -m unigrpo_jax.iconworld.make_icons \
      --font=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

Every glyph becomes two masks: `alpha`, how much of a pixel it covers, and `shade`, how light it is.
"""

from __future__ import annotations

import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from unigrpo_jax import errors
from unigrpo_jax.iconworld import icons

# Class -> glyph and gain of its coverage: thin lines would otherwise fade to the background.
GLYPHS = {
  "apple": ("\N{RED APPLE}", 1.4), "bird": ("\N{BIRD}", 1.4), "umbrella": ("\N{UMBRELLA}", 1.4),
  "wine glass": ("\N{WINE GLASS}", 1.4), "cell phone": ("\N{MOBILE PHONE}", 1.4),
  "bicycle": ("\N{BICYCLE}", 1.8), "chair": ("\N{CHAIR}", 1.6), "kite": ("\N{KITE}", 1.8),
}
STRIKE = 109  # The font's only bitmap size, in pixels.
FAINT = 0.12  # Coverage below this is dropped: it reads as dirt at this size.
DARKEST = 0.78  # Shade of the darkest part of a glyph; the lightest has 1.


def reduce_glyph(
  font: PIL.ImageFont.FreeTypeFont, glyph: str, gain: float
) -> tuple[np.ndarray, np.ndarray]:
  """Alpha and shade of a glyph, [icons.SIDE, icons.SIDE] uint8 each, centred."""
  canvas = PIL.Image.new("RGBA", (2 * STRIKE, 2 * STRIKE), (0, 0, 0, 0))
  PIL.ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), glyph, font=font, embedded_color=True)
  box = canvas.getbbox()
  if box is None:
    raise errors.InputError(f"--font has no colour glyph U+{ord(glyph):04X}; use Noto Color Emoji")
  canvas = canvas.crop(box)
  scale = icons.SIDE / max(canvas.size)
  size = tuple(max(1, round(side * scale)) for side in canvas.size)

  def shrink(values: np.ndarray) -> np.ndarray:
    image = PIL.Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size, PIL.Image.Resampling.BOX))

  pixels = np.asarray(canvas, np.float32) / 255
  coverage = shrink(pixels[..., 3])
  luminance = shrink(pixels[..., 3] * (pixels[..., :3] @ (0.299, 0.587, 0.114)))
  luminance = luminance / np.maximum(coverage, 1e-3)
  low, high = np.percentile(luminance[coverage > 0.5], [5, 95])
  shade = DARKEST + (1 - DARKEST) * np.clip((luminance - low) / max(high - low, 0.05), 0, 1)
  alpha = np.clip((coverage - FAINT) * gain / (1 - FAINT), 0, 1)

  def centred(values: np.ndarray) -> np.ndarray:
    out = np.zeros((icons.SIDE, icons.SIDE), np.uint8)
    top, left = ((icons.SIDE - side) // 2 for side in values.shape)
    out[top : top + values.shape[0], left : left + values.shape[1]] = np.round(255 * values)
    return out

  return centred(alpha), centred(np.where(alpha > 0, shade, 0))


def main() -> None:
  parser = errors.ArgumentParser(description="Makes icons.npz from the Noto Color Emoji font.")
  parser.add_argument("--font", type=pathlib.Path, required=True, help="NotoColorEmoji.ttf")
  parser.add_argument("--out", type=pathlib.Path, default=icons.PATH, help="the file to write")
  arguments = parser.parse_args()
  try:
    font = PIL.ImageFont.truetype(str(arguments.font), STRIKE)
  except OSError as error:
    raise errors.InputError(f"--font={arguments.font}: {error}; give NotoColorEmoji.ttf") from None
  masks = [reduce_glyph(font, *glyph) for glyph in GLYPHS.values()]
  alpha, shade = (np.stack(mask) for mask in zip(*masks))
  np.savez_compressed(arguments.out, names=np.array(list(GLYPHS)), alpha=alpha, shade=shade)
  print(f"{arguments.out}: {len(GLYPHS)} icons, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
  errors.report(main)
