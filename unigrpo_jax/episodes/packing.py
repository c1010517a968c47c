"""Packing training sequences: lists of splits to one `types.PackedBatch` of padded rows.

A sample is a list of splits, in the order in which the network reads them. Each split says what it
holds; its place in the sequence, its RoPE position and what it sees follow from the splits before
it:

- text of n tokens takes n places and n positions, and is causal;
- a patch or clean image of n tokens takes n + 2 places, its two markers included, and one position,
  and sees itself whole;
- an image to denoise takes n + 2 places and no position. Nothing later sees it, so its places stay
  empty in the streams;
- a conditioning image that was dropped takes no place but its position.

Source: official BAGEL `PackedDataset.pack_sequence` and `prepare_attention_mask_per_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from unigrpo_jax import types

# Label of a text token whose output predicts nothing.
NO_LABEL = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """A text split, im_start and im_end included.

  Attributes:
    ids: [n] int.
    labels: what the output at each token should predict, [n] int, `NO_LABEL` for nothing; None: no
      loss on this text. See `next_token_labels`.
    weights: weight of each label, [n] float; None: 1. Ignored where there is no label.
  """

  ids: np.ndarray
  labels: np.ndarray | None = None
  weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PatchImage:
  """An image as the ViT sees it.

  Attributes:
    pixels: [n, patch_dim] float32 in [-1, 1], see `images.patchify`.
    ids: rows of the ViT position tables, [n] int.
    advance: RoPE positions that it takes.
  """

  pixels: np.ndarray
  ids: np.ndarray
  advance: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class CleanImage:
  """An image as latents without noise, context for what follows.

  Attributes:
    latents: [n, C] float32.
    ids: rows of the latent position table, [n] int.
    advance: RoPE positions that it takes.
  """

  latents: np.ndarray
  ids: np.ndarray
  advance: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyImage:
  """An image to denoise: x_t = (1 - t) target + t noise; its loss is on noise - target.

  Attributes:
    target: clean latent tokens, [n, C] float32.
    noise: standard normal, [n, C] float32.
    t: flow time in [0, 1], 1 is noise.
    ids: rows of the latent position table, [n] int.
  """

  target: np.ndarray
  noise: np.ndarray
  t: float
  ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A conditioning image left out to train without it; only its RoPE position remains.

  A dropped text leaves nothing: leave it out of the list.
  """

  advance: int = 1


Split = Text | PatchImage | CleanImage | NoisyImage | Dropped


@dataclasses.dataclass(frozen=True)
class PadTo:
  """Sizes are rounded up to multiples of these, so that batches repeat their shapes.

  Attributes:
    tokens: of the understanding stream a row.
    labels: a row.
    patches: a ViT image.
    images: ViT images a batch.
    clean: clean latent tokens a row.
    latents: latent tokens an image to denoise.
    noisy: images to denoise a row.
  """

  tokens: int = 64
  labels: int = 64
  patches: int = 64
  images: int = 1
  clean: int = 64
  latents: int = 64
  noisy: int = 1


def sizes(sample: Sequence[Split]) -> PadTo:
  """What a sample takes of each of these, before anything is rounded up."""
  lengths = lambda kind: [len(split.ids) for split in sample if isinstance(split, kind)]
  texts, patches, clean, noisy = map(lengths, (Text, PatchImage, CleanImage, NoisyImage))
  labels = [split.labels for split in sample
            if isinstance(split, Text) and split.labels is not None]
  return PadTo(
    tokens=sum(texts) + sum(patches) + 2 * (len(patches) + len(clean)),
    labels=sum(int((np.asarray(part) != NO_LABEL).sum()) for part in labels),
    patches=max(patches, default=0), images=len(patches), clean=sum(clean),
    latents=max(noisy, default=0), noisy=len(noisy),
  )


def next_token_labels(ids: Sequence[int] | np.ndarray) -> np.ndarray:
  """Labels of a text that predicts itself: each token's successor, `NO_LABEL` for the last.

  For [im_start] ids [im_end] these are len(ids) + 1 labels, the terminator the last of them.
  """
  return np.append(np.asarray(ids, np.int32)[1:], np.int32(NO_LABEL))


@dataclasses.dataclass(frozen=True)
class Widths:
  """Features of a ViT patch and of a latent token; see `pack`."""

  patch: int
  latent: int


def pack(
  samples: Sequence[Sequence[Split]],
  *,
  image_markers: tuple[int, int],
  pad_to: PadTo | None = None,
  widths: Widths | None = None,
) -> types.PackedBatch:
  """Packs B samples into B rows.

  Args:
    samples: a list of splits each.
    image_markers: ids of <|vision_start|> and <|vision_end|>.
    pad_to: multiples to round sizes up to; None: `PadTo()`.
    widths: given, kinds of split that no sample has are there all the same, as padding, so that
      batches of a random mixture keep one structure; None leaves them out.

  Returns:
    A `PackedBatch` of numpy arrays. Labels, images to
    denoise and ViT images stand in the order of their samples and splits.

  Raises:
    ValueError: no samples, or a split whose arrays do not belong together; names the sample and
      split.
  """
  pad_to = PadTo() if pad_to is None else pad_to
  if not samples:
    raise ValueError("samples is empty; a batch needs at least one")
  rows = []
  for i, sample in enumerate(samples):
    row = _Row(image_markers)
    for j, split in enumerate(sample):
      try:
        row.append(split)
      except ValueError as error:
        raise ValueError(f"sample {i}, split {j} ({type(split).__name__}): {error}") from None
    if not (row.und or row.noisy):
      raise ValueError(f"sample {i} has no tokens")
    rows.append(row)
  length = _round_up(max(len(row.und) for row in rows), pad_to.tokens)
  return types.PackedBatch(
    **_columns([row.und for row in rows], length, dict(
      und_ids=0, und_position=0, und_order=types.UNSEEN, und_reach=types.BLIND)),
    **_labels([row.labels for row in rows], pad_to.labels),
    **_patch_images([row.patches for row in rows], length, pad_to, widths),
    **_clean_latents(rows, pad_to.clean, widths),
    **_noisy_images([row.noisy for row in rows], pad_to, widths),
  )


@dataclasses.dataclass(eq=False)
class _Row:
  """One sample on its way into the batch: the streams so far and where the next split begins."""

  image_markers: tuple[int, int]
  place: int = 0
  position: int = 0
  # (id, position, order, reach) a token of the understanding stream; likewise the clean latents,
  # with the row of the position table as id.
  und: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
  clean: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
  clean_latents: list[np.ndarray] = dataclasses.field(default_factory=list)
  labels: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)  # slot, id, weight
  patches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(
    default_factory=list
  )  # pixels, ids, slots
  noisy: list[tuple[NoisyImage, int, int]] = dataclasses.field(
    default_factory=list
  )  # image, position, reach

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
    labels = np.full(len(ids), NO_LABEL) if split.labels is None else np.asarray(split.labels)
    weights = np.ones(len(ids)) if split.weights is None else np.asarray(split.weights)
    if not len(ids) == len(labels) == len(weights):
      raise ValueError(f"{len(ids)} ids but {len(labels)} labels and {len(weights)} weights")
    if (labels < NO_LABEL).any() or not np.isfinite(weights).all() or (weights < 0).any():
      raise ValueError("labels must be ids or NO_LABEL, and weights finite and not negative")
    for id_, label, weight in zip(ids, labels, weights):
      if label != NO_LABEL:
        self.labels.append((len(self.und), int(label), float(weight)))
      self.und.append((int(id_), self.position, self.place, self.place))
      self.place += 1
      self.position += 1

  def _append_patches(self, split: PatchImage) -> None:
    ids, pixels = _ids(split.ids), _features(split.pixels, split.ids)
    first, last = self.place, self.place + len(ids) + 1
    start, end = self.image_markers
    slots = len(self.und) + 1 + np.arange(len(ids))
    # The ViT's features replace whatever id stands at their places.
    tokens = [start, *[end] * (len(ids) + 1)]
    self.und += [(id_, self.position, first + k, last) for k, id_ in enumerate(tokens)]
    self.patches.append((pixels, ids, slots))
    self.place = last + 1
    self.position += split.advance

  def _append_latents(self, split: CleanImage) -> None:
    ids, latents = _ids(split.ids), _features(split.latents, split.ids)
    first, last = self.place, self.place + len(ids) + 1
    start, end = self.image_markers
    self.und += [(start, self.position, first, last), (end, self.position, last, last)]
    self.clean += [(int(id_), self.position, first + 1 + k, last) for k, id_ in enumerate(ids)]
    self.clean_latents.append(latents)
    self.place = last + 1
    self.position += split.advance

  def _append_noisy(self, split: NoisyImage) -> None:
    target, noise = _features(split.target, split.ids), _features(split.noise, split.ids)
    if target.shape != noise.shape:
      raise ValueError(f"target is {list(target.shape)} but noise {list(noise.shape)}")
    if not 0 <= split.t <= 1:
      raise ValueError(f"t={split.t} is outside [0, 1]")
    self.noisy.append((split, self.position, self.place - 1))
    self.place += len(_ids(split.ids)) + 2


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


def _round_up(size: int, multiple: int) -> int:
  """Never 0: an array without elements has no row to gather from."""
  return -(-max(size, 1) // multiple) * multiple


def _columns(rows, length: int, fills: dict[str, int]) -> dict[str, np.ndarray]:
  """Rows of tuples to one padded int32 array [B, length] a column."""
  out = {name: np.full((len(rows), length), fill, np.int32) for name, fill in fills.items()}
  for b, row in enumerate(rows):
    for array, column in zip(out.values(), zip(*row)):
      array[b, : len(row)] = column
  return out


def _labels(rows, multiple: int) -> dict[str, np.ndarray]:
  length = _round_up(max(len(row) for row in rows), multiple)
  columns = _columns([[entry[:2] for entry in row] for row in rows], length,
                     dict(label_slot=0, label_ids=0))
  weight = np.zeros((len(rows), length), np.float32)
  for b, row in enumerate(rows):
    weight[b, : len(row)] = [entry[2] for entry in row]
  return columns | dict(label_weight=weight)


def _patch_images(rows, length: int, pad_to: PadTo, widths: Widths | None) -> dict:
  images = [(b, *image) for b, row in enumerate(rows) for image in row]
  width = _same_width((pixels for _, pixels, _, _ in images), widths and widths.patch)
  if width is None:
    return {}
  count = _round_up(len(images), pad_to.images)
  patches = _round_up(max((len(ids) for _, _, ids, _ in images), default=0), pad_to.patches)
  out = types.Patches(
    pixels=np.zeros((count, patches, width), np.float32),
    ids=np.zeros((count, patches), np.int32),
    mask=np.zeros((count, patches), bool),
  )
  vit_row = np.zeros(count, np.int32)
  vit_slot = np.full((count, patches), length, np.int32)
  for m, (b, pixels, ids, slots) in enumerate(images):
    n = len(ids)
    out.pixels[m, :n], out.ids[m, :n], out.mask[m, :n] = pixels, ids, True
    vit_row[m], vit_slot[m, :n] = b, slots
  return dict(vit=out, vit_row=vit_row, vit_slot=vit_slot)


def _clean_latents(
  rows: list[_Row], multiple: int, widths: Widths | None
) -> dict[str, np.ndarray]:
  parts = (part for row in rows for part in row.clean_latents)
  width = _same_width(parts, widths and widths.latent)
  if width is None:
    return {}
  length = _round_up(max(len(row.clean) for row in rows), multiple)
  latents = np.zeros((len(rows), length, width), np.float32)
  for b, row in enumerate(rows):
    if row.clean:
      latents[b, : len(row.clean)] = np.concatenate(row.clean_latents)
  fills = dict(clean_ids=0, clean_position=0, clean_order=types.UNSEEN, clean_reach=types.BLIND)
  return _columns([row.clean for row in rows], length, fills) | dict(clean_latents=latents)


def _noisy_images(rows, pad_to: PadTo, widths: Widths | None) -> dict[str, np.ndarray]:
  images = [image for row in rows for image, _, _ in row]
  width = _same_width((np.asarray(image.target) for image in images), widths and widths.latent)
  if width is None:
    return {}
  count = _round_up(max(len(row) for row in rows), pad_to.noisy)
  tokens = _round_up(max((len(image.ids) for image in images), default=0), pad_to.latents)
  shape = (len(rows), count)
  out = dict(
    target=np.zeros((*shape, tokens, width), np.float32),
    noise=np.zeros((*shape, tokens, width), np.float32),
    t=np.zeros(shape, np.float32),
    noisy_ids=np.zeros((*shape, tokens), np.int32),
    noisy_mask=np.zeros((*shape, tokens), bool),
    noisy_position=np.zeros(shape, np.int32),
    noisy_reach=np.full(shape, -1, np.int32),
  )
  for b, row in enumerate(rows):
    for r, (image, position, reach) in enumerate(row):
      at = b, r, slice(len(image.ids))
      out["target"][at], out["noise"][at], out["t"][b, r] = image.target, image.noise, image.t
      out["noisy_ids"][at], out["noisy_mask"][at] = image.ids, True
      out["noisy_position"][b, r], out["noisy_reach"][b, r] = position, reach
  return out


def _same_width(arrays, width: int | None) -> int | None:
  """The one width that all arrays and `width` have; None where there is none of either."""
  found = {array.shape[1] for array in arrays} | ({width} if width else set())
  if len(found) > 1:
    raise ValueError(f"token features of widths {sorted(found)} do not go into one batch")
  return found.pop() if found else None
