"""Questions about pictures as requests by the OpenAI protocol."""

from __future__ import annotations

import base64
from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import threading
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.rewards import connection, exchange, wire
from unigrpo_jax.rewards.judge import answers, forms

TOP = 20  # Number of likeliest first tokens to ask for; the default of vLLM's --max-logprobs.
ANSWER = 8 << 20  # Most bytes of an answer.


class Picture:
  """A sample's picture as a data URL, which is encoded once, when it is first needed."""

  def __init__(self, image: np.ndarray, encoding: str, max_side: int):
    """Encodes nothing yet.

    Args:
      image: [H, W, 3] uint8.
      encoding: "png" or "jpeg".
      max_side: pixels to which the longer side is reduced; 0: not at all.
    """
    self._image, self._encoding, self._max_side = image, encoding, max_side
    self._lock = threading.Lock()

  @property
  def url(self) -> str:
    with self._lock:
      return self._url

  @functools.cached_property
  def _url(self) -> str:
    image = self._image
    if self._max_side and max(image.shape[:2]) > self._max_side:
      smaller = PIL.Image.fromarray(image)
      smaller.thumbnail((self._max_side,) * 2, PIL.Image.Resampling.BICUBIC)
      image = np.asarray(smaller)
    file = base64.b64encode(wire.encode(image, self._encoding)).decode()
    return f"data:image/{self._encoding};base64,{file}"

  def digest(self, *what: Any) -> str:
    """A hash (32 hexadecimal digits) of the pixels, their shape and `what`, as JSON."""
    text = json.dumps([self._image.shape, *what], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(np.ascontiguousarray(self._image))
    return digest.hexdigest()


@dataclasses.dataclass(eq=False)
class Chat:
  """A model on a server, or on several equal ones.

  Attributes:
    client: of the servers, whose URLs end in /v1.
    model: its name there.
    token_key: key for the limit of tokens in a request; newer models of OpenAI need
      "max_completion_tokens".
    text_first: whether the text precedes the picture.
    extra: further keys of a request, which override the others.
  """

  client: connection.Client
  model: str
  token_key: str = "max_tokens"
  text_first: bool = False
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  _takes_schemas: bool = True  # until the server refuses one

  def ask(
    self, picture: Picture, question: forms.Question, seed: int, end: float | None
  ) -> answers.Reply:
    """Asks one question about a picture.

    A server that refuses JSON schemas is asked again, and from then on, without them.

    Args:
      picture: to look at.
      question: to ask.
      seed: of the request.
      end: value of `time.monotonic()` at which to give up; None: never.

    Raises:
      exchange.Failed: there is no answer.
      Unreadable: the answer is no chat completion.
    """
    try:
      return self._post(picture, question, seed, end)
    except exchange.Failed as error:
      if not (error.status == 400 and question.schema and b"response_format" in error.answer):
        raise
      self._takes_schemas = False
      return self._post(picture, question, seed, end)

  def _post(self, picture, question: forms.Question, seed: int, end) -> answers.Reply:
    content = [
      {"type": "image_url", "image_url": {"url": picture.url}},
      {"type": "text", "text": question.text},
    ]
    body = {
      "model": self.model, "temperature": 0, "seed": seed, self.token_key: question.max_tokens,
      "messages": [{"role": "user", "content": content[::-1] if self.text_first else content}],
    }
    if question.logprobs:
      body |= {"logprobs": True, "top_logprobs": TOP}
    if question.schema and self._takes_schemas:
      schema = {"name": "answers", "strict": True, "schema": question.schema}
      body["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = self.client.request(
      "POST", "/chat/completions", json.dumps(body | dict(self.extra)).encode(),
      headers={"Content-Type": "application/json"}, limit=ANSWER, end=end,
    )
    try:
      parsed = json.loads(answer)
    except (ValueError, RecursionError):
      raise answers.Unreadable("the answer is not JSON") from None
    return answers.Reply.parse(parsed)


def only_model(client: connection.Client, end: float | None = None) -> str:
  """The name of the only model of a server.

  Raises:
    InputError: it has none, or several.
    exchange.Failed: it did not answer.
  """
  try:
    names = [model["id"] for model in json.loads(client.request("GET", "/models", end=end))["data"]]
  except (ValueError, KeyError, TypeError, RecursionError):
    names = []
  if len(names) != 1:
    raise errors.InputError(
      f"{client.urls[0]}/models lists {errors.shown(names)}; name one of them as the option model"
    )
  return names[0]
