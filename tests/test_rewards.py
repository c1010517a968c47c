"""Rewards by name, the ones that come with the package, and several of them under a scorer."""

from concurrent import futures
import logging
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors, rewards
from unigrpo_jax.iconworld import plans, prompts, renderer, verifier
from unigrpo_jax.rewards import base, making

ROOT = pathlib.Path(__file__).parents[1]
NAN = np.nan


def sample(value=0, prompt="a kite", text=None, metadata=None, shape=(4, 4, 3)):
  return rewards.Sample(prompt, np.full(shape, value, np.uint8), text, metadata or {})


def numbered(count):
  return [sample(i, f"prompt {i}") for i in range(count)]


def value(samples):
  """The number that `numbered` painted an image with."""
  return np.array([s.image[0, 0, 0] for s in samples], np.float32)


@pytest.fixture
def scorer():
  """Makes scorers that are closed at the end."""
  made = []

  def make(given, weights=None, **options):
    made.append(rewards.Scorer(given, weights or dict.fromkeys(given, 1.0), **options))
    return made[-1]

  yield make
  for one in made:
    one.close()


# The registry.


class Scaled:
  def __init__(self, *, scale):
    self.scale = scale

  def __call__(self, samples):
    return self.scale * value(samples)


def shifted(samples, *, by=0.0):
  return value(samples) + by


def together(samples, *, by):
  return value(samples) + by


together.concurrent = True


def test_a_reward_is_a_function_or_a_class_with_options():
  samples = numbered(3)
  np.testing.assert_array_equal(rewards.make(f"{__name__}:value")(samples), [0, 1, 2])
  np.testing.assert_array_equal(rewards.make(f"{__name__}:shifted", by=5)(samples), [5, 6, 7])
  np.testing.assert_array_equal(rewards.make(f"{__name__}:Scaled", scale=2)(samples), [0, 2, 4])


def test_options_leave_the_attributes_of_a_function():
  together = rewards.make(f"{__name__}:together", by=5)
  np.testing.assert_array_equal(together(numbered(2)), [5, 6])
  assert together.concurrent


def test_registered_names(monkeypatch):
  monkeypatch.setattr(making, "_registered", dict(making._registered))
  assert rewards.register("shifted")(shifted) is shifted
  rewards.register("shifted")(shifted)  # A notebook runs its cells again.
  assert "shifted" in rewards.names()
  np.testing.assert_array_equal(rewards.make("shifted", by=1)(numbered(2)), [1, 2])
  with pytest.raises(ValueError, match="taken by .*shifted"):
    rewards.register("shifted")(value)
  with pytest.raises(ValueError, match="colon"):
    rewards.register("a:b")(value)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("iconworld_strikt", {}, "did you mean 'iconworld_strict'?"),
    ("zzzz", {}, "http, iconworld_geneval, iconworld_points"),
    ("jpeg_size", {"qualty": 5}, "qualty"),
    ("http", {"url": "http://a"}, "reward"),
    (f"{__name__}:Scaled", {}, "scale"),
    (f"{__name__}:NAN", {}, "is a float"),
    (f"{__name__}:missing", {}, "missing"),
    ("no_such_module:f", {}, "no_such_module"),
  ],
)
def test_what_cannot_be_made(name, options, words):
  message = refusal(rewards.make, name, **options)
  assert words in message and name in message


def test_rewards_need_no_jax():
  code = "import sys, unigrpo_jax.rewards.serve; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The rewards of the package.


def test_brightness_by_hand():
  half = np.zeros((2, 2, 3), np.uint8)
  half[0] = 255
  samples = [sample(0), sample(255), rewards.Sample("", half)]
  np.testing.assert_allclose(rewards.make("brightness")(samples), [0, 1, 0.5], atol=1e-7)


def test_jpeg_size_grows_with_detail_and_quality():
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  samples = [sample(128, shape=(32, 32, 3)), rewards.Sample("", noise)]
  flat, detailed = rewards.make("jpeg_size")(samples)
  assert 0.3 < flat < 1 < detailed < 4  # Kilobytes: headers alone are about 0.6, raw is 3.07.
  assert rewards.make("jpeg_size", quality=10)(samples)[1] < detailed / 2


@pytest.fixture(scope="module")
def world():
  """Samples of IconWorld: good, of another prompt, blank; with right, wrong and no reasoning."""
  rng, examples, samples = np.random.default_rng(0), prompts.fixed("test", 12), []
  for i, example in enumerate(examples):
    shown = (example.scene, examples[i - 1].scene, None)[i % 3]
    image = np.full((32, 32, 3), 255, np.uint8) if shown is None else renderer.render(shown, rng)
    text = (example.reasoning, plans.corrupt(rng, example), "<think>well</think>", None)[i % 4]
    samples.append(rewards.Sample(example.prompt, image, text, example.metadata))
  return samples


def test_iconworld_equals_the_verifier(world):
  strict, soft = np.transpose([verifier.verify(s.image, s.metadata) for s in world])
  strict, soft = strict.astype(np.float32), soft.astype(np.float32)
  assert set(strict) == {0, 1} and ((0 < soft) & (soft < 1)).any()
  np.testing.assert_array_equal(rewards.make("iconworld_strict")(world), strict)
  np.testing.assert_array_equal(rewards.make("iconworld_soft")(world), soft)


def test_iconworld_reasoning(world):
  np.testing.assert_array_equal(
    rewards.make("iconworld_reasoning")(world), [1, 0, 0, NAN] * 3
  )


@pytest.mark.parametrize(
  "metadata",
  [
    {}, {"include": []}, {"include": 3}, {"include": ["kite"]},
    {"include": [{"class": "cup", "count": 1}]}, {"include": [{"class": "kite"}]},
    {"include": [{"class": "kite", "count": 0}]},
    {"include": [{"class": "kite", "count": 1, "color": "black"}]},
    {"include": [{"class": "kite", "count": 1, "position": ["behind", 0]}]},
    {"include": [{"class": "kite", "count": 1, "position": ["above", 0]}]},
    {"include": [{"class": "kite", "count": 1, "position": ["above", 1]}]},
    {"include": [{"class": "kite", "count": 1, "position": "above"}]},
    {"include": [{"class": "kite", "count": 1}], "exclude": [{"class": "cup", "count": 1}]},
  ],
)
def test_what_is_not_of_iconworld_has_no_score(world, metadata):
  samples = [rewards.Sample("", world[0].image, world[0].text, metadata), world[0]]
  for name in ("strict", "soft", "reasoning"):
    np.testing.assert_array_equal(rewards.make(f"iconworld_{name}")(samples), [NAN, 1])


# The scorer.


def test_scores_are_raw_and_in_order_whatever_the_threads(scorer):
  first_may_go = threading.Event()

  def slow_first(samples):
    if samples[0].image[0, 0, 0] == 0:
      assert first_may_go.wait(10)
    else:
      first_may_go.set()
    return value(samples)

  slow_first.concurrent = True
  one = scorer({"value": value, "slow": slow_first}, threads=3)
  samples = numbered(8)
  pending = [one.submit(samples[i : i + 2]) for i in range(0, 8, 2)]
  for i, future in enumerate(pending):
    by_name = future.result(10)
    assert list(by_name) == ["value", "slow"]
    for scores in by_name.values():
      assert scores.dtype == np.float32
      np.testing.assert_array_equal(scores, [2 * i, 2 * i + 1])


def test_submitting_does_not_wait(scorer):
  go = threading.Event()

  def waits(samples):
    assert go.wait(10)
    return value(samples)

  future = scorer({"waits": waits}).submit(numbered(1))
  assert not future.done()
  go.set()
  np.testing.assert_array_equal(future.result(10)["waits"], [0])


@pytest.mark.parametrize("concurrent", [False, True])
def test_one_call_of_a_reward_at_a_time_unless_it_allows_more(scorer, concurrent):
  class Counting:
    def __init__(self):
      self.concurrent, self.inside, self.most = concurrent, 0, 0
      self.both = threading.Barrier(2)

    def __call__(self, samples):
      self.inside += 1
      self.most = max(self.most, self.inside)
      if concurrent:
        self.both.wait(10)
      else:
        threading.Event().wait(0.05)
      self.inside -= 1
      return value(samples)

  reward = Counting()
  one = scorer({"counting": reward}, threads=2)
  for future in [one.submit(numbered(1)) for _ in range(2)]:
    future.result(10)
  assert reward.most == (2 if concurrent else 1)
  assert one.failures["counting"].count == 0


def test_no_samples(scorer):
  one = scorer({"value": value})
  assert one.score([])["value"].shape == (0,)
  one.check(one.total(one.score([])))


@pytest.mark.parametrize(
  ("reward", "words"),
  [
    (lambda samples: 1 / 0, "ZeroDivisionError"),
    (lambda samples: [1.0], "got [1] float64"),
    (lambda samples: [[1.0]] * len(samples), "got [3, 1]"),
    (lambda samples: ["good"] * len(samples), "a reward must return [3] numbers"),
    (lambda samples: [None] * len(samples), "object"),
    (lambda samples: 0.5, "got []"),
    (lambda samples: np.ones(3, complex), "complex"),
  ],
)
def test_a_failing_reward_is_nan_counted_and_seen_once(scorer, caplog, reward, words):
  one = scorer({"good": value, "bad": reward})
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      scores = one.score(numbered(3))
  np.testing.assert_array_equal(scores["good"], [0, 1, 2])
  np.testing.assert_array_equal(scores["bad"], [NAN] * 3)
  assert one.failures["bad"].count == 6 and words in one.failures["bad"].last
  assert one.failures["good"].count == 0
  (record,) = caplog.records
  assert words in record.getMessage() and record.exc_info


def test_infinite_and_missing_scores_are_nan_for_their_sample_only(scorer):
  given = {
    "infinite": lambda samples: [1.0, np.inf, 2.0],
    "too large": lambda samples: [1.0, 2.0, 1e300],
    "missing": lambda samples: np.array([NAN, 1, 2]),
    "bool": lambda samples: [True, False, True],
  }
  one = scorer(given)
  scores = one.score(numbered(3))
  np.testing.assert_array_equal(scores["infinite"], [1, NAN, 2])
  np.testing.assert_array_equal(scores["too large"], [1, 2, NAN])
  np.testing.assert_array_equal(scores["missing"], [NAN, 1, 2])
  np.testing.assert_array_equal(scores["bool"], [1, 0, 1])
  counts = {name: failures.count for name, failures in one.failures.items()}
  assert counts == {"infinite": 1, "too large": 1, "missing": 1, "bool": 0}
  assert "prompt 0" in one.failures["missing"].last
  assert "prompt 1" in one.failures["infinite"].last


def test_a_reward_may_give_the_reason_for_a_missing_score(scorer):
  def partial(samples):
    return rewards.Scores([NAN, 1], "the first has\nno face" if samples[0].prompt else None)

  one = scorer({"partial": partial})
  np.testing.assert_array_equal(one.score(numbered(2))["partial"], [NAN, 1])
  assert one.failures["partial"].last == "the first has no face"
  one.score([sample(prompt=""), sample()])
  assert one.failures["partial"].last == "no score for 1 of 2 samples, as ''"
  assert one.failures["partial"].count == 2


def test_each_sample_that_cannot_be_read_has_its_own_reason():
  def encode(one):
    if one.prompt != "prompt 1":
      raise errors.InputError(f"{one.prompt} is none")
    return one.prompt

  found = rewards.score_encodable(numbered(3), encode, lambda able, encoded: np.ones(len(able)))
  assert np.isnan(found.values).tolist() == [True, False, True]
  assert found.reason == "prompt 0 is none"
  assert [found.detail(i) for i in range(3)] == [
    {"reason": "prompt 0 is none"}, {}, {"reason": "prompt 2 is none"}]


def test_a_time_limit_lets_a_reward_keep_its_answers(tmp_path):
  class Keeps:
    def __call__(self, samples):
      return [1.0] * len(samples)

    def cache_in(self, path):
      self.path = path

  keeps = Keeps()
  base.TimeLimited(keeps, 9.0).cache_in(tmp_path / "answers")
  assert keeps.path == tmp_path / "answers"
  base.TimeLimited(len, 9.0).cache_in(tmp_path)  # It has none to keep.


def test_evaluate_checks_what_scores_hold():
  scores = rewards.evaluate(lambda samples: rewards.Scores([True, False], "unused"), numbered(2))
  assert scores.values.dtype == np.float32 and scores.values.tolist() == [1, 0]
  assert scores.reason is None
  with pytest.raises(ValueError, match=r"got \[1\] float64"):
    rewards.evaluate(lambda samples: rewards.Scores([1.0]), numbered(2))


def test_details_are_plain_json_or_say_what_is_left_out(scorer):
  given = [
    {"boxes": np.ones((1, 2)), "score": np.float32(0.5), "missing": NAN}, None, {"set": {1}},
    {"long": "x" * 70_000}, {"reason": "no face"},
  ]
  values = np.array([1, NAN, NAN, 1, NAN])
  reward = lambda samples: rewards.Scores(values, "no people", details=given)
  scores = scorer({"r": reward}).submit(numbered(5)).scores()["r"]
  plain, missing, odd, long, own = map(scores.detail, range(5))
  assert plain == {"boxes": [[1, 1]], "score": 0.5, "missing": None}
  assert missing == {"reason": "no people"} and own == {"reason": "no face"}
  assert "no JSON: " in odd["left_out"] and odd["reason"] == "no people"
  assert "more than 65536" in long["left_out"] and "reason" not in long
  assert rewards.evaluate(lambda samples: values, numbered(5)).details is None
  with pytest.raises(ValueError, match=r"must be \[5\], one a sample; got \[1\]"):
    rewards.evaluate(lambda samples: rewards.Scores(values, details=[{}]), numbered(5))


def test_different_messages_do_not_flood_the_log(scorer, caplog):
  def fails(samples):
    raise RuntimeError(samples[0].prompt)

  one = scorer({"fails": fails})
  for item in numbered(30):
    one.score([item])
  assert len(caplog.records) == 20
  assert one.failures["fails"].count == 30 and "prompt 29" in one.failures["fails"].last


def test_total_by_hand_and_nan_where_it_counts(scorer):
  given = {"a": value, "b": value, "logged": value}
  one = scorer(given, {"a": 2.0, "b": -1.0, "logged": 0.0})
  scores = {
    "a": np.array([1, 2, NAN, 4], np.float32),
    "b": np.array([10, NAN, 30, 40], np.float32),
    "logged": np.full(4, NAN, np.float32),
  }
  total = one.total(scores)
  assert total.dtype == np.float32
  np.testing.assert_array_equal(total, [-8, NAN, NAN, -32])


def test_normalise_by_hand(scorer):
  one = scorer({"a": value, "b": value}, {"a": 1.0, "b": 0.5})
  scores = {
    # Group 7: mean 2, std 1; group 3: mean 5, std sqrt((25 + 25 + 0) / 3).
    "a": np.array([1, 0, 3, 10, 5], np.float32),
    # Group 7: all the same; group 3 has one score missing: mean 3, std 1.
    "b": np.array([8, 2, 8, NAN, 4], np.float32),
  }
  group = np.array([7, 3, 7, 3, 3])
  a, b = 5 / (np.sqrt(50 / 3) + 1e-4), 1 / (1 + 1e-4)
  expected = [-1 / (1 + 1e-4), -a - 0.5 * b, 1 / (1 + 1e-4), NAN, 0 + 0.5 * b]
  np.testing.assert_allclose(one.total(scores, group, normalise=True), expected, rtol=1e-6)
  # Without a group all are one: a has mean 3.8.
  alone = scorer({"a": value}).total({"a": scores["a"]}, normalise=True)
  std = np.sqrt(((scores["a"] - 3.8) ** 2).mean())
  np.testing.assert_allclose(alone, (scores["a"] - 3.8) / (std + 1e-4), rtol=1e-6)


def test_a_group_without_scores_leaves_the_others_alone(scorer):
  one = scorer({"a": value})
  scores = {"a": np.array([NAN, 1, NAN, 3], np.float32)}
  total = one.total(scores, np.array([0, 1, 0, 1]), normalise=True)
  np.testing.assert_allclose(total, [NAN, -1, NAN, 1], rtol=2e-4)


def test_total_of_arrays_that_differ_in_length(scorer):
  one = scorer({"a": value, "b": value})
  with pytest.raises(ValueError, match="shapes differ"):
    one.total({"a": np.zeros(2), "b": np.zeros(3)})
  with pytest.raises(ValueError, match="shapes differ"):
    one.total({"a": np.zeros(2), "b": np.zeros(2)}, np.zeros(3))


def test_check_stops_above_the_fraction_and_says_why(scorer):
  def fails(samples):
    raise RuntimeError("no\nmore memory")

  one = scorer({"good": value, "bad": fails}, max_failed_fraction=0.5)
  total = one.total(one.score(numbered(4)))
  message = refusal(one.check, total)
  assert "4 of 4" in message and "reward bad: RuntimeError: no more memory" in message
  one.check(np.array([NAN, NAN, 1, 1]))
  refusal(one.check, np.array([NAN, NAN, NAN, 1]))


def test_a_reward_of_weight_0_never_stops_a_run(scorer):
  def fails(samples):
    raise RuntimeError("broken")

  one = scorer({"good": value, "bad": fails}, {"good": 1.0, "bad": 0.0}, max_failed_fraction=0.0)
  scores = one.score(numbered(2))
  one.check(one.total(scores))
  assert np.isnan(scores["bad"]).all() and one.failures["bad"].count == 2


@pytest.mark.parametrize(
  ("weights", "options", "words"),
  [
    ({"b": 1.0}, {}, "weights=['b']"),
    ({"a": 0.0}, {}, "at least one"),
    ({"a": float("nan")}, {}, "reward a"),
    ({"a": 1.0}, {"threads": 0}, "threads=0"),
    ({"a": 1.0}, {"max_failed_fraction": 1.5}, "max_failed_fraction=1.5"),
  ],
)
def test_a_scorer_refuses(weights, options, words):
  assert words in refusal(rewards.Scorer, {"a": value}, weights, **options)


@pytest.mark.parametrize("name", rewards.RESERVED)
def test_names_of_other_metrics_are_refused(name):
  message = refusal(rewards.Scorer, {name: value}, {name: 1.0})
  assert name in message and "option kind" in message


def test_closing_ends_waiting_and_closes_the_rewards():
  class Waiting:
    def __init__(self):
      self.closed, self.begun = threading.Event(), threading.Event()

    def __call__(self, samples):
      self.begun.set()
      assert self.closed.wait(10)
      return value(samples)

    def close(self):
      self.closed.set()

  reward = Waiting()
  one = rewards.Scorer({"waiting": reward}, {"waiting": 1.0}, threads=1)
  running, queued = one.submit(numbered(1)), one.submit(numbered(1))
  assert reward.begun.wait(10)
  one.close()
  np.testing.assert_array_equal(running.result(0)["waiting"], [0])
  with pytest.raises(futures.CancelledError):
    queued.result(0)
