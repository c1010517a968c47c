"""Scenes, plans as text, icons and rendering."""

import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.iconworld import icons, make_icons, renderer, riddles, scenes


def _thing(text):
  return scenes.parse(text).things[0]


def test_a_plan_comes_back_from_its_text():
  rng = np.random.default_rng(0)
  for _ in range(500):
    drawn = scenes.sample(rng)
    open_scene = scenes.Scene(drawn.things)
    assert scenes.parse(scenes.to_text(drawn)) == open_scene


def test_a_text_is_in_reading_order_whatever_the_order_of_things():
  things = (_thing("kite red bottom right"), _thing("wine glass blue top left"))
  assert scenes.to_text(scenes.Scene(things)) == "wine glass blue top left, kite red bottom right"
  assert scenes.parse("kite red bottom right, wine glass blue top left") == scenes.Scene(things)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "kite",
    "kite red",
    "red kite top left",
    "kite red top left,",
    "kite red top left, ",
    "kite red top left and bird blue top right",
    "kite red top left, bird blue top left",
    "kite black top left",
    "dog red top left",
    "kite red centre",
    "kite red top left. bird blue top right",
    "Kite red top left",
    "kite  red top left",
  ],
)
def test_what_is_not_a_plan_is_none(text):
  assert scenes.parse(text) is None


def test_a_scene_refuses_what_the_world_does_not_have():
  red = scenes.Thing("kite", "red", "top left")
  with pytest.raises(ValueError, match="two things in one cell"):
    scenes.Scene((red, scenes.Thing("bird", "blue", "top left")))
  with pytest.raises(ValueError, match="not of this world"):
    scenes.Scene((scenes.Thing("kite", "black", "top left"),))
  with pytest.raises(ValueError, match="background='mauve'"):
    scenes.Scene((red,), "mauve")


def test_sampled_scenes_have_the_count_asked_for():
  rng = np.random.default_rng(0)
  for count in range(5):
    assert len(scenes.sample(rng, count).things) == count
  assert {len(scenes.sample(rng).things) for _ in range(100)} == {1, 2, 3, 4}


def test_icons_are_small_distinct_and_have_words():
  masks = icons.load()
  assert masks.alpha.shape == masks.shade.shape == (8, icons.SIDE, icons.SIDE)
  assert not masks.alpha.flags.writeable
  assert set(masks.names) == set(riddles.PLURALS) == set(riddles.DESCRIPTIONS)
  assert set(make_icons.GLYPHS) == set(masks.names)
  assert set(riddles.EXAMPLES) == set(icons.COLORS)
  flat = masks.alpha.reshape(8, -1)
  flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  assert (flat @ flat.T)[~np.eye(8, dtype=bool)].max() < 0.88
  licence = icons.PATH.with_name("NOTO_EMOJI_LICENSE.txt").read_text()
  assert "Copyright 2013 Google LLC" in licence and "OPEN FONT LICENSE Version 1.1" in licence


def test_a_description_or_example_stands_for_one_thing_only():
  for table in (riddles.DESCRIPTIONS, riddles.EXAMPLES):
    phrases = [text for texts in table.values() for text in texts]
    assert len(set(phrases)) == len(phrases)


def test_arithmetic_is_right():
  value = {name: number for number, name in enumerate(riddles.NUMBERS)}
  for number in range(1, 5):
    for phrase in riddles.arithmetic(number):
      match phrase.split():
        case ["half", "of", a]:
          assert value[a] == 2 * number
        case ["twice", a]:
          assert 2 * value[a] == number
        case [a, "minus", b]:
          assert value[a] - value[b] == number
        case [a, "plus", b]:
          assert value[a] + value[b] == number
        case _:
          pytest.fail(phrase)
  assert riddles.arithmetic(3)[:2] == ("half of six", "four minus one")
  assert "twice two" in riddles.arithmetic(4)


def test_an_icon_lies_in_its_cell_in_its_colour():
  scene = scenes.Scene((scenes.Thing("cell phone", "red", "bottom left"),))
  image = renderer.render(scene)
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8
  drawn = (image != image[0, 0]).any(axis=-1)
  assert drawn[16:, :16].any() and not drawn[:16].any() and not drawn[:, 16:].any()
  # Full coverage and shade somewhere: the palette's own red.
  assert (image == icons.COLORS["red"]).all(axis=-1).any()


def test_rendering_depends_on_its_generator_alone():
  scene = scenes.Scene((scenes.Thing("bird", "blue", "top right"),))
  first, again, other = (renderer.render(scene, np.random.default_rng(s)) for s in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_jitter_and_brightness_stay_in_bounds_and_reach_them():
  scene = scenes.Scene((scenes.Thing("cell phone", "yellow", "top left"),), "black")
  rng = np.random.default_rng(0)
  tops, brightest = set(), []
  for _ in range(60):
    image = renderer.render(scene, rng).astype(int)
    tops.add(int(np.flatnonzero((image[:, :16] > 60).any(axis=(1, 2)))[0]))
    brightest.append(image[..., 0].max() / icons.COLORS["yellow"][0])
  assert tops == {0, 1, 2}
  assert 0.84 < min(brightest) < 0.89 and 0.96 < max(brightest) <= 1


def test_backgrounds_are_drawn_only_where_the_scene_leaves_them_open():
  rng = np.random.default_rng(0)
  corners = {tuple(renderer.render(scenes.Scene(()), rng)[0, 0]) for _ in range(40)}
  assert corners == set(icons.BACKGROUNDS.values())
  black = scenes.Scene((), "black")
  assert (renderer.render(black, rng) == icons.BACKGROUNDS["black"]).all()


@pytest.mark.parametrize("content", [None, b"not a font"])
def test_making_icons_names_a_bad_font(tmp_path, monkeypatch, content):
  path = tmp_path / "font.ttf"
  if content:
    path.write_bytes(content)
  monkeypatch.setattr("sys.argv", ["make_icons", f"--font={path}", f"--out={tmp_path / 'o.npz'}"])
  with pytest.raises(errors.InputError, match="--font=.*font.ttf"):
    make_icons.main()
