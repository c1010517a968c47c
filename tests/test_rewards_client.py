"""The client of the reward protocol, against servers with scripted answers."""

import gc
import json
import pathlib
import socket
import threading
import time

import numpy as np
import pytest

from tests import reward_requests as shared
from tests.refusals import refusal
from unigrpo_jax import rewards
from unigrpo_jax.rewards import connection, wire

RIGHT = (200, shared.right)
FAILED = (500, b'{"error": "out of memory"}')


def test_500_twice_then_success_is_retried(scripted):
  server = scripted(FAILED, FAILED, RIGHT)
  np.testing.assert_array_equal(shared.client(server.url)(shared.numbered(3)).values, [0, 1, 2])
  assert len(server.seen) == 3
  assert len({body for _, _, body in server.seen}) == 1


@pytest.mark.parametrize("status", [408, 429, 503])
def test_temporary_statuses_are_retried(scripted, status):
  server = scripted((status, b""), RIGHT)
  np.testing.assert_array_equal(shared.client(server.url)(shared.numbered(1)).values, [0])


def test_500_every_time_is_nan_after_the_retries(scripted):
  server = scripted(FAILED)
  reward = shared.client(server.url, retries=2)
  scores = reward(shared.numbered(3))
  np.testing.assert_array_equal(scores.values, [shared.NAN] * 3)
  assert len(server.seen) == 3
  for part in ("/v1/rewards/r", "status 500: out of memory", "attempts: 3"):
    assert part in scores.reason


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413])
def test_refusals_are_final_and_say_why(scripted, status):
  server = scripted((status, b'{"error": "because\\nof this"}'))
  reward = shared.client(server.url)
  scores = reward(shared.numbered(1))
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert len(server.seen) == 1
  assert f"status {status}: because of this" in scores.reason


@pytest.mark.parametrize(
  "answer",
  [
    b"", b"[]", b"{}", b'{"scores": null}', b'{"scores": [1]}', b'{"scores": [1, "2"]}',
    b'{"scores": [1, true]}', b'{"scores": [1, %s]}' % (b"9" * 400), b"[" * 50_000,
    b'{"scores": [1, 2%s]}' % (b" " * 300_000),
  ],
)
def test_answers_that_are_no_scores(scripted, answer):
  reward = shared.client(scripted((200, answer)).url)
  scores = reward(shared.numbered(2))
  np.testing.assert_array_equal(scores.values, [shared.NAN] * 2)
  assert "the answer is " in scores.reason


def test_null_is_nan_and_infinity_stays_for_the_scorer_to_see(scripted):
  reward = shared.client(scripted((200, b'{"scores": [0.5, null, Infinity]}')).url)
  scores = reward(shared.numbered(3))
  assert scores.values.dtype == np.float64 and scores.reason is None
  np.testing.assert_array_equal(scores.values, [0.5, shared.NAN, np.inf])


def test_chunks_by_count_and_shape_keep_the_order(scripted):
  server = scripted(RIGHT)
  small, large = shared.numbered(5), shared.numbered(5, side=3)
  samples = [pair[i % 2] for i, pair in enumerate(zip(small, large))]
  scores = shared.client(server.url, batch_size=2, workers=1)(samples)
  np.testing.assert_array_equal(scores.values, np.arange(5))
  shapes = [[s.image.shape[0] for s in wire.unpack(body)] for _, _, body in server.seen]
  assert shapes == [[2, 2], [2], [3, 3]]


def test_one_chunk_that_fails_costs_its_own_samples(scripted):
  server = scripted(RIGHT, (400, b"{}"), RIGHT)
  scores = shared.client(server.url, batch_size=2, workers=1)(shared.numbered(6))
  np.testing.assert_array_equal(scores.values, [0, 1, shared.NAN, shared.NAN, 4, 5])
  assert "status 400" in scores.reason


def test_a_reason_is_of_its_own_call_and_not_of_an_earlier_one(scripted):
  server = scripted(FAILED, (200, b'{"scores": [null]}'))
  scorer = rewards.Scorer({"r": shared.client(server.url, retries=0)}, {"r": 1.0})
  scorer.score(shared.numbered(1))
  assert "out of memory" in scorer.failures["r"].last
  scorer.score(shared.numbered(1))
  assert scorer.failures["r"].last == "no score for 1 of 1 samples, as 'prompt 0'"
  assert scorer.failures["r"].count == 2
  scorer.close()


def test_concurrent_calls_have_their_own_reasons(scripted):
  both = threading.Barrier(2)

  def prompt_of(body):
    both.wait(10)
    return json.dumps({"error": wire.unpack(body)[0].prompt}).encode()

  scorer = rewards.Scorer(
    {"r": shared.client(scripted((400, prompt_of)).url)}, {"r": 1.0}, threads=2
  )
  reasons = []
  scorer._add_failure = lambda name, failure, trace: reasons.append(failure.reason)
  for pending in [scorer.submit([sample]) for sample in shared.numbered(2)]:
    pending.result(10)
  scorer.close()
  assert sorted(reason[-8:] for reason in reasons) == ["prompt 0", "prompt 1"]


def test_what_cannot_be_sent_is_nan(scripted):
  server = scripted(RIGHT)
  samples = [rewards.Sample("", np.zeros((2, 2, 3), np.uint8), None, {"a": {1}})]
  reward = shared.client(server.url)
  scores = reward(samples)
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert "cannot be sent" in scores.reason and not server.seen


def test_a_slow_server_is_a_time_out(scripted):
  server = scripted(10.0)
  reward = shared.client(server.url, timeout=0.1, retries=1, batch_size=1, workers=1)
  start = time.monotonic()
  scores = reward(shared.numbered(4))
  np.testing.assert_array_equal(scores.values, [shared.NAN] * 4)
  assert 0.2 <= time.monotonic() - start < 2
  assert "no answer within timeout=0.1 s" in scores.reason
  assert len(server.seen) == 2, "the chunks after one that found no server are not tried"


def free_port():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


def test_no_server_is_nan_in_bounded_time():
  reward, start = shared.client(f"http://127.0.0.1:{free_port()}", batch_size=1), time.monotonic()
  scores = reward(shared.numbered(100))
  np.testing.assert_array_equal(scores.values, [shared.NAN] * 100)
  assert time.monotonic() - start < 2
  assert "ConnectionRefusedError" in scores.reason and "attempts: 4" in scores.reason


def test_a_server_that_hangs_up(scripted):
  server = scripted(0.0, RIGHT)  # No status line at all.
  np.testing.assert_array_equal(shared.client(server.url)(shared.numbered(1)).values, [0])
  assert len(server.seen) == 2


def test_a_server_that_refuses_without_listening_is_heard(scripted):
  server = scripted((413, b'{"error": "too much"}'), listens=False)
  reward = shared.client(server.url)
  scores = reward(shared.numbered(1, side=2000))
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert "status 413: too much" in scores.reason and len(server.seen) == 1


def test_waits_grow_and_depend_on_the_seed(scripted, monkeypatch):
  server = scripted(FAILED)

  def waits(**options):
    reward, waited = shared.client(server.url, retries=6, backoff=2.0, **options), []
    monkeypatch.setattr(reward._client._closed, "wait", waited.append)
    reward(shared.numbered(1))
    return waited

  first = waits(seed=1)
  assert len(first) == 6 and first == waits(seed=1) != waits(seed=2)
  for k, wait in enumerate(first):
    assert min(2**k, 30) <= wait <= min(3 * 2**k, 30)


def test_processes_do_not_all_turn_to_one_server_at_a_moment(monkeypatch):
  firsts, waits = set(), set()
  for process in range(40):
    monkeypatch.setattr(connection.os, "getpid", lambda process=process: process)
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3, 4)]
    client = connection.Client(urls, what="it")
    firsts.add(client._next_server().at.url)
    waits.add(client._jitter.random())
  assert len(firsts) == 4 and len(waits) == 40


def test_closing_ends_the_waiting(scripted):
  reward = shared.client(scripted(FAILED).url, backoff=20, retries=5)
  threading.Timer(0.05, reward.close).start()
  start = time.monotonic()
  scores = reward(shared.numbered(1))
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert time.monotonic() - start < 5


def test_the_token_is_sent_and_never_shown(scripted, monkeypatch):
  monkeypatch.setenv("MY_TOKEN", "s3cret")
  server = scripted((401, b"{}"))
  reward = shared.client(server.url, token_env="MY_TOKEN")
  scores = reward(shared.numbered(1))
  assert server.seen[0][1]["Authorization"] == "Bearer s3cret"
  assert "s3cret" not in scores.reason + repr(reward)
  for bad in ("s3cret\n", "s3 cret", "s3cr\u00e9t", ""):
    assert "s3" not in refusal(shared.client, server.url, token=bad)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"url": "127.0.0.1:8901"}, "http://host:8901"),
    ({"url": "ftp://a"}, "url='ftp://a'"),
    ({"url": "http://a:99999"}, "url"),
    ({"url": "http://a..b"}, "url"),
    ({"url": "http://" + "x" * 100}, "url"),
    ({"url": "http://a b"}, "url"),
    ({"url": "http://a?b=c"}, "url"),
    ({"timeout": 0}, "timeout=0"),
    ({"retries": -1}, "retries=-1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"token_env": "UNSET_VARIABLE"}, "UNSET_VARIABLE"),
    ({"token_env": "A", "token": "s3cret"}, "not both"),
  ],
)
def test_options_that_are_refused(options, words):
  message = refusal(shared.client, **{"url": "http://127.0.0.1:1", **options})
  assert words in message and "s3cret" not in message


def test_a_url_with_a_password_is_refused_without_showing_it():
  assert "s3cret" not in refusal(shared.client, "http://me:s3cret@127.0.0.1:1")


# A server that was there, and is away.


def test_a_server_that_scored_before_is_waited_for(scripted, monkeypatch, caplog):
  monkeypatch.setattr(connection, "OUTAGE_WAIT", 0.001)
  server = scripted(RIGHT, 0.0, 0.0, (503, b""), (502, b""), 0.0, RIGHT)
  reward = shared.client(server.url, retries=1)
  for _ in range(2):
    np.testing.assert_array_equal(reward(shared.numbered(2)).values, [0, 1])
  away, again = [record.getMessage() for record in caplog.records]
  assert "waiting up to 300 s for it" in away and "answers again" in again
  assert len(server.seen) == 7


def test_an_outage_has_an_end_and_counts_once(scripted, monkeypatch):
  monkeypatch.setattr(connection, "OUTAGE_WAIT", 0.001)
  server = scripted(RIGHT, 0.0)
  reward = shared.client(server.url, retries=1, outage=0.3)
  reward(shared.numbered(1))
  start = time.monotonic()
  scores = reward(shared.numbered(1))
  assert time.monotonic() - start >= 0.3 and len(server.seen) > 4
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert scores.temporary and "no answer" in scores.reason
  seen = len(server.seen)
  assert "attempts: 2" in reward(shared.numbered(1)).reason and len(server.seen) == seen + 2


def test_a_server_that_is_there_but_fails_is_not_waited_for(scripted):
  server = scripted(RIGHT, FAILED)
  reward = shared.client(server.url, retries=1)
  reward(shared.numbered(1))
  scores = reward(shared.numbered(1))
  assert len(server.seen) == 3 and scores.temporary and "out of memory" in scores.reason


@pytest.mark.parametrize(
  ("answer", "temporary"),
  [((404, b""), False), ((200, b"<html>"), False), ((429, b""), True), ((504, b""), True)],
)
def test_what_may_be_scored_later(scripted, answer, temporary):
  assert shared.client(scripted(answer).url, retries=0)(shared.numbered(1)).temporary == temporary


def test_closing_ends_the_wait_for_an_answer(scripted):
  reward = shared.client(scripted(60.0).url, timeout=60)
  threading.Timer(0.2, reward.close).start()
  start = time.monotonic()
  np.testing.assert_array_equal(reward(shared.numbered(1)).values, [shared.NAN])
  assert time.monotonic() - start < 10


def test_an_answer_that_breaks_off_may_be_whole_the_next_time(scripted, monkeypatch):
  server = scripted(RIGHT)
  send = shared.Script.end_headers
  monkeypatch.setattr(shared.Script, "end_headers", lambda self: (
    self.send_header("Content-Length", "500"), send(self)
  ))
  scores = shared.client(server.url, retries=0)(shared.numbered(1))
  assert scores.temporary and "broke off" in scores.reason


def test_failures_leave_no_sockets_open(scripted):
  reward = shared.client(scripted((200, b"[" * 100_000), FAILED, 0.0).url, retries=3, outage=0)
  gc.disable()
  try:
    before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    for _ in range(5):
      reward(shared.numbered(1))
    time.sleep(0.2)  # The server's ends.
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) <= before + 2
  finally:
    gc.enable()
