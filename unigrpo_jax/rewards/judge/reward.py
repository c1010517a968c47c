"""The reward `judge`: asks a vision-language model on a server about each picture."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import logging
import pathlib
import threading
import time
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.rewards import base, connection, exchange, making, threads
from unigrpo_jax.rewards.judge import answers, cache, chat, forms

_log = logging.getLogger(__name__)

ENCODINGS = ("png", "jpeg")
SENDS_NO_MORE = {401, 403, 404}  # Statuses after which all further requests would fail alike.
_PROBE, _SAME = "Is the image red?", 0.01  # Probabilities that differ by less count as equal.
_RED, _BLUE = ((220, 20, 20), (20, 20, 220))
_OF_CHAT = ("token_key", "text_first", "extra")  # Fields of `chat.Chat` on which answers depend.


@making.register("judge")
class Judge:
  """Scores pictures by asking a model about them, on any server of the OpenAI protocol.

  A sample scores NaN if one of its questions has no readable answer; its details say why.
  Connections, retries and outages are those of `connection.Client`.

  Attributes:
    settings: what scores depend on, without options of the form that have their defaults.
    fingerprint: the same, with all options, as text.
    failures: {reason: number of questions without an answer} so far.
  """

  concurrent = True

  def __init__(
    self, *, url: str | Sequence[str], model: str = "", key_env: str | None = None,
    image: str = "png", max_side: int = 0, token_key: str = "max_tokens",
    text_first: bool | None = None, extra: Mapping[str, Any] | None = None, seed: int = 0,
    workers: int = 32, timeout: float = 120.0, retries: int = 3, backoff: float = 1.0,
    outage: float = 300.0, deadline: float = 600.0, reparse: int = 1, probe: bool = True,
    **form: Any,
  ):
    """Finds the model, and checks that it sees pictures.

    Args:
      url: URL of the server, ending in /v1; or a list of servers with the same model.
      model: its name; "": the server's only model.
      key_env: environment variable with the server's key; None: it needs none.
      image: how pictures are sent: "png" (exact) or "jpeg" of quality 95.
      max_side: pixels to which the longer side of pictures is reduced; 0: not at all.
      token_key, extra: see `chat.Chat`.
      text_first: see `chat.Chat`; None: as the form expects.
      seed: of the requests, whose temperature is 0.
      workers: most requests at the same time.
      timeout, retries, backoff, outage: see `connection.Client`.
      deadline: most seconds for all samples of a call; what is not answered by then is NaN.
      reparse: how often to repeat a question, with another seed, if its answer cannot be read.
      probe: ask about a red and a blue square first.
      form: see `forms.Options`.

    Raises:
      InputError: an option is wrong, or the model does not see pictures.
      Unavailable: the server does not answer.
    """
    errors.choose("image", image, ENCODINGS)
    errors.require("max_side", max_side, low=0, integer=True)
    errors.require("seed", seed, **errors.SEED, integer=True)
    errors.require("workers", workers, low=1, integer=True)
    errors.require("deadline", deadline, above=0, high=errors.MAX_SECONDS)
    errors.require("reparse", reparse, low=0, integer=True)
    unknown = set(form) - {field.name for field in dataclasses.fields(forms.Options)}
    if unknown:
      raise errors.InputError(f"judge has no option {', '.join(sorted(unknown))}")
    options = forms.Options(**form)
    self._form = forms.make(options)
    self._image, self._max_side, self._seed = image, max_side, seed
    self._deadline, self._reparse = deadline, reparse
    client = connection.Client(
      url, what="judge", timeout=timeout, retries=retries, backoff=backoff, outage=outage,
      token_env=key_env, seed=seed,
    )
    if text_first is None:
      text_first = options.form in forms.WISE
    self._cache: cache.Cache | None = None
    self._lock = threading.Lock()  # Over `failures`.
    self.failures: collections.Counter[str] = collections.Counter()
    try:
      model = model or chat.only_model(client, time.monotonic() + deadline)
      self._chat = chat.Chat(client, model, token_key, text_first, dict(extra or {}))
      if probe:
        self._probe(time.monotonic() + deadline)
    except exchange.Failed as error:
      temporary = isinstance(error, exchange.Temporary)
      raise (errors.Unavailable if temporary else errors.InputError)(str(error)) from None
    asked = {
      "model": model, "form": options.form,
      "template": {pathlib.Path(t.name).name: t.digest for t in self._form.templates},
      "image": image, "max_side": max_side, "seed": seed,
    } | {name: getattr(self._chat, name) for name in _OF_CHAT}
    given = dataclasses.asdict(options)
    defaults = dataclasses.asdict(forms.Options(template=options.template))
    self.settings = {key: given[key] for key in given if given[key] != defaults[key]} | asked
    self.fingerprint = json.dumps(given | asked, sort_keys=True)
    self._pool = threads.Pool(workers, "judge")

  def cache_in(self, path: pathlib.Path) -> None:
    """From now on, stores answers in a file and reuses those in it; raises as `cache.Cache`."""
    self._cache = cache.Cache(path)

  def __call__(self, samples: Sequence[base.Sample]) -> base.Scores:
    """Scores of N samples, in [0, 1], or NaN where a question has no answer.

    Details are those of the form, or {"reason": why there is no score}.
    """
    call = _Call(time.monotonic() + self._deadline)
    # A sample's questions are queued together.
    pending = [self._submit(sample, call) for sample in samples]
    futures.wait([one for several in pending for one in several], self._deadline)
    values, details, reasons = np.full(len(samples), np.nan), [], collections.Counter()
    temporary = False
    for row, (sample, several) in enumerate(zip(samples, pending)):
      try:
        values[row], facts = self._form.score(sample, [self._result(one) for one in several])
      except (answers.Unreadable, exchange.Failed, errors.InputError, _Late) as error:
        reason = " ".join(str(error).split())[:500]
        temporary |= isinstance(error, exchange.Temporary | _Late)
        facts = {"reason": reason}
        reasons[reason] += 1
      details.append(facts)
    for several in pending:
      for one in several:
        one.cancel()  # Has an effect on questions that have not begun; others end at the deadline.
    reason = reasons.most_common(1)[0][0] if reasons else None
    return base.Scores(values, reason, temporary, details)

  def close(self) -> None:
    """Ends all waiting; questions without an answer become NaN."""
    self._chat.client.close()
    self._pool.close()
    if self._cache is not None:
      self._cache.close()
    with self._lock:
      if self.failures:
        said = "; ".join(f"{count} x {reason}" for reason, count in self.failures.most_common(5))
        _log.warning("judge: %d questions had no answer: %s", self.failures.total(), said)

  def _submit(self, sample: base.Sample, call: _Call) -> list[futures.Future]:
    """Queues a sample's questions; returns a future of what `read` makes of each answer."""
    try:
      questions = self._form.questions(sample)
    except errors.InputError as error:
      failed: futures.Future = futures.Future()
      failed.set_exception(error)
      return [failed]
    picture = chat.Picture(sample.image, self._image, self._max_side)
    return [self._pool.submit(self._answer, picture, question, call) for question in questions]

  def _answer(self, picture: chat.Picture, question: forms.Question, call: _Call) -> Any:
    """Asks a question, unless its call has failed; returns what `read` makes of the answer.

    Failures are counted, and those that all later requests would share are noted in `call`.
    """
    try:
      if call.failed is not None:
        raise call.failed
      try:
        return self._ask(picture, question, call.end)
      except exchange.Failed as error:
        if time.monotonic() >= call.end:
          raise self._late() from None
        if isinstance(error, exchange.Unreachable) or error.status in SENDS_NO_MORE:
          call.failed = error
        raise
    except Exception as error:
      with self._lock:
        self.failures[" ".join(str(error).split())[:200]] += 1
      raise

  def _ask(self, picture: chat.Picture, question: forms.Question, end: float) -> Any:
    """What `read` makes of a question's answer, from the cache or from the server."""
    if time.monotonic() >= end:
      raise self._late()
    key, kept = None, self._cache
    if kept is not None:
      key = picture.digest(
        self._chat.model, question.text, question.max_tokens, question.logprobs, question.schema,
        self._image, self._max_side, self._seed, *(getattr(self._chat, name) for name in _OF_CHAT),
      )
      if (reply := kept.get(key)) is not None:
        return question.read(reply)
    for attempt in range(self._reparse + 1):
      try:
        reply = self._chat.ask(picture, question, self._seed + attempt, end)
        value = question.read(reply)
      except answers.Unreadable:
        if attempt == self._reparse:
          raise
        continue
      if key is not None:
        self._keep(key, reply)
      return value

  def _keep(self, key: str, reply: answers.Reply) -> None:
    kept = self._cache
    try:
      if kept is not None:
        kept.put(key, reply)
    except (errors.InputError, ValueError) as error:  # ValueError: it is closed.
      self._cache = None
      _log.warning("answers are not kept any more: %s", error)

  def _result(self, answer: futures.Future) -> Any:
    """The result of a question, without waiting; raises what it failed with, or `_Late`."""
    if not answer.done():
      raise self._late()
    if answer.cancelled():
      raise _Late("the reward was closed")
    return answer.result()

  def _late(self) -> _Late:
    return _Late(f"no answer within deadline={self._deadline:g} s of the call")

  def _probe(self, end: float) -> None:
    """Raises InputError if the model gives the same answer about a red and a blue square."""
    question, shown = self._form.probe(_PROBE), []
    for colour in (_RED, _BLUE):
      image = np.broadcast_to(np.uint8(colour), (64, 64, 3))
      picture = chat.Picture(np.ascontiguousarray(image), self._image, self._max_side)
      try:
        reply = self._chat.ask(picture, question, self._seed, end)
        shown.append(question.read(reply))
      except answers.Unreadable as error:
        raise errors.InputError(
          f"{self._where()} was asked {_PROBE!r} about a square: {error}; probe=False asks nothing"
        ) from None
    red, blue = shown
    if red == blue or (isinstance(red, float) and abs(red - blue) < _SAME):
      raise errors.InputError(
        f"{self._where()} answers alike about a red and a blue square ({_PROBE} {red}): it does "
        "not see pictures. Serve a model with vision (llama.cpp: with its --mmproj); probe=False "
        "asks nothing"
      )
    _log.info("%s sees pictures: %s red %s, blue %s", self._where(), _PROBE, red, blue)

  def _where(self) -> str:
    return f"model {self._chat.model} of {', '.join(self._chat.client.urls)}"


class _Late(Exception):
  """A question had no answer when its call ended."""


@dataclasses.dataclass
class _Call:
  """The state of one call, shared by its questions."""

  end: float  # value of `time.monotonic()` at its deadline
  failed: exchange.Failed | None = None  # a failure that all further requests would share
