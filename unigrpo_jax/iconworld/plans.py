"""Judging a reasoning text alone, and making wrong ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from unigrpo_jax.iconworld import geneval, icons, prompts, renderer, riddles, scenes

START = "so: "
END = "</think>"
# How much likelier a mistake is about something that had to be worked out.
RIDDLE_WEIGHT = 3


def plan_of(text: str) -> scenes.Scene | None:
  """The scene of the plan that a reasoning text ends in.

  The plan is what stands between the last "so: " before the first "</think>" and that tag, or the
  end of the text. None if there is none, or it is not a plan from end to end.
  """
  before = text.split(END, 1)[0]
  start = before.rfind(START)
  return scenes.parse(before[start + len(START) :]) if start >= 0 else None


def detections(scene: scenes.Scene) -> list[geneval.Detection]:
  """What a faultless detector finds in a scene drawn without jitter."""
  masks = icons.load().alpha > 0.3
  found = []
  for thing in scene.things:
    mask = masks[scenes.KINDS.index(thing.kind)]
    top, left = renderer.corner(thing.cell)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    found.append(geneval.Detection(thing.kind, thing.color, tuple(map(float, edges))))
  return found


def is_correct(text: str, metadata: dict[str, Any]) -> bool:
  """Whether a reasoning text's plan, drawn faultlessly, would score strict 1."""
  scene = plan_of(text)
  return scene is not None and geneval.score(detections(scene), metadata)[0] == 1


def corrupt(rng: np.random.Generator, example: prompts.Example) -> str:
  """Reasoning about the example's prompt with one thing taken wrongly, and the plan that follows.

  The mistake is one that a reader might make: another class or colour, a number one off, a
  relation the wrong way round, colours not swapped; three times likelier where the prompt has a
  riddle than where it is plain. `is_correct` never holds for the result.
  """
  mistakes = [("kind", i) for i in range(len(example.goal.wanted))]
  mistakes += [("color", i) for i, wanted in enumerate(example.goal.wanted) if wanted.color]
  if example.goal.category == "counting":
    mistakes.append(("count", 0))
  if example.goal.relation is not None:
    mistakes.append(("relation", 0))
  if example.goal.category == "color_attr":
    mistakes.append(("colors", 0))
  resolved = {(step.about, step.index) for step in example.steps}
  weights = np.array([RIDDLE_WEIGHT if mistake in resolved else 1 for mistake in mistakes], float)
  about, index = mistakes[rng.choice(len(mistakes), p=weights / weights.sum())]
  goal = _mistake(rng, example.goal, about, index)
  return prompts.reason(goal, example.steps, prompts.place(rng, goal))


def _mistake(rng: np.random.Generator, goal: prompts.Goal, about: str, index: int) -> prompts.Goal:
  """`goal` with one of its parts taken wrongly."""
  wanted = list(goal.wanted)
  item = wanted[index]
  match about:
    case "relation":
      return dataclasses.replace(goal, relation=riddles.OPPOSITES[goal.relation])
    case "colors":
      colors = [item.color for item in reversed(wanted)]
      wanted = [dataclasses.replace(item, color=color) for item, color in zip(wanted, colors)]
    case "kind":
      taken = {item.kind for item in wanted}
      others = [kind for kind in scenes.KINDS if kind not in taken]
      wanted[index] = dataclasses.replace(item, kind=others[rng.integers(len(others))])
    case "color":
      others = [color for color in scenes.COLORS if color != item.color]
      wanted[index] = dataclasses.replace(item, color=others[rng.integers(len(others))])
    case "count":
      near = [count for count in (item.count - 1, item.count + 1) if 1 <= count <= 4]
      wanted[index] = dataclasses.replace(item, count=near[rng.integers(len(near))])
  return dataclasses.replace(goal, wanted=tuple(wanted))
