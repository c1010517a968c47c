"""Forms: what a judge is asked about a sample, and how its answers become a score.

  points           one question per exam point; the share that is answered as expected
  points_soft      the same with the probability of the expected answer (GenEval2's soft-TIFA)
  points_together  all points in one question, answered in JSON
  p_yes            P(yes) / (P(yes) + P(no)) of one question about the prompt
  transcribe       the text in the picture, scored as the reward `ocr` scores what it reads
  unified_reward_1, unified_reward_2, wise_verified, wise_legacy    see `answers.SCALES`
  custom           a number that the user's regular expression finds in the answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import exam_points
from unigrpo_jax.rewards import base, ocr
from unigrpo_jax.rewards.judge import answers, templates

AGGREGATES = ("mean", "gmean", "all")
WISE = ("wise_verified", "wise_legacy")
FORMS = (
  "points", "points_soft", "points_together", "p_yes", "transcribe", *answers.SCALES, "custom")
NO_TEXT = "[no text]"  # The answer that `transcribe` asks for about a picture without text.
_EXAMS = ("points", "points_soft", "points_together")
# Options that not every form uses, and the forms that do.
_USED_BY = {
  "metric": (*answers.SCALES, "custom"), "aggregate": _EXAMS, "use_needs": _EXAMS,
  "min_mass": ("points_soft", "p_yes"), "renormalise": ("points_soft",),
  **dict.fromkeys(("pattern", "low", "high"), ("custom",)),
}
_BY_WORD = {"yes_no": "yes or no", "count": "a number", "one_word": "one word"}


@dataclasses.dataclass(frozen=True)
class Question:
  """One request about a sample's picture.

  Attributes:
    text: of the request.
    read: reply -> what it says; raises `answers.Unreadable`.
    max_tokens: length limit of the answer.
    logprobs: whether log-probabilities of the first token are needed.
    schema: JSON schema of the answer; None: free text.
  """

  text: str
  read: Callable[[answers.Reply], Any]
  max_tokens: int
  logprobs: bool = False
  schema: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of all forms; each form uses some of them, and the others keep their defaults.

  Attributes:
    form: one of `FORMS`.
    template: name or file of the question's template; "": the form's own. Given for `points`, it is
      used for all kinds of answers.
    metric: forms with several numbers: the one that is the score; "": their (weighted) mean.
    aggregate: forms with points: how credits become the score, one of `AGGREGATES`.
    use_needs: forms with points: a point counts as not met if a point that it needs is not met.
    min_mass: forms with probabilities: least total probability of all valid answers.
    renormalise: `points_soft`: divide the probability by that of all valid answers.
    pattern, low, high: `custom`: a regular expression with one group, and the numbers that score 0
      and 1.
    max_tokens: length limit of an answer; 0: the form's own.

  Raises:
    InputError: an option is impossible.
  """

  form: str = "points"
  template: str = ""
  metric: str = ""
  aggregate: str = "mean"
  use_needs: bool = True
  min_mass: float = 0.05
  renormalise: bool = False
  pattern: str = ""
  low: float = 0.0
  high: float = 1.0
  max_tokens: int = 0

  def __post_init__(self):
    errors.choose("form", self.form, FORMS)
    errors.choose("aggregate", self.aggregate, AGGREGATES)
    errors.require("min_mass", self.min_mass, low=0, high=1)
    errors.require("max_tokens", self.max_tokens, low=0, integer=True)
    for field in dataclasses.fields(self):
      value, forms = getattr(self, field.name), _USED_BY.get(field.name, FORMS)
      if value != field.default and self.form not in forms:
        raise errors.InputError(
          f"{field.name}={errors.shown(value)} has no effect with form={self.form}, only with "
          f"{', '.join(forms)}; leave it out"
        )
    if self.form in (*WISE, "custom") and not self.template:
      what = "WISE's own text" if self.form in WISE else "the question"
      raise errors.InputError(f"form={self.form} needs template=FILE, {what} with {{prompt}} in it")
    if self.form == "custom":
      errors.require("high", self.high, above=self.low)


def make(options: Options) -> Form:
  """Makes the form that the options describe.

  Raises:
    InputError: a template or the pattern cannot be used.
  """
  if options.form in ("points", "points_soft"):
    return _Points(options)
  if options.form == "points_together":
    return _Together(options)
  if options.form == "transcribe":
    return _Transcription(options)
  return _Yes(options) if options.form == "p_yes" else _Numbers(options)


class Form:
  """What is asked about a sample, and how the answers become a score.

  Attributes:
    options: see `Options`.
    templates: of its questions.
    soft: whether it needs probabilities of the first token.
  """

  templates: Sequence[templates.Template] = ()
  soft = False

  def __init__(self, options: Options):
    self.options = options

  def questions(self, sample: base.Sample) -> list[Question]:
    """The questions about a sample; raises InputError where the form does not apply to it."""
    raise NotImplementedError

  def score(self, sample: base.Sample, read: Sequence[Any]) -> tuple[float, dict[str, Any]]:
    """The score of a sample and its details.

    `read` has what `Question.read` returned for each of its questions. Raises Unreadable.
    """
    raise NotImplementedError

  def probe(self, question: str) -> Question:
    """A yes/no question in the manner of this form, to find out whether the model sees pictures.

    The results of its `read` are compared between different pictures.
    """
    text = templates.Template.open("yes_no").fill({"question": question})
    if self.soft:
      read = lambda reply: answers.p_yes(reply, self.options.min_mass)
      return Question(text, read, self._tokens(1), logprobs=True)
    return Question(text, lambda reply: answers.credit(reply, "yes"), self._tokens(8))

  def _open(self, name: str, *fields: str) -> templates.Template:
    """Opens a template of this form, which must have `fields`."""
    template = templates.Template.open(name)
    for field in fields:
      template.require(field)
    self.templates = (*self.templates, template)
    return template

  def _tokens(self, count: int) -> int:
    """The length limit of an answer: the user's, or by default `count`."""
    return self.options.max_tokens or count


def _values(sample: base.Sample, **more: Any) -> dict[str, Any]:
  """The values of fields in templates."""
  return {**sample.metadata, "prompt": sample.prompt, "reasoning": sample.text, **more}


def _exam(sample: base.Sample) -> tuple[exam_points.Point, ...]:
  """A sample's exam points; raises InputError where it has none."""
  if not (points := exam_points.read(sample.metadata)):
    raise errors.InputError(
      f"prompt {errors.shown(sample.prompt)} has no exam points (points or vqa_list)"
    )
  return points


class _Exam(Form):
  """Base of forms with exam points; `read` has the credit of each point."""

  def score(self, sample, read):
    points = _exam(sample)
    credits = [float(credit) for credit in read]
    counted = exam_points.apply_needs(points, credits) if self.options.use_needs else credits
    facts = {"questions": [point.question for point in points], "credits": credits}
    return aggregate(counted, self.options.aggregate), facts


def aggregate(credits: Sequence[float], how: str) -> float:
  """The score of an image's credits, in [0, 1].

  "mean": their mean; "gmean": their geometric mean; "all": 1.0 if each is at least 1/2, else 0.0.
  """
  match how:
    case "mean":
      return float(np.mean(credits))
    case "gmean":
      with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(credits))))
  return float(min(credits) >= 0.5)


class _Points(_Exam):
  """`points` and `points_soft`: one question per exam point."""

  def __init__(self, options: Options):
    super().__init__(options)
    self.soft = options.form == "points_soft"
    one = options.template or ("one_word" if self.soft else "")
    opened = {name: self._open(name, "question") for name in ([one] if one else _BY_WORD)}
    self._by_kind = {kind: opened[one or kind] for kind in _BY_WORD}

  def questions(self, sample):
    return [self._question(sample, point) for point in _exam(sample)]

  def _question(self, sample: base.Sample, point: exam_points.Point) -> Question:
    template, o = self._by_kind[answers.kind(point.answer)], self.options
    text = template.fill(_values(sample, question=point.question))
    if self.soft:
      read = lambda reply: answers.p_answer(reply, point.answer, o.min_mass, o.renormalise)
      return Question(text, read, self._tokens(1), logprobs=True)
    return Question(text, lambda reply: answers.credit(reply, point.answer), self._tokens(8))


class _Together(_Exam):
  """`points_together`: all exam points in one question."""

  def __init__(self, options: Options):
    super().__init__(options)
    self._template = self._open(options.template or "together", "numbered_questions")

  def questions(self, sample):
    points = _exam(sample)
    kinds = [answers.kind(point.answer) for point in points]
    lines = []
    for number, (point, kind) in enumerate(zip(points, kinds), 1):
      hint = "" if kind == "yes_no" else f" (Answer with {_BY_WORD[kind]}.)"
      lines.append(f"{number}. {point.question}{hint}")
    values = _values(sample, numbered_questions="\n".join(lines), count=len(points))
    item = {"type": "string"} | ({"enum": ["yes", "no"]} if set(kinds) == {"yes_no"} else {})
    answer = {"type": "array", "items": item, "minItems": len(points), "maxItems": len(points)}
    schema = {
      "type": "object", "properties": {"answers": answer}, "required": ["answers"],
      "additionalProperties": False,
    }

    def read(reply: answers.Reply) -> list[float]:
      said = answers.listed(reply, len(points))
      return [
        answers.credit(answers.Reply(text), point.answer) for text, point in zip(said, points)
      ]

    return [Question(
      self._template.fill(values), read, self._tokens(64 + 16 * len(points)), schema=schema
    )]

  def score(self, sample, read):
    return super().score(sample, read[0])


class _Yes(Form):
  """`p_yes`."""

  soft = True

  def __init__(self, options: Options):
    super().__init__(options)
    self._template = self._open(options.template or "p_yes")

  def questions(self, sample):
    read = lambda reply: answers.p_yes(reply, self.options.min_mass)
    text = self._template.fill(_values(sample))
    return [Question(text, read, self._tokens(1), logprobs=True)]

  def score(self, sample, read):
    return read[0], {"p_yes": read[0]}


class _Transcription(Form):
  """`transcribe`."""

  def __init__(self, options: Options):
    super().__init__(options)
    self._template = self._open(options.template or "transcribe")

  def questions(self, sample):
    self._target(sample)
    return [Question(self._template.fill(_values(sample)), self._read, self._tokens(256))]

  def score(self, sample, read):
    facts = ocr.compare(self._target(sample), read[0])
    return facts["reward"], facts

  @staticmethod
  def _target(sample: base.Sample) -> str:
    try:
      return ocr.target_of(sample.prompt, sample.metadata)
    except ValueError as error:
      raise errors.InputError(str(error)) from None

  @staticmethod
  def _read(reply: answers.Reply) -> str:
    if reply.cut:
      raise answers.Unreadable("the transcription used up max_tokens")
    said = answers.text(reply)
    return "" if said.strip(" .*\"").lower() == NO_TEXT else said


class _Numbers(Form):
  """The forms of `answers.SCALES`, and `custom`: numbers in a free text."""

  def __init__(self, options: Options):
    super().__init__(options)
    self._template = self._open(options.template or options.form)
    self._scale = answers.SCALES.get(options.form) or _custom(options)
    self._axes = (options.metric,) if options.metric else ()
    if options.metric:
      errors.choose("metric", options.metric, list(self._scale.axes))

  def questions(self, sample):
    def read(reply: answers.Reply) -> tuple[float, dict[str, Any]]:
      answers.text(reply)  # There is one.
      values = self._scale.read(reply)
      return self._scale.score(values, self._axes), values

    return [Question(self._template.fill(_values(sample)), read, self._tokens(512))]

  def probe(self, question):
    """A model of this form may write nothing but scores, so any two texts are compared."""
    return dataclasses.replace(super().probe(question), read=answers.text)

  def score(self, sample, read):
    return read[0]


def _custom(options: Options) -> answers.Scale:
  """The scale of form `custom`; raises InputError for a pattern without exactly one group."""
  try:
    groups = re.compile(options.pattern).groups
  except re.error as error:
    raise errors.InputError(f"pattern={options.pattern!r}: {error}") from None
  if groups != 1:
    raise errors.InputError(
      f"pattern={options.pattern!r} must have one group, around the number"
    )
  bounds = (options.low, options.high)
  return answers.Scale({"score": options.pattern}, bounds, *bounds)
