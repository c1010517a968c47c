"""Samples, requests, clients and servers that the tests of the reward protocols share."""

import http.server
import io
import json
import struct
import threading
import zipfile

import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.rewards import serve, wire

NAN = np.nan


def numbered(count, side=2):
  return [
    rewards.Sample(f"prompt {i}", np.full((side, side, 3), i, np.uint8)) for i in range(count)
  ]


def value(samples):
  return np.array([s.image[0, 0, 0] for s in samples], np.float32)


def client(url, **options):
  defaults = {"url": url, "reward": "r", "backoff": 0.001, "timeout": 5}
  return rewards.make("http", **defaults | options)


def npz(save=np.savez, **arrays):
  file = io.BytesIO()
  save(file, **arrays)
  return file.getvalue()


def encoded(*records):
  return np.frombuffer(json.dumps(list(records)).encode(), np.uint8)


RECORD = {"prompt": "", "text": None, "metadata": {}}
IMAGES = np.zeros((1, 2, 2, 3), np.uint8)


def declared(header):
  """A body whose `images` hold 12 bytes, whatever their npy header says."""
  text = header.encode().ljust(117) + b"\n"
  samples, file = io.BytesIO(), io.BytesIO()
  np.lib.format.write_array(samples, encoded(RECORD))
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(
      "images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(12)
    )
    archive.writestr("samples.npy", samples.getvalue())
  return file.getvalue()


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1000000, 1000000, 3)}"
NEGATIVE = "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -2, 2, 3)}"
OBJECTS = "{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 2, 3)}"
# Name: (part of the refusal, body).
MALFORMED = {
  "empty": ("npz", b""),
  "noise": ("npz", bytes(range(256)) * 4),
  "json": ("npz", b'{"samples": []}'),
  "truncated": ("npz", npz(images=IMAGES, samples=encoded(RECORD))[:-30]),
  "no images": ("images is missing", npz(samples=encoded(RECORD))),
  "no samples": ("samples is missing", npz(images=IMAGES)),
  "compressed": ("compressed", npz(np.savez_compressed, images=IMAGES, samples=encoded(RECORD))),
  "a bomb": ("compressed", npz(np.savez_compressed, images=np.zeros((1, 2000, 2000, 3), np.uint8))),
  "objects": ("must be uint8", npz(images=np.array([[[[None]]]], object), samples=encoded(RECORD))),
  "declared objects": ("must be uint8", declared(OBJECTS)),
  "declared huge": ("has 12 bytes", declared(HUGE)),
  "declared negative": ("has 12 bytes", declared(NEGATIVE)),
  "declared nonsense": ("npz", declared("{" * 60)),
  "declared list": ("not a dictionary", declared("[1, 2]")),
  "floats": ("must be uint8", npz(images=IMAGES.astype(np.float32), samples=encoded(RECORD))),
  "fortran": (
    "must be uint8",
    npz(images=np.zeros((3, 2, 2, 3), np.uint8, order="F"), samples=encoded(*[RECORD] * 3)),
  ),
  "grey": ("[1, 2, 2, 1]", npz(images=np.zeros((1, 2, 2, 1), np.uint8), samples=encoded(RECORD))),
  "no pixels": (
    "[1, 0, 2, 3]", npz(images=np.zeros((1, 0, 2, 3), np.uint8), samples=encoded(RECORD)),
  ),
  "one image": ("rank 4", npz(images=IMAGES[0], samples=encoded(RECORD))),
  "too few samples": (
    "list of 2",
    npz(images=np.zeros((2, 2, 2, 3), np.uint8), samples=encoded(RECORD)),
  ),
  "samples not json": ("utf-8", npz(images=IMAGES, samples=np.full(9, 255, np.uint8))),
  "samples nested": (
    "recursion",
    npz(images=IMAGES, samples=np.frombuffer(b"[" * 100_000, np.uint8)),
  ),
  "samples text": ("must be uint8", npz(images=IMAGES, samples=np.array(json.dumps([RECORD])))),
  "key missing": ("keys", npz(images=IMAGES, samples=encoded({"prompt": "", "text": None}))),
  "key surplus": ("keys", npz(images=IMAGES, samples=encoded(RECORD | {"image": 1}))),
  "prompt number": ("prompt", npz(images=IMAGES, samples=encoded(RECORD | {"prompt": 3}))),
  "text number": ("text", npz(images=IMAGES, samples=encoded(RECORD | {"text": 3}))),
  "metadata null": ("metadata", npz(images=IMAGES, samples=encoded(RECORD | {"metadata": None}))),
}


class Script(http.server.BaseHTTPRequestHandler):
  """Gives `server.answers` in turn, then the last again and again: (status, body), or seconds.

  A body may be a function of the request's; headers may follow it.
  """

  def do_GET(self):
    content = self.server.announcement
    self.send_response(404 if content is None else 200)
    self.end_headers()
    self.wfile.write(json.dumps(content).encode())

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"])) if self.server.listens else b""
    self.server.seen.append((self.path, dict(self.headers), body))
    answers = self.server.answers
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    if isinstance(answer, float):
      self.server.over.wait(answer)
      return
    status, content, *headers = answer
    if callable(content):
      content = content(body)
    self.send_response(status)
    for name, value in dict(*headers).items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *args):
    pass


def scripted(stack, *answers, listens=True, announcement=None):
  """A server that `stack` ends, with its `url` and what it has `seen`: (path, headers, body)."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script)
  server.answers, server.seen, server.over = list(answers), [], threading.Event()
  server.listens, server.announcement = listens, announcement
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  stack.callback(server.server_close)
  stack.callback(server.shutdown)
  stack.callback(server.over.set)
  server.url = f"http://127.0.0.1:{server.server_address[1]}"
  return server


def serving(stack, given, **options):
  """A server of rewards {name: reward} that `stack` ends."""
  server = serve.Server(given, **options)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  stack.callback(server.server_close)
  stack.callback(server.shutdown)
  return server


def right(body):
  return json.dumps({"scores": value(wire.unpack(body)).tolist()}).encode()
