"""A plan: the compiled phases of a run on a topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import re
import time
from typing import Any

import jax

from unigrpo_jax.tools.plan import hlo

UPDATE = ("precompute", "update")  # see `algorithms.update`
PHASES = ("layout", "read", "decode", "denoise", "vae", *UPDATE)
# What the compiler says of a program that does not fit.
_EXCEEDED = re.compile(
  r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM)"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A program, and what an iteration asks of it.

  `bytes` are those of one run on one chip: {"arguments", "results", "temporaries"}; results that
  take their argument's place are not counted again.
  """

  name: str  # of `PHASES`
  runs: int  # of an iteration
  model_flops: float | None  # of all its runs on all chips, by formula; None where there is none
  program: hlo.Program | None  # what one run does on one chip; None where it did not compile
  bytes: Mapping[str, int]
  exceeds: float | None  # bytes that the compiler wanted where it did not fit; None where it did
  seconds: float  # of compiling


@dataclasses.dataclass(frozen=True)
class Plan:
  """The programs of a run on a topology.

  `held` are bytes of each cause on one chip, all through: parameters, optimizer, moving average,
  reference, anchor, reward_model (with the autoencoder, where a loss reads both), rewards
  (those that score on the same chips, with what a call needs); and those of the
  rollout: sampler (its copy of the parameters), cache, recorded; and precomputed, of the update.
  """

  mesh: Mapping[str, int]  # of the phases of `UPDATE`, {axis: size}
  sampling_mesh: Mapping[str, int]  # of the other phases, on the same chips
  held: Mapping[str, int]
  phases: Mapping[str, Phase]  # by name
  trajectories: int  # of an iteration


def compile_phase(
  name: str, fn: Callable, *args, runs: int, model_flops: float | None, trips: int = 1,
  texts: pathlib.Path | None = None,
) -> tuple[Phase, Any]:
  """Compiles `fn`, a jitted function or a partial of one, for `args`, shapes with shardings.

  `trips` are those of a loop that ends early; `texts` is a folder for the compiled text, NAME.txt.
  Returns the phase, and the results as shapes with shardings; None if it does not fit.
  """
  bound = fn if isinstance(fn, functools.partial) else functools.partial(fn)
  start = time.monotonic()
  lowered = bound.func.lower(*bound.args, *args, **bound.keywords)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    match = _EXCEEDED.search(str(error))
    if match is None:
      raise
    exceeds, seconds = float(match[1]) * _UNIT[match[2]], time.monotonic() - start
    return Phase(name, runs, model_flops, None, {}, exceeds, seconds), None
  memory, text = compiled.memory_analysis(), compiled.as_text()
  if texts is not None:
    texts.mkdir(parents=True, exist_ok=True)
    (texts / f"{name}.txt").write_text(text, encoding="utf-8")
  phase = Phase(
    name, runs, model_flops, hlo.read(text, unknown_trips=trips),
    {
      "arguments": memory.argument_size_in_bytes,
      "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
    },
    None, time.monotonic() - start,
  )
  results = jax.tree.map(
    lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
    lowered.out_info, compiled.output_shardings,
  )
  return phase, results
