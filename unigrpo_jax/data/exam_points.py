"""Exam points: questions about a picture, each with its right answer and the points it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from unigrpo_jax import errors


@dataclasses.dataclass(frozen=True)
class Point:
  """One question about a picture.

  Attributes:
    question: what is asked.
    answer: the right one: "yes", "no", a number in digits or as a word, or other text.
    needs: numbers (from 1) of earlier points that must be met for this one to count.
  """

  question: str
  answer: str = "yes"
  needs: tuple[int, ...] = ()


def read(metadata: Mapping[str, Any]) -> tuple[Point, ...]:
  """The points of a prompt's metadata; () where it has none.

  "points" is a list of questions or of objects {"question", "answer", "needs"}, of which only the
  question is required; "vqa_list", as in GenEval2, a list of [question, answer].

  Raises:
    InputError: they are of another form, or a point needs one that is not before it.
  """
  key = "points" if "points" in metadata else "vqa_list"
  given = metadata.get(key, ())
  if key in metadata and (not isinstance(given, list | tuple) or not given):
    raise errors.InputError(f"{key}={errors.shown(given)} must be a list of at least one question")
  made = []
  for number, item in enumerate(given, 1):
    with errors.at(f"{key}, point {number}"):
      made.append(_point(item, number))
  return tuple(made)


def _point(item: Any, number: int) -> Point:
  if isinstance(item, str):
    item = {"question": item}
  elif isinstance(item, list | tuple) and len(item) == 2:
    item = dict(zip(("question", "answer"), item))
  if not isinstance(item, Mapping):
    raise errors.InputError(f'{errors.shown(item)} must be a question or {{"question": ...}}')
  question, answer = item.get("question"), item.get("answer", "yes")
  if not isinstance(question, str) or not question.strip():
    raise errors.InputError(f"question={errors.shown(question)} must be text")
  if isinstance(answer, int) and not isinstance(answer, bool):
    answer = str(answer)
  if not isinstance(answer, str) or not answer.strip():
    raise errors.InputError(f"answer={errors.shown(answer)} must be text or an integer")
  needs = item.get("needs", ())
  if not isinstance(needs, list | tuple) or not all(
    type(need) is int and 1 <= need < number for need in needs
  ):
    raise errors.InputError(
      f"needs={errors.shown(needs)} must be a list of numbers of earlier points, 1 to {number - 1}"
    )
  return Point(question.strip(), answer.strip(), tuple(needs))


def apply_needs(points: Sequence[Point], credits: Sequence[float]) -> list[float]:
  """The credits of K points, [0, 1] each, with 0 for a point of whose needs one has less than 1/2.

  The rule of DSG, DPG-Bench and OneIG; it follows chains of needs.
  """
  made: list[float] = []
  for point, credit in zip(points, credits, strict=True):
    made.append(credit if all(made[need - 1] >= 0.5 for need in point.needs) else 0.0)
  return made
