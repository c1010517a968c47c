"""Triples of IconWorld, in blocks of four; the answers are the verifier's, from the pixels.

A block has two pictures A, B and two prompts p, q: A shows p and not q, B shows q and not p. So in
its four triples, neither the picture nor the prompt alone tells the answer. Blocks of nonsense are
different: they pair two prompts with pictures that show them and with pictures that show nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import icons, plans, prompts, renderer, scenes, scoring, verifier

# {source of pictures: share of the triples}.
SOURCES = {
  "render": 0.15, "near_image": 0.20, "near_prompt": 0.15, "vae": 0.15, "policy": 0.25,
  "one_step": 0.05, "nonsense": 0.05,
}
TRIES = 400  # Attempts per wanted block, after which a source and category is given up.


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """A picture and what the verifier finds in it."""

  pixels: np.ndarray  # [H, W, 3] uint8
  found: Sequence[rules.Found]

  def shows(self, metadata: Mapping[str, Any]) -> bool:
    """Whether it shows exactly what metadata asks for."""
    return scoring.score(self.found, metadata)[0] == 1


def look(pixels: np.ndarray) -> Picture:
  """A picture, [H, W, 3] uint8, with what the verifier finds in it."""
  return Picture(pixels, verifier.detect(pixels))


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """Four triples of one category; see the module's docstring."""

  category: str
  triples: tuple[tuple[Picture, Mapping[str, Any], bool], ...]  # (picture, metadata, answer)

  def redrawn(self, pictures: Mapping[Picture, Picture]) -> Block | None:
    """The block with other pictures, {old: new}; None if one of them changes an answer."""
    return sound(
      self.category, tuple((pictures[a], metadata, yes) for a, metadata, yes in self.triples)
    )


def sound(category: str, triples: tuple) -> Block | None:
  """The block of these triples; None if one of its answers is wrong."""
  holds = all(picture.shows(metadata) == yes for picture, metadata, yes in triples)
  return Block(category, triples) if holds else None


def pair(category: str, a: Picture, b: Picture, p: Any, q: Any) -> Block | None:
  """The block of pictures a, b and metadata p, q; None if p or q is None, or answers are wrong."""
  if p is None or q is None:
    return None
  return sound(category, ((a, p, True), (a, q, False), (b, q, True), (b, p, False)))


def describe(rng: np.random.Generator, picture: Picture, category: str) -> dict[str, Any] | None:
  """Metadata that asks for exactly what a picture shows, if possible of this category.

  None for a picture that is not clear.
  """
  found = list(picture.found)
  known = all(item.kind in scenes.KINDS and item.color in scenes.COLORS for item in found)
  if not known or not 1 <= len(found) <= len(scenes.CELLS):
    return None
  options = _options(rng, found)
  fitting = [option for option in options if option["tag"] == category] or options
  return fitting[rng.integers(len(fitting))]


def _options(
  rng: np.random.Generator, found: Sequence[rules.Found]
) -> list[dict[str, Any]]:
  """Metadata that asks for exactly what was found, one of each category that allows it."""
  order = [found[i] for i in rng.permutation(len(found))]
  kinds = list(dict.fromkeys(item.kind for item in order))
  counts = {kind: [item.color for item in order if item.kind == kind] for kind in kinds}

  def entries(colored: bool) -> list[dict[str, Any]]:
    return [
      {"class": kind, "count": len(colors)}
      | ({"color": colors[0]} if colored and len(set(colors)) == 1 else {})
      for kind, colors in counts.items()
    ]

  colored = lambda: bool(rng.integers(2))
  metadata = lambda tag, include: {"tag": tag, "include": include}
  if len(order) == 1:
    return [metadata("single_object", entries(False)), metadata("colors", entries(True))]
  if len(kinds) == 1:
    return [metadata("counting", entries(colored()))]
  if len(order) > 2:
    return [metadata("several", entries(colored()))]
  result = [metadata("two_object", entries(False)), metadata("color_attr", entries(True))]
  for relation in sorted(rules.relations(order[1].box, order[0].box)):
    target, subject = entries(False)
    result.append(metadata("position", [target, subject | {"position": [relation, 0]}]))
  return result


# --- Blocks of scenes.


def render_block(rng: np.random.Generator, split: str, category: str) -> Block | None:
  """A block of two examples' scenes and prompts."""
  one, other = (prompts.sample(rng, split, category) for _ in range(2))
  a, b = (look(renderer.render(example.scene, rng)) for example in (one, other))
  return pair(category, a, b, one.metadata, other.metadata)


def near_image_block(rng: np.random.Generator, split: str, category: str) -> Block | None:
  """A block of an example's scene, and of the same scene with one thing changed."""
  example = prompts.sample(rng, split, category)
  # In 70 % of the blocks, both are rendered with the same background, brightness and jitter.
  seeds = rng.integers(2**63, size=2)
  seeds[1] = seeds[int(rng.random() < 0.3)]
  a, b = (
    look(renderer.render(scene, np.random.default_rng(seed)))
    for scene, seed in zip((example.scene, changed(rng, example.scene)), seeds)
  )
  return pair(category, a, b, example.metadata, describe(rng, b, category))


def near_prompt_block(rng: np.random.Generator, split: str, category: str) -> Block | None:
  """A block of an example's scene, and of a scene for its goal with one mistake."""
  example = prompts.sample(rng, split, category)
  goal = plans.mistake(rng, example)
  a, b = (look(renderer.render(s, rng)) for s in (example.scene, prompts.place(rng, goal)))
  return pair(category, a, b, example.metadata, prompts.metadata_of(goal, ""))


MAKERS = {
  "render": render_block, "near_image": near_image_block, "near_prompt": near_prompt_block,
}


def changed(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
  """A scene with one change: a thing added, removed, or of another class or colour; or the places
  or colours of two things swapped.
  """
  things = list(scene.things)
  free = [cell for cell in scenes.CELLS if cell not in {thing.cell for thing in things}]
  kinds = ["kind", "color"] + ["more"] * 2 * bool(free) + ["less"] * (len(things) > 1)
  kinds += ["swap places", "swap colors"] * (len(things) > 1)
  pick = lambda options, *taken: str(rng.choice([o for o in options if o not in taken]))
  i, j = (int(k) for k in rng.permutation(max(len(things), 2))[:2])
  match str(rng.choice(kinds)):
    case "more":
      kind = things[0].kind if rng.random() < 0.5 else pick(scenes.KINDS)
      color = things[0].color if rng.random() < 0.5 else pick(scenes.COLORS)
      things.append(scenes.Thing(kind, color, pick(free)))
    case "less":
      del things[i]
    case "kind":
      i %= len(things)
      things[i] = dataclasses.replace(things[i], kind=pick(scenes.KINDS, things[i].kind))
    case "color":
      i %= len(things)
      things[i] = dataclasses.replace(things[i], color=pick(scenes.COLORS, things[i].color))
    case "swap places":
      things[i], things[j] = (
        dataclasses.replace(things[i], cell=things[j].cell),
        dataclasses.replace(things[j], cell=things[i].cell),
      )
    case "swap colors":
      things[i], things[j] = (
        dataclasses.replace(things[i], color=things[j].color),
        dataclasses.replace(things[j], color=things[i].color),
      )
  return dataclasses.replace(scene, things=tuple(things))


# --- Blocks of what a policy drew.


def policy_block(
  rng: np.random.Generator, groups: Mapping[str, Sequence[tuple[Any, Sequence[Picture]]]],
  category: str,
) -> Block | None:
  """A block of two pictures by a policy, mostly of one prompt, sometimes of two.

  A picture's prompt is its example's if the picture shows that, else what it shows instead.
  `groups` is {category: [(example, its pictures)]}.
  """
  if not groups.get(category):
    return None
  pick = lambda options: options[rng.integers(len(options))]
  one = other = pick(groups[category])
  if rng.random() < 0.3:
    other = pick(groups[category])
  a, b = pick(one[1]), pick(other[1])
  if a is b:
    return None
  asked = lambda picture, example: (
    example.metadata if picture.shows(example.metadata) else describe(rng, picture, category)
  )
  p, q = asked(a, one[0]), asked(b, other[0])
  return pair(category, a, b, p, q)


def nonsense_block(
  rng: np.random.Generator, split: str, category: str, garbled: Sequence[Picture]
) -> Block | None:
  """A block of two scenes with their prompts, and of two pictures that show nothing.

  Half of the latter are taken from `garbled`, unclear pictures by a policy, if there are any.
  """
  triples = []
  for _ in range(2):
    example = prompts.sample(rng, split, category)
    shown = look(renderer.render(example.scene, rng))
    if garbled and rng.random() < 0.5:
      other = garbled[rng.integers(len(garbled))]
    else:
      other = look(nonsense(rng, shown.pixels))
    triples += [(shown, example.metadata, True), (other, example.metadata, False)]
  return sound(category, tuple(triples))


def nonsense(rng: np.random.Generator, shown: np.ndarray) -> np.ndarray:
  """A picture [H, W, 3] uint8 that shows nothing: `shown` destroyed, or a pattern."""
  size = renderer.SIZE
  plain = np.array(list(icons.BACKGROUNDS.values()), float)
  canvas = np.full((size, size, 3), plain[rng.integers(len(plain))])
  match rng.choice(["blank", "noise", "gradient", "collage", "dither", "specks"]):
    case "blank":
      canvas[:] = rng.uniform(0, 255, 3)
    case "noise":
      canvas += rng.normal(0, rng.uniform(20, 120), canvas.shape)
    case "gradient":
      ends = rng.uniform(0, 255, (2, 3))
      along = np.linspace(0, 1, size)[:, None, None]
      along = along if rng.random() < 0.5 else along.swapaxes(0, 1)
      canvas[:] = ends[0] + (ends[1] - ends[0]) * along
    case "collage":
      tiles = shown.reshape(4, size // 4, 4, size // 4, 3).swapaxes(1, 2).reshape(16, -1)
      tiles = rng.permutation(tiles).reshape(4, 4, size // 4, size // 4, 3)
      canvas = tiles.swapaxes(1, 2).reshape(size, size, 3).astype(float)
    case "dither":
      canvas = shown.astype(float)
      other = rng.uniform(0, 255, 3)
      canvas[(np.add.outer(np.arange(size), np.arange(size)) % 2).astype(bool)] = other
    case "specks":
      canvas = shown.astype(float)
      spots = rng.random((size, size)) < rng.uniform(0.03, 0.15)
      canvas[spots] = rng.uniform(0, 255, (int(spots.sum()), 3))
  return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
