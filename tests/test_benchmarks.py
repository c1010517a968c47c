"""GenEval's summary and layout, and intervals of prompts: numbers worked out by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax import rewards
from unigrpo_jax.benchmarks import (
  contact_sheet,
  geneval,
  intervals,
  measured,
  official,
  results,
  statistics,
  ta,
)
from unigrpo_jax.iconworld import prompts, renderer, scenes

NAN = math.nan


def test_a_prompt_is_one_value():
  # m_p = 1/2, 1, 0: mean 1/2, sd 1/2.
  values, prompts = [1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]
  made = intervals.clustered(values, prompts)
  assert made == pytest.approx((0.5, 0.5 / math.sqrt(3), 3))
  twice = intervals.clustered(values * 2, prompts * 2)
  assert twice == pytest.approx(made)
  # An image without a score is left out, and so is a prompt of such.
  assert intervals.clustered([*values, NAN, NAN], [*prompts, "a", "d"]) == pytest.approx(made)
  assert math.isnan(intervals.clustered([1.0, 0.0], ["a", "a"]).se)
  assert math.isnan(intervals.clustered([], []).mean)


def test_the_mean_of_categories_and_its_standard_error():
  parts = [intervals.Estimate(1.0, 0.03, 10), intervals.Estimate(0.5, 0.04, 10)]
  assert intervals.mean_of(parts) == pytest.approx((0.75, 0.025, 20))


def test_a_difference_is_by_prompt():
  a, b = {"x": 1.0, "y": 0.5, "only a": 9.0}, {"y": 0.25, "x": 0.75}
  # Both are better by a quarter: no doubt is left, however different the prompts are.
  assert intervals.paired(a, b) == (0.25, 0.0, 2)


def test_a_bootstrap_resamples_prompts():
  rows = np.random.default_rng(1).normal(size=(200, 1))
  value, low, high = intervals.bootstrap(lambda rows: float(rows.mean()), rows, draws=2000)
  half = 1.96 * rows.std(ddof=1) / math.sqrt(200)
  assert value == rows.mean() and (high - low) / 2 == pytest.approx(half, rel=0.1)
  again = intervals.bootstrap(lambda rows: float(rows.mean()), rows, draws=2000)
  assert again == (value, low, high)
  assert math.isnan(intervals.bootstrap(lambda rows: 0.0, np.zeros((0, 1)))[0])


def test_three_seeds_have_the_t_interval():
  # sd of 1, 2, 3 is 1; t of 2 degrees of freedom is 4.3027.
  assert intervals.across_seeds([1, 2, 3]) == pytest.approx((2, 4.302653 / math.sqrt(3)))
  assert math.isnan(intervals.across_seeds([0.5])[1])


def test_the_overall_score_is_the_mean_of_the_categories():
  """Two prompts of four images in one category, one prompt of one image in the other."""
  correct = [1, 1, 0, 0, 1, 1, 1, 1, 0]
  tags, prompts = ["counting"] * 8 + ["position"], [0] * 4 + [1] * 4 + [2]
  made = geneval.summary(correct, tags, prompts)
  assert [part.mean for part in made.tasks.values()] == [0.75, 0.0]
  assert (made.overall.mean, made.images, made.prompts) == (0.375, 6 / 9, 2 / 3)
  assert "| counting | 0.7500 | " in made.table()
  assert made.lines["counting"].any_right == 2 and made.lines["counting"].all_right == 1


def test_results_of_the_official_script_are_read(tmp_path):
  path = tmp_path / "results.jsonl"
  rows = [
    {"filename": f"{i:05d}/samples/00000.png", "tag": tag, "prompt": "p", "correct": correct,
     "reason": "", "metadata": json.dumps({"tag": tag, "prompt": f"p{i // 2}"})}
    for i, (tag, correct) in enumerate(
      [("colors", True), ("colors", False), ("position", True), ("position", True)])
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = results.Results(official.read_results(path), {})
  assert [(row.number, row.k) for row in found.rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  made = measured.by_mode(found)["official"]["geneval"]
  assert (made.overall.mean, made.images, made.prompts) == (0.75, 0.75, 1.0)
  path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "p", "tag": "x"}) + "\n")
  assert "results.jsonl, line 2: needs a text tag" in refusal(official.read_results, path)
  path.write_text("")
  assert "holds no judged image" in refusal(official.read_results, path)


def test_images_lie_where_the_official_script_looks(tmp_path):
  metadata = {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}
  official.begin(tmp_path, [metadata] * 8, 4)
  official.write_image(tmp_path, 7, 3, np.zeros((8, 8, 3), np.uint8))
  assert json.loads((tmp_path / "00007" / "metadata.jsonl").read_text()) == metadata
  assert (tmp_path / "00007" / "samples" / "0003.png").is_file()
  assert "has no 'include'" in refusal(official.begin, tmp_path, [{"tag": "colors"}], 1)
  official.begin(tmp_path, [metadata] * 8, 4)  # Again, as after a kill.
  other = "is of other prompts or pictures; give another folder"
  for metadatas, samples in (
    ([metadata] * 8, 3), ([metadata] * 7, 4), ([{**metadata, "n": 1}] * 8, 4),
  ):
    assert other in refusal(official.begin, tmp_path, metadatas, samples)


def test_intervals_stay_in_their_range():
  """Of 0 of 10 prompts, and of tags whose symmetric interval would begin below 0."""
  made = geneval.summary([0] * 40, ["colors"] * 40, [i // 4 for i in range(40)])
  line = made.lines[geneval.OVERALL]
  assert line.low == 0 and 0 < line.high < 0.25 and line.prompts == 10  # Not 40.
  rare = geneval.summary([1] + [0] * 39, ["colors"] * 20 + ["position"] * 20, range(40))
  assert all(0 <= line.low <= line.mean <= line.high <= 1 for line in rare.lines.values())
  assert 1.96 * intervals.mean_of(list(rare.tasks.values())).se > rare.overall.mean
  # Independent parts: half widths of .1 and .2 give sqrt(.05) / 2.
  low, high = intervals.of_mean([(0.5, 0.4, 0.6), (0.5, 0.3, 0.7)])
  assert (low, high) == pytest.approx((0.5 - 0.05**0.5 / 2, 0.5 + 0.05**0.5 / 2))
  assert math.isnan(intervals.of_mean([(0.5, NAN, NAN)])[0])
  assert math.isnan(intervals.of_mean([])[0])


def test_failures_are_counted_and_left_out():
  tags = ["colors", "colors", "position", "position"]
  made = geneval.summary([1, NAN, NAN, 0], tags, [0, 0, 1, 2])
  assert [made.lines[tag].failures for tag in ("colors", "position", geneval.MEAN)] == [1, 1, 2]
  assert made.lines["position"].prompts == 1 and made.overall.mean == 0.5
  assert "| overall (mean of tags) | 0.5000 |" in made.table()
  empty = geneval.summary([NAN], ["colors"], [0])
  assert empty.lines["colors"].failures == 1 and math.isnan(empty.overall.mean)
  soft = geneval.summary([0.5, 1.0], ["colors"] * 2, [0, 0])
  assert soft.lines["colors"].any_right is None and math.isnan(soft.prompts)
  assert "% correct" not in soft.table() and "% correct images: 50.00%" in made.table()


def test_the_best_of_n_is_over_all_choices():
  # Of 0, 0, 1, 1: a pair without a 1 is one of six.
  assert [geneval.best_of([1, 0, 1, 0], n) for n in (1, 2, 4)] == [0.5, 5 / 6, 1]
  assert geneval.best_of([0.2, 0.6, 0.4], 2) == pytest.approx((0.4 + 0.6 + 0.6) / 3)
  # Four images of one prompt, one of another tag's: the best of two is unknown.
  made = geneval.summary([1, 1, 0, 0, 0], ["counting"] * 4 + ["position"], [0] * 4 + [1])
  assert made.best_of[1] == 0.25 and math.isnan(made.best_of[2])
  tags = ["counting"] * 4 + ["position"] * 2
  made = geneval.summary([1, 1, 0, 0, 0, 0], tags, [0] * 4 + [1] * 2)
  assert made.best_of[2] == pytest.approx(5 / 12)
  assert geneval.best_of_table("r", {"plain": geneval.summary([1], ["a"], [0])}) == ""


def _judged(metadata, scene, ask=None):
  """The exam of one render, or of a blank image where the scene is None."""
  image = np.full((32, 32, 3), 240, np.uint8)
  if scene is not None:
    image = renderer.render(scene, np.random.default_rng(0))
  exam = ta.Exam(ask)
  exam([results.Row("plain", "all", "p", None, {}, None, 0, 0)],
       [rewards.Sample("p", image, None, metadata)])
  [answers] = exam.answers
  return dict(zip(answers.points, answers.verifier or answers.judge))


def test_points_of_a_perfect_drawer_and_of_a_blank_image():
  for example in prompts.fixed("test", 24):
    assert set(_judged(example.metadata, example.scene).values()) == {1.0}, example.prompt
    assert set(_judged(example.metadata, None).values()) == {0.0}, example.prompt


def test_each_point_sees_its_own_mistake():
  thing = scenes.Thing
  metadata = {"tag": "position", "include": [
    {"class": "bird", "count": 1},
    {"class": "kite", "count": 2, "color": "red", "position": ["right of", 0]},
  ]}
  bird, kite = thing("bird", "blue", "top left"), thing("kite", "red", "top right")
  count = "there are two kites"
  right = scenes.Scene((bird, kite, thing("kite", "red", "bottom right")), "white")
  assert list(_judged(metadata, right)) == [
    "there is one bird", count, "the kites are red", "the kites are right of the bird",
    "nothing else is there",
  ]
  assert set(_judged(metadata, right).values()) == {1.0}
  wrong = {
    "fewer": (scenes.Scene((bird, kite), "white"),
              {count, "the kites are red", "the kites are right of the bird"}),
    "other colour": (scenes.Scene((bird, kite, thing("kite", "blue", "bottom right")), "white"),
                     {"the kites are red"}),
    "other place": (scenes.Scene((thing("bird", "blue", "bottom right"), kite,
                                  thing("kite", "red", "top left")), "white"),
                    {"the kites are right of the bird"}),
    "another thing": (scenes.Scene((*right.things, thing("apple", "red", "bottom left")), "white"),
                      {"nothing else is there"}),
    "one more": (scenes.Scene((*right.things, thing("kite", "red", "bottom left")), "white"),
                 {count, "nothing else is there"}),
  }
  for name, (scene, unmet) in wrong.items():
    answers = _judged(metadata, scene)
    if name == "one more":
      del answers["the kites are right of the bird"]  # of the two that are surest
    assert {point for point, answer in answers.items() if not answer} == unmet, name


def test_ta_is_a_mean_of_means_and_a_failed_point_drops_its_image():
  # Images: 1/2, 1, dropped, 0: not the 3 of 5 points that are met.
  made = ta.summary([[1, 0], [1], [1, NAN], [0]], ["a", "a", "b", "b"])
  assert (made.ta.mean, made.images, made.dropped) == (0.5, 3, 1)
  # m_p = 3/4 and 0.
  assert made.ta.se == pytest.approx(0.75 / math.sqrt(2) / math.sqrt(2))
  assert math.isnan(ta.summary([[NAN]], ["a"]).ta.mean)


def test_a_prompt_that_is_repeated_is_one_prompt():
  """Two prompts, ten times each in the set, are two values of the standard error."""
  exam = ta.Exam(lambda images, statements: np.float64([s == "a cat" for s in statements]))
  for number in range(20):
    metadata = {"points": ["a cat" if number % 2 else "a dog"]}
    row = results.Row(
      "plain", "all", f"p{number % 2}", None, {}, None, number, metadata=metadata
    )
    exam([row], [rewards.Sample(row.prompt, np.zeros((4, 4, 3), np.uint8), None, metadata)])
  made = exam.summaries("plain")["judge"].ta
  assert (made.mean, made.se, made.prompts) == (0.5, 0.5, 2)


def test_a_sheet_shows_a_prompt_with_its_own_pictures():
  """Also where one mode kept no picture of a prompt, and where prompts have no numbers."""
  row = lambda mode, number, image: results.Row(mode, "all", "p", None, {}, image, number)
  rows = [row("a", 0, "a0"), row("a", 1, "a1"), row("b", 1, "b1"), row("b", 2, "b2")]
  images = {each.image: np.zeros((4, 4, 3), np.uint8) for each in rows}
  found = contact_sheet.by_prompt(rows, images)
  assert [[each.image for each in of] for of in found] == [["a0"], ["a1", "b1"], ["b2"]]
  alone = [dataclasses.replace(each, number=None) for each in rows]
  found = contact_sheet.by_prompt(alone, images)
  assert [[each.image for each in of] for of in found] == [["a0", "b1"], ["a1", "b2"]]
  assert contact_sheet.draw("t", rows, images).size[0] > 0


def test_agreement_of_two_judges():
  # 40 yes-yes, 10 yes-no, 5 no-yes, 45 no-no: accuracy .85, chance .5 * .45 + .5 * .55.
  first = [[1.0] * 50 + [0.0] * 50]
  second = [[1.0] * 40 + [0.0] * 10 + [1.0] * 5 + [0.0] * 45]
  made = ta.agreement(first * 3, second * 3, ["a", "b", "c"])
  assert made.accuracy[0] == pytest.approx(0.85) and made.answers == 300
  assert made.kappa == pytest.approx((0.7, 0.7, 0.7))
  assert ta.agreement([[1.0, NAN]], [[1.0, 0.0]], ["a"]).answers == 1


def test_a_judge_is_asked_one_point_a_time():
  asked = []

  def ask(images, statements):
    asked.extend(statements)
    return np.array([0.9, NAN, 0.1])

  answers = _judged({"points": ["a cat", "it sits", "it is red"]}, None, ask)
  assert asked == ["a cat", "it sits", "it is red"]
  assert str(answers) == "{'a cat': 1.0, 'it sits': nan, 'it is red': 0.0}"


def test_a_judge_of_points_with_answers_and_needs():
  ask = lambda images, statements: np.array([0.1, 0.9, 0.2])
  given = [{"question": "a cat?"}, {"question": "it sits?", "needs": [1]},
           {"question": "a dog?", "answer": "no"}]
  answers = _judged({"points": given}, None, ask)
  assert answers == {"a cat?": 0.0, "it sits?": 0.0, "a dog?": 1.0}


def test_ta_of_a_reward_that_is_asked_about_points():
  row = lambda number, k, rewards, details: results.Row(
    "plain", "all", f"p{number}", None, rewards, None, number, k, details=details
  )
  credits = {"ta": {"credits": [1.0, 0.0]}}
  rows = [row(0, 0, {"ta": 0.5}, credits), row(0, 1, {"ta": 1.0}, credits),
          row(1, 0, {"ta": 0.0}, credits), row(1, 1, {}, {"ta": {"reason": "no answer"}})]
  made = measured.by_mode(results.Results(rows, {}))["plain"]["ta"]["ta"]
  assert (made.ta.mean, made.images, made.dropped) == (pytest.approx(0.5), 3, 1)


@pytest.mark.parametrize(("metadata", "message"), [
  ({"points": []}, "points=[] must be a list of at least one question"),
  ({"points": "a cat"}, "points='a cat' must be a list"),
  ({"points": ["a", 1]}, "points, point 2: 1 must be a question"),
  ({"points": [{"question": "how many?", "answer": "two"}]}, "use --rewards ta=judge"),
  ({}, "has no exam points"),
  ({"include": [{"class": "zebra", "count": 1}]}, "has no exam points"),
])
def test_prompts_without_points_are_refused(metadata, message):
  assert message in refusal(ta.points_of, "p", metadata)


def test_statistics_by_hand():
  plain = np.full((8, 8, 3), 200, np.uint8)
  assert statistics.of_image(plain) == dict.fromkeys(statistics.NAMES, 0.0)
  # Columns of red and blue in turns: two colours, full saturation, all power at the Nyquist
  # frequency, every pixel at both ends, and no background.
  stripes = np.zeros((8, 8, 3), np.uint8)
  stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
  made = statistics.of_image(stripes)
  assert made["saturation"] == made["clipped"] == made["entropy"] == 1.0
  assert made["high_frequency"] == pytest.approx(1.0)
  assert made["luminance_std"] == pytest.approx((0.2126 - 0.0722) / 2)
  # White background at 255 is not clipped; an icon's own pixels at 0 are.
  white = np.full((32, 32, 3), 255, np.uint8)
  white[12:16, 12:16] = 0
  assert statistics.of_image(white)["clipped"] == 16 / 1024
  assert statistics.of_image(white)["unknown"] == 1.0


def test_diversity_and_distance_of_distributions():
  latents = np.array([[0.0, 0], [3, 4], [1, 1], [1, 1], [9, 9]])
  assert statistics.diversity(latents, ["a", "a", "b", "b", "c"]) == 2.5
  assert math.isnan(statistics.diversity(latents[:1], ["a"]))
  rng = np.random.default_rng(0)
  a = rng.normal(size=(4000, 2))
  # A shift of 3 and twice the deviation in one of two dimensions: 9 + (2 - 1)^2.
  b = rng.normal(size=(4000, 2)) * [2, 1] + [0, 3]
  assert statistics.frechet(a, b) == pytest.approx(10, rel=0.05)
  assert statistics.frechet(a, a) == pytest.approx(0, abs=1e-9)
