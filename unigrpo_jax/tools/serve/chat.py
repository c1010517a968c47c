"""Requests and answers of the OpenAI protocol, as far as a BAGEL can answer them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
import json
import time
from typing import Any
import uuid

import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.rewards import wire
from unigrpo_jax.tools.serve import batches

# Keys that are not supported, with the values that are accepted because they change nothing.
WITHOUT = {
  "n": (1,), "stream": (False,), "top_p": (1,), "stop": ([],), "tools": ([],),
  "response_format": ({"type": "text"},), "frequency_penalty": (0,), "presence_penalty": (0,),
  "logit_bias": ({},),
}
_MESSAGE = (
  'messages must be one: {"role": "user", "content": text, or a list of {"type": "text"} and at '
  'most one {"type": "image_url"}}'
)


class NoModel(Exception):
  """A request names a model that this server does not have."""


def read(body: bytes, model: str, max_tokens: int) -> batches.Question:
  """Reads the question in a request's body.

  Args:
    body: any bytes.
    model: the only model's name.
    max_tokens: largest and default length limit of an answer.

  Raises:
    NoModel: the request names another model.
    InputError: it is malformed, or asks for something that is not supported; one line says what.
  """
  try:
    given = json.loads(body)
  except (ValueError, RecursionError):
    given = None
  if not isinstance(given, dict):
    raise errors.InputError("the body is not a JSON object")
  if given.get("model", model) != model:
    raise NoModel(f"no model {errors.shown(given['model'])}; there is {model}")
  for key, allowed in WITHOUT.items():
    if given.get(key) is not None and given[key] not in allowed:
      raise errors.InputError(f"{key}={errors.shown(given[key])} is not supported; leave it out")
  text, image = _read_message(given.get("messages"))
  seed = given.get("seed") or 0
  errors.require("seed", seed, integer=True)
  limits = (given.get("max_completion_tokens"), given.get("max_tokens"), max_tokens)
  most = next(limit for limit in limits if limit is not None)
  errors.require("max_tokens", most, low=1, high=max_tokens, integer=True)
  temperature = 1.0 if given.get("temperature") is None else given["temperature"]
  errors.require_temperature("temperature", temperature, high=2)
  request = requests_lib.Request(text, seed=seed % 2**32, image=image)
  return batches.Question(request, most, float(temperature), _read_top(given))


def _read_top(given: Mapping[str, Any]) -> int | None:
  """`Question.top` of a request."""
  top, wanted = given.get("top_logprobs"), given.get("logprobs") or False
  if not isinstance(wanted, bool):
    raise errors.InputError(f"logprobs={errors.shown(wanted)} must be true or false")
  errors.require("top_logprobs", top, low=0, high=batches.TOP, integer=True)
  if top is not None and not wanted:
    raise errors.InputError("top_logprobs needs logprobs=true")
  return (top or 0) if wanted else None


def _read_message(messages: Any) -> tuple[str, PIL.Image.Image | None]:
  """(text, picture or None) of a request's only message."""
  try:
    (message,) = messages
    content = message["content"]
    if message["role"] != "user" or not isinstance(content, str | list):
      raise TypeError
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [part["text"] for part in parts if part["type"] == "text"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    if len(texts) + len(urls) < len(parts) or len(urls) > 1:
      raise TypeError
    if not all(isinstance(item, str) for item in texts + urls):
      raise TypeError
  except (TypeError, KeyError, ValueError):
    raise errors.InputError(_MESSAGE) from None
  return "\n".join(texts), _read_image(urls[0]) if urls else None


def _read_image(url: str) -> PIL.Image.Image:
  """The picture in a data URL."""
  head, _, data = url.partition(";base64,")
  if head not in ("data:image/png", "data:image/jpeg"):
    raise errors.InputError(
      f"image_url={errors.shown(url[:60])} must be a data URL: data:image/png;base64,... or "
      "data:image/jpeg;base64,...; nothing is fetched"
    )
  try:
    return PIL.Image.fromarray(wire.decode(base64.b64decode(data, validate=True)))
  except binascii.Error as error:
    raise errors.InputError(f"image_url is not base64: {error}") from None
  except ValueError as error:
    raise errors.InputError(f"image_url: {error}") from None


def write(
  question: batches.Question, answer: batches.Answer, model: str,
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
  """The chat completion, as JSON values, for an answer to a question."""
  logprobs = None
  if question.top is not None:
    logprobs = {"content": [
      _token(tokenizer, pairs, token, question.top)
      for pairs, token in zip(answer.top, (*answer.ids, tokenizer.im_end))
    ]}
  return {
    "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
    "model": model,
    "choices": [{
      "index": 0, "message": {"role": "assistant", "content": answer.text}, "logprobs": logprobs,
      "finish_reason": "stop" if answer.finished else "length",
    }],
    "usage": {
      "prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.ids),
      "total_tokens": answer.prompt_tokens + len(answer.ids),
    },
  }


def _token(
  tokenizer: tokenizer_lib.Tokenizer, pairs: tuple[tuple[int, float], ...], token: int, top: int
) -> dict[str, Any]:
  """The entry of a token in "logprobs".

  `pairs` are the likeliest (id, log-probability). A sampled token that is not among them gets the
  least of their log-probabilities, an upper bound of its own.
  """
  def entry(item: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([item])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

  own = dict(pairs).get(token, min(logprob for _, logprob in pairs))
  return entry(token, own) | {"top_logprobs": [entry(*pair) for pair in pairs[:top]]}
