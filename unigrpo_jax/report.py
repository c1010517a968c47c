"""Makes a page about a run: `python -m unigrpo_jax.report WORKDIR`."""

from __future__ import annotations

from collections.abc import Sequence
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files
from unigrpo_jax.tools.report import figure, page, workdir

DESCRIPTION = """Makes one HTML page about a run: rewards with intervals, health, the same prompts
before and after, timings, configuration. It needs nothing beside it and no network."""


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(prog="python -m unigrpo_jax.report", description=DESCRIPTION)
  parser.add_argument("workdir", type=files.path, help="folder of the run, with metrics.jsonl")
  parser.add_argument(
    "--out", type=files.path, help="file to write (default: report.html in the folder)"
  )
  parser.add_argument(
    "--figure", type=files.path, help="write one picture too (.png, .svg or .pdf): the reward, "
    "and prompts before and after",
  )
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  out = args.out or args.workdir / "report.html"
  if out.is_dir():
    raise errors.InputError(f"--out={out} is a folder; name a file in it")
  if args.figure:
    figure.check_name(args.figure)
  run = workdir.read(args.workdir)
  text = page.render(run)
  with errors.storage(f"--out={out}"):
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out, text)
  print(f"wrote {out} ({len(text.encode(errors='backslashreplace')) / 1e6:.2f} MB)")
  if args.figure:
    figure.draw(run, args.figure)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
  errors.report(main)
