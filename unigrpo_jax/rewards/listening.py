"""The base of this package's HTTP servers: JSON answers, a bearer token, health, limits.

A server without a token listens on loopback only. Errors are one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent import futures
import contextlib
import hmac
import http.server
import ipaddress
import json
import signal
import socket
import sys
import threading
import time
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.rewards import threads

HEALTH = "/healthz"
LOADING = "loading"  # Status that HEALTH reports, with HTTP status 503, until the server is ready.
MAX_BODIES = 16  # Request bodies in memory at once; further requests wait.
IDLE_TIMEOUT = 60.0  # Seconds to wait for a client's next bytes.
SLOWEST = 100_000.0  # Bytes a second at which a body arrives, after as long as that.
LINGER = 5.0  # Seconds to keep reading a body that was refused, so that the client gets the answer.


class Server(http.server.ThreadingHTTPServer):
  """A server with one thread per connection.

  Attributes:
    token: that clients must send; None: none.
    max_bytes: of a request's body, at most.
    bodies: semaphore to hold while a body is in memory; see `Handler.read`.
    is_loading: whether requests are still answered with `LOADING`.
    working: threads whose requests are being answered.
  """

  daemon_threads = True
  request_queue_size = 1024  # Connections that may wait to be accepted; more would be reset.

  def __init__(
    self, handler: type[Handler], *, host: str = "127.0.0.1", port: int = 0,
    token: str | None = None, max_bytes: int = 256 << 20,
  ):
    """Binds and listens.

    Args:
      handler: class that answers requests.
      host: address to listen on.
      port: 0 takes a free one; see `address`.
      token: bearer token that clients must send; None: none.
      max_bytes: of a request's body, at most.

    Raises:
      InputError: there is no token though other machines can reach `host`, or the address is not
        available.
    """
    self.token, self.max_bytes = token, max_bytes
    self.bodies = threading.BoundedSemaphore(MAX_BODIES)
    self.is_loading = False
    self.working: set[threading.Thread] = set()
    if token is None and not _loopback(host):
      raise errors.InputError(
        f"--host={host} can be reached from other machines: give --token_env, or --host=127.0.0.1"
      )
    self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      super().__init__((host, port), handler)
    except (OSError, OverflowError, TypeError, ValueError) as error:  # a name that is none
      raise errors.InputError(
        f"--host={host} --port={port}: {error}; choose another, or --port=0 for any"
      ) from None

  @property
  def address(self) -> str:
    """The server's base URL."""
    host, port = self.server_address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

  def handle_error(self, request, client_address) -> None:
    """Reports errors, except those of a client that has disconnected."""
    if not isinstance(sys.exc_info()[1], OSError):
      super().handle_error(request, client_address)

  def run(self, what: str, load: Callable[[], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
      what: printed with the address.
      load: called first, while requests are answered with `LOADING`. What it raises ends the
        server and is raised here. None: requests are served at once.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda *_: stop.set())
    self.is_loading = load is not None
    threading.Thread(target=self.serve_forever, name="server", daemon=True).start()
    if load is not None:
      print(f"loading on {self.address}", flush=True)
      loading = threads.start(load, name="loading")
      while not stop.is_set() and futures.wait([loading], 0.1).not_done:
        pass
      if not stop.is_set():
        loading.result()
        self.is_loading = False
    if not stop.is_set():
      print(f"serving {what} on {self.address}", flush=True)
      stop.wait()
    self.shutdown()
    self.server_close()
    # Where Python ends under native code of a daemon thread, such as a compilation, the program
    # aborts. Python waits for these threads, but no longer than `errors.report` lets it.
    for thread in list(self.working):
      threading.Thread(target=thread.join, name="answering").start()
    print("stopped", flush=True)


class Refusal(Exception):
  """Raised by a handler to answer with another status than 200 and a one-line message."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers one request; subclasses define `get` and `post`."""

  server: Server
  timeout = IDLE_TIMEOUT

  def get(self) -> dict[str, Any]:
    """The JSON answer to a GET request (but for HEALTH); raises Refusal."""
    raise NotImplementedError

  def post(self) -> dict[str, Any]:
    """The JSON answer to a POST request; raises Refusal. It may call `length` and then `read`."""
    raise NotImplementedError

  def error(self, status: int, message: str) -> dict[str, Any]:
    """The JSON answer for a `Refusal`."""
    return {"error": message}

  def do_GET(self) -> None:
    if self.path == HEALTH and not self.server.is_loading:
      self._answer(200, {"status": "ok"})
    elif self.path == HEALTH:
      self._answer(503, {"status": LOADING})
    else:
      self._reply(self.get, 0)

  def do_POST(self) -> None:
    self._reply(self.post, float("inf"))

  def log_request(self, code="-", size="-") -> None:
    """Logs nothing: a training run sends thousands of requests."""

  def length(self, advice: str) -> int:
    """The length of the request's body in bytes.

    Raises:
      Refusal: it is missing, malformed, or more than `max_bytes`; `advice` says what to do then.
    """
    given = self.headers.get("Content-Length")
    if given is None:
      raise Refusal(411, "Content-Length is missing")
    if not (given.isascii() and given.isdigit()) or len(given) > 18:
      raise Refusal(400, f"Content-Length={given[:40]!r} is not a length")
    self._unread = int(given)
    if self._unread > self.server.max_bytes:
      raise Refusal(
        413, f"{given} bytes are more than the {self.server.max_bytes} allowed; {advice}"
      )
    return self._unread

  def read(self, length: int) -> bytes:
    """Reads the request's body of `length` bytes; hold `server.bodies` while it is in memory.

    Raises:
      Refusal: the client sent less.
    """
    # Else a client that sends a byte now and then would hold `bodies` for ever.
    seconds = self.timeout + length / SLOWEST
    late = threading.Timer(seconds, _end_reading, (self.connection,))
    late.daemon = True
    late.start()
    try:
      body = self.rfile.read(length)
    finally:
      late.cancel()
    self._unread = 0
    if len(body) < length:
      raise Refusal(400, f"the body ended after {len(body)} of {length} bytes")
    return body

  def has_gone(self) -> bool:
    """Whether the client has disconnected and so no longer waits for an answer; call after `read`.
    """
    self.connection.settimeout(0)
    try:
      return not self.connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return False
    except OSError:
      return True
    finally:
      self.connection.settimeout(self.timeout)

  def _reply(self, work: Callable[[], dict[str, Any]], unread: float) -> None:
    """Answers with what `work` returns, or with its `Refusal`."""
    self._unread = unread  # Bytes of the body that the client may still be sending.
    self.server.working.add(threading.current_thread())
    try:
      self._authorise()
      status, answer = 200, work()
    except Refusal as refusal:
      status, line = refusal.status, " ".join(str(refusal).split())[:500]
      answer = self.error(status, line)
      if self.server.is_loading:
        answer = answer | {"status": LOADING}
      else:
        self.log_message("%d %s", status, line)
    finally:
      self.server.working.discard(threading.current_thread())
    self._answer(status, answer)
    if status != 200:
      self._linger()

  def _authorise(self) -> None:
    """Raises Refusal without the right token, and while the server is loading.

    Without a token it answers programs of this machine, and no web page that a browser on it shows.
    """
    token = self.server.token
    given = self.headers.get("Authorization", "").encode("latin-1", "replace")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
      raise Refusal(401, "the bearer token is missing or wrong")
    if token is None and "Origin" in self.headers:
      raise Refusal(403, "a web page (header Origin) is answered only with --token_env")
    if self.server.is_loading:
      raise Refusal(503, "it is still loading")

  def _answer(self, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
    self.wfile.flush()

  def _linger(self) -> None:
    """Reads what the client still sends: closing with unread bytes would reset the connection, and
    the client would lose the answer.
    """
    self.connection.shutdown(socket.SHUT_WR)
    self.connection.settimeout(LINGER)
    end = time.monotonic() + LINGER
    while self._unread > 0 and time.monotonic() < end and (data := self.rfile.read1(1 << 16)):
      self._unread -= len(data)


def _end_reading(connection: socket.socket) -> None:
  """Ends what waits for data of a client; it then sees the end of the data."""
  with contextlib.suppress(OSError):
    connection.shutdown(socket.SHUT_RD)


def add_arguments(parser: argparse.ArgumentParser, port: int) -> None:
  """Adds --host, --port (default `port`), --token_env and --max_mb."""
  add = parser.add_argument
  add("--host", default="127.0.0.1",
      help="address to listen on; one that others can reach needs --token_env "
      "(default: %(default)s)")
  add("--port", type=int, default=port, help="0 takes a free one (default: %(default)s)")
  add("--token_env", metavar="VARIABLE",
      help="environment variable with the bearer token that clients must send (default: none)")
  add("--max_mb", type=int, default=256,
      help="megabytes (2^20 bytes) of a request, at most (default: %(default)s)")


def check_arguments(args: argparse.Namespace) -> None:
  """Raises InputError for impossible values."""
  errors.require("--port", args.port, low=0, high=65535)
  errors.require("--max_mb", args.max_mb, low=1)


def _loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
