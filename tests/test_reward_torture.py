"""The reward protocol under damaged messages, and training with a server that fails at 20 %."""

import contextlib
import hashlib
import http.server
import json
import random
import socket
import threading
import time

import jax
import numpy as np
import pytest

from tests import mutations, test_train_unigrpo
from tests import reward_requests as shared
from unigrpo_jax import rewards
from unigrpo_jax.rewards import serve, wire

MANY = pytest.param(10_000, marks=pytest.mark.slow)


def body():
  return wire.pack(shared.numbered(2))


@pytest.mark.parametrize("count", [1000, MANY])
def test_damaged_requests_are_read_or_refused(count):
  rng, whole, refused = random.Random(0), body(), 0
  for _ in range(count):
    try:
      samples = wire.unpack(mutations.mutate(rng, whole))
    except ValueError as error:
      refused += 1
      assert str(error)
    else:
      assert all(sample.image.dtype == np.uint8 for sample in samples)
  assert count / 2 < refused < count


@pytest.mark.parametrize("count", [100, MANY])
def test_a_server_answers_damaged_messages_and_goes_on(count, capfd):
  rng, whole = random.Random(1), body()
  head = f"POST /v1/rewards/r HTTP/1.1\r\nHost: a\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
  server = serve.Server({"r": shared.value})
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  try:
    for number in range(count):
      # In turn the header and the body; what follows is still of the right length, or cut off.
      message = [mutations.mutate(rng, head) + whole, head + mutations.mutate(rng, whole)]
      with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
          connection.sendall(message[number % 2])
          connection.shutdown(socket.SHUT_WR)
          answer = b"".join(iter(lambda: connection.recv(4096), b""))
          assert answer.startswith(b"HTTP/1.0 ") or b"Error code" in answer or not answer
    np.testing.assert_array_equal(shared.client(server.address)(shared.numbered(2)).values, [0, 1])
  finally:
    server.shutdown()
    server.server_close()
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("count", [100, MANY])
def test_a_client_takes_damaged_answers_for_none(count):
  rng, answers, samples = random.Random(2), [], shared.numbered(2)
  end = wire.pack(samples)[-20:]
  content = json.dumps({"scores": [0.25, None]}).encode()
  whole = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(content), content
  )
  listener = socket.create_server(("127.0.0.1", 0))

  def answer_each():
    for _ in range(count):
      connection, _ = listener.accept()
      with connection, contextlib.suppress(OSError):
        received = b""
        while not received.endswith(end):
          received += connection.recv(1 << 16)
        # First, since the client need not wait for the whole answer, nor keep the connection.
        answers.append(1)
        connection.sendall(mutations.mutate(rng, whole))

  threading.Thread(target=answer_each, daemon=True).start()
  url = f"http://127.0.0.1:{listener.getsockname()[1]}"
  reward = shared.client(url, retries=0, outage=0, timeout=30)
  missing = 0
  for _ in range(count):
    scores = rewards.evaluate(reward, samples)
    assert scores.values.shape == (2,)
    if np.isnan(scores.values).all():
      missing += 1
      assert scores.reason and "\n" not in scores.reason
  listener.close()
  assert len(answers) == count and count / 4 < missing


# Training.

FAULTS = ("500", "time-out", "cut off", "truncated npz", "NaN", "null", "wrong count", "HTML")
SECONDS = 5.0  # The client's time-out.
failed: set[bytes] = set()  # What the server did not score.


def identity(sample):
  return hashlib.sha256(sample.prompt.encode() + sample.image.tobytes()).digest()


class Faulty(http.server.BaseHTTPRequestHandler):
  """Scores brightness; a fifth of the requests, by their content, fail in eight ways by turns."""

  def do_POST(self):
    [sample] = wire.unpack(self.rfile.read(int(self.headers["Content-Length"])))
    key = identity(sample)
    fault = None
    if random.Random(key).random() < 0.2:
      failed.add(key)
      with self.server.turn:
        fault = FAULTS[len(self.server.faults) % len(FAULTS)]
        self.server.faults.append(fault)
    if fault == "time-out":
      time.sleep(2 * SECONDS)
    score = float(rewards.make("brightness")([sample])[0])
    status, answer = {
      "500": (500, b'{"error": "out of memory"}'), "truncated npz": (200, body()[:-30]),
      "NaN": (200, b'{"scores": [NaN]}'), "null": (200, b'{"scores": [null]}'),
      "wrong count": (200, b'{"scores": [0.5, 0.5]}'), "HTML": (200, b"<html>Bad gateway</html>"),
    }.get(fault, (200, json.dumps({"scores": [score]}).encode()))
    self.send_response(status)
    self.send_header("Content-Length", str(len(answer)))
    self.end_headers()
    with contextlib.suppress(OSError):
      self.wfile.write(answer[: len(answer) // 2] if fault == "cut off" else answer)

  def log_message(self, *args):
    pass


def dropped_by_hand(samples):
  """Brightness; of a call, which is one group, all or nothing."""
  if any(identity(sample) in failed for sample in samples):
    return np.full(len(samples), np.nan)
  return rewards.make("brightness")(samples)


@pytest.mark.slow
def test_training_with_a_faulty_server_drops_its_groups_and_nothing_else(shallow, tmp_path):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
  server.daemon_threads, server.faults, server.turn = True, [], threading.Lock()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f"http://127.0.0.1:{server.server_address[1]}"

  def train(name, **options):
    config = test_train_unigrpo._config(shallow, **{
      "steps": 6, "prompts_per_step": 6, "eval.every": 0, "reward.max_failed_fraction": 1.0,
    })
    with config.unlocked():
      config.rewards, config.reward_options = {"r": 1.0}, {"r": options}
    last = test_train_unigrpo._train(config, tmp_path / name)
    return last, test_train_unigrpo.rows_of(tmp_path / name)

  failed.clear()
  served, rows = train(
    "served", kind="http", url=url, reward="r", batch_size=1, retries=0, timeout=SECONDS
  )
  server.shutdown()
  server.server_close()
  assert len(server.faults) >= len(FAULTS)  # each of them
  dropped = [row["groups/dropped"] for row in rows]
  assert 0 < sum(dropped) <= len(server.faults)  # two failures may be of one group
  by_hand, others = train("by_hand", kind=f"{__name__}:dropped_by_hand")
  for a, b in zip(jax.tree.leaves(served), jax.tree.leaves(by_hand), strict=True):
    np.testing.assert_array_equal(a, b)
  # The mean of the scores themselves is over all that there are.
  for row, other in zip(rows, others, strict=True):
    assert row.keys() == other.keys()
    differ = {key for key in row if row[key] != other[key]}
    assert differ <= {"reward/r", "reward_std/r", "reward_failed/r"}
