"""Packed batches: places, positions and reach by hand, padding, and what is refused."""

import numpy as np
import pytest

from unigrpo_jax import types
from unigrpo_jax.episodes import packing

START, END = 90, 91
NONE = packing.NO_LABEL
TIGHT = packing.PadTo(tokens=1, labels=1, patches=1, clean=1, latents=1)


def pack(samples, pad_to=TIGHT):
  return packing.pack(samples, image_markers=(START, END), pad_to=pad_to)


def patches(count):
  pixels = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
  return packing.PatchImage(pixels, 20 + np.arange(count))


def clean(count):
  latents = 0.5 + np.arange(count * 2, dtype=np.float32).reshape(count, 2)
  return packing.CleanImage(latents, 30 + np.arange(count))


def noisy(count, t=0.25):
  target = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
  return packing.NoisyImage(target, -target, t, 40 + np.arange(count))


def text(*ids, labels=None, weights=None):
  return packing.Text(np.array(ids), labels, weights)


def test_places_positions_and_reach():
  # Places: text 0-1, patches 2-5, noisy 6-8 (a gap), clean 9-12, text 13-14, noisy 15-18.
  batch = pack([[text(1, 2), patches(2), noisy(1), clean(2), text(3, 4), noisy(2, t=1.0)]])
  columns = np.stack([batch.und_ids, batch.und_position, batch.und_order, batch.und_reach], -1)
  np.testing.assert_array_equal(columns[0], [
    (1, 0, 0, 0), (2, 1, 1, 1),
    (START, 2, 2, 5), (END, 2, 3, 5), (END, 2, 4, 5), (END, 2, 5, 5),
    (START, 3, 9, 12), (END, 3, 12, 12),
    (3, 4, 13, 13), (4, 5, 14, 14),
  ])
  np.testing.assert_array_equal(batch.vit_slot, [[3, 4]])
  np.testing.assert_array_equal(batch.vit_row, [0])
  np.testing.assert_array_equal(batch.vit.ids, [[20, 21]])
  np.testing.assert_array_equal(batch.clean_order, [[10, 11]])
  np.testing.assert_array_equal(batch.clean_reach, [[12, 12]])
  np.testing.assert_array_equal(batch.clean_position, [[3, 3]])
  np.testing.assert_array_equal(batch.clean_ids, [[30, 31]])
  np.testing.assert_array_equal(batch.clean_latents, [[[0.5, 1.5], [2.5, 3.5]]])
  # The first noisy image takes no position: the clean copy after it has the same one.
  np.testing.assert_array_equal(batch.noisy_position, [[3, 6]])
  np.testing.assert_array_equal(batch.noisy_reach, [[5, 14]])
  np.testing.assert_array_equal(batch.noisy_mask, [[[True, False], [True, True]]])
  np.testing.assert_array_equal(batch.noisy_ids, [[[40, 0], [40, 41]]])
  np.testing.assert_array_equal(batch.t, np.float32([[0.25, 1.0]]))
  np.testing.assert_array_equal(batch.noise, -batch.target)


def test_a_dropped_image_takes_its_position_and_no_place():
  seen = pack([[text(1), patches(2), text(2), noisy(1)]])
  dropped = pack([[text(1), packing.Dropped(), text(2), noisy(1)]])
  assert seen.und_position[0, -1] == dropped.und_position[0, -1] == 2
  assert seen.und_order[0, -1] == 5 and dropped.und_order[0, -1] == 1
  assert dropped.noisy_position[0, 0] == 3
  assert dropped.vit is None and dropped.vit_slot is None
  several = pack([[text(1), packing.Dropped(4), text(2)]])
  np.testing.assert_array_equal(several.und_position, [[0, 5]])


def test_an_image_without_context_reaches_nothing():
  batch = pack([[noisy(2)]])
  assert batch.noisy_reach[0, 0] == -1
  assert (batch.und_order == types.UNSEEN).all() and (batch.und_reach == types.BLIND).all()


def test_labels():
  labelled = text(7, 8, 9, labels=packing.next_token_labels([7, 8, 9]))
  marked = text(5, 6, labels=np.array([NONE, START]), weights=np.array([3.0, 0.5]))
  batch = pack([[patches(1), labelled, marked], [text(4)]])
  # The stream begins with three tokens of the image.
  np.testing.assert_array_equal(batch.label_slot, [[3, 4, 7], [0, 0, 0]])
  np.testing.assert_array_equal(batch.label_ids, [[8, 9, START], [0, 0, 0]])
  np.testing.assert_array_equal(batch.label_weight, [[1, 1, 0.5], [0, 0, 0]])


def test_next_token_labels():
  np.testing.assert_array_equal(packing.next_token_labels([1, 5, 6, 2]), [5, 6, 2, NONE])


def test_shapes_are_rounded_up_and_padding_is_unseen():
  pad_to = packing.PadTo(tokens=8, labels=4, patches=5, images=3, clean=7, latents=6, noisy=2)
  sample = [text(1, 2, labels=packing.next_token_labels([1, 2])), patches(2), clean(3), noisy(4)]
  batch = pack([sample, [text(3)]], pad_to)
  assert batch.und_ids.shape == (2, 8) and batch.label_ids.shape == (2, 4)
  assert batch.vit.pixels.shape == (3, 5, 3) and batch.clean_latents.shape == (2, 7, 2)
  assert batch.target.shape == (2, 2, 6, 2)
  assert batch.und_ids.dtype == np.int32 and batch.target.dtype == np.float32
  assert (batch.und_order[1, 1:] == types.UNSEEN).all()
  assert (batch.und_reach[1, 1:] == types.BLIND).all()
  assert (batch.clean_order[1] == types.UNSEEN).all()
  assert not batch.noisy_mask[1].any() and not batch.vit.mask[1:].any()
  # Padded patches are written nowhere: one past the last place.
  assert (batch.vit_slot[~batch.vit.mask] == 8).all()


def test_sizes_of_a_sample_are_those_of_its_batch():
  """Packed alone and tight; what it has none of takes one place all the same."""
  labelled = text(7, 8, 9, labels=packing.next_token_labels([7, 8, 9]))
  for sample in (
    [text(1, 2), labelled, patches(2), patches(3), clean(2), clean(4), noisy(4), noisy(2)],
    [labelled, labelled, packing.Dropped()],
    [noisy(5)],
  ):
    batch, sizes = pack([sample]), packing.sizes(sample)
    present = dict(tokens=batch.und_ids.shape[1], labels=batch.label_ids.shape[1])
    if batch.vit is not None:
      present |= dict(images=len(batch.vit.ids), patches=batch.vit.ids.shape[1])
    if batch.clean_ids is not None:
      present |= dict(clean=batch.clean_ids.shape[1])
    if batch.t is not None:
      present |= dict(noisy=batch.t.shape[1], latents=batch.noisy_ids.shape[2])
    for name, size in vars(sizes).items():
      assert present.get(name, 1) == max(size, 1), name
  assert packing.sizes([noisy(5)]) == packing.PadTo(0, 0, 0, 0, 0, latents=5, noisy=1)


def test_a_row_does_not_depend_on_its_neighbours():
  first = [text(1, 2), clean(3), noisy(2)]
  second = [patches(5), text(4, 5, 6, labels=packing.next_token_labels([4, 5, 6])), noisy(4)]
  both, alone = pack([first, second]), pack([second])
  for name in ("und_ids", "und_position", "und_order", "und_reach", "label_slot", "label_ids"):
    [row] = getattr(alone, name)
    np.testing.assert_array_equal(getattr(both, name)[1, : len(row)], row, name)
  for name in ("target", "noise", "t", "noisy_ids", "noisy_mask", "noisy_position", "noisy_reach"):
    np.testing.assert_array_equal(getattr(both, name)[1], getattr(alone, name)[0], name)
  np.testing.assert_array_equal(both.vit_row, [1])
  np.testing.assert_array_equal(both.vit_slot, alone.vit_slot)


@pytest.mark.parametrize(("split", "message"), [
  (text(), "non-empty"),
  (packing.Text(np.array([1.5])), "integers"),
  (text(-3), "negative"),
  (text(1, 2, labels=np.array([1])), "2 ids but 1 labels"),
  (text(1, labels=np.array([-7])), "NO_LABEL"),
  (text(1, labels=np.array([1]), weights=np.array([np.nan])), "finite"),
  (packing.PatchImage(np.zeros((3, 2)), np.arange(2)), r"\[3, 2\] do not belong to 2 ids"),
  (packing.NoisyImage(np.zeros((2, 2)), np.zeros((2, 3)), 0.5, np.arange(2)), r"noise \[2, 3\]"),
  (noisy(2, t=1.5), "t=1.5"),
  (noisy(2, t=float("nan")), "t=nan"),
  ("text", "not a split"),
])
def test_refuses(split, message):
  with pytest.raises(ValueError, match=rf"sample 1, split 0 .*{message}"):
    pack([[text(1)], [split]])


def test_refuses_nothing_and_mixed_widths():
  with pytest.raises(ValueError, match="samples is empty"):
    pack([])
  with pytest.raises(ValueError, match="sample 1 has no tokens"):
    pack([[text(1)], [packing.Dropped()]])
  wide = packing.CleanImage(np.zeros((2, 5)), np.arange(2))
  with pytest.raises(ValueError, match=r"\[2, 5\]"):
    pack([[clean(2)], [wide]])
