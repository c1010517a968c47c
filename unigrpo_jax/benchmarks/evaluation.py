"""Draws fixed prompts from fixed noise under several modes, and scores the pictures.

  evaluation = Evaluation(pipeline, examples, score, settings=settings,
                          modes=[Mode.parse("plain"), Mode.parse("think+guidance")],
                          batch_size=64, seed=0)
  results = evaluation.run()          # again with other weights: evaluation.run(params)
  results.mean("plain", "strict"), results.save("runs/eval", "IconWorld")

Image k of prompt p is drawn by the ODE with `image_seed(seed, p, k)`, whatever its mode and however
often it is run, so that two results differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
import contextlib
import dataclasses
import json
from typing import Any

import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.runtime import hosts

MOST_PROMPTS = 2**20  # With more, two pictures would have one seed,
MOST_IMAGES = 1000  # and with more of a prompt, one would exceed 32 bits.

Row, Results, Observe = results_lib.Row, results_lib.Results, results_lib.Observe

Score = Callable[[Sequence[rewards.Sample]], Mapping[str, np.ndarray | rewards.Scores]]
Progress = Callable[[str, int, int], None]


def image_seed(seed: int, prompt: int, k: int) -> int:
  """The seed of image `k` of prompt number `prompt`, of its noise and of its text; no other picture
  of fewer than `MOST_PROMPTS` prompts has it.
  """
  return seed + prompt + (k << 20)


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a prompt becomes a picture.

  Attributes:
    think: the prompt is reasoned about first.
    guided: with classifier-free guidance.
    given: with the example's own reasoning rather than a sampled one; needs `think`.
  """

  think: bool
  guided: bool = False
  given: bool = False

  def __post_init__(self):
    if self.given and not self.think:
      raise errors.InputError("mode given=True, think=False: a given reasoning is a thought")

  @classmethod
  def parse(cls, text: str) -> Mode:
    """The mode that "plain", "think" or "given" names, each also with "+guidance".

    Raises:
      InputError: it names none.
    """
    kind, plus, rest = (part.strip() for part in text.partition("+"))
    if kind not in ("plain", "think", "given") or (plus and rest != "guidance"):
      raise errors.InputError(
        f"mode={text!r} is none of plain, think, given, each also with +guidance"
      )
    return cls(think=kind != "plain", guided=bool(plus), given=kind == "given")

  @property
  def name(self) -> str:
    kind = "given" if self.given else "think" if self.think else "plain"
    return kind + (" + guidance" if self.guided else "")


class Evaluation:
  """Prompts prepared once; see the module's docstring."""

  def __init__(
    self, pipeline, examples: Sequence[Any], score: Score, *, settings: requests_lib.Settings,
    modes: Sequence[Mode], batch_size: int, seed: int,
    num_saved_images: int = 24, size: tuple[int, int] | None = None, images: int = 1,
  ):
    """Checks everything that does not need the weights, which may be loaded later.

    Args:
      pipeline: see `pipeline.Pipeline`.
      examples: objects with `prompt` and `metadata`, whose "tag" is the category ("all" without
        one), and with `reasoning` where a mode is given it.
      score: rewards of samples, {name: [samples] float, or with details}; NaN where there is none,
        as a reward of the reasoning has none for a picture without. All hosts call it together,
        each with its own.
      settings: what the modes share; with the guidance of the guided ones.
      modes: each is run over all examples.
      batch_size: rows run together, rounded up to what the devices share evenly.
      seed: see `image_seed`.
      num_saved_images: prompts whose pictures are saved.
      size: height and width in pixels; None: the largest of the checkpoint.
      images: of each prompt.

    Raises:
      InputError: a prompt, a size, a mode or a number is impossible.
    """
    if not examples or not modes:
      raise errors.InputError("an evaluation needs at least one prompt and one mode")
    names = [mode.name for mode in modes]
    if len(set(names)) < len(names):
      raise errors.InputError(f"modes={names}: each may be given only once")
    errors.require("batch_size", batch_size, low=1)
    errors.require("num_saved_images", num_saved_images, low=0)
    errors.require("images", images, low=1, high=MOST_IMAGES)
    errors.require("prompts", len(examples), high=MOST_PROMPTS)
    self._images, self._count = images, images * len(examples)  # of a prompt, of a mode
    self._pipeline, self._examples, self._score = pipeline, list(examples), score
    self._seed, self._size, self._num_saved_images = seed, size, num_saved_images
    self._batch_size = pipeline.batch_rows(batch_size, self._count)
    self._batches = {mode: self._prepare(mode, settings) for mode in modes}

  def _prepare(self, mode: Mode, settings: requests_lib.Settings) -> list[requests_lib.Batch]:
    """All prompts under a mode, padded alike: every batch has one shape."""
    guidance = settings.guidance
    if not mode.guided:
      guidance = dataclasses.replace(guidance, text_scale=1.0)
    settings = dataclasses.replace(
      settings, think=mode.think, understand=False, guidance=guidance
    )
    rows = range(self._count + -self._count % self._batch_size)
    # The rows that fill the last batch are prompts again, not fewer rows: decoding has one shape.
    requests = [self._request(mode, *divmod(row % self._count, self._images)) for row in rows]
    batch = self._pipeline.prepare(requests, settings, self._batch_size)
    return requests_lib.split(batch, self._batch_size)

  def _request(self, mode: Mode, number: int, k: int) -> requests_lib.Request:
    example = self._examples[number]
    reasoning = getattr(example, "reasoning", None) if mode.given else None
    if mode.given and not reasoning:
      raise errors.InputError(
        f"mode {mode.name}: prompt {number + 1} ({example.prompt!r}) has no reasoning; leave out "
        "the modes that draw from one"
      )
    return requests_lib.Request(
      example.prompt, seed=image_seed(self._seed, number, k), size=self._size, reasoning=reasoning
    )

  @property
  def batch_size(self) -> int:
    """Rows run together."""
    return self._batch_size

  def run(
    self, params: Any = None, progress: Progress | None = None, observe: Observe | None = None, *,
    images: MutableMapping[str, np.ndarray] | None = None, done: Sequence[Row] = (),
  ) -> Results:
    """Draws and scores every prompt under every mode; all hosts call it together.

    Each host scores its share of every batch, and has all results.

    Args:
      params: of the network, on the pipeline's mesh, for this run alone; None: the pipeline's.
        They are not donated.
      progress: called after each batch with the mode's name, and how many rows of how many of all
        modes are done.
      observe: called with each batch, of which nothing but the rows and saved pictures is kept.
      images: gets the pictures to save, by the names that their rows have; None: a dictionary.
      done: rows of an earlier run's first batches, which are taken as they are.

    Raises:
      InputError: a log-probability, a latent or a reward is not finite.
    """
    rows, images = list(done), {} if images is None else images
    end = 0  # of the batches so far
    with self._other_params(params):
      for mode, parts in self._batches.items():
        for first, batch in enumerate(parts):
          end += min(self._batch_size, self._count - first * self._batch_size)
          if end <= len(done):
            continue
          results = self._pipeline.run(batch)
          made, samples = self._score_batch(mode, first * self._batch_size, results, images)
          rows += made
          if observe is not None:
            observe(made, samples)
          if progress is not None:
            progress(mode.name, len(rows), self._count * len(self._batches))
    return Results(rows, images)

  def _score_batch(
    self, mode: Mode, first: int, results, images: MutableMapping[str, np.ndarray]
  ) -> tuple[list[Row], list[rewards.Sample]]:
    """The rows of one batch's results, and their samples; adds to the images to save."""
    places = [divmod(first + i, self._images) for i in range(len(results))][: self._count - first]
    rows, samples = [], []
    for (number, k), result in zip(places, results):
      example = self._examples[number]
      text = example.reasoning if mode.given else result.text
      samples.append(rewards.Sample(example.prompt, result.image, text, example.metadata))
      file = None
      if number < self._num_saved_images:
        file = f"images/{results_lib.file_name(mode.name)}_{number:05d}{f'_{k}' if k else ''}.png"
      rows.append(Row(
        mode.name, str(example.metadata.get("tag", "all")), example.prompt, text, {}, file, number,
        k, metadata=example.metadata,
      ))
    local = hosts.share(len(samples))
    scores, details = _gather(local, self._score([samples[row] for row in local]), len(samples))
    rows = results_lib.scored(rows, scores, details)
    with hosts.raise_on_all_hosts():
      for row, sample in zip(rows, samples):
        if row.image is not None:
          images[row.image] = sample.image
    return rows, samples

  @contextlib.contextmanager
  def _other_params(self, params: Any) -> Iterator[None]:
    """The pipeline with other parameters of the network, within this context; None: its own."""
    before = self._pipeline.params
    if params is not None:
      self._pipeline.params = before | {"bagel": params}
    try:
      yield
    finally:
      self._pipeline.params = before


def _gather(
  rows: Sequence[int], scores: Mapping[str, np.ndarray | rewards.Scores], total: int
) -> tuple[dict[str, np.ndarray], list[dict[str, dict[str, Any]]]]:
  """({name: [total] float32}, details of each of the `total` rows), of this host's, on all hosts.
  """
  given = {
    name: part if isinstance(part, rewards.Scores) else rewards.Scores(np.asarray(part))
    for name, part in scores.items()
  }
  found = {row: results_lib.details_of(given, i) for i, row in enumerate(rows)}
  details: list[dict[str, dict[str, Any]]] = [{} for _ in range(total)]
  for text in hosts.gather_texts(json.dumps({row: one for row, one in found.items() if one})):
    for row, one in json.loads(text).items():
      details[int(row)] = one
  values = {name: part.values for name, part in given.items()}
  return hosts.gather_rows(rows, values, total), details
