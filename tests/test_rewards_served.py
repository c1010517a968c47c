"""Served rewards: requests in flight, kept connections, several servers and names, encodings,
details, servers that load, and clients and servers of different age."""

import contextlib
import http.server
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib

import numpy as np
import PIL.Image
import pytest

from tests import reward_requests as shared
from unigrpo_jax import rewards
from unigrpo_jax.rewards import connection, exchange, listening, serve, wire

RIGHT = (200, shared.right)
AWAY = (503, b"")


def pictures(count, side=8):
  noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
  return [rewards.Sample(f"prompt {i}", image) for i, image in enumerate(noise)]


def sums(samples):
  """A score that any other pixel changes."""
  return np.array([zlib.crc32(s.image.tobytes()) % 10_000 for s in samples], np.float32)


# Requests in flight.


def test_as_many_requests_are_in_flight_as_there_are_workers(scripted):
  """768 samples in 48 requests: none is answered before eight are there, and never more come."""
  eight, inside, most = threading.Barrier(8), [], []

  def together(body):
    inside.append(1)
    most.append(len(inside))
    eight.wait(30)
    inside.pop()
    return shared.right(body)

  server = scripted((200, together))
  samples = [sample for _ in range(3) for sample in shared.numbered(256)]
  scores = shared.client(server.url, timeout=30)(samples)
  np.testing.assert_array_equal(scores.values, [*range(256)] * 3)
  assert len(server.seen) == 48 and max(most) == 8


def test_chunks_that_have_not_begun_are_not_tried_without_a_server(scripted):
  server = scripted(AWAY)
  scores = shared.client(server.url, retries=0, batch_size=1, workers=2)(shared.numbered(50))
  assert len(server.seen) <= 4 and np.isnan(scores.values).all() and scores.temporary


# Connections.


def test_retry_after_is_obeyed_up_to_30_seconds(scripted, monkeypatch):
  waits = ("7", "100", "soon", "0")
  server = scripted(*((429, b"", {"Retry-After": wait}) for wait in waits), RIGHT)
  reward, waited = shared.client(server.url, retries=4), []
  monkeypatch.setattr(reward._client._closed, "wait", waited.append)
  assert reward(shared.numbered(1)).values == [0]
  assert waited[:2] == [7, 30] and max(waited[2:]) < 1


def test_a_server_that_fails_is_left_out_and_answers_again(scripted, caplog, monkeypatch):
  bad, good = scripted(AWAY, RIGHT), scripted(RIGHT)
  reward = shared.client([bad.url, good.url], batch_size=1, workers=1, retries=0)
  np.testing.assert_array_equal(reward(shared.numbered(9)).values, np.arange(9))
  assert (len(bad.seen), len(good.seen)) == (1, 9)
  monkeypatch.setattr(connection, "time", _Later(3))  # Its rest of two seconds is over.
  np.testing.assert_array_equal(reward(shared.numbered(8)).values, np.arange(8))
  assert (len(bad.seen), len(good.seen)) == (5, 13)


class _Later:
  def __init__(self, seconds):
    self._seconds = seconds

  def monotonic(self):
    return time.monotonic() + self._seconds


def test_without_any_server_each_has_its_attempts(scripted):
  servers = [scripted(AWAY) for _ in range(3)]
  scores = shared.client([server.url for server in servers], retries=2)(shared.numbered(1))
  assert sum(len(server.seen) for server in servers) == 5 and "attempts: 5" in scores.reason


class _Kept(shared.Script):
  """Of a server that keeps connections, and forgets them at request number `server.forgets`."""

  protocol_version = "HTTP/1.1"

  def setup(self):
    self.server.connections += 1
    super().setup()

  def do_POST(self):
    content = shared.right(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.seen.append(self.path)
    self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)
    self.close_connection = len(self.server.seen) == self.server.forgets


def test_connections_are_kept_and_made_anew_without_an_attempt():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Kept) as server:
    server.connections, server.seen, server.forgets = 0, [], 3
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    reward = shared.client(url, batch_size=1, workers=1, retries=0)
    np.testing.assert_array_equal(reward(shared.numbered(6)).values, np.arange(6))
    assert (len(server.seen), server.connections) == (6, 2)
    reward.close()
    server.shutdown()


def test_an_end_ends_waiting_and_retries(scripted):
  client = connection.Client(scripted(60.0).url, what="r", retries=9, backoff=0.01)
  with pytest.raises(exchange.Unreachable, match="in the time that was left.*no time left"):
    client.request("POST", "/x", b"", end=time.monotonic() + 0.2)
  client = connection.Client(scripted((500, b"")).url, what="r", retries=9, backoff=60)
  with pytest.raises(exchange.Temporary, match="no time left for another; attempts: 1"):
    client.request("POST", "/x", b"", end=time.monotonic() + 20)


@pytest.mark.parametrize("begin", [
  "HTTP/1.1 200 OK\r\nX-Slow: ", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
], ids=["headers", "chunks"])
def test_an_end_ends_an_answer_that_drips_in(begin):
  over = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as server:
    def answer():
      taken, _ = server.accept()
      with taken, contextlib.suppress(OSError):
        taken.sendall(begin.encode())
        while not over.wait(0.05):
          taken.sendall(b"0")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    client = connection.Client(f"http://127.0.0.1:{server.getsockname()[1]}", what="r", retries=0)
    threading.Timer(5.0, over.set).start()
    with pytest.raises(exchange.Unreachable, match="in the time that was left"):
      client.request("GET", "/x", end=time.monotonic() + 0.5)
    assert not over.is_set()
    over.set()
    thread.join()


@pytest.mark.parametrize("content", [
  b"no k3y", b'{"error": {"message": "no k3y"}}', b'{"detail": "no k3y"}', b'{"error": "no k3y"}',
])
def test_what_a_server_says_is_shown_without_the_token(scripted, content):
  client = connection.Client(scripted((400, content)).url, what="r", token="k3y")
  with pytest.raises(exchange.Failed, match=r"status 400: no \*\*\*$") as caught:
    client.request("POST", "/x", b"")
  assert caught.value.status == 400 and caught.value.answer == content.replace(b"k3y", b"***")


def test_a_server_that_loads_is_waited_for(serving, monkeypatch):
  monkeypatch.setattr(connection, "OUTAGE_WAIT", 0.01)
  server = serving({"r": shared.value})
  server.is_loading = True
  reward, asked = shared.client(server.address, retries=0), []

  def wait(seconds):
    asked.append(seconds)
    server.is_loading = len(asked) < 5

  monkeypatch.setattr(reward._client._closed, "wait", wait)
  np.testing.assert_array_equal(reward(shared.numbered(2)).values, [0, 1])
  assert len(asked) == 5


# Encodings.


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_scores_of_png_are_those_of_raw(serving, encoding):
  samples = pictures(3) + pictures(3, side=5) + pictures(2)
  server = serving({"r": sums})
  scores = shared.client(server.address, encoding=encoding, batch_size=5)(samples)
  np.testing.assert_array_equal(scores.values, sums(samples))


def test_jpeg_says_that_it_changes_scores(serving, caplog):
  server = serving({"r": lambda samples: [s.image.mean() for s in samples]})
  reward = shared.client(server.address, encoding="jpeg")
  assert "changes pixels, and so scores" in caplog.text
  samples = [rewards.Sample("", np.full((16, 16, 3), 99, np.uint8))]
  assert reward(samples).values == pytest.approx([99], abs=2)
  assert reward.settings["encoding"] == "jpeg"


def test_encoded_images_have_one_request_whatever_their_shapes(scripted):
  server = scripted(RIGHT, announcement={"rewards": ["r"], "encodings": ["raw", "png"]})
  samples = shared.numbered(2) + shared.numbered(2, side=3)
  shared.client(server.url, encoding="png")(samples)
  (_, _, body), = server.seen
  assert [s.image.shape for s in wire.unpack(body)] == [(2, 2, 3)] * 2 + [(3, 3, 3)] * 2


def png(width, height):
  """The file of one black pixel, whose header claims another size."""
  def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
      ">I", zlib.crc32(kind + content)
    )

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(
    b"IDAT", zlib.compress(bytes(4))
  ) + chunk(b"IEND", b"")


def body_of(*files, lengths=None):
  return shared.npz(
    encoded=np.frombuffer(b"".join(files), np.uint8),
    lengths=np.array([len(file) for file in files] if lengths is None else lengths, np.int64),
    samples=shared.encoded(*[shared.RECORD] * len(files)),
  )


def gif():
  file = io.BytesIO()
  PIL.Image.new("RGB", (2, 2)).save(file, "GIF")
  return file.getvalue()


@pytest.mark.parametrize(
  ("body", "words"),
  [
    (body_of(png(60_000, 60_000)), "at most 16777216 pixels"),
    (body_of(png(5000, 5000)), "5000 x 5000 pixels"),
    (body_of(png(9, 9)), "no PNG or JPEG"),
    (body_of(gif()), "no PNG or JPEG"),
    (body_of(png(1, 1), lengths=[1]), "lengths"),
    (body_of(png(1, 1), lengths=[-1]), "lengths"),
    (body_of(png(1, 1), lengths=[1 << 62]), "lengths"),
    (body_of(b""), "lengths"),
    (shared.npz(encoded=shared.encoded(1), samples=shared.encoded(1)), "lengths is missing"),
    (body_of(*[wire.encode(np.zeros((64, 64, 3), np.uint8), "png")] * 9), "more than the 100000"),
  ],
)
def test_encoded_images_that_are_refused(body, words):
  with pytest.raises(ValueError, match=words):
    wire.unpack(body, 100_000)


def test_one_black_pixel_is_one():
  (sample,) = wire.unpack(body_of(png(1, 1)))
  np.testing.assert_array_equal(sample.image, np.zeros((1, 1, 3)))


# Several names, details.


def counting(seen, reward):
  def counted(samples):
    seen.append(len(samples))
    return reward(samples)

  return counted


def test_rewards_of_one_server_share_their_requests(serving, monkeypatch):
  server = serving({"a": shared.value, "b": sums, "fails": lambda samples: 1 / 0})
  posts, post = [], serve.Handler.post
  monkeypatch.setattr(serve.Handler, "post", lambda self: posts.append(self.path) or post(self))
  made = {name: shared.client(server.address, reward=name) for name in ("a", "b", "fails", "no")}
  made["alone"] = shared.client(server.address, reward="a", batch_size=5)
  scorer = rewards.Scorer(made, dict.fromkeys(made, 1.0))
  samples = pictures(20)
  scores = scorer.score(samples)
  scorer.close()
  assert sorted(posts) == ["/v1/rewards"] * 2 + ["/v1/rewards/a"] * 4
  assert list(scores) == list(made)
  for name, expected in (("a", shared.value), ("b", sums), ("alone", shared.value)):
    np.testing.assert_array_equal(scores[name], expected(samples))
  assert np.isnan([*scores["fails"], *scores["no"]]).all()
  assert "ZeroDivisionError" in scorer.failures["fails"].last
  assert "there are a, b, fails" in scorer.failures["no"].last


def boxes(samples):
  values = [shared.NAN if s.prompt.endswith("1") else 0.5 for s in samples]
  details = [{"boxes": [[0.0, 1.5]], "score": np.float32(2)} for _ in samples]
  details[0] = details[1] = {"long": "x" * 60_000}
  if len(samples) > 2:
    details[2] = {"long": "x" * 70_000}
  return rewards.Scores(values, "no face", details=details)


def test_details_and_reasons_come_over_the_wire(serving):
  server = serving({"r": boxes, "plain": shared.value})
  local, samples = boxes(shared.numbered(3)), shared.numbered(3)
  scores = shared.client(server.address)(samples)
  assert [scores.detail(i) for i in range(3)] == [local.detail(i) for i in range(3)]
  assert scores.detail(1)["reason"] == "no face" == scores.reason
  assert "left_out" in scores.detail(2)
  assert not any(shared.client(server.address, reward="plain")(samples).details)


# Older servers and clients.


def test_an_older_server_gets_raw_images_and_one_name_at_a_time(scripted, caplog):
  server = scripted(RIGHT, announcement={"rewards": ["r", "q"]})
  made = {name: shared.client(server.url, reward=name, encoding="png") for name in ("r", "q")}
  scorer = rewards.Scorer(made, dict.fromkeys(made, 1.0))
  scores = scorer.score(shared.numbered(3))
  scorer.close()
  for name in made:
    np.testing.assert_array_equal(scores[name], np.arange(3))
  assert {path for path, _, _ in server.seen} == {"/v1/rewards/r", "/v1/rewards/q"}
  assert "does not take encoding=png" in caplog.text
  assert made["r"].settings == {"url": [server.url], "reward": "r"}


def test_a_raw_client_asks_an_older_server_for_nothing_else(scripted):
  server = scripted(RIGHT, announcement=None)
  np.testing.assert_array_equal(shared.client(server.url)(shared.numbered(3)).values, [0, 1, 2])
  (path, _, body), = server.seen
  assert path == "/v1/rewards/r"
  with np.load(io.BytesIO(body)) as arrays:
    assert sorted(arrays) == ["images", "samples"] and arrays["images"].shape == (3, 2, 2, 3)


def test_an_older_client_gets_answers_that_it_takes(serving):
  """It sends no header that asks for details, and takes 64 KiB and 64 bytes a sample."""
  server = serving({"long": boxes, "short": lambda samples: rewards.Scores(
    np.ones(len(samples)), details=[{"why": "so"}] * len(samples)
  )})
  for name, details in (("long", None), ("short", [{"why": "so"}] * 3)):
    body = connection.Client(server.address, what="old").request(
      "POST", f"/v1/rewards/{name}", wire.pack(shared.numbered(3)), limit=65_536 + 3 * 64
    )
    assert json.loads(body).get("details") == details


# Settings and loading.


def test_settings_of_a_served_reward_are_known(serving):
  def detector(samples):
    return shared.value(samples)

  detector.settings = {"detector": "nanodet", "threshold": 0.25}
  server = serving({"r": detector, "plain": shared.value})
  made = shared.client(server.address)
  assert made.settings == {
    "url": [server.address], "reward": "r", "served": {"detector": "nanodet", "threshold": 0.25}
  }
  assert "served" not in shared.client(server.address, reward="plain").settings
  server.server_close()
  gone = shared.client("http://127.0.0.1:1", retries=0)
  assert gone.settings == {"url": ["http://127.0.0.1:1"], "reward": "r"}


def test_health_and_rewards_while_loading(serving, capfd):
  server = serving({"r": shared.value})
  client = connection.Client(server.address, what="r", retries=0, outage=0)
  server.is_loading = True
  for method, path in (("GET", listening.HEALTH), ("POST", "/v1/rewards/r")):
    with pytest.raises(exchange.Unreachable, match="status 503") as caught:
      client.request(method, path, b"")
    assert json.loads(caught.value.answer)["status"] == "loading"
  server.is_loading = False
  assert json.loads(client.request("GET", listening.HEALTH)) == {"status": "ok"}
  assert not capfd.readouterr().err


def test_rewards_are_warmed_with_a_grey_image(caplog):
  seen = []
  made = serve.warmed({"r": counting(seen, lambda samples: [shared.NAN])})
  assert seen == [1] and list(made) == ["r"]
  with caplog.at_level(logging.CRITICAL), pytest.raises(Exception, match="r failed at a grey"):
    serve.warmed({"r": lambda samples: 1 / 0})
