"""A client of one server, or of several equal ones: retries, round robin, outages.

Single requests are made by module `exchange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import logging
import os
import random
import re
import socket
import threading
import time

from unigrpo_jax import errors
from unigrpo_jax.rewards import exchange

_log = logging.getLogger(__name__)

OUTAGE_WAIT = 0.5  # Least seconds between attempts once the retries are used up.
LONGEST_REST = 60.0  # Most seconds that a server which failed is skipped while there are others.


def read_token(token: str | None, token_env: str | None) -> str | None:
  """The bearer token: `token`, or the value of the environment variable `token_env`; None for none.

  Raises:
    InputError: both are given, the variable is not set, or a header cannot hold the token. The
      message does not show it.
  """
  if token is not None and token_env is not None:
    raise errors.InputError(f"token_env={token_env!r}: give either token or token_env, not both")
  if token_env is not None:
    token = os.environ.get(token_env)
    if not token:
      raise errors.InputError(f"token_env={token_env!r}: that environment variable is not set")
  if token is not None and not re.fullmatch(r"[!-~]+", token):
    raise errors.InputError("the token (not shown) must be printable ASCII without spaces")
  return token


@dataclasses.dataclass(eq=False)
class _Server:
  """The state of one server; times are of `time.monotonic()`."""

  at: exchange.Server
  failures: int = 0  # consecutive ones
  rests_until: float = 0.0  # until then it is skipped while there are others
  away_since: float | None = None  # when it stopped answering; None while it answers


class Client:
  """Sends requests; any number of threads may use it.

  Retries: a failed connection, a time-out and the statuses 5xx, 408 and 429 are tried again; other
  statuses are final. After attempt k (from 0) it waits min(backoff 2^k u, 30) seconds, u uniform in
  [0.5, 1.5], or as long as Retry-After asks for, at most 30 seconds.

  Outages: a server that has answered before, or that says it is loading, and is away (no answer, or
  status 502 to 504) is tried again until it has been away for `outage` seconds.

  Several servers: they take turns. After n consecutive failures a server is skipped for 2^n
  seconds, at most 60, and the next attempt goes to another one at once.
  """

  def __init__(
    self, urls: str | Sequence[str], *, what: str, timeout: float = 120.0, retries: int = 3,
    backoff: float = 1.0, outage: float = 300.0, token: str | None = None,
    token_env: str | None = None, seed: int = 0,
  ):
    """Does not connect yet.

    Args:
      urls: base URLs of the servers, http or https.
      what: who asks, for messages: "reward NAME".
      timeout: most seconds for connecting, sending, or waiting for the next bytes.
      retries: number of attempts after the first one at each server.
      backoff: seconds of waiting before the first of these, about; see the class.
      outage: most seconds that a server which has answered before may be away.
      token, token_env: bearer token, or the environment variable that holds it.
      seed: of the random part of the waiting, and of which server is the first; with the process.

    Raises:
      InputError: an argument is out of range or not a URL.
    """
    errors.require("timeout", timeout, above=0, high=errors.MAX_SECONDS)
    errors.require("retries", retries, low=0, integer=True)
    for name, value in (("backoff", backoff), ("outage", outage)):
      errors.require(name, value, low=0)
    urls = [urls] if isinstance(urls, str) else urls
    if not isinstance(urls, Sequence) or not urls:
      raise errors.InputError(f"url={urls!r} of {what} must be a URL or a list of them")
    self._servers = [_Server(exchange.Server(url, what, timeout)) for url in urls]
    self._backoff, self._outage = backoff, outage
    self._attempts = retries + len(self._servers)
    self._token = read_token(token, token_env)
    # Other numbers in each process: the hosts of a pod would turn to one server, all at a moment.
    self._jitter = random.Random(f"{seed} {socket.gethostname()} {os.getpid()}")
    self._closed = threading.Event()
    self._turns = itertools.count(self._jitter.randrange(len(self._servers)))
    self._lock = threading.Lock()  # Over what follows, and the servers' states.
    self._has_answered = False

  @property
  def urls(self) -> list[str]:
    return [server.at.url for server in self._servers]

  def request(
    self, method: str, path: str, body: bytes | memoryview | None = None, *,
    headers: Mapping[str, str] | None = None, limit: int = 1 << 20, end: float | None = None,
  ) -> bytes:
    """Sends a request, with retries; returns the body of the answer of status 200.

    Args:
      method: of HTTP.
      path: ASCII; appended to a server's URL.
      body: of the request.
      headers: besides Authorization and Content-Length.
      limit: most bytes of an answer; a longer one is refused.
      end: value of `time.monotonic()` after which there is no further attempt; None: none.

    Raises:
      exchange.Failed: there is no such answer, after all retries; its subclass says why.
    """
    headers = dict(headers or {})
    if self._token is not None:
      headers["Authorization"] = f"Bearer {self._token}"
    for attempt in itertools.count(1):
      server = self._next_server()
      try:
        answer = server.at.request(method, path, body, headers, limit, end)
        self._note(server, None)
        return answer
      except exchange.Failed as error:
        failure, is_awaited = error, self._note(server, error)
      words = f"{server.at.url}{path}: {failure}"
      if isinstance(failure, exchange.Temporary):
        wait = self._wait(failure, attempt, is_awaited)
        if wait is not None and end is not None and time.monotonic() + wait >= end:
          wait, words = None, f"{words}; there is no time left for another"
        if wait is not None and not self._closed.wait(wait):
          continue
        words += f"; attempts: {attempt}"
      raise type(failure)(self._without_token(words), failure.status, failure.answer)

  def close(self) -> None:
    """Ends all waiting, for answers and between attempts; later requests have a single attempt."""
    self._closed.set()
    for server in self._servers:
      server.at.close()

  def _next_server(self) -> _Server:
    """The next server in turn that is not skipped; else the one that is skipped for least time."""
    now, first = time.monotonic(), next(self._turns)
    order = [self._servers[(first + i) % len(self._servers)] for i in range(len(self._servers))]
    with self._lock:
      awake = (server for server in order if server.rests_until <= now)
      return next(awake, None) or min(order, key=lambda server: server.rests_until)

  def _wait(self, failure: exchange.Temporary, attempt: int, is_awaited: bool) -> float | None:
    """Seconds to wait before the next attempt; None: there is no further one.

    `attempt` counts from 1; `is_awaited` is the result of `_note`.
    """
    with self._lock:
      others = len(self._servers) > 1
      others &= any(server.rests_until <= time.monotonic() for server in self._servers)
    if others and attempt < self._attempts:
      return 0.0
    doubled = min(max(attempt - len(self._servers), 0), 16)
    wait = max(self._backoff * 2**doubled * self._jitter.uniform(0.5, 1.5), failure.wait)
    if attempt >= self._attempts:
      if not is_awaited:
        return None
      wait = max(wait, OUTAGE_WAIT)
    return min(wait, exchange.LONGEST_WAIT)

  def _note(self, server: _Server, failure: exchange.Failed | None) -> bool:
    """Records how a request to a server ended; `failure` is None where it succeeded.

    Returns whether all servers are away but not yet for longer than `outage`, so that the request
    should wait for them.
    """
    now, waits = time.monotonic(), False
    with self._lock:
      self._has_answered |= failure is None or exchange.says_loading(failure)
      if not isinstance(failure, exchange.Temporary):
        server.failures, server.rests_until = 0, 0.0
      elif server.rests_until <= now:  # Once, not for every request that was in flight.
        server.failures += 1
        server.rests_until = now + min(2.0 ** min(server.failures, 16), LONGEST_REST)
      if not isinstance(failure, exchange.Unreachable):
        since, server.away_since = server.away_since, None
        if since is not None and self._has_answered and self._outage:
          _log.warning("%s answers again, after %.0f s", server.at.url, now - since)
        return False
      begins = server.away_since is None
      server.away_since = now if begins else server.away_since
      if self._has_answered and self._outage:
        all_away = all(other.away_since is not None for other in self._servers)
        waits = all_away and now < max(s.away_since for s in self._servers) + self._outage
        if begins:
          what = f"waiting up to {self._outage:g} s for it" if all_away else "others take its turns"
          _log.warning("%s: %s; %s", server.at.url, self._without_token(str(failure)), what)
    return waits

  def _without_token(self, text: str) -> str:
    return " ".join(text.replace(self._token, "***").split() if self._token else text.split())
