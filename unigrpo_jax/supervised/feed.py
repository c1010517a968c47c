"""Feeding supervised training: examples -> splits -> packed microbatches, made in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses

import jax
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import packing, programs, requests
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.supervised import corpus

# Latents of images [M, H, W, 3] in [-1, 1] of one size, with posterior noise: [M, I, C]. M images
# have at most programs.VAE_PIXELS pixels, or M = 1.
EncodeFn = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Weight of each of the n labels of a text (official BAGEL's `len2weight`).
CE_WEIGHTINGS = {
  "token": lambda n: 1.0, "sample": lambda n: 1.0 / n, "square": lambda n: 1.0 / n**0.5,
}

# What a sample has of each of its limits.
_UNITS = {
  "tokens": "tokens (text, ViT patches, markers)", "labels": "labels",
  "patches": "patches in an image",
  "clean": "latent tokens of images to edit", "latents": "latent tokens in an image to draw",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How an example becomes a training sequence.

  Attributes:
    noise_draws: noisy copies of each target, which share its context.
    timestep_shift: of the training times.
    drop_text, drop_vit, drop_vae: probability of leaving a condition out, so that guidance has an
      unconditional model to compare with.
    ce_weighting: one of CE_WEIGHTINGS: every token of every text counts alike ("token"), every
      text ("sample"), or in between, by the root of its length ("square").
  """

  noise_draws: int = 1
  timestep_shift: float = 1.0
  drop_text: float = 0.1
  drop_vit: float = 0.3
  drop_vae: float = 0.3
  ce_weighting: str = "token"


class Feed:
  """Packed batches as a function of the step: a resumed run goes on where it stopped."""

  def __init__(
    self,
    examples: corpus.Corpus,
    config: config_lib.BagelConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    encode_fn: EncodeFn,
    recipe: Recipe,
    limits: packing.PadTo,
    *,
    rows: int,
    microbatches: int,
    seed: int,
  ):
    """`rows` sequences a microbatch on this host, `microbatches` a step.

    Every array has the size that `limits` says, whatever the examples: one compilation.
    """
    self._examples, self._config, self._tokenizer = examples, config, tokenizer
    self._encode, self._recipe, self._limits = encode_fn, recipe, limits
    self._rows, self._microbatches, self._seed = rows, microbatches, seed

  def batch(self, step: int) -> types.PackedBatch:
    """The microbatches of a step, NumPy, on a leading axis.

    Raises:
      InputError: an example cannot be read or is beyond the limits; says where it stands.
    """
    rng = np.random.default_rng((self._seed, step, jax.process_index()))
    micro = [self._microbatch(rng) for _ in range(self._microbatches)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *micro)

  def batches(self, first: int, last: int, ahead: int = 2) -> Iterator[types.PackedBatch]:
    """The batches of steps first to last - 1, made `ahead` in another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pending = [pool.submit(self.batch, step) for step in range(first, min(first + ahead, last))]
      try:
        for step in range(first, last):
          if step + ahead < last:
            pending.append(pool.submit(self.batch, step + ahead))
          yield pending.pop(0).result()
      finally:
        for future in pending:
          future.cancel()

  def _microbatch(self, rng: np.random.Generator) -> types.PackedBatch:
    examples = [self._examples(rng) for _ in range(self._rows)]
    latents = self._latents(examples, rng)
    samples = []
    for example, target, source in zip(examples, latents[: self._rows], latents[self._rows :]):
      with errors.at(example.where):
        samples.append(
          splits_of(example, target, source, self._config, self._tokenizer, self._recipe, rng)
        )
        _check_sample(packing.sizes(samples[-1]), self._limits)
    images = sum(packing.sizes(sample).images for sample in samples)
    if images > self._limits.images:
      raise errors.InputError(
        f"config.limits.images leaves {self._limits.images} to the {self._rows} sequences of a "
        f"microbatch on this host, which have {images}; raise it, at most to config.microbatch"
      )
    return packing.pack(
      samples, image_markers=(self._tokenizer.vision_start, self._tokenizer.vision_end),
      pad_to=self._limits,
      widths=packing.Widths(self._config.vit.patch_dim, self._config.latent_dim),
    )

  def _latents(
    self, examples: Sequence[corpus.Example], rng: np.random.Generator
  ) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """(latent tokens, grid ids) or None: of all targets, then of all sources that are edited.

    Images of one size are encoded together. One that is only asked about is not encoded: the answer
    sees it through the ViT alone.
    """
    c, out = self._config, [None] * 2 * len(examples)
    edited = [None if example.target is None else example.source for example in examples]
    wanted = [example.target for example in examples] + edited
    images, ids = {}, {}
    for place, (example, image) in enumerate(zip([*examples, *examples], wanted)):
      if image is not None:
        with errors.at(example.where):
          images[place] = image = images_lib.resize(image, c.vae_image)
          ids[place] = images_lib.position_ids(
            image.height, image.width, c.latent_stride, c.max_latent_size, c.interpolate_pos
          )
    present = list(images)
    shapes = [(images[place].height, images[place].width) for place in present]
    for group, size in requests.by_size(shapes, programs.VAE_PIXELS):
      places = [present[index] for index in group]
      pixels = np.stack([images_lib.to_array(images[place]) for place in places])
      shape = [side // c.vae.downsample for side in size] + [c.vae.z_channels]
      noise = rng.standard_normal((len(places), *shape), np.float32)
      for place, tokens in zip(places, self._encode(pixels, noise)):
        out[place] = (tokens, ids[place])
    return out


def _check_sample(sizes: packing.PadTo, limits: packing.PadTo) -> None:
  """Refuses a sample that is larger than the arrays of a microbatch."""
  for name, unit in _UNITS.items():
    size, limit = getattr(sizes, name), getattr(limits, name)
    if size > limit:
      raise errors.InputError(
        f"a sample has {size} {unit}, more than config.limits.{name}={limit}; raise it, or leave "
        "the sample out"
      )


def splits_of(
  example: corpus.Example, target, source, config: config_lib.BagelConfig,
  tokenizer: tokenizer_lib.Tokenizer, recipe: Recipe, rng: np.random.Generator,
) -> list[packing.Split]:
  """The sequence of an example: [system] [image, VAE then ViT] prompt [text] [noisy image].

  Args:
    example: what to learn.
    target, source: (latent tokens [n, C], grid ids [n]) of its images, or None.
    config, tokenizer: of the model.
    recipe: noise and dropped conditions.
    rng: generator of both.
  """
  wrap = lambda words: np.array(
    [tokenizer.im_start, *tokenizer.encode(words), tokenizer.im_end], np.int32
  )
  drops = rng.random(3) < (recipe.drop_text, recipe.drop_vit, recipe.drop_vae)
  drop_text, drop_vit, drop_vae = drops & (example.target is not None)
  splits: list[packing.Split] = []
  if example.target is not None and example.text is not None:
    splits.append(packing.Text(wrap(tokenizer_lib.SYSTEM_PROMPT_GEN)))
  if source is not None:
    splits.append(packing.Dropped() if drop_vae else packing.CleanImage(*source))
  if example.source is not None:
    patches = requests.image_patches(
      config, [images_lib.resize(example.source, config.vae_image)]
    )
    image = packing.PatchImage(patches.pixels[0], patches.ids[0])
    splits.append(packing.Dropped() if drop_vit else image)
  if not drop_text:
    splits.append(packing.Text(wrap(example.prompt)))
    if example.text is not None:
      ids = wrap(example.text)
      weight = CE_WEIGHTINGS[recipe.ce_weighting](len(ids) - 1)
      splits.append(
        packing.Text(ids, packing.next_token_labels(ids), np.full(len(ids), weight))
      )
  if target is not None:
    tokens, ids = target
    normal = rng.standard_normal(recipe.noise_draws)
    u, shift = 1 / (1 + np.exp(-normal)), recipe.timestep_shift
    for t in shift * u / (1 + (shift - 1) * u):
      noise = rng.standard_normal(tokens.shape, np.float32)
      splits.append(packing.NoisyImage(tokens, noise, float(t), ids))
  return splits
