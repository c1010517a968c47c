"""The reward `http`: a client of `rewards.serve`, by the protocol of `wire`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import logging
import math
import threading
import time
from typing import Any
import urllib.parse

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, exchange, making, served, wire

_log = logging.getLogger(__name__)

ANNOUNCEMENT = 1 << 20  # Most bytes of a server's description of itself.
SETTINGS_SECONDS = 5.0  # Time limit of asking for that description just for `settings`.


@making.register("http")
@dataclasses.dataclass(eq=False)
class Http(served.Served):
  """A reward that `rewards.serve` serves. Rewards of one server and equal options share requests.

  Attributes:
    encoding: of images in requests: "raw"; "png", with the same pixels in fewer bytes but more
      time; or "jpeg" of quality 95, which changes pixels and so scores. A server that does not
      support it gets raw images.
  """

  encoding: str = "raw"

  def __post_init__(self):
    super().__post_init__()
    errors.choose("encoding", self.encoding, wire.ENCODINGS)
    if self.encoding == "jpeg":
      _log.warning("reward %s: encoding=jpeg changes pixels, and so scores", self.reward)
    self._path = f"{wire.PREFIX}/{urllib.parse.quote(self.reward, safe='')}"
    self._asking = threading.Lock()
    self._announced: Mapping[str, Any] | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """What scores depend on; with "served", the settings of the server's reward, if it answers."""
    try:
      known = self._announcement(SETTINGS_SECONDS).get("settings", {}).get(self.reward)
    except (exchange.Failed, AttributeError):
      known = None
    made = super().settings | ({"encoding": "jpeg"} if self._encoding() == "jpeg" else {})
    return made if known is None else made | {"served": known}

  def score_together(self, rewards, samples):
    """See `Served`. An old server, without such requests, is asked for one reward at a time."""
    if len(rewards) > 1:
      try:
        if not self._announcement().get("encodings"):
          return [reward(samples) for reward in rewards]
      except exchange.Failed:
        pass  # The requests will fail by themselves, with retries and reasons.
    return super().score_together(rewards, samples)

  def ready(self) -> None:
    """Asks the server whether it has this reward; an old one, which cannot say so, may have it.

    Raises:
      Unavailable: no server answers.
      InputError: it has other rewards, or takes no requests with this token.
    """
    try:
      names = self._announcement().get("rewards")
    except exchange.Unreachable as error:
      raise errors.Unavailable(
        f"reward {self.reward}: {error}; start its server, then run the same command again"
      ) from None
    except exchange.Failed as error:
      if error.status in (401, 403):
        raise errors.InputError(f"reward {self.reward}: {error}") from None
      return
    if isinstance(names, list) and self.reward not in names:
      served = ", ".join(map(str, names))[:200]
      raise errors.InputError(
        f"reward={self.reward!r} is none of those of {self._client.urls[0]}, which has {served}"
      )

  def prepare(self) -> None:
    if self.encoding != "raw":
      self._announcement()

  def chunks(self, samples: Sequence[base.Sample]) -> Iterator[Sequence[int]]:
    """See `Served`; raw images of a chunk must have one shape."""
    if self._encoding() != "raw":
      yield from super().chunks(samples)
      return
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
      by_shape.setdefault(np.shape(sample.image), []).append(i)
    for indices in by_shape.values():
      for first in range(0, len(indices), self.batch_size):
        yield indices[first : first + self.batch_size]

  def send(self, rewards: Sequence[Http], samples: Sequence[base.Sample]) -> list[base.Scores]:
    names = [reward.reward for reward in rewards]
    path = self._path if len(names) == 1 else wire.PREFIX
    try:
      body = wire.pack(samples, self._encoding(), names if len(names) > 1 else None)
    except (TypeError, ValueError, OSError) as error:
      raise exchange.Failed(
        f"{self._client.urls[0]}{path}: samples cannot be sent: {error}"
      ) from None
    answer = self._client.request(
      "POST", path, body, limit=len(names) * wire.answer_limit(len(samples)),
      headers={"Content-Type": "application/octet-stream", wire.DETAILS: "1"},
    )
    try:
      return wire.read_answer(answer, len(samples), names if len(names) > 1 else None)
    except ValueError as error:
      raise exchange.Failed(f"{self._client.urls[0]}{path}: {error}") from None

  def _encoding(self) -> str:
    """The encoding of requests: `encoding`, or "raw" where the server does not announce it."""
    return self.encoding if self.encoding in (self._announced or {}).get("encodings", ()) else "raw"

  def _announcement(self, seconds: float = math.inf) -> Mapping[str, Any]:
    """The server's description of itself (GET /v1/rewards), fetched once.

    Raises:
      exchange.Failed: there is none, within `seconds`.
    """
    with self._asking:
      if self._announced is None:
        end = time.monotonic() + seconds
        answer = self._client.request("GET", wire.PREFIX, limit=ANNOUNCEMENT, end=end)
        self._announced = wire.read_object(answer)
        if self.encoding != "raw" and self._encoding() == "raw":
          _log.warning(
            "reward %s: %s does not take encoding=%s; it gets raw images", self.reward,
            self._client.urls[0], self.encoding,
          )
      return self._announced
