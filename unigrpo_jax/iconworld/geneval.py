"""GenEval's rules on detections, and the score of an image of this world.

Source: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment"
(arXiv 2310.11513).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import numbers
from typing import Any

import numpy as np

POSITION_THRESHOLD = 0.1  # Share of the two boxes' sizes that an offset must exceed.
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Detection:
  """An object found in an image.

  Attributes:
    kind: its class, or `UNKNOWN` for a blob that matches nothing.
    color: its colour's name, or `UNKNOWN`.
    box: (left, top, right, bottom) in pixels.
    score: confidence; the strongest are looked at first.
  """

  kind: str
  color: str
  box: tuple[float, float, float, float]
  score: float = 1.0


@dataclasses.dataclass(frozen=True)
class Clause:
  """How far one demand of an `include` entry is met: `met` in [0, 1]."""

  about: str
  met: float


def problem(metadata: Mapping[str, Any]) -> str | None:
  """What in `metadata` is not in GenEval's format and what is; None where all is, or is not there.

  Classes, colours and relations may be any text.
  """
  for name in ("include", "exclude"):
    entries = metadata.get(name, [])
    if not isinstance(entries, (list, tuple)):
      return f"{name}={entries!r:.60} must be a list of objects, as in GenEval"
    for number, entry in enumerate(entries):
      where = f"{name}[{number}]"
      if not isinstance(entry, Mapping):
        return f"{where}={entry!r:.60} must be an object with a class and a count"
      if not isinstance(entry.get("class"), str):
        return f"{where}.class={entry.get('class')!r:.60} must be text"
      count = entry.get("count")
      if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
        return f"{where}.count={count!r:.60} must be an integer of at least 1"
      if not isinstance(entry.get("color", ""), str):
        return f"{where}.color={entry['color']!r:.60} must be text"
      match entry.get("position"):
        case None if "position" not in entry:
          pass
        case [str(), numbers.Integral() as index] if 0 <= index < number:
          pass
        case other:
          return f"{where}.position={other!r:.60} must be [relation, an earlier entry's number]"
  return None


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
  """Where `box` is, seen from `target`: none, one or two of left of, right of, above, below.

  The offset of the centres, o, is shortened on each axis by 0.1 of both boxes' sizes together and
  divided by |o|; a direction counts where the result exceeds 1/2.
  """
  box, target = np.asarray(box, float), np.asarray(target, float)
  offset = (box[:2] + box[2:] - target[:2] - target[2:]) / 2
  slack = POSITION_THRESHOLD * np.abs(box[2:] - box[:2] + target[2:] - target[:2])
  shortened = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
  if np.all(np.abs(shortened) < 1e-3):
    return set()
  dx, dy = shortened / np.linalg.norm(offset)
  named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
  return {name for name, holds in named.items() if holds}


def _by_class(detections: Sequence[Detection]) -> dict[str, list[Detection]]:
  objects: dict[str, list[Detection]] = {}
  for item in sorted(detections, key=lambda item: -item.score):
    objects.setdefault(item.kind, []).append(item)
  return objects


def clauses(detections: Sequence[Detection], metadata: dict[str, Any]) -> list[Clause]:
  """Every demand of `metadata` and how far it is met; GenEval's verdict is that all are met fully.

  An include entry looks at its class's `count` most confident objects: enough of them, all in the
  colour, each in the relation to each of the entry that the position points to, provided that
  that entry is met. An exclude entry is met by fewer objects than its count.
  """
  objects = _by_class(detections)
  result: list[Clause] = []
  matched: list[list[Detection] | None] = []  # By entry; None where the entry is not met.
  for entry in metadata.get("include", ()):
    count = entry["count"]
    found = objects.get(entry["class"], [])[:count]
    own = [Clause("count", len(found) / count if count else 1.0)]
    if "color" in entry:
      right = sum(item.color == entry["color"] for item in found)
      own.append(Clause("color", right / count if count else 1.0))
    if "position" in entry:
      relation, index = entry["position"]
      targets = matched[index] if 0 <= index < len(matched) else None
      holds = (
        targets is not None
        and len(found) == count
        and all(relation in relations(item.box, target.box) for item in found for target in targets)
      )
      own.append(Clause("position", float(holds)))
    matched.append(found if all(clause.met == 1 for clause in own) else None)
    result += own
  for entry in metadata.get("exclude", ()):
    few = len(objects.get(entry["class"], [])) < entry["count"]
    result.append(Clause("exclude", float(few)))
  return result


def verify_geneval(detections: Sequence[Detection], metadata: dict[str, Any]) -> bool:
  """GenEval's verdict; it does not mind objects that were not asked for."""
  return all(clause.met == 1 for clause in clauses(detections, metadata))


def extra_objects(detections: Sequence[Detection], metadata: dict[str, Any]) -> int:
  """Objects beyond what `metadata` includes, unknown blobs among them."""
  objects = _by_class(detections)
  wanted: dict[str, int] = {}
  for entry in metadata.get("include", ()):
    wanted[entry["class"]] = wanted.get(entry["class"], 0) + entry["count"]
  used = sum(min(len(objects.get(kind, ())), count) for kind, count in wanted.items())
  return len(detections) - used


def score(detections: Sequence[Detection], metadata: dict[str, Any]) -> tuple[float, float]:
  """The strict and the soft score of this world.

  Strict is GenEval's verdict and no extra object. Soft is the mean of the clauses about what is
  included, times max(0, 1 - extra objects / objects asked for): twice too many objects score 0. It
  is 1 exactly where strict is and something is asked for.

  Returns:
    (0.0 or 1.0, a number in [0, 1]).
  """
  extra = extra_objects(detections, metadata)
  strict = verify_geneval(detections, metadata) and extra == 0
  met = [clause.met for clause in clauses(detections, metadata) if clause.about != "exclude"]
  wanted = sum(entry["count"] for entry in metadata.get("include", ()))
  soft = np.mean(met) * max(0.0, 1 - extra / wanted) if met and wanted else 0.0
  return float(strict), float(soft)
