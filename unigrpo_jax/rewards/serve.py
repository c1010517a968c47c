"""Serves rewards over HTTP: `python -m unigrpo_jax.rewards.serve --help`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
import hmac
import http.server
import ipaddress
import json
import math
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any
import urllib.parse

from unigrpo_jax import errors
from unigrpo_jax.rewards import arguments, base, wire
from unigrpo_jax.rewards import http as client

DESCRIPTION = """Serves rewards over HTTP, for `http` rewards of a training run elsewhere.

Needs numpy, scipy and Pillow, no accelerator of its own. The protocol is in rewards/wire.py."""

EPILOG = """examples:
  python -m unigrpo_jax.rewards.serve --rewards iconworld_strict iconworld_soft
  python -m unigrpo_jax.rewards.serve --rewards taste=my_rewards:Taste \\
    --reward_options '{"taste": {"device": "cuda"}}' --host 0.0.0.0 --token_env REWARD_TOKEN
  curl http://127.0.0.1:8901/v1/rewards

A reward is a registered name, module:function or another server's URL, after NAME= to serve it
under that name. The connection is not encrypted: a token protects a private network, not a public
one.
"""

MAX_BODIES = 4  # Bodies in memory at once; further requests wait.
IDLE_TIMEOUT = 60.0  # Seconds to wait for a client's next bytes.
LINGER = 5.0  # Seconds to read on from a client whose body is refused, so that it gets the answer.


class Server(http.server.ThreadingHTTPServer):
  """A reward server: a thread a request, which waits while another calls the same reward."""

  daemon_threads = True

  def __init__(
    self, rewards: Mapping[str, base.Reward], *, host: str = "127.0.0.1", port: int = 0,
    token: str | None = None, max_bytes: int = 256 << 20,
  ):
    """Binds and listens at `host`; port 0 takes a free one, which `address` has.

    Clients must send the `token`, if there is one, and at most `max_bytes` in a body.

    Raises:
      InputError: a host that others can reach has no token, or the address cannot be had.
    """
    self.rewards, self.token, self.max_bytes = dict(rewards), token, max_bytes
    self.bodies = threading.BoundedSemaphore(MAX_BODIES)
    self.locks = {name: base.reward_lock(reward) for name, reward in rewards.items()}
    if token is None and not _loopback(host):
      raise errors.InputError(
        f"--host={host} can be reached from other machines: give --token_env, or --host=127.0.0.1"
      )
    self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      super().__init__((host, port), Handler)
    except (OSError, OverflowError) as error:
      raise errors.InputError(
        f"--host={host} --port={port}: {error}; choose another, or --port=0 for any"
      ) from None

  @property
  def address(self) -> str:
    """What clients give as `url`."""
    host, port = self.server_address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

  def handle_error(self, request, client_address) -> None:
    """Reports errors other than a client that has gone."""
    if not isinstance(sys.exception(), OSError):
      super().handle_error(request, client_address)


class _Refusal(Exception):
  """An answer of another status than 200, with its line."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
  """One request; see `wire` for the protocol."""

  server: Server
  timeout = IDLE_TIMEOUT

  def do_GET(self) -> None:
    if self.path == wire.HEALTH:
      self._answer(200, {"status": "ok"})
    else:
      self._reply(self._list, 0)

  def do_POST(self) -> None:
    self._reply(self._score, math.inf)

  def log_request(self, code="-", size="-") -> None:
    """Logs nothing: a training run sends thousands of requests."""

  def _reply(self, work: Callable[[], dict[str, Any]], unread: float) -> None:
    self._unread = unread  # Bytes of the body that the client may still be sending.
    try:
      self._authorise()
      status, answer = 200, work()
    except _Refusal as refusal:
      status, answer = refusal.status, {"error": " ".join(str(refusal).split())[:500]}
      self.log_message("%d %s", status, answer["error"])
    self._answer(status, answer)
    if status != 200:
      self._linger()

  def _authorise(self) -> None:
    token = self.server.token
    given = self.headers.get("Authorization", "").encode("latin-1", "replace")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
      raise _Refusal(401, "the bearer token is missing or wrong")

  def _list(self) -> dict[str, Any]:
    if self.path != wire.PREFIX:
      raise _Refusal(404, f"no {self.path}; there are {wire.PREFIX} and {wire.HEALTH}")
    return {"rewards": sorted(self.server.rewards)}

  def _score(self) -> dict[str, Any]:
    name = urllib.parse.unquote(self.path.removeprefix(f"{wire.PREFIX}/"))
    if not self.path.startswith(f"{wire.PREFIX}/") or name not in self.server.rewards:
      names = ", ".join(sorted(self.server.rewards))
      raise _Refusal(404, f"no reward at {self.path}; there are {names}")
    length = self._length()
    with self.server.bodies:
      body = self.rfile.read(length)
      self._unread = 0
      if len(body) < length:
        raise _Refusal(400, f"the body ended after {len(body)} of {length} bytes")
      try:
        samples = wire.unpack(body)
      except ValueError as error:
        raise _Refusal(400, str(error)) from None
      del body
      try:
        with self.server.locks[name]:
          scores = base.evaluate(self.server.rewards[name], samples)
      except BaseException as error:  # SystemExit too: the server goes on, and answers.
        traceback.print_exc()
        raise _Refusal(500, f"reward {name} failed: {errors.describe(error)}") from None
    if scores.reason is not None:
      self.log_message("reward %s: %s", name, scores.reason)
    return {"scores": [None if math.isnan(value) else value for value in scores.values.tolist()]}

  def _length(self) -> int:
    given = self.headers.get("Content-Length")
    if given is None:
      raise _Refusal(411, "Content-Length is missing")
    if not (given.isascii() and given.isdigit()) or len(given) > 18:
      raise _Refusal(400, f"Content-Length={given[:40]!r} is not a length")
    self._unread = int(given)
    if self._unread > self.server.max_bytes:
      raise _Refusal(
        413, f"{given} bytes are more than the {self.server.max_bytes} allowed; send fewer samples"
      )
    return self._unread

  def _answer(self, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
    self.wfile.flush()

  def _linger(self) -> None:
    """Reads on: closing with unread bytes would reset the connection and lose the answer."""
    self.connection.shutdown(socket.SHUT_WR)
    self.connection.settimeout(LINGER)
    end = time.monotonic() + LINGER
    while self._unread > 0 and time.monotonic() < end and (data := self.rfile.read1(1 << 16)):
      self._unread -= len(data)


def _loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.rewards.serve", allow_abbrev=False, description=DESCRIPTION,
    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  arguments.add(parser, required=True)
  add = parser.add_argument
  add("--host", default="127.0.0.1",
      help="address to listen on; one that others can reach needs --token_env "
      "(default: %(default)s)")
  add("--port", type=int, default=8901, help="0 takes a free one (default: %(default)s)")
  add("--token_env", metavar="VARIABLE",
      help="environment variable with the bearer token that clients must send (default: none)")
  add("--max_mb", type=int, default=256,
      help="megabytes (2^20 bytes) of a request, at most (default: %(default)s)")
  args = parser.parse_args(argv)
  errors.require("--port", args.port, low=0, high=65535)
  errors.require("--max_mb", args.max_mb, low=1)
  server = Server(
    arguments.make(args.rewards, args.reward_options), host=args.host, port=args.port,
    token=client.read_token(None, args.token_env), max_bytes=args.max_mb << 20,
  )
  stop = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
  threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
  print(f"serving {', '.join(server.rewards)} on {server.address}", flush=True)
  stop.wait()
  server.shutdown()
  server.server_close()
  print("stopped", flush=True)


if __name__ == "__main__":
  errors.report(main)
