"""Draws, edits and answers from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import pathlib
import sys
import time

from unigrpo_jax import errors
from unigrpo_jax.data import atomic
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.runtime import host_flags

MODES = """modes:
  (none)                     draw the prompt
  --think                    reason about the prompt first, then draw
  --image=IN.png             edit the image as the prompt says (with --think: reason first)
  --understand               answer the prompt in words, about --image if given
  --understand --think       reason first, then answer

examples:
  python -m unigrpo_jax.generate --checkpoint=tiny --think --out=kites.png --upscale=8 \\
    --prompt="draw half of four kites in the colour of grass"
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompt="a red kite" --out=kite.png
  python -m unigrpo_jax.generate --checkpoint=BAGEL-7B-MoT --prompts_file=prompts.txt --out=images

"tiny" is the embedded checkpoint of IconWorld, a world of 32-pixel pictures of up to four icons; it
knows nothing else. --upscale makes its pictures large enough to look at.

The defaults in brackets are the released model's; a checkpoint states others under "generation" in
its bagel_config.json. Beside every image NAME.png lies NAME.json with the prompt, the reasoning,
the seed, the settings and the seconds of each phase. A row's result depends on its prompt, seed and
settings alone, not on the batch it ran in (to float rounding).
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.generate", description=__doc__.splitlines()[0], epilog=MODES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", default="tiny", help="official BAGEL folder, one made by convert, or "
      '"tiny", the embedded one, which draws 32 x 32 pixels (default: %(default)s)')
  add("--prompt", help="what to draw, change or answer")
  add("--prompts_file", type=pathlib.Path, help=".txt with one prompt a line, or .jsonl with "
      'one {"prompt": ...} a line; UTF-8, blank lines are skipped')
  add("--image", type=pathlib.Path, help="image to edit, or to talk about with --understand")
  add("--understand", action="store_true", help="answer in words instead of drawing")
  add("--think", action="store_true", help="write reasoning first")
  add("--out", type=pathlib.Path,
      help="PNG to write, or a folder for several prompts (default: generated.png or generated/); "
      "with --understand the JSON file (default: answer.json)")
  add("--height", type=int, help="pixels (default: the largest the checkpoint is configured for)")
  add("--width", type=int, help="pixels (default: as --height)")
  add("--upscale", type=int, default=1, metavar="N", help="write every pixel as N x N, to look at "
      "small pictures (default: %(default)s)")
  add("--steps", type=int, help="points of the time grid (default: 50); one velocity evaluation "
      "less")
  add("--shift", type=float, help="timestep shift (default: 3)")
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
  add("--cfg_pack_coupled", action="store_true", help="take the global norm over the whole batch, "
      "as the official code does to a pack; an image then depends on its neighbours")
  add("--seed", type=int, default=0, help="seed of the first row; row i has seed + i "
      "(default: %(default)s)")
  add("--temperature", type=float, help="of sampled text; 0 is greedy (default: 0.3)")
  add("--max_tokens", type=int, help="most tokens of reasoning or answer (default: 1000)")
  add("--batch_size", type=int, help="rows run together (default: all)")
  add("--dtype", choices=("float32", "bfloat16"),
      help="of the network (default: float32 on CPU, bfloat16 elsewhere)")
  host_flags.add_arguments(parser)
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
  bounds = {
    "steps": dict(low=2, high=100_000), "shift": dict(above=0, high=1e6),
    "temperature": dict(low=0, high=1e6), "max_tokens": dict(low=1), "batch_size": dict(low=1),
    "height": dict(low=1), "width": dict(low=1), "cfg_renorm_min": dict(low=0, high=1),
    "upscale": dict(low=1, high=64),
    "seed": dict(low=0, high=2**31 - 1), "cfg_text_scale": dict(low=0, high=1e6),
    "cfg_image_scale": dict(low=0, high=1e6),
  }
  for name, bound in bounds.items():
    errors.require(f"--{name}", getattr(args, name), **bound)
  if args.cfg_interval and not 0 <= args.cfg_interval[0] < args.cfg_interval[1]:
    low, high = args.cfg_interval
    raise errors.InputError(f"--cfg_interval={low} {high} must have 0 <= LOW < HIGH")


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
  _probe(out, paths)
  return paths


def _probe(out: pathlib.Path, paths: Sequence[pathlib.Path]) -> None:
  """Refuses a place where results cannot be written."""
  with errors.at(f"--out={out}"):
    atomic.probe(paths[0])
  for existing in paths:
    if existing.is_dir():
      raise errors.InputError(f"--out={out}: {existing} is a folder; give a file name")


@contextlib.contextmanager
def progress_by_phase() -> Iterator[Callable[[str, int, int], None]]:
  """A function of (phase, done, total) that shows a bar for each phase of a batch."""
  from unigrpo_jax.runtime import metrics

  bars = {}

  def report(phase: str, done: int, total: int) -> None:
    if phase not in bars:
      close()
      unit = "tokens at most" if phase == "decode" else "steps"
      bars[phase] = metrics.progress(total, phase, unit=unit)
    # Calls of the devices may come out of order.
    bars[phase].update(max(done - bars[phase].n, 0))

  def close() -> None:
    for bar in bars.values():
      bar.close()

  try:
    yield report
  finally:
    close()


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  prompts = [args.prompt]
  if args.prompts_file is not None:
    prompts = [prompt for prompt, _ in prompts_lib.read_file(args.prompts_file)]

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.runtime import hosts

  hosts.from_flags(args)
  hosts.run(lambda: generate(args, prompts), lambda: "what was drawn is written")


def generate(args: argparse.Namespace, prompts: Sequence[str]) -> None:
  """Draws on all hosts; the first of them writes."""
  import jax

  from unigrpo_jax.data import images
  from unigrpo_jax.episodes import batches
  from unigrpo_jax.episodes import pipeline as pipeline_lib
  from unigrpo_jax.runtime import checkpoints, hosts, sharding

  hosts.compare(vars(args) | {"process": None, "prompts": list(prompts)})
  with hosts.raise_on_all_hosts():
    paths = output_paths(args, len(prompts)) if hosts.first() else []
    image = images.load_rgb(args.image) if args.image else None
  size = (args.height or args.width, args.width or args.height)
  requests = [
    batches.Request(prompt, seed=args.seed + row, image=image, size=size if any(size) else None)
    for row, prompt in enumerate(prompts)
  ]
  with hosts.raise_on_all_hosts():
    pipeline = pipeline_lib.Pipeline.open(args.checkpoint, dtype=args.dtype)
  settings = _settings(args, pipeline.config.generation)
  # Prepared together, they have one shape, which compiles once.
  step = pipeline.batch_rows(args.batch_size or len(requests), len(requests))
  ready = batches.split(pipeline.prepare(requests, settings, step), step)

  tell = lambda text: hosts.first() and print(text, file=sys.stderr, flush=True)
  tell(f"loading {args.checkpoint}")
  start = time.perf_counter()
  pipeline.load(("bagel",) if args.understand else ("bagel", "vae"))
  load_seconds = round(time.perf_counter() - start, 3)
  shape = " x ".join(f"{axis} {pipeline.mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  tell(
    f"loaded in {load_seconds:.1f} s on {jax.default_backend()} ({shape}); {len(requests)} "
    f"prompt(s) in {len(ready)} batch(es), of which the first compiles"
  )
  for first, batch in zip(range(0, len(requests), step), ready):
    try:
      with progress_by_phase() as progress:
        results = pipeline.run(batch, progress)
    except jax.errors.JaxRuntimeError as error:
      if not checkpoints.is_full(error):
        raise
      advice = "take more devices, or smaller images or --max_tokens"
      if step > pipeline.batch_rows(1, 1):
        advice = f"give a --batch_size below {step}"
      raise errors.InputError(f"{step} rows do not fit in device memory; {advice}") from None
    record = {
      "checkpoint": args.checkpoint,
      "image": str(args.image) if args.image else None,
      "settings": dataclasses.asdict(settings),
      "dtype": jax.numpy.dtype(pipeline.model.dtype).name,
      "batch": len(results),
      "seconds": {"load": load_seconds} | pipeline.seconds,
    }
    with hosts.raise_on_all_hosts():
      if hosts.first():
        _write(args, paths[first:], requests[first:], results, record)


def _write(args: argparse.Namespace, paths, requests, results, record) -> None:
  for path, request, result in zip(paths, requests, results):
    try:
      _save(path, request, result, record, args.upscale)
    except OSError as error:
      raise errors.InputError(f"{path}: cannot be written ({error.strerror})") from None
    _show(path, request, result, args.understand)


def _settings(args: argparse.Namespace, defaults):
  """The settings: what was given, else the checkpoint's own; editing has the release's guidance."""
  from unigrpo_jax.episodes import batches
  from unigrpo_jax.sampling import flow

  editing = args.image is not None and not args.understand
  given = lambda value, default: default if value is None else value
  return batches.Settings(
    think=args.think, understand=args.understand,
    num_timesteps=given(args.steps, defaults.num_timesteps),
    shift=given(args.shift, defaults.timestep_shift),
    temperature=given(args.temperature, defaults.temperature),
    max_tokens=given(args.max_tokens, defaults.max_tokens),
    guidance=flow.Guidance(
      text_scale=given(args.cfg_text_scale, defaults.cfg_text_scale),
      image_scale=given(args.cfg_image_scale, 2.0 if editing else 1.0),
      interval=tuple(given(args.cfg_interval, (0.0, 1.0) if editing else defaults.cfg_interval)),
      renorm=given(args.cfg_renorm, "text_channel" if editing else defaults.cfg_renorm_type),
      renorm_min=args.cfg_renorm_min, pack_coupled=args.cfg_pack_coupled,
    ),
  )


def _save(path: pathlib.Path, request, result, record, upscale: int) -> None:
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

    record["size"], record["upscale"] = list(result.image.shape[:2]), upscale
    picture = PIL.Image.fromarray(result.image.repeat(upscale, axis=0).repeat(upscale, axis=1))
    atomic.write(path, lambda aside: picture.save(aside, format="PNG"))
  text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
  atomic.write_text(path.with_suffix(".json"), text)


def _show(path: pathlib.Path, request, result, understand: bool) -> None:
  if result.text is not None:
    cut = "" if result.finished else " [cut at max_tokens]"
    print(f"{'answer' if understand else 'reasoning'} to {request.prompt!r}: {result.text}{cut}")
  print(f"wrote {path}" + ("" if understand else f" and {path.with_suffix('.json').name}"))


if __name__ == "__main__":
  errors.report(main)
