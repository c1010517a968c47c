"""GenEval's rules: which detections count, and what of a prompt's demands they meet.

Sources: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment"
(arXiv 2310.11513) and its `evaluation/evaluate_images.py` (djghosh13/geneval, af4902f); for the
rules of training, `evaluate_reward` of yifan123/reward-server (92ac29f), which Flow-GRPO optimises,
and `geneval.py` of Tencent-Hunyuan/UniRL (1a7b501).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import numbers
from typing import Any

import numpy as np

POSITION_THRESHOLD = 0.1  # Share of the two boxes' sizes that an offset must exceed.
MAX_OBJECTS = 16  # Of a class, the most confident ones that count.
UNKNOWN = "unknown"
RULES = ("official", "strict", "soft", "soft_flow_grpo")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """An object in an image."""

  kind: str  # its class, or `UNKNOWN` for a blob that matches nothing
  color: str  # its colour's name, or `UNKNOWN`
  box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
  score: float = 1.0  # confidence; the strongest are looked at first
  mask: np.ndarray | None = None  # [H, W] bool of the picture; None where only the box is known


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


def kept(
  found: Sequence[Found], metadata: Mapping[str, Any], *, thresholds: tuple[float, float]
) -> list[Found]:
  """The detections that GenEval looks at, the most confident first.

  Of each class the first 16 whose score exceeds the threshold. Boxes may overlap.

  Args:
    found: of one image.
    metadata: its prompt's; one without a tag is taken for one of another tag than counting.
    thresholds: of scores, for all tags but counting, and for counting; the detector's.
  """
  threshold = thresholds[metadata.get("tag") == "counting"]
  # Of equal scores the later one is first, as where numpy's order is reversed.
  ranked = sorted((item for item in found if item.score > threshold), key=lambda item: item.score)
  result, number = [], collections.Counter()
  for item in reversed(ranked):
    number[item.kind] += 1
    if number[item.kind] <= MAX_OBJECTS:
      result.append(item)
  return result


@dataclasses.dataclass(frozen=True)
class Entry:
  """What an image has of one entry of include.

  Attributes:
    count: objects that the entry asks for.
    present: objects of its class.
    colored: of its `count` most confident ones, those of its colour; None where it names none.
    related: whether each of them is in the relation to each of the entry pointed to; None where it
      points to none.
    target: whether the entry pointed to is met; True where it points to none.
    faults: what is not met, a line each.
  """

  count: int
  present: int
  colored: int | None
  related: bool | None
  target: bool
  faults: tuple[str, ...]


def entries(
  found: Sequence[Found], metadata: Mapping[str, Any], *, exact: bool = False
) -> list[Entry]:
  """Looks at each entry of include, in order.

  An entry looks at its class's `count` most confident objects: enough of them (`exact`: and no
  others), all in the colour, each in the relation to each of the entry that the position points
  to, provided that that entry is met.
  """
  ranked = sorted(found, key=lambda item: -item.score)
  result: list[Entry] = []
  looked_at: list[list[Found]] = []
  for entry in metadata.get("include", ()):
    name, count = entry["class"], entry["count"]
    of_class = [item for item in ranked if item.kind == name]
    objects, present = of_class[:count], len(of_class)
    looked_at.append(objects)
    faults = []
    if present < count or exact and present > count:
      faults.append(f"{name}: {present} found, {'exactly' if exact else 'at least'} {count} wanted")
    colored, related, target = None, None, True
    if "color" in entry:
      colored = sum(item.color == entry["color"] for item in objects)
      if colored < count and not faults:
        seen = ", ".join(item.color for item in objects)
        faults.append(f"{name}: {colored} {entry['color']} of {count} wanted, found {seen}")
    if "position" in entry:
      relation, index = entry["position"]
      target = not result[index].faults
      related = target and len(objects) == count and all(
        relation in relations(a.box, b.box) for a in objects for b in looked_at[index]
      )
      if not related and not faults:
        other = metadata["include"][index]["class"]
        faults.append(
          f"{name}: not {relation} {other}" if target else f"{name}: no {other} to be {relation}"
        )
    result.append(Entry(count, present, colored, related, target, tuple(faults)))
  return result


def _excluded(found: Sequence[Found], metadata: Mapping[str, Any]) -> list[str | None]:
  """The fault of each entry of exclude: as many objects as its count or more; None for none."""
  present = collections.Counter(item.kind for item in found)
  return [
    f"{entry['class']}: {present[entry['class']]} found, fewer than {entry['count']} wanted"
    if present[entry["class"]] >= entry["count"] else None
    for entry in metadata.get("exclude", ())
  ]


def demands(
  found: Sequence[Found], metadata: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
  """How far each demand of `metadata` is met, in [0, 1]: those of include, those of exclude.

  An entry's are its number, its colour and its relation, as far as it has them; see `entries`. An
  exclude entry is met by fewer objects than its count.
  """
  included = []
  for entry in entries(found, metadata):
    included.append(min(entry.present, entry.count) / entry.count)
    included += [entry.colored / entry.count] if entry.colored is not None else []
    included += [float(entry.related)] if entry.related is not None else []
  return included, [float(fault is None) for fault in _excluded(found, metadata)]


def verify_geneval(found: Sequence[Found], metadata: Mapping[str, Any]) -> bool:
  """GenEval's verdict, every demand met fully; objects that were not asked for do not matter."""
  return not verdict(found, metadata, rule="official")[1]


def verdict(
  found: Sequence[Found], metadata: Mapping[str, Any], *, rule: str, clip: bool = True
) -> tuple[float, list[str]]:
  """The score of an image by one of `RULES`, and what it does not meet, a line each.

  official: 1 where every entry of include and exclude is met, else 0. More objects than asked for
    are forgiven, unless exclude says otherwise.
  strict: 1 where every entry of include is met and exactly as many objects are there, else 0;
    exclude is not looked at.
  soft: the mean over demands. Of an entry for n objects of which m are there, 1 - |n - m| / n; with
    m = n the share of the objects in its colour, and where that is 1, 1 or 0 for its relation;
    otherwise one 0 where it has a colour or a relation. With `clip`, no demand is below 0.
  soft_flow_grpo: `soft` without `clip`, in which a relation that does not hold counts as a 0 and a
    1: a fault of the source, to reproduce its numbers.

  Args:
    found: the objects that count, see `kept`, with the colours of those whose colour is asked for.
    metadata: in GenEval's format, see `problem`.

  Raises:
    ValueError: there is no such rule.
  """
  if rule not in RULES:
    raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
  made = entries(found, metadata, exact=rule != "official")
  faults = [fault for entry in made for fault in entry.faults]
  if rule == "official":
    faults += [fault for fault in _excluded(found, metadata) if fault]
  if rule in ("official", "strict"):
    return float(not faults), faults
  flow_grpo = rule == "soft_flow_grpo"
  lowest = 0.0 if clip and not flow_grpo else -np.inf
  shares: list[float] = []
  for entry in made:
    shares.append(max(lowest, 1 - abs(entry.count - entry.present) / entry.count))
    if entry.present != entry.count:
      shares += [0.0] if entry.colored is not None or entry.related is not None else []
      continue
    if entry.colored is not None:
      shares.append(entry.colored / entry.count)
    if entry.related is not None and entry.colored in (None, entry.count):
      shares.append(float(entry.related))
      shares += [1.0] if flow_grpo and entry.target and not entry.related else []
  return float(np.mean(shares)) if shares else 0.0, faults
