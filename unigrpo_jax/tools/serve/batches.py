"""Answers questions of many threads by one model; questions that wait together are batched."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent import futures
import dataclasses
import logging
import threading
from typing import NamedTuple

from unigrpo_jax import errors
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.episodes import requests as requests_lib

_log = logging.getLogger(__name__)

TOP = 20  # Number of likeliest tokens that are recorded; always, so that one program is enough.


@dataclasses.dataclass(frozen=True)
class Question:
  """A request and how it is sampled.

  Attributes:
    request: for the pipeline.
    max_tokens: length limit of the answer.
    temperature: of sampling; 0 is greedy.
    top: number of likeliest tokens to report for each token of the answer, at most `TOP`; None: no
      probabilities at all.
    exact: whether `max_tokens` is the program's limit too; see `settings`.
  """

  request: requests_lib.Request
  max_tokens: int = 1024
  temperature: float = 1.0
  top: int | None = None
  exact: bool = False

  @property
  def settings(self) -> requests_lib.Settings:
    """Settings of the pipeline. Lengths are rounded up to a power of two: each compiles a program.
    """
    most = self.max_tokens if self.exact else power_of_two(self.max_tokens)
    return requests_lib.Settings(
      understand=True, max_tokens=most, temperature=self.temperature, top=TOP
    )


@dataclasses.dataclass(frozen=True)
class Answer:
  """The model's answer.

  Attributes:
    text: the answer, decoded.
    ids: its tokens, without the terminator.
    top: the `TOP` likeliest (id, log-probability) pairs at each token; for an empty answer those at
      the terminator.
    finished: whether it ended by its terminator; False: it was cut.
    prompt_tokens: length of the question, including the picture's patches.
  """

  text: str
  ids: tuple[int, ...]
  top: tuple[tuple[tuple[int, float], ...], ...]
  finished: bool
  prompt_tokens: int


class Gone(Exception):
  """Nobody waits for the answer any more."""


class _Waiting(NamedTuple):
  """A question, what its answer is put into, and whether its client has gone."""

  question: Question
  answer: futures.Future
  has_gone: Callable[[], bool]


class Batches:
  """Runs a pipeline in a thread of its own, which batches the questions that are waiting."""

  def __init__(self, pipeline: pipeline_lib.Pipeline, batch_size: int):
    """Starts the thread; `batch_size` is the largest number of questions of a batch."""
    self.pipeline, self._batch_size = pipeline, batch_size
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._changed = threading.Condition()
    threading.Thread(target=self._work, name="batches", daemon=True).start()

  def ask(self, question: Question, has_gone: Callable[[], bool] = lambda: False) -> Answer:
    """Waits for the answer to a question.

    Args:
      question: what is asked.
      has_gone: asked when the question's turn has come: whether nobody waits for it any more.

    Raises:
      Gone: nobody did, so it was not answered.
      InputError: the request is impossible: too long, or its picture too narrow.
      RuntimeError: the model failed.
    """
    # Prepared alone first, since an impossible request would make its whole batch fail.
    try:
      alone = self.pipeline.prepare([question.request], question.settings)
    except errors.InputError:  # Maybe only the rounded length has no room.
      question = dataclasses.replace(question, exact=True)
      alone = self.pipeline.prepare([question.request], question.settings)
    tokens = sum(int(text.mask[0].sum()) for text in alone.texts.values())
    tokens += 0 if alone.patches is None else int(alone.patches.mask[0].sum()) + 2
    future: futures.Future = futures.Future()
    with self._changed:
      self._waiting.append(_Waiting(question, future, has_gone))
      self._changed.notify()
    return self._answer(question, future.result(), tokens)

  def _answer(self, question: Question, result: pipeline_lib.Result, tokens: int) -> Answer:
    """The answer of a result, cut to the question's `max_tokens`."""
    ids = result.ids[:-1] if result.finished else result.ids
    finished = result.finished and len(result.ids) <= question.max_tokens
    text = result.text
    if len(ids) > question.max_tokens:  # The program's limit is a power of two.
      ids = ids[: question.max_tokens]
      text = self.pipeline.network.tokenizer.decode(ids)
    return Answer(text, ids, result.top[: max(len(ids), 1)], finished, tokens)

  def _work(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting)
        batch = self._take()
      try:
        if batch:
          self._run(batch)
      except Exception as error:
        _log.warning("a batch failed", exc_info=error)
        for item in batch:
          item.answer.set_exception(RuntimeError(errors.describe(error)))

  def _take(self) -> list[_Waiting]:
    """Removes and returns the first waiting question, with others that fit into one batch with it.

    Questions of clients that have gone are not returned: they would only delay the next ones.
    """
    key = lambda item: (item.question.settings, item.question.request.image is None)
    taken, others = [], collections.deque()
    for item in self._waiting:
      if len(taken) == self._batch_size or taken and key(item) != key(taken[0]):
        others.append(item)
      elif item.has_gone():
        item.answer.set_exception(Gone())
      else:
        taken.append(item)
    self._waiting = others
    return taken

  def _run(self, batch: list[_Waiting]) -> None:
    requests = [item.question.request for item in batch]
    # Filled up to a power of two, since each number of rows compiles a program.
    rows, settings = power_of_two(len(requests)), batch[0].question.settings
    results = self.pipeline.run(self.pipeline.prepare(requests, settings, rows))
    for item, result in zip(batch, results):
      item.answer.set_result(result)


def power_of_two(count: int) -> int:
  """The smallest power of two that is at least `count`."""
  return 1 << (count - 1).bit_length()
