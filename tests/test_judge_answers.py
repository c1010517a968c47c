"""Exam points, what is read out of a judge's answers, and what forms ask and make of them."""

import pathlib

import numpy as np
import pytest

from tests.parity import cases
from tests.parity import judge as recorded
from tests.refusals import refusal
from unigrpo_jax import rewards
from unigrpo_jax.data import exam_points
from unigrpo_jax.rewards.judge import answers, forms, templates

GOLDEN = pathlib.Path(__file__).parent / "golden_rewards/judge"
IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(("case", "name"), [
  (recorded.read_answers, "answers.jsonl"), (recorded.read_points, "exam_points.jsonl"),
  (recorded.shipped_templates, "templates.json"),
])
def test_recorded(case, name):
  report = cases.Report("judge")
  report.run(case, GOLDEN / name)
  assert report.lines
  assert [str(line) for line in report.lines if line.result != cases.PASS] == []


def test_a_vqa_list_and_plain_questions_are_points():
  expected = (exam_points.Point("How many pigs?", "two"), exam_points.Point("Is one pink?", "Yes"))
  assert exam_points.read(
    {"vqa_list": [["How many pigs?", "two"], ["Is one pink?", "Yes"]]}
  ) == expected
  assert exam_points.read({"points": ["Is it red?", {"question": " How many? ", "answer": 3}]}) == (
    exam_points.Point("Is it red?"), exam_points.Point("How many?", "3")
  )
  assert exam_points.read({"tag": "position"}) == ()


@pytest.mark.parametrize(("points", "message"), [
  ([], "points=[] must be a list of at least one question"),
  ("Is it red?", "points='Is it red?' must be a list"),
  ([1], "points, point 1: 1 must be a question"),
  (["a?", {"question": " "}], "points, point 2: question=' ' must be text"),
  ([{"question": "a?", "answer": True}], "answer=True must be text or an integer"),
  ([{"question": "a?", "needs": [1]}], "point 1: needs=[1] must be a list of numbers of earlier"),
  (["a?", {"question": "b?", "needs": [0]}], "needs=[0]"),
  (["a?", {"question": "b?", "needs": 1}], "needs=1"),
])
def test_points_that_are_none(points, message):
  assert message in refusal(exam_points.read, {"points": points})


def test_needs_follow_chains():
  points = exam_points.read({"points": [
    "a?", {"question": "b?", "needs": [1]}, {"question": "c?", "needs": [2]}, "d?",
  ]})
  assert exam_points.apply_needs(points, [0, 1, 1, 1]) == [0, 0, 0, 1]
  assert exam_points.apply_needs(points, [1, 0, 1, 1]) == [1, 0, 0, 1]


def reply(text="", top=(), cut=False):
  return answers.Reply(text, cut, tuple(top))


@pytest.mark.parametrize(("text", "expected", "credit"), [
  ("Yes.", "yes", 1), ("**no**", "yes", 0), ("No", "no", 1), ("'yes'", "no", 0),
  ("<think>no, no</think> Yes", "yes", 1), ("maybe", "yes", None), ("", "yes", None),
  ("<think>Yes", "yes", None), ("7", "seven", 1), ("Seven umbrellas", "7", 1), ("six", "seven", 0),
  ("several", "seven", None), ("Red, I think", "red", 1), ("blue", "red", 0), ("...", "red", None),
])
def test_credit_is_of_the_first_word(text, expected, credit):
  try:
    assert answers.credit(reply(text), expected) == credit
  except answers.Unreadable:
    assert credit is None


@pytest.mark.parametrize("cut", [True, False])
def test_thoughts_that_do_not_end_are_no_answer(tmp_path, cut):
  """Neither a word nor a number is read out of them, and no answer is never a wrong one."""
  given = reply("<think>\nfrom Final Score: 1 to 5, red. Score: 4", [("<think>", .99)], cut)
  path = tmp_path / "mine.txt"
  path.write_text("{prompt}")
  custom = make(form="custom", template=str(path), pattern=r"Score: (\d+)", high=10)
  for read in (
    lambda: answers.credit(given, "red"), lambda: answers.credit(given, "4"),
    lambda: answers.text(given),
    lambda: answers.p_answer(given, "red", 0.05, False),
    lambda: custom.questions(sample())[0].read(given),
  ):
    with pytest.raises(answers.Unreadable, match="thinking used up max_tokens"):
      read()
  assert answers.SCALES["unified_reward_1"].read(given) == {"score": None}


@pytest.mark.parametrize(("pattern", "text"), [
  (r'overall_score"?:\s*(\d+)', 'so: {"overall_score": 7}'), (r"#### (\d+)", "good.\n#### 7"),
  (r"`(\d+)`", "it is `7`"), (r"Score: (\d+)", "**Score:** 7"), (r"score: (\d+)", "## Score: *7*"),
])
def test_a_pattern_may_ask_for_marks_that_are_ignored_otherwise(tmp_path, pattern, text):
  path = tmp_path / "mine.txt"
  path.write_text("{prompt}")
  form = make(form="custom", template=str(path), pattern=pattern, high=10)
  [question] = form.questions(sample())
  assert form.score(sample(), [question.read(reply(text))])[0] == 0.7


def test_all_forms_of_a_token_count_and_no_other_word():
  top = [("Yes", .3), ("\u0120yes", .2), ("\u2581YES", .1), ("No", .2), ("Yesterday", .2)]
  assert answers.p_yes(reply(top=top), 0.05) == pytest.approx(0.75)
  assert answers.p_answer(reply(top=top), "no", 0.05, False) == pytest.approx(0.2)
  assert answers.p_answer(reply(top=top), "no", 0.05, True) == pytest.approx(0.25)
  numbers = [("two", .2), ("2", .2), (" Two", .1), ("three", .1), ("The", .4)]
  assert answers.p_answer(reply(top=numbers), "two", 0.05, False) == pytest.approx(0.5)
  assert answers.p_answer(reply(top=numbers), "5", 0.05, False) == 0
  assert answers.p_answer(reply(top=[("red", .4), ("The", .5)]), "Red", 0.05, False) == 0.4


@pytest.mark.parametrize(("given", "reason"), [
  (reply(top=[("The", .9), ("yes", .02)]), "first token was 'The'; yes or no together have 0.02"),
  (reply("Yes"), "no logprobs of the first token; let it send them, or ask with form=points"),
  (reply("", [("<think>", 1.0)], cut=True), "send enable_thinking false"),
])
def test_probabilities_that_are_none(given, reason):
  with pytest.raises(answers.Unreadable, match=reason):
    answers.p_yes(given, 0.05)


@pytest.mark.parametrize("body", [
  None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]},
  {"choices": [{"message": {}, "logprobs": {"content": [{"top_logprobs": [{}]}]}}]},
  *({"choices": [{"message": {}, "logprobs": {"content": [
    {"top_logprobs": [{"token": "yes", "logprob": value}]}]}}]} for value in ("x", 10**400)),
])
def test_bodies_that_are_no_completion(body):
  with pytest.raises(answers.Unreadable, match="no chat completion"):
    answers.Reply.parse(body)


@pytest.mark.parametrize("text", ["Final Score: 7", "Final Score: 10", "Final Score: high", "3"])
def test_numbers_out_of_bounds_are_none(text):
  scale = answers.SCALES["unified_reward_1"]
  with pytest.raises(answers.Unreadable, match="no score from 1 to 5"):
    scale.score(scale.read(reply(text)))


def make(**options):
  return forms.make(forms.Options(**options))


def sample(*points, prompt="a red kite", **more):
  return rewards.Sample(prompt, IMAGE, None, {"points": list(points)} | more)


KITES = sample("Is it red?", {"question": "How many?", "answer": "two", "needs": [1]},
               {"question": "Which colour?", "answer": "red"})


def test_points_ask_by_the_kind_of_their_answer():
  asked = make().questions(KITES)
  assert [question.text for question in asked] == [
    "Is it red? Answer with one word, Yes or No.", "How many? Answer with one word, a number.",
    "Which colour? Answer in one word.",
  ]
  assert [question.max_tokens for question in asked] == [8] * 3
  assert [question.read(reply(text)) for question, text in zip(asked, ["yes", "2", "Blue"])] == [
    1, 1, 0
  ]
  soft = make(form="points_soft").questions(KITES)
  assert {question.text.partition("?")[2] for question in soft} == {" Answer in one word."}
  assert all(question.logprobs and question.max_tokens == 1 for question in soft)


@pytest.mark.parametrize(("options", "credits", "score"), [
  ({}, [1, 1, 0], 2 / 3), ({}, [0, 1, 1], 1 / 3), ({"use_needs": False}, [0, 1, 1], 2 / 3),
  ({"aggregate": "gmean"}, [1, 1, 0], 0), ({"aggregate": "gmean"}, [1, .5, .5], .25 ** (1 / 3)),
  ({"aggregate": "all"}, [1, 1, 1], 1), ({"aggregate": "all"}, [1, 1, 0], 0),
])
def test_aggregates(options, credits, score):
  value, facts = make(**options).score(KITES, credits)
  assert value == pytest.approx(score)
  assert facts["credits"] == credits


def test_points_together_are_one_question_with_a_schema():
  form = make(form="points_together")
  question, = form.questions(KITES)
  assert "1. Is it red?\n2. How many? (Answer with a number.)\n3. Which" in question.text
  assert 'JSON only: {"answers":' in question.text and "exactly 3 entries" in question.text
  items = question.schema["properties"]["answers"]
  assert items["items"] == {"type": "string"} and items["minItems"] == items["maxItems"] == 3
  said = question.read(reply('{"answers": ["yes", "two", "green"]}'))
  assert form.score(KITES, [said])[0] == pytest.approx(2 / 3)
  question, = form.questions(sample("a?", "b?"))
  assert question.schema["properties"]["answers"]["items"]["enum"] == ["yes", "no"]
  assert question.read(reply('{"answers": [true, false]}')) == [1, 0]
  with pytest.raises(answers.Unreadable, match="is not"):
    question.read(reply('{"answers": ["yes"]}'))


def test_scales_and_metrics():
  text = "Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1"
  for metric, score in (("", 0.5), ("alignment", 1), ("style", 0)):
    form = make(form="unified_reward_2", metric=metric)
    question, = form.questions(sample(prompt="a {brace}"))
    assert question.text.endswith("Text Caption: [a {brace}]")
    assert form.score(KITES, [question.read(reply(text))])[0] == pytest.approx(score)
  assert "metric='taste' is none of" in refusal(make, form="unified_reward_2", metric="taste")


def test_a_custom_form(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text("{prompt}, tagged {tag}, after {reasoning}: rate from 0 to 10 as {{n}}.\n")
  form = make(form="custom", template=str(path), pattern=r"(\d+)", high=10)
  thought = rewards.Sample("a kite", IMAGE, "two kites", {"tag": "counting"})
  question, = form.questions(thought)
  assert question.text == "a kite, tagged counting, after two kites: rate from 0 to 10 as {n}."
  assert form.score(thought, [question.read(reply("I say 7."))])[0] == 0.7
  with pytest.raises(answers.Unreadable, match="no score from 0 to 10"):
    question.read(reply("11"))
  assert "asks for {tag}, which the sample does not have" in refusal(
    form.questions, rewards.Sample("a kite", IMAGE, "two kites", {})
  )


@pytest.mark.parametrize(("options", "message"), [
  ({"form": "poinst"}, "form='poinst' is none of points,"),
  ({"form": "custom"}, "form=custom needs template=FILE"),
  ({"form": "wise_verified"}, "needs template=FILE, WISE's own text"),
  ({"template": "nowhere.txt"}, "template='nowhere.txt': No such file"),
  ({"template": "p_yes"}, "template p_yes must hold {question}"),
  ({"form": "custom", "template": "p_yes", "pattern": "("}, "pattern='('"),
  ({"form": "custom", "template": "p_yes", "pattern": "x"}, "must have one group"),
  ({"aggregate": "median"}, "aggregate='median' is none of"),
  ({"pattern": "(x)"}, "pattern='(x)' has no effect with form=points, only with custom;"),
  ({"renormalise": True}, "renormalise=True has no effect with form=points, only with points_soft"),
  ({"form": "p_yes", "aggregate": "all"}, "aggregate='all' has no effect with form=p_yes"),
])
def test_options_that_are_refused(options, message):
  assert message in refusal(make, **options)


@pytest.mark.parametrize("text", ["{", "{0}", "{prompt.x}", "{prompt!r}", "{a b}"])
def test_texts_that_are_no_template(text):
  assert "write {{ and }} for braces" in refusal(templates.Template, "t", text)
