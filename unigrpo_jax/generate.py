"""Draws, edits and answers from the command line: `python -m unigrpo_jax.generate --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
import os
import pathlib
import sys
import time

from unigrpo_jax import errors

MODES = """modes:
  (none)                     draw the prompt
  --think                    reason about the prompt first, then draw
  --image=IN.png             edit the image as the prompt says (with --think: reason first)
  --understand               answer the prompt in words, about --image if given
  --understand --think       reason first, then answer

examples:
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompt="a red kite" --out=kite.png
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompts_file=prompts.txt --out=images

Beside every image NAME.png lies NAME.json with the prompt, the reasoning, the seed, the settings
and the seconds of each phase. A row's result depends on its prompt, seed and settings alone, not on
the batch it ran in (to float rounding).
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.generate", description=__doc__.splitlines()[0], epilog=MODES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", required=True, help="official BAGEL folder, or one made by convert")
  add("--prompt", help="what to draw, change or answer")
  add("--prompts_file", type=pathlib.Path, help="one prompt a line, UTF-8; blank lines are skipped")
  add("--image", type=pathlib.Path, help="image to edit, or to talk about with --understand")
  add("--understand", action="store_true", help="answer in words instead of drawing")
  add("--think", action="store_true", help="write reasoning first")
  add("--out", type=pathlib.Path,
      help="PNG to write, or a folder for several prompts (default: generated.png or generated/); "
      "with --understand the JSON file (default: answer.json)")
  add("--height", type=int, help="pixels (default: the largest the checkpoint is configured for)")
  add("--width", type=int, help="pixels (default: as --height)")
  add("--steps", type=int, default=50, help="points of the time grid, %(default)s by default; "
      "one velocity evaluation less")
  add("--shift", type=float, default=3.0, help="timestep shift (default: %(default)s)")
  add("--cfg_text_scale", type=float, help="guidance by the prompt; 1 turns all guidance off "
      "(default: 4)")
  add("--cfg_image_scale", type=float, help="guidance by the image; 1 turns it off (default: 1, "
      "editing 2)")
  add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
      help="guide where LOW < t <= HIGH (default: 0.4 1, editing 0 1)")
  add("--cfg_renorm", choices=("global", "channel", "text_channel"),
      help="norm that guidance may not exceed (default: global, editing text_channel)")
  add("--cfg_renorm_min", type=float, default=0.0, help="least renorm factor; 1 turns it off "
      "(default: %(default)s)")
  add("--seed", type=int, default=0, help="seed of the first row; row i has seed + i "
      "(default: %(default)s)")
  add("--temperature", type=float, default=0.3, help="of sampled text; 0 is greedy "
      "(default: %(default)s)")
  add("--max_tokens", type=int, default=1000, help="most tokens of reasoning or answer "
      "(default: %(default)s)")
  add("--batch_size", type=int, help="rows run together (default: all)")
  add("--dtype", choices=("float32", "bfloat16"),
      help="of the network (default: float32 on CPU, bfloat16 elsewhere)")
  args = parser.parse_args(argv)
  _check_args(args)
  return args


def _check_args(args: argparse.Namespace) -> None:
  """Refuses what cannot work before anything is loaded."""
  if (args.prompt is None) == (args.prompts_file is None):
    raise errors.InputError("give exactly one of --prompt and --prompts_file")
  if args.prompt is not None and not args.prompt.strip():
    raise errors.InputError("--prompt is empty; write what to draw, change or answer")
  if args.image and (args.height or args.width):
    raise errors.InputError(
      "--height and --width cannot be given with --image: an edit keeps its image's (resized) size"
    )
  bounds = [
    ("steps", 2, None), ("shift", 0, None), ("temperature", 0, None), ("max_tokens", 1, None),
    ("batch_size", 1, None), ("height", 1, None), ("width", 1, None), ("cfg_renorm_min", 0, 1),
    ("seed", 0, 2**31 - 1), ("cfg_text_scale", 0, None), ("cfg_image_scale", 0, None),
  ]
  for name, low, high in bounds:
    value = getattr(args, name)
    bad = value is not None and (
      not math.isfinite(value) or value < low or (high is not None and value > high)
    )
    if bad or (name == "shift" and value == 0):
      most = "" if high is None else f" and at most {high}"
      least = "more than 0" if name == "shift" else f"at least {low}"
      raise errors.InputError(f"--{name}={value} must be {least}{most}")
  if args.cfg_interval and not 0 <= args.cfg_interval[0] < args.cfg_interval[1]:
    low, high = args.cfg_interval
    raise errors.InputError(f"--cfg_interval={low} {high} must have 0 <= LOW < HIGH")


def read_prompts(path: pathlib.Path) -> list[str]:
  """The non-blank lines of a UTF-8 file."""
  try:
    lines = path.read_bytes().splitlines()
  except OSError as error:
    raise errors.InputError(f"--prompts_file={path}: {error.strerror}") from None
  prompts = []
  for number, line in enumerate(lines, 1):
    try:
      prompts.append(line.decode("utf-8").strip())
    except UnicodeDecodeError:
      raise errors.InputError(f"{path}, line {number}: not UTF-8 text; save it as UTF-8") from None
  prompts = [prompt for prompt in prompts if prompt]
  if not prompts:
    raise errors.InputError(f"{path}: no prompts; expected one a line")
  return prompts


def output_paths(args: argparse.Namespace, count: int) -> list[pathlib.Path]:
  """Where each row goes; refuses a place that cannot be written to."""
  suffix = ".json" if args.understand else ".png"
  out = args.out
  if count == 1 and (out is None or out.suffix):
    out = out or pathlib.Path("answer.json" if args.understand else "generated.png")
    if out.suffix != suffix:
      raise errors.InputError(f"--out={out} must end in {suffix}")
    paths = [out]
  else:
    out = out or pathlib.Path("generated")
    if out.suffix in (".png", ".json") or out.is_file():
      raise errors.InputError(f"--out={out} must be a folder for {count} prompts")
    paths = [out / f"{row:05d}{suffix}" for row in range(count)]
  folder = next(p for p in (paths[0].parent, *paths[0].absolute().parent.parents) if p.exists())
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise errors.InputError(f"--out={out}: cannot write into {folder}")
  return paths


class Progress:
  """Prints how far a phase is, in place on a terminal and at most every five seconds elsewhere."""

  def __init__(self):
    self._start, self._last, self._phase, self._done = 0.0, 0.0, None, 0

  def __call__(self, phase: str, done: int, total: int) -> None:
    now = time.perf_counter()
    if phase != self._phase:
      self._phase, self._start, self._last, self._done = phase, now, now, 0
    if done <= self._done:
      return
    terminal = sys.stderr.isatty()
    if done < total and now - self._last < (0.1 if terminal else 5.0):
      return
    self._last, self._done = now, done
    left = (now - self._start) / max(done - 1, 1) * (total - done)
    line = f"{phase}: {done} of at most {total} tokens" if phase == "write" else (
      f"{phase}: step {done} of {total}, {left:.0f} s left"
    )
    print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
    if terminal and done == total:
      print(file=sys.stderr)
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts_file)
  paths = output_paths(args, len(prompts))

  # After the arguments are known to be good: importing jax takes seconds.
  import jax

  from unigrpo_jax import batches, sharding
  from unigrpo_jax import pipeline as pipeline_lib
  from unigrpo_jax.data import images

  image = images.load_rgb(args.image) if args.image else None
  size = (args.height or args.width, args.width or args.height)
  requests = [
    batches.Request(prompt, seed=args.seed + row, image=image, size=size if any(size) else None)
    for row, prompt in enumerate(prompts)
  ]
  settings = _settings(args)
  pipeline = pipeline_lib.Pipeline.open(args.checkpoint, dtype=args.dtype)
  step = args.batch_size or len(requests)
  starts = range(0, len(requests), step)
  ready = [pipeline.prepare(requests[first : first + step], settings) for first in starts]

  start = time.perf_counter()
  pipeline.load(("bagel",) if args.understand else ("bagel", "vae"))
  load_seconds = round(time.perf_counter() - start, 3)
  shape = " x ".join(f"{axis} {pipeline.mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  print(
    f"loaded {args.checkpoint} in {load_seconds:.1f} s on {jax.default_backend()} ({shape}); "
    f"{len(requests)} prompt(s) in {len(ready)} batch(es)", file=sys.stderr,
  )
  progress = Progress()
  for first, batch in zip(starts, ready):
    results = pipeline.run(batch, progress)
    record = {
      "checkpoint": args.checkpoint,
      "image": str(args.image) if args.image else None,
      "settings": dataclasses.asdict(settings),
      "dtype": jax.numpy.dtype(pipeline.model.dtype).name,
      "batch": len(results),
      "seconds": {"load": load_seconds} | pipeline.seconds,
    }
    for path, request, result in zip(paths[first:], requests[first:], results):
      _save(path, request, result, record)
      _show(path, request, result, args.understand)


def _settings(args: argparse.Namespace):
  """The settings, with the released model's own guidance where none was given."""
  from unigrpo_jax import batches
  from unigrpo_jax.sampling import flow

  editing = args.image is not None and not args.understand
  chosen = lambda value, drawing, edit: value if value is not None else edit if editing else drawing
  return batches.Settings(
    think=args.think, understand=args.understand, num_timesteps=args.steps, shift=args.shift,
    temperature=args.temperature, max_tokens=args.max_tokens,
    guidance=flow.Guidance(
      text_scale=chosen(args.cfg_text_scale, 4.0, 4.0),
      image_scale=chosen(args.cfg_image_scale, 1.0, 2.0),
      interval=tuple(chosen(args.cfg_interval, (0.4, 1.0), (0.0, 1.0))),
      renorm=chosen(args.cfg_renorm, "global", "text_channel"),
      renorm_min=args.cfg_renorm_min,
    ),
  )


def _save(path: pathlib.Path, request, result, record) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  record = {
    "prompt": request.prompt,
    "text": result.text,
    "text_tokens": len(result.ids),
    "text_finished": result.finished,
    "seed": request.seed,
  } | record
  if result.image is not None:
    import PIL.Image

    record["size"] = list(result.image.shape[:2])
    picture = PIL.Image.fromarray(result.image)
    write_aside(path, lambda aside: picture.save(aside, format="PNG"))
  text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
  write_aside(path.with_suffix(".json"), lambda aside: aside.write_text(text, encoding="utf-8"))


def write_aside(path: pathlib.Path, write) -> None:
  """Writes beside `path`, then renames: an interrupted run leaves no half-written file."""
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    write(aside)
    aside.replace(path)
  finally:
    aside.unlink(missing_ok=True)


def _show(path: pathlib.Path, request, result, understand: bool) -> None:
  if result.text is not None:
    cut = "" if result.finished else " [cut at max_tokens]"
    print(f"{'answer' if understand else 'reasoning'} to {request.prompt!r}: {result.text}{cut}")
  print(f"wrote {path}" + ("" if understand else f" and {path.with_suffix('.json').name}"))


if __name__ == "__main__":
  errors.report(main)
