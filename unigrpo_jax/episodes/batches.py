"""From requests to arrays, on the host: text to ids, images to pixels, padding, sizes, limits.

Everything that a user can get wrong about a request is found here, before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.sampling import flow, text

# Text is padded to a multiple of this, so that prompts of similar length share a compilation.
TEXT_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Request:
  """One row.

  Attributes:
    prompt: what to draw, change or answer.
    seed: seeds everything random about this row, whatever its neighbours.
    image: RGB image to edit or to talk about (PIL), or None.
    size: height and width in pixels; None with an image, whose own (resized) size it then is.
    reasoning: when thinking, what to draw from instead of what the model would write.
  """

  prompt: str
  seed: int = 0
  image: Any = None
  size: tuple[int, int] | None = None
  reasoning: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all rows share.

  Attributes:
    think: writes reasoning first.
    understand: answers in words instead of drawing.
    num_timesteps: points of the time grid; one velocity evaluation less.
    shift: timestep shift.
    guidance: classifier-free guidance.
    temperature: of sampled text; 0 is greedy.
    max_tokens: most tokens of reasoning or answer.
  """

  think: bool = False
  understand: bool = False
  num_timesteps: int = 50
  shift: float = 3.0
  guidance: flow.Guidance = flow.Guidance()
  temperature: float = 0.3
  max_tokens: int = 1000

  def __post_init__(self):
    errors.require("num_timesteps", self.num_timesteps, low=2)
    errors.require("shift", self.shift, above=0)
    errors.require("temperature", self.temperature, low=0)
    errors.require("max_tokens", self.max_tokens, low=1)
    errors.require("guidance.text_scale", self.guidance.text_scale, low=0)
    errors.require("guidance.image_scale", self.guidance.image_scale, low=0)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows ready to run; arrays on the host.

  Attributes:
    settings: what the rows share.
    real: how many rows were asked for; the others repeat the first to fill the devices.
    seeds: of each row.
    prompt_ids, prompt_mask: [B, T] int32 and bool, [im_start] ids [im_end] padded.
    system_ids: [T] int32 like the prompts, or None.
    given_ids, given_mask: given reasonings like the prompts, or None.
    images: VAE-resized RGB images (PIL), or None.
    patches: of the images, or None.
    sizes: height and width in pixels of each row's image.
    grid: places of its latent tokens; None when nothing is drawn.
    capacity: cache slots that the main context needs.
  """

  settings: Settings
  real: int
  seeds: tuple[int, ...]
  prompt_ids: np.ndarray
  prompt_mask: np.ndarray
  system_ids: np.ndarray | None
  given_ids: np.ndarray | None
  given_mask: np.ndarray | None
  images: tuple[Any, ...] | None
  patches: types.Patches | None
  sizes: tuple[tuple[int, int], ...]
  grid: types.LatentGrid | None
  capacity: int

  @property
  def edits(self) -> bool:
    """Whether the images are to be changed rather than talked about."""
    return self.images is not None and not self.settings.understand

  @property
  def writes(self) -> bool:
    """Whether text is sampled."""
    return self.settings.understand or (self.settings.think and self.given_ids is None)


def prepare(
  config: config_lib.BagelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  requests: Sequence[Request],
  settings: Settings,
  *,
  multiple: int = 1,
) -> Batch:
  """Checks requests and makes a batch of them; all have an image, or none has.

  Args:
    config, tokenizer: of the checkpoint.
    requests: the rows.
    settings: what they share.
    multiple: the number of rows is filled up to a multiple of this.

  Raises:
    InputError: a prompt is empty or too long, an image or a size is impossible, or some requests
      have an image or a reasoning and others not.
  """
  real = len(requests)
  if not real:
    raise errors.InputError("a batch needs at least one request")
  if settings.guidance.pack_coupled and real % multiple:
    raise errors.InputError(
      f"cfg_pack_coupled takes a norm over all rows of a batch: {real} prompt(s) do not fill "
      f"batches of {multiple}; give another number of them, or another batch_size"
    )
  requests = [*requests, *[requests[0]] * (-real % multiple)]
  wrap = lambda ids: [tokenizer.im_start, *ids, tokenizer.im_end]
  prompts = []
  for row, request in enumerate(requests):
    if not request.prompt.strip():
      raise errors.InputError(
        f"prompt {row + 1} is empty; write what to draw, change or answer"
      )
    prompts.append(wrap(tokenizer.encode(request.prompt)))
  prompt_ids, prompt_mask = pad_rows(prompts, TEXT_BUCKET)
  system_ids = None
  if settings.think:
    words = (
      tokenizer_lib.SYSTEM_PROMPT_VLM if settings.understand else tokenizer_lib.SYSTEM_PROMPT_GEN
    )
    system_ids = np.asarray(wrap(tokenizer.encode(words)), np.int32)
  given_ids, given_mask = None, None
  if _all_or_none(requests, "reasoning"):
    if not settings.think or settings.understand:
      raise errors.InputError("a reasoning is given but not asked for; set think, to draw from it")
    given = [wrap(tokenizer.encode(request.reasoning)) for request in requests]
    given_ids, given_mask = pad_rows(given, TEXT_BUCKET)
  images, patches = None, None
  if _all_or_none(requests, "image"):
    if any(request.size is not None for request in requests):
      raise errors.InputError("a size is given beside an image, which keeps its own; leave it out")
    images = tuple(
      images_lib.resize(images_lib.to_rgb(request.image), config.vae_image) for request in requests
    )
    sizes = [(image.height, image.width) for image in images]
    patches = image_patches(config, images)
  else:
    default = (config.vae_image.max_size,) * 2
    sizes = [request.size or default for request in requests]
  grid = None
  if not settings.understand:
    check_sizes(config, sizes)
    grid = latent_grid(config, sizes)
  batch = Batch(
    settings=settings, real=real, seeds=tuple(request.seed for request in requests),
    prompt_ids=prompt_ids, prompt_mask=prompt_mask, system_ids=system_ids, given_ids=given_ids,
    given_mask=given_mask, images=images, patches=patches, sizes=tuple(sizes), grid=grid,
    capacity=0,
  )
  return dataclasses.replace(batch, capacity=_capacity(config, batch))


def split(batch: Batch, rows: int) -> list[Batch]:
  """A batch in parts of `rows` rows, all of one shape: they share one compilation.

  Raises:
    InputError: `rows` does not divide the batch.
  """
  total = len(batch.seeds)
  if rows < 1 or total % rows:
    raise errors.InputError(f"a batch of {total} rows cannot be split into parts of {rows}")
  by_row = {
    field.name for field in dataclasses.fields(batch)
  } - {"settings", "real", "system_ids", "capacity"}

  def part(start: int) -> Batch:
    take = lambda a: a[start : start + rows]
    own = {
      name: jax.tree.map(take, value, is_leaf=lambda leaf: isinstance(leaf, tuple))
      for name, value in vars(batch).items() if name in by_row
    }
    return dataclasses.replace(batch, **own, real=min(max(batch.real - start, 0), rows))

  return [part(start) for start in range(0, total, rows)]


def _all_or_none(requests: Sequence[Request], field: str) -> bool:
  """Whether the requests have `field`; refuses a mixture."""
  present = [getattr(request, field) is not None for request in requests]
  if any(present) != all(present):
    raise errors.InputError(f"a batch needs a {field} for every request or for none of them")
  return all(present)


def check_sizes(config: config_lib.BagelConfig, sizes) -> None:
  """Refuses a (height, width) in pixels that the model cannot draw."""
  stride, most = config.latent_stride, config.max_image_side
  for height, width in sizes:
    for name, side in (("height", height), ("width", width)):
      if side != int(side) or side < stride or side % stride or side > most:
        nearest = min(max(round(side / stride), 1) * stride, most)
        raise errors.InputError(
          f"{name}={side}: an image side must be a multiple of {stride} between {stride} and "
          f"{most} pixels for this model; try {nearest}"
        )


def _capacity(config: config_lib.BagelConfig, batch: Batch) -> int:
  """Cache slots that a batch needs; refuses what the RoPE positions of the model do not reach."""
  system = 0 if batch.system_ids is None else len(batch.system_ids)
  written = batch.settings.max_tokens + text.EXTRA_SLOTS if batch.writes else 0
  written += 0 if batch.given_ids is None else batch.given_ids.shape[1]
  clean = batch.grid if batch.edits else None
  splits = [part.mask.shape[1] + 2 for part in (clean, batch.patches) if part is not None]
  room = config.llm.max_positions - system - written - len(splits) - 1
  for row, length in enumerate(batch.prompt_mask.sum(axis=1)):
    if length > room:
      raise errors.InputError(
        f"prompt {row + 1} has {length - 2} tokens, at most {max(room - 2, 0)} fit: the model has "
        f"{config.llm.max_positions} positions (max_position_embeddings), of which system prompt, "
        f"images and max_tokens take {config.llm.max_positions - room}; shorten the prompt"
        + (f" or lower max_tokens={batch.settings.max_tokens}" if batch.writes else "")
      )
  total = system + sum(splits) + batch.prompt_ids.shape[1] + written
  return -(-total // TEXT_BUCKET) * TEXT_BUCKET


def image_patches(config: config_lib.BagelConfig, images: Sequence[Any]) -> types.Patches:
  """What the ViT sees of VAE-resized images: resized once more, as BAGEL does."""
  pixels, ids = [], []
  for image in images:
    array = images_lib.to_array(images_lib.resize(image, config.vit_image))
    pixels.append(images_lib.patchify(array, config.vit.patch_size))
    ids.append(
      images_lib.position_ids(
        *array.shape[:2], config.vit.patch_size, config.vit_max_patches_per_side,
        config.interpolate_pos,
      )
    )
    if ids[-1].max() >= config.vit.num_positions:
      raise errors.InputError(
        f"an image of {array.shape[1]}x{array.shape[0]} pixels needs row {ids[-1].max()} of the "
        f"ViT's position table, which has {config.vit.num_positions}; use a smaller image"
      )
  pixels, mask = pad_rows(pixels)
  return types.Patches(pixels, pad_rows(ids)[0], mask)


def latent_grid(
  config: config_lib.BagelConfig, sizes: Sequence[tuple[int, int]]
) -> types.LatentGrid:
  """Places of the latent tokens of images of these sizes (height, width) in pixels."""
  return types.LatentGrid(*pad_rows([
    images_lib.position_ids(
      *size, config.latent_stride, config.max_latent_size, config.interpolate_pos
    )
    for size in sizes
  ]))


def row_key(seed: int, purpose: str) -> jax.Array:
  """The key of one row for one purpose: "text", "noise" or "posterior"."""
  return jax.random.fold_in(jax.random.key(seed), ("text", "noise", "posterior").index(purpose))


def pad_rows(rows: Sequence[Any], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Stacks sequences of different lengths: ([B, T, ...] zero-padded, [B, T] bool mask)."""
  arrays = [np.asarray(row) for row in rows]
  length = -(-max(len(array) for array in arrays) // multiple) * multiple
  kind = np.float32 if arrays[0].dtype.kind == "f" else np.int32
  out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), kind)
  mask = np.zeros((len(arrays), length), bool)
  for row, array in enumerate(arrays):
    out[row, : len(array)] = array
    mask[row, : len(array)] = True
  return out, mask


def by_size(
  sizes: Sequence[tuple[int, int]], max_pixels: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
  """Groups rows by image size, at most `max_pixels` together: yields (rows, (height, width)).

  Only images of one size share a VAE call: convolutions and group norms would see the padding.
  """
  for size in sorted(set(sizes)):
    rows = [row for row, other in enumerate(sizes) if other == size]
    chunk = max(1, max_pixels // (size[0] * size[1]))
    for start in range(0, len(rows), chunk):
      yield rows[start : start + chunk], size
