"""Evaluations: rows that no batch changes, other weights for one run, means and intervals."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import evaluation, intervals
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.episodes import pipeline
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.runtime import sharding
from unigrpo_jax.sampling import flow

SETTINGS = requests_lib.Settings(
  num_timesteps=3, max_tokens=5, temperature=1.0,
  guidance=flow.Guidance(text_scale=3.0, interval=(0.0, 1.0)),
)
PROMPTS = ["a", "two birds", "a kite", "what a very long prompt this one is, at the end", "x y"]
EXAMPLES = [
  types.SimpleNamespace(
    prompt=prompt, metadata={"tag": "long"} if len(prompt) > 20 else {}, reasoning=prompt[::-1] * 2
  )
  for prompt in PROMPTS
]
MODES = [evaluation.Mode.parse(name) for name in ("plain+guidance", "think", "given")]


def _score(samples):
  """Brightness of the picture, and the length of the text where there is one, with its letters."""
  words = np.array([math.nan if s.text is None else len(s.text) for s in samples])
  letters = [s.text and {"letters": np.array([*map(ord, s.text)])} for s in samples]
  return {
    "bright": np.array([sample.image.mean() / 255 for sample in samples]),
    "words": rewards.Scores(words, "no text", details=letters),
  }


@pytest.fixture(scope="module")
def pipe(golden):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return pipeline.Pipeline.open(golden, dtype=jnp.float32, mesh=mesh).load()


def _evaluation(pipe, score=_score, modes=MODES, **options):
  defaults = dict(settings=SETTINGS, batch_size=2, seed=7, num_saved_images=2, size=(32, 32))
  return evaluation.Evaluation(pipe, EXAMPLES, score, modes=modes, **(defaults | options))


@pytest.fixture(scope="module")
def results(pipe):
  return _evaluation(pipe).run()


def test_every_row_is_its_prompt_run_alone(pipe, results):
  """Batches of two, the last of them filled up; row i has seed 7 + i, in every mode."""
  assert [row.prompt for row in results.rows] == PROMPTS * 3
  assert results.modes == ["plain + guidance", "think", "given"]
  for mode, think, scale in (("plain + guidance", False, 3.0), ("think", True, 1.0)):
    rows = [row for row in results.rows if row.mode == mode]
    for i in (0, 3):
      settings = requests_lib.Settings(
        think=think, num_timesteps=3, max_tokens=5, temperature=1.0,
        guidance=flow.Guidance(text_scale=scale, interval=(0.0, 1.0)),
      )
      request = requests_lib.Request(PROMPTS[i], seed=7 + i, size=(32, 32))
      [alone] = pipe.run(pipe.prepare([request], settings))
      assert rows[i].text == alone.text
      assert rows[i].rewards["bright"] == pytest.approx(alone.image.mean() / 255, abs=1e-3)
      if i < 2:
        assert np.abs(results.images[rows[i].image].astype(int) - alone.image).max() <= 1
  assert [row.text for row in results.rows[10:]] == [e.reasoning for e in EXAMPLES]


def test_rewards_that_do_not_apply_and_pictures_that_are_not_saved_are_absent(results):
  assert all(set(row.rewards) == {"bright"} for row in results.rows[:5])
  assert all(set(row.rewards) == {"bright", "words"} for row in results.rows[5:])
  assert [row.image is not None for row in results.rows] == [True, True, False, False, False] * 3
  assert {row.image for row in results.rows} - {None} == set(results.images)
  assert [row.category for row in results.rows[:5]] == ["all", "all", "all", "long", "all"]


def test_other_parameters_serve_one_run_and_compile_nothing(pipe, results, compilations):
  runs = _evaluation(pipe)
  params = pipe.params
  other = jax.tree.map(lambda a: 1.5 * a, params["bagel"])
  runs.run()
  compilations.clear()
  changed = runs.run(other)
  again = runs.run()
  assert compilations == [] and pipe.params is params
  for parts in runs._batches.values():
    shapes = [str(jax.tree.map(np.shape, part.texts)) for part in parts]
    assert len(parts) == 3 and len(set(shapes)) == 1
  assert [row.rewards for row in again.rows] == [row.rewards for row in results.rows]
  differ = [(changed.images[name] != image).mean() for name, image in results.images.items()]
  assert min(differ) > 0.1

  def failing(samples):
    raise KeyError("score")

  with pytest.raises(KeyError):
    _evaluation(pipe, failing).run(other)
  assert pipe.params is params


def test_images_of_a_prompt_have_seeds_of_their_own_and_make_one_value(pipe):
  """The first image of each prompt is what an evaluation of one image each draws."""
  seen = []
  several = _evaluation(pipe, modes=MODES[:1], images=2, batch_size=5).run(
    observe=lambda rows, samples: seen.extend(zip(rows, samples))
  )
  assert [(row.number, row.k) for row in several.rows] == [(p, k) for p in range(5) for k in (0, 1)]
  assert [row for row, _ in seen] == several.rows
  request = requests_lib.Request(PROMPTS[3], seed=evaluation.image_seed(7, 3, 1), size=(32, 32))
  settings = dataclasses.replace(SETTINGS, think=False)
  [alone] = pipe.run(pipe.prepare([request], settings))
  assert np.abs(seen[7][1].image.astype(int) - alone.image).max() <= 1
  assert np.abs(seen[6][1].image.astype(int) - alone.image).max() > 1
  assert sorted(several.images) == [
    f"images/plain_guidance_{prompt:05d}{k}.png" for prompt in (0, 1) for k in ("", "_1")
  ]
  values = [row.rewards["bright"] for row in several.rows]
  m = np.reshape(values, (5, 2)).mean(axis=1)
  assert several.interval("plain + guidance", "bright") == pytest.approx(intervals.interval(m))


def test_progress_counts_the_rows_of_all_modes(pipe):
  seen = []
  _evaluation(pipe, modes=MODES[:1]).run(progress=lambda *arguments: seen.append(arguments))
  assert seen == [("plain + guidance", done, 5) for done in (2, 4, 5)]


def test_a_saved_evaluation_can_be_read_back(results, tmp_path):
  results.save(tmp_path / "eval", "A title")
  folder = tmp_path / "eval"
  record = json.loads((folder / "results.json").read_text())
  assert record["title"] == "A title" and record["modes"] == results.modes
  assert [results_lib.Row(**row) for row in record["rows"]] == results.rows
  assert record["rows"][0]["details"] == {"words": {"reason": "no text"}}
  row = record["rows"][5]
  assert row["details"] == {"words": {"letters": [*map(ord, row["text"])]}} and row["text"]
  for name, image in results.images.items():
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(folder / name)), image)
  text = (folder / "results.md").read_text()
  assert text.startswith("# A title\n") and results.table("bright") in text
  sheet = np.asarray(PIL.Image.open(folder / "contact.png"))
  # The pictures are on it, enlarged without smoothing: every colour of one is a colour of it.
  colors = {tuple(c) for c in sheet.reshape(-1, 3)}
  for image in results.images.values():
    assert {tuple(c) for c in image.reshape(-1, 3)} <= colors
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.InputError, match="file.*: cannot be written"):
    results.save(tmp_path / "file", "A title")


def test_means_intervals_and_the_table_by_hand():
  row = lambda mode, category, value: results_lib.Row(mode, category, "p", None, value, None)
  results = results_lib.Results(
    [
      row("plain", "a", {"r": 1.0}), row("plain", "a", {"r": 0.0}), row("plain", "b", {"r": 1.0}),
      row("plain", "b", {}), row("think", "a", {"r": 0.25}), row("think", "a", {"r": 0.75}),
    ],
    {},
  )
  # 0/1 scores, two of three: quantiles of Beta(5/2, 3/2).
  np.testing.assert_allclose(
    results.interval("plain", "r"), (2 / 3, 0.176736, 0.961252), atol=2e-6)
  # Two scores, and half a one more at each: Beta(3/2, 3/2) on [0.25, 0.75].
  np.testing.assert_allclose(
    results.interval(evaluation.Mode(think=True), "r"), (0.5, 0.280415, 0.719585), atol=2e-6)
  assert math.isnan(results.mean("given", "r")) and results.mean("think", "r") == 0.5
  assert results.table("r").splitlines() == [
    "| r | a | b | all | 95 % | prompts |",
    "| --- | --- | --- | --- | --- | --- |",
    "| plain | 0.50 | 1.00 | 0.667 | 0.177 to 0.961 | 3 |",
    "| think | 0.50 |  | 0.500 | 0.280 to 0.720 | 2 |",
  ]


def test_the_table_has_no_negative_zero_and_no_interval_of_one_row():
  row = lambda mode, value: results_lib.Row(mode, "a", "p", None, {"r": value}, None)
  rows = [row("plain", 1e-5), row("plain", -3e-5), row("think", -1e-5)]
  assert results_lib.Results(rows, {}).table("r").splitlines()[2:] == [
    "| plain | 0.000 | 0.000 to 0.000 | 2 |",
    "| think | 0.000 |  | 1 |",
  ]


@pytest.mark.parametrize("name", ["plain", "think", "given", "plain+guidance", "think + guidance"])
def test_modes_are_parsed_from_their_names(name):
  mode = evaluation.Mode.parse(name)
  assert mode.name.replace(" ", "") == name.replace(" ", "")
  assert evaluation.Mode.parse(mode.name) == mode and mode.think == (not name.startswith("plain"))


@pytest.mark.parametrize("name", ["", "draw", "think+", "think+guided", "guidance"])
def test_other_modes_are_refused(name):
  with pytest.raises(errors.InputError, match="is none of plain, think, given"):
    evaluation.Mode.parse(name)


def test_impossible_evaluations_are_refused(pipe):
  bare = [types.SimpleNamespace(prompt="a", metadata={})]
  make = lambda examples, modes, **options: evaluation.Evaluation(
    pipe, examples, _score, settings=SETTINGS, modes=modes, seed=0,
    **(dict(batch_size=1) | options))
  with pytest.raises(errors.InputError, match="mode given: prompt 1 .'a'. has no reasoning"):
    make(bare, MODES)
  with pytest.raises(errors.InputError, match="at least one prompt"):
    make([], MODES)
  with pytest.raises(errors.InputError, match="may be given only once"):
    make(bare, MODES[:1] * 2)
  unguided = dataclasses.replace(SETTINGS, guidance=flow.Guidance(text_scale=1.0))
  with pytest.raises(errors.InputError, match="plain . guidance: cfg_text_scale=1 is no guidance"):
    _evaluation(pipe, settings=unguided)
  with pytest.raises(errors.InputError, match="batch_size=0"):
    make(bare, MODES[:1], batch_size=0)
  with pytest.raises(errors.InputError, match="height=40"):
    make(bare, MODES[:1], size=(40, 32))


def test_infinite_rewards_are_refused(pipe):
  infinite = lambda samples: {"r": np.full(len(samples), np.inf)}
  with pytest.raises(errors.InputError, match="reward r of 'a' is inf"):
    _evaluation(pipe, infinite, MODES[:1]).run()


@pytest.mark.parametrize("asked, count, rows", [(100, 600, 100), (3, 5, 4), (100, 5, 6), (1, 1, 2)])
def test_batches_are_no_larger_than_needed_and_share_the_devices_evenly(asked, count, rows):
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  of_mesh = types.SimpleNamespace(mesh=mesh)
  assert pipeline.Pipeline.batch_rows(of_mesh, asked, count) == rows


def test_parts_of_a_batch_are_its_rows(pipe):
  images = [PIL.Image.new("RGB", (32 + 16 * i, 48), (60 * i,) * 3) for i in range(3)]
  requests = [requests_lib.Request("ab" * i + "c", seed=i, image=im) for i, im in enumerate(images)]
  whole = pipe.prepare(requests, SETTINGS, 4)
  first, second = requests_lib.split(whole, 2)
  assert (first.real, second.real, first.capacity) == (2, 1, whole.capacity)
  assert second.seeds == (2, 0) and second.sizes == whole.sizes[2:]
  assert second.images == whole.images[2:]
  arrays = lambda batch: jax.tree.leaves((batch.texts, batch.patches, batch.grid))
  for whole_leaf, leaf in zip(arrays(whole), arrays(second), strict=True):
    np.testing.assert_array_equal(leaf, whole_leaf[2:])
  with pytest.raises(errors.InputError, match="4 rows cannot be split into parts of 3"):
    requests_lib.split(whole, 3)
