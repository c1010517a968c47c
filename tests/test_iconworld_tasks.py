"""Questions about scenes, and edits of them."""

import collections
import re

import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.geneval import classes
from unigrpo_jax.iconworld import icons, renderer, riddles, scenes, tasks, verifier


def _answer(question, detections):
  """The answer, counted in detections of the rendered image."""
  if match := re.fullmatch(r"what colour is the (.+)\?", question):
    (color,) = [item.color for item in detections if item.kind == match[1]]
    return color
  noun = re.fullmatch(r"how many (.+) are there\?", question)[1]
  kinds = {plural: kind for kind, plural in riddles.PLURALS.items()}
  if noun in kinds:
    return riddles.NUMBERS[sum(item.kind == kinds[noun] for item in detections)]
  color = noun.removesuffix("things").strip()
  return riddles.NUMBERS[sum(color in ("", item.color) for item in detections)]


def test_answers_are_what_the_image_shows():
  rng = np.random.default_rng(0)
  answers = collections.Counter()
  for _ in range(400):
    scene = scenes.sample(rng)
    question, answer = tasks.question(rng, scene)
    assert answer == _answer(question, verifier.detect(renderer.render(scene, rng))), question
    answers[answer] += 1
  assert set(answers) == {"zero", "one", "two", "three", "four", *icons.COLORS}


def test_a_question_can_be_asked_for():
  rng = np.random.default_rng(0)
  scene = scenes.parse("kite red top left, bird blue top right")
  for _ in range(20):
    assert tasks.question(rng, scene, "color")[0].startswith("what colour is the ")
    assert tasks.question(rng, scene, "count")[0].startswith("how many ")
  # Which kite?
  twins = scenes.parse("kite red top left, kite blue top right")
  assert tasks.question(rng, twins, "color")[0].startswith("how many ")
  assert tasks.question(rng, scenes.Scene(()), "count")[1] == "zero"
  with pytest.raises(errors.InputError, match="about='size' is none of count, color"):
    tasks.question(rng, scene, "size")


@pytest.mark.parametrize(
  ("kind", "instruction", "after"),
  [
    ("recolor", "make the bird {color}", "bird {color} top left"),
    ("replace", "replace the bird with {a_kind}", "{kind} blue top left"),
    ("add", "add {a_new} {cell}", "bird blue top left, {new} {cell}"),
  ],
)
def test_edits_of_one_thing(kind, instruction, after):
  rng = np.random.default_rng(0)
  before = scenes.parse("bird blue top left")
  instructed, edited = tasks.edit(rng, before, kind)
  first, last = edited.things[0], edited.things[-1]
  names = {
    "color": first.color, "kind": first.kind, "a_kind": classes.with_article(first.kind),
    "new": f"{last.kind} {last.color}", "cell": last.cell,
    "a_new": classes.with_article(f"{last.color} {last.kind}"),
  }  # fmt: skip
  assert instructed == instruction.format(**names)
  assert edited == scenes.parse(after.format(**names)) != before


def test_removing_and_swapping():
  rng = np.random.default_rng(0)
  before = scenes.parse("bird blue top left, kite red bottom right, kite red bottom left")
  instructed, edited = tasks.edit(rng, before, "remove")
  assert instructed == "remove the bird"
  assert edited == scenes.parse("kite red bottom right, kite red bottom left")
  before = scenes.parse("bird blue top left, kite red bottom right")
  instructed, edited = tasks.edit(rng, before, "swap")
  assert set(instructed.removeprefix("swap the ").split(" and the ")) == {"bird", "kite"}
  assert edited == scenes.parse("kite red top left, bird blue bottom right")


def test_every_scene_can_be_edited_and_the_rest_stays_in_place():
  rng = np.random.default_rng(0)
  for seed in range(300):
    scene = scenes.sample(rng)
    _, edited = tasks.edit(rng, scene)
    assert edited != scene and edited.background == scene.background and edited.things
    images = [renderer.render(s, np.random.default_rng(seed)) for s in (scene, edited)]
    changed = (images[0] != images[1]).any(axis=-1)
    for cell in scenes.CELLS:
      same = [t for t in scene.things if t.cell == cell] == [
        t for t in edited.things if t.cell == cell
      ]
      row, column = (place - renderer.MARGIN for place in renderer.corner(cell))
      assert changed[row : row + 16, column : column + 16].any() == (not same)


def test_four_things_without_a_single_one_are_recoloured_together():
  rng = np.random.default_rng(0)
  before = scenes.parse(
    "kite red top left, kite red top right, bird blue bottom left, bird blue bottom right"
  )
  instructed, edited = tasks.edit(rng, before)
  (color,) = {thing.color for thing in edited.things}
  assert instructed == f"make all things {color}" and color not in ("red", "blue")


def test_wrong_edit_is_one_line():
  with pytest.raises(errors.InputError, match="kind='rotate' is none of recolor"):
    tasks.edit(np.random.default_rng(0), scenes.parse("kite red top left"), "rotate")
