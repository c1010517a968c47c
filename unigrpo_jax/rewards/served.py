"""The base of rewards that a server computes, whatever its protocol."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import threading
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, connection, exchange, threads


@dataclasses.dataclass(eq=False)
class Served:
  """A reward on a server: sends samples in chunks, several requests at the same time.

  Connections, retries and outages are those of `connection.Client`. If a chunk fails, its own
  samples score NaN; if no server could be reached, the chunks that have not begun fail too.

  Attributes:
    url: base URL of the server, or a list of equal servers.
    reward: the reward's name on the server.
    workers: most requests at the same time.
    batch_size: most samples of a request.
    timeout, retries, backoff, outage, token, token_env, seed: see `connection.Client`.
    own: names of the options in which rewards that share a request may differ.

  Raises:
    InputError: an argument is out of range or not a URL.
  """

  url: str | Sequence[str]
  reward: str
  _: dataclasses.KW_ONLY
  workers: int = 8
  batch_size: int = 16
  timeout: float = 120.0
  retries: int = 3
  backoff: float = 1.0
  outage: float = 300.0
  token: str | None = dataclasses.field(default=None, repr=False)
  token_env: str | None = None
  seed: int = 0

  concurrent = True
  own = ("reward",)

  def __post_init__(self):
    errors.require("batch_size", self.batch_size, low=1, integer=True)
    errors.require("workers", self.workers, low=1, integer=True)
    self._client = connection.Client(
      self.url, what=f"reward {self.reward}", timeout=self.timeout, retries=self.retries,
      backoff=self.backoff, outage=self.outage, token=self.token, token_env=self.token_env,
      seed=self.seed,
    )
    self._starting = threading.Lock()
    self._pool: threads.Pool | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """What scores depend on, as JSON; see `base.Reward`."""
    return {"url": self._client.urls, "reward": self.reward}

  @property
  def joint(self) -> Hashable:
    """Equal for rewards that one request can score together; see `base.Reward`."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return (type(self), *(repr(value) for name, value in fields.items() if name not in self.own))

  def __call__(self, samples: Sequence[base.Sample]) -> base.Scores:
    """The server's scores; NaN where it has none or did not answer, with the last reason."""
    return self.score_together([self], samples)[0]

  def score_together(
    self, rewards: Sequence[Served], samples: Sequence[base.Sample]
  ) -> list[base.Scores]:
    """The scores of each of several rewards with equal `joint`; each sample is sent once."""
    merged, gone = [_Merged(len(samples)) for _ in rewards], threading.Event()

    def send(chunk: Sequence[int]) -> None:
      if gone.is_set():
        return
      try:
        scores = self.send(rewards, [samples[i] for i in chunk])
      except exchange.Failed as error:
        for one in merged:
          one.fail(chunk, error)
        if isinstance(error, exchange.Unreachable):
          gone.set()
      except Exception as error:  # of the program
        for one in merged:
          one.fail(chunk, exchange.Failed(errors.describe(error)))
      else:
        for one, part in zip(merged, scores):
          one.put(chunk, part)

    try:
      self.prepare()
    except exchange.Failed as error:
      for one in merged:
        one.fail(range(len(samples)), error)
    else:
      with self._starting:
        self._pool = pool = self._pool or threads.Pool(self.workers, f"served-{self.reward}")
      # Chunks that `close` cancels stay NaN.
      futures.wait([pool.submit(send, chunk) for chunk in self.chunks(samples)])
    return [one.scores() for one in merged]

  def prepare(self) -> None:
    """Called before the requests of a call; a subclass may raise `exchange.Failed`."""

  def chunks(self, samples: Sequence[base.Sample]) -> Iterator[Sequence[int]]:
    """Yields the indices of the samples of each request."""
    for first in range(0, len(samples), self.batch_size):
      yield range(first, min(first + self.batch_size, len(samples)))

  def send(
    self, rewards: Sequence[Served], samples: Sequence[base.Sample]
  ) -> Sequence[base.Scores]:
    """Sends one request; returns the scores of each reward. Raises `exchange.Failed`."""
    raise NotImplementedError

  def close(self) -> None:
    """Ends all waiting, for answers and between attempts; later requests have a single attempt."""
    self._client.close()
    with self._starting:
      if self._pool is not None:
        self._pool.close()
      self._pool = None


class _Merged:
  """The scores of a call, which threads fill in part by part; NaN at first."""

  def __init__(self, count: int):
    self._values = np.full(count, np.nan)
    self._details: list[Mapping[str, Any] | None] = [None] * count
    self._reason, self._temporary = None, False

  def put(self, chunk: Sequence[int], part: base.Scores) -> None:
    self._values[chunk] = part.values
    for i, detail in zip(chunk, part.details or ()):
      self._details[i] = detail
    self._reason = part.reason or self._reason

  def fail(self, chunk: Sequence[int], error: exchange.Failed) -> None:
    self._reason = " ".join(str(error).split())[:500]  # A server may send any text.
    self._temporary |= isinstance(error, exchange.Temporary)
    for i in chunk:
      self._details[i] = {"reason": self._reason}

  def scores(self) -> base.Scores:
    return base.Scores(self._values, self._reason, self._temporary, self._details)
