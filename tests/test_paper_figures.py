"""The paper's figures from small recorded runs: each is drawn, and says what was recorded."""

import json

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax.benchmarks import statistics
from unigrpo_jax.tools.compare import figures, measure


def _run(gain, steps=12, cost=1000, mode="think", seed=0):
  rng = np.random.default_rng(seed)
  line = lambda start, every, noise: [
    [step, float(start + gain * step / steps + noise * rng.normal())]
    for step in range(0, steps + 1, every)
  ]
  return {
    "training": {"mean": line(0.5, 1, 0.04)[1:], figures.STRICT: line(0.4, 1, 0.04)[1:]},
    "validation": {
      mode: {"reward": line(0.5, 3, 0.01), figures.STRICT: line(0.42, 3, 0.01)},
      f"{mode}+guidance": {"reward": line(0.6, 3, 0.01)},
    },
    "flow_mse": [], "velocity_evaluations": cost,
  }


CURVES = {
  "UniGRPO": {str(seed): _run(0.2, seed=seed) for seed in range(3)},
  figures.GUIDED: {"0": _run(0.15, cost=2000, seed=5)},
  "UniGRPO, latent KL": {"0": _run(0.25, seed=7)},
  "UniGRPO without regulariser": {"0": _run(0.3, seed=8)},
}
STATISTICS = {
  method: {seed: {str(step): {"saturation": 0.3 + 0.02 * step, "entropy": 2.0, "diversity": None}
                  for step in range(0, 13, 3)} for seed in of}
  for method, of in CURVES.items() if method != figures.GUIDED
}


@pytest.fixture
def written(tmp_path):
  def write(chart):
    assert figures.write(chart, tmp_path / "figures" / "a.png")
    with PIL.Image.open(tmp_path / "figures" / "a.png") as image:
      return np.asarray(image.convert("L"))
  return write


def test_figure_3_has_each_seed_a_mean_and_a_band(written):
  chart = figures.learning(CURVES)
  training, validation = chart.axes
  # Two rewards: a mean and three seeds each, with a band.
  assert [len(panel.lines) for panel in chart.axes] == [8, 8]
  assert [len(panel.collections) for panel in chart.axes] == [2, 2]
  mean = validation.lines[0].get_ydata()
  seeds = [dict(map(tuple, run["validation"]["think"]["reward"]))[12]
           for run in CURVES["UniGRPO"].values()]
  assert mean[-1] == pytest.approx(np.mean(seeds))
  assert {text.get_text() for text in training.get_legend().texts} == {
    "reward", "verifier, strict"}
  assert written(chart).std() > 5


def test_a_moving_average_of_the_training_curve():
  _, mean, _ = figures._mean([[[1, 1.0], [2, 0.0]]], smooth=True)
  assert mean == pytest.approx([1.0, 0.9 / 1.9])


def test_figure_4_compares_by_iteration_and_by_cost(written):
  chart = figures.guidance(CURVES)
  _, by_iteration, by_cost = chart.axes
  last = lambda panel: [line.get_xdata()[-1] for line in panel.lines if line.get_linewidth() == 2]
  assert last(by_iteration) == [12, 12] and last(by_cost) == pytest.approx([0.012, 0.024])
  assert written(chart).std() > 5


def test_figure_5_has_a_dot_an_evaluation(written):
  chart = figures.regularisers(CURVES, STATISTICS)
  strict, saturation, entropy, empty = chart.axes[:4]
  assert [len(part.get_offsets()) for part in strict.collections] == [5] * 5
  # Over the start's: 0.3 + 0.24 over 0.3 after the last iteration.
  assert saturation.collections[0].get_offsets()[-1][1] == pytest.approx(1.8)
  assert {line.get_ydata()[0] for line in entropy.lines} == set(figures.BOUNDS)
  assert not empty.collections and not empty.axison  # diversity was not measured
  assert written(chart).std() > 5


def test_hacking_is_shown_by_iteration_and_by_distance(written):
  run = _run(0.2) | {"flow_mse": [[step, 0.01 * step] for step in range(1, 13)]}
  chart = figures.hacking({"ReFL": {"0": run, "1": _run(0.1, seed=3)}}, "ReFL")
  by_iteration, by_distance = chart.axes
  assert list(by_iteration.lines[0].get_xdata()) == [0, 3, 6, 9, 12]
  # The evaluation before training is at no distance, and a run may not have measured it.
  x, y = by_distance.lines[0].get_data()
  assert list(x) == pytest.approx([0.03**0.5, 0.06**0.5, 0.09**0.5, 0.12**0.5])
  assert list(y) == [value for _, value in run["validation"]["think"]["reward"][1:]]
  assert np.isnan(by_distance.lines[1].get_xdata()).all() and by_distance.get_xscale() == "log"
  assert written(chart).std() > 5
  assert figures.hacking({}, "ReFL") is None


def test_the_verifier_at_the_reward_that_all_reach():
  points = lambda values: list(map(list, enumerate(values)))
  line = lambda rewards, strict: {"0": {"training": {}, "validation": {"think": {
    "reward": points(rewards), figures.STRICT: points(strict),
  }}}}
  curves = {
    "UniGRPO": line([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]),
    "UniGRPO without regulariser": line([0.5, 0.7, 0.9], [0.4, 0.3, 0.2]),
  }
  assert figures.at_equal_reward(curves) == pytest.approx({"velocity MSE": 0.6, "none": 0.3})


def test_a_sheet_has_a_row_a_prompt_and_a_column_a_method(tmp_path, written):
  picture = tmp_path / "p.png"
  PIL.Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(picture)
  columns = {
    "SFT, thinking": {
      "two kites": (picture, "two kites. so: kite red top left, kite blue bottom right"),
      "a $ sign": (picture, "a $ sign costs $"),
    },
    "UniGRPO": {"two kites": (picture, "")}, "nothing of it": {},
  }
  chart = figures.sheet(columns, ["two kites", "a $ sign"])
  first = chart.axes[0].texts[0].get_text()  # The reasoning.
  assert first == "two kites. so: kite red top left,\nkite blue bottom right"
  assert len(chart.axes) == 4 and [len(panel.images) for panel in chart.axes] == [1, 1, 1, 0]
  assert written(chart).std() > 5


class _Features:
  """Latents and features are the pictures' own pixels."""

  def latents(self, images):
    return images.reshape(len(images), -1) / 255

  def vit(self, images):
    return images.mean(axis=(1, 2))


def test_statistics_of_an_evaluation_are_those_of_its_pictures(tmp_path):
  (tmp_path / "images").mkdir()
  rows = []
  for number in range(2):
    for k in range(2):
      name = f"images/{number}_{k}.png"
      picture = np.full((32, 32, 3), 100, np.uint8)
      picture[..., 0] += 10 * k + number
      PIL.Image.fromarray(picture).save(tmp_path / name)
      rows += [dict(mode=mode, category="all", prompt="p", text=None, rewards={}, image=name,
                    number=number, k=k) for mode in ("think", "plain")]
  (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
  rendered = np.array([[100.0, 100, 100], [120, 100, 100], [110, 100, 100]])
  made = measure.of_evaluation(tmp_path, "think", _Features(), rendered)
  assert set(made) == {*statistics.NAMES, "diversity", "frechet"}
  assert made["saturation"] == pytest.approx(np.mean([0, 10 / 110, 1 / 101, 11 / 111]))
  # The two pictures of each prompt differ by 10 / 255 in 1024 numbers.
  assert made["diversity"] == pytest.approx(32 * 10 / 255)
  # Red alone varies: means 105.5 and 110, deviations of 0, 10, 1, 11 and of -10, 10, 0.
  deviation = np.std([0, 10, 1, 11], ddof=1) - 10
  assert made["frechet"] == pytest.approx(4.5**2 + deviation**2)
  assert measure.of_evaluation(tmp_path, "given", _Features(), rendered) == {}


def test_what_is_not_recorded_is_not_drawn(tmp_path):
  assert figures.learning({}) is None and figures.guidance({"UniGRPO": CURVES["UniGRPO"]}) is None
  assert figures.regularisers({"UniGRPO": CURVES["UniGRPO"]}, {}) is None
  assert figures.sheet({}, ["a"]) is None and figures.at_equal_reward({}) == {}
  assert not figures.write(None, tmp_path / "a.png") and not (tmp_path / "a.png").exists()
