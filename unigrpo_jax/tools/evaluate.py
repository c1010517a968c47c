"""Evaluation of a checkpoint as the flags of `unigrpo_jax.evaluate` say."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
import functools
import pathlib
from typing import Any

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import evaluation, geneval, iconworld, measured, scoring, ta
from unigrpo_jax.data import atomic, progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.iconworld import prompts as iconworld_prompts
from unigrpo_jax.rewards import arguments
from unigrpo_jax.runtime import hosts
from unigrpo_jax.tools import points_judge, sampling_flags

DRAWING_MODES = ("plain", "plain+guidance", "think", "think+guidance")
ICONWORLD_MODES = (*DRAWING_MODES, "given", "given+guidance", *iconworld.TASKS)


def run(args: argparse.Namespace) -> None:
  """Connects the hosts, and evaluates on all of them."""
  if args.geneval_results is not None:
    summarise_geneval(args)
    return
  hosts.from_flags(args)

  def evaluate_alone() -> None:
    with hosts.raise_on_all_hosts():
      if hosts.first():
        check_out(args.out)
    with hosts.hold(args.out, "--out"):
      evaluate(args)

  hosts.run(evaluate_alone, lambda: "nothing was written")


def summarise_geneval(args: argparse.Namespace) -> None:
  """Prints and writes what GenEval's own script found in pictures."""
  made = geneval.read_results(args.geneval_results)
  check_out(args.out)
  text = (
    f"{made.table()}\n{made.images:.2%} of the images and {made.prompts:.2%} of the prompts are "
    "correct; ± is half a 95 % interval over prompts\n"
  )
  with errors.storage(args.out):
    args.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.out / "geneval.md", text)
    write_benchmarks(args.out, {"official": {"geneval": made}})
  print(f"{text}wrote {args.out}")


def write_benchmarks(out: pathlib.Path, by_mode: Mapping[str, Any]) -> None:
  """Writes benchmarks.json; removes an older one where there is nothing to say."""
  with errors.storage(out):
    if by_mode:
      atomic.write_text(out / "benchmarks.json", measured.to_json(by_mode))
    else:
      (out / "benchmarks.json").unlink(missing_ok=True)


def evaluate(args: argparse.Namespace) -> None:
  """Draws and scores on all hosts; the first of them prints and writes."""
  names = mode_names(args)
  tasks = {name: iconworld.TASKS[name] for name in iconworld.TASKS if name in names}
  modes = [evaluation.Mode.parse(name) for name in names if name not in tasks]
  if args.rewards and not modes:
    raise errors.InputError(f"--modes {' '.join(names)}: nothing is drawn for --rewards to score")
  hosts.compare(vars(args) | {"process": None})
  with hosts.raise_on_all_hosts():
    examples = read_examples(args)
    scorer = make_scorer(args)
    pipeline = pipeline_lib.Pipeline.open(args.checkpoint, adapter=args.adapter)
  hosts.compare({"prompts": [[example.prompt, example.metadata] for example in examples]})
  settings = sampling_flags.settings(args, pipeline.config.generation)
  drawing = None
  if modes:
    score = iconworld.score if scorer is None else functools.partial(scoring.score, scorer)
    drawing = evaluation.Evaluation(
      pipeline, examples, score, settings=settings, modes=modes, batch_size=args.batch_size,
      seed=args.seed, num_saved_images=args.keep, size=args.size and tuple(args.size),
      images=args.images,
    )
  observers = make_observers(args, examples, modes)
  checkpoint = args.checkpoint + (f" with {args.adapter}" if args.adapter else "")
  hosts.print_first(
    f"{checkpoint}: {len(examples)} prompts of {args.prompts_from}, {', '.join(names)}"
  )
  pipeline.load()
  results = evaluation.Results([], {})
  if drawing is not None:
    results = draw(drawing, len(modes) * len(examples) * args.images, observers)
  for name, task in tasks.items():
    hosts.print_first(f"{name}: {len(examples)} pictures")
    results.rows += task(
      pipeline, examples, settings=settings, batch_size=args.batch_size, seed=args.seed
    )
  if scorer is not None:
    scorer.close()
  with hosts.raise_on_all_hosts():
    if hosts.first():
      results.save(args.out, f"{checkpoint} on {args.prompts_from}, {args.split}")
      write_benchmarks(args.out, measured.by_mode(results, *observers))
  print_unscored(results, scorer, tasks)
  hosts.print_first("\n" + "\n".join(map(results.table, results.rewards)))
  hosts.print_first(f"wrote {args.out}")


def mode_names(args: argparse.Namespace) -> Sequence[str]:
  """The modes and tasks that are asked for; refuses tasks that need other prompts."""
  if args.prompts_from == prompts_lib.ICONWORLD:
    return args.modes or ICONWORLD_MODES
  names = args.modes or DRAWING_MODES
  for name in iconworld.TASKS:
    if name in names:
      raise errors.InputError(f"--modes {name} needs --prompts_from={prompts_lib.ICONWORLD}")
  return names


def check_out(folder: pathlib.Path) -> None:
  """Refuses a folder that cannot be written to, before anything is drawn."""
  if folder.exists() and not folder.is_dir():
    raise errors.InputError(f"--out={folder} is a file; give a folder")
  with errors.at(f"--out={folder}"):
    atomic.probe(folder / "results.json")


def read_examples(args: argparse.Namespace) -> Sequence[Any]:
  """The prompts; IconWorld's with their scenes and reasonings."""
  if args.prompts_from == prompts_lib.ICONWORLD:
    count = args.prompts or prompts_lib.ICONWORLD_COUNTS["test"]
    return iconworld_prompts.fixed(args.split, count)
  examples = list(prompts_lib.open_set(args.prompts_from, args.split))
  if args.prompts is not None and args.prompts > len(examples):
    raise errors.InputError(
      f"--prompts={args.prompts}: {args.prompts_from}, split {args.split}, has {len(examples)}"
    )
  return examples[: args.prompts]


def make_scorer(args: argparse.Namespace) -> rewards.Scorer | None:
  """The rewards of `--rewards`; None without."""
  if args.rewards is None:
    if args.reward_options != "{}":
      raise errors.InputError("--reward_options needs --rewards")
    return None
  made = arguments.make(args.rewards, args.reward_options)
  return rewards.Scorer(made, dict.fromkeys(made, 1.0))


def make_observers(
  args: argparse.Namespace, examples: Sequence[Any], modes: Sequence[evaluation.Mode]
) -> list[evaluation.Observe]:
  """What sees all pictures: the exam where prompts have points, GenEval's folders where wanted."""
  made: list[evaluation.Observe] = []
  with hosts.raise_on_all_hosts():
    has_points = any("points" in example.metadata for example in examples)
    ask = None if args.points_judge is None else points_judge.open_ask(args.points_judge)
    if ask is not None or has_points or args.prompts_from == prompts_lib.ICONWORLD:
      if has_points and ask is None:
        raise errors.InputError(
          f"{args.prompts_from} has exam points; give the folder of a model to answer them as "
          "--points_judge"
        )
      for example in examples:
        ta.points_of(example.prompt, example.metadata)
      made.append(ta.Exam(ask))
    if args.geneval is not None:
      for mode in modes if hosts.first() else ():
        for number, example in enumerate(examples):
          folder = args.geneval / evaluation.file_name(mode.name)
          geneval.write_prompt(folder, number, example.metadata)
      made.append(functools.partial(_write_for_geneval, args.geneval))
  return made


def _write_for_geneval(folder: pathlib.Path, rows, samples) -> None:
  with hosts.raise_on_all_hosts():
    for row, sample in zip(rows, samples) if hosts.first() else ():
      geneval.write_image(folder / evaluation.file_name(row.mode), row.number, row.k, sample.image)


def draw(
  drawing: evaluation.Evaluation, total: int, observers: Sequence[evaluation.Observe]
) -> evaluation.Results:
  """The results of an evaluation of `total` pictures, with a progress bar on the first host."""
  def observe(rows, samples) -> None:
    for observer in observers:
      observer(rows, samples)

  with progress.bar(total, "drawing", unit="pictures", enabled=hosts.first()) as bar:
    def report(mode: str, done: int, _: int) -> None:
      bar.set_description_str(mode, refresh=False)
      bar.update(done - bar.n)

    return drawing.run(progress=report, observe=observe)


def print_unscored(
  results: evaluation.Results, scorer: rewards.Scorer | None, tasks: Collection[str]
) -> None:
  """Prints how many pictures have no reward, and why."""
  if scorer is None:
    if count := sum(not row.rewards for row in results.rows):
      hosts.print_first(
        f"note: {count} of {len(results.rows)} pictures were not scored: their prompts have no "
        "metadata of IconWorld; --rewards names other rewards"
      )
    return
  for name, failures in scorer.failures.items():
    reasons = list(filter(None, hosts.gather_texts(failures.last)))
    count = sum(name not in row.rewards for row in results.rows if row.mode not in tasks)
    if count:
      reason = reasons[0] if reasons else "unknown"
      hosts.print_first(f"note: reward {name} did not score {count} pictures: {reason}")
