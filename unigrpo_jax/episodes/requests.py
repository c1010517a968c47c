"""From requests to arrays, on the host: text to ids, images to pixels, padding, sizes, limits.

Every mistake that a user can make in a request is reported here, before weights are loaded.
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
  """What a user asks for; becomes one row of a batch.

  Attributes:
    prompt: what to draw, change or answer.
    seed: of all randomness of this row, which does not depend on the other rows.
    image: RGB image to edit or to ask about (PIL), or None.
    size: (height, width) of the picture in pixels. None takes the size of `image` after resizing,
      or without one the largest of the model. Must be None with an image.
    reasoning: with `Settings.think`, a reasoning to draw from in place of a sampled one.
  """

  prompt: str
  seed: int = 0
  image: Any = None
  size: tuple[int, int] | None = None
  reasoning: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a batch is sampled; the same for all of its rows.

  Attributes:
    think: write a reasoning before drawing or answering.
    understand: answer in words instead of drawing.
    num_timesteps: points of the time grid; there is one denoising step less.
    shift: timestep shift.
    guidance: classifier-free guidance.
    temperature: of sampled text; 0 is greedy.
    max_tokens: length limit of a reasoning or an answer.
    top: how many of the likeliest tokens are recorded with each sampled one.

  Raises:
    InputError: a number is out of range.
  """

  think: bool = False
  understand: bool = False
  num_timesteps: int = 50
  shift: float = 3.0
  guidance: flow.Guidance = flow.Guidance()
  temperature: float = 0.3
  max_tokens: int = 1000
  top: int = 0

  @classmethod
  def of(cls, defaults: config_lib.GenerationDefaults, **others: Any) -> Settings:
    """Those that a checkpoint is meant to be sampled with, `config.generation`; and `others`."""
    d = defaults
    return cls(**dict(
      num_timesteps=d.num_timesteps, shift=d.timestep_shift, temperature=d.temperature,
      max_tokens=d.max_tokens, guidance=flow.Guidance(
        text_scale=d.cfg_text_scale, interval=tuple(d.cfg_interval), renorm=d.cfg_renorm_type
      ),
    ) | others)

  def __post_init__(self):
    errors.require("num_timesteps", self.num_timesteps, low=2)
    errors.require("shift", self.shift, above=0)
    errors.require_temperature("temperature", self.temperature)
    errors.require("max_tokens", self.max_tokens, low=1)
    errors.require("guidance.text_scale", self.guidance.text_scale, low=0)
    errors.require("guidance.image_scale", self.guidance.image_scale, low=0)


@dataclasses.dataclass(frozen=True)
class Batch:
  """B rows ready to be sampled; its arrays are on the host.

  Attributes:
    script: the segments of a row.
    settings: how rows are sampled.
    real: number of rows that were requested; the others repeat the first to fill the devices.
    seeds: of each row; () where the caller supplies the randomness.
    texts: {name: [B / copies, T]}, each text as [im_start] ids [im_end] and padding; the system
      prompt has one row.
    images: RGB images to edit or to ask about (PIL), resized by the VAE's rule; None without.
    patches: ViT patches of the images; None without.
    sizes: (height, width) in pixels of each row's image.
    grid: latent grids of the rows' images; None where nothing is drawn.
    capacity: cache slots for the shared segments and, where `copies` is 1, for the sampled text.
    copies: how many consecutive trajectories share one row of the texts.
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
    """B: the number of trajectories, including those that only fill the devices."""
    return len(self.sizes)


def prepare(
  config: config_lib.BagelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  requests: Sequence[Request],
  settings: Settings,
  *,
  multiple: int = 1,
) -> Batch:
  """Checks requests and makes a batch of them; either all have an image, or none has.

  Args:
    config, tokenizer: of the checkpoint.
    requests: one per row.
    settings: of all of them.
    multiple: the number of rows is filled up to a multiple of this.

  Raises:
    InputError: a prompt is empty or too long, an image or a size is impossible, or only some of
      the requests have an image or a reasoning.
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
    given = [wrap(tokenizer, request.reasoning) for request in requests]
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
    prompts: P texts.
    settings: how they are sampled.
    size: (height, width) of the images in pixels.
    group_size: trajectories of a prompt.
    prompt_tokens: length to which every prompt is padded, its two markers included.
    prompt_copies: into how many parts a group is cut; each part reads the prompt in a row of its
      own. Divides `group_size`.

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
  """Cuts a batch (with `copies` 1) into batches of `rows` rows, whose one shape compiles once.

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


def wrap(tokenizer: tokenizer_lib.Tokenizer, words: str) -> list[int]:
  """The ids of a text between its markers: [im_start] ids [im_end]."""
  return [tokenizer.im_start, *tokenizer.encode(words), tokenizer.im_end]


def _texts(
  tokenizer: tokenizer_lib.Tokenizer, prompts: Sequence[str], settings: Settings,
  room: int | None = None,
) -> dict[str, types.Text]:
  """The prompts and, with `think`, the system prompt, as {name: text}.

  Prompts are padded to `room` tokens, or without it to a multiple of TEXT_BUCKET.
  """
  rows = [wrap(tokenizer, prompt) for prompt in prompts]
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
    texts[script_lib.SYSTEM] = types.Text(*pad_rows([wrap(tokenizer, words)]))
  return texts


def _all_or_none(requests: Sequence[Request], field: str) -> bool:
  """Whether all requests have `field`; InputError where only some have it."""
  present = [getattr(request, field) is not None for request in requests]
  if any(present) != all(present):
    raise errors.InputError(f"a batch needs a {field} for every request or for none of them")
  return all(present)


def check_sizes(config: config_lib.BagelConfig, sizes) -> None:
  """Raises InputError for a (height, width) in pixels that the model cannot draw."""
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
  """Cache slots that a batch needs.

  Raises:
    InputError: a row needs more RoPE positions than the model has.
  """
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
  """The ViT's patches of VAE-resized images, which are resized once more, as BAGEL does.

  Raises:
    InputError: an image has patches that the ViT's position table has no row for.
  """
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
  """The latent grids of M images, whose sizes are (height, width) in pixels."""
  return types.LatentGrid(*pad_rows([
    images_lib.position_ids(
      *size, config.latent_stride, config.max_latent_size, config.interpolate_pos
    )
    for size in sizes
  ]))


def row_key(seed: int, purpose: str) -> jax.Array:
  """The PRNG key of a row for one purpose: "text", "noise" or "posterior"."""
  return jax.random.fold_in(jax.random.key(seed), ("text", "noise", "posterior").index(purpose))


def pad_rows(
  rows: Sequence[Any], multiple: int = 1, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Stacks sequences of different lengths: ([B, T, ...] zero-padded, [B, T] bool mask).

  T is the longest one's, rounded up to a multiple, but at least `least`.
  """
  arrays = [np.asarray(row) for row in rows]
  length = max(-(-max(len(array) for array in arrays) // multiple) * multiple, least)
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
  """Groups rows by image size, at most `max_pixels` in all per group (but at least one row).

  Only images of one size share a VAE call: convolutions and group norms would see padding.

  Yields (rows, (height, width)).
  """
  for size in sorted(set(sizes)):
    rows = [row for row, other in enumerate(sizes) if other == size]
    chunk = max(1, max_pixels // (size[0] * size[1]))
    for start in range(0, len(rows), chunk):
      yield rows[start : start + chunk], size
