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
from unigrpo_jax.episodes import script as script_lib
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
    top: how many of the likeliest tokens are recorded beside each sampled one.
  """

  think: bool = False
  understand: bool = False
  num_timesteps: int = 50
  shift: float = 3.0
  guidance: flow.Guidance = flow.Guidance()
  temperature: float = 0.3
  max_tokens: int = 1000
  top: int = 0

  def __post_init__(self):
    errors.require("num_timesteps", self.num_timesteps, low=2)
    errors.require("shift", self.shift, above=0)
    errors.require("temperature", self.temperature, low=0)
    errors.require("max_tokens", self.max_tokens, low=1)
    errors.require("guidance.text_scale", self.guidance.text_scale, low=0)
    errors.require("guidance.image_scale", self.guidance.image_scale, low=0)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows ready to be sampled; arrays on the host.

  Attributes:
    script: what a row consists of.
    settings: how it is sampled.
    real: how many rows were asked for; the others repeat the first to fill the devices.
    seeds: of each row; () where randomness comes from elsewhere.
    texts: by name, [B / copies, T], as [im_start] ids [im_end] padded; the system prompt has one
      row.
    images: VAE-resized RGB images to edit or to answer about (PIL), or None.
    patches: of the images, or None.
    sizes: height and width in pixels of each row's image.
    grid: places of its latent tokens; None when nothing is drawn.
    capacity: cache slots that what is read needs, and what is sampled where there are no copies.
    copies: trajectories that share what is read.
  """

  script: script_lib.Script
  settings: Settings
  real: int
  seeds: tuple[int, ...]
  texts: dict[str, types.Text]
  images: tuple[Any, ...] | None
  patches: types.Patches | None
  sizes: tuple[tuple[int, int], ...]
  grid: types.LatentGrid | None
  capacity: int
  copies: int = 1

  @property
  def rows(self) -> int:
    """Trajectories, those that fill the devices included."""
    return len(self.sizes)


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
  for row, request in enumerate(requests):
    if not request.prompt.strip():
      raise errors.InputError(f"prompt {row + 1} is empty; write what to draw, change or answer")
    errors.require("seed", request.seed, integer=True, low=0, high=2**32 - 1)
  source, reasoning = (_all_or_none(requests, field) for field in ("image", "reasoning"))
  if reasoning and (not settings.think or settings.understand):
    raise errors.InputError("a reasoning is given but not asked for; set think, to draw from it")
  script = script_lib.make(
    think=settings.think, answer=settings.understand, source=source, reasoning=reasoning
  )
  texts = _texts(tokenizer, [request.prompt for request in requests], settings)
  if reasoning:
    given = [_wrap(tokenizer, request.reasoning) for request in requests]
    texts[script_lib.REASONING] = types.Text(*pad_rows(given, TEXT_BUCKET))
  images, patches = None, None
  if source:
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
  if script.has(script_lib.Drawn):
    check_sizes(config, sizes)
    grid = latent_grid(config, sizes)
  batch = Batch(
    script=script, settings=settings, real=real,
    seeds=tuple(request.seed for request in requests), texts=texts, images=images,
    patches=patches, sizes=tuple(sizes), grid=grid, capacity=0,
  )
  return dataclasses.replace(batch, capacity=_capacity(config, batch))


def prepare_groups(
  config: config_lib.BagelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  prompts: Sequence[str],
  settings: Settings,
  *,
  size: tuple[int, int],
  group_size: int,
  prompt_tokens: int,
  prompt_copies: int = 1,
) -> Batch:
  """Checks prompts and makes a batch of `group_size` trajectories of each.

  Args:
    config, tokenizer: of the checkpoint.
    prompts: P of them.
    settings: how they are sampled.
    size: height and width of the images in pixels.
    group_size: trajectories of a prompt.
    prompt_tokens: every prompt is padded to so many tokens, its two markers included.
    prompt_copies: rows that read the same prompt, each for its part of the group; divides
      `group_size`.

  Raises:
    InputError: a prompt is empty or too long, or the model has too few positions.
  """
  texts = _texts(tokenizer, prompts, settings, prompt_tokens)
  prompt = texts[script_lib.PROMPT]
  texts[script_lib.PROMPT] = types.Text(
    *(np.repeat(a, prompt_copies, axis=0) for a in (prompt.ids, prompt.mask))
  )
  rows = len(prompts) * group_size
  grid = latent_grid(config, [size])
  check_sizes(config, [size])
  system = texts[script_lib.SYSTEM].ids.shape[1] if settings.think else 0
  needed = prompt_tokens + 1
  if settings.think:
    needed += system + settings.max_tokens + text.EXTRA_SLOTS
  if needed > config.llm.max_positions:
    raise errors.InputError(
      f"prompt_tokens={prompt_tokens} and max_tokens={settings.max_tokens} need "
      f"{needed} positions, the model has {config.llm.max_positions} "
      "(max_position_embeddings); lower one of them"
    )
  copies = group_size // prompt_copies
  own = settings.max_tokens + text.EXTRA_SLOTS if settings.think and copies == 1 else 0
  return Batch(
    script=script_lib.make(think=settings.think), settings=settings, real=rows, seeds=(),
    texts=texts, images=None, patches=None, sizes=(size,) * rows,
    grid=types.LatentGrid(*(np.repeat(a, rows, axis=0) for a in (grid.ids, grid.mask))),
    capacity=system + prompt_tokens + own, copies=copies,
  )


def split(batch: Batch, rows: int) -> list[Batch]:
  """A batch without copies in parts of `rows` rows, all of one shape, which compiles once.

  Raises:
    InputError: `rows` does not divide the batch.
  """
  if rows < 1 or batch.rows % rows:
    raise errors.InputError(f"a batch of {batch.rows} rows cannot be split into parts of {rows}")

  def part(start: int) -> Batch:
    cut = lambda a: a if a.shape[0] == 1 else a[start : start + rows]  # one system prompt for all
    texts = {name: jax.tree.map(cut, given) for name, given in batch.texts.items()}
    return dataclasses.replace(
      batch, real=min(max(batch.real - start, 0), rows), texts=texts,
      seeds=batch.seeds[start : start + rows], sizes=batch.sizes[start : start + rows],
      images=batch.images and batch.images[start : start + rows],
      **jax.tree.map(
        lambda a: a[start : start + rows], {"patches": batch.patches, "grid": batch.grid}
      ),
    )

  return [part(start) for start in range(0, batch.rows, rows)]


def _wrap(tokenizer: tokenizer_lib.Tokenizer, words: str) -> list[int]:
  return [tokenizer.im_start, *tokenizer.encode(words), tokenizer.im_end]


def _texts(
  tokenizer: tokenizer_lib.Tokenizer, prompts: Sequence[str], settings: Settings,
  room: int | None = None,
) -> dict[str, types.Text]:
  """The system prompt, where there is one, and the prompts, padded to `room` tokens or a bucket."""
  rows = [_wrap(tokenizer, prompt) for prompt in prompts]
  for prompt, ids in zip(prompts, rows):
    if room is not None and (len(ids) > room or not prompt.strip()):
      raise errors.InputError(
        f"prompt {prompt[:60]!r} has {len(ids)} tokens with its markers, expected 3 to "
        f"config.rollout.prompt_tokens={room}; raise that or leave the prompt out"
      )
  texts = {script_lib.PROMPT: types.Text(*pad_rows(rows, room or TEXT_BUCKET))}
  if settings.think:
    words = (
      tokenizer_lib.SYSTEM_PROMPT_VLM if settings.understand else tokenizer_lib.SYSTEM_PROMPT_GEN
    )
    texts[script_lib.SYSTEM] = types.Text(*pad_rows([_wrap(tokenizer, words)]))
  return texts


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
  lengths = {name: given.ids.shape[1] for name, given in batch.texts.items()}
  samples = batch.script.has(script_lib.Sampled)
  own = batch.settings.max_tokens + text.EXTRA_SLOTS if samples else 0
  own += lengths.get(script_lib.REASONING, 0)
  system = lengths.get(script_lib.SYSTEM, 0)
  clean = batch.grid if batch.images is not None else None
  splits = [part.mask.shape[1] + 2 for part in (clean, batch.patches) if part is not None]
  room = config.llm.max_positions - system - own - len(splits) - 1
  prompt = batch.texts[script_lib.PROMPT]
  for row, length in enumerate(prompt.mask.sum(axis=1)):
    if length > room:
      raise errors.InputError(
        f"prompt {row + 1} has {length - 2} tokens, at most {max(room - 2, 0)} fit: the model has "
        f"{config.llm.max_positions} positions (max_position_embeddings), of which system prompt, "
        f"images and max_tokens take {config.llm.max_positions - room}; shorten the prompt"
        + (f" or lower max_tokens={batch.settings.max_tokens}" if samples else "")
      )
  total = system + sum(splits) + prompt.ids.shape[1] + own
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
