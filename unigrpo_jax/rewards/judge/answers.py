"""Reading scores from a chat completion; an answer that cannot be read raises, never scores 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import re
from typing import Any

NUMBERS = {
  word: value for value, word in enumerate((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
  ).split())
}
THINKING = (
  "thinking used up max_tokens; send enable_thinking false: "
  'extra={"chat_template_kwargs": {"enable_thinking": false}}'
)
_MARKS = " \t\r\n\u0120\u2581\u010a"  # white space, also that of byte-level BPE and SentencePiece


class Unreadable(Exception):
  """An answer does not contain what was asked for; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """The relevant parts of a chat completion.

  Attributes:
    text: the answer; "" where there is none.
    cut: whether it ended because max_tokens were used up.
    top: (token, probability) of the likeliest first tokens; () where the server sent none.
  """

  text: str
  cut: bool = False
  top: tuple[tuple[str, float], ...] = ()

  @classmethod
  def parse(cls, body: Any) -> Reply:
    """Reads a completion's JSON; raises Unreadable where it has no choice with a message."""
    try:
      choice = body["choices"][0]
      content = choice["message"].get("content")
      if isinstance(content, list):  # Parts, as some servers give them.
        content = "".join(part.get("text") or "" for part in content)
      if not isinstance(content, str | None):
        raise TypeError
      return cls(content or "", choice.get("finish_reason") == "length", _top(choice))
    except (TypeError, ValueError, OverflowError, LookupError, AttributeError):
      raise Unreadable("the answer is no chat completion") from None


def _top(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
  tokens = (choice.get("logprobs") or {}).get("content") or [{}]
  made = []
  for item in tokens[0].get("top_logprobs") or ():
    token, logprob = item["token"], float(item["logprob"])
    if isinstance(token, str) and logprob <= 1e-3:  # Rounding may leave a little above 0.
      made.append((token, math.exp(logprob)))
  return tuple(made)


def number(word: str) -> int | None:
  """The number that digits or an English word stand for; None for other words."""
  if word.isascii() and word.isdigit():
    return int(word[:9])
  return NUMBERS.get(word)


def first_word(text: str) -> str:
  """The first word or number of a text, in lower case and without punctuation; "" for none."""
  words = re.search(r"[^\W_]+", text)
  return words[0].lower() if words else ""


def after_thinking(text: str) -> str:
  """The part of a text that follows its reasoning ("</think>"): all of it where there is none, ""
  where that does not end.
  """
  rest = text.rpartition("</think>")[2].strip()
  return "" if rest.startswith("<think>") else rest


def kind(expected: str) -> str:
  """The kind of a question, from its expected answer: "yes_no", "count" or "one_word"."""
  word = first_word(expected)
  if word in ("yes", "no"):
    return "yes_no"
  return "one_word" if number(word) is None else "count"


def credit(reply: Reply, expected: str) -> float:
  """1.0 where the answer begins with the expected word or number, else 0.0.

  Raises:
    Unreadable: the answer is empty, or it begins with neither yes nor no where one of these was
      expected, or with no number where one was.
  """
  said, wanted = first_word(after_thinking(reply.text)), first_word(expected)
  match kind(expected):
    case "yes_no":
      readable = said in ("yes", "no")
    case "count":
      readable, said, wanted = number(said) is not None, number(said), number(wanted)
    case _:
      readable = bool(said)
  if not readable:
    raise Unreadable(_no_answer(reply, kind(expected)))
  return float(said == wanted)


def text(reply: Reply) -> str:
  """The whole answer; raises Unreadable where it is empty."""
  if said := after_thinking(reply.text):
    return said
  raise Unreadable(_no_answer(reply, ""))


def _no_answer(reply: Reply, asked: str) -> str:
  """Why a reply does not answer a question of the kind `asked`, for an error message."""
  rest = after_thinking(reply.text)
  if not rest and (reply.cut or "<think>" in reply.text):
    return THINKING
  what = {"yes_no": "yes or no", "count": "a number"}.get(asked, "an answer")
  return f"the answer {_quoted(rest)} does not begin with {what}" if rest else "the answer is empty"


def p_yes(reply: Reply, min_mass: float) -> float:
  """P(yes) / (P(yes) + P(no)) of the first token, summed over all spellings of both words.

  Raises:
    Unreadable: there are no probabilities, or those of both together are less than `min_mass`.
  """
  yes, no = _mass(reply, "yes"), _mass(reply, "no")
  _check_mass(reply, yes + no, min_mass, "yes or no")
  return yes / (yes + no)


def p_answer(reply: Reply, expected: str, min_mass: float, renormalise: bool) -> float:
  """The probability that the first token is the expected answer, summed over all its spellings.

  A number may be written as word or as digits. With `renormalise` the probability is divided by
  that of all tokens that answer a question of this kind.

  Raises:
    Unreadable: there are no probabilities, or those of all such tokens together are less than
      `min_mass`.
  """
  mine = _mass(reply, first_word(expected))
  match kind(expected):
    case "yes_no":
      mass, what = _mass(reply, "yes") + _mass(reply, "no"), "yes or no"
    case "count":
      mass = sum(p for token, p in reply.top if number(_word(token)) is not None)
      what = "a number"
    case _:  # Any word is an answer.
      mass, what = sum(p for token, p in reply.top if "<think" not in token), "an answer"
  _check_mass(reply, mass, min_mass, what)
  return min(mine / mass if renormalise else mine, 1.0)


def _word(token: str) -> str:
  return token.strip(_MARKS).lower()


def _mass(reply: Reply, word: str) -> float:
  """The total probability of the first tokens that spell `word`, or the same number."""
  value = number(word)
  same = lambda other: other == word or (value is not None and number(other) == value)
  return sum(p for token, p in reply.top if same(_word(token)))


def _check_mass(reply: Reply, mass: float, min_mass: float, what: str) -> None:
  """Raises Unreadable without probabilities, or where `mass`, that of `what`, is below `min_mass`.
  """
  if not reply.top:
    raise Unreadable(
      "the server sent no logprobs of the first token; let it send them, or ask with form=points"
    )
  if mass < min_mass or not mass:
    token = max(reply.top, key=lambda item: item[1])[0]
    if "<think" in token or (reply.cut and not reply.text and not mass):
      raise Unreadable(THINKING)
    raise Unreadable(
      f"the first token was {_quoted(token)}; {what} together have {mass:.2g} of its probability"
    )


def listed(reply: Reply, count: int) -> list[str]:
  """The `count` answers in a JSON object {"answers": [...]}, with or without a code fence.

  Raises:
    Unreadable: the reply is no such object, or has another number of answers.
  """
  text = after_thinking(reply.text)
  fenced = re.search(r"```\w*\s*(.*?)```", text, re.DOTALL)
  try:
    found = json.loads(fenced[1] if fenced else text)["answers"]
  except (ValueError, TypeError, KeyError, RecursionError):
    found = None
  if not isinstance(found, list) or len(found) != count:
    if reply.cut:
      raise Unreadable(f"the answer was cut by max_tokens: {_quoted(text)}")
    raise Unreadable(f'{_quoted(text)} is not {{"answers": [{count} answers]}}')
  words = {True: "yes", False: "no"}
  return [words[item] if isinstance(item, bool) else str(item) for item in found]


@dataclasses.dataclass(frozen=True)
class Scale:
  """How to read numbers from a text and turn them into a score.

  Attributes:
    axes: {name of a number: regular expression with one group, the number}.
    bounds: least and largest valid value.
    low, high: weighted means that score 0 and 1.
    weights: {name: weight in the mean}; {}: all are equal.
    integers: whether only whole numbers are valid.
  """

  axes: Mapping[str, str]
  bounds: tuple[float, float]
  low: float
  high: float
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  integers: bool = False

  def read(self, reply: Reply) -> dict[str, float | None]:
    """{name: number}; None where the text has none, or an invalid one."""
    said = after_thinking(reply.text)
    return {name: self._number(pattern, said) for name, pattern in self.axes.items()}

  def _number(self, pattern: str, text: str) -> float | None:
    # Without Markdown's marks first, which a model may put around the number; a user's pattern may
    # ask for them.
    found = re.search(pattern, re.sub(r"[*_`#]", "", text), re.IGNORECASE)
    found = found or re.search(pattern, text, re.IGNORECASE)
    try:
      value = float(found[1]) if found else math.nan
    except (TypeError, ValueError):  # The group matched nothing, or no number.
      return None
    fits = self.bounds[0] <= value <= self.bounds[1] and (value.is_integer() or not self.integers)
    return value if fits else None

  def score(self, values: Mapping[str, float | None], names: Iterable[str] = ()) -> float:
    """(mean - low) / (high - low), with the weighted mean of the numbers `names`; () for all.

    Raises:
      Unreadable: a number is missing.
    """
    names = tuple(names) or tuple(self.axes)
    if missing := [name for name in names if values[name] is None]:
      low, high = (f"{bound:g}" for bound in self.bounds)
      raise Unreadable(f"the answer has no {', '.join(missing)} from {low} to {high}")
    weights = [self.weights.get(name, 1.0) for name in names]
    mean = sum(w * values[name] for w, name in zip(weights, names)) / sum(weights)
    return (mean - self.low) / (self.high - self.low)


_NUMBER = r"\s*:\s*(-?\d+(?:\.\d+)?)"
SCALES = {
  # CodeGoat24/UnifiedReward; flow_grpo and verl-omni map its two versions to [0, 1] like this.
  "unified_reward_1": Scale({"score": rf"Final Score{_NUMBER}"}, (1, 5), 0, 5),
  "unified_reward_2": Scale({
    axis: rf"{axis} Score\s*(?:\(1-5\))?{_NUMBER}" for axis in ("alignment", "coherence", "style")
  }, (1, 5), 1, 5),
  # PKU-YuanGroup/WISE: of April 2026, and the older one with its weights.
  "wise_verified": Scale({"score": rf"\bScore{_NUMBER}"}, (0, 1), 0, 1, integers=True),
  "wise_legacy": Scale(
    {axis: rf"{axis.replace('_', ' ')}{_NUMBER}"
     for axis in ("consistency", "realism", "aesthetic_quality")},
    (0, 2), 0, 2, {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1},
  ),
}


def _quoted(text: str) -> str:
  text = " ".join(text.split())
  return repr(text if len(text) <= 60 else f"{text[:57]}...")
