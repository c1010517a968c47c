"""The figures of a plan as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import Any

from unigrpo_jax.tools.plan import chips
from unigrpo_jax.tools.plan import figures as figures_lib

_TITLES = {
  "layout": "lay out", "read": "read", "decode": "think", "denoise": "draw", "vae": "decode images",
  "precompute": "precompute", "update": "update",
}
_MIN_BYTES = 1e7  # Collectives for which a chip sends less in an iteration are not listed.


def render(
  name: str, figures: Mapping[str, Any], chip: chips.Chip, summary: Sequence[str] = ()
) -> str:
  """The page about a plan.

  Args:
    name: of the topology.
    figures: `figures.record` of the plan.
    chip: of the topology.
    summary: lines about the run, below the title.
  """
  mesh = _mesh(figures["mesh"])
  if figures["sampling_mesh"] != figures["mesh"]:
    mesh += f", sampling {_mesh(figures['sampling_mesh'])}"
  phases, iteration = figures["phases"], []
  if figures["seconds"] is not None:
    iteration = ["", f"at best {figures['seconds']:.0f} s an iteration, "
                 f"{figures['images_per_hour']:,.0f} images an hour"]
  lines = [
    f"{name}: {_count(figures)} chips, mesh {mesh}", *summary, "",
    f"memory of a chip, GiB of {_gib(chip.hbm)}",
    *(f"  {cause:16} {_gib(value):>8}" for cause, value in figures["held"].items() if value), "",
    *table(
      ("phase", "runs", "peak GiB", "results", "temporaries", "compiled in"),
      *(_memory_row(phase, values, figures["peak"][phase]) for phase, values in phases.items()),
    ),
    "", verdict(figures, chip), "",
    "time of an iteration at the chip's peak figures, s; FLOPs of a chip; the compiler's estimate "
    "of cycles without kernels",
    *table(
      ("phase", "compute", "HBM", "interconnect", "PFLOP", "of model FLOPs", "Gcycles"),
      *(_time_row(phase, values) for phase, values in phases.items()),
    ),
    *iteration, "",
    "interconnect, GB that a chip sends in an iteration",
    *table(
      ("phase", "collective", "axis", "GB"),
      *((_TITLES[phase], row["kind"], row["axis"], f"{row['bytes'] / 1e9:,.2f}")
        for phase, values in phases.items() for row in values.get("collectives", ())
        if row["bytes"] >= _MIN_BYTES),
    ),
    "", f"a chip: {chip.flops / 1e12:,.0f} bf16 TFLOP/s, {chip.hbm_bandwidth / 1e9:,.0f} GB/s of "
    f"HBM, {chip.axis_bandwidth / 1e9:,.0f} GB/s along an axis of its {chip.torus}D torus "
    f"({chip.source})",
  ]
  return "\n".join(line.rstrip() for line in lines) + "\n"


def comparison(records: Mapping[str, Mapping[str, Any]]) -> str:
  """A table of topologies, `records` by name: whether each fits, and its speed at best."""
  rows = []
  for name, figures in records.items():
    count, rates = _count(figures), ("", "", "")
    if figures["seconds"] is not None:
      rate = figures["images_per_hour"]
      rates = (f"{figures['seconds']:.0f}", f"{rate:,.0f}", f"{rate / count:,.1f}")
    rows.append((
      name, str(count), _gib(max(figures["peak"].values())), f"{figures['spare']:.0%}",
      "yes" if figures["fits"] else "no", *rates,
    ))
  header = (
    "topology", "chips", "peak GiB", "free", "fits", "s an iteration", "images/h", "images/h a chip"
  )
  return "\n".join(table(header, *rows)) + "\n"


def _mesh(sizes: Mapping[str, int]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _count(figures: Mapping[str, Any]) -> int:
  return math.prod(figures["mesh"].values())


def _gib(size: float) -> str:
  return f"{size / chips.GIB:.2f}"


def _memory_row(phase: str, values: Mapping[str, Any], peak: float) -> tuple[str, ...]:
  row = (_TITLES[phase], str(values["runs"]), _gib(peak))
  if values["exceeds"] is not None:
    return (*row, "does not fit")
  sizes = (_gib(values["bytes"][key]) for key in ("results", "temporaries"))
  return (*row, *sizes, f"{values['compile_seconds']:.0f} s")


def _time_row(phase: str, values: Mapping[str, Any]) -> tuple[str, ...]:
  if "times" not in values:
    return (_TITLES[phase],)
  model = values["model_flops"]
  times = [f"{values['times'][name]:,.2f}" for name in ("compute", "hbm", "interconnect")]
  ratio = f"{values['flops'] / model:.2f}" if model else ""
  cycles = f"{values['cycles'] / 1e9:,.2f}" if values["cycles"] else ""
  return (_TITLES[phase], *times, f"{values['flops'] / 1e15:,.2f}", ratio, cycles)


def verdict(figures: Mapping[str, Any], chip: chips.Chip) -> str:
  """A line that says whether a plan fits, and which phase needs most memory."""
  phase, peak = max(figures["peak"].items(), key=lambda item: item[1])
  spare, needs = figures["spare"], f"{_TITLES[phase]} needs {_gib(peak)} GiB"
  if figures["fits"]:
    return f"fits: at most {_gib(peak)} GiB, {spare:.0%} stay free"
  if spare >= 0 and all(values["exceeds"] is None for values in figures["phases"].values()):
    return f"too tight: {needs}, {spare:.0%} stay free of {figures_lib.SPARE:.0%}"
  return f"does not fit: {needs}, {_gib(peak - chip.hbm)} more than there are"


def table(*rows: Sequence[str]) -> list[str]:
  """Lines of a table: the first column is left-aligned, others right-aligned; rows may be short."""
  columns = list(itertools.zip_longest(*rows, fillvalue=""))
  widths = [max(map(len, column)) for column in columns]
  return [
    "  " + "  ".join(
      cell.rjust(width) if place else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(cells, widths))
    )
    for cells in zip(*columns)
  ]
