"""Builds prompt sets: `python -m unigrpo_jax.data --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import files, progress, prompts

NAMES = ", ".join(prompts.GENERATED)
EPILOG = f"""prompt files (UTF-8):
  NAME.txt     one prompt a line
  NAME.jsonl   one JSON object a line with the key "prompt"; the object as it is becomes the
               prompt's metadata. GenEval's evaluation_metadata.jsonl is such a file.
  Blank lines are skipped, repeated prompts are not.

examples:
  python -m unigrpo_jax.data --build=mine.txt --name=mine
  python -m unigrpo_jax.data --build=a.jsonl --split=train --build=b.jsonl --split=test --name=both
  python -m unigrpo_jax.data --build={prompts.ICONWORLD} --name=small_world --count=2000
  python -m unigrpo_jax.data --build=words --split=test --name=some_words

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
  add("--build", action="append", required=True, metavar="SOURCE",
      help=f"prompt file, or {NAMES}; once for each split")
  add("--split", action="append", default=[],
      help="name of the split that --build makes, once for each --build (default: train; of "
      "a generated set: all that it has)")
  add("--name", required=True, help="of the set: lower-case letters, digits and _")
  add("--out", type=files.path, default=prompts.default_folder(),
      help="folder to make the set in (default: %(default)s)")
  add("--count", type=int,
      help=f"prompts in each split of a generated set, {NAMES} (default: its own number)")
  add("--overwrite", action="store_true", help="replace a set of this name, after success only")
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
  splits = {}
  for build, split in zip(builds, names):
    if split in splits:
      raise errors.InputError(f"--split={split} is given twice; a split has one source")
    if build in prompts.GENERATED:
      pairs = prompts.generated(build, split, args.count)
      total = len(pairs)
    else:
      path = files.path(build)
      if not path.is_file():
        raise errors.InputError(f"--build={build}: no such file; give a .txt or .jsonl file")
      pairs = prompts.read_file(path)
      with path.open("rb") as file:
        total = sum(1 for _ in file)
    splits[split] = progress.each(pairs, total, split, unit="prompts")
  return splits


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.name in prompts.GENERATED:
    raise errors.InputError(f"--name={args.name} is a generated set; choose another name")
  splits = read_splits(args)

  # After the arguments are known to be good: importing TFDS takes a second.
  from unigrpo_jax.data import prompt_folders

  folder = prompt_folders.build(args.name, splits, args.out, overwrite=args.overwrite)
  for split in splits:
    opened = prompts.open_set(folder, split)
    print(f"{folder}, split {split}: {len(opened)} prompts, the first {opened[0].prompt[:60]!r}")


if __name__ == "__main__":
  errors.report(main)
