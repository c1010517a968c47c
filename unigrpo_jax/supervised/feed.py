"""Feeding supervised training: examples -> splits -> packed microbatches, made in a thread."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import itertools

import jax
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import packing, programs, requests
from unigrpo_jax.episodes import script as script_lib
from unigrpo_jax.losses import supervised as losses
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
  """How an example becomes a training sequence."""

  noise_draws: int = 1  # noisy copies of each target, which share its context
  timestep_shift: float = 1.0  # of the training times
  # (height, width) in pixels to which images to draw or edit are cropped, the nearest; () for none.
  image_sizes: tuple[tuple[int, int], ...] = ()
  # Probability of leaving a condition out, so that guidance has an unconditional model to compare
  # with.
  drop_text: float = 0.1
  drop_vit: float = 0.3
  drop_vae: float = 0.3
  # One of CE_WEIGHTINGS: every token of every text counts alike ("token"), every text ("sample"),
  # or in between, by the root of its length ("square").
  ce_weighting: str = "token"


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
  """Packed batches as a function of the step, whose arrays have the same sizes in all of them.

  The rows of all steps are numbered from 0, and each has a generator of its own, seeded with its
  number. A batch therefore depends neither on the number of hosts nor, but for its layout, on the
  size of a microbatch, and a resumed run needs no state.
  """

  examples: corpus.Corpus
  config: config_lib.BagelConfig
  tokenizer: tokenizer_lib.Tokenizer
  encode_fn: EncodeFn
  recipe: Recipe
  limits: packing.PadTo  # sizes of a microbatch's arrays; `images` are those of this host
  sequences_per_step: int  # all hosts together
  microbatch: int  # sequences, all hosts together
  local_rows: np.ndarray  # of each microbatch, those that this host makes: [n] int32
  seed: int

  def batch(self, step: int) -> types.PackedBatch:
    """This host's part of a step: NumPy, [microbatches, its rows or ViT images, ...].

    `vit_row` counts the rows of all hosts.

    Raises:
      InputError: an example cannot be read or is beyond the limits; names file and line.
    """
    first = step * self.sequences_per_step
    starts = range(first, first + self.sequences_per_step, self.microbatch)
    rows = [self._row(start + int(row)) for start in starts for row in self.local_rows]
    self._encode(rows)
    samples = [self._sample(row) for row in rows]
    count = len(self.local_rows)
    micro = [self._pack(samples[at : at + count]) for at in range(0, len(samples), count)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *micro)

  def _row(self, number: int) -> _Row:
    rng = np.random.default_rng((self.seed, corpus.ROWS, number))
    example = self.examples(number, rng)
    with errors.at(example.where):
      images = {name: getattr(example, name) for name in ("target", "source")}
      # An image that is only asked about is not encoded, and stays whole.
      sizes = self.recipe.image_sizes if example.target is not None else ()
      resize = lambda image: (
        images_lib.crop(image, sizes) if sizes else images_lib.resize(image, self.config.vae_image)
      )
      return _Row(rng, dataclasses.replace(
        example, **{name: image and resize(image) for name, image in images.items()}
      ))

  def _encode(self, rows: Sequence[_Row]) -> None:
    """Encodes what is drawn or edited, images of one size together.

    An image that is only asked about is not encoded: the answer sees it through the ViT alone.
    """
    c = self.config.vae
    wanted = [
      (row, name, image) for row in rows if row.example.target is not None
      for name in ("target", "source") if (image := getattr(row.example, name)) is not None
    ]
    noise = [
      row.rng.standard_normal(
        (image.height // c.downsample, image.width // c.downsample, c.z_channels), np.float32
      )
      for row, _, image in wanted
    ]
    sizes = [(image.height, image.width) for *_, image in wanted]
    for group, _ in requests.by_size(sizes, programs.VAE_PIXELS):
      pixels = np.stack([images_lib.to_array(wanted[index][2]) for index in group])
      latents = self.encode_fn(pixels, np.stack([noise[index] for index in group]))
      for index, tokens in zip(group, latents):
        row, name, _ = wanted[index]
        row.latents[name] = tokens

  def _sample(self, row: _Row) -> list[packing.Split]:
    with errors.at(row.example.where):
      sample = splits_of(
        row.example, row.latents, self.config, self.tokenizer, self.recipe, row.rng
      )
      sizes = packing.sizes(sample)
      for name, unit in _UNITS.items():
        size, limit = getattr(sizes, name), getattr(self.limits, name)
        if size > limit:
          raise errors.InputError(
            f"a sample has {size} {unit}, more than config.limits.{name}={limit}; raise it, or "
            "leave the sample out"
          )
    return sample

  def _pack(self, samples: Sequence[Sequence[packing.Split]]) -> types.PackedBatch:
    images = sum(isinstance(split, packing.PatchImage) for sample in samples for split in sample)
    if images > self.limits.images:
      raise errors.InputError(
        f"config.limits.images leaves {self.limits.images} to the {len(samples)} sequences of a "
        f"microbatch on this host, which have {images}; raise it, at most to config.microbatch"
      )
    batch = packing.pack(
      samples, image_markers=(self.tokenizer.vision_start, self.tokenizer.vision_end),
      pad_to=self.limits,
      widths=packing.Widths(self.config.vit.patch_dim, self.config.latent_dim),
    )
    return batch.replace(vit_row=self.local_rows[batch.vit_row])


@dataclasses.dataclass(eq=False)
class _Row:
  """A row on its way into the batch: images are resized, `latents` are of those encoded."""

  rng: np.random.Generator
  example: corpus.Example
  latents: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def splits_of(
  example: corpus.Example, latents: Mapping[str, np.ndarray], config: config_lib.BagelConfig,
  tokenizer: tokenizer_lib.Tokenizer, recipe: Recipe, rng: np.random.Generator,
) -> list[packing.Split]:
  """The training sequence of an example: the script of its task, its conditions dropped by chance.

  Text that the policy is to write has labels, an image that it is to draw is there as noisy copies.

  Args:
    example: what to learn; its images have the sizes that the autoencoder sees.
    latents: tokens [n, C] of its "target", and of the "source" where that is edited.
    config, tokenizer: of the model.
    recipe: noise and dropped conditions.
    rng: generator of both.
  """
  draws = example.target is not None
  script = script_lib.make(
    think=draws and example.text is not None, answer=not draws, source=example.source is not None
  )
  # Only drawing is guided.
  drop_text, drop_vit, drop_vae = draws & (
    rng.random(3) < (recipe.drop_text, recipe.drop_vit, recipe.drop_vae)
  )
  given = {script_lib.SYSTEM: tokenizer_lib.SYSTEM_PROMPT_GEN, script_lib.PROMPT: example.prompt}
  ids_of = lambda text: np.array(requests.wrap(tokenizer, text), np.int32)
  grid = lambda image: requests.latent_grid(config, [(image.height, image.width)]).ids[0]
  splits: list[packing.Split] = []
  for segment in script.segments:
    match segment:
      case script_lib.Given(name):
        if name != script_lib.PROMPT or not drop_text:
          splits.append(packing.Text(ids_of(given[name])))
      case script_lib.Seen():
        if segment.latents:
          clean = packing.CleanImage(latents["source"], grid(example.source))
          splits.append(packing.Dropped() if drop_vae else clean)
        patches = requests.image_patches(config, [example.source])
        seen = packing.PatchImage(patches.pixels[0], patches.ids[0])
        splits.append(packing.Dropped() if drop_vit else seen)
      case script_lib.Sampled():
        if not drop_text:
          ids = ids_of(example.text)
          weight = CE_WEIGHTINGS[recipe.ce_weighting](len(ids) - 1)
          splits.append(
            packing.Text(ids, packing.next_token_labels(ids), np.full(len(ids), weight))
          )
      case script_lib.Drawn():
        target, places = latents["target"], grid(example.target)
        normal = rng.standard_normal(recipe.noise_draws)
        for t in losses.shifted_timesteps(normal, shift=recipe.timestep_shift):
          noise = rng.standard_normal(target.shape, np.float32)
          splits.append(packing.NoisyImage(target, noise, float(t), places))
  return splits


class Prefetch:
  """The batches of some steps, made in order by a thread before they are needed.

  `error` looks ahead, so that all hosts can stop before one needs a batch that it cannot make.
  """

  def __init__(
    self, batch_fn: Callable[[int], types.PackedBatch], steps: Iterable[int], depth: int = 3
  ):
    """`batch_fn` makes the batch of a step, `depth` of them before the first is asked for."""
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._futures = (self._pool.submit(batch_fn, step) for step in steps)
    self._pending = collections.deque(itertools.islice(self._futures, depth))

  def next(self) -> types.PackedBatch:
    """The batch of the next step; raises what its making raised."""
    self._pending.extend(itertools.islice(self._futures, 1))
    return self._pending.popleft().result()

  def error(self, count: int) -> errors.InputError | None:
    """Waits for the next `count` batches; what is wrong with the first that cannot be made.

    It raises exceptions that no user can cause.
    """
    for future in itertools.islice(self._pending, count):
      try:
        future.result()
      except errors.InputError as error:
        return error
    return None

  def close(self) -> None:
    """Ends the thread, when the batch in the making is done."""
    self._pool.shutdown(cancel_futures=True)
