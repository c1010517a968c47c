"""The part of `unigrpo_jax.evaluate` without jax: scoring existing pictures, tables, files."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any

from unigrpo_jax import errors, rewards
from unigrpo_jax.benchmarks import geneval, measured, official, ta
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import atomic, exam_points, files, locks, progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.geneval import prompts as geneval_prompts
from unigrpo_jax.rewards import arguments
from unigrpo_jax.rewards import iconworld as iconworld_rewards
from unigrpo_jax.rewards import scorer as scorer_lib

WAITING_SECONDS = 30.0  # From one line about a reward that is waited for to the next.


def run(args: argparse.Namespace) -> None:
  """Scores the pictures in --images, or summarises --geneval_results."""
  check_out(args.out)
  if (args.out / results_lib.UNFINISHED).exists():
    raise errors.InputError(f"--out={args.out} holds an unfinished evaluation; give another --out")
  with locks.hold(locks.inside(args.out), f"--out={args.out}"):
    if args.geneval_results is not None:
      rows = official.read_results(args.geneval_results)
      of_results = {"results_from": str(args.geneval_results), "results": digest(
        [[row.mode, row.prompt, row.rewards, row.metadata] for row in rows])}
      if not holds(args, of_results):
        finish(
          args.out, results_lib.Results(rows, {}), about=of_results, settings={},
          of=f"GenEval's own script, {args.geneval_results}", names=["geneval"], of_geneval=True,
        )
    else:
      score_pictures(args)


def score_pictures(args: argparse.Namespace) -> None:
  """Scores the pictures in --images, and writes the results to --out."""
  about, rows = read_pictures(args.images, args.prompts)
  if args.out.absolute() == args.images.absolute():
    raise errors.InputError(
      f"--out={args.out} has the results of --images already; give another folder"
    )
  of_iconworld = about.get("prompts_from") == prompts_lib.ICONWORLD
  scorer = make_scorer(args)
  if scorer is None and not of_iconworld:
    raise errors.InputError(
      f"--images={args.images} needs --rewards, such as geneval; see docs/rewards.md"
    )
  observers = make_exam(args, rows, of_iconworld)
  about = about | of_rewards(args, scorer) | {
    "images_from": str(args.images), "prompts": len({row.key for row in rows}),
    "pictures": digest([[row.image, (args.images / row.image).stat().st_size] for row in rows]),
    "rows_digest": digest([[row.prompt, row.metadata, row.text] for row in rows]),
  }
  # Without what the results say of themselves.
  as_read = {name: about[name] for name in about if name not in ("of", "title", "settings")}
  if holds(args, as_read, scorer, {row.mode for row in rows}):
    if scorer is not None:
      scorer.close()
    return
  made: list[results_lib.Row] = []
  with progress.bar(len(rows), "scoring", unit="pictures") as bar:
    for start in range(0, len(rows), args.batch_size):
      batch = rows[start : start + args.batch_size]
      samples = [
        rewards.Sample(
          row.prompt, results_lib.read_picture(args.images / row.image), row.text, row.metadata
        ) for row in batch
      ]
      if scorer is None:
        scores = iconworld_rewards.score(samples)
        details: list[dict[str, Any]] = [{} for _ in batch]
      else:
        given = wait(scorer.submit(samples))
        scores = {name: part.values for name, part in given.items()}
        details = [results_lib.details_of(given, i) for i in range(len(batch))]
      batch = results_lib.scored(batch, scores, details)
      for observer in observers:
        observer(batch, samples)
      made += batch
      bar.update(len(batch))
  place = str(args.images.resolve())
  if not files.is_object(args.out):
    place = os.path.relpath(place, args.out.resolve())
  made = [dataclasses.replace(row, image=os.path.join(place, row.image)) for row in made]
  pictures = results_lib.Pictures(args.out, [row.image for row in made])
  reasons: dict[str, list[str]] = {}
  settings: dict[str, dict[str, Any]] = {}
  if scorer is not None:
    settings = scorer.settings()
    scorer.close()
    reasons = {name: [of.last] if of.last else [] for name, of in scorer.failures.items()}
    print_failures(reasons, made)
  finish(
    args.out, results_lib.Results(made, pictures),
    of=f"{about.get('of', 'pictures')}, scored again of {args.images}",
    about=about,
    settings=settings, observers=observers,
    names=list(reasons), of_geneval=not of_iconworld and measured.is_geneval(made),
  )
  raise_if_none(list(reasons), made)


def wait(pending: scorer_lib.Pending) -> Mapping[str, rewards.Scores]:
  """The scores; prints which rewards are waited for, now and then."""
  start = time.monotonic()
  while not pending.wait(WAITING_SECONDS):
    names, seconds = ", ".join(pending.awaited()), time.monotonic() - start
    print(f"waiting for reward {names}, after {seconds:.0f} s", file=sys.stderr, flush=True)
  return pending.scores()


def read_pictures(
  folder: pathlib.Path, prompts: int | None
) -> tuple[dict[str, Any], list[results_lib.Row]]:
  """Reads the results of an evaluation, or pictures in the folders of GenEval's scripts.

  Args:
    folder: of the results or pictures.
    prompts: number of prompts to read; None: all.

  Returns:
    (members of results.json, {} where there is none; rows that have a picture).

  Raises:
    InputError: there are no pictures.
  """
  if not folder.is_dir():
    hint = "; --samples is how many images a prompt has" if str(folder).isdecimal() else ""
    raise errors.InputError(f"--images={folder}: no such folder{hint}")
  about, rows = results_lib.read(folder) or ({}, official.read(folder))
  if prompts is not None:
    rows = [row for row in rows if (row.number or 0) < prompts]
  total, rows = len(rows), [row for row in rows if row.image is not None]
  if len(rows) < total:
    print(f"note: {total - len(rows)} of {total} pictures were not kept, as --keep=all would have")
  if not rows:
    raise errors.InputError(
      f"--images={folder}: its results have no pictures; evaluate with --keep=all keeps them"
    )
  return about, rows


def holds(
  args: argparse.Namespace, about: Mapping[str, Any], scorer: rewards.Scorer | None = None,
  modes: Collection[str] = (),
) -> bool:
  """Whether --out holds this evaluation already, with all scores of `scorer`, and says so; see
  `results.is_finished`.

  Raises:
    InputError: it holds another one, and there is no --overwrite.
  """
  if args.overwrite:
    return False
  names = () if scorer is None else list(scorer.failures)
  found = results_lib.is_finished(args.out, about, names, modes)
  if found:
    print(f"{args.out} holds this evaluation already; --overwrite makes it again")
  return found


def of_rewards(args: argparse.Namespace, scorer: rewards.Scorer | None) -> dict[str, Any]:
  """What identifies the rewards of an evaluation."""
  fingerprints = {} if scorer is None else scorer.fingerprints()
  return {"rewards": args.rewards, "reward_options": digest([args.reward_options, fingerprints])}


def digest(value: Any) -> str:
  """Identifies a JSON value that is long, or may contain a password."""
  return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def check_out(folder: pathlib.Path) -> None:
  """Raises InputError for an --out that cannot be written to, before anything is drawn."""
  if folder.exists() and not folder.is_dir():
    raise errors.InputError(f"--out={folder} is a file; give a folder")
  with errors.at(f"--out={folder}"):
    atomic.probe(folder / results_lib.FINISHED)


def make_scorer(args: argparse.Namespace) -> rewards.Scorer | None:
  """A scorer of the rewards of `--rewards`, which are ready to score; None without that flag."""
  if args.rewards is None:
    if args.reward_options != "{}":
      raise errors.InputError("--reward_options needs --rewards")
    return None
  made = arguments.make(args.rewards, args.reward_options)
  for name, reward in made.items():
    # When the command is repeated after a kill, only the missing answers are asked for.
    if hasattr(reward, "cache_in") and not files.is_object(args.out):
      reward.cache_in(args.out / f"{name}_answers.jsonl")
  scorer = rewards.Scorer(made, dict.fromkeys(made, 1.0))
  scorer.ready()
  return scorer


def make_exam(
  args: argparse.Namespace, prompts: Sequence[Any], of_iconworld: bool
) -> list[results_lib.Observe]:
  """The observer that has exam points answered, in a list; [] where there are none to answer.

  Args:
    args: of the command line.
    prompts: objects with `prompt` and `metadata`.
    of_iconworld: whether they are IconWorld's.

  Raises:
    InputError: there are points but no judge, or a judge but prompts without points.
  """
  has_points = any(exam_points.read(one.metadata) for one in prompts)
  ask = None
  if args.points_judge is not None:
    from unigrpo_jax.tools import points_judge  # Imports jax.

    ask = points_judge.open_ask(args.points_judge)
  if ask is None and has_points and args.rewards is None:
    raise errors.InputError(
      f"{args.prompts_from} has exam points; say who answers them: --rewards ta=judge, or the "
      "folder of a learned reward as --points_judge"
    )
  if ask is None and (has_points or not of_iconworld):
    return []
  for one in prompts:
    ta.points_of(one.prompt, one.metadata)
  return [ta.Exam(ask)]


def rewriter(prompts: Sequence[Any]) -> str:
  """A note for the title if GenEval's prompts were rewritten; "" otherwise."""
  different = {json.dumps(one.metadata): (one.prompt, one.metadata) for one in prompts}
  rewritten = geneval_prompts.is_rewritten(different.values())
  return "; prompts by a rewriter, not GenEval's own" if rewritten else ""


def raise_if_none(names: Sequence[str], rows: Sequence[results_lib.Row]) -> None:
  """Raises Unavailable, once results are written, where a reward scored no picture at all."""
  if dead := [name for name in names if not any(name in row.rewards for row in rows)]:
    raise errors.Unavailable(
      f"reward {', '.join(dead)} scored none of {len(rows)} pictures, see above; mend that and run "
      "the same command again"
    )


def print_failures(
  reasons: Mapping[str, Sequence[str]], rows: Sequence[results_lib.Row]
) -> None:
  """Prints, for each reward, how many pictures it could not score, and its first reason."""
  for name, texts in reasons.items():
    if count := sum(name not in row.rewards for row in rows):
      print(f"note: reward {name} did not score {count} pictures: {[*texts, 'unknown'][0]}")


def finish(
  out: pathlib.Path, found: results_lib.Results, *, of: str, about: Mapping[str, Any],
  settings: Mapping[str, Mapping[str, Any]], names: Sequence[str], of_geneval: bool,
  observers: Sequence[results_lib.Observe] = (),
) -> None:
  """Writes and prints the results of an evaluation.

  Args:
    out: folder for them.
    found: the results.
    of: the title, without the settings of rewards, which are appended.
    about: further members of results.json.
    settings: {reward: its settings}.
    names: rewards that were requested.
    of_geneval: whether the prompts are GenEval's; then tables have its form.
    observers: see `measured.by_mode`.
  """
  names = list(dict.fromkeys([*names, *found.rewards]))
  by_mode = measured.by_mode(found, *observers, names=names if of_geneval else None)
  tables = []
  for name in names:
    head = f"{name}: {describe(settings[name])}\n\n" if settings.get(name) else ""
    if of_geneval:
      of_mode = {mode: made[name] for mode, made in by_mode.items()}
      tables += [f"## {name}, {mode}\n\n{head}{made.table()}" for mode, made in of_mode.items()]
    elif name in found.rewards:
      tables.append(head + found.table(name))
      of_mode = {mode: _all(found, mode, name) for mode in found.modes}
    else:
      continue
    tables += filter(None, [geneval.best_of_table(name, of_mode)])
  said = [f"{name}: {describe(of_reward)}" for name, of_reward in settings.items()]
  found.save(
    out, "; ".join([of, *said]), tables=tables,
    about={**about, "of": of, "settings": dict(settings)},
  )
  write_benchmarks(out, by_mode)
  print("\n" + "\n".join(tables))
  print(f"wrote {out}")


def _all(found: results_lib.Results, mode: str, name: str) -> geneval.Summary:
  """The summary of a mode's rows that have a reward, all in one category."""
  rows = [row for row in found.rows if row.mode == mode and name in row.rewards]
  return geneval.summary(
    [row.rewards[name] for row in rows], [""] * len(rows), [row.key for row in rows]
  )


def describe(settings: Mapping[str, Any]) -> str:
  """A reward's settings as "key=value, ..."."""
  return ", ".join(
    f"{key}={value if isinstance(value, str) else json.dumps(value)}"
    for key, value in settings.items()
  )


def write_benchmarks(out: pathlib.Path, by_mode: Mapping[str, Any]) -> None:
  """Writes benchmarks.json; deletes an older one where there is nothing to write."""
  with errors.storage(out):
    if by_mode:
      atomic.write_text(out / "benchmarks.json", measured.to_json(by_mode))
    else:
      (out / "benchmarks.json").unlink(missing_ok=True)
