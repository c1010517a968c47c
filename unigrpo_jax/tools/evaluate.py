"""The evaluation of a checkpoint, by the flags of `unigrpo_jax.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import evaluation, iconworld, measured, official, scoring, ta
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.iconworld import prompts as iconworld_prompts
from unigrpo_jax.rewards import iconworld as iconworld_rewards
from unigrpo_jax.runtime import hosts
from unigrpo_jax.tools import rescore, sampling_flags

DRAWING_MODES = ("plain", "plain+guidance", "think", "think+guidance")
ICONWORLD_MODES = (*DRAWING_MODES, "given", "given+guidance", *iconworld.TASKS)


def run(args: argparse.Namespace) -> None:
  """Connects the hosts, and runs the evaluation on all of them."""
  hosts.from_flags(args)

  def evaluate_alone() -> None:
    with hosts.raise_on_all_hosts():
      if hosts.first():
        rescore.check_out(args.out)
    with hosts.hold(args.out, "--out"):
      evaluate(args)

  advice = f"the same command continues from the pictures in {args.out}"
  hosts.run(evaluate_alone, lambda: advice)


def evaluate(args: argparse.Namespace) -> None:
  """Draws and scores on all hosts; the first host prints and writes."""
  names = mode_names(args)
  tasks = {name: iconworld.TASKS[name] for name in iconworld.TASKS if name in names}
  of_iconworld = args.prompts_from == prompts_lib.ICONWORLD
  others = f"--modes (which has {' and '.join(iconworld.TASKS)} besides)" if of_iconworld else ""
  with errors.at(others):
    modes = [evaluation.Mode.parse(name) for name in names if name not in tasks]
  if args.rewards and not modes:
    raise errors.InputError(f"--modes {' '.join(names)}: nothing is drawn for --rewards to score")
  for flag in ("samples", "size", "keep_official") if not modes else ():
    if getattr(args, flag) is not None:
      raise errors.InputError(
        f"--{flag} has no effect with --modes {' '.join(names)} alone; leave it out"
      )
  hosts.compare(vars(args) | {"process": None})
  with hosts.raise_on_all_hosts():
    examples = read_examples(args)
    scorer = rescore.make_scorer(args)
    pipeline = pipeline_lib.Pipeline.open(args.checkpoint, adapter=args.adapter)
  hosts.compare({"prompts": [[example.prompt, example.metadata] for example in examples]})
  settings = sampling_flags.settings(args, pipeline.config.generation)
  samples = args.samples or 1
  keep = len(examples) if args.keep == "all" else args.keep
  checkpoint = args.checkpoint + (f" with {args.adapter}" if args.adapter else "")
  about: dict[str, Any] = {
    "of": f"{checkpoint} on {args.prompts_from}, {args.split}{rescore.rewriter(examples)}",
    "checkpoint": checkpoint, "prompts_from": args.prompts_from, "split": args.split,
    "prompts": len(examples), "samples": samples, "drawn": [mode.name for mode in modes],
    "size": args.size, "seed": args.seed, "keep": keep,
    "keep_official": args.keep_official and str(args.keep_official),
    # The settings of sampling, by the names of their flags.
    **{name: getattr(settings, name) for name in (
      "num_timesteps", "shift", "temperature", "max_tokens",
    )},
    "cfg_text_scale": settings.guidance.text_scale, "cfg_interval": settings.guidance.interval,
    "cfg_renorm": settings.guidance.renorm,
  }
  drawing = None
  if modes:
    score = lambda samples: {}
    if scorer is not None:
      score = functools.partial(scoring.score, scorer)
    elif of_iconworld:
      score = iconworld_rewards.score
    drawing = evaluation.Evaluation(
      pipeline, examples, score, settings=settings, modes=modes, batch_size=args.batch_size,
      seed=args.seed, num_saved_images=keep, size=args.size and tuple(args.size), images=samples,
    )
    about["batch_size"] = drawing.batch_size
  held = False
  with hosts.raise_on_all_hosts():
    if hosts.first():  # which alone writes, and so knows all of what it is
      about |= rescore.of_rewards(args, scorer) | {
        "weights": pipeline.network.folder.fingerprint(),
        "prompts_digest": rescore.digest([[one.prompt, one.metadata] for one in examples]),
        "tasks": list(tasks),
      }
      held = rescore.holds(args, about, scorer, about["drawn"])
  if hosts.broadcast(held):
    if scorer is not None:
      scorer.close()
    return
  with hosts.raise_on_all_hosts():
    observers = rescore.make_exam(args, examples, of_iconworld)
  hosts.print_first(
    f"{checkpoint}: {len(examples)} prompts of {args.prompts_from}, {', '.join(names)}"
  )
  found = results_lib.Results([], {})
  kept: Unfinished | None = None
  if drawing is not None:
    total = len(modes) * len(examples) * samples
    kept = Unfinished(args, about, examples)
    if len(kept.rows) < total or tasks:
      pipeline.load()
    found = draw(drawing, total, kept, observers)
  else:
    pipeline.load()
  for name, task in tasks.items():
    hosts.print_first(f"{name}: {len(examples)} pictures")
    found.rows += task(
      pipeline, examples, settings=settings, batch_size=args.batch_size, seed=args.seed
    )
  reasons = {} if scorer is None else {
    name: [text for text in hosts.gather_texts(failures.last) if text]
    for name, failures in scorer.failures.items()
  }
  reward_settings: dict[str, dict[str, Any]] = {}
  if scorer is not None:
    if hosts.first():
      reward_settings = scorer.settings()
    scorer.close()
  with hosts.raise_on_all_hosts():
    if hosts.first():
      drawn = [row for row in found.rows if row.mode not in tasks]
      if scorer is not None:
        rescore.print_failures(reasons, drawn)
      elif not of_iconworld:
        print(f"note: {len(drawn)} of {len(drawn)} pictures were not scored; --rewards scores them")
      rescore.finish(
        args.out, found, about=about, observers=observers, of=about["of"],
        settings=reward_settings, names=list(reasons),
        of_geneval=not of_iconworld and measured.is_geneval(examples),
      )
      if kept is not None:
        kept.end()
      rescore.raise_if_none(list(reasons), drawn)


def mode_names(args: argparse.Namespace) -> Sequence[str]:
  """The modes and tasks to run; raises InputError for a task that needs IconWorld's prompts."""
  if args.prompts_from == prompts_lib.ICONWORLD:
    return args.modes or ICONWORLD_MODES
  names = args.modes or DRAWING_MODES
  for name in iconworld.TASKS:
    if name in names:
      raise errors.InputError(f"--modes {name} needs --prompts_from={prompts_lib.ICONWORLD}")
  return names


def read_examples(args: argparse.Namespace) -> Sequence[Any]:
  """The prompts to draw; those of IconWorld also have scenes and reasonings."""
  if args.prompts_from == prompts_lib.ICONWORLD:
    count = args.prompts or prompts_lib.ICONWORLD_COUNTS["test"]
    return iconworld_prompts.fixed(args.split, count)
  examples = list(prompts_lib.open_set(args.prompts_from, args.split))
  if args.prompts is not None and args.prompts > len(examples):
    raise errors.InputError(
      f"--prompts={args.prompts}: {args.prompts_from}, split {args.split}, has {len(examples)}"
    )
  return examples[: args.prompts]


class Unfinished:
  """Saves rows and pictures while they are drawn; an observer of `Evaluation.run`.

  Only the first host writes.

  Attributes:
    rows: of pictures that an interrupted run of the same command has drawn.
    images: see `Evaluation.run`.
  """

  def __init__(
    self, args: argparse.Namespace, about: dict[str, Any], examples: Sequence[Any]
  ):
    """Reads what an interrupted run left, and prepares the folders.

    Raises:
      InputError: --out or --keep_official holds another evaluation; see `results.Unfinished` and
        `official.begin`.
    """
    self._file: results_lib.Unfinished | None = None
    self._official: pathlib.Path | None = args.keep_official
    self._modes = len(about["drawn"])
    rows: list[dict[str, Any]] = []
    with hosts.raise_on_all_hosts():
      if hosts.first():
        self._file = results_lib.Unfinished(args.out, about)
        rows = [dataclasses.asdict(row) for row in self._file.rows]
        for mode in about["drawn"] if self._official is not None else ():
          official.begin(
            official.folder_of(self._official, mode, self._modes),
            [example.metadata for example in examples], about["samples"],
          )
        self._file.begin()
    self.rows = [results_lib.Row(**row) for row in hosts.broadcast(rows)]
    names = [row.image for row in self.rows if row.image is not None]
    self.images = results_lib.Pictures(args.out if hosts.first() else None, names)
    if self.rows:
      hosts.print_first(f"{args.out} has {len(self.rows)} of the pictures already")

  def __call__(
    self, rows: Sequence[results_lib.Row], samples: Sequence[rewards.Sample]
  ) -> None:
    """Saves a batch, whose pictures in `images` are already written; the last of the observers."""
    with hosts.raise_on_all_hosts():
      if self._file is None:
        return
      for row, sample in zip(rows, samples) if self._official is not None else ():
        folder = official.folder_of(self._official, row.mode, self._modes)
        official.write_image(folder, row.number, row.k, sample.image)
      self._file.add(rows)

  def end(self) -> None:
    """Deletes what is no longer needed; to be called after the results were saved."""
    if self._file is not None:
      self._file.end()


def draw(
  drawing: evaluation.Evaluation, total: int, kept: Unfinished,
  observers: Sequence[results_lib.Observe],
) -> results_lib.Results:
  """Runs an evaluation of `total` pictures with a progress bar; continues an interrupted one."""
  for observer in observers:
    if isinstance(observer, ta.Exam):
      observer.restore(kept.rows)

  def observe(rows, samples) -> None:
    for observer in (*observers, kept):
      observer(rows, samples)

  with progress.bar(total, "drawing", unit="pictures", enabled=hosts.first()) as bar:
    def report(mode: str, done: int, _: int) -> None:
      bar.set_description_str(mode, refresh=False)
      bar.update(done - bar.n)

    return drawing.run(
      progress=report, observe=observe, images=kept.images, done=kept.rows
    )
