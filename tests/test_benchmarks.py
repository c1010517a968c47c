"""GenEval's summary and layout, and intervals of prompts: numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax.benchmarks import geneval, intervals

NAN = math.nan


def test_a_prompt_is_one_value():
  # m_p = 1/2, 1, 0: mean 1/2, sd 1/2.
  values, prompts = [1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]
  made = intervals.clustered(values, prompts)
  assert made == pytest.approx((0.5, 0.5 / math.sqrt(3), 3))
  assert made.half == pytest.approx(1.96 * 0.5 / math.sqrt(3))
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
  assert "| 0.7500 ± 0.4900 |" in made.table()


def test_results_of_the_official_script_are_read(tmp_path):
  path = tmp_path / "results.jsonl"
  rows = [
    {"filename": f"{i:05d}/samples/00000.png", "tag": tag, "prompt": "p", "correct": correct,
     "reason": "", "metadata": json.dumps({"tag": tag, "prompt": f"p{i // 2}"})}
    for i, (tag, correct) in enumerate(
      [("colors", True), ("colors", False), ("position", True), ("position", True)])
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  made = geneval.read_results(path)
  assert (made.overall.mean, made.images, made.prompts) == (0.75, 0.75, 1.0)
  path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "p", "tag": "x"}) + "\n")
  assert "results.jsonl, line 2: needs a text tag" in refusal(geneval.read_results, path)
  path.write_text("")
  assert "holds no judged image" in refusal(geneval.read_results, path)


def test_images_lie_where_the_official_script_looks(tmp_path):
  metadata = {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}
  geneval.write_prompt(tmp_path, 7, metadata)
  geneval.write_image(tmp_path, 7, 3, np.zeros((8, 8, 3), np.uint8))
  assert json.loads((tmp_path / "00007" / "metadata.jsonl").read_text()) == metadata
  assert (tmp_path / "00007" / "samples" / "00003.png").is_file()
  assert "has no 'include'" in refusal(geneval.write_prompt, tmp_path, 8, {"tag": "colors"})
