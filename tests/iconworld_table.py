"""What the verifier makes of good, damaged and dishonest images: `python -m tests.iconworld_table`.

Each row draws images for fixed test prompts in one way, and gives the mean strict and soft score
of those prompts that the way applies to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
import functools
import time

import numpy as np
import scipy.ndimage

from unigrpo_jax.iconworld import icons, prompts, renderer, scenes, verifier

COLORS = np.array(list(icons.COLORS.values()), np.float32)


def _blurred(rng, example, sigma=0.5, noise=0.0):
  image = renderer.render(example.scene, rng).astype(float)
  image = scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0))
  return np.clip(image + noise * rng.standard_normal(image.shape), 0, 255).astype(np.uint8)


@functools.cache
def _autoencoder():
  """The embedded checkpoint's, in float32."""
  from unigrpo_jax.models import vae
  from unigrpo_jax.runtime import folders

  folder = folders.open_folder(folders.TINY)
  params = folder.load_params(dtype=np.float32, parts=("vae",))["vae"]
  return vae.VAE(folder.config.vae), params


def _through_autoencoder(rng, example):
  """Encoded, sampled and decoded by the embedded checkpoint's autoencoder."""
  from unigrpo_jax.data import images
  from unigrpo_jax.episodes import programs

  vae, params = _autoencoder()
  pixels = images.to_array(renderer.render(example.scene, rng))[None]
  side = pixels.shape[1] // vae.config.downsample
  noise = rng.standard_normal((1, side, side, vae.config.z_channels), np.float32)
  latents = programs.encode_images("cpu")(vae, params, pixels, noise)
  return np.asarray(programs.decode_images("cpu")(vae, params, latents))[0]


def _packed(rng, things):
  """Icons on a 3 x 3 grid of 9 px steps, overlapping: more than the world's grid holds."""
  canvas = np.full((renderer.SIZE, renderer.SIZE, 3), 255, np.float32)
  for place, (kind, color) in zip(rng.permutation(9), things):
    row, column = divmod(int(place), 3)
    renderer.blend(canvas, scenes.KINDS.index(kind), color, 1.0, 9 * row, 9 * column)
  return canvas.astype(np.uint8)


def _collage(rng, example):
  """Every class at once, in the colours asked for where there are any."""
  asked = {wanted.kind: wanted.color for wanted in example.goal.wanted}
  colors = {kind: asked.get(kind) or scenes.COLORS[rng.integers(8)] for kind in scenes.KINDS}
  return _packed(rng, [(kind, icons.COLORS[color]) for kind, color in colors.items()])


def _filled(rng, example):
  """A correct scene and something else in every free cell; None where no cell is free."""
  taken = {thing.cell: thing for thing in example.scene.things}
  if len(taken) == len(scenes.CELLS):
    return None
  asked = {wanted.kind for wanted in example.goal.wanted}
  others = [kind for kind in scenes.KINDS if kind not in asked]
  for cell in scenes.CELLS:
    if cell not in taken:
      kind, color = others[rng.integers(len(others))], scenes.COLORS[rng.integers(8)]
      taken[cell] = scenes.Thing(kind, color, cell)
  return scenes.Scene(tuple(taken.values()))


def _full_grid(rng, example):
  filled = _filled(rng, example)
  return filled and renderer.render(filled, rng)


def _dithered(rng, example):
  """A correct scene, and every other pixel of something else in every free cell."""
  filled = _filled(rng, example)
  if filled is None:
    return None
  every_other = np.indices((renderer.SIZE, renderer.SIZE)).sum(axis=0) % 2 == 0
  right = scenes.Scene(example.scene.things)
  return np.where(every_other[..., None], renderer.render(filled), renderer.render(right))


def _speckled(rng, example):
  """A correct scene under pixels of any colour, one in twenty."""
  image = renderer.render(example.scene, rng).copy()
  specks = rng.random(image.shape[:2]) < 0.05
  image[specks] = rng.integers(0, 256, (specks.sum(), 3))
  return image


def _twice(rng, example):
  """Twice as many of everything as asked for."""
  things = list(example.scene.things)
  if 2 * len(things) > len(scenes.CELLS):
    return _packed(rng, [(thing.kind, icons.COLORS[thing.color]) for thing in 2 * things])
  free = [cell for cell in scenes.CELLS if cell not in {thing.cell for thing in things}]
  more = [dataclasses.replace(thing, cell=cell) for thing, cell in zip(things, free)]
  return renderer.render(scenes.Scene((*things, *more)), rng)


def _one_more(rng, example):
  things = example.scene.things
  free = [cell for cell in scenes.CELLS if cell not in {thing.cell for thing in things}]
  if not free:
    return None
  return renderer.render(scenes.Scene((*things, dataclasses.replace(things[0], cell=free[0]))), rng)


def _one_less(rng, example):
  return renderer.render(scenes.Scene(example.scene.things[1:]), rng)


def _wrong_class(rng, example):
  first, *rest = example.scene.things
  others = [k for k in scenes.KINDS if k not in {thing.kind for thing in example.scene.things}]
  wrong = dataclasses.replace(first, kind=others[rng.integers(len(others))])
  return renderer.render(scenes.Scene((wrong, *rest)), rng)


def _wrong_color(rng, example):
  if example.goal.wanted[0].color is None:
    return None
  first, *rest = example.scene.things
  others = [color for color in scenes.COLORS if color != first.color]
  wrong = dataclasses.replace(first, color=others[rng.integers(len(others))])
  return renderer.render(scenes.Scene((wrong, *rest)), rng)


def _swapped(rng, example, field):
  """A scene of two things that have changed their cells, or their colours."""
  first, second = example.scene.things
  swapped = (
    dataclasses.replace(first, **{field: getattr(second, field)}),
    dataclasses.replace(second, **{field: getattr(first, field)}),
  )
  return renderer.render(scenes.Scene(swapped), rng)


def _swapped_positions(rng, example):
  return None if example.goal.relation is None else _swapped(rng, example, "cell")


def _swapped_colors(rng, example):
  return None if example.goal.category != "color_attr" else _swapped(rng, example, "color")


def _upside_down(rng, example):
  """The right scene with every cell flipped: the icons stand on their heads."""
  if any(thing.kind == "cell phone" for thing in example.scene.things):
    return None  # Which looks the same.
  canvas = renderer.render(example.scene)
  cells = canvas.reshape(2, 16, 2, 16, 3)
  return cells[:, ::-1].reshape(canvas.shape)


def _color_patches(rng, example):
  """Squares of the right colours in the right cells: colour without shape."""
  canvas = renderer.render(scenes.Scene(()), rng).copy()
  for thing in example.scene.things:
    top, left = renderer.corner(thing.cell)
    canvas[top : top + icons.SIDE, left : left + icons.SIDE] = icons.COLORS[thing.color]
  return canvas


def _overlaid(rng, example):
  """All classes on top of each other in the cells asked for."""
  canvas = renderer.render(scenes.Scene(()), rng).astype(np.float32)
  for thing in example.scene.things:
    for kind in rng.permutation(len(scenes.KINDS)):
      top, left = renderer.corner(thing.cell)
      renderer.blend(canvas, kind, np.array(icons.COLORS[thing.color]), 1.0, top, left)
  return canvas.astype(np.uint8)


def _shuffled(rng, example):
  """The right image with its 8 x 8 px patches in another order."""
  patches = renderer.render(example.scene, rng).reshape(4, 8, 4, 8, 3).swapaxes(1, 2)
  return (
    rng.permutation(patches.reshape(16, 8, 8, 3))
    .reshape(4, 4, 8, 8, 3)
    .swapaxes(1, 2)
    .reshape(32, 32, 3)
  )


def _plain(rng, example):
  return np.full((32, 32, 3), rng.integers(0, 256, 3), np.uint8)


def _noise(rng, example):
  return rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)


def _grey_noise(rng, example):
  return np.clip(rng.normal(128, 40, (32, 32, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)


def _gradient(rng, example):
  first, second = COLORS[rng.integers(8, size=2)]
  ramp = np.linspace(0, 1, 32)[:, None, None]
  return (first + (second - first) * ramp + np.zeros((1, 32, 1))).astype(np.uint8)


def _checkerboard(rng, example):
  squares = np.indices((32, 32)).sum(axis=0) // int(rng.integers(1, 9)) % 2
  return np.where(squares[..., None], COLORS[rng.integers(8)], 255).astype(np.uint8)


def _other_prompt(rng, example):
  return renderer.render(prompts.sample(rng, "train").scene, rng)


# Row -> how to draw, (rng, example) -> image, or None where it does not apply.
GOOD: dict[str, Callable] = {
  "clean": lambda rng, example: renderer.render(example.scene, rng),
  "blur 0.5 px": _blurred,
  "noise 8": lambda rng, example: _blurred(rng, example, 0, 8),
  "blur 0.5 px, noise 8": lambda rng, example: _blurred(rng, example, 0.5, 8),
  "blur 1 px": lambda rng, example: _blurred(rng, example, 1.0),
  "through the autoencoder": _through_autoencoder,
  "twice the size": lambda rng, example: (
    renderer.render(example.scene, rng).repeat(2, 0).repeat(2, 1)
  ),
}
BAD: dict[str, Callable] = {
  "blank": _plain,
  "noise": _noise,
  "grey noise": _grey_noise,
  "gradient": _gradient,
  "checkerboard": _checkerboard,
  "patches of the right colours": _color_patches,
  "all classes overlaid": _overlaid,
  "patches shuffled": _shuffled,
  "collage of everything": _collage,
  "right, other cells filled": _full_grid,
  "right, other cells dithered": _dithered,
  "right, under specks": _speckled,
  "twice too many": _twice,
  "one more": _one_more,
  "one less": _one_less,
  "wrong class": _wrong_class,
  "wrong colour": _wrong_color,
  "swapped positions": _swapped_positions,
  "swapped colours": _swapped_colors,
  "icons upside down": _upside_down,
  "another prompt's scene": _other_prompt,
}


def row(draw: Callable, examples: list[prompts.Example]) -> tuple[float, float, int]:
  """Mean strict, mean soft, and how many of the examples the row applies to."""
  rng = np.random.default_rng(0)
  drawn = [(draw(rng, example), example.metadata) for example in examples]
  scores = [verifier.verify(image, item) for image, item in drawn if image is not None]
  strict, soft = np.mean(scores, axis=0)
  return float(strict), float(soft), len(scores)


def speed(count: int = 500) -> float:
  """Images verified a second, clean ones of fixed test prompts."""
  rng = np.random.default_rng(0)
  examples = prompts.fixed("test", count)
  images = [renderer.render(example.scene, rng) for example in examples]
  verifier.verify(images[0], examples[0].metadata)  # Loads the icons.
  start = time.perf_counter()
  for image, example in zip(images, examples):
    verifier.verify(image, example.metadata)
  return count / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description="Prints the verifier's table and speed.")
  parser.add_argument("--count", type=int, default=600, help="test prompts a row")
  examples = prompts.fixed("test", parser.parse_args().count)
  print(f"{'image':<30} {'strict':>7} {'soft':>7} {'n':>5}")
  for name, draw in (GOOD | BAD).items():
    print("{:<30} {:7.4f} {:7.4f} {:5d}".format(name, *row(draw, examples)))
  print(f"{speed():.0f} images/s")


if __name__ == "__main__":
  main()
