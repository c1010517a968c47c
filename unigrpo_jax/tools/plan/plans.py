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
# The compiler's message about a program that does not fit.
_EXCEEDED = re.compile(
  r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM)"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A compiled phase of an iteration."""

  name: str  # one of `PHASES`
  runs: int  # number of runs in an iteration
  model_flops: float | None  # of all runs on all chips, by formula; None where there is none
  program: hlo.Program | None  # what one run does on one chip; None where it does not fit
  # {"arguments", "results", "temporaries"} of one run on one chip; {} where it does not fit.
  # Results that replace an argument in place are not counted.
  bytes: Mapping[str, int]
  exceeds: float | None  # bytes that the compiler asked for where it does not fit, else None
  seconds: float  # of compiling


@dataclasses.dataclass(frozen=True)
class Plan:
  """The compiled phases of a run on a topology.

  Attributes:
    mesh: of the phases in `UPDATE`, {axis: size}.
    sampling_mesh: of the other phases, on the same chips.
    held: {cause: bytes on one chip}. In all phases: "parameters", "optimizer", "moving average",
      "reference", "anchor", "reward_model" (of ReFL, with the autoencoder) and "rewards" (those
      that score on these chips, with what a call needs). In the rollout: "sampler" (its copy of the
      parameters), "cache" and "recorded" (the experience so far). In the update: "recorded" and
      "precomputed".
    phases: by name.
    trajectories: of an iteration.
  """

  mesh: Mapping[str, int]
  sampling_mesh: Mapping[str, int]
  held: Mapping[str, int]
  phases: Mapping[str, Phase]
  trajectories: int


def _method(fn: Callable, name: str) -> Callable:
  """A method of a jitted function, with the arguments of `fn`, which is that or a partial of it."""
  bound = fn if isinstance(fn, functools.partial) else functools.partial(fn)
  return functools.partial(getattr(bound.func, name), *bound.args, **bound.keywords)


def result_shapes(fn: Callable, *args) -> Any:
  """Shapes of the results of a jitted function, or of a partial of one; nothing is compiled.

  Unlike `jax.eval_shape`, of one with compiler options too.
  """
  return _method(fn, "eval_shape")(*args)


def compile_phase(
  name: str, fn: Callable, *args, runs: int, model_flops: float | None, trips: int = 1,
  texts: pathlib.Path | None = None,
) -> tuple[Phase, Any]:
  """Compiles the program of a phase.

  Args:
    name: of the phase.
    fn: a jitted function, or a partial of one.
    *args: its arguments, as shapes with shardings.
    runs, model_flops: see `Phase`.
    trips: number of trips of a loop that may end early.
    texts: folder for the compiled program's text, NAME.txt; None: it is not saved.

  Returns:
    (the phase, the results as shapes with shardings; None if the program does not fit).
  """
  start = time.monotonic()
  lowered = _method(fn, "lower")(*args)
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
