"""Questions of many threads, answered by one model: those that wait together, together."""

from __future__ import annotations

import collections
from concurrent import futures
import dataclasses
import logging
import threading

from unigrpo_jax import errors
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.episodes import requests as requests_lib

_log = logging.getLogger(__name__)

TOP = 20  # Likeliest tokens that are recorded, at most; always, so that there is one program.


@dataclasses.dataclass(frozen=True)
class Question:
  """A request and how it is sampled.

  Attributes:
    request: of the pipeline.
    max_tokens: of the answer.
    temperature: 0 is greedy.
    top: likeliest tokens to tell of each token of the answer, at most `TOP`; None: not even its
      own probability.
  """

  request: requests_lib.Request
  max_tokens: int = 1024
  temperature: float = 1.0
  top: int | None = None

  @property
  def settings(self) -> requests_lib.Settings:
    """With room for a power of two of tokens: each number is a program of its own."""
    return requests_lib.Settings(
      understand=True, max_tokens=power_of_two(self.max_tokens), temperature=self.temperature,
      top=TOP,
    )


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said.

  Attributes:
    text: decoded.
    ids: of it, without the terminator.
    top: the likeliest (id, log-probability) pairs, `TOP` of each id; of the terminator where the
      answer is empty.
    finished: whether it ended by itself.
    prompt_tokens: of the question, its picture's patches included.
  """

  text: str
  ids: tuple[int, ...]
  top: tuple[tuple[tuple[int, float], ...], ...]
  finished: bool
  prompt_tokens: int


class Batches:
  """Runs a pipeline in one thread, which takes what waits whenever it is free."""

  def __init__(self, pipeline: pipeline_lib.Pipeline, batch_size: int):
    self.pipeline, self._batch_size = pipeline, batch_size
    self._waiting: collections.deque[tuple[Question, futures.Future]] = collections.deque()
    self._changed = threading.Condition()
    threading.Thread(target=self._work, name="batches", daemon=True).start()

  def ask(self, question: Question) -> Answer:
    """Waits for the answer.

    Raises:
      InputError: the request is impossible: too long, or its picture too narrow.
      RuntimeError: the model failed.
    """
    # Alone first: one that is impossible would take its batch with it.
    alone = self.pipeline.prepare([question.request], question.settings)
    tokens = sum(int(text.mask[0].sum()) for text in alone.texts.values())
    tokens += 0 if alone.patches is None else int(alone.patches.mask[0].sum()) + 2
    future: futures.Future = futures.Future()
    with self._changed:
      self._waiting.append((question, future))
      self._changed.notify()
    return self._answer(question, future.result(), tokens)

  def _answer(self, question: Question, result: pipeline_lib.Result, tokens: int) -> Answer:
    ids = result.ids[:-1] if result.finished else result.ids
    finished = result.finished and len(result.ids) <= question.max_tokens
    text = result.text
    if len(ids) > question.max_tokens:  # The program had more room.
      ids = ids[: question.max_tokens]
      text = self.pipeline.network.tokenizer.decode(ids)
    return Answer(text, ids, result.top[: max(len(ids), 1)], finished, tokens)

  def _work(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting)
        batch = self._take()
      try:
        self._run(batch)
      except Exception as error:
        _log.warning("a batch failed", exc_info=error)
        for _, future in batch:
          future.set_exception(RuntimeError(errors.describe(error)))

  def _take(self) -> list[tuple[Question, futures.Future]]:
    """The first that waits and those that can run with it, in their order."""
    key = lambda question: (question.settings, question.request.image is None)
    first = key(self._waiting[0][0])
    taken, others = [], collections.deque()
    for item in self._waiting:
      fits = len(taken) < self._batch_size and key(item[0]) == first
      (taken if fits else others).append(item)
    self._waiting = others
    return taken

  def _run(self, batch: list[tuple[Question, futures.Future]]) -> None:
    requests = [question.request for question, _ in batch]
    # Filled up to a power of two: each number of rows is a program of its own.
    rows = power_of_two(len(requests))
    results = self.pipeline.run(self.pipeline.prepare(requests, batch[0][0].settings, rows))
    for (_, future), result in zip(batch, results):
      future.set_result(result)


def power_of_two(count: int) -> int:
  """The least one that is not below `count`."""
  return 1 << (count - 1).bit_length()
