"""Builds prompt sets: `python -m unigrpo_jax.data --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
import json
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files, importers, progress, prompts

NAMES = ", ".join(prompts.GENERATED)
EPILOG = f"""prompt files (UTF-8):
  NAME.txt     one prompt a line
  NAME.jsonl   one JSON object a line with the key "prompt"; the object as it is becomes the
               prompt's metadata. GenEval's evaluation_metadata.jsonl is such a file.
  NAME.json    a list of such objects
  NAME.csv .tsv .parquet    a row a prompt, its columns are the metadata; verl's rows too
  Blank lines are skipped, repeated prompts are not. The prompt is --prompt_key, else the first of
  {', '.join(prompts.PROMPT_KEYS)}.
  Of a folder, --split chooses SPLIT.txt (and other endings), SPLIT_metadata.jsonl, SPLIT*.parquet
  or data/SPLIT-*.parquet.

examples:
  python -m unigrpo_jax.data --build=mine.txt --name=mine
  python -m unigrpo_jax.data --build=a.jsonl --split=train --build=b.jsonl --split=test --name=both
  python -m unigrpo_jax.data --build={prompts.ICONWORLD} --name=small_world --count=1000
  python -m unigrpo_jax.data --build=words --split=test --name=some_words
  python -m unigrpo_jax.data --import=dpg=dpg_bench.csv --out=dpg.jsonl

The set is the folder OUT/NAME. It is read by its folder, or by its name where OUT is the default.
Where a set is expected, a prompt file or one of these names may also be given, without building:
  {NAMES}
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.data", allow_abbrev=False, epilog=EPILOG,
    description="Builds a prompt set (a TFDS folder of ArrayRecord files) to train or evaluate on.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--build", action="append", default=[], metavar="SOURCE",
      help=f"prompt file or folder, or {NAMES}; once for each split")
  add("--split", action="append", default=[],
      help="name of the split that --build makes, once for each --build (default: train; of "
      "a generated set: all that it has)")
  add("--name", help="of the set: lower-case letters, digits and _")
  add("--prompt_key", metavar="KEY", help="which column or key of the files is the prompt")
  add("--import", dest="questions", metavar="SET=FILE",
      help=f"in place of --build: a benchmark's questions ({', '.join(importers.SETS)}) as exam "
      "points, a .jsonl file that any prompt file may be used like")
  add("--out", type=files.path,
      help=f"folder to make the set in (default: {prompts.default_folder()}); of --import, the "
      "file (default: SET.jsonl)")
  add("--count", type=int,
      help=f"prompts in each split of a generated set, {NAMES} (default: its own number)")
  add("--overwrite", action="store_true", help="replace what is there, after success only")
  return parser.parse_args(argv)


def read_splits(args: argparse.Namespace) -> dict[str, Iterable[tuple[str, dict[str, Any]]]]:
  """{split: its (prompt, metadata) pairs}; files are read when iterated over.

  Raises:
    InputError: the arguments do not go together, or a file is missing.
  """
  builds, names = args.build, args.split
  if len(builds) == 1 and builds[0] in prompts.GENERATED:
    names = names or list(prompts.GENERATED[builds[0]].counts)
    builds = builds * len(names)
  elif len(builds) == 1:
    names = names or ["train"]
  if len(builds) != len(names):
    raise errors.InputError(
      f"{len(builds)} --build and {len(names)} --split: give each --build its own --split"
    )
  if args.count is not None and not prompts.GENERATED.keys() & set(builds):
    raise errors.InputError(
      f"--count={args.count} is for {NAMES}; all prompts of a file are used"
    )
  reads_files = not prompts.GENERATED.keys() >= set(builds)
  if args.prompt_key is not None and not (args.prompt_key and reads_files):
    raise errors.InputError(
      f"--prompt_key={args.prompt_key} names a column or key of a file; give one, or leave it out"
    )
  splits = {}
  for build, split in zip(builds, names):
    if split in splits:
      raise errors.InputError(f"--split={split} is given twice; a split has one source")
    if build in prompts.GENERATED:
      pairs = prompts.generated(build, split, args.count)
      total = len(pairs)
    else:
      pairs, total = read_source(build, split, args.prompt_key)
    splits[split] = progress.each(pairs, total, split, unit="prompts")
  return splits


def read_source(
  source: str, split: str, prompt_key: str | None
) -> tuple[Iterable[tuple[str, dict[str, Any]]], int | None]:
  """The pairs of a file or folder, and about how many they are, where that is soon found."""
  path = files.path(source)
  if path.is_dir():
    return prompts.read_split(path, split, prompt_key), None
  if not path.is_file():
    raise errors.InputError(
      f"--build={source}: no such file or folder; give one, or a name: {NAMES}"
    )
  total = None
  if path.suffix.lower() in (".txt", ".jsonl"):
    with path.open("rb") as file:
      total = sum(1 for _ in file)
  return prompts.read_file(path, prompt_key), total


def import_questions(args: argparse.Namespace) -> None:
  """Writes the exam points of `--import`.

  Raises:
    InputError: the set is unknown, its file cannot be read, or the output is there already.
  """
  if args.build or args.name or args.split or args.prompt_key or args.count is not None:
    raise errors.InputError("--import stands alone, with --out and --overwrite")
  name, _, source = args.questions.partition("=")
  errors.choose("--import", name, importers.SETS)
  out = args.out or files.path(f"{name}.jsonl")
  if out.suffix != ".jsonl" or (out.exists() and not args.overwrite):
    wrong = "exists already" if out.exists() else "must end in .jsonl"
    raise errors.InputError(f"--out={out}: {wrong}; give another, or pass --overwrite")
  found = list(importers.SETS[name](files.path(source)))
  with errors.storage(out):
    atomic.write_text(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))
  points = sum(len(record.get("points", ())) for record in found)
  print(f"{out}: {len(found)} prompts with {points} questions, of {source}")


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.questions is not None:
    import_questions(args)
    return
  if not args.build or args.name is None:
    raise errors.InputError("give --build and --name, or --import; --help shows the arguments")
  if args.name in prompts.GENERATED:
    raise errors.InputError(f"--name={args.name} is a generated set; choose another name")
  splits = read_splits(args)

  # After the arguments are known to be good: importing TFDS takes a second.
  from unigrpo_jax.data import prompt_folders

  folder = prompt_folders.build(
    args.name, splits, args.out or prompts.default_folder(), overwrite=args.overwrite
  )
  for split in splits:
    opened = prompts.open_set(folder, split)
    print(f"{folder}, split {split}: {len(opened)} prompts, the first {opened[0].prompt[:60]!r}")


if __name__ == "__main__":
  errors.report(main)
