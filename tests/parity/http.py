"""Recorded exchanges of other reward protocols: what is sent, and what is read out of answers."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np

from tests import reward_requests
from tests.parity import cases
from unigrpo_jax import rewards

SCORES = "scores_of_"


@cases.file_case("http/unirl*.json")
def unirl(path, report):
  record = json.loads(path.read_text())
  sent = record["request"]["requests"]
  samples = [_sample(one["history"][-1]["text"], one["metadata"]) for one in sent]
  names = sent[0]["required_rewards"]
  for number, recorded in enumerate(record["responses"]):
    for name in (key.removeprefix(SCORES) for key in recorded if key.startswith(SCORES)):
      made, seen = _ask("unirl", samples, recorded, reward=name)
      _check(report, f"answer{number}", recorded, made, recorded[SCORES + name], seen)
  body = _ask_all("unirl", samples, record["responses"][0], names)
  found, expected = (_text(_without_images(given)) for given in (body, record["request"]))
  report.check_equal("request", "body", found, expected, cases.EXACT)
  several = record.get("several_sub_metrics")
  if several:
    answer = {"status": 200, "body": several["body"]}
    (name, numbers), = several["body"]["results"][0].items()
    first, _ = _ask("unirl", samples[:1], answer, reward=name)
    picked = numbers[several["default_picks"]]
    report.check_equal("metric", "default", first, [picked], cases.FORMULA)
    for key, value in several.items():
      if key.startswith("metric="):
        metric = key.removeprefix("metric=").removesuffix(" picks")
        other, _ = _ask("unirl", samples[:1], answer, reward=name, metric=metric)
        report.check_equal("metric", metric, other, [value], cases.FORMULA)


@cases.file_case("http/flow_factory*.json")
def flow_factory(path, report):
  record = json.loads(path.read_text())
  samples = [_sample(prompt, None) for prompt in record["request"]["prompt"]]
  for number, recorded in enumerate(record["responses"]):
    made, seen = _ask("flow_factory", samples, recorded)
    _check(report, f"answer{number}", recorded, made, recorded["scores"], seen)
    found, expected = (
      _text(body | {"image": len(body["image"])}) for body in (seen[0], record["request"])
    )
    report.check_equal("request", "body", found, expected, cases.EXACT)


def _sample(prompt: str, metadata: dict[str, Any] | None) -> rewards.Sample:
  return rewards.Sample(prompt, np.zeros((4, 4, 3), np.uint8), None, metadata or {})


def _ask(kind: str, samples, recorded, **options):
  """(scores [N], bodies sent) of a reward whose server gives a recorded answer."""
  with contextlib.ExitStack() as stack:
    answer = (recorded["status"], json.dumps(recorded["body"]).encode())
    server = reward_requests.scripted(stack, answer)
    reward = rewards.make(kind, url=server.url, retries=1, backoff=0.001, **options)
    made = rewards.evaluate(reward, samples).values
    return made, [json.loads(body) for _, _, body in server.seen]


def _ask_all(kind: str, samples, recorded, names) -> dict[str, Any]:
  """The one request that several rewards make together."""
  with contextlib.ExitStack() as stack:
    answer = (recorded["status"], json.dumps(recorded["body"]).encode())
    server = reward_requests.scripted(stack, answer)
    made = {name: rewards.make(kind, url=server.url, reward=name) for name in names}
    scorer = rewards.Scorer(made, dict.fromkeys(made, 1.0))
    scorer.score(samples)
    scorer.close()
    (_, _, body), = server.seen
    return json.loads(body)


def _check(report, case: str, recorded, made, expected, seen) -> None:
  """Scores, null for NaN, and whether the request was sent again."""
  expected = np.array([np.nan if value is None else value for value in expected])
  missing = [np.isnan(values).astype(int) for values in (made, expected)]
  report.check_equal(case, "missing", *missing, cases.EXACT)
  report.check_equal(
    case, "scores", np.nan_to_num(made), np.nan_to_num(expected), cases.FORMULA
  )
  report.check_equal(case, "attempts", len(seen), 2 if recorded.get("retry") else 1, cases.EXACT)


def _without_images(body: dict[str, Any]) -> dict[str, Any]:
  def without(found):
    return found | {"image_b64": ""} if "image_b64" in found else found

  return json.loads(json.dumps(body), object_hook=without)


def _text(value: Any) -> str:
  return json.dumps(value, sort_keys=True)
