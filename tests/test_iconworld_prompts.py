"""Prompts: correct by construction, in GenEval's format, in disjoint splits, reproducible."""

import collections
import re

import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.iconworld import icons, prompts, riddles, scenes


def _examples(count, split="train", seed=0):
  rng = np.random.default_rng(seed)
  return [prompts.sample(rng, split) for _ in range(count)]


@pytest.fixture(scope="module")
def many():
  return _examples(3000)


def test_categories_are_balanced(many):
  counts = collections.Counter(example.goal.category for example in many)
  assert set(counts) == set(prompts.CATEGORIES)
  # 500 expected of each, standard deviation 20.
  assert min(counts.values()) > 400 and max(counts.values()) < 600
  fixed = collections.Counter(example.goal.category for example in prompts.fixed("test", 60))
  assert set(fixed.values()) == {10}


def test_a_category_can_be_asked_for():
  rng = np.random.default_rng(0)
  for category in prompts.CATEGORIES:
    example = prompts.sample(rng, "train", category)
    assert example.goal.category == example.metadata["tag"] == category


def test_metadata_has_the_keys_of_geneval(many):
  for example in many:
    data, tag = example.metadata, example.goal.category
    expected = ["tag", "include", "prompt"]
    if tag == "counting":
      expected.insert(2, "exclude")
      (asked,), (unwanted,) = data["include"], data["exclude"]
      assert unwanted == {"class": asked["class"], "count": asked["count"] + 1}
      assert 2 <= asked["count"] <= 4
    assert list(data) == expected
    assert data["prompt"] == example.prompt
    keys = [set(entry) - {"class", "count"} for entry in data["include"]]
    match tag:
      case "single_object":
        assert keys == [set()]
      case "two_object":
        assert keys == [set(), set()]
      case "counting":
        assert keys in ([set()], [{"color"}])
      case "colors":
        assert keys == [{"color"}]
      case "position":
        assert keys == [set(), {"position"}]
        relation, target = data["include"][1]["position"]
        assert relation in ("left of", "right of", "above", "below") and target == 0
      case "color_attr":
        assert keys == [{"color"}, {"color"}]


def test_metadata_worked_out_by_hand():
  red, blue = prompts.Wanted("kite", 1, "red"), prompts.Wanted("bird", 1, "blue")
  assert prompts.metadata_of(prompts.Goal("color_attr", (red, blue)), "p") == {
    "tag": "color_attr",
    "include": [
      {"class": "kite", "count": 1, "color": "red"},
      {"class": "bird", "count": 1, "color": "blue"},
    ],
    "prompt": "p",
  }
  pair = (prompts.Wanted("kite"), prompts.Wanted("bird"))
  assert prompts.metadata_of(prompts.Goal("position", pair, "above"), "p") == {
    "tag": "position",
    "include": [
      {"class": "kite", "count": 1},
      {"class": "bird", "count": 1, "position": ["above", 0]},
    ],
    "prompt": "p",
  }


def test_reasoning_is_short_and_ends_in_the_plan(many):
  for example in many:
    assert example.reasoning.startswith("<think>")
    assert example.reasoning.endswith(f"so: {scenes.to_text(example.scene)}</think>")
    assert len(example.reasoning.split()) <= 45
    assert example.scene.background is None


def test_the_scene_holds_what_the_goal_wants_and_nothing_else(many):
  for example in many:
    things = list(example.scene.things)
    assert len(things) == sum(wanted.count for wanted in example.goal.wanted)
    for wanted in example.goal.wanted:
      matching = [thing for thing in things if thing.kind == wanted.kind]
      assert len(matching) == wanted.count
      assert wanted.color is None or {thing.color for thing in matching} == {wanted.color}


# A reader that knows the world's words but not how prompts are made: it works the meaning out from
# the prompt's text alone.
_NUMBER = {name: number for number, name in enumerate(riddles.NUMBERS)}
_PLACES = {"to its left": "left of", "to its right": "right of", "above it": "above",
           "below it": "below"}  # fmt: skip


def _kind_in(text):
  for kind in scenes.KINDS:
    if re.search(rf"\b({kind}|{riddles.PLURALS[kind]})\b", text):
      return kind
    if any(text.split(" in the colour")[0].split(",")[0].endswith(description)
           for description in riddles.DESCRIPTIONS[kind]):  # fmt: skip
      return kind
  raise AssertionError(text)


def _color_in(text):
  if match := re.search(r"not \w+ but (\w+)$", text):
    return match[1]
  for color, examples in riddles.EXAMPLES.items():
    if any(f"in the colour of {example}" in text for example in examples):
      return color
  return next((color for color in icons.COLORS if re.search(rf"\b{color}\b", text)), None)


def _read_position(text):
  if text.endswith(", with the two swapped"):
    subject, relation, target = _read_position(text.removesuffix(", with the two swapped"))
    return target, relation, subject
  for mirror in (", seen in a mirror", ", seen upside down"):
    if text.endswith(mirror):
      subject, relation, target = _read_position(text.removesuffix(mirror))
      return subject, riddles.OPPOSITES[relation], target
  for converse, relation in _PLACES.items():
    if text.endswith(converse):
      # "with" also stands in descriptions; the one that a noun phrase follows parts the two.
      parts = re.split(r" with (?=an? \w+|the thing)", text.removesuffix(f" {converse}"))
      splits = [(" with ".join(parts[:i]), " with ".join(parts[i:])) for i in range(1, len(parts))]
      for target, subject in splits:
        try:
          return _kind_in(subject), relation, _kind_in(target)
        except AssertionError:
          continue
  text = re.sub(r"not (left of|right of|above|below) but ", "", text)
  subject, relation, target = re.split(r" (left of|right of|above|below) ", text)
  return _kind_in(subject), relation, _kind_in(target)


def _meaning(prompt, category):
  """{(kind, color): count} and the relation triple that a prompt means."""
  text = re.sub(r"^(draw|show|paint|a picture of|a photo of) ", "", prompt)
  if category == "position":
    subject, relation, target = _read_position(text)
    return {(subject, None): 1, (target, None): 1}, (subject, relation, target)
  if category == "counting":
    text = text.split(" instead of ")[0]
    words = text.split()
    if text.startswith("half of "):
      count = _NUMBER[words[2]] // 2
    elif text.startswith("twice "):
      count = 2 * _NUMBER[words[1]]
    else:
      count = _NUMBER[words[0]]
      if words[1] in ("minus", "plus"):
        count += _NUMBER[words[2]] * (1 if words[1] == "plus" else -1)
    return {(_kind_in(text), _color_in(text)): count}, None
  if category in ("single_object", "colors"):
    if match := re.match(r"not (?:the thing .+|an? .+?) but (.+)$", text):
      text = match[1]
    text = text.split(" instead of ")[0]
    return {(_kind_in(text.split(", not ")[0]), _color_in(text)): 1}, None
  swapped = text.endswith(", with the colours swapped")
  text = text.removesuffix(", with the colours swapped")
  if match := re.match(r"(.+?) and [^,]+, but (.+) instead of the ", text):
    first, second = match[1], match[2]
  else:
    first, second = re.split(r" and ", text)
  kinds, colors = (_kind_in(first), _kind_in(second)), [_color_in(first), _color_in(second)]
  return dict.fromkeys(zip(kinds, colors[::-1] if swapped else colors), 1), None


def _from_the_left_or_above(triple):
  """a right of b is b left of a."""
  subject, relation, target = triple
  if relation in ("right of", "below"):
    return target, riddles.OPPOSITES[relation], subject
  return triple


def test_an_independent_reader_finds_the_same_meaning(many):
  for example in many:
    counts, relation = _meaning(example.prompt, example.goal.category)
    include = example.metadata["include"]
    assert counts == {(e["class"], e.get("color")): e["count"] for e in include}, example.prompt
    if relation is not None:
      meant = (include[1]["class"], include[1]["position"][0], include[0]["class"])
      assert _from_the_left_or_above(relation) == _from_the_left_or_above(meant), example.prompt


def test_every_kind_of_indirection_occurs_and_plain_prompts_too(many):
  kinds = collections.Counter(step.riddle for example in many for step in example.steps)
  assert set(kinds) == {
    "description", "arithmetic", "example", "correction", "mirror", "negation", "converse", "swap"
  }  # fmt: skip
  plain = sum(not example.steps for example in many) / len(many)
  assert 0.2 < plain < 0.4


def test_splits_are_disjoint_and_of_the_right_size(many):
  seen = {split: _examples(400, split, seed=7) for split in prompts.SPLITS}
  for attribute in ("combination", "prompt"):
    values = [{getattr(example, attribute) for example in seen[split]} for split in prompts.SPLITS]
    assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
  keys = [f"{i}" for i in range(5000)]
  shares = collections.Counter(map(prompts.split_of, keys))
  # Standard deviation of the share: 0.006 at most.
  assert abs(shares["train"] / 5000 - 0.8) < 0.025 and abs(shares["test"] / 5000 - 0.1) < 0.02
  # These must never change: a trained checkpoint has seen "train".
  assert prompts.split_of("single_object: a kite") == "train"
  assert prompts.split_of("colors: a pink apple") == "validation"
  assert prompts.split_of("colors: a green bird") == "test"


def test_generation_is_seeded():
  assert _examples(20) == _examples(20)
  assert _examples(20) != _examples(20, seed=1)
  assert prompts.fixed("test", 12) == prompts.fixed("test", 30)[:12]
  assert prompts.fixed("validation", 6) != prompts.fixed("test", 6)


def test_fixed_prompts_are_all_different():
  examples = prompts.fixed("test", 600)
  assert len({example.prompt for example in examples}) == 600
  assert all(prompts.split_of(example.combination) == "test" for example in examples)


def test_wrong_names_are_one_line():
  rng = np.random.default_rng(0)
  with pytest.raises(errors.InputError, match="split='dev' is none of train, validation, test"):
    prompts.sample(rng, "dev")
  with pytest.raises(errors.InputError, match="split='dev'"):
    prompts.fixed("dev", 1)
  with pytest.raises(errors.InputError, match="category='shape' is none of single_object"):
    prompts.sample(rng, "train", "shape")


def test_a_fixed_list_longer_than_the_split_says_so():
  with pytest.raises(errors.InputError, match="count=20000: split validation has hardly more than"):
    prompts.fixed("validation", 20000)
