"""The reward `judge` against servers with scripted answers."""

import contextlib
import itertools
import json
import logging
import time

import numpy as np
import pytest

from tests import fake_judge
from tests.fake_judge import KEY, completion
from tests.refusals import refusal
from unigrpo_jax import errors, rewards
from unigrpo_jax.rewards.judge import answers, cache

RED, BLUE = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
POINTS = ["Is it red?", {"question": "Is it not blue?", "needs": [1]}]


def sample(image=RED, points=POINTS, prompt="a red square", text=None, **metadata):
  return rewards.Sample(prompt, image, text, {"points": points} | metadata)


@pytest.fixture
def served(monkeypatch):
  """(fake server, reward) of its arguments and the reward's options; the probe is off."""
  monkeypatch.setenv("JUDGE_KEY", KEY)
  with contextlib.ExitStack() as stack:

    def start(answer=fake_judge.red, *, delay=0.0, models=("judge-1",), **options):
      server = stack.enter_context(fake_judge.Judge(answer, delay, models))
      defaults = dict(
        url=server.url, key_env="JUDGE_KEY", probe=False, backoff=0.001, timeout=5, outage=0,
      )
      reward = rewards.make("judge", **defaults | options)
      stack.callback(reward.close)
      return server, reward

    yield start


def test_points_of_two_pictures(served):
  server, judge = served(probe=True, workers=1)
  scores = judge([sample(), sample(BLUE)])
  np.testing.assert_array_equal(scores.values, [1, 0])
  assert scores.reason is None
  assert scores.details[1] == {
    "questions": ["Is it red?", "Is it not blue?"], "credits": [0, 0],
  }
  body = server.asked[-1].body
  assert body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == 8
  assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
  assert server.asked[-1].headers["Authorization"] == f"Bearer {KEY}"
  assert "logprobs" not in body and "response_format" not in body
  np.testing.assert_array_equal(server.asked[-1].image, BLUE)
  assert judge.settings.items() <= json.loads(judge.fingerprint).items()
  assert "aggregate" not in judge.settings
  assert served(aggregate="all")[1].settings["aggregate"] == "all"
  assert judge.settings["model"] == "judge-1"
  assert set(judge.settings["template"]) == {"yes_no", "count", "one_word"}


def test_probabilities(served):
  server, judge = served(form="p_yes", workers=1)
  scores = judge([sample(), sample(BLUE)])
  np.testing.assert_allclose(scores.values, [0.9, 0.2])
  body = server.asked[0].body
  assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
  assert "Prompt: a red square" in server.asked[0].text


def test_options_of_requests(served, tmp_path):
  template = tmp_path / "wise.txt"
  template.write_text("{prompt}: {Explanation}")
  server, judge = served(
    lambda asked: completion("**Score**: 1"), form="wise_verified", template=str(template),
    token_key="max_completion_tokens", model="other", image="jpeg", max_side=4, seed=3,
    extra={"chat_template_kwargs": {"enable_thinking": False}}, key_env=None,
  )
  assert judge([sample(Explanation="it is red")]).values == [1]
  asked = server.asked[0]
  assert asked.text == "a red square: it is red"
  assert [part["type"] for part in asked.body["messages"][0]["content"]] == ["text", "image_url"]
  assert asked.body["max_completion_tokens"] == 512 and "max_tokens" not in asked.body
  assert asked.body["chat_template_kwargs"] == {"enable_thinking": False}
  assert asked.body["model"] == "other" and asked.body["seed"] == 3
  assert asked.url.startswith("data:image/jpeg;base64,") and asked.image.shape == (4, 4, 3)
  assert "Authorization" not in asked.headers


def test_order_under_32_threads(served):
  def answer(asked):  # The first ones take longest.
    value = int(asked.image[0, 0, 0])
    time.sleep(0.001 * (48 - value))
    return completion("", [("yes", (value + 1) / 100), ("no", 1 - (value + 1) / 100)])

  server, judge = served(answer, form="p_yes", workers=32)
  scores = judge([sample(np.full((2, 2, 3), i, np.uint8)) for i in range(48)])
  np.testing.assert_allclose(scores.values, np.arange(1, 49) / 100)
  assert 2 < server.at_once <= 32


def test_one_bad_point_is_no_score_of_its_sample_alone(served):
  def answer(asked):
    bad = "blue" in asked.text and asked.image[0, 0, 0] == 255
    return completion("It depends." if bad else "yes")

  server, judge = served(answer, reparse=2)
  scores = judge([sample(), sample(BLUE)])
  np.testing.assert_array_equal(scores.values, [np.nan, 1])
  assert scores.reason == "the answer 'It depends.' does not begin with yes or no"
  assert scores.details[0] == {"reason": scores.reason} and not scores.temporary
  asked = [one.body["seed"] for one in server.asked if "blue" in one.text]
  assert sorted(asked) == [0, 0, 1, 2]  # Asked again with other seeds.
  assert judge.failures == {scores.reason: 1}


def test_a_second_answer_that_can_be_read_counts(served):
  says = itertools.cycle(["hm", "yes"])
  server, judge = served(lambda asked: completion(next(says)), workers=1)
  assert judge([sample()]).values == [1]
  assert len(server.asked) == 4


@pytest.mark.parametrize("metadata", [{"points": []}, {"points": [{"question": 3}]}, {}])
def test_samples_without_points(served, metadata):
  server, judge = served()
  scores = judge([rewards.Sample("p", RED, None, metadata), sample()])
  np.testing.assert_array_equal(scores.values, [np.nan, 1])
  assert "points" in scores.reason


def test_needs_vqa_lists_and_aggregates(served):
  yes_to_second = lambda asked: completion("no" if "red" in asked.text else "yes")
  assert served(yes_to_second)[1]([sample()]).values == [0]
  assert served(yes_to_second, use_needs=False)[1]([sample()]).values == [0.5]
  assert served(yes_to_second, use_needs=False, aggregate="all")[1]([sample()]).values == [0]
  two = lambda asked: completion("2", [("two", .5), ("2", .25), ("three", .25)])
  pigs = rewards.Sample("two pigs", RED, None, {"vqa_list": [["How many pigs?", "two"]]})
  assert served(two)[1]([pigs]).values == [1]
  assert served(two, form="points_soft")[1]([pigs]).values == [0.75]
  assert served(two, form="points_soft")[0].asked == []


def test_points_together_without_response_format(served):
  def answer(asked):
    if "response_format" in asked.body:
      return 400, {"error": {"message": "response_format is not supported"}}, {}
    return completion('```json\n{"answers": ["yes", "no"]}\n```')

  server, judge = served(answer, form="points_together", workers=1)
  np.testing.assert_array_equal(judge([sample(), sample(BLUE)]).values, [0.5, 0.5])
  assert ["response_format" in one.body for one in server.asked] == [True, False, False]
  schema = server.asked[0].body["response_format"]["json_schema"]
  assert schema["strict"] and schema["schema"]["required"] == ["answers"]


def test_500_twice_then_200(served):
  statuses = iter([500, 500])

  def answer(asked):
    if (status := next(statuses, None)) is not None:
      return status, {"error": "out of memory"}, {}
    return completion("yes")

  server, judge = served(answer)
  assert judge([sample(points=["a?"])]).values == [1]
  assert len(server.asked) == 3


def test_429_is_tried_again_after_what_it_asks_for(served):
  times = []

  def answer(asked):
    times.append(time.monotonic())
    if len(times) == 1:
      return 429, {"error": "slow down"}, {"Retry-After": "1"}
    return completion("yes")

  _, judge = served(answer)
  assert judge([sample(points=["a?"])]).values == [1]
  assert times[1] - times[0] >= 1


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_refusals_are_final_and_never_show_the_key(served, status, caplog):
  def answer(asked):
    return status, {"error": {"message": f"bad {asked.headers['Authorization']} " + "x" * 900}}, {}

  server, judge = served(answer, workers=1)
  with caplog.at_level(logging.DEBUG):
    scores = judge([sample(points=["a?"])])
    judge.close()
  assert np.isnan(scores.values).all() and not scores.temporary and len(server.asked) == 1
  assert f"status {status}: bad Bearer ***" in scores.reason and len(scores.reason) < 500
  assert KEY not in f"{scores} {judge.failures} {judge.settings} {caplog.text}"


def test_a_key_where_a_message_is_cut_is_not_shown(served):
  long = lambda asked: (400, {"error": "x" * 295 + asked.headers["Authorization"][7:]}, {})
  scores = served(long)[1]([sample(points=["a?"])])
  assert KEY[:4] not in scores.reason and scores.reason.endswith("x" * 295 + "***")


def test_a_refusal_that_all_would_get_ends_the_call(served):
  server, judge = served(lambda asked: (401, {"error": "who are you?"}, {}), workers=1)
  scores = judge([sample(), sample()])
  assert np.isnan(scores.values).all() and len(server.asked) == 1
  assert "who are you?" in scores.details[1]["reason"]


def test_cut_bodies_dropped_logprobs_and_thinking(served):
  cut = served(lambda asked: b'{"choices": [', retries=0)[1]([sample(points=["a?"])])
  assert "broke off" in cut.reason and cut.temporary
  dropped = served(lambda asked: completion("yes"), form="p_yes")[1]([sample()])
  assert "ask with form=points" in dropped.reason
  thinks = served(lambda asked: completion(None, finish="length"))[1]([sample(points=["a?"])])
  assert thinks.reason.startswith("thinking used up max_tokens; send enable_thinking false")
  thought = served(lambda asked: completion("<think>\nred\n</think>\n\nYes"))[1]
  assert thought([sample(points=["a?"])]).values == [1]


def test_the_deadline_holds(served):
  server, judge = served(delay=0.4, deadline=0.6, workers=2)
  start = time.monotonic()
  scores = judge([sample(points=["a?"]) for _ in range(12)])
  assert time.monotonic() - start < 3
  assert np.isfinite(scores.values[:2]).all() and np.isnan(scores.values[4:]).all()
  assert scores.temporary and len(server.asked) <= 4
  reason = scores.details[-1]["reason"]
  assert "deadline=0.6 s" in reason or "no time left" in reason


def test_a_killed_evaluation_asks_only_what_is_missing(served, tmp_path):
  path = tmp_path / "answers.jsonl"
  server, judge = served(lambda asked: completion("hm" if "blue" in asked.text else "yes"))
  judge.cache_in(path)
  assert np.isnan(judge([sample(), sample(BLUE, points=["a?"])]).values[0])
  judge.close()
  lines = path.read_text().splitlines()
  assert len(lines) == 2  # Nothing that failed.
  path.write_text("\n".join(lines)[:-9])  # Killed in the middle of a line.
  again, judge = served(lambda asked: completion("yes"))
  judge.cache_in(path)
  np.testing.assert_array_equal(judge([sample(), sample(BLUE, points=["a?"])]).values, [1, 1])
  assert len(again.asked) == 2
  judge([sample()])
  assert len(again.asked) == 2
  other, judge = served(lambda asked: completion("yes"), seed=1)
  judge.cache_in(path)
  judge([sample()])
  assert len(other.asked) == 2


def test_the_probe_refuses_a_server_that_does_not_see(served, caplog):
  blind = lambda asked: completion("Yes", [("Yes", .9), ("No", .1)])
  for options in ({}, {"form": "p_yes"}, {"form": "unified_reward_1"}):
    message = refusal(served, blind, probe=True, **options)
    assert "model judge-1 of http://127" in message and "does not see pictures" in message
  thinks = lambda asked: completion("", finish="length")
  assert "send enable_thinking false" in refusal(served, thinks, probe=True)
  assert "form=points" in refusal(served, lambda asked: completion("yes"), form="p_yes", probe=True)
  with caplog.at_level(logging.INFO):
    served(probe=True)
  assert "sees pictures: Is the image red? red 1.0, blue 0.0" in caplog.text


def test_models_and_urls(served):
  server, judge = served(models=("a", "b"), model="b")
  assert judge.settings["model"] == "b"
  assert "lists ['a', 'b']; name one of them as the option model" in refusal(
    served, models=("a", "b")
  )
  with fake_judge.Judge() as second:
    _, judge = served(url=[server.url, second.url], model="a")
    assert np.isfinite(judge([sample()] * 4).values).all()
    assert server.asked and second.asked


def test_a_server_that_is_away(served):
  with fake_judge.Judge() as gone:
    pass
  _, judge = served(url=gone.url, model="m", retries=1, workers=1)
  scores = judge([sample(), sample()])
  assert np.isnan(scores.values).all() and scores.temporary and "no answer" in scores.reason
  with pytest.raises(errors.Unavailable, match="no answer"):
    rewards.make("judge", url=gone.url, retries=0, backoff=0)


@pytest.mark.parametrize(("options", "message"), [
  ({"url": "x"}, "must be like http://"), ({"url": "http://h/v1", "form": "point"}, "form='point'"),
  ({"url": "http://h/v1", "colour": 1}, "judge has no option colour"),
  ({"url": "http://h/v1", "image": "webp"}, "image='webp' is none of png, jpeg"),
  ({"url": "http://h/v1", "deadline": 0}, "deadline=0 must be more than 0"),
  ({"url": "http://h/v1", "key_env": "NOT_SET_HERE"}, "NOT_SET_HERE"),
  ({}, "url"),
])
def test_options_that_are_refused(options, message):
  assert message in refusal(rewards.make, "judge", **options)


def test_damaged_lines_of_kept_answers_are_ignored(tmp_path):
  path, reply = tmp_path / "answers.jsonl", answers.Reply("yes", top=(("yes", 0.5),))
  kept = cache.Cache(path)
  kept.put("a", reply)
  kept.close()
  damaged = b'\xff\xfe\n{"key": "b"}\n' + b"[" * 100_000 + b"\n"
  path.write_bytes(damaged + path.read_bytes())
  kept = cache.Cache(path)
  assert kept.get("a") == reply and kept.get("b") is None
  kept.close()
