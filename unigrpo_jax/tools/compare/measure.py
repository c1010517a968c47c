"""Measures image statistics of a run's evaluations.

They are of the pictures that the evaluations saved (config.eval.keep, config.eval.images). Latents
and features are those of the network that the run started from. Writes RUN/statistics.json: {step:
{statistic: mean}}; see `benchmarks/statistics.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import sys

import jax
import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import evaluation, measured, statistics
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import atomic, files
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline, programs, requests
from unigrpo_jax.iconworld import prompts, renderer
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import siglip, vae

FILE = "statistics.json"
ROWS = 64  # pictures at once


class Features:
  """Latents and ViT features of pictures of one size, by a network."""

  def __init__(self, folder: str):
    """Loads the network's folder."""
    self._drawing = pipeline.Pipeline.open(folder).load()

  def latents(self, images: np.ndarray) -> np.ndarray:
    """The VAE's posterior means of pictures [N, H, W, 3] uint8: [N, h, w, z] float32."""
    config, params = self._drawing.config.vae, self._drawing.params["vae"]
    height, width = (side // config.downsample for side in images.shape[1:3])
    no_noise = np.zeros((ROWS, height, width, config.z_channels), np.float32)

    program = programs.encode_images(jax.default_backend())

    def encode(pixels):
      return program(vae.VAE(config), params, pixels, no_noise)

    return self._in_parts(encode, np.stack([images_lib.to_array(image) for image in images]))

  def vit(self, images: np.ndarray) -> np.ndarray:
    """Mean-pooled ViT features of pictures [N, H, W, 3] uint8: [N, F] float32."""
    config, params = self._drawing.config, self._drawing.params["bagel"]["vit"]
    tower = siglip.SigLIP(config.vit)
    apply = jax.jit(lambda *arrays: tower.apply({"params": params}, *arrays).mean(axis=1))

    def pooled(part):
      patches = requests.image_patches(config, [PIL.Image.fromarray(image) for image in part])
      return apply(patches.pixels, patches.ids, patches.mask)

    return self._in_parts(pooled, images)

  def _in_parts(self, function, rows: np.ndarray) -> np.ndarray:
    """`function` of [N, ...], applied to ROWS rows at a time."""
    made = []
    for first in range(0, len(rows), ROWS):
      part = rows[first : first + ROWS]
      filled = part[np.arange(ROWS) % len(part)]  # one shape, which compiles once
      made.append(np.asarray(function(filled))[: len(part)])
    return np.concatenate(made)


def of_evaluation(
  folder: pathlib.Path, mode: str, features: Features, rendered: np.ndarray | None
) -> dict[str, float]:
  """{statistic: mean} over an evaluation's saved pictures of a mode; {} where there are none.

  Args:
    folder: of the evaluation.
    mode: name of the mode.
    features: computes latents and features.
    rendered: ViT features of correct pictures of the same prompts, [M, F]; None: no Frechet
      distance.
  """
  _, rows = results_lib.read(folder) or ({}, [])
  rows = [row for row in rows if row.image and row.mode == mode]
  if not rows:
    return {}
  images = [results_lib.read_picture(folder / row.image) for row in rows]
  values = [statistics.of_image(image) for image in images]
  made = {name: float(np.mean([of[name] for of in values])) for name in statistics.NAMES}
  latents = features.latents(np.stack(images))
  made["diversity"] = statistics.diversity(latents, [row.number for row in rows])
  if rendered is not None and len(rows) > 1:
    made["frechet"] = statistics.frechet(features.vit(np.stack(images)), rendered)
  return made


def render(split: str, count: int) -> np.ndarray:
  """Correct pictures of the first prompts of an IconWorld split, [count, 32, 32, 3] uint8."""
  rng = np.random.default_rng(0)
  return np.stack([
    renderer.render(example.scene, rng) for example in prompts.fixed(split, count)
  ])


def measure(run: pathlib.Path) -> dict[int, dict[str, float]]:
  """{step: {statistic: mean}} of a run's evaluations, in the first mode of its validation.

  Raises:
    InputError: `run` is not the workdir of a run.
  """
  if not (run / "config.json").is_file():
    raise errors.InputError(f"{run}: has no config.json; give the --workdir of a run")
  config = config_lib.read_json(run / "config.json")
  evaluations = config["eval"]
  mode = evaluation.Mode.parse(evaluations["modes"][0]).name
  features, rendered = Features(config["init_from"]), None
  count = min(evaluations["keep"], evaluations["prompts"])
  if evaluations["source"] == prompts_lib.ICONWORLD and count > 1:
    rendered = features.vit(render(evaluations["split"], count))
  return {
    step: of_evaluation(place, mode, features, rendered)
    for step, place in results_lib.of_run(run).items()
  }


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.tools.compare.measure", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("run", type=files.local_path, help="workdir of the run")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  made = measure(args.run)
  with errors.storage(args.run / FILE):
    atomic.write_text(args.run / FILE, measured.to_json(made))
  print(f"wrote {args.run / FILE}: {len(made)} evaluations")


if __name__ == "__main__":
  errors.report(main)
