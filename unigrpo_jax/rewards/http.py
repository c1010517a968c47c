"""A reward that a server computes: the client of `wire`'s protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import http.client
import itertools
import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
import urllib.parse

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, wire

_log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # Seconds between two attempts, at most.
OUTAGE_WAIT = 0.5  # Seconds between two attempts after the retries, at least.
TEMPORARY = {408, 429}  # Besides 5xx, statuses that may be otherwise the next time.
AWAY = {502, 503, 504}  # Of a proxy or a server that is being started: as no answer.
# A longer answer than this many bytes, and so many a sample, is not a list of scores.
ANSWER, ANSWER_A_SAMPLE = 65_536, 64


class _Failed(Exception):
  """A chunk is not scored."""


class _Temporary(_Failed):
  """It may be scored if tried again; without an answer of the server, `_Unreachable`."""


class _Unreachable(_Temporary):
  pass


def read_token(token: str | None, token_env: str | None) -> str | None:
  """The token, or the one in the environment variable `token_env`; no message shows it.

  Raises:
    InputError: both are given, the variable is not set, or a header cannot hold the token.
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


@base.register("http")
class Http:
  """A reward on a server, in chunks of samples whose images have one shape.

  A failed connection, a time-out, a 5xx, 408 or 429 is tried again; attempt k (from 0) is followed
  by min(backoff 2^k u, 30) seconds of waiting, u uniform in [0.5, 1.5]. Other statuses are final.
  A server that has scored before and is away (no answer, or 502 to 504) is tried again until it has
  been away for `outage` seconds. After a chunk that never reached the server, the call's other
  chunks are not tried. Proxies of the environment and redirects are not followed.
  """

  concurrent = True

  def __init__(
    self, url: str, reward: str, *, timeout: float = 120.0, retries: int = 3, backoff: float = 1.0,
    outage: float = 300.0, batch_size: int = 16, token: str | None = None,
    token_env: str | None = None, seed: int = 0,
  ):
    """Connects to nothing yet.

    Args:
      url: of the server, http or https, before "/v1/rewards"; `reward` is the name there.
      timeout: seconds that connecting, sending, or waiting for the next bytes may take.
      retries: attempts of a chunk after the first, the first of them after about `backoff` seconds.
      outage: seconds that a server which has scored before may be away.
      batch_size: samples of a chunk.
      token, token_env: bearer token, or the environment variable that holds it.
      seed: of the jitter.

    Raises:
      InputError: an argument is out of range or not a URL.
    """
    try:
      parts = urllib.parse.urlsplit(url)
      host, port = parts.hostname, parts.port
    except ValueError as error:
      raise errors.InputError(f"url of reward {reward}: {error}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
      raise errors.InputError(f"url={url!r} of reward {reward} must be like http://host:8901")
    if parts.username is not None or parts.password is not None:
      raise errors.InputError(f"url of reward {reward} must not hold a password; use token_env")
    errors.require("timeout", timeout, above=0)
    errors.require("retries", retries, low=0)
    errors.require("backoff", backoff, low=0)
    errors.require("outage", outage, low=0)
    errors.require("batch_size", batch_size, low=1)
    https = parts.scheme == "https"
    connection = http.client.HTTPSConnection if https else http.client.HTTPConnection
    self._connect = lambda: connection(host, port, timeout=timeout)
    self._path = f"{parts.path.rstrip('/')}{wire.PREFIX}/{urllib.parse.quote(reward, safe='')}"
    self._name = f"{parts.scheme}://{parts.netloc}{self._path}"
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    self._batch_size = batch_size
    self._headers = {"Content-Type": "application/octet-stream"}
    if (token := read_token(token, token_env)) is not None:
      self._headers["Authorization"] = f"Bearer {token}"
    self._jitter = random.Random(seed)
    self._closed = threading.Event()
    self._lock = threading.Lock()  # Over what follows.
    self._open: set[socket.socket] = set()
    self._outage, self._has_scored = outage, False
    self._away_since: float | None = None

  def __call__(self, samples: Sequence[base.Sample]) -> base.Scores:
    """The server's scores; NaN where it had none or did not answer, with the last failure."""
    values, reason, temporary = np.full(len(samples), np.nan), None, False
    for chunk in _chunks(samples, self._batch_size):
      try:
        values[chunk] = self._score([samples[i] for i in chunk])
      except _Failed as error:
        reason = " ".join(f"{self._name}: {error}".split())[:500]  # A server may send any text.
        temporary |= isinstance(error, _Temporary)
        if isinstance(error, _Unreachable):
          break
    return base.Scores(values, reason, temporary)

  def close(self) -> None:
    """Ends waiting, for answers and between attempts: from now on each chunk has one attempt."""
    self._closed.set()
    with self._lock:
      for connection in self._open:
        with contextlib.suppress(OSError):
          # Not the method of an encrypted one, which another thread may be reading.
          socket.socket.shutdown(connection, socket.SHUT_RDWR)

  def _score(self, samples: Sequence[base.Sample]) -> list[float]:
    try:
      body = wire.pack(samples)
    except (TypeError, ValueError) as error:
      raise _Failed(f"samples cannot be sent: {error}") from None
    for attempt in itertools.count():
      try:
        scores = self._attempt(body, len(samples))
        self._note_answer(scored=True)
        return scores
      except _Unreachable as error:
        kind, reason, is_awaited = _Unreachable, str(error), self._note_away(error)
      except _Temporary as error:
        self._note_answer()
        kind, reason, is_awaited = _Temporary, str(error), False
      except _Failed:
        self._note_answer()
        raise
      wait = self._backoff * 2 ** min(attempt, 16) * self._jitter.uniform(0.5, 1.5)
      if attempt >= self._retries:
        if not is_awaited:
          break
        wait = max(wait, OUTAGE_WAIT)
      if self._closed.wait(min(wait, LONGEST_WAIT)):
        break
    raise kind(f"{reason}; attempts: {attempt + 1}")

  def _note_answer(self, scored: bool = False) -> None:
    with self._lock:
      since, self._away_since = self._away_since, None
      self._has_scored |= scored
      if since is not None and self._has_scored and self._outage:
        _log.warning("%s answers again, after %.0f s", self._name, time.monotonic() - since)

  def _note_away(self, error: _Unreachable) -> bool:
    """Whether a server that did not answer is to be waited for."""
    now = time.monotonic()
    with self._lock:
      if self._away_since is None:
        self._away_since = now
        if self._has_scored and self._outage:
          _log.warning("%s: %s; waiting up to %g s for it", self._name, error, self._outage)
      return self._has_scored and now < self._away_since + self._outage

  def _attempt(self, body: bytes, count: int) -> list[float]:
    connection, limit, sock = self._connect(), ANSWER + ANSWER_A_SAMPLE * count, None
    response = None
    try:
      connection.connect()
      sock = connection.sock
      with self._lock:
        self._open.add(sock)
      try:
        connection.request("POST", self._path, body, self._headers)
      except (BrokenPipeError, ConnectionResetError):
        # A server may refuse before it has read everything; its answer says why.
        if connection.sock is None:
          raise
      response = connection.getresponse()
      status, answer = response.status, response.read(limit + 1)
      if len(answer) <= limit and response.length:
        raise _Unreachable(f"the answer broke off, {response.length} bytes before its end")
    except TimeoutError:
      raise _Unreachable(f"no answer within {self._timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
      raise _Unreachable(f"no answer ({errors.describe(error)})") from None
    finally:
      with self._lock:
        self._open.discard(sock)
      connection.close()
      if response is not None:  # It has the socket of a connection that the server ends.
        response.close()
    if status == 200:
      return _read_scores(answer, count, limit)
    failure = _Temporary if status >= 500 or status in TEMPORARY else _Failed
    failure = _Unreachable if status in AWAY else failure
    raise failure(f"status {status}: {_read_error(answer)}")


def _chunks(samples: Sequence[base.Sample], size: int) -> Iterator[list[int]]:
  """Indices of at most `size` samples each, whose images have one shape."""
  by_shape: dict[tuple[int, ...], list[int]] = {}
  for i, sample in enumerate(samples):
    by_shape.setdefault(np.shape(sample.image), []).append(i)
  for indices in by_shape.values():
    yield from (indices[first : first + size] for first in range(0, len(indices), size))


def _read_scores(answer: bytes, count: int, limit: int) -> list[float]:
  try:
    scores = json.loads(answer)["scores"] if len(answer) <= limit else None
    if isinstance(scores, list) and len(scores) == count:
      if all(score is None or type(score) in (int, float) for score in scores):
        return [math.nan if score is None else float(score) for score in scores]
  except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
    pass
  raise _Failed(f'the answer is not {{"scores": [{count} numbers or null]}}')


def _read_error(answer: bytes) -> str:
  try:
    error = json.loads(answer)["error"]
  except (ValueError, TypeError, KeyError, RecursionError):
    error = "no reason given"
  return " ".join(str(error).split())[:300]
