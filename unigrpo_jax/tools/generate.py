"""Drawing, editing and answering, by the flags of `unigrpo_jax.generate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import PIL.Image
import tqdm

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, images, progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline as pipeline_lib
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.runtime import checkpoints, hosts, sharding
from unigrpo_jax.tools import sampling_flags


def run(args: argparse.Namespace) -> None:
  """Connects the hosts, and runs the sampling on all of them."""
  hosts.from_flags(args)
  hosts.run(lambda: generate(args), lambda: "what was drawn is written")


def generate(args: argparse.Namespace) -> None:
  """Samples on all hosts; the first host prints and writes."""
  with hosts.raise_on_all_hosts():
    prompts = [args.prompt]
    if args.prompts_file is not None:
      prompts = [prompt for prompt, _ in prompts_lib.read_file(args.prompts_file)]
  hosts.compare(vars(args) | {"process": None, "prompts": prompts})
  with hosts.raise_on_all_hosts():
    paths = output_paths(args, len(prompts)) if hosts.first() else []
    image = images.load_rgb(args.image) if args.image else None
    pipeline = pipeline_lib.Pipeline.open(
      args.checkpoint, adapter=args.adapter, dtype=args.dtype
    )
  size = None
  if args.height or args.width:
    size = (args.height or args.width, args.width or args.height)
  requests = [
    requests_lib.Request(prompt, seed=args.seed + row, image=image, size=size)
    for row, prompt in enumerate(prompts)
  ]
  settings = make_settings(args, pipeline.config.generation)
  rows = pipeline.batch_rows(args.batch_size or len(requests), len(requests))
  # Prepared together, all batches have one shape, which compiles once.
  batches = requests_lib.split(pipeline.prepare(requests, settings, rows), rows)

  _log(f"loading {args.checkpoint}")
  start = time.perf_counter()
  pipeline.load(("bagel",) if args.understand else ("bagel", "vae"))
  load_seconds = round(time.perf_counter() - start, 3)
  shape = " x ".join(f"{axis} {pipeline.mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  _log(
    f"loaded in {load_seconds:.1f} s on {jax.default_backend()} ({shape}); {len(requests)} "
    f"prompt(s) in {len(batches)} batch(es), of which the first compiles"
  )
  bars = PhaseBars()
  for number, batch in enumerate(batches):
    first = number * rows
    if len(batches) > 1:
      bars.label = f"batch {number + 1} of {len(batches)}, "
    try:
      results = pipeline.run(batch, bars)
      jax.effects_barrier()  # Late callbacks of this batch must not reach the next one's bars.
    except jax.errors.JaxRuntimeError as error:
      if not checkpoints.is_full(error):
        raise
      advice = "take more devices, or smaller images or --max_tokens"
      if rows > pipeline.batch_rows(1, 1):
        advice = f"give a --batch_size below {rows}"
      raise errors.InputError(f"{rows} rows do not fit in device memory; {advice}") from None
    finally:
      bars.close()
    record = {
      "checkpoint": args.checkpoint,
      "adapter": args.adapter,
      "image": str(args.image) if args.image else None,
      "settings": dataclasses.asdict(settings),
      "dtype": jnp.dtype(pipeline.network.model.dtype).name,
      "batch": len(results),
      "seconds": {"load": load_seconds} | pipeline.seconds,
    }
    with hosts.raise_on_all_hosts():
      if hosts.first():
        for path, request, result in zip(paths[first:], requests[first:], results):
          _save(path, request, result, record, args.upscale)
          _print(path, request, result, args.understand)


def make_settings(args: argparse.Namespace, defaults: Any) -> requests_lib.Settings:
  """Settings from the flags; where one is not given, the checkpoint's default.

  Edits default to the guidance that BAGEL's release uses for edits.
  """
  editing = args.image is not None and not args.understand
  if editing:
    defaults = dataclasses.replace(
      defaults, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"
    )
  image_scale = args.cfg_image_scale
  if image_scale is None:
    image_scale = 2.0 if editing else 1.0
  settings = sampling_flags.settings(args, defaults)
  guidance = dataclasses.replace(
    settings.guidance, image_scale=image_scale, renorm_min=args.cfg_renorm_min,
    pack_coupled=args.cfg_pack_coupled,
  )
  return dataclasses.replace(
    settings, think=args.think, understand=args.understand, guidance=guidance
  )


def output_paths(args: argparse.Namespace, count: int) -> list[pathlib.Path]:
  """The output path of each of `count` rows.

  Raises:
    InputError: --out has the wrong form, or cannot be written to.
  """
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
  with errors.at(f"--out={out}"):
    atomic.probe(paths[0])
  for path in (*paths, *(path.with_suffix(".json") for path in paths)):
    if path.is_dir():
      raise errors.InputError(f"--out={out}: {path} is a folder; give a file name")
  return paths


class PhaseBars:
  """Progress bars for the phases of a batch; the `progress` argument of `Pipeline.run`.

  One object is used for all batches: another callable would make their programs compile again.

  Attributes:
    label: shown before the name of a phase.
  """

  def __init__(self):
    self._bars: dict[str, tqdm.tqdm] = {}
    self.label = ""

  def __call__(self, phase: str, done: int, total: int) -> None:
    if phase not in self._bars:
      for bar in self._bars.values():
        bar.close()
      unit = "tokens at most" if phase == "decode" else "steps"
      self._bars[phase] = progress.bar(total, f"{self.label}{phase}", unit=unit)
    # The devices' callbacks may come out of order.
    self._bars[phase].update(max(done - self._bars[phase].n, 0))

  def close(self) -> None:
    """Closes the bars of a batch."""
    for bar in self._bars.values():
      bar.close()
    self._bars.clear()


def _log(text: str) -> None:
  if hosts.first():
    print(text, file=sys.stderr, flush=True)


def _save(
  path: pathlib.Path, request: requests_lib.Request, result: pipeline_lib.Result,
  record: Mapping[str, Any], upscale: int,
) -> None:
  """Writes the image, if there is one, and the JSON file beside it."""
  record = {
    "prompt": request.prompt,
    "text": result.text,
    "text_tokens": len(result.ids),
    "text_finished": result.finished,
    "seed": request.seed,
    **record,
  }
  with errors.storage(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if result.image is not None:
      record |= {"size": result.image.shape[:2], "upscale": upscale}
      image = PIL.Image.fromarray(result.image.repeat(upscale, axis=0).repeat(upscale, axis=1))
      atomic.write(path, lambda aside: image.save(aside, format="PNG"))
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    atomic.write_text(path.with_suffix(".json"), text)


def _print(
  path: pathlib.Path, request: requests_lib.Request, result: pipeline_lib.Result, answer: bool
) -> None:
  if result.text is not None:
    cut = "" if result.finished else " [cut at max_tokens]"
    print(f"{'answer' if answer else 'reasoning'} to {request.prompt!r}: {result.text}{cut}")
  print(f"wrote {path}" + ("" if answer else f" and {path.with_suffix('.json').name}"))
