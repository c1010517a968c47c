"""Other things to do with a scene: questions about it, and changes to it."""

from __future__ import annotations

import dataclasses

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.geneval import classes
from unigrpo_jax.iconworld import riddles, scenes

QUESTIONS = ("count", "color")
EDITS = ("recolor", "remove", "replace", "swap", "add")
ABSENT = 0.15  # Share of counting questions that may be about something that is not there.


def _pick(rng: np.random.Generator, options):
  return options[int(rng.integers(len(options)))]


def _single(scene: scenes.Scene) -> list[scenes.Thing]:
  """The things whose class no other thing has, so that "the bird" says which."""
  kinds = [thing.kind for thing in scene.things]
  return [thing for thing in scene.things if kinds.count(thing.kind) == 1]


def question(
  rng: np.random.Generator, scene: scenes.Scene, about: str | None = None
) -> tuple[str, str]:
  """A question about what an image shows, and its answer: a number's or a colour's name.

  `about` is one of `QUESTIONS`, None draws one: "how many kites are there?", of a class, a colour
  or anything; or "what colour is the bird?", of a class that is there once. A scene without such a
  class gets a counting question in any case.

  Raises:
    InputError: no such sort of question.
  """
  about = about or _pick(rng, QUESTIONS)
  errors.choose("about", about, QUESTIONS)
  single = _single(scene)
  if about == "color" and single:
    thing = _pick(rng, single)
    return f"what colour is the {thing.kind}?", thing.color

  def pick(present: list[str], names: tuple[str, ...]) -> str:
    return _pick(rng, present if present and rng.random() > ABSENT else names)

  kinds, colors = ([getattr(t, field) for t in scene.things] for field in ("kind", "color"))
  match _pick(rng, ("kind", "kind", "color", "all")):
    case "kind":
      kind = pick(kinds, scenes.KINDS)
      noun, count = riddles.PLURALS[kind], kinds.count(kind)
    case "color":
      color = pick(colors, scenes.COLORS)
      noun, count = f"{color} things", colors.count(color)
    case "all":
      noun, count = "things", len(scene.things)
  return f"how many {noun} are there?", riddles.NUMBERS[count]


def description(scene: scenes.Scene) -> tuple[str, str]:
  """A question that asks for everything an image shows, and its answer, row by row."""
  return "what is there?", scenes.to_text(scene)


def edit(
  rng: np.random.Generator, scene: scenes.Scene, kind: str | None = None
) -> tuple[str, scenes.Scene]:
  """An instruction, and the scene as it should be afterwards, which is never the old one.

  What the instruction does not name stays in its cell, on the same background; `renderer.render`
  with generators in the same state then leaves its pixels alone. Only things that are the only
  ones of their class are changed. `kind` is one of `EDITS`, None draws one; an edit that the scene
  does not allow becomes another.

  Raises:
    InputError: no such sort of edit.
  """
  if kind is not None:
    errors.choose("kind", kind, EDITS)
  things = {thing.cell: thing for thing in scene.things}
  single = _single(scene)
  absent = [name for name in scenes.KINDS if name not in {thing.kind for thing in scene.things}]
  free = [cell for cell in scenes.CELLS if cell not in things]
  possible = {
    "recolor": single, "remove": single and len(things) > 1, "replace": single,
    "swap": len(single) > 1, "add": free,
  }
  # Four things of which no class is there once can only be named all together.
  allowed = [name for name in EDITS if possible[name]] or ["recolor all"]
  chosen = kind if kind in allowed else _pick(rng, allowed)
  thing = _pick(rng, single) if single else None
  match chosen:
    case "recolor":
      color = _pick(rng, [color for color in scenes.COLORS if color != thing.color])
      instruction = f"make the {thing.kind} {color}"
      things[thing.cell] = dataclasses.replace(thing, color=color)
    case "remove":
      instruction = f"remove the {thing.kind}"
      del things[thing.cell]
    case "replace":
      other = _pick(rng, absent)
      instruction = f"replace the {thing.kind} with {classes.with_article(other)}"
      things[thing.cell] = dataclasses.replace(thing, kind=other)
    case "swap":
      first, second = (single[i] for i in rng.permutation(len(single))[:2])
      instruction = f"swap the {first.kind} and the {second.kind}"
      things[first.cell] = dataclasses.replace(second, cell=first.cell)
      things[second.cell] = dataclasses.replace(first, cell=second.cell)
    case "add":
      new = scenes.Thing(_pick(rng, absent), _pick(rng, scenes.COLORS), _pick(rng, free))
      instruction = f"add {classes.with_article(f'{new.color} {new.kind}')} {new.cell}"
      things[new.cell] = new
    case "recolor all":
      used = {thing.color for thing in scene.things}
      color = _pick(rng, [color for color in scenes.COLORS if color not in used])
      instruction = f"make all things {color}"
      things = {cell: dataclasses.replace(item, color=color) for cell, item in things.items()}
  return instruction, dataclasses.replace(scene, things=tuple(things.values()))
