"""The reward server: in a thread against bare requests and clients, and as a command."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests import reward_requests as shared
from tests.refusals import refusal
from unigrpo_jax import errors, rewards
from unigrpo_jax.iconworld import prompts, renderer
from unigrpo_jax.rewards import arguments, base, listening, serve, wire

ROOT = pathlib.Path(__file__).parents[1]


def ask(server, method, path, body=None, **headers):
  """(status, answer) of a bare request."""
  connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
  try:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())
  finally:
    connection.close()


def world():
  rng = np.random.default_rng(0)
  examples = prompts.fixed("test", 6)
  return [
    rewards.Sample(e.prompt, renderer.render(examples[i // 2].scene, rng), e.reasoning, e.metadata)
    for i, e in enumerate(examples)
  ]


def test_round_trip_equals_local_scores(serving):
  names = ("iconworld_strict", "iconworld_soft", "iconworld_reasoning", "jpeg_size")
  local = {name: rewards.make(name) for name in names}
  server = serving(local)
  remote = {
    name: rewards.make("http", url=server.address + "/", reward=name, batch_size=4)
    for name in names
  }
  one = rewards.Scorer(remote, dict.fromkeys(names, 1.0), threads=4)
  samples = world()
  scores = one.score(samples)
  one.close()
  assert all(failures.count == 0 for failures in one.failures.values())
  for name in names:
    np.testing.assert_array_equal(scores[name], local[name](samples))
  assert set(scores["iconworld_strict"]) == {0, 1}


def test_what_cannot_score_is_refused_before_anything_is_drawn(serving):
  server = serving({"red": shared.value, "blue": shared.value})

  def ready(url, name, weight=1.0, **options):
    made = {name: rewards.make("http", url=url, reward=name, retries=0, **options)}
    rewards.Scorer(made | {"other": shared.value}, {name: weight, "other": 1.0}).ready()

  ready(server.address, "red")
  message = f"reward='rde' is none of those of {server.address}, which has blue, red"
  assert refusal(ready, server.address, "rde") == message
  assert refusal(ready, server.address, "rde", time_limit=5.0) == message
  ready(server.address, "rde", weight=0.0)  # It is only logged.
  with pytest.raises(errors.Unavailable, match="^reward red: http://127.*; start its server"):
    ready("http://127.0.0.1:1", "red")
  with pytest.raises(errors.InputError, match="reward red: .* status 401"):
    ready(serving({"red": shared.value}, token="t0ken").address, "red", token="other")


def test_what_there_is_to_get(serving):
  server = serving({"b": shared.value, "a": shared.value}, token="t0ken")
  assert ask(server, "GET", "/healthz") == (200, {"status": "ok"})
  status, answer = ask(server, "GET", "/v1/rewards")
  assert status == 401
  token = {"Authorization": "Bearer t0ken"}
  assert ask(server, "GET", "/v1/rewards", **token) == (200, {
    "rewards": ["a", "b"], "encodings": ["raw", "png", "jpeg"], "settings": {}
  })
  assert ask(server, "GET", "/v2/rewards", **token)[0] == 404


def test_tokens(serving, capfd):
  server = serving({"r": shared.value}, token="t0ken")
  reward = shared.client(server.address, token="t0ken")
  np.testing.assert_array_equal(reward(shared.numbered(2)).values, [0, 1])
  for token in (None, "t0ke", "t0kenn", "T0KEN"):
    reward = shared.client(server.address, token=token)
    scores = reward(shared.numbered(2))
    np.testing.assert_array_equal(scores.values, [shared.NAN] * 2)
    assert "status 401" in scores.reason
  assert ask(server, "GET", "/v1/rewards", Authorization="Bearer \xff")[0] == 401
  output = capfd.readouterr()
  assert "401" in output.err and "t0ken" not in (output.out + output.err).lower()


def test_malformed_bodies_do_not_kill_the_server(serving):
  server = serving({"r": shared.value})
  for name, (words, body) in shared.MALFORMED.items():
    status, answer = ask(server, "POST", "/v1/rewards/r", body)
    assert status == 400 and list(answer) == ["error"], name
    assert words in answer["error"] and "\n" not in answer["error"]
    assert len(answer["error"]) <= 500
  np.testing.assert_array_equal(shared.client(server.address)(shared.numbered(2)).values, [0, 1])


def raw(server, content):
  """The server's answer to bytes, after which the client sends nothing more."""
  with socket.create_connection(server.server_address[:2], timeout=10) as connection:
    connection.sendall(content)
    connection.shutdown(socket.SHUT_WR)
    return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


@pytest.mark.parametrize(
  ("headers", "status"),
  [
    ("", 411), ("Transfer-Encoding: chunked\r\n", 411), ("Content-Length: -5\r\n", 400),
    ("Content-Length: many\r\n", 400), (f"Content-Length: {'9' * 30}\r\n", 400),
    ("Content-Length: 500\r\n", 400), ("Content-Length: 999999999999\r\n", 413),
  ],
)
def test_lengths(serving, headers, status):
  server = serving({"r": shared.value})
  answer = raw(server, f"POST /v1/rewards/r HTTP/1.1\r\n{headers}\r\nabc".encode())
  assert answer.split()[1] == str(status)
  np.testing.assert_array_equal(shared.client(server.address)(shared.numbered(1)).values, [0])


def test_oversized_is_413_and_heard_by_the_client(serving):
  # Larger than the buffers of a socket, so that the answer comes while the client still sends.
  server = serving({"r": shared.value}, max_bytes=10_000)
  samples = [rewards.Sample("", np.zeros((2000, 2000, 3), np.uint8))]
  reward = shared.client(server.address)
  scores = reward(samples)
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert "status 413" in scores.reason and "10000" in scores.reason
  np.testing.assert_array_equal(reward(shared.numbered(1)).values, [0])


def test_a_client_that_is_refused_may_finish_speaking(serving):
  server = serving({"r": shared.value}, max_bytes=10_000)
  length = 20_000_000
  head = f"POST /v1/rewards/r HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()
  assert raw(server, head + bytes(length)).split()[1] == "413"


def test_unknown_rewards_are_404_with_the_names(serving):
  server = serving({"m:f": shared.value})
  reward = shared.client(server.address, reward="other")
  scores = reward(shared.numbered(1))
  np.testing.assert_array_equal(scores.values, [shared.NAN])
  assert "status 404" in scores.reason and "m:f" in scores.reason
  reward = shared.client(server.address, reward="m:f")
  np.testing.assert_array_equal(reward(shared.numbered(1)).values, [0])


def test_a_reward_that_raises_is_500_and_nan_is_null(serving, capfd):
  failing = [True]

  def moody(samples):
    if failing:
      failing.clear()
      raise RuntimeError("the model is not loaded")
    return [shared.NAN, np.inf, 0.1]

  server = serving({"r": moody})
  status, answer = ask(server, "POST", "/v1/rewards/r", wire.pack(shared.numbered(3)))
  assert status == 500 and "RuntimeError: the model is not loaded" in answer["error"]
  assert "Traceback" in capfd.readouterr().err
  status, answer = ask(server, "POST", "/v1/rewards/r", wire.pack(shared.numbered(3)))
  assert (status, answer) == (200, {"scores": [None, None, float(np.float32(0.1))]})


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()])
def test_a_reward_that_ends_programs_is_500_and_the_server_goes_on(serving, capfd, error):
  failing = [error]

  def ending(samples):
    if failing:
      raise failing.pop()
    return shared.value(samples)

  server = serving({"r": ending})
  status, answer = ask(server, "POST", "/v1/rewards/r", wire.pack(shared.numbered(2)))
  assert status == 500 and type(error).__name__ in answer["error"]
  status, answer = ask(server, "POST", "/v1/rewards/r", wire.pack(shared.numbered(2)))
  assert (status, answer) == (200, {"scores": [0, 1]})


def test_a_served_reward_may_have_a_time_limit(serving, capfd):
  go = threading.Event()
  server = serving({"r": base.TimeLimited(lambda samples: go.wait(60), 0.1), "q": shared.value})
  for words in ("it took longer than time_limit=0.1 s", "still runs"):
    status, answer = ask(server, "POST", "/v1/rewards/r", wire.pack(shared.numbered(1)))
    assert status == 500 and words in answer["error"]
  assert ask(server, "POST", "/v1/rewards/q", wire.pack(shared.numbered(1)))[0] == 200
  go.set()


def test_requests_come_together_and_a_reward_is_called_one_at_a_time(serving):
  inside, most = [], []

  def counting(samples):
    inside.append(1)
    most.append(len(inside))
    time.sleep(0.01)
    inside.pop()
    return shared.value(samples)

  server = serving({"r": counting})
  one = rewards.Scorer({"r": shared.client(server.address)}, {"r": 1.0}, threads=8)
  samples = shared.numbered(16)
  pending = [one.submit(samples[i : i + 2]) for i in range(0, 16, 2)]
  for i, future in enumerate(pending):
    np.testing.assert_array_equal(future.result(10)["r"], [2 * i, 2 * i + 1])
  one.close()
  assert max(most) == 1 and len(most) == 8


def test_what_a_client_no_longer_waits_for_is_not_scored(serving, capfd):
  begun, go, scored = threading.Event(), threading.Event(), []

  def slow(samples):
    begun.set()
    go.wait(10)
    scored.append([sample.prompt for sample in samples])
    return shared.value(samples)

  server, samples = serving({"r": slow}), shared.numbered(3)
  patient = rewards.Scorer({"r": shared.client(server.address)}, {"r": 1.0})
  pending = patient.submit(samples[:1])
  assert begun.wait(10)
  gone = shared.client(server.address, timeout=0.2, retries=0, outage=0)(samples[1:2])
  assert "no answer within timeout=0.2 s" in gone.reason
  later = patient.submit(samples[2:])
  go.set()
  assert pending.result(10)["r"] == [0] and later.result(10)["r"] == [2]
  patient.close()
  assert [samples[1].prompt] not in scored and len(scored) == 2
  assert "did not wait for its turn" in capfd.readouterr().err


def test_a_body_that_drips_in_is_given_up(serving, monkeypatch):
  """Each byte comes in time, but not all of them."""
  monkeypatch.setattr(listening.Handler, "timeout", 2.0)
  server = serving({"r": shared.value})
  with socket.create_connection(server.server_address[:2], timeout=10) as connection:
    connection.sendall(b"POST /v1/rewards/r HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(3):
      time.sleep(0.5)
      connection.sendall(b"x")
    # A second before the last byte would be too long ago.
    answer = b"".join(iter(lambda: connection.recv(1000), b""))
  assert answer.split()[1] == b"400" and b"the body ended after" in answer


@pytest.mark.parametrize("token, status", [(None, "403"), ("t0ken", "200")])
def test_web_pages_are_not_answered_without_a_token(serving, token, status):
  server = serving({"r": shared.value}, token=token)
  head = "GET /v1/rewards HTTP/1.1\r\nAuthorization: Bearer t0ken\r\n"
  assert raw(server, f"{head}\r\n".encode()).split()[1] == "200"
  answer = raw(server, f"{head}Origin: http://evil.example\r\n\r\n".encode())
  assert answer.split()[1] == status


def test_others_need_a_token():
  for host in ("0.0.0.0", "::", "", "10.0.0.1", "example.com"):
    assert "--token_env" in refusal(serve.Server, {"r": shared.value}, host=host)
  serve.Server({"r": shared.value}, host="0.0.0.0", token="t0ken").server_close()
  serve.Server({"r": shared.value}, host="localhost").server_close()
  for host in ("a..b", "\xe9..x"):
    assert "--host=" in refusal(serve.Server, {"r": shared.value}, host=host, token="t0ken")


def test_a_port_that_is_taken(serving):
  server = serving({"r": shared.value})
  port = server.server_address[1]
  assert f"--port={port}" in refusal(serve.Server, {"r": shared.value}, port=port)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ([], "--rewards"),
    (["--rewards", "iconworld_strikt"], "did you mean 'iconworld_strict'?"),
    (["--rewards", "brightness", "brightness"], "twice"),
    (["--rewards", "http://127.0.0.1:9"], "write NAME=http://127.0.0.1:9"),
    (["--rewards", "brightness", "--port", "70000"], "--port=70000"),
    (["--rewards", "brightness", "--max_mb", "0"], "--max_mb=0"),
    (["--rewards", "brightness", "--host", "0.0.0.0"], "--token_env"),
    (["--rewards", "brightness", "--token_env", "UNSET_VARIABLE"], "UNSET_VARIABLE"),
    (["--rewards", "brightness", "--reward_options", "{"], "--reward_options"),
    (["--rewards", "brightness", "--reward_options", "[]"], "--reward_options"),
    (["--rewards", "brightness", "--reward_options", '{"jpeg_size": {}}'], "jpeg_size"),
    (["--rewards", "brightness", "--reward_options", "[" * 100_000], "--reward_options: not JSON"),
    (["--rewards", "a=jpeg_size", "--reward_options", '{"a": {"quality": 1}, "a": {}}'], "twice"),
    (["--rewards", "a=jpeg_size", "--reward_options", '{"a": {"qualty": 1}}'], "qualty"),
  ],
)
def test_bad_arguments(args, words):
  assert words in refusal(serve.main, args)


def test_a_url_is_a_served_reward(serving):
  """Of the same name there, unless its options say another."""
  address = serving({"r": shared.value}).address
  made = arguments.make([f"r={address}", f"other={address}"], '{"other": {"reward": "r"}}')
  samples = [rewards.Sample("", np.full((4, 4, 3), v, np.uint8)) for v in (3, 1, 2)]
  for reward in made.values():
    np.testing.assert_array_equal(reward(samples).values, shared.value(samples))


def test_names_and_options_of_the_command():
  made = arguments.make(["small=jpeg_size", "jpeg_size"], '{"small": {"quality": 5}}')
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  samples = [rewards.Sample("", noise)]
  assert made["small"](samples)[0] < made["jpeg_size"](samples)[0] / 2


@pytest.mark.parametrize(("number", "warm"), [(signal.SIGTERM, ["--warm"]), (signal.SIGINT, [])])
def test_the_command_serves_until_a_signal_stops_it(number, warm):
  process = subprocess.Popen(
    [sys.executable, "-m", "unigrpo_jax.rewards.serve", "--rewards", "brightness", "--port", "0",
     "--host", "0.0.0.0", "--token_env", "T", *warm],
    cwd=ROOT, env=os.environ | {"T": "t0ken"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )
  try:
    if warm:
      assert process.stdout.readline().startswith("loading on http://0.0.0.0:")
    line = process.stdout.readline()
    assert line.startswith("serving brightness on http://0.0.0.0:")
    url = f"http://127.0.0.1:{line.strip().rpartition(':')[2]}"
    reward = rewards.make("http", url=url, reward="brightness", token="t0ken", timeout=10)
    assert reward([rewards.Sample("", np.full((2, 2, 3), 255, np.uint8))]).values == [1]
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
  finally:
    process.kill()
    process.wait()
  assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_a_burst_of_connections_waits_to_be_taken():
  server = serve.Server({"r": shared.value})  # It takes none before it serves.
  with contextlib.ExitStack() as stack:
    stack.callback(server.server_close)
    for _ in range(100):
      stack.enter_context(socket.create_connection(server.server_address[:2], timeout=5))
