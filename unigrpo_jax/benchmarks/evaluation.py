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

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import contact_sheet, intervals
from unigrpo_jax.data import atomic, files
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.runtime import hosts, panels

_PICTURE = re.compile(r"(plain|think|given)(_guidance)?_\d{5}(_\d+)?\.png")
MOST_IMAGES = 1000  # of a prompt: with more, a seed would exceed 32 bits

Score = Callable[[Sequence[rewards.Sample]], Mapping[str, np.ndarray | rewards.Scores]]
Progress = Callable[[str, int, int], None]


def image_seed(seed: int, prompt: int, k: int) -> int:
  """The seed of image `k` of prompt number `prompt`: of its noise and of its text."""
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


def file_name(mode: str) -> str:
  """The name of a mode, as one of files and folders."""
  return mode.replace(" + ", "_")


@dataclasses.dataclass
class Row:
  """One image: a prompt under a mode.

  Attributes:
    mode: its name.
    category: the tables have a column for each.
    prompt: of the picture.
    text: the reasoning, or None.
    rewards: by name; without those that could not score it.
    image: file of the picture, relative to the saved folder; None where it is not saved.
    number: of the prompt, from 0; None where each row is another prompt.
    k: which of the prompt's images this is.
    details: {name of a reward: its `rewards.Scores.detail`}, of those that have some.
  """

  mode: str
  category: str
  prompt: str
  text: str | None
  rewards: dict[str, float]
  image: str | None
  number: int | None = None
  k: int = 0
  details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


# What sees the rows of a batch with what they are made of; all hosts see all of them.
Observe = Callable[[Sequence[Row], Sequence[rewards.Sample]], None]


class Results:
  """The rows of an evaluation, mode by mode, and the pictures to save.

  Attributes:
    rows: see `Row`.
    images: {`Row.image`: [H, W, 3] uint8}.
  """

  def __init__(self, rows: Sequence[Row], images: dict[str, np.ndarray]):
    self.rows, self.images = list(rows), dict(images)

  @property
  def modes(self) -> list[str]:
    return list(dict.fromkeys(row.mode for row in self.rows))

  @property
  def rewards(self) -> list[str]:
    return list(dict.fromkeys(name for row in self.rows for name in row.rewards))

  def mean(self, mode: Mode | str, reward: str) -> float:
    """Mean over the prompts of a mode that have the reward; NaN where there are none."""
    return self.interval(mode, reward)[0]

  def interval(self, mode: Mode | str, reward: str) -> tuple[float, float, float]:
    """(mean, low, high) over the prompts of a mode that have the reward; see `intervals.interval`.
    """
    return intervals.interval(self._scores(mode, reward))

  def _scores(self, mode: Mode | str, reward: str, category: str | None = None) -> list[float]:
    """Of each prompt, the mean over its images."""
    name = mode.name if isinstance(mode, Mode) else mode
    scored = [
      (row.rewards[reward], place if row.number is None else (row.number,))
      for place, row in enumerate(self.rows)
      if row.mode == name and reward in row.rewards and category in (None, row.category)
    ]
    return list(intervals.prompt_means(*zip(*scored)).values()) if scored else []

  def panels(self, count: int) -> list[panels.Panel]:
    """The pictures of the first `count` prompts that have some, for a log."""
    prompts = contact_sheet.by_prompt(self.rows, self.images)[:count]
    return [contact_sheet.panel(rows, self.images) for rows in prompts]

  def table(self, reward: str) -> str:
    """Markdown: a line a mode, means by category, and over all with the interval."""
    rows = [row for row in self.rows if reward in row.rewards]
    categories = list(dict.fromkeys(row.category for row in rows))
    categories = [] if len(categories) < 2 else categories
    lines = [[reward, *categories, "all", "95 %", "prompts"], ["---"] * (4 + len(categories))]
    for mode in dict.fromkeys(row.mode for row in rows):
      cells = [self._scores(mode, reward, category) for category in categories]
      mean, low, high = self.interval(mode, reward)
      lines.append([
        mode, *[f"{np.mean(scores):z.2f}" if scores else "" for scores in cells], f"{mean:z.3f}",
        "" if math.isnan(low) else f"{low:z.3f} to {high:z.3f}",
        str(len(self._scores(mode, reward))),
      ])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

  def save(self, folder: pathlib.Path | str, title: str) -> None:
    """Writes results.json, results.md, images/*.png and contact.png into `folder`, anew.

    Raises:
      InputError: the folder cannot be written to; Storage where trying again may help.
    """
    import PIL.Image

    folder = files.path(folder)
    record = {
      "title": title, "modes": self.modes, "rows": [dataclasses.asdict(row) for row in self.rows]
    }
    text = "\n".join([f"# {title}\n", *map(self.table, self.rewards)])
    pictures = {folder / name: PIL.Image.fromarray(image) for name, image in self.images.items()}
    if pictures:
      pictures[folder / "contact.png"] = contact_sheet.draw(title, self.rows, self.images)
    with errors.storage(folder):
      others = []
      if (folder / "results.json").exists():  # And so the pictures of another evaluation.
        others = [path for path in folder.glob("images/*.png") if _PICTURE.fullmatch(path.name)]
        others.append(folder / "contact.png")
      for path, picture in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, lambda aside, picture=picture: picture.save(aside, format="PNG"))
      folder.mkdir(parents=True, exist_ok=True)
      atomic.write_text(folder / "results.md", text)
      atomic.write_text(
        folder / "results.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n"
      )
      for path in set(others) - pictures.keys():
        path.unlink(missing_ok=True)


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

  def run(
    self, params: Any = None, progress: Progress | None = None, observe: Observe | None = None
  ) -> Results:
    """Draws and scores every prompt under every mode; all hosts call it together.

    Each host scores its share of every batch, and has all results.

    Args:
      params: of the network, on the pipeline's mesh, for this run alone; None: the pipeline's.
        They are not donated.
      progress: called after each batch with the mode's name, and how many rows of how many of all
        modes are done.
      observe: called with each batch, of which nothing but the rows and saved pictures is kept.

    Raises:
      InputError: a log-probability, a latent or a reward is not finite.
    """
    rows, images = [], {}
    with self._other_params(params):
      for mode, parts in self._batches.items():
        for first, batch in enumerate(parts):
          results = self._pipeline.run(batch)
          made, samples = self._score_batch(mode, first * self._batch_size, results, images)
          rows += made
          if observe is not None:
            observe(made, samples)
          if progress is not None:
            progress(mode.name, len(rows), self._count * len(self._batches))
    return Results(rows, images)

  def _score_batch(
    self, mode: Mode, first: int, results, images: dict[str, np.ndarray]
  ) -> tuple[list[Row], list[rewards.Sample]]:
    """The rows of one batch's results, and their samples; adds to the images to save."""
    places = [divmod(first + i, self._images) for i in range(len(results))][: self._count - first]
    examples = [self._examples[number] for number, _ in places]
    rows = []
    samples = [
      rewards.Sample(
        example.prompt, result.image, example.reasoning if mode.given else result.text,
        example.metadata,
      )
      for example, result in zip(examples, results)
    ]
    local = hosts.share(len(samples))
    scores, details = _gather(local, self._score([samples[row] for row in local]), len(samples))
    for place, ((number, k), example, sample) in enumerate(zip(places, examples, samples)):
      values = {name: float(column[place]) for name, column in scores.items()}
      for name, value in values.items():
        if math.isinf(value):
          raise errors.InputError(f"reward {name} of {example.prompt!r} is {value}")
      file = None
      if number < self._num_saved_images:
        file = f"images/{file_name(mode.name)}_{number:05d}{f'_{k}' if k else ''}.png"
        images[file] = sample.image
      rows.append(Row(
        mode.name, str(example.metadata.get("tag", "all")), example.prompt, sample.text,
        {name: value for name, value in values.items() if not math.isnan(value)}, file, number, k,
        details[place],
      ))
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
  found = {
    row: {name: detail for name, part in given.items() if (detail := part.detail(i))}
    for i, row in enumerate(rows)
  }
  details: list[dict[str, dict[str, Any]]] = [{} for _ in range(total)]
  for text in hosts.gather_texts(json.dumps({row: one for row, one in found.items() if one})):
    for row, one in json.loads(text).items():
      details[int(row)] = one
  values = {name: part.values for name, part in given.items()}
  return hosts.gather_rows(rows, values, total), details
