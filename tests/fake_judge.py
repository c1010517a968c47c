"""A server of the OpenAI protocol with scripted answers, for tests of the reward `judge`."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
import PIL.Image

KEY = "sk-a-secret"


def completion(text, top=None, finish="stop"):
  """A chat completion; `top` is [(token, probability)] of the first token."""
  logprobs = None
  if top is not None:
    entries = [{"token": token, "logprob": float(np.log(p)), "bytes": None} for token, p in top]
    logprobs = {"content": [entries[0] | {"top_logprobs": entries}]}
  return {"choices": [{
    "index": 0, "finish_reason": finish, "logprobs": logprobs,
    "message": {"role": "assistant", "content": text},
  }]}


class Asked:
  """A request: its body, its text and its picture."""

  def __init__(self, body, headers):
    self.body, self.headers = body, headers
    parts = {part["type"]: part for part in body["messages"][0]["content"]}
    self.text = parts["text"]["text"]
    self.url = parts["image_url"]["image_url"]["url"]

  @property
  def image(self):
    data = base64.b64decode(self.url.partition("base64,")[2])
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def red(asked):
  """Sees red: answers what a model would, with its probabilities."""
  is_red = asked.image[..., 0].mean() > asked.image[..., 2].mean()
  p = 0.9 if is_red else 0.2
  return completion("Yes." if is_red else "No.", [("Yes", p), (" no", 1 - p)])


class Judge:
  """Answers by `answer(asked)`: a body, (status, body, headers), or bytes of a cut answer.

  Attributes:
    asked: the requests so far, those of the probe too.
    at_once: the most requests that were in flight.
  """

  def __init__(self, answer=red, delay=0.0, models=("judge-1",)):
    self.answer, self.delay, self.models = answer, delay, models
    self.asked, self.at_once, self._now, self._lock = [], 0, 0, threading.Lock()
    judge = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in judge.models]})

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge._lock:
          asked = Asked(body, dict(self.headers))
          judge.asked.append(asked)
          judge._now += 1
          judge.at_once = max(judge.at_once, judge._now)
        try:
          time.sleep(judge.delay)
          answer = judge.answer(asked)
        finally:
          with judge._lock:
            judge._now -= 1
        if isinstance(answer, dict):
          answer = (200, answer, {})
        if isinstance(answer, bytes):  # More was promised than comes.
          self.send_response(200)
          self.send_header("Content-Length", str(len(answer) + 100))
          self.end_headers()
          self.wfile.write(answer)
          self.close_connection = True
          return
        self.reply(*answer)

      def reply(self, status, body, headers=None):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
          self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
          self.wfile.write(data)

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
    threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()
