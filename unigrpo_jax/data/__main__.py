"""Builds prompt sets: `python -m unigrpo_jax.data --help`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import pathlib
import signal
import sys
import time

from unigrpo_jax import errors
from unigrpo_jax.data import prompt_files, prompts

EPILOG = f"""prompt files (UTF-8):
  NAME.txt     one prompt a line
  NAME.jsonl   one JSON object a line with the key "prompt"; the object as it is becomes the
               prompt's metadata. GenEval's evaluation_metadata.jsonl is such a file.
  Blank lines are skipped, prompts that repeat are kept.

examples:
  python -m unigrpo_jax.data --build=mine.txt --name=mine
  python -m unigrpo_jax.data --build=a.jsonl --split=train --build=b.jsonl --split=test --name=both
  python -m unigrpo_jax.data --build={prompts.ICONWORLD} --name=small_world --count=2000

The set is the folder OUT/NAME. It is read by its folder, or by its name where OUT is the default.
Where a set is expected, a prompt file or {prompts.ICONWORLD} may also be given, without building.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.data", allow_abbrev=False, epilog=EPILOG,
    description="Builds a prompt set (a TFDS folder of ArrayRecord files) to train or evaluate on.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--build", action="append", required=True, metavar="SOURCE",
      help=f"prompt file, or {prompts.ICONWORLD}; once for each split")
  add("--split", action="append", default=[],
      help=f"name of the split that --build makes, once for each --build (default: train; of "
      f"{prompts.ICONWORLD}: {', '.join(prompts.ICONWORLD_COUNTS)}, all three)")
  add("--name", required=True, help="of the set: lower-case letters, digits and _")
  add("--out", type=pathlib.Path,
      help=f"folder to make the set in (default: {prompts.default_folder()})")
  counts = ", ".join(f"{split} {count}" for split, count in prompts.ICONWORLD_COUNTS.items())
  add("--count", type=int,
      help=f"prompts in each split of {prompts.ICONWORLD} (default: {counts})")
  add("--overwrite", action="store_true", help="replace a set of this name, after success only")
  return parser.parse_args(argv)


class Progress:
  """Prints how far a split is: in place on a terminal, else every five seconds."""

  def __init__(self, split: str):
    self._split, self._start = split, time.monotonic()
    self._printed = self._start

  def __call__(self, count: int, done: int, total: int) -> None:
    """`count` prompts so far; `done` of `total` in whatever unit."""
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if now - self._printed < (0.1 if terminal else 5.0):
      return
    self._printed = now
    left = (now - self._start) / max(done, 1) * max(total - done, 0)
    line = f"{self._split}: {count} prompts, {done / max(total, 1):.0%}, {left:.0f} s left"
    print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
    sys.stderr.flush()


def sources(args: argparse.Namespace) -> dict[str, Callable]:
  """{split: function that gives its pairs}, from the arguments.

  Raises:
    InputError: the arguments do not go together, or a file is missing.
  """
  splits = args.split
  if args.build == [prompts.ICONWORLD]:
    builds = args.build * max(len(splits), 1)
    if not splits:
      builds, splits = args.build * len(prompts.ICONWORLD_COUNTS), list(prompts.ICONWORLD_COUNTS)
  else:
    builds = args.build
    if len(builds) == 1 and not splits:
      splits = ["train"]
  if len(builds) != len(splits):
    raise errors.InputError(
      f"{len(builds)} --build and {len(splits)} --split: give each --build its own --split"
    )
  if args.count is not None and prompts.ICONWORLD not in builds:
    raise errors.InputError(
      f"--count={args.count} is for {prompts.ICONWORLD}; a file is taken whole"
    )
  found = {}
  for build, split in zip(builds, splits):
    if split in found:
      raise errors.InputError(f"--split={split} is given twice; a split has one source")
    found[split] = _source(build, split, args.count)
  return found


def _source(build: str, split: str, count: int | None) -> Callable:
  progress = Progress(split)
  if build == prompts.ICONWORLD:
    return lambda: prompts.iconworld_pairs(
      split, count, lambda done, total: progress(done, done, total)
    )
  path = pathlib.Path(build)
  if not path.is_file():
    raise errors.InputError(f"--build={build}: no such file; give a .txt or .jsonl file")
  size = path.stat().st_size
  return lambda: prompt_files.read(path, lambda found, nbytes: progress(found, nbytes, size))


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.name == prompts.ICONWORLD:
    raise errors.InputError(f"--name={args.name} is the embedded world's own; choose another")
  splits = sources(args)
  out = args.out or prompts.default_folder()

  # After the arguments are known to be good: importing TFDS takes a second.
  from unigrpo_jax.data import builders

  try:
    folder = builders.build(args.name, splits, out, overwrite=args.overwrite)
  except OSError as error:
    raise errors.InputError(
      f"{error.filename or out}: {error.strerror or error}; check permissions and free space"
    ) from None
  for split in splits:
    opened = prompts.open_set(folder, split)
    print(f"{folder}, split {split}: {len(opened)} prompts, the first {opened[0].prompt[:60]!r}")


def _interrupt(number, frame):
  raise KeyboardInterrupt


if __name__ == "__main__":
  # A job that is told to stop takes its half-written folder with it.
  signal.signal(signal.SIGTERM, _interrupt)
  errors.report(main)
