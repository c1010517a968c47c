"""Advice: which keys to change first in a config that does not fit its chips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unigrpo_jax.tools.plan import chips, plans
from unigrpo_jax.tools.plan import figures as figures_lib

# {value of config.remat: share of the update's own memory that "full" would free in its place}.
# Measured by compiling full fine-tuning for v5p:4x4x4; "mlp" is interpolated.
FREED = {"attention": 0.4, "mlp": 0.5, "layer": 0.6, "none": 0.9}


def lines(config, plan: plans.Plan, figures: Mapping[str, Any], chip: chips.Chip) -> list[str]:
  """Lines with changes as command-line arguments, the one that frees most first.

  Args:
    config: of the run.
    plan: of the run on a topology.
    figures: `figures.record` of the plan.
    chip: of the topology.

  Returns:
    [] if the plan fits.
  """
  if figures["fits"]:
    return []
  name = max(figures["peak"], key=figures["peak"].get)
  phase = plan.phases[name]
  if phase.exceeds is None:
    size = phase.bytes["results"] + phase.bytes["temporaries"]
  else:  # Of a program that does not fit, the compiler reports only the total.
    size = phase.exceeds - figures_lib.held_beside(name, plan)
  excess = figures["peak"][name] - (1 - figures_lib.SPARE) * chip.hbm
  of_phase = _of_update if name in plans.UPDATE else _of_rollout
  changes = [*of_phase(config, plan, size, excess), *_of_both(config, plan)]
  if name == "update" and config.remat in FREED:
    changes.append((size * FREED[config.remat], "--config.remat=full", ""))
  return [
    f"{excess / chips.GIB:.2f} GiB too many; first changes, with what each frees on a chip:",
    *(f"  {argument}: about {freed / chips.GIB:.2f} GiB{note}"
      for freed, argument, note in sorted(changes, key=lambda change: -change[0])),
  ]


# A change is (bytes that it frees on a chip, argument, note).
def _of_update(config, plan, size: float, excess: float) -> Iterator[tuple[float, str, str]]:
  """Changes for a phase of the update.

  `size` are the bytes that it needs besides the state, `excess` those that it needs too many.
  """
  count = _halved(config.microbatch, 1, plan.mesh, size, excess)
  if count < config.microbatch:
    yield size * (1 - count / config.microbatch), f"--config.microbatch={count}", ""


def _of_rollout(config, plan, size: float, excess: float) -> Iterator[tuple[float, str, str]]:
  """Changes for a phase of the rollout; arguments as in `_of_update`."""
  at_once, fsdp = config.rollout.prompts_at_once, plan.sampling_mesh["fsdp"]
  size += plan.held.get("cache", 0)
  count = _halved(at_once, config.group_size, plan.sampling_mesh, size, excess)
  if count < at_once:
    yield size * (1 - count / at_once), f"--config.rollout.prompts_at_once={count}", ""
  tensor = plan.sampling_mesh["tensor"]
  if tensor < plan.mesh["tensor"]:
    yield plan.held.get("sampler", 0) / 2, f"--config.rollout.tensor={2 * tensor}", ""
  if config.rollout.layout == "stationary" and fsdp > 1:
    freed = plan.held.get("sampler", 0) * (1 - 1 / fsdp)
    yield freed, "--config.rollout.layout=update", "; then every token gathers the parameters"


def _of_both(config, plan) -> Iterator[tuple[float, str, str]]:
  """Changes for any phase."""
  held, tensor = plan.held, plan.mesh["tensor"]
  if tensor < 4:
    yield held.get("sampler", 0) / 2, f"--config.mesh.tensor={2 * tensor}", ""
  if not config.lora.rank:
    freed = held["optimizer"] + held["reference"] + held["parameters"]
    note = "; optimizer and gradients of adapters only, and no copy for the reference"
    yield freed, "the variant lora, --config=FILE.py:lora", note


def _halved(count: int, rows: int, mesh, size: float, excess: float) -> int:
  """`count`, halved until that frees `excess` bytes.

  The `size` bytes are proportional to it. Halving stops when `rows` times the count would no longer
  divide over the mesh.
  """
  ways, left = mesh["data"] * mesh["fsdp"], count
  while size * (1 - left / count) < excess and left % 2 == 0 and left // 2 * rows % ways == 0:
    left //= 2
  return left
