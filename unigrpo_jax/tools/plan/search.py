"""A search for the layout of a run on a topology: which values of some keys make it fastest.

The phases of sampling compile in seconds, so they are compiled for every layout; the update, which
takes minutes, for the best of them alone. Each result is a line of a file, and is not compiled
again by a search that finds it there.
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

# Decoding images is left out: it takes longest to compile, and no key of a search changes it much.
SAMPLING = ("layout", "read", "decode", "denoise")
UPDATE = plans.UPDATE
# Trajectories of a microbatch on one way of data x fsdp, where the command names no microbatches.
ROWS_OF_A_WAY = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Dimension:
  """A key that is searched; another one is another line of `DIMENSIONS`.

  Attributes:
    name: of its flag and its column.
    key: of the config, dotted.
    phases: those that depend on it; `SAMPLING`, `UPDATE` or both.
    grows: a larger value needs more memory, so that one larger than what does not fit is dropped.
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
# The value of each dimension, by its name; of those of the update where it is about the update.
Point = Mapping[str, Any]
# The figures (`figures.record`) of some phases at a point. An InputError is a refusal.
Compile = Callable[[Point, Sequence[str]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
  """Some phases, compiled at a point: what they take, or why the point is dropped."""

  point: Point
  figures: Mapping[str, Any] | None
  reason: str = ""

  @property
  def times(self) -> tuple[float, float]:
    """Seconds of an iteration: (all resources at once, one after the other); see `measure`."""
    return measure(self.figures["phases"])


def measure(phases: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
  """Seconds of `figures.record(...)["phases"]`: (max, sum) of compute, HBM and interconnect.

  The first is what phases take where the three overlap perfectly, the second where they do not.
  """
  times = [phase["times"].values() for phase in phases.values()]
  return sum(map(max, times)), sum(map(sum, times))


def parse(name: str, text: str) -> tuple[Any, ...]:
  """The values of a flag such as --tensor=1,2,4, smallest first.

  Raises:
    InputError: one of them is no value of its key.
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
    config: with all its other keys.
    chips: of the topology.
    given: the values that the command names, by dimension.
  """

  config: Any
  chips: int
  given: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

  def points(self, phases: Sequence[str], at: Point | None = None) -> Iterator[Point]:
    """Of the dimensions that the phases depend on, but for those that `at` has already."""
    free = [d for d in DIMENSIONS if set(phases) & set(d.phases) and d.name not in (at or {})]

    def extend(point, rest):
      if not rest:
        yield point
        return
      for value in self.values(rest[0].name, point):
        yield from extend({**point, rest[0].name: value}, rest[1:])

    yield from extend(dict(at or {}), free)

  def of_config(self) -> Point:
    """The config's own values."""
    return {d.name: _section(self.config, d.key)[d.key.rpartition(".")[2]] for d in DIMENSIONS}

  def values(self, name: str, point: Point) -> tuple[Any, ...]:
    """What a dimension is tried with at a point of those before it."""
    if name == "rollout_tensor":  # Not more parts of a layer than in the update.
      sizes = self.given.get(name, (1, 2, 4))
      return tuple(size for size in sizes if point["tensor"] % size == 0)
    if name in self.given:
      return self.given[name]
    prompts, rows = self.config.prompts_per_step, self.config.group_size
    if name == "tensor":  # More ways than key-value heads would copy them.
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
  """The results of searches, a line of JSON each; a line that a stop cut short is passed over."""

  def __init__(self, path: pathlib.Path):
    """Reads a file, if there is one.

    Raises:
      InputError: it is no file of results.
    """
    self._path = path
    self._results: dict[str, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
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
    return self._results.get(self._hash(key))

  def add(self, key: Mapping[str, Any], **values: Any) -> None:
    row = {"key": dict(key), **values}
    self._results[self._hash(key)] = row
    with self._path.open("a", encoding="utf-8") as file:
      file.write("\n" * self._cut + json.dumps(row) + "\n")
    self._cut = False

  @staticmethod
  def _hash(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Search:
  """Compiles the points of a space for a topology."""

  def __init__(
    self, topology: str, space: Space, compile_point: Compile, store: Store,
    report: Callable[[str], None] = print, best: int = 3,
  ):
    """Compiles nothing yet.

    Args:
      topology: such as "v5p:4x4x4".
      space: its points.
      compile_point: compiles some phases at a point.
      store: results so far; new ones are added.
      report: called with a line for each point.
      best: for how many layouts of sampling the update is compiled.
    """
    self._topology, self._space, self._compile = topology, space, compile_point
    self._store, self._report, self._best = store, report, best
    self._chip = chips.CHIPS[topology.partition(":")[0]]

  def run(self) -> tuple[list[Result], list[Result]]:
    """Returns (candidates: whole iterations, best first; points that are dropped, with reasons)."""
    sampled = self._stage(self._space.points(SAMPLING), SAMPLING)
    # Of each layout of the update the fastest sampling: how it samples hardly changes the update.
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
    """A point's result, and where it comes from; "" if it was compiled."""
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
    """(figures or None, why it is refused, whether another start would find the same)."""
    # Sampling does not depend on the microbatch, but no run may have one that does not divide.
    others = [d for d in DIMENSIONS if d.name not in point]
    for whole in self._space.points(UPDATE, point):
      try:
        return self._compile(whole, phases), "", True
      except errors.InputError as error:
        refusal = str(error)
      except subprocess.CalledProcessError as error:
        return None, f"the compiler failed: {error.stderr}", False
      is_about_point = not any(f"config.{d.key}=" in refusal for d in others)
      if is_about_point:
        break
    return None, f"refused: {refusal}", is_about_point

  def _key(self, point: Point, phases) -> dict[str, Any]:
    """What is compiled: the whole config, but for keys that the phases do not depend on."""
    config = sections.plain(self._space.config)
    for dimension in DIMENSIONS:
      _section(config, dimension.key).pop(dimension.key.rpartition(".")[2])
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {
      "topology": self._topology, "phases": list(phases), "point": dict(point),
      "config": digest[:16], "versions": versions(),
    }


def versions() -> dict[str, str]:
  """Of what compiles."""
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    libtpu = ""
  return {"jax": jax.__version__, "libtpu": libtpu}


def chip_count(topology: str) -> int:
  """Chips of a topology such as "v5p:4x4x4", from its name.

  Raises:
    InputError: it is no such name.
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
  return ", ".join(f"{name} {value}" for name, value in point.items())


def compiler(config: str, arguments: Sequence[str], topology: str) -> Compile:
  """Compiles in processes of their own, which give back their memory and may crash.

  Args:
    config: of the command line, FILE.py:VARIANTS.
    arguments: its overrides.
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
      if last.startswith("error: "):
        raise errors.InputError(last.removeprefix("error: "))
      raise subprocess.CalledProcessError(done.returncode, command, stderr=last)

  return compile_point


def _section(config: Any, key: str) -> Any:
  """The section of a config in which a dotted key lies."""
  return functools.reduce(operator.getitem, key.split(".")[:-1], config)


def _smaller(point: Point, results: Sequence[Result]) -> str:
  """The point that does not fit and needs less than this one, in words; "" for none."""
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
  """The phases of an iteration from those of its two halves."""
  figures = {
    name: {**sampled.figures[name], **updated.figures[name]} for name in ("phases", "peak")
  }
  return Result({**updated.point, **sampled.point}, figures)
