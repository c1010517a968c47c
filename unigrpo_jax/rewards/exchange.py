"""One request and its answer over HTTP, on connections that are kept; failures by what helps.

Proxies of the environment and redirects are not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import http.client
import json
import re
import socket
import threading
import time
import urllib.parse

from unigrpo_jax import errors
from unigrpo_jax.rewards import listening

CLOSED_SECONDS = 2.0  # Of waiting for a server, after `close`.
LONGEST_WAIT = 30.0  # Seconds that a server may ask for.
TEMPORARY = {408, 429}  # Besides 5xx, statuses that may be otherwise the next time.
AWAY = {502, 503, 504}  # Of a proxy or a server that is being started: as no answer.


class Failed(Exception):
  """No answer of status 200; the message says why.

  `status` and `answer` are what was there instead, None and b"" without an answer.
  """

  def __init__(self, message: str, status: int | None = None, answer: bytes = b""):
    super().__init__(message)
    self.status, self.answer = status, answer


class Temporary(Failed):
  """There may be one later; where no server answered, `Unreachable`."""

  wait = 0.0  # Seconds that the server asks for.


class Unreachable(Temporary):
  pass


def read_error(answer: bytes) -> str:
  """What a server says is wrong, in one line of at most 300 characters.

  Read are {"error": text}, {"error": {"message": text}}, {"detail": anything} and plain text.
  """
  text = answer[:10_000].decode(errors="replace")
  with contextlib.suppress(ValueError, RecursionError):
    found = json.loads(answer)
    if isinstance(found, dict):
      found = found.get("error", found.get("detail", found.get("message", "")))
    text = found.get("message", found) if isinstance(found, dict) else found
    text = text if isinstance(text, str) else json.dumps(text) if text else ""
  return " ".join(text.split())[:300] or "no reason given"


class Server:
  """A server's address, and the connections to it; for any number of threads."""

  def __init__(self, url: str, what: str, timeout: float):
    """Connects to nothing yet.

    Args:
      url: http or https, without the paths of requests.
      what: whose it is, for messages.
      timeout: seconds that connecting, sending, or waiting for the next bytes may take.

    Raises:
      InputError: it is no such URL.
    """
    try:
      parts = urllib.parse.urlsplit(url)
      host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError) as error:
      raise errors.InputError(f"url of {what}: {error}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
      raise errors.InputError(f"url={url!r} of {what} must be like http://host:8901")
    if parts.username is not None or parts.password is not None:
      raise errors.InputError(f"url of {what} must not hold a password; use token_env")
    https = parts.scheme == "https"
    kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
    self._connect, self._path = lambda: kind(host, port), parts.path.rstrip("/")
    self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
    self._timeout, self._closed = timeout, False
    self._lock = threading.Lock()  # Over what follows.
    self._idle: list[http.client.HTTPConnection] = []
    self._open: set[socket.socket] = set()

  def request(
    self, method: str, path: str, body: bytes | memoryview | None, headers: Mapping[str, str],
    limit: int, end: float | None = None,
  ) -> bytes:
    """The body, of at most `limit` bytes, of an answer of status 200.

    `end`, of `time.monotonic()`, is when it must be there; None: whenever.

    Raises:
      Failed: see there.
    """
    while True:
      with self._lock:
        connection = self._idle.pop() if self._idle else None
      is_kept, connection = connection is not None, connection or self._connect()
      try:
        return self._exchange(connection, method, path, body, headers, limit, end)
      except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
        # A kept connection that the server has closed is made anew.
        if not is_kept or self._closed:
          raise Unreachable(f"no answer ({errors.describe(error)})") from None
      except TimeoutError:
        if end is not None and time.monotonic() >= end:
          raise Unreachable("no answer in the time that was left") from None
        raise Unreachable(f"no answer within timeout={self._timeout:g} s") from None
      except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer ({errors.describe(error)})") from None

  def close(self) -> None:
    """Ends what is being waited for; from now on nothing waits longer than `CLOSED_SECONDS`."""
    with self._lock:
      self._closed = True
      for connection in self._open:
        with contextlib.suppress(OSError):
          # Not the method of an encrypted one, which another thread may be reading.
          socket.socket.shutdown(connection, socket.SHUT_RDWR)
      while self._idle:
        self._idle.pop().close()

  def _exchange(
    self, connection: http.client.HTTPConnection, method: str, path: str, body, headers, limit: int,
    end: float | None,
  ) -> bytes:
    sock = response = None
    keep = False
    try:
      connection.timeout = self._seconds(end)
      if connection.sock is None:
        connection.connect()
      sock = connection.sock
      with self._lock:
        self._open.add(sock)
      sock.settimeout(self._seconds(end))
      try:
        connection.request(method, f"{self._path}{path}", body, headers)
      except (BrokenPipeError, ConnectionResetError):
        # A server may refuse before it has read everything; its answer says why.
        if connection.sock is None:
          raise
      response = connection.getresponse()
      answer = bytearray()
      while len(answer) <= limit and not response.isclosed():
        sock.settimeout(self._seconds(end))
        part = response.read1(limit + 1 - len(answer))
        answer += part
        if not part:
          break
      if len(answer) <= limit and response.length:
        raise Unreachable(f"the answer broke off, {response.length} bytes before its end")
      is_whole = response.isclosed() or response.length == 0
      keep = is_whole and not response.will_close and not self._closed
    finally:
      with self._lock:
        self._open.discard(sock)
      if response is not None:  # It has the socket of a connection that the server ends.
        response.close()
      if keep:
        with self._lock:
          self._idle.append(connection)
      else:
        connection.close()
    if response.status != 200:
      # Before it is cut, which might leave a part of the token.
      secret = headers.get("Authorization", "").removeprefix("Bearer ").encode()
      raise _failure(response, bytes(answer.replace(secret, b"***") if secret else answer))
    if len(answer) > limit:
      raise Failed(f"the answer is longer than {limit} bytes", 200)
    return bytes(answer)

  def _seconds(self, end: float | None) -> float:
    longest = min(self._timeout, CLOSED_SECONDS) if self._closed else self._timeout
    if end is None:
      return longest
    left = end - time.monotonic()
    if left <= 0:
      raise TimeoutError
    return min(left, longest)


def _failure(response: http.client.HTTPResponse, answer: bytes) -> Failed:
  """What an answer of another status than 200 means."""
  status = response.status
  kind = Temporary if status >= 500 or status in TEMPORARY else Failed
  kind = Unreachable if status in AWAY else kind
  failure = kind(f"status {status}: {read_error(answer)}", status, answer)
  wait = response.headers.get("Retry-After", "")
  if isinstance(failure, Temporary) and re.fullmatch(r"[0-9]{1,9}", wait):  # Not a date.
    failure.wait = min(float(wait), LONGEST_WAIT)
  return failure


def says_loading(failure: Failed) -> bool:
  """Whether it is of a server that will be there."""
  try:
    return failure.status == 503 and json.loads(failure.answer).get("status") == listening.LOADING
  except (ValueError, AttributeError, RecursionError):
    return False
