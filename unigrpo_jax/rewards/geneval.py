"""The reward `geneval`: GenEval's verdict by a detector, a method for colours, and rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.geneval import classes, rules
from unigrpo_jax.rewards import base, colors, detectors, making

RELATIONS = ("left of", "right of", "above", "below")


@making.register("geneval")
class GenEval:
  """Scores how well a picture shows what its prompt's metadata asks for; see `rules.verdict`.

  A sample whose metadata is not in GenEval's format, or asks for nothing, scores NaN.

  Attributes:
    settings: what scores depend on; see `base.Reward`.
    fingerprint: the settings as text.
    concurrent: whether both detector and colours are.
  """

  def __init__(
    self, *, rule: str = "strict", detector: str = "nanodet", color: str = "hsv",
    thresholds: Sequence[float] | None = None, clip: bool = True,
    detector_options: Mapping[str, Any] | None = None,
    color_options: Mapping[str, Any] | None = None,
  ):
    """Loads the detector.

    Args:
      rule: one of `rules.RULES`.
      detector: a name of `detectors.NAMED`, or "module:Class".
      color: a name of `colors.NAMED`, or "module:Class".
      thresholds: (for all tags but counting, for counting): detections count whose scores exceed
        this; None: the detector's own.
      clip: rule "soft" only: each demand scores at least 0.
      detector_options, color_options: of the detector and of the method for colours.

    Raises:
      InputError: an option is impossible, or the detector cannot be loaded.
    """
    errors.choose("rule", rule, rules.RULES)
    if not clip and rule not in ("soft", "soft_flow_grpo"):
      raise errors.InputError(
        f"clip=False has no effect with rule={rule}, only with soft; leave it out"
      )
    self._rule, self._clip = rule, clip
    self._detector = detectors.make(detector, detector_options or {})
    self._colors = colors.make(color, color_options or {})
    given = self._detector.thresholds if thresholds is None else thresholds
    if not isinstance(given, (list, tuple)) or len(given) != 2:
      raise errors.InputError(f"thresholds={given!r} must be two numbers: [all tags, counting]")
    for value in given:
      errors.require("thresholds", value, low=0, high=1)
    self._thresholds = tuple(map(float, given))
    self.concurrent = all(getattr(x, "concurrent", False) for x in (self._detector, self._colors))
    self.settings = {
      "rule": rule, "detector": self._detector.name, "thresholds": list(self._thresholds),
      "color": self._colors.name,
    } | ({"clip": clip} if rule == "soft" else {})
    self.fingerprint = json.dumps(self.settings, sort_keys=True)

  def __call__(self, samples: Sequence[base.Sample]) -> base.Scores:
    """Scores N samples.

    The details of each are "boxes", the objects that count, {class: [[left, top, right, bottom,
    score], ...]} in pixels; "reason", what is not met; and "correct", the official verdict.
    """
    values = np.full(len(samples), np.nan, np.float32)
    details: list[dict[str, Any]] = [{"reason": _problem(sample.metadata)} for sample in samples]
    judged = [i for i, detail in enumerate(details) if detail["reason"] is None]
    try:
      found = self._find([samples[i] for i in judged])
    except Exception as error:  # Whatever a detector of another library raises.
      failed = f"{self._detector.name}: {errors.describe(error)}"
      details = [detail if detail["reason"] else {"reason": failed} for detail in details]
      judged, found = [], []
    for i, objects in zip(judged, found, strict=True):
      judge = lambda rule, i=i, objects=objects: rules.verdict(
        objects, samples[i].metadata, rule=rule, clip=self._clip
      )
      values[i], faults = judge(self._rule)
      boxes: dict[str, list[list[float]]] = {}
      for item in objects:
        row = [*(round(side, 2) for side in item.box), round(item.score, 5)]
        boxes.setdefault(item.kind, []).append(row)
      details[i] = {
        "correct": bool(judge("official")[0]), "reason": "; ".join(faults), "boxes": boxes
      }
    reason = next((d["reason"] for d, v in zip(details, values, strict=True) if np.isnan(v)), None)
    return base.Scores(values, reason, details=details)

  def _find(self, samples: Sequence[base.Sample]) -> list[list[rules.Found]]:
    """The objects of each sample that count, with colours where its metadata asks for them."""
    if not samples:
      return []
    found = [
      rules.kept(objects, sample.metadata, thresholds=self._thresholds)
      for sample, objects in zip(
        samples, self._detector([sample.image for sample in samples]), strict=True
      )
    ]
    wanted: dict[str, list[tuple[int, int, Any]]] = {}  # class: (sample, object, crop)
    for i, sample in enumerate(samples):
      for kind, count in _colored(sample.metadata).items():
        of_class = [k for k, item in enumerate(found[i]) if item.kind == kind]
        for k in of_class[:count]:
          if (picture := colors.crop(sample.image, found[i][k])) is not None:
            wanted.setdefault(kind, []).append((i, k, picture))
    for kind, items in wanted.items():
      named = self._colors([picture for *_, picture in items], kind)
      for (i, k, _), color in zip(items, named, strict=True):
        found[i][k] = dataclasses.replace(found[i][k], color=color)
    return found


def _colored(metadata: Mapping[str, Any]) -> dict[str, int]:
  """{class: number of its objects whose colours are needed}."""
  counts: dict[str, int] = {}
  for entry in metadata["include"]:
    if "color" in entry:
      counts[entry["class"]] = max(entry["count"], counts.get(entry["class"], 0))
  return counts


def _problem(metadata: Mapping[str, Any]) -> str | None:
  """Why metadata cannot be judged, whatever the picture; None where it can."""
  if not metadata.get("include"):
    return "its metadata has no include: prompts need GenEval's metadata"
  if problem := rules.problem(metadata):
    return problem
  for entry in (*metadata["include"], *metadata.get("exclude", ())):
    relation, _ = entry.get("position", (RELATIONS[0], 0))
    for value, known, what in (
      (entry["class"], classes.CLASSES, "80 classes"),
      (entry.get("color", "red"), classes.COLORS, "ten colours"),
      (relation, RELATIONS, "four relations"),
    ):
      if value not in known:
        return f"its metadata asks for {value!r:.60}, which is none of GenEval's {what}"
  return None
