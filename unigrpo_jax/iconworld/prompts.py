"""Prompts whose meaning must be worked out, with reasoning, a correct scene and metadata.

A prompt is made from its answer: a `Goal` is drawn first, then phrased, plainly or by riddles, so
what is correct is known by construction. Each riddle leaves a `Step`, which the reasoning resolves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.geneval import classes
from unigrpo_jax.iconworld import riddles, scenes

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Split -> tenths of all combinations.
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
RIDDLES = (0.3, 0.45, 0.25)  # Chance of none, one, two riddles in a prompt.
COLORED_COUNTS = 0.4  # Share of counting prompts that ask for a colour too.


@dataclasses.dataclass(frozen=True)
class Wanted:
  """`count` things of class `kind`, in `color` unless None."""

  kind: str
  count: int = 1
  color: str | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
  """What a prompt asks for."""

  category: str  # one of `CATEGORIES`, GenEval's tags
  wanted: tuple[Wanted, ...]  # one or two, of different classes
  relation: str | None = None  # of `wanted[1]`, seen from `wanted[0]`; None outside "position"


@dataclasses.dataclass(frozen=True)
class Step:
  """A riddle to resolve."""

  riddle: str  # the sort of indirection
  about: str  # "kind", "count" or "color" of `wanted[index]`, or "relation" or "colors" of both
  phrase: str  # what the prompt has for it
  index: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt and its answer."""

  prompt: str
  reasoning: str  # "<think>...so: PLAN</think>", correct
  scene: scenes.Scene  # the plan's; what the prompt leaves open is random, but for the background
  metadata: dict[str, Any]  # GenEval's format: tag, include, exclude (counting only), prompt
  combination: str  # what the splits are disjoint by; see `split_of`
  goal: Goal  # what the prompt was made from
  steps: tuple[Step, ...]  # its riddles; empty for a plain one


@dataclasses.dataclass
class _Draft:
  """A prompt in the making."""

  rng: np.random.Generator
  slots: set[str]  # which parts become riddles, such as "description 1"; see `_PHRASING`
  steps: list[Step] = dataclasses.field(default_factory=list)  # of the riddles so far

  def pick(self, options: Sequence[str]) -> str:
    return options[self.rng.integers(len(options))]

  def pick_other(self, options: Sequence[str], *taken: str) -> str:
    return self.pick([option for option in options if option not in taken])

  def noun(self, wanted: Wanted, index: int, color_of: int | None = None) -> str:
    """A noun phrase for `wanted`, number `index` of the goal, with the colour of `color_of`."""
    color_of = index if color_of is None else color_of
    many = wanted.count > 1
    head, tail = riddles.PLURALS[wanted.kind] if many else wanted.kind, ""
    if f"description {index}" in self.slots:
      description = self.pick(riddles.DESCRIPTIONS[wanted.kind])
      head, tail = "things" if many else "thing", f" {description}"
    number = riddles.NUMBERS[wanted.count]
    if "arithmetic" in self.slots:
      number = self.pick(riddles.arithmetic(wanted.count))
      self.steps.append(Step("arithmetic", "count", number, index))
    if tail:
      self.steps.append(Step("description", "kind", f"the thing{tail}", index))
    if wanted.color is not None:
      if f"example {index}" in self.slots:
        example = f"the colour of {self.pick(riddles.EXAMPLES[wanted.color])}"
        self.steps.append(Step("example", "color", example, color_of))
        tail += f" in {example}"
      elif "color correction" in self.slots:
        correction = f"not {self.pick_other(scenes.COLORS, wanted.color)} but {wanted.color}"
        self.steps.append(Step("correction", "color", correction, color_of))
        tail += f", {correction}"
      else:
        head = f"{wanted.color} {head}"
    if many:
      return f"{number} {head}{tail}"
    return f"the {head}{tail}" if "thing" in head else f"{classes.with_article(head)}{tail}"

  def unwanted(self, kind: str) -> str:
    """A noun phrase for something else than `kind`, named or described."""
    other = self.pick_other(scenes.KINDS, kind)
    if self.rng.random() < 0.5:
      return classes.with_article(other)
    return f"the thing {self.pick(riddles.DESCRIPTIONS[other])}"


# Each phrases a goal: its text, and the text without an order that does not matter.


def _phrase_single(draft: _Draft, goal: Goal) -> tuple[str, str]:
  [wanted] = goal.wanted
  text = draft.noun(wanted, 0)
  if "correction" in draft.slots:
    unwanted = draft.unwanted(wanted.kind)
    text = draft.pick((f"{text} instead of {unwanted}", f"not {unwanted} but {text}"))
    draft.steps.append(Step("correction", "kind", text))
  return text, text


def _phrase_two(draft: _Draft, goal: Goal) -> tuple[str, str]:
  first, second = (draft.noun(wanted, i) for i, wanted in enumerate(goal.wanted))
  if "correction" in draft.slots:
    unwanted = draft.pick_other(scenes.KINDS, *(wanted.kind for wanted in goal.wanted))
    correction = f"{second} instead of the {unwanted}"
    draft.steps.append(Step("correction", "kind", correction, 1))
    text = f"{first} and {classes.with_article(unwanted)}, but {correction}"
    return text, text
  return f"{first} and {second}", " and ".join(sorted((first, second)))


def _phrase_count(draft: _Draft, goal: Goal) -> tuple[str, str]:
  [wanted] = goal.wanted
  text = draft.noun(wanted, 0)
  if "correction" in draft.slots:
    end = f" instead of {riddles.PLURALS[draft.pick_other(scenes.KINDS, wanted.kind)]}"
    text += end
    draft.steps.append(Step("correction", "kind", riddles.PLURALS[wanted.kind] + end))
  return text, text


def _phrase_position(draft: _Draft, goal: Goal) -> tuple[str, str]:
  target, subject = (draft.noun(wanted, i) for i, wanted in enumerate(goal.wanted))
  relation, opposite = goal.relation, riddles.OPPOSITES[goal.relation]
  converse = riddles.CONVERSES[relation]
  mirror = "in a mirror" if relation in ("left of", "right of") else "upside down"
  text = f"{subject} {relation} {target}"
  if "relation" in draft.slots:
    # Riddle -> the phrase to resolve, and the text that has it.
    ways = {
      "mirror": (f"{opposite} {mirror}", f"{subject} {opposite} {target}, seen {mirror}"),
      "negation": (
        f"not {opposite} but {relation}", f"{subject} not {opposite} but {relation} {target}",
      ),
      "converse": (converse, f"{target} with {subject} {converse}"),
      "swap": (f"{opposite} swapped", f"{subject} {opposite} {target}, with the two swapped"),
    }
    riddle = draft.pick(tuple(ways))
    phrase, text = ways[riddle]
    draft.steps.append(Step(riddle, "relation", phrase))
  return text, text


def _phrase_colors(draft: _Draft, goal: Goal) -> tuple[str, str]:
  colors = [wanted.color for wanted in goal.wanted]
  swap = "swap" in draft.slots
  nouns = []
  for i, wanted in enumerate(goal.wanted):
    color_of = 1 - i if swap else i
    nouns.append(draft.noun(dataclasses.replace(wanted, color=colors[color_of]), i, color_of))
  if swap:
    draft.steps.append(Step("swap", "colors", "swapped"))
  end = ", with the colours swapped" if swap else ""
  return " and ".join(nouns) + end, " and ".join(sorted(nouns)) + end


# Category -> how it is phrased, and groups of slots that can be riddles: at most one of a group.
_PHRASING = {
  "single_object": (_phrase_single, (("description 0", "correction"),)),
  "two_object": (_phrase_two, (("description 0",), ("description 1", "correction"))),
  "counting": (_phrase_count, (("arithmetic",), ("description 0", "correction"), ("example 0",))),
  "colors": (_phrase_single, (("description 0",), ("example 0", "color correction"))),
  "position": (_phrase_position, (("description 0",), ("description 1",), ("relation",))),
  "color_attr": (
    _phrase_colors,
    (("description 0",), ("description 1",), ("example 0",), ("example 1",), ("swap",)),
  ),
}


def _draw_goal(rng: np.random.Generator, category: str) -> Goal:
  kind, other = (str(kind) for kind in rng.permutation(scenes.KINDS)[:2])
  color, other_color = (str(color) for color in rng.permutation(scenes.COLORS)[:2])
  relation = None
  match category:
    case "single_object":
      wanted = (Wanted(kind),)
    case "two_object":
      wanted = (Wanted(kind), Wanted(other))
    case "counting":
      count_color = color if rng.random() < COLORED_COUNTS else None
      wanted = (Wanted(kind, int(rng.integers(2, 5)), count_color),)
    case "colors":
      wanted = (Wanted(kind, color=color),)
    case "position":
      relation = riddles.RELATIONS[rng.integers(len(riddles.RELATIONS))]
      wanted = (Wanted(kind), Wanted(other))
    case "color_attr":
      wanted = (Wanted(kind, color=color), Wanted(other, color=other_color))
  return Goal(category, wanted, relation)


def _draw_slots(rng: np.random.Generator, goal: Goal) -> set[str]:
  groups = list(_PHRASING[goal.category][1])
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
    [wanted] = goal.wanted
    metadata["exclude"] = [{"class": wanted.kind, "count": wanted.count + 1}]
  return metadata | {"prompt": prompt}


def plain(metadata: Mapping[str, Any]) -> str:
  """What metadata includes, in words without a riddle: "two red kites", "a bird above an apple"."""
  nouns, relation = [], None
  for entry in metadata["include"]:
    count, color = entry["count"], entry.get("color")
    noun = riddles.PLURALS[entry["class"]] if count > 1 else entry["class"]
    noun = f"{color} {noun}" if color else noun
    if "position" in entry:
      relation = entry["position"]
    number = riddles.NUMBERS[count] if count < len(riddles.NUMBERS) else str(count)
    nouns.append(f"{number} {noun}" if count > 1 else classes.with_article(noun))
  if relation is not None:
    name, target = relation
    return f"{nouns[-1]} {name} {nouns[target]}"
  return " and ".join(nouns)


def place(rng: np.random.Generator, goal: Goal) -> scenes.Scene:
  """A random correct scene; things in a relation share a row or a column, so that it is clear."""
  cells = [str(cell) for cell in rng.permutation(scenes.CELLS)]
  if goal.relation in ("left of", "right of"):
    row = ("top", "bottom")[rng.integers(2)]
    cells = [f"{row} left", f"{row} right"]
  elif goal.relation in ("above", "below"):
    column = ("left", "right")[rng.integers(2)]
    cells = [f"top {column}", f"bottom {column}"]
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
  sentences = [_resolve(goal, step) for step in steps]
  if goal.relation is not None:
    target, subject = (classes.with_article(wanted.kind) for wanted in goal.wanted)
    sentences.append(f"{subject} {goal.relation} {target}")
  else:
    sentences.append(" and ".join(map(_sum_up, goal.wanted)))
  return f"<think>{'. '.join(sentences)}. so: {scenes.to_text(scene)}</think>"


def _resolve(goal: Goal, step: Step) -> str:
  wanted = goal.wanted[step.index]
  if step.about == "colors":
    pair = " and ".join(f"the {wanted.kind} is {wanted.color}" for wanted in goal.wanted)
    return f"{step.phrase}, {pair}"
  if step.about == "kind" and wanted.count > 1 and "instead of" in step.phrase:
    return f"{step.phrase} are {riddles.PLURALS[wanted.kind]}"
  answer = {
    "kind": classes.with_article(wanted.kind), "count": riddles.NUMBERS[wanted.count],
    "color": wanted.color, "relation": goal.relation,
  }[step.about]
  return f"{step.phrase} is {answer}"


def _sum_up(wanted: Wanted) -> str:
  noun = wanted.kind if wanted.count == 1 else riddles.PLURALS[wanted.kind]
  return " ".join(filter(None, (riddles.NUMBERS[wanted.count], wanted.color, noun)))


def split_of(combination: str) -> str:
  """The split that a combination belongs to.

  A combination is everything that a prompt asks for and the words that it is asked in, riddles and
  their distractors included. Only the opening ("draw", "a photo of") and, in a plain "a and b", the
  order do not count. So every word and every goal may occur in all splits, but not put together.
  """
  tenth = int.from_bytes(hashlib.blake2b(combination.encode(), digest_size=8).digest(), "big") % 10
  return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def sample(rng: np.random.Generator, split: str, category: str | None = None) -> Example:
  """Draws an example of a split; `category` None draws one of `CATEGORIES`, each as often.

  Raises:
    InputError: no such split or category.
  """
  errors.choose("split", split, list(SPLITS))
  category = category or CATEGORIES[rng.integers(len(CATEGORIES))]
  errors.choose("category", category, CATEGORIES)
  while True:
    goal = _draw_goal(rng, category)
    draft = _Draft(rng, _draw_slots(rng, goal))
    text, key = _PHRASING[category][0](draft, goal)
    combination = f"{category}: {key}"
    if split_of(combination) == split:
      break
  prompt = f"{draft.pick(riddles.OPENINGS)} {text}"
  scene = place(rng, goal)
  reasoning, metadata = reason(goal, draft.steps, scene), metadata_of(goal, prompt)
  return Example(prompt, reasoning, scene, metadata, combination, goal, tuple(draft.steps))


def fixed(split: str, count: int) -> list[Example]:
  """The first `count` examples of a split's fixed list: always the same, prompts all different.

  Categories take turns; a longer list begins with a shorter one.

  Raises:
    InputError: no such split, or the split has fewer different prompts.
  """
  rng = np.random.default_rng(list(split.encode()))
  examples: dict[str, Example] = {}
  for i in range(count):
    for _ in range(500):
      example = sample(rng, split, CATEGORIES[i % len(CATEGORIES)])
      if example.prompt not in examples:
        break
    else:
      raise errors.InputError(
        f"count={count}: split {split} has hardly more than {i} different prompts; ask for fewer"
      )
    examples[example.prompt] = example
  return list(examples.values())
