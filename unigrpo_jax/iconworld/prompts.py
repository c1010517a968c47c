"""Prompts whose meaning must be worked out, with reasoning, a correct scene and metadata.

A prompt is made from its answer: a `Goal` is drawn first, then said, plainly or by riddles, so what
is correct is known by construction. Each riddle leaves a `Step`, which the reasoning resolves.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.iconworld import riddles, scenes

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Split -> tenths of all combinations.
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
# Chance of none, one, two riddles in a prompt.
RIDDLES = (0.3, 0.45, 0.25)
COLORED_COUNTS = 0.4  # Share of counting prompts that ask for a colour too.


@dataclasses.dataclass(frozen=True)
class Wanted:
  """`count` things of class `kind`, in `color` unless None."""

  kind: str
  count: int = 1
  color: str | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
  """What a prompt asks for.

  Attributes:
    category: one of `CATEGORIES`, GenEval's tags.
    wanted: one or two, of different classes.
    relation: where `wanted[1]` is, seen from `wanted[0]`; None outside "position".
  """

  category: str
  wanted: tuple[Wanted, ...]
  relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Step:
  """A riddle to resolve: the words `said` about the "kind", "count", "color" of `wanted[index]`.

  Or about the "relation" or the "colors" of both.
  """

  about: str
  said: str
  index: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt and its answer.

  Attributes:
    prompt: what a user writes.
    reasoning: "<think>...so: PLAN</think>", correct.
    scene: the plan's scene, a correct one; what the prompt leaves open was drawn at random, the
      background is left open.
    metadata: GenEval's format: tag, include, exclude (counting only), prompt.
    category: the tag.
    riddles: the sorts of indirection in the prompt; empty for a plain one.
    combination: what the splits are disjoint by; see `split_of`.
    goal, steps: what the prompt was made from.
  """

  prompt: str
  reasoning: str
  scene: scenes.Scene
  metadata: dict[str, Any]
  category: str
  riddles: tuple[str, ...]
  combination: str
  goal: Goal
  steps: tuple[Step, ...]


@dataclasses.dataclass
class _Draft:
  """A prompt in the making: noun phrases said so far, their riddles and steps."""

  rng: np.random.Generator
  chosen: set[str]
  riddles: list[str] = dataclasses.field(default_factory=list)
  steps: list[Step] = dataclasses.field(default_factory=list)

  def pick(self, options: Sequence[str]) -> str:
    return options[self.rng.integers(len(options))]

  def note(self, riddle: str, about: str, said: str, index: int = 0) -> None:
    self.riddles.append(riddle)
    self.steps.append(Step(about, said, index))

  def noun(self, wanted: Wanted, index: int, color_of: int | None = None) -> str:
    """A noun phrase for `wanted`; riddles where `chosen` has "description 1" and the like.

    `color_of` is the index of the thing that the colour said here belongs to in the goal.
    """
    color_of = index if color_of is None else color_of
    many = wanted.count > 1
    head, tail = riddles.PLURALS[wanted.kind] if many else wanted.kind, ""
    if f"description {index}" in self.chosen:
      description = self.pick(riddles.DESCRIPTIONS[wanted.kind])
      head, tail = "things" if many else "thing", f" {description}"
    number = riddles.NUMBERS[wanted.count]
    if "arithmetic" in self.chosen:
      number = self.pick(riddles.arithmetic(wanted.count))
      self.note("arithmetic", "count", number, index)
    if tail:
      self.note("description", "kind", f"the thing{tail}", index)
    if wanted.color is None:
      pass
    elif f"example {index}" in self.chosen:
      example = f"the colour of {self.pick(riddles.EXAMPLES[wanted.color])}"
      self.note("example", "color", example, color_of)
      tail += f" in {example}"
    elif "color correction" in self.chosen:
      said = f"not {self.other(scenes.COLORS, wanted.color)} but {wanted.color}"
      self.note("correction", "color", said, color_of)
      tail += f", {said}"
    else:
      head = f"{wanted.color} {head}"
    if many:
      return f"{number} {head}{tail}"
    return f"the {head}{tail}" if "thing" in head else f"{riddles.with_article(head)}{tail}"

  def other(self, options: Sequence[str], *taken: str) -> str:
    return self.pick([option for option in options if option not in taken])

  def unwanted(self, kind: str) -> str:
    """A noun phrase for something else than `kind`, named or described."""
    other = self.other(scenes.KINDS, kind)
    if self.rng.random() < 0.5:
      return riddles.with_article(other)
    return f"the thing {self.pick(riddles.DESCRIPTIONS[other])}"


def _say_single(draft: _Draft, goal: Goal) -> tuple[str, str]:
  wanted = goal.wanted[0]
  noun = draft.noun(wanted, 0)
  if "correction" in draft.chosen:
    unwanted = draft.unwanted(wanted.kind)
    ways = (f"{noun} instead of {unwanted}", f"not {unwanted} but {noun}")
    noun = draft.pick(ways)
    draft.note("correction", "kind", noun)
  return noun, noun


def _say_two(draft: _Draft, goal: Goal) -> tuple[str, str]:
  first, second = (draft.noun(wanted, i) for i, wanted in enumerate(goal.wanted))
  if "correction" in draft.chosen:
    unwanted = draft.other(scenes.KINDS, *(wanted.kind for wanted in goal.wanted))
    said = f"{second} instead of the {unwanted}"
    draft.note("correction", "kind", said, 1)
    text = f"{first} and {riddles.with_article(unwanted)}, but {said}"
    return text, text
  return f"{first} and {second}", " and ".join(sorted((first, second)))


def _say_count(draft: _Draft, goal: Goal) -> tuple[str, str]:
  noun = draft.noun(goal.wanted[0], 0)
  if "correction" in draft.chosen:
    unwanted = draft.other(scenes.KINDS, goal.wanted[0].kind)
    noun += f" instead of {riddles.PLURALS[unwanted]}"
    said = f"{riddles.PLURALS[goal.wanted[0].kind]} instead of {riddles.PLURALS[unwanted]}"
    draft.note("correction", "kind", said)
  return noun, noun


def _say_position(draft: _Draft, goal: Goal) -> tuple[str, str]:
  target, subject = (draft.noun(wanted, i) for i, wanted in enumerate(goal.wanted))
  relation, opposite = goal.relation, riddles.OPPOSITES[goal.relation]
  if "relation" not in draft.chosen:
    text = f"{subject} {relation} {target}"
    return text, text
  sideways = relation in ("left of", "right of")
  match draft.pick(("mirror", "negation", "converse", "swap")):
    case "mirror":
      how = "in a mirror" if sideways else "upside down"
      draft.note("mirror", "relation", f"{opposite} {how}")
      text = f"{subject} {opposite} {target}, seen {how}"
    case "negation":
      draft.note("negation", "relation", f"not {opposite} but {relation}")
      text = f"{subject} not {opposite} but {relation} {target}"
    case "converse":
      draft.note("converse", "relation", riddles.CONVERSES[relation])
      text = f"{target} with {subject} {riddles.CONVERSES[relation]}"
    case "swap":
      draft.note("swap", "relation", f"{opposite} swapped")
      text = f"{subject} {opposite} {target}, with the two swapped"
  return text, text


def _say_colors(draft: _Draft, goal: Goal) -> tuple[str, str]:
  wanted = goal.wanted
  swap = "swap" in draft.chosen
  nouns = []
  for i, item in enumerate(wanted):
    color_of = 1 - i if swap else i
    said = dataclasses.replace(item, color=wanted[color_of].color)
    nouns.append(draft.noun(said, i, color_of))
  end = ""
  if swap:
    end = ", with the colours swapped"
    draft.note("swap", "colors", "swapped")
  return " and ".join(nouns) + end, " and ".join(sorted(nouns)) + end


def _draw_goal(rng: np.random.Generator, category: str) -> Goal:
  kinds = [str(kind) for kind in rng.permutation(scenes.KINDS)[:2]]
  colors = [str(color) for color in rng.permutation(scenes.COLORS)[:2]]
  match category:
    case "single_object":
      return Goal(category, (Wanted(kinds[0]),))
    case "two_object":
      return Goal(category, (Wanted(kinds[0]), Wanted(kinds[1])))
    case "counting":
      color = colors[0] if rng.random() < COLORED_COUNTS else None
      return Goal(category, (Wanted(kinds[0], int(rng.integers(2, 5)), color),))
    case "colors":
      return Goal(category, (Wanted(kinds[0], color=colors[0]),))
    case "position":
      relation = riddles.RELATIONS[rng.integers(len(riddles.RELATIONS))]
      return Goal(category, (Wanted(kinds[0]), Wanted(kinds[1])), relation)
    case "color_attr":
      pair = (Wanted(kinds[0], color=colors[0]), Wanted(kinds[1], color=colors[1]))
      return Goal(category, pair)
  raise errors.InputError(f"category={category!r} is none of {', '.join(CATEGORIES)}")


# Category -> how it is said, and the slots that can be riddles. At most one slot of a group.
_SAYING = {
  "single_object": (_say_single, (("description 0", "correction"),)),
  "two_object": (_say_two, (("description 0",), ("description 1", "correction"))),
  "counting": (_say_count, (("arithmetic",), ("description 0", "correction"), ("example 0",))),
  "colors": (_say_single, (("description 0",), ("example 0", "color correction"))),
  "position": (_say_position, (("description 0",), ("description 1",), ("relation",))),
  "color_attr": (
    _say_colors,
    (("description 0",), ("description 1",), ("example 0",), ("example 1",), ("swap",)),
  ),
}


def _choose(rng: np.random.Generator, goal: Goal) -> set[str]:
  groups = list(_SAYING[goal.category][1])
  if goal.category == "counting" and goal.wanted[0].color is None:
    groups.remove(("example 0",))
  count = min(int(rng.choice(len(RIDDLES), p=RIDDLES)), len(groups))
  picked = rng.permutation(len(groups))[:count]
  return {groups[i][rng.integers(len(groups[i]))] for i in picked}


def metadata_of(goal: Goal, prompt: str) -> dict[str, Any]:
  """A goal in GenEval's format."""
  include = []
  for wanted in goal.wanted:
    include.append({"class": wanted.kind, "count": wanted.count})
    if wanted.color is not None:
      include[-1]["color"] = wanted.color
  if goal.relation is not None:
    include[1]["position"] = [goal.relation, 0]
  metadata = {"tag": goal.category, "include": include}
  if goal.category == "counting":
    wanted = goal.wanted[0]
    metadata["exclude"] = [{"class": wanted.kind, "count": wanted.count + 1}]
  return metadata | {"prompt": prompt}


def place(rng: np.random.Generator, goal: Goal) -> scenes.Scene:
  """A random correct scene; things in a relation share a row or a column, so that it is clear."""
  cells = [str(cell) for cell in rng.permutation(scenes.CELLS)]
  if goal.relation is not None:
    if goal.relation in ("left of", "right of"):
      lane = ("top", "bottom")[rng.integers(2)]
      cells = [f"{lane} left", f"{lane} right"]
    else:
      lane = ("left", "right")[rng.integers(2)]
      cells = [f"top {lane}", f"bottom {lane}"]
    if goal.relation in ("left of", "above"):
      cells.reverse()  # The relation is seen from wanted[0], which is placed first.
  things = []
  for wanted in goal.wanted:
    for _ in range(wanted.count):
      color = wanted.color or scenes.COLORS[rng.integers(len(scenes.COLORS))]
      things.append(scenes.Thing(wanted.kind, color, cells[len(things)]))
  return scenes.Scene(tuple(things))


def reason(goal: Goal, steps: Sequence[Step], scene: scenes.Scene) -> str:
  """The reasoning that resolves `steps` as `goal` has it, sums up and ends in the plan."""
  said = []
  for step in steps:
    wanted = goal.wanted[step.index]
    match step.about:
      case "kind" if wanted.count > 1 and "instead of" in step.said:
        said.append(f"{step.said} are {riddles.PLURALS[wanted.kind]}")
      case "kind":
        said.append(f"{step.said} is {riddles.with_article(wanted.kind)}")
      case "count":
        said.append(f"{step.said} is {riddles.NUMBERS[wanted.count]}")
      case "color":
        said.append(f"{step.said} is {wanted.color}")
      case "relation":
        said.append(f"{step.said} is {goal.relation}")
      case "colors":
        pair = (f"the {wanted.kind} is {wanted.color}" for wanted in goal.wanted)
        said.append(f"{step.said}, {' and '.join(pair)}")
  if goal.relation is not None:
    target, subject = (riddles.with_article(wanted.kind) for wanted in goal.wanted)
    said.append(f"{subject} {goal.relation} {target}")
  else:
    said.append(" and ".join(_sum_up(wanted) for wanted in goal.wanted))
  return f"<think>{'. '.join(said)}. so: {scenes.words(scene)}</think>"


def _sum_up(wanted: Wanted) -> str:
  noun = wanted.kind if wanted.count == 1 else riddles.PLURALS[wanted.kind]
  parts = (riddles.NUMBERS[wanted.count], wanted.color, noun)
  return " ".join(part for part in parts if part)


def split_of(combination: str) -> str:
  """The split that a combination belongs to.

  A combination is everything that a prompt asks for together with the words that it is asked in:
  classes, counts, colours and relation, each with the riddle it is said by, and the riddles' own
  distractors. Only the opening ("draw", "a photo of") and, in a plain "a and b", the order do not
  count. So every word and every goal may occur in all splits; how they are put together may not.
  """
  tenth = int.from_bytes(hashlib.blake2b(combination.encode(), digest_size=8).digest(), "big") % 10
  return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def sample(rng: np.random.Generator, split: str, category: str | None = None) -> Example:
  """Draws an example of a split.

  Args:
    rng: the only source of chance.
    split: one of `SPLITS`.
    category: one of `CATEGORIES`; None draws one, each as often.

  Raises:
    InputError: no such split or category.
  """
  if split not in SPLITS:
    raise errors.InputError(f"split={split!r} is none of {', '.join(SPLITS)}")
  category = category or CATEGORIES[rng.integers(len(CATEGORIES))]
  while True:
    goal = _draw_goal(rng, category)
    draft = _Draft(rng, _choose(rng, goal))
    text, key = _SAYING[category][0](draft, goal)
    combination = f"{category}: {key}"
    if split_of(combination) == split:
      break
  prompt = f"{draft.pick(riddles.OPENINGS)} {text}"
  scene = place(rng, goal)
  return Example(
    prompt=prompt,
    reasoning=reason(goal, draft.steps, scene),
    scene=scene,
    metadata=metadata_of(goal, prompt),
    category=category,
    riddles=tuple(draft.riddles),
    combination=combination,
    goal=goal,
    steps=tuple(draft.steps),
  )


def fixed(split: str, count: int) -> list[Example]:
  """The first `count` examples of a split's fixed list: always the same, prompts all different.

  Categories take turns, so they are balanced whatever `count`; a longer list begins with a shorter
  one.

  Raises:
    InputError: no such split, or the split has fewer different prompts.
  """
  rng = np.random.default_rng(list(split.encode()))
  examples, seen = [], set()
  for i in range(count):
    for _ in range(500):
      example = sample(rng, split, CATEGORIES[i % len(CATEGORIES)])
      if example.prompt not in seen:
        break
    else:
      raise errors.InputError(
        f"count={count}: split {split} has hardly more than {i} different prompts; ask for fewer"
      )
    seen.add(example.prompt)
    examples.append(example)
  return examples
