"""GenEval's rules on detections, and the score of an image of this world.

Source: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment"
(arXiv 2310.11513).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import numbers
from typing import Any

import numpy as np

POSITION_THRESHOLD = 0.1  # Share of the two boxes' sizes that an offset must exceed.
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Detection:
  """An object in an image."""

  kind: str  # its class, or `UNKNOWN` for a blob that matches nothing
  color: str  # its colour's name, or `UNKNOWN`
  box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
  score: float = 1.0  # confidence; the strongest are looked at first


def problem(metadata: Mapping[str, Any]) -> str | None:
  """What in `metadata`'s include and exclude is not in GenEval's format first; None for nothing.

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


def demands(
  detections: Sequence[Detection], metadata: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
  """How far each demand of `metadata` is met, in [0, 1]: those of include, those of exclude.

  An include entry looks at its class's `count` most confident objects: enough of them, all in the
  colour, each in the relation to each of the entry that the position points to, provided that
  that entry is met. An exclude entry is met by fewer objects than its count.
  """
  ranked = sorted(detections, key=lambda item: -item.score)
  of_class = lambda name: [item for item in ranked if item.kind == name]
  included: list[float] = []
  matched: list[list[Detection] | None] = []  # By entry; None where the entry is not met.
  for entry in metadata.get("include", ()):
    count = entry["count"]
    objects = of_class(entry["class"])[:count]
    met = [len(objects) / count]
    if "color" in entry:
      met.append(sum(item.color == entry["color"] for item in objects) / count)
    if "position" in entry:
      relation, index = entry["position"]
      targets = matched[index]
      met.append(float(
        targets is not None
        and len(objects) == count
        and all(relation in relations(a.box, b.box) for a in objects for b in targets)
      ))
    matched.append(objects if all(share == 1 for share in met) else None)
    included += met
  excluded = [
    float(len(of_class(entry["class"])) < entry["count"]) for entry in metadata.get("exclude", ())
  ]
  return included, excluded


def verify_geneval(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> bool:
  """GenEval's verdict, every demand met fully; objects that were not asked for do not matter."""
  included, excluded = demands(detections, metadata)
  return all(share == 1 for share in included + excluded)


def extra_objects(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> int:
  """Objects beyond what `metadata` includes, unknown blobs among them."""
  wanted = collections.Counter()
  for entry in metadata.get("include", ()):
    wanted[entry["class"]] += entry["count"]
  present = collections.Counter(item.kind for item in detections)
  return (present - wanted).total()


def score(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> tuple[float, float]:
  """The strict (0.0 or 1.0) and the soft score (in [0, 1]) of this world.

  Strict is GenEval's verdict and no extra object. Soft is the mean of the demands of include, times
  max(0, 1 - extra objects / objects asked for). It is 1 exactly where strict is and something is
  asked for.
  """
  extra = extra_objects(detections, metadata)
  strict = verify_geneval(detections, metadata) and extra == 0
  included, _ = demands(detections, metadata)
  wanted = sum(entry["count"] for entry in metadata.get("include", ()))
  soft = np.mean(included) * max(0.0, 1 - extra / wanted) if included else 0.0
  return float(strict), float(soft)
