"""Packing training sequences: lists of splits to one `types.PackedBatch` of padded rows.

A sample is a list of splits, in the order in which the network reads them. A split holds only its
content; its place in the sequence, its RoPE position and what it may attend to follow from the
splits before it:

- text of n tokens takes n places and n positions, with causal attention;
- an image of n tokens, as patches or as clean latents, takes n + 2 places (its two markers
  included) and one position; attention within it is bidirectional;
- an image to denoise takes n + 2 places and no position. Nothing later attends to it, so it is not
  in the streams: its places stay empty there;
- a dropped conditioning image takes its position but no places.

Source: official BAGEL `PackedDataset.pack_sequence` and `prepare_attention_mask_per_sample`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from unigrpo_jax import types

# Label of a text token without a loss.
NO_LABEL = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """A text, including its im_start and im_end tokens."""

  ids: np.ndarray  # [n] int
  # Target of the output at each token, [n] int, or `NO_LABEL`; None: no loss on this text. See
  # `next_token_labels`.
  labels: np.ndarray | None = None
  weights: np.ndarray | None = None  # of each label, [n] float; None: 1


@dataclasses.dataclass(frozen=True, eq=False)
class PatchImage:
  """An image as the ViT sees it."""

  pixels: np.ndarray  # [n, patch_dim] float32 in [-1, 1], see `images.patchify`
  ids: np.ndarray  # rows of the ViT position tables, [n] int


@dataclasses.dataclass(frozen=True, eq=False)
class CleanImage:
  """An image as latents without noise: context for later splits."""

  latents: np.ndarray  # [n, C] float32
  ids: np.ndarray  # rows of the latent position table, [n] int


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyImage:
  """An image to denoise: x_t = (1 - t) target + t noise; its loss is on noise - target."""

  target: np.ndarray  # clean latent tokens, [n, C] float32
  noise: np.ndarray  # standard normal, [n, C] float32
  t: float  # flow time in [0, 1], 1 is noise
  ids: np.ndarray  # rows of the latent position table, [n] int


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Conditioning images that are left out at random; only their RoPE positions remain.

  A dropped text leaves no position: just leave it out of the list.
  """

  advance: int = 1  # positions of the dropped images


Split = Text | PatchImage | CleanImage | NoisyImage | Dropped


@dataclasses.dataclass(frozen=True)
class PadTo:
  """Sizes of a `PackedBatch`, or multiples that sizes are rounded up to so that shapes repeat."""

  tokens: int = 64  # of the understanding stream, per row
  labels: int = 64  # per row
  patches: int = 64  # per ViT image
  images: int = 1  # ViT images per batch
  clean: int = 64  # clean latent tokens per row
  latents: int = 64  # latent tokens per image to denoise
  noisy: int = 1  # images to denoise per row


@dataclasses.dataclass(frozen=True)
class Widths:
  """Number of features of a ViT patch and of a latent token; see `pack`."""

  patch: int
  latent: int


def sizes(sample: Sequence[Split]) -> PadTo:
  """The sizes that one sample needs, not rounded."""
  lengths = lambda kind: [len(split.ids) for split in sample if isinstance(split, kind)]
  texts, patches, clean, noisy = map(lengths, (Text, PatchImage, CleanImage, NoisyImage))
  labels = [split.labels for split in sample
            if isinstance(split, Text) and split.labels is not None]
  return PadTo(
    tokens=sum(texts) + sum(patches) + 2 * (len(patches) + len(clean)),
    labels=sum(np.count_nonzero(np.asarray(part) != NO_LABEL) for part in labels),
    patches=max(patches, default=0), images=len(patches), clean=sum(clean),
    latents=max(noisy, default=0), noisy=len(noisy),
  )


def next_token_labels(ids: Sequence[int] | np.ndarray) -> np.ndarray:
  """Labels for next-token prediction, [n] int32: each token's successor, `NO_LABEL` for the last.

  The label of the token before im_end is im_end, so the model learns to end the text.
  """
  return np.append(np.asarray(ids, np.int32)[1:], np.int32(NO_LABEL))


def pack(
  samples: Sequence[Sequence[Split]],
  *,
  image_markers: tuple[int, int],
  pad_to: PadTo | None = None,
  widths: Widths | None = None,
) -> types.PackedBatch:
  """Packs B samples into B rows.

  Args:
    samples: a list of splits for each row.
    image_markers: ids of <|vision_start|> and <|vision_end|>.
    pad_to: multiples to round sizes up to; None: `PadTo()`.
    widths: where given, the batch has the fields of all kinds of split, as padding where no sample
      has that kind; so batches of a random mixture have one structure. None: fields of kinds that
      no sample has are None.

  Returns:
    A `PackedBatch` of NumPy arrays. Labels, images to denoise and ViT images are in the order of
    their samples and splits.

  Raises:
    ValueError: there are no samples, or the arrays of a split do not fit together; the message
      names the sample and the split.
  """
  if not samples:
    raise ValueError("samples is empty; a batch needs at least one")
  arrays, images = _padding(samples, pad_to or PadTo(), widths), 0
  for b, sample in enumerate(samples):
    row = _Row(arrays, b, image_markers, image=images)
    for j, split in enumerate(sample):
      try:
        row.append(split)
      except ValueError as error:
        raise ValueError(f"sample {b}, split {j} ({type(split).__name__}): {error}") from None
    if not row.place:
      raise ValueError(f"sample {b} has no tokens")
    images = row.image
  return types.PackedBatch(**arrays)


def _padding(
  samples: Sequence[Sequence[Split]], pad_to: PadTo, widths: Widths | None
) -> dict[str, Any]:
  """The fields of a `PackedBatch` in the sizes of these samples, filled with padding."""
  needed = [sizes(sample) for sample in samples]
  most = lambda name: (sum if name == "images" else max)(getattr(size, name) for size in needed)
  # Never 0: an array without elements has no row to gather from.
  size = PadTo(**{
    name: -(-max(most(name), 1) // multiple) * multiple for name, multiple in vars(pad_to).items()
  })
  rows = len(samples)
  ints = lambda *shape, fill=0: np.full(shape, fill, np.int32)
  floats = lambda *shape: np.zeros(shape, np.float32)
  flags = lambda *shape: np.zeros(shape, bool)

  def stream(name: str, length: int) -> dict[str, np.ndarray]:
    fills = dict(ids=0, position=0, order=types.UNSEEN, reach=types.BLIND)
    return {f"{name}_{column}": ints(rows, length, fill=fill) for column, fill in fills.items()}

  def width(kind: type, features: str, given: int | None) -> int | None:
    """Number of features of a kind of split; None where no sample has that kind."""
    every = {np.shape(getattr(split, features))[-1]
             for sample in samples for split in sample if isinstance(split, kind)}
    every |= {given} if given else set()
    if len(every) > 1:
      raise ValueError(f"token features of widths {sorted(every)} do not go into one batch")
    return every.pop() if every else None

  arrays = stream("und", size.tokens) | dict(
    label_slot=ints(rows, size.labels), label_ids=ints(rows, size.labels),
    label_weight=floats(rows, size.labels),
  )
  if (patch := width(PatchImage, "pixels", widths and widths.patch)) is not None:
    shape = size.images, size.patches
    arrays |= dict(
      vit=types.Patches(pixels=floats(*shape, patch), ids=ints(*shape), mask=flags(*shape)),
      vit_row=ints(size.images), vit_slot=ints(*shape, fill=size.tokens),
    )
  if (latent := width(CleanImage, "latents", widths and widths.latent)) is not None:
    arrays |= stream("clean", size.clean) | dict(clean_latents=floats(rows, size.clean, latent))
  if (latent := width(NoisyImage, "target", widths and widths.latent)) is not None:
    shape = rows, size.noisy, size.latents
    arrays |= dict(
      target=floats(*shape, latent), noise=floats(*shape, latent), t=floats(*shape[:2]),
      noisy_ids=ints(*shape), noisy_mask=flags(*shape),
      noisy_position=ints(*shape[:2]), noisy_reach=ints(*shape[:2], fill=-1),
    )
  return arrays


@dataclasses.dataclass(eq=False)
class _Row:
  """Writes the splits of one sample into row `b`; the counters say where the next one begins."""

  arrays: dict[str, Any]  # fields of the `PackedBatch`
  b: int
  image_markers: tuple[int, int]
  image: int  # number of the batch's next ViT image
  place: int = 0  # of the next token in the sequence
  position: int = 0  # RoPE position of the next token
  # Entries of the row that are filled: "und" and "clean" tokens, "labels", "noisy" images.
  filled: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def append(self, split: Split) -> None:
    match split:
      case Text():
        self._append_text(split)
      case PatchImage():
        self._append_patches(split)
      case CleanImage():
        self._append_latents(split)
      case NoisyImage():
        self._append_noisy(split)
      case Dropped():
        self.position += split.advance
      case _:
        raise ValueError("not a split; give Text, PatchImage, CleanImage, NoisyImage or Dropped")

  def _append_text(self, split: Text) -> None:
    ids = _ids(split.ids)
    count = len(ids)
    labels = np.full(count, NO_LABEL) if split.labels is None else np.asarray(split.labels)
    weights = np.ones(count) if split.weights is None else np.asarray(split.weights)
    if not count == len(labels) == len(weights):
      raise ValueError(f"{count} ids but {len(labels)} labels and {len(weights)} weights")
    if (labels < NO_LABEL).any() or not np.isfinite(weights).all() or (weights < 0).any():
      raise ValueError("labels must be ids or NO_LABEL, and weights finite and not negative")
    labelled = np.flatnonzero(labels != NO_LABEL)
    at = self.b, self._fill("labels", len(labelled))
    self.arrays["label_slot"][at] = self.filled["und"] + labelled
    self.arrays["label_ids"][at] = labels[labelled]
    self.arrays["label_weight"][at] = weights[labelled]
    places = self.place + np.arange(count)
    self._write("und", ids, self.position + np.arange(count), places, places)
    self.place += count
    self.position += count

  def _append_patches(self, split: PatchImage) -> None:
    ids = _ids(split.ids)
    pixels = _features(split.pixels, ids)
    count, vit = len(ids), self.arrays["vit"]
    at = self.image, slice(count)
    vit.pixels[at], vit.ids[at], vit.mask[at] = pixels, ids, True
    self.arrays["vit_row"][self.image] = self.b
    self.arrays["vit_slot"][at] = self.filled["und"] + 1 + np.arange(count)
    self.image += 1
    start, end = self.image_markers
    # The ViT's features replace the embeddings of these ids, so any id will do.
    tokens = np.array([start, *[end] * (count + 1)])
    self._write("und", tokens, self.position, self.place + np.arange(count + 2),
                self.place + count + 1)
    self._end_image(count)

  def _append_latents(self, split: CleanImage) -> None:
    ids = _ids(split.ids)
    latents, count = _features(split.latents, ids), len(ids)
    first, last = self.place, self.place + count + 1
    at = self._write("clean", ids, self.position, np.arange(first + 1, last), last)
    self.arrays["clean_latents"][at] = latents
    self._write("und", np.array(self.image_markers), self.position, np.array([first, last]), last)
    self._end_image(count)

  def _append_noisy(self, split: NoisyImage) -> None:
    ids = _ids(split.ids)
    target, noise = _features(split.target, ids), _features(split.noise, ids)
    if target.shape != noise.shape:
      raise ValueError(f"target is {list(target.shape)} but noise {list(noise.shape)}")
    if not 0 <= split.t <= 1:
      raise ValueError(f"t={split.t} is outside [0, 1]")
    image = self.b, self.filled["noisy"]
    tokens = *image, slice(len(ids))
    for name, at, value in (
      ("target", tokens, target), ("noise", tokens, noise), ("noisy_ids", tokens, ids),
      ("noisy_mask", tokens, True), ("t", image, split.t),
      ("noisy_position", image, self.position), ("noisy_reach", image, self.place - 1),
    ):
      self.arrays[name][at] = value
    self.filled["noisy"] += 1
    self.place += len(ids) + 2

  def _write(self, stream: str, ids, position, order, reach) -> tuple[int, slice]:
    """Appends tokens to a stream of the row, "und" or "clean"; returns their index."""
    at = self.b, self._fill(stream, len(ids))
    for column, values in dict(ids=ids, position=position, order=order, reach=reach).items():
      self.arrays[f"{stream}_{column}"][at] = values
    return at

  def _fill(self, name: str, count: int) -> slice:
    """The next `count` entries of the row's `name`, which are then filled."""
    start = self.filled[name]
    self.filled[name] += count
    return slice(start, start + count)

  def _end_image(self, count: int) -> None:
    self.place += count + 2
    self.position += 1


def _ids(ids) -> np.ndarray:
  ids = np.asarray(ids)
  if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"ids must be a non-empty vector of integers, not {ids.dtype} {list(ids.shape)}"
    )
  if (ids < 0).any():
    raise ValueError(f"ids must not be negative, found {ids.min()}")
  return ids


def _features(features, ids) -> np.ndarray:
  features = np.asarray(features, np.float32)
  if features.ndim != 2 or len(features) != len(ids):
    raise ValueError(f"features {list(features.shape)} do not belong to {len(ids)} ids")
  return features
