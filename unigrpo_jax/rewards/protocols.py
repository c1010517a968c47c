"""Clients of the JSON reward servers of other projects. Pickled answers are never read.

Sources: Tencent-Hunyuan/UniRL@1a7b501, unirl-reward-service/reward_service (schemas.py, server.py);
X-GenGroup/Flow-Factory@a0b2bc5, reward_server/example_server.py.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, exchange, making, served, wire

JSON = {"Content-Type": "application/json"}
ANSWER, ANSWER_A_SAMPLE = 65_536, 16_384  # Most bytes of an answer, and more for each sample.


@dataclasses.dataclass(eq=False)
class _Json(served.Served):
  """Base of rewards whose requests are JSON with images in base64.

  Attributes:
    encoding: of images: "png", or "jpeg" of quality 95, which changes pixels and so scores.
    path: of a request, appended to the server's URL.
  """

  encoding: str = "png"

  path = ""

  def __post_init__(self):
    super().__post_init__()
    errors.choose("encoding", self.encoding, wire.ENCODINGS[1:])

  @property
  def settings(self) -> dict[str, Any]:
    return super().settings | {"encoding": self.encoding}

  def send(
    self, rewards: Sequence[served.Served], samples: Sequence[base.Sample]
  ) -> Sequence[base.Scores]:
    try:
      images = [
        base64.b64encode(wire.encode(sample.image, self.encoding)).decode() for sample in samples
      ]
      body = json.dumps(self.request(rewards, samples, images), allow_nan=False).encode("ascii")
    except Exception as error:  # Pillow and json raise many kinds.
      raise exchange.Failed(f"samples cannot be sent: {errors.describe(error)}") from None
    limit = ANSWER + ANSWER_A_SAMPLE * len(samples) * len(rewards)
    answer = self._client.request("POST", self.path, body, headers=JSON, limit=limit)
    return self.read(rewards, wire.read_object(answer), len(samples))

  def request(
    self, rewards: Sequence[served.Served], samples: Sequence[base.Sample], images: Sequence[str]
  ) -> dict[str, Any]:
    """The body of a request about the samples, as JSON; `images` are theirs, in base64."""
    raise NotImplementedError

  def read(
    self, rewards: Sequence[served.Served], answer: Mapping[str, Any], count: int
  ) -> Sequence[base.Scores]:
    """The scores in an answer about `count` samples, of each reward; raises `exchange.Failed`."""
    raise NotImplementedError


@making.register("unirl")
@dataclasses.dataclass(eq=False)
class UniRL(_Json):
  """A reward of UniRL's reward service: POST {url}/score.

  Rewards of one service and equal options share requests. The service lets a reward take 120 s;
  with a shorter `timeout`, requests would be repeated while it still computes.

  Attributes:
    metric: which of the reward's numbers is the score; None: the first. The details have all.
  """

  timeout: float = 300.0
  metric: str | None = None

  own = ("reward", "metric")
  path = "/score"

  @property
  def settings(self) -> dict[str, Any]:
    return super().settings | {"metric": self.metric}

  def request(self, rewards, samples, images):
    names = list(dict.fromkeys(reward.reward for reward in rewards))
    return {"requests": [
      {
        "history": [{"text": sample.prompt, "image_b64": image}], "required_rewards": names,
        "metadata": dict(sample.metadata) or None,
      }
      for sample, image in zip(samples, images)
    ]}

  def read(self, rewards, answer, count):
    results, failed = (
      part if isinstance(part, list) else [] for part in map(answer.get, ("results", "errors"))
    )
    if len(results) != count:
      raise exchange.Failed(f'{self.path}: the answer is not {{"results": [{count} objects]}}')
    failed = failed + [{}] * (count - len(failed))
    return [
      _scores([_unirl(reward, *pair) for pair in zip(results, failed)]) for reward in rewards
    ]


def _unirl(reward: UniRL, result, failed) -> tuple[float, dict[str, Any]]:
  """(score, details) of one sample's `result`, or of its errors `failed`."""
  found = result.get(reward.reward) if isinstance(result, dict) else None
  reason = failed.get(reward.reward) if isinstance(failed, dict) else None
  if not isinstance(found, dict) or not found:
    return math.nan, {"reason": reason or f"the answer has no {reward.reward}"}
  metric = next(iter(found)) if reward.metric is None else reward.metric
  if metric not in found:
    reason = reason or f"metric={metric!r} is not one of {', '.join(found)}"
    return math.nan, {"reason": reason, "metrics": found}
  value = _number(found[metric])
  if math.isnan(value):
    reason = reason or f"{metric} is {found[metric]!r:.60}, no finite number"
    return value, {"reason": reason, "metrics": found}
  return value, {"metrics": found} if len(found) > 1 else {}


@making.register("flow_factory")
@dataclasses.dataclass(eq=False)
class FlowFactory(_Json):
  """The reward of a Flow-Factory reward server: POST {url}/compute. Metadata is not sent."""

  reward: str = "flow_factory"  # for messages: a server has a single reward, without a name

  path = "/compute"

  def request(self, rewards, samples, images):
    return {
      "prompt": [sample.prompt for sample in samples], "image": list(images), "video": None,
      "condition_images": None, "condition_videos": None,
    }

  def read(self, rewards, answer, count):
    found = answer.get("rewards")
    if not isinstance(found, list) or len(found) != count:
      reason = answer.get("error") or f'the answer is not {{"rewards": [{count} numbers]}}'
      raise exchange.Failed(f"{self.path}: {reason}")
    pairs = [(_number(item), {"reason": f"the reward is {item!r:.60}"}) for item in found]
    return [_scores([(value, why if math.isnan(value) else {}) for value, why in pairs])]


def _number(item) -> float:
  """A JSON value as a finite number; NaN for anything else, including true and false."""
  try:
    value = float(item) if type(item) in (int, float) else math.nan
  except OverflowError:
    value = math.nan
  return value if math.isfinite(value) else math.nan


def _scores(pairs: Sequence[tuple[float, dict[str, Any]]]) -> base.Scores:
  values = np.array([value for value, _ in pairs])
  reasons = [detail["reason"] for _, detail in pairs if "reason" in detail]
  reason = " ".join(str(reasons[0]).split())[:500] if reasons else None
  return base.Scores(values, reason, details=[detail for _, detail in pairs])
