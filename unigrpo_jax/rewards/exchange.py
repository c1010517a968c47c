"""One HTTP request and its answer, over persistent connections; without retries.

Failures are classified by whether trying again may help. Proxies from the environment and redirects
are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
import urllib.parse

from unigrpo_jax import errors
from unigrpo_jax.rewards import listening

CLOSED_SECONDS = 2.0  # Most seconds of waiting for a server after `close`.
LONGEST_WAIT = 30.0  # Most seconds that a server can ask to wait (Retry-After).
TEMPORARY = {408, 429}  # Besides 5xx, statuses after which trying again may help.
AWAY = {502, 503, 504}  # Sent by proxies and by servers that are starting; treated as no answer.


class Failed(Exception):
  """There was no answer of status 200; the message says why.

  Attributes:
    status: status of the answer; None where there was no answer.
    answer: its body.
  """

  def __init__(self, message: str, status: int | None = None, answer: bytes = b""):
    super().__init__(message)
    self.status, self.answer = status, answer


class Temporary(Failed):
  """Trying again later may help.

  Attributes:
    wait: seconds that the server asks to wait first.
  """

  wait = 0.0


class Unreachable(Temporary):
  """No server answered, or a proxy answered in its place."""


def read_error(answer: bytes) -> str:
  """The error message in a server's answer, as one line of at most 300 characters.

  It understands {"error": text}, {"error": {"message": text}}, {"detail": anything} and plain text.
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
  """A server and the open connections to it; any number of threads may use it."""

  def __init__(self, url: str, what: str, timeout: float):
    """Does not connect yet.

    Args:
      url: base URL, http or https.
      what: who asks, for messages.
      timeout: most seconds for connecting, sending, or waiting for the next bytes.

    Raises:
      InputError: it is no such URL.
    """
    try:
      parts = urllib.parse.urlsplit(url)
      host, port = parts.hostname, parts.port
      (host or "").encode("idna")
      http.client.HTTPConnection(host or "", port)  # refuses spaces
    except (ValueError, AttributeError, TypeError, http.client.InvalidURL) as error:
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
    """Sends a request; returns the body of the answer of status 200.

    Args: see `connection.Client.request`; the answer must be complete at `end`.

    Raises:
      Failed: there is no such answer, or it is longer than `limit` bytes.
    """
    while True:
      with self._lock:
        connection = self._idle.pop() if self._idle else None
      is_kept, connection = connection is not None, connection or self._connect()
      try:
        return self._exchange(connection, method, path, body, headers, limit, end)
      except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
        # The server may have closed an idle connection: try again on a new one.
        if not is_kept or self._closed:
          raise Unreachable(f"no answer ({errors.describe(error)})") from None
      except TimeoutError:
        if end is not None and time.monotonic() >= end:
          raise Unreachable("no answer in the time that was left") from None
        raise Unreachable(f"no answer within timeout={self._timeout:g} s") from None
      except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer ({errors.describe(error)})") from None

  def close(self) -> None:
    """Aborts requests that wait; later ones wait at most `CLOSED_SECONDS`."""
    with self._lock:
      self._closed = True
      for connection in self._open:
        with contextlib.suppress(OSError):
          # Not the method of an SSL socket, which is unsafe while another thread reads from it.
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
      source = _Source(sock, lambda: self._seconds(end))
      connection.response_class = lambda _, *args, **options: http.client.HTTPResponse(
        source, *args, **options)
      try:
        connection.request(method, f"{self._path}{path}", body, headers)
      except (BrokenPipeError, ConnectionResetError):
        # A server may refuse before it has read everything; its answer says why.
        if connection.sock is None:
          raise
      response = connection.getresponse()
      answer = bytearray()
      while len(answer) <= limit and not response.isclosed():
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
      if response is not None:  # It owns the socket where the server closes the connection.
        response.close()
      if keep:
        with self._lock:
          self._idle.append(connection)
      else:
        connection.close()
    if response.status != 200:
      # Hide the token before the text is cut, or a part of it could remain.
      secret = headers.get("Authorization", "").removeprefix("Bearer ").encode()
      raise _failure(response, bytes(answer.replace(secret, b"***") if secret else answer))
    if len(answer) > limit:
      raise Failed(f"the answer is longer than {limit} bytes", 200)
    return bytes(answer)

  def _seconds(self, end: float | None) -> float:
    """Time limit of the next socket operation; TimeoutError where `end` has passed."""
    longest = min(self._timeout, CLOSED_SECONDS) if self._closed else self._timeout
    if end is None:
      return longest
    left = end - time.monotonic()
    if left <= 0:
      raise TimeoutError
    return min(left, longest)


class _Source:
  """What a response is read from: a socket each of whose reads has a time limit of its own."""

  def __init__(self, sock: socket.socket, seconds: Callable[[], float]):
    self._sock, self._seconds = sock, seconds

  def makefile(self, mode: str) -> io.BufferedReader:
    """For `HTTPResponse`."""
    return io.BufferedReader(_Reads(self._sock, self._sock.makefile(mode, 0), self._seconds))


class _Reads(io.RawIOBase):
  """A socket's file. Without it, headers or chunks that drip in would have no end."""

  def __init__(self, sock: socket.socket, file: io.RawIOBase, seconds: Callable[[], float]):
    self._sock, self._file, self._seconds = sock, file, seconds

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int | None:
    self._sock.settimeout(self._seconds())
    return self._file.readinto(buffer)

  def close(self) -> None:
    self._file.close()
    super().close()


def _failure(response: http.client.HTTPResponse, answer: bytes) -> Failed:
  """The exception for an answer whose status is not 200."""
  status = response.status
  kind = Temporary if status >= 500 or status in TEMPORARY else Failed
  kind = Unreachable if status in AWAY else kind
  failure = kind(f"status {status}: {read_error(answer)}", status, answer)
  wait = response.headers.get("Retry-After", "")
  if isinstance(failure, Temporary) and re.fullmatch(r"[0-9]{1,9}", wait):  # Not a date.
    failure.wait = min(float(wait), LONGEST_WAIT)
  return failure


def says_loading(failure: Failed) -> bool:
  """Whether a server answered that it is still loading."""
  try:
    return failure.status == 503 and json.loads(failure.answer).get("status") == listening.LOADING
  except (ValueError, AttributeError, RecursionError):
    return False
