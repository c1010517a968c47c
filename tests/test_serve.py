"""The server of a BAGEL's understanding: its protocol, batches, refusals; with a fake pipeline."""

import base64
from concurrent import futures
import io
import json
import pathlib
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
import zlib

import numpy as np
import PIL.Image
import pytest

from tests.refusals import refusal
from unigrpo_jax import errors, rewards, serve
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.tools.serve import batches as batches_lib
from unigrpo_jax.tools.serve import chat, command

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ["yes", "no", "maybe", "<|im_end|>"]
END = 3


class FakePipeline:
  """Says how red a picture is: "yes yes ... " of as many words as the question has."""

  def __init__(self):
    tokenizer = types.SimpleNamespace(
      decode=lambda ids: " ".join(WORDS[i] for i in ids), im_end=END,
    )
    self.network = types.SimpleNamespace(tokenizer=tokenizer)
    self.batches, self.free, self.failure = [], threading.Event(), None
    self.free.set()
    self.begun = threading.Event()

  def prepare(self, requests, settings, rows=1):
    for request in requests:
      if "impossible" in request.prompt:
        raise errors.InputError("prompt 1 has 9 tokens, at most 3 fit")
    mask = np.ones((len(requests), 3), bool)
    text = types.SimpleNamespace(mask=mask)
    patches = None if requests[0].image is None else types.SimpleNamespace(mask=mask)
    return types.SimpleNamespace(
      texts={"prompt": text}, patches=patches, requests=requests, settings=settings, rows=rows
    )

  def run(self, batch):
    self.begun.set()
    self.free.wait(60)
    self.batches.append(batch)
    if self.failure is not None:
      raise self.failure
    return [self.result(request, batch.settings) for request in batch.requests]

  def result(self, request, settings):
    red = 0.5 if request.image is None else np.asarray(request.image)[..., 0].mean() / 255
    p = np.array([red, 1 - red, 1e-6]) * 0.99
    word, count = int(p.argmax()), len(request.prompt.split()) - 1
    pairs = tuple((i, float(np.log(q + 1e-9))) for i, q in enumerate(p))
    ids = ((word,) * count + (END,))[: settings.max_tokens]
    finished = ids[-1:] == (END,)
    text = self.network.tokenizer.decode(ids[:-1] if finished else ids)
    return pipeline_lib.Result(text, ids, finished, None, (pairs,) * len(ids))


@pytest.fixture
def served():
  pipeline = FakePipeline()
  server = command.Server("tiny", batches_lib.Batches(pipeline, 4), 64)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield types.SimpleNamespace(pipeline=pipeline, server=server, url=f"{server.address}/v1")
  server.shutdown()
  server.server_close()


def data_url(image, kind="PNG"):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, kind)
  return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


RED = np.full((8, 6, 3), (250, 0, 0), np.uint8)


def message(text="is it red?", image=RED):
  parts = [] if image is None else [{"type": "image_url", "image_url": {"url": data_url(image)}}]
  return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def ask(served, body, path="/chat/completions", headers=None):
  """(status, answer) of a POST; of a GET without a body."""
  data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
  request = urllib.request.Request(f"{served.url}{path}", data, headers or {})
  try:
    with urllib.request.urlopen(request, timeout=20) as answer:
      return answer.status, json.load(answer)
  except urllib.error.HTTPError as error:
    with error:
      return error.code, json.load(error)


def test_an_answer_with_its_probabilities(served):
  status, answer = ask(served, message() | {
    "model": "tiny", "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2,
    "user": "ignored",
  })
  assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "tiny"
  choice, = answer["choices"]
  assert choice["message"] == {"role": "assistant", "content": "yes yes"}
  assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["content"]) == 2
  first = choice["logprobs"]["content"][0]
  assert first["token"] == "yes" and len(first["top_logprobs"]) == 2
  assert first["bytes"] == list(b"yes")
  assert np.exp(first["logprob"]) == pytest.approx(250 / 255 * 0.99)
  assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}
  settings = served.pipeline.batches[0].settings
  assert settings.understand and (settings.max_tokens, settings.temperature) == (8, 0)


@pytest.mark.parametrize(("most", "text", "reason"), [
  (1, "yes", "length"), (2, "yes yes", "length"), (3, "yes yes yes", "length"),
  (4, "yes yes yes", "stop"),
])
def test_max_tokens_cut_an_answer(served, most, text, reason):
  for given in ({"max_tokens": most}, {"max_completion_tokens": most, "max_tokens": 64},
                {"max_completion_tokens": None, "max_tokens": most}):
    choice = ask(served, message("one two three four") | given)[1]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    assert choice["logprobs"] is None


def test_a_length_that_fits_though_the_next_power_of_two_does_not(served):
  """The fake model has room for 6 tokens of an answer."""
  prepare = served.pipeline.prepare

  def limited(requests, settings, rows=1):
    if settings.max_tokens > 6:
      raise errors.InputError(f"lower max_tokens={settings.max_tokens}")
    return prepare(requests, settings, rows)

  served.pipeline.prepare = limited
  assert ask(served, message() | {"max_tokens": 6})[0] == 200
  assert served.pipeline.batches[0].settings.max_tokens == 6
  status, answer = ask(served, message() | {"max_tokens": 7})
  assert status == 400 and "lower max_tokens=7" in answer["error"]["message"]


def test_requests_without_a_limit_fit_into_a_model_of_few_positions(monkeypatch):
  """By default; a limit of the command line holds."""
  made = []
  monkeypatch.setattr(command.pipeline_lib.Pipeline, "load", lambda *_, **__: None)
  monkeypatch.setattr(command.Server, "run", lambda server, _: made.append(server))
  for flags in ([], ["--max_tokens=9"]):
    command.run(serve.parse_args(["--checkpoint=tiny", "--port=0", *flags]))
    made[-1].server_close()
  assert [server.max_tokens for server in made] == [512, 9]
  pipeline = made[0].batches.pipeline
  question = chat.read(json.dumps(message()).encode(), "tiny", made[0].max_tokens)
  assert pipeline.prepare([question.request], question.settings).capacity < 1024


def test_text_alone_and_an_empty_answer(served):
  body = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 1}
  choice = ask(served, body)[1]["choices"][0]
  assert choice["message"]["content"] == "" and choice["finish_reason"] == "stop"
  assert choice["logprobs"]["content"][0]["token"] == "<|im_end|>"


def test_models_and_health(served):
  assert [m["id"] for m in ask(served, None, "/models")[1]["data"]] == ["tiny"]
  served.url = served.url.removesuffix("/v1")
  assert ask(served, None, "/healthz") == (200, {"status": "ok"})


def with_url(url):
  body = message()
  body["messages"][0]["content"][0]["image_url"]["url"] = url
  return body


def test_a_picture_is_seen_as_everywhere_else():
  """Transparency on white, and as its EXIF orientation turns it."""
  logo, upright = io.BytesIO(), io.BytesIO()
  PIL.Image.new("RGBA", (40, 60), (255, 0, 0, 0)).save(logo, "PNG")
  exif = PIL.Image.Exif()
  exif[PIL.ExifTags.Base.Orientation] = 6
  PIL.Image.new("RGB", (40, 60), "red").save(upright, "PNG", exif=exif)
  for file, size, color in ((logo, (40, 60), (255, 255, 255)), (upright, (60, 40), (255, 0, 0))):
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = chat._read_image(url)
    assert image.size == size and image.getpixel((0, 0)) == color


def bomb():
  """A PNG whose header says 50,000 x 50,000 pixels."""
  data = base64.b64decode(data_url(RED).partition(",")[2])
  header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + data[24:29]
  data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
  return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(("body", "status", "words"), [
  (b"{", 400, "not a JSON object"), ([], 400, "not a JSON object"), ({}, 400, "messages must be"),
  ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages must be one"),
  ({"messages": message()["messages"] * 2}, 400, "messages must be one"),
  ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages must be"),
  ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, 400, "messages"),
  (message() | {"model": "gpt"}, 404, "no model 'gpt'; there is tiny"),
  (message() | {"n": 2}, 400, "n=2 is not supported"),
  (message() | {"stream": True}, 400, "stream=True is not supported"),
  (message() | {"response_format": {"type": "json_object"}}, 400, "response_format="),
  (message() | {"max_tokens": 65}, 400, "max_tokens=65 must be at least 1 and at most 64"),
  (message() | {"max_tokens": "8"}, 400, "max_tokens='8' must be an integer"),
  (message() | {"temperature": -1}, 400, "temperature=-1"),
  (message() | {"temperature": 1e-30}, 400, "temperature=1e-30 must be at least 1e-06, or 0"),
  (message() | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
  (message() | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs=21"),
  (message() | {"logprobs": 3}, 400, "logprobs=3"), (message() | {"seed": "x"}, 400, "seed='x'"),
  (message("an impossible one"), 400, "at most 3 fit"),
  (with_url("http://example.com/a.png"), 400, "nothing is fetched"),
  (with_url("data:image/png;base64,@@"), 400, "not base64"),
  (with_url("data:image/png;base64,aGVsbG8="), 400, "an image is no PNG or JPEG"),
  (with_url(bomb()), 400, "pixels"),
], ids=str)
def test_requests_that_are_refused(served, body, status, words):
  found, answer = ask(served, body)
  assert found == status and words in answer["error"]["message"]
  assert "object at 0x" not in answer["error"]["message"]
  assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"] == status
  assert not served.pipeline.batches


def test_other_paths_and_a_model_that_fails(served):
  assert ask(served, {}, "/completions")[0] == ask(served, None, "/nothing")[0] == 404
  served.pipeline.failure = ValueError("out of memory")
  status, answer = ask(served, message())
  assert status == 500 and "out of memory" in answer["error"]["message"]
  served.pipeline.failure = None
  assert ask(served, message())[0] == 200


def test_requests_that_wait_together_are_a_batch(served):
  served.pipeline.free.clear()
  found = {}
  bodies = [message(image=np.full((4, 4, 3), 40 * i, np.uint8)) | {"max_tokens": 8}
            for i in range(6)] + [message() | {"max_tokens": 3}]
  workers = [
    threading.Thread(target=lambda i=i, body=body: found.update({i: ask(served, body)[1]}))
    for i, body in enumerate(bodies)
  ]
  workers[0].start()
  assert served.pipeline.begun.wait(20)  # The first runs alone; the others wait.
  for worker in workers[1:]:
    worker.start()
  end = time.monotonic() + 20
  while len(served.server.batches._waiting) < 6 and time.monotonic() < end:
    time.sleep(0.01)
  served.pipeline.free.set()
  for worker in workers:
    worker.join()
  texts = [found[i]["choices"][0]["message"]["content"] for i in range(7)]
  assert texts == ["no no"] * 4 + ["yes yes"] * 3
  # At most four together, and not with one of other settings.
  assert sorted(len(batch.requests) for batch in served.pipeline.batches) == [1, 1, 1, 4]
  assert sorted(batch.rows for batch in served.pipeline.batches) == [1, 1, 1, 4]


def test_questions_of_clients_that_have_gone_are_not_answered(served):
  served.pipeline.free.clear()
  with futures.ThreadPoolExecutor(3) as pool:
    first = pool.submit(ask, served, message("first"))
    assert served.pipeline.begun.wait(20)
    asked = served.server.batches
    question = chat.read(json.dumps(message("gone")).encode(), "tiny", 64)
    gone = pool.submit(asked.ask, question, lambda: True)
    _until(lambda: len(asked._waiting) == 1)
    last = pool.submit(ask, served, message("last"))
    _until(lambda: len(asked._waiting) == 2)
    served.pipeline.free.set()
    assert first.result()[0] == last.result()[0] == 200
    assert isinstance(gone.exception(), batches_lib.Gone)
  prompts = [request.prompt for batch in served.pipeline.batches for request in batch.requests]
  assert len(prompts) == 2 and not any("gone" in prompt for prompt in prompts)


def _until(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_token_is_asked_for_beyond_loopback():
  batches = batches_lib.Batches(FakePipeline(), 1)
  assert "give --token_env" in refusal(command.Server, "m", batches, 8, host="0.0.0.0")
  server = command.Server("m", batches, 8, token="t0ken")
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  try:
    served = types.SimpleNamespace(url=f"{server.address}/v1")
    assert ask(served, message())[0] == 401
    assert ask(served, message(), headers={"Authorization": "Bearer t0ken"})[0] == 200
  finally:
    server.shutdown()
    server.server_close()


def test_the_reward_judge_asks_this_server(served):
  judge = rewards.make("judge", url=served.url, form="p_yes")  # With its probe.
  blue = np.full((8, 8, 3), (0, 0, 255), np.uint8)
  points = {"points": ["is it red?", {"question": "is it blue?", "answer": "no"}]}
  samples = [rewards.Sample("a red square", image, None, points) for image in (RED, blue)]
  np.testing.assert_allclose(judge(samples).values, [250 / 255, 0], atol=1e-5)
  exam = rewards.make("judge", url=served.url, form="points_soft", probe=False)
  np.testing.assert_allclose(exam(samples).values, [0.495, 0.495], atol=0.01)
  judge.close()
  exam.close()


SLOW = """
import time
from unigrpo_jax import errors
from unigrpo_jax.rewards import listening

class Handler(listening.Handler):
  def get(self):
    print("begun", flush=True)
    time.sleep(1)
    return {"late": True}

errors.report(lambda: listening.Server(Handler).run("it"))
"""


def test_a_stopped_server_ends_after_what_it_answers():
  """Python aborts where it ends under native code of a thread, such as a compilation."""
  process = subprocess.Popen(
    [sys.executable, "-c", SLOW], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )
  try:
    url = process.stdout.readline().split()[-1]
    with futures.ThreadPoolExecutor(1) as pool:
      late = pool.submit(lambda: json.load(urllib.request.urlopen(url, timeout=20)))
      assert process.stdout.readline() == "begun\n"
      process.terminate()
      assert late.result() == {"late": True}
    out, err = process.communicate(timeout=20)
  finally:
    process.kill()
    process.wait()
  assert (process.returncode, out, err) == (0, "stopped\n", "")
