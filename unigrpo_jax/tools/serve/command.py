"""The server of `unigrpo_jax.serve`: a BAGEL that answers by the OpenAI protocol."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax.numpy as jnp

from unigrpo_jax import errors
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.models import bagel
from unigrpo_jax.reward_models import learned
from unigrpo_jax.rewards import connection, listening
from unigrpo_jax.tools.serve import batches as batches_lib
from unigrpo_jax.tools.serve import chat

MODELS, CHAT = "/v1/models", "/v1/chat/completions"
MAX_TOKENS = 1024  # Length limit of an answer, where the model has room for it.


class Server(listening.Server):
  """Serves a model under a name."""

  def __init__(self, name: str, batches: batches_lib.Batches, max_tokens: int, **options: Any):
    """Listens.

    Args:
      name: of the model.
      batches: answers questions.
      max_tokens: largest length limit of an answer.
      options: of `listening.Server`.
    """
    self.name, self.batches, self.max_tokens = name, batches, max_tokens
    super().__init__(Handler, **options)


class Handler(listening.Handler):
  """Answers one request."""

  server: Server

  def get(self) -> dict[str, Any]:
    if self.path != MODELS:
      raise listening.Refusal(404, f"no {self.path}; there are {MODELS} and {CHAT}")
    model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "unigrpo_jax"}
    return {"object": "list", "data": [model]}

  def post(self) -> dict[str, Any]:
    if self.path != CHAT:
      raise listening.Refusal(404, f"no {self.path}; there is {CHAT}")
    server, length = self.server, self.length("send a smaller picture")
    try:
      with server.bodies:
        question = chat.read(self.read(length), server.name, server.max_tokens)
      answer = server.batches.ask(question, self.has_gone)
    except chat.NoModel as error:
      raise listening.Refusal(404, str(error)) from None
    except errors.InputError as error:
      raise listening.Refusal(400, str(error)) from None
    except batches_lib.Gone:
      raise listening.Refusal(499, "the client did not wait for its turn") from None
    except RuntimeError as error:
      raise listening.Refusal(500, f"the model failed: {error}") from None
    return chat.write(question, answer, server.name, server.batches.pipeline.network.tokenizer)

  def error(self, status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def run(args: argparse.Namespace) -> None:
  """Loads the model and serves it until a signal."""
  is_embedded = args.checkpoint == learned.TINY
  pipeline = pipeline_lib.Pipeline.open(
    learned.TINY_FOLDER if is_embedded else args.checkpoint, adapter=args.adapter,
    dtype=args.dtype and jnp.dtype(args.dtype),
  )
  name = args.name or pathlib.PurePath(args.checkpoint).name
  most = args.max_tokens or min(MAX_TOKENS, pipeline.config.llm.max_positions // 2)
  server = Server(
    name, batches_lib.Batches(pipeline, args.batch_size), most, host=args.host,
    port=args.port, token=connection.read_token(None, args.token_env),
    max_bytes=args.max_mb << 20,
  )
  pipeline.load(("bagel",), without=bagel.DRAWING)
  server.run(name)
