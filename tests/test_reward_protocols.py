"""Rewards of UniRL's and Flow-Factory's servers, against scripted answers."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from tests import reward_requests as shared
from tests.refusals import refusal
from unigrpo_jax import rewards


def answer(*results, errors=None):
  body = {"results": results, "errors": [{}] * len(results) if errors is None else errors}
  return 200, json.dumps(body).encode()


def unirl(url, **options):
  return rewards.make("unirl", **{"url": url, "reward": "r", "backoff": 0.001} | options)


def test_images_are_sent_as_they_are(scripted):
  noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  sample = rewards.Sample("a", noise, "thought", {"tag": "x"})
  server = scripted(answer({"r": {"r": 0.5}}), (200, b'{"rewards": [0.5]}'))
  assert unirl(server.url)([sample]).values == rewards.make(
    "flow_factory", url=server.url
  )([sample]).values == [0.5]
  (path, headers, body), (other_path, _, other) = server.seen
  assert (path, other_path) == ("/score", "/compute")
  assert headers["Content-Type"] == "application/json"
  request = json.loads(body)["requests"][0]
  assert request["metadata"] == {"tag": "x"}
  for text in (request["history"][0]["image_b64"], json.loads(other)["image"][0]):
    image = PIL.Image.open(io.BytesIO(base64.b64decode(text)))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), noise)


def test_several_rewards_send_an_image_once_and_pick_their_metrics(scripted):
  numbers = {"wiscore": 0.8, "realism": 1.0}
  server = scripted(answer({"r": {"r": 0.25}, "wise": numbers}))
  made = {
    "r": unirl(server.url), "wise": unirl(server.url, reward="wise"),
    "realism": unirl(server.url, reward="wise", metric="realism"),
  }
  scorer = rewards.Scorer(made, dict.fromkeys(made, 1.0))
  scores = scorer.submit(shared.numbered(1)).scores()
  scorer.close()
  assert {name: part.values for name, part in scores.items()} == pytest.approx(
    {"r": 0.25, "wise": 0.8, "realism": 1.0}
  )
  assert scores["wise"].detail(0) == {"metrics": numbers} and scores["r"].detail(0) == {}
  (_, _, body), = server.seen
  assert json.loads(body)["requests"][0]["required_rewards"] == ["r", "wise"]
  assert made["realism"].settings["metric"] == "realism"


@pytest.mark.parametrize(
  ("result", "errors", "words"),
  [
    ({}, [{"r": "TimeoutError()"}], "TimeoutError()"), ({}, [], "has no r"),
    ({"r": {"r": None}}, [{}], "is None"), ({"r": {"r": float("inf")}}, [{}], "is inf"),
    ({"r": {"r": 10**400}}, [{}], "no finite number"), ({"r": {}}, [None], "has no r"),
    ({"r": 0.5}, [{}], "has no r"), (None, None, "has no r"), ({"r": {"s": "1"}}, [{}], "is '1'"),
  ],
)
def test_what_is_no_score_is_nan_with_the_reason(scripted, result, errors, words):
  server = scripted(answer(result, errors=errors))
  scores = unirl(server.url)(shared.numbered(1))
  assert np.isnan(scores.values).all() and len(server.seen) == 1
  assert words in scores.reason and words in scores.detail(0)["reason"]


def test_a_metric_that_is_not_there(scripted):
  server = scripted(answer({"r": {"a": 1.0, "b": 2.0}}))
  scores = unirl(server.url, metric="c")(shared.numbered(1))
  assert "metric='c' is not one of a, b" in scores.reason and np.isnan(scores.values).all()


@pytest.mark.parametrize(
  "content", [b"", b"[]", b'{"results": []}', b'{"results": 3}', b"\x80\x04K."]
)
def test_other_answers_are_nan(scripted, content):
  for kind, name in (("unirl", "results"), ("flow_factory", "rewards")):
    scores = rewards.make(kind, url=scripted((200, content)).url, reward="r")(shared.numbered(2))
    assert np.isnan(scores.values).all() and name in scores.reason and not scores.temporary


def test_a_service_with_more_than_the_servers_time():
  assert unirl("http://127.0.0.1:1").timeout > 120


def test_options_that_are_refused():
  assert "encoding='raw'" in refusal(unirl, "http://127.0.0.1:1", encoding="raw")
  assert "metrik" in refusal(unirl, "http://127.0.0.1:1", metrik="a")
