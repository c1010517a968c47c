"""Searches the layout of a run on a topology: the values of some keys that make it fastest.

The phases of sampling compile in seconds, so they are compiled for every layout. The update takes
minutes, so it is compiled only for the best of these. Results are stored as lines of a file; a
search that finds a result there does not compile it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import operator
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from unigrpo_jax import errors
from unigrpo_jax.models import layers
from unigrpo_jax.recipe import config_files, sections
from unigrpo_jax.tools.plan import chips, page, plans
from unigrpo_jax.tools.plan import topology as topology_lib

# Decoding images is left out: it compiles slowly, and no key of the search changes it much.
SAMPLING = ("layout", "read", "decode", "denoise")
UPDATE = plans.UPDATE
# Trajectories of a microbatch per data x fsdp way that are tried by default.
ROWS_OF_A_WAY = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Dimension:
  """A key whose values are searched. To search another key, add it to `DIMENSIONS`.

  Attributes:
    name: of its flag and its column.
    key: of the config, dotted.
    phases: the phases that depend on it: `SAMPLING`, `UPDATE` or both.
    grows: whether memory grows with the value; then values above one that does not fit are dropped.
  """

  name: str
  key: str
  phases: tuple[str, ...]
  grows: bool = False


DIMENSIONS = (
  Dimension("tensor", "mesh.tensor", SAMPLING + UPDATE),
  Dimension("rollout_tensor", "rollout.tensor", SAMPLING),
  Dimension("prompts_at_once", "rollout.prompts_at_once", SAMPLING, grows=True),
  Dimension("remat", "remat", UPDATE),
  Dimension("microbatch", "microbatch", UPDATE, grows=True),
)
# {name of a dimension: value}, of the dimensions that matter for the phases in question.
Point = Mapping[str, Any]
# (point, phases) -> `figures.record` of these phases; raises InputError for an impossible point.
Compile = Callable[[Point, Sequence[str]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of compiling some phases at a point."""

  point: Point
  figures: Mapping[str, Any] | None  # `figures.record`; None where nothing was compiled
  reason: str = ""  # why the point is dropped; "": it is not

  @property
  def times(self) -> tuple[float, float]:
    """Seconds of an iteration, (max, sum); see `measure`."""
    return measure(self.figures["phases"])


def measure(phases: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
  """Seconds of all phases, (max, sum): `phases` is `figures.record(...)["phases"]`.

  They are the maximum, and the sum, of the times of compute, HBM and interconnect in each phase: if
  the three overlap perfectly, and if they do not overlap at all.
  """
  times = [phase["times"].values() for phase in phases.values()]
  return sum(map(max, times)), sum(map(sum, times))


def parse(name: str, text: str) -> tuple[Any, ...]:
  """The values of a flag such as --tensor=1,2,4, in ascending order.

  Raises:
    InputError: a value is impossible for the flag's key.
  """
  if name == "remat":
    for value in (values := text.split(",")):
      errors.choose(f"--{name}", value, tuple(layers.REMAT))
    return tuple(dict.fromkeys(values))
  try:
    values = sorted({int(value) for value in text.split(",")})
  except ValueError:
    raise errors.InputError(f"--{name}={text}: give whole numbers, e.g. --{name}=2,4") from None
  errors.require(f"--{name}", values[0], low=1)
  return tuple(values)


@dataclasses.dataclass(frozen=True)
class Space:
  """The points of a search.

  Attributes:
    config: of the run.
    chips: number of chips of the topology.
    given: {name of a dimension: values}, of those that the command names.
  """

  config: Any
  chips: int
  given: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

  def points(self, phases: Sequence[str], at: Point | None = None) -> Iterator[Point]:
    """Yields all points of the dimensions that `phases` depend on, with the values in `at` fixed.
    """
    free = [d for d in DIMENSIONS if set(phases) & set(d.phases) and d.name not in (at or {})]

    def extend(point, rest):
      if not rest:
        yield point
        return
      for value in self.values(rest[0].name, point):
        yield from extend({**point, rest[0].name: value}, rest[1:])

    yield from extend(dict(at or {}), free)

  def of_config(self) -> Point:
    """The point of the config itself."""
    return {d.name: _section(self.config, d.key)[d.key.rpartition(".")[2]] for d in DIMENSIONS}

  def values(self, name: str, point: Point) -> tuple[Any, ...]:
    """The values to try of a dimension, given those of the dimensions before it."""
    if name == "rollout_tensor":  # At most as many ways as in the update, and a divisor of them.
      sizes = self.given.get(name, (1, 2, 4))
      return tuple(size for size in sizes if point["tensor"] % size == 0)
    if name in self.given:
      return self.given[name]
    prompts, rows = self.config.prompts_per_step, self.config.group_size
    if name == "tensor":  # With more ways than key-value heads, these would be copied.
      return tuple(size for size in (1, 2, 4) if self.chips % size == 0)
    if name == "prompts_at_once":
      return tuple(prompts // part for part in (4, 2, 1) if prompts % part == 0)
    if name == "microbatch":
      ways = self.chips // point["tensor"]
      sizes = (rows_of_a_way * ways for rows_of_a_way in ROWS_OF_A_WAY)
      return tuple(size for size in sizes if prompts * rows % size == 0) or (ways,)
    return tuple(layers.REMAT)


def overrides(point: Point) -> list[str]:
  """The command-line arguments that set a config to a point."""
  return [f"--config.{d.key}={point[d.name]}" for d in DIMENSIONS if d.name in point]


class Store:
  """The results of searches, in a file of JSON lines; a line that was cut off is ignored."""

  def __init__(self, path: pathlib.Path):
    """Reads the file, if it exists.

    Raises:
      InputError: it is no file of results.
    """
    self._path = path
    self._results: dict[str, dict[str, Any]] = {}
    # Where it is no text, the first line says so.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    self._cut = not text.endswith("\n") and bool(text)
    for number, line in enumerate(text.splitlines(), 1):
      try:
        row = json.loads(line)
        self._results[self._hash(row["key"])] = row
      except (ValueError, KeyError, TypeError):
        start = '{"key": '
        if not line.startswith(start) and not start.startswith(line):
          raise errors.InputError(
            f"--results={path}, line {number}: no result of a search; give another file"
          ) from None

  def __len__(self) -> int:
    return len(self._results)

  def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row that was added with a key; None where there is none."""
    return self._results.get(self._hash(key))

  def add(self, key: Mapping[str, Any], **values: Any) -> None:
    """Appends a row with a key."""
    row = {"key": dict(key), **values}
    self._results[self._hash(key)] = row
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open("a", encoding="utf-8") as file:
      file.write("\n" * self._cut + json.dumps(row) + "\n")
    self._cut = False

  @staticmethod
  def _hash(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Search:
  """Searches the points of a space on a topology."""

  def __init__(
    self, topology: str, space: Space, compile_point: Compile, store: Store,
    report: Callable[[str], None] = print, best: int = 3,
  ):
    """Compiles nothing yet.

    Args:
      topology: such as "v5p:4x4x4".
      space: the points.
      compile_point: compiles phases at a point.
      store: earlier results; new ones are added.
      report: called with a line for each point.
      best: number of layouts for which the update is compiled.
    """
    self._topology, self._space, self._compile = topology, space, compile_point
    self._store, self._report, self._best = store, report, best
    self._chip = chips.CHIPS[topology.partition(":")[0]]

  def run(self) -> tuple[list[Result], list[Result]]:
    """Runs the search.

    Returns:
      (candidates: whole iterations, the best first; points that were dropped, with reasons).
    """
    sampled = self._stage(self._space.points(SAMPLING), SAMPLING)
    # For each layout of the update only the fastest sampling, which hardly matters to the update.
    shared = [d.name for d in DIMENSIONS if set(UPDATE) <= set(d.phases) and d.phases != UPDATE]
    layouts: dict[tuple, Result] = {}
    for result in sorted((r for r in sampled if not r.reason), key=lambda r: sum(r.times)):
      layouts.setdefault(tuple(result.point[name] for name in shared), result)
    finalists = list(layouts.values())[: self._best]
    points = [p for layout in finalists for p in self._space.points(UPDATE, layout.point)]
    updated = self._stage(points, UPDATE)
    candidates = [
      _together(sampling, result) for result in updated if not result.reason
      for sampling in sampled if not sampling.reason
      and all(sampling.point[name] == result.point[name] for name in shared)
    ]
    dropped = [result for result in (*sampled, *updated) if result.reason]
    return sorted(candidates, key=lambda result: sum(result.times)), dropped

  def _stage(self, points, phases: Sequence[str]) -> list[Result]:
    """The results of phases at all points, with a report on each."""
    results, points, began = [], list(points), time.monotonic()
    stage = "update" if phases == UPDATE else "sampling"
    for number, point in enumerate(points, 1):
      start = time.monotonic()
      result, source = self._result(point, phases, results)
      results.append(result)
      left = (time.monotonic() - began) / number * (len(points) - number)
      words = result.reason or "max {:.4g} s, sum {:.4g} s".format(*result.times)
      self._report(
        f"{self._topology} {stage} {number}/{len(points)}: {describe(point)}: {words} "
        f"({source or f'{time.monotonic() - start:.0f} s'}), {left / 60:.0f} min left"
      )
    return results

  def _result(self, point: Point, phases, before: Sequence[Result]) -> tuple[Result, str]:
    """A point's result, and where it comes from ("": it was compiled now).

    `before` are the results of this stage so far.
    """
    smaller = _smaller(point, before)
    if smaller:
      return Result(point, None, f"more than {smaller}, which does not fit"), "not compiled"
    key = self._key(point, phases)
    row = self._store.get(key)
    if row is None:
      start = time.monotonic()
      figures, refusal, is_final = self._compiled(point, phases)
      row = {"figures": figures, "refusal": refusal}
      if is_final:
        self._store.add(key, point=dict(point), seconds=round(time.monotonic() - start), **row)
      source = ""
    else:
      source = "found, not compiled again"
    figures = row["figures"]
    if figures is None:
      return Result(point, None, row["refusal"]), source
    reason = "" if figures["fits"] else page.verdict(figures, self._chip)
    return Result(point, figures, reason), source

  def _compiled(self, point: Point, phases):
    """Compiles phases at a point.

    Returns:
      (figures, or None; why they are missing; whether that is final, so that it can be stored).
    """
    # Sampling does not depend on the update's keys, but a run needs possible values of these too,
    # so they are tried one after another.
    others = [d for d in DIMENSIONS if d.name not in point]
    for whole in self._space.points(UPDATE, point):
      try:
        return self._compile(whole, phases), "", True
      except errors.Unavailable:
        raise
      except errors.InputError as error:
        refusal = str(error)
      except subprocess.CalledProcessError as error:
        return None, f"the compiler failed: {error.stderr}", False
      is_about_point = not any(f"config.{d.key}=" in refusal for d in others)
      if is_about_point:
        break
    return None, f"refused: {refusal}", is_about_point

  def _key(self, point: Point, phases) -> dict[str, Any]:
    """Identifies what is compiled: topology, phases, point, the config's other keys, versions."""
    config = sections.plain(self._space.config)
    for dimension in DIMENSIONS:
      _section(config, dimension.key).pop(dimension.key.rpartition(".")[2])
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {
      "topology": self._topology, "phases": list(phases), "point": dict(point),
      "config": digest[:16], "versions": versions(),
    }


def versions() -> dict[str, str]:
  """Versions of jax and of the TPU compiler ("" without one)."""
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    libtpu = ""
  return {"jax": jax.__version__, "libtpu": libtpu}


def chip_count(topology: str) -> int:
  """The number of chips of a topology such as "v5p:4x4x4", from its name.

  Raises:
    InputError: the name is malformed, or of another kind of chip.
  """
  kind, _, shape = topology.partition(":")
  sizes = shape.split("x")
  if kind not in chips.CHIPS or not all(size.isdecimal() and int(size) for size in sizes):
    raise errors.InputError(
      f"--topology={topology!r}: expected {', '.join(chips.CHIPS)}, a colon and a shape, e.g. "
      "v5p:4x4x4"
    )
  return math.prod(map(int, sizes))


def describe(point: Point) -> str:
  """A point in words."""
  return ", ".join(f"{name} {value}" for name, value in point.items())


def compiler(config: str, arguments: Sequence[str], topology: str) -> Compile:
  """A `Compile` that runs each compilation in a new process, which frees its memory and may crash.

  Args:
    config: of the command line, FILE.py:VARIANTS.
    arguments: overrides of the config.
    topology: such as "v5p:4x4x4".
  """
  config_files.load(config, arguments)

  def compile_point(point: Point, phases: Sequence[str]) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "plan.json"
      command = [
        sys.executable, "-m", "unigrpo_jax.plan", f"--config={config}", *arguments,
        *overrides(point), f"--topology={topology}", f"--json={path}", "--phases", *phases,
      ]
      done = subprocess.run(command, check=False, capture_output=True, text=True)
      if done.returncode == 0:
        return json.loads(path.read_text(encoding="utf-8"))[topology]
      last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
      reason = last.removeprefix("error: ")
      if topology_lib.INSTALL in reason:  # No other point would be compiled either.
        raise errors.Unavailable(reason)
      # Of other statuses, such as after a full disk, the next search may make more.
      if done.returncode == errors.InputError.status and reason != last:
        raise errors.InputError(reason)
      raise subprocess.CalledProcessError(done.returncode, command, stderr=reason)

  return compile_point


def _section(config: Any, key: str) -> Any:
  """The section of a config that contains a dotted key."""
  return functools.reduce(operator.getitem, key.split(".")[:-1], config)


def _smaller(point: Point, results: Sequence[Result]) -> str:
  """A point among `results` that does not fit and needs less memory, in words; "" without one."""
  grows = [d.name for d in DIMENSIONS if d.grows and d.name in point]
  for result in results:
    differs = [name for name in point if result.point.get(name) != point[name]]
    if (
      result.figures is not None and result.reason and differs and set(differs) <= set(grows)
      and all(result.point[name] < point[name] for name in differs)
    ):
      return describe({name: result.point[name] for name in differs})
  return ""


def _together(sampled: Result, updated: Result) -> Result:
  """A whole iteration: the phases of sampling and of the update."""
  figures = {
    name: {**sampled.figures[name], **updated.figures[name]} for name in ("phases", "peak")
  }
  return Result({**updated.point, **sampled.point}, figures)
