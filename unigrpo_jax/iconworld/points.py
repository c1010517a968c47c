"""Exam points: what a prompt asks for, one statement each, and which of them an image meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unigrpo_jax.geneval import rules
from unigrpo_jax.iconworld import riddles, scoring

NOTHING_ELSE = "nothing else is there"


def statements(metadata: Mapping[str, Any]) -> list[str]:
  """The points of metadata in GenEval's format, in a fixed order.

  Each entry of include has one for its number ("there are three kites"), one for its colour and one
  for its relation; the last is `NOTHING_ELSE`.
  """
  made, include = [], metadata.get("include", ())
  for entry in include:
    made.append(f"there {_is(entry)} {_number(entry['count'])} {_noun(entry)}")
    if "color" in entry:
      made.append(f"the {_noun(entry)} {_is(entry)} {entry['color']}")
    if "position" in entry:
      relation, index = entry["position"]
      made.append(f"the {_noun(entry)} {_is(entry)} {relation} the {_noun(include[index])}")
  return [*made, NOTHING_ELSE]


def met(detections: Sequence[rules.Found], metadata: Mapping[str, Any]) -> list[float]:
  """1.0 or 0.0 of each of `statements`: the verifier's demand is met fully.

  A number is exact. Nothing else is there where no object is beyond what is asked for and at least
  one that is asked for is there: a blank image meets no point.
  """
  included, _ = rules.demands(detections, metadata)
  shares = iter(included)
  made, any_wanted = [], False
  for entry in metadata.get("include", ()):
    count = sum(item.kind == entry["class"] for item in detections)
    any_wanted |= count > 0
    next(shares)  # Of GenEval's number, which more objects meet too.
    made.append(float(count == entry["count"]))
    made += [float(next(shares) == 1) for key in ("color", "position") if key in entry]
  nothing_else = any_wanted and scoring.extra_objects(detections, metadata) == 0
  return [*made, float(nothing_else)]


def _noun(entry: Mapping[str, Any]) -> str:
  name = entry["class"]
  return riddles.PLURALS.get(name, f"{name}s") if entry["count"] > 1 else name


def _is(entry: Mapping[str, Any]) -> str:
  return "are" if entry["count"] > 1 else "is"


def _number(count: int) -> str:
  return riddles.NUMBERS[count] if count < len(riddles.NUMBERS) else str(count)
