"""Judging reasoning by its text, and wrong reasoning."""

import collections
import dataclasses

import numpy as np
import pytest

from unigrpo_jax.iconworld import plans, prompts, renderer, scenes, verifier

PLAN = "kite red top left, bird blue bottom right"


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  return [prompts.sample(rng, "train") for _ in range(1500)]


@pytest.mark.parametrize(
  "text",
  [
    f"<think>one kite. so: {PLAN}</think>",
    f"so: {PLAN}",
    f"anything so: kite so: {PLAN} \n</think> so: bird",
    f"<think>so: {PLAN}",
  ],
)
def test_a_plan_is_found(text):
  assert plans.plan_of(text) == scenes.parse(PLAN)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "<think></think>",
    PLAN,
    f"<think></think>so: {PLAN}",
    f"so: {PLAN} and more",
    f"so: {PLAN}, kite red",
    f"so: {PLAN}. so: ",
    f"so: {PLAN}, bird red top left",
    "so: \x00\ufffd",
    "so: ," * 1000,
  ],
)
def test_no_plan_is_none(text):
  assert plans.plan_of(text) is None


def test_garbage_never_raises_and_is_never_correct(examples):
  rng = np.random.default_rng(0)
  for example in examples[:300]:
    letters = list(example.reasoning)
    for place in rng.integers(len(letters), size=8):
      letters[place] = chr(int(rng.integers(32, 0x2FF)))
    plans.plan_of("".join(letters))
    words = rng.permutation(example.reasoning.split())
    assert not plans.is_correct(" ".join(words[:-1]), example.metadata)


def test_sampled_reasoning_is_correct(examples):
  for example in examples:
    assert plans.plan_of(example.reasoning) == example.scene
    assert plans.is_correct(example.reasoning, example.metadata), example


def test_corrupted_reasoning_is_a_plan_that_is_wrong(examples):
  rng = np.random.default_rng(0)
  for example in examples:
    text = plans.corrupt(rng, example)
    assert text.startswith("<think>") and text.endswith("</think>")
    assert plans.plan_of(text) is not None
    assert not plans.is_correct(text, example.metadata), (example, text)


def test_corruption_is_seeded_and_varied(examples):
  example = next(e for e in examples if e.goal.category == "color_attr")
  texts = [plans.corrupt(np.random.default_rng(seed), example) for seed in range(40)]
  assert texts == [plans.corrupt(np.random.default_rng(seed), example) for seed in range(40)]
  # Wrong class, wrong colour, and the right ones on the wrong things.
  goal = {(wanted.kind, wanted.color) for wanted in example.goal.wanted}
  kinds, colors = ({pair[i] for pair in goal} for i in (0, 1))
  seen = collections.Counter()
  for text in texts:
    things = plans.plan_of(text).things
    same_kinds = {thing.kind for thing in things} == kinds
    same_colors = {thing.color for thing in things} == colors
    seen[same_kinds, same_colors] += 1
  assert set(seen) == {(False, True), (True, False), (True, True)}


def _correct(plan, **goal):
  goal = prompts.Goal(**goal)
  return plans.is_correct(f"so: {plan}", prompts.metadata_of(goal, ""))


def test_counts_must_be_exact():
  goal = {"category": "counting", "wanted": (prompts.Wanted("kite", 2, "red"),)}
  two = "kite red top left, kite red top right"
  assert _correct(two, **goal)
  assert not _correct("kite red top left", **goal)
  assert not _correct(f"{two}, kite red bottom left", **goal)
  assert not _correct(f"{two}, bird red bottom left", **goal)
  assert not _correct("kite red top left, kite blue top right", **goal)


def test_colours_belong_to_their_things():
  wanted = (prompts.Wanted("kite", 1, "red"), prompts.Wanted("bird", 1, "blue"))
  goal = {"category": "color_attr", "wanted": wanted}
  assert _correct("kite red top left, bird blue bottom left", **goal)
  assert not _correct("kite blue top left, bird red bottom left", **goal)


@pytest.mark.parametrize(
  ("relation", "cell"),
  [("left of", "top left"), ("right of", "top right"), ("above", "top left"),
   ("below", "bottom left")],
)  # fmt: skip
def test_relations_are_seen_from_the_first(relation, cell):
  other = {"left of": "top right", "right of": "top left", "above": "bottom left",
           "below": "top left"}[relation]  # fmt: skip
  wanted = (prompts.Wanted("kite"), prompts.Wanted("bird"))
  goal = {"category": "position", "wanted": wanted, "relation": relation}
  assert _correct(f"bird red {cell}, kite red {other}", **goal)
  assert not _correct(f"bird red {other}, kite red {cell}", **goal)


def test_a_plan_is_judged_as_its_drawing_is(examples):
  rng = np.random.default_rng(0)
  for example in examples[:200]:
    texts = (example.reasoning, plans.corrupt(rng, example))
    for text, correct in zip(texts, (1.0, 0.0)):
      scene = dataclasses.replace(plans.plan_of(text), background="white")
      assert verifier.verify(renderer.render(scene, rng), example.metadata)[0] == correct
