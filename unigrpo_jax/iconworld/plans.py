"""Judging a reasoning text alone, and making wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import icons, prompts, renderer, riddles, scenes, scoring

START = "so: "
END = "</think>"
RIDDLE_WEIGHT = 3  # How much likelier a mistake is about something that had to be worked out.


def plan_of(text: str) -> scenes.Scene | None:
  """The scene of the plan that a reasoning text ends in.

  It stands between the last "so: " before the first "</think>" and that tag, or the end of the
  text. None if there is none, or it is not a plan from end to end.
  """
  _, start, plan = text.split(END, 1)[0].rpartition(START)
  return scenes.parse(plan) if start else None


def detections(scene: scenes.Scene) -> list[rules.Found]:
  """What a faultless detector finds in a scene drawn without jitter."""
  boxes = icons.load().box
  result = []
  for thing in scene.things:
    top, left = renderer.corner(thing.cell)
    box = boxes[scenes.KINDS.index(thing.kind)] + (left, top, left, top)
    result.append(rules.Found(thing.kind, thing.color, tuple(box.tolist())))
  return result


def is_correct(text: str, metadata: Mapping[str, Any]) -> bool:
  """Whether a reasoning text's plan, drawn faultlessly, would score strict 1."""
  scene = plan_of(text)
  return scene is not None and scoring.score(detections(scene), metadata)[0] == 1


def corrupt(rng: np.random.Generator, example: prompts.Example) -> str:
  """Reasoning about the example's prompt with one mistake in it; `is_correct` never holds for it.
  """
  mistaken = mistake(rng, example)
  return prompts.reason(mistaken, example.steps, prompts.place(rng, mistaken))


def mistake(rng: np.random.Generator, example: prompts.Example) -> prompts.Goal:
  """The example's goal with one mistake in it.

  The mistake is another class or colour, a number one off, a relation the wrong way round, or
  colours not swapped; three times likelier where the prompt has a riddle than where it is plain.
  """
  goal = example.goal
  mistakes = [("kind", i) for i in range(len(goal.wanted))]
  mistakes += [("color", i) for i, wanted in enumerate(goal.wanted) if wanted.color]
  if goal.category == "counting":
    mistakes.append(("count", 0))
  if goal.relation is not None:
    mistakes.append(("relation", 0))
  if goal.category == "color_attr":
    mistakes.append(("colors", 0))
  resolved = {(step.about, step.index) for step in example.steps}
  weights = np.array([RIDDLE_WEIGHT if found in resolved else 1 for found in mistakes], float)
  about, index = mistakes[rng.choice(len(mistakes), p=weights / weights.sum())]
  return _mistake(rng, goal, about, index)


def _mistake(rng: np.random.Generator, goal: prompts.Goal, about: str, index: int) -> prompts.Goal:
  """`goal` with a mistake in its relation, in whose colours are whose, or in `wanted[index]`."""
  if about == "relation":
    return dataclasses.replace(goal, relation=riddles.OPPOSITES[goal.relation])
  if about == "colors":
    colors = [item.color for item in reversed(goal.wanted)]
    wanted = [dataclasses.replace(item, color=c) for item, c in zip(goal.wanted, colors)]
    return dataclasses.replace(goal, wanted=tuple(wanted))
  item, taken = goal.wanted[index], {item.kind for item in goal.wanted}
  others = {
    "kind": [kind for kind in scenes.KINDS if kind not in taken],
    "color": [color for color in scenes.COLORS if color != item.color],
    "count": [count for count in (item.count - 1, item.count + 1) if 1 <= count <= 4],
  }[about]
  wanted = list(goal.wanted)
  wanted[index] = dataclasses.replace(item, **{about: others[rng.integers(len(others))]})
  return dataclasses.replace(goal, wanted=tuple(wanted))
