"""Evaluation: draws fixed prompts from fixed noise in several modes, and scores the pictures.

  evaluation = Evaluation(pipeline, examples, score, settings=settings,
                          modes=[Mode.parse("plain"), Mode.parse("think+guidance")],
                          batch_size=64, seed=0)
  results = evaluation.run()          # again with other weights: evaluation.run(params)
  results.mean("plain", "strict"), results.save("runs/eval", "IconWorld")

Image k of prompt p is drawn by the ODE from the seed `image_seed(seed, p, k)`, in every mode and in
every run, so that two results differ only in their weights.
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

Score = Callable[[Sequence[rewards.Sample]], Mapping[str, np.ndarray | rewards.Scores]]
Progress = Callable[[str, int, int], None]  # (name of the mode, rows done, rows in total)


def image_seed(seed: int, prompt: int, k: int) -> int:
  """The seed of the noise and the text of image `k` of prompt number `prompt`.

  It is unique among the images of up to `MOST_PROMPTS` prompts.
  """
  return seed + prompt + (k << 20)


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a prompt becomes a picture.

  Attributes:
    think: the picture is drawn from a reasoning.
    guided: the picture is drawn with classifier-free guidance.
    given: the reasoning is the example's own instead of a sampled one; needs `think`.

  Raises:
    InputError: `given` without `think`.
  """

  think: bool
  guided: bool = False
  given: bool = False

  def __post_init__(self):
    if self.given and not self.think:
      raise errors.InputError("mode given=True, think=False: a given reasoning is a thought")

  @classmethod
  def parse(cls, text: str) -> Mode:
    """The mode called "plain", "think" or "given", or one of these with "+guidance".

    Raises:
      InputError: `text` is none of these.
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
  """Prompts in several modes, prepared once; see the module's docstring."""

  def __init__(
    self, pipeline, examples: Sequence[Any], score: Score, *, settings: requests_lib.Settings,
    modes: Sequence[Mode], batch_size: int, seed: int,
    num_saved_images: int = 24, size: tuple[int, int] | None = None, images: int = 1,
  ):
    """Checks and prepares everything that does not need weights; these may be loaded later.

    Args:
      pipeline: a `pipeline.Pipeline`.
      examples: objects with `prompt`, with `metadata`, whose "tag" is the category (default "all"),
        and, for modes with `given`, with `reasoning`.
      score: samples -> {reward: [samples] float, or `rewards.Scores`}. NaN where a reward does not
        apply, such as a reward of the reasoning where there is none. All hosts call it at the same
        time, each with its own share of the samples.
      settings: of sampling; its guidance is used in the modes with guidance.
      modes: each is run over all examples.
      batch_size: rows sampled together, rounded up to a multiple of the devices.
      seed: see `image_seed`.
      num_saved_images: the pictures of so many prompts are saved.
      size: (height, width) in pixels; None: the largest of the checkpoint.
      images: images per prompt.

    Raises:
      InputError: a prompt, a size, a mode or a number is impossible.
    """
    if not examples or not modes:
      raise errors.InputError("an evaluation needs at least one prompt and one mode")
    names = [mode.name for mode in modes]
    if len(set(names)) < len(names):
      raise errors.InputError(f"modes={names}: each may be given only once")
    scale = settings.guidance.text_scale
    if scale <= 1 and (guided := [mode.name for mode in modes if mode.guided]):
      raise errors.InputError(
        f"mode {guided[0]}: cfg_text_scale={scale:g} is no guidance; give more than 1, or leave "
        "the modes with guidance out"
      )
    errors.require("batch_size", batch_size, low=1)
    errors.require("num_saved_images", num_saved_images, low=0)
    errors.require("images", images, low=1, high=MOST_IMAGES)
    errors.require("prompts", len(examples), high=MOST_PROMPTS)
    self._images, self._count = images, images * len(examples)  # per prompt, per mode
    self._pipeline, self._examples, self._score = pipeline, list(examples), score
    self._seed, self._size, self._num_saved_images = seed, size, num_saved_images
    self._batch_size = pipeline.batch_rows(batch_size, self._count)
    self._batches = {mode: self._prepare(mode, settings) for mode in modes}

  def _prepare(self, mode: Mode, settings: requests_lib.Settings) -> list[requests_lib.Batch]:
    """The batches of a mode. All prompts are padded alike, so that all batches have one shape."""
    guidance = settings.guidance
    if not mode.guided:
      guidance = dataclasses.replace(guidance, text_scale=1.0)
    settings = dataclasses.replace(
      settings, think=mode.think, understand=False, guidance=guidance
    )
    rows = range(self._count + -self._count % self._batch_size)
    # The last batch is filled up with prompts again, so that it has the shape of the others.
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
    self, params: Any = None, progress: Progress | None = None,
    observe: results_lib.Observe | None = None, *,
    images: MutableMapping[str, np.ndarray] | None = None, done: Sequence[results_lib.Row] = (),
  ) -> results_lib.Results:
    """Draws and scores every prompt in every mode; all hosts call it together.

    Each host scores its share of every batch, and all get all results.

    Args:
      params: parameters of the network for this run alone, on the pipeline's mesh; they are not
        donated. None: the pipeline's own.
      progress: called after each batch with (name of the mode, rows done, rows in total), counted
        over all modes.
      observe: called with the rows and samples of each batch; afterwards only the rows and the
        saved pictures are kept.
      images: mapping that receives the pictures to save, {`Row.image`: pixels}; None: a new dict.
      done: rows of the first batches from an interrupted run; these batches are not run again.

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
    return results_lib.Results(rows, images)

  def _score_batch(
    self, mode: Mode, first: int, results, images: MutableMapping[str, np.ndarray]
  ) -> tuple[list[results_lib.Row], list[rewards.Sample]]:
    """The scored rows of one batch and their samples; adds pictures to save to `images`.

    `first` is the number of the batch's first row in its mode.
    """
    places = [divmod(first + i, self._images) for i in range(len(results))][: self._count - first]
    rows, samples = [], []
    for (number, k), result in zip(places, results):
      example = self._examples[number]
      text = example.reasoning if mode.given else result.text
      samples.append(rewards.Sample(example.prompt, result.image, text, example.metadata))
      file = None
      if number < self._num_saved_images:
        file = f"images/{results_lib.file_name(mode.name)}_{number:05d}{f'_{k}' if k else ''}.png"
      rows.append(results_lib.Row(
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
    """Within this context, the pipeline uses `params` for the network; None: its own."""
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
  """Gathers what each host scored: ({reward: [total] float32}, details of each row), on all hosts.

  `rows` are the numbers of this host's rows among the `total`, and `scores` their scores.
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
