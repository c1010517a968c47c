"""Image loading and transforms against recorded outputs of the official code."""

import math
import pathlib
import re

import numpy as np
import PIL.Image
import pytest

from tests import refusals
from unigrpo_jax import errors
from unigrpo_jax.data import images
from unigrpo_jax.models import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED = dict(np.load(GOLDEN / "k_transforms.npz"))
TABLES = dict(np.load(GOLDEN / "l_tables.npz"))
VAE = config_lib.ImageSizeRule(1024, 512, 16)
VIT = config_lib.ImageSizeRule(980, 224, 14)
VLM = config_lib.ImageSizeRule(980, 378, 14, 2_007_040)
ID_TABLES = [name for name in TABLES if name.startswith("out_ids_")]


def source(number):
  return PIL.Image.fromarray(RECORDED[f"in_image{number}"])


def check_stats(image, recorded):
  """Mean, standard deviation, minimum and maximum of the float image."""
  array = images.to_array(image).astype(np.float64)
  stats = [array.mean(), array.std(ddof=1), array.min(), array.max()]
  np.testing.assert_allclose(stats, recorded, rtol=1e-5)


def load_refusal(path):
  message = refusals.refusal(images.load_rgb, path)
  assert message.startswith(f"{path}: ")
  return message


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name, rule", [("vae", VAE), ("vit", VIT)])
def test_recorded_resize(number, name, rule):
  image = images.resize(source(number), rule)
  assert image.size == tuple(RECORDED[f"out_{name}{number}_size"][::-1])
  check_stats(image, RECORDED[f"out_{name}{number}_stats"])
  pixels = RECORDED.get(f"out_{name}{number}_uint8")
  assert (pixels is None) == ((name, number) == ("vae", 1))  # too large to record
  if pixels is not None:
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("number", [0, 1])
def test_recorded_resize_of_a_resized_image(number):
  image = images.resize(images.resize(source(number), VAE), VIT)
  assert image.size == tuple(RECORDED[f"out_edit_vit{number}_size"][::-1])
  check_stats(image, RECORDED[f"out_edit_vit{number}_stats"])


def test_recorded_arrays_under_the_tiny_rules():
  config = config_lib.read_config(GOLDEN)
  first = images.resize(source(0), config.vae_image)
  array = images.to_array(first)
  assert array.dtype == np.float32
  np.testing.assert_array_equal(array, np.moveaxis(RECORDED["out_tiny_vae0"], 0, -1))
  second = images.to_array(images.resize(first, config.vit_image))
  np.testing.assert_array_equal(second, np.moveaxis(RECORDED["out_tiny_edit_vit0"], 0, -1))


@pytest.mark.parametrize("name, rule, num_images", [
  ("vae", VAE, 1),
  ("vit", VIT, 1),
  ("vit_train", config_lib.ImageSizeRule(518, 224, 14), 1),
  ("vlm_train", VLM, 1),
  ("vlm_train_3img", VLM, 3),
])
def test_recorded_sizes(name, rule, num_images):
  sizes = [images.resized_size(int(w), int(h), rule, num_images)
           for w, h in RECORDED["in_sizes_wh"]]
  np.testing.assert_array_equal(sizes, RECORDED[f"out_sizes_{name}"])


def test_size_rounds_halves_to_even_twice():
  rule = config_lib.ImageSizeRule(1024, 1, 16)
  # 24 / 16 = 1.5 -> 2 and 40 / 16 = 2.5 -> 2.
  assert images.resized_size(24, 40, rule) == (32, 32)
  # Halved, 81 becomes 40.5 -> 40 -> 32, and 2048 becomes 1024.
  assert images.resized_size(81, 2048, rule) == (32, 1024)


def test_recorded_transparency_is_composited_on_white():
  image = images.to_rgb(PIL.Image.fromarray(RECORDED["in_rgba"], "RGBA"))
  np.testing.assert_array_equal(np.asarray(image), RECORDED["out_rgba_to_rgb"])


@pytest.mark.parametrize("mode, color", [
  ("LA", (10, 0)), ("RGBA", (10, 20, 30, 0)), ("P", 0),
])
def test_transparent_pixels_become_white(mode, color, tmp_path):
  PIL.Image.new(mode, (4, 3), color).save(tmp_path / "a.png", **(
    {"transparency": 0} if mode == "P" else {}
  ))
  loaded = images.load_rgb(tmp_path / "a.png")
  assert loaded.mode == "RGB" and loaded.size == (4, 3)
  np.testing.assert_array_equal(np.asarray(loaded), 255)


def test_load_grey_and_rgb(tmp_path):
  grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
  PIL.Image.fromarray(grey).save(tmp_path / "grey.png")
  loaded = np.asarray(images.load_rgb(tmp_path / "grey.png"))
  np.testing.assert_array_equal(loaded, np.repeat(grey[..., None], 3, axis=-1))
  source(0).save(tmp_path / "rgb.png")
  loaded = np.asarray(images.load_rgb(str(tmp_path / "rgb.png")))
  np.testing.assert_array_equal(loaded, RECORDED["in_image0"])


@pytest.mark.parametrize("mode, kind, ending", [("I;16", "<u2", "png"), ("I;16B", ">u2", "tiff")])
def test_greys_of_16_bits_keep_their_shades(mode, kind, ending, tmp_path):
  """257 times the shade of 8 bits is the same shade; between two it is the nearer one."""
  grey = np.array([[0, 257, 30000, 128 * 257], [65535, 256, 128, 129]])
  image = PIL.Image.frombytes(mode, (4, 2), grey.astype(kind).tobytes())
  image.save(tmp_path / f"a.{ending}")
  loaded = np.asarray(images.load_rgb(tmp_path / f"a.{ending}"))
  expected = np.array([[0, 1, 117, 128], [255, 1, 0, 1]])
  np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, axis=-1))


def test_a_transparent_grey_of_16_bits_becomes_white(tmp_path):
  image = PIL.Image.fromarray(np.array([[0, 30000]], np.uint16))
  image.save(tmp_path / "a.png", transparency=0)
  loaded = np.asarray(images.load_rgb(tmp_path / "a.png"))
  np.testing.assert_array_equal(loaded[0, :, 0], [255, 117])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_bounds_are_refused(mode, tmp_path):
  path = tmp_path / "depth.tiff"
  PIL.Image.new(mode, (4, 3), 30000).save(path)
  message = load_refusal(path)
  assert f"mode {mode})" in message and "PNG" in message


def test_load_refuses_what_is_no_image(tmp_path):
  assert "not readable as an image (No such file" in load_refusal(tmp_path / "missing.png")
  assert "not readable as an image (Is a directory)" in load_refusal(tmp_path)
  (tmp_path / "text.png").write_text("hello")
  (tmp_path / "empty.png").touch()
  for name in ("text.png", "empty.png"):
    assert "not readable as an image (cannot identify" in load_refusal(tmp_path / name)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif"])
def test_load_refuses_a_truncated_image(kind, tmp_path):
  path = tmp_path / f"image.{kind}"
  source(1).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert "not readable as an image (" in load_refusal(path)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError])
def test_load_refuses_what_a_decoder_cannot_read_for_whatever_reason(error, tmp_path, monkeypatch):
  def fail(*_):
    raise error("no such frame")

  source(1).save(tmp_path / "image.png")
  monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", fail)
  assert "no such frame" in load_refusal(tmp_path / "image.png")


def test_load_refuses_a_decompression_bomb(tmp_path, monkeypatch):
  source(0).save(tmp_path / "bomb.png")
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 600)  # the image has 660: Pillow only warns
  assert "more than 600 pixels" in load_refusal(tmp_path / "bomb.png")
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 300)  # beyond twice the limit, it raises
  assert "more than 300 pixels" in load_refusal(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (3, 400)])
def test_too_narrow_is_refused(size, tmp_path):
  image = PIL.Image.new("RGB", size)
  image.save(tmp_path / "narrow.png")
  message = load_refusal(tmp_path / "narrow.png")
  assert f"{size[0]}x{size[1]}" in message and "crop" in message
  with pytest.raises(errors.InputError, match="too narrow.*crop"):
    images.resize(image, VAE)


def test_narrow_but_representable_is_kept(tmp_path):
  PIL.Image.new("RGB", (1, 128)).save(tmp_path / "narrow.png")
  assert images.resize(images.load_rgb(tmp_path / "narrow.png"), VAE).size == (16, 1024)


def test_a_rule_that_oversteps_its_own_maximum_is_refused():
  rule = config_lib.ImageSizeRule(1020, 512, 16)  # 1020 rounds to 1024
  with pytest.raises(errors.InputError, match="max_image_size=1020.*1024x1024"):
    images.resize(PIL.Image.new("RGB", (2000, 2000)), rule)


@pytest.mark.parametrize("name", ID_TABLES)
def test_recorded_position_ids(name):
  kind, *numbers = re.fullmatch(r"out_ids_(\w+?)_(\d+)x(\d+)_p(\d+)_m(\d+)", name).groups()
  height, width, patch, side = map(int, numbers)
  ids = images.position_ids(height, width, patch, side, interpolate=kind == "interpolate")
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, TABLES[name])


def test_position_ids_beyond_the_table_are_refused():
  assert images.position_ids(16, 1024, 16, 64)[-1] == 63
  with pytest.raises(errors.InputError, match="1040x16 .* at most 1024 px"):
    images.position_ids(16, 1040, 16, 64)
  with pytest.raises(errors.InputError, match="16x1040 "):
    images.position_ids(1040, 16, 16, 64)


def test_recorded_patches():
  case = dict(np.load(GOLDEN / "c_vit.npz"))
  patches = [images.patchify(np.moveaxis(case[f"in_image{i}"], 0, -1), 14) for i in range(2)]
  np.testing.assert_array_equal(np.concatenate(patches), case["out_packed_vit_tokens"])


def test_patches_by_hand():
  array = np.arange(2 * 4 * 3).reshape(2, 4, 3)
  second = array[:, 2:]  # the right of two 2 px patches
  expected = [second[py, px, c] for py in range(2) for px in range(2) for c in range(3)]
  patches = images.patchify(array, 2)
  assert patches.shape == (2, 12)
  np.testing.assert_array_equal(patches[1], expected)
  with pytest.raises(ValueError, match="2x4"):
    images.patchify(array, 4)


def test_the_resize_rule_keeps_every_image_on_its_table():
  rng = np.random.default_rng(0)
  for width, height in rng.integers(1, 6000, (500, 2)).tolist():
    for rule in (VAE, VIT):
      sides = images.resized_size(width, height, rule)
      assert all(0 < side <= rule.max_size and side % rule.stride == 0 for side in sides)
      assert math.prod(sides) <= rule.max_pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path, orientation, ending):
  """All eight orientations; once: what is read has none left."""
  pixels = np.zeros((24, 40, 3), np.uint8)
  pixels[:12, :20] = 255  # the stored top left quarter
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / f"a.{ending}"
  PIL.Image.fromarray(pixels).save(path, exif=exif)
  image = images.load_rgb(path)
  assert image.size == ((40, 24) if orientation < 5 else (24, 40))
  array = np.asarray(images.to_rgb(image))[..., 0] > 127
  top = orientation in (1, 2, 5, 6)
  left = orientation in (1, 4, 5, 8)
  corner = array[:2, :2] if top and left else array[:2, -2:] if top else (
    array[-2:, :2] if left else array[-2:, -2:])
  assert corner.all() and abs(array.mean() - 0.25) < 0.05


@pytest.mark.parametrize("exif", [
  b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff",
  b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
  b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0",
  b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
])
def test_a_damaged_orientation_leaves_the_image_as_it_is(tmp_path, exif):
  PIL.Image.new("RGB", (16, 8), (200, 0, 0)).save(tmp_path / "a.jpg", exif=exif)
  assert images.load_rgb(tmp_path / "a.jpg").size == (16, 8)
