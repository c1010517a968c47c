"""What to change first in a config that does not fit its chips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unigrpo_jax.tools.plan import chips, page, programs


def changes(config, plan: programs.Plan, told: Mapping[str, Any], chip: chips.Chip) -> list[str]:
  """Lines, the change that frees most first; empty where the plan fits.

  Args:
    config: that was planned.
    plan: of it.
    told: see `page.record`.
    chip: of the topology.
  """
  if told["fits"]:
    return []
  name = max(told["peak"], key=told["peak"].get)
  phase, held = plan.phases[name], plan.held
  own = phase.bytes.get("results", 0) + phase.bytes.get("temporaries", 0)
  if phase.exceeds is not None:
    # What the compiler wanted besides the arguments is not told apart.
    own = phase.exceeds - sum(held.get(cause, 0) for cause in page.held_beside(name))
  wanted = told["peak"][name] - (1 - page.SPARE) * chip.hbm
  changes_of = _of_update if name == "update" else _of_rollout
  found = changes_of(config, plan, own, wanted) + _of_both(config, plan)
  lines = [f"{wanted / chips.GIB:.2f} GiB too many; first changes, with what each frees on a chip:"]
  for freed, words in sorted(found, key=lambda pair: -pair[0]):
    lines.append(f"  {words}: about {freed / chips.GIB:.2f} GiB")
  return lines


def _of_update(config, plan, own: float, wanted: float) -> list[tuple[float, str]]:
  found = []
  if not config.remat:
    found.append((own / 2, "--config.remat=true, at least"))
  size = _halved(config.microbatch, own, wanted, _ways(plan))
  if size < config.microbatch:
    freed = own * (1 - size / config.microbatch)
    found.append((freed, f"--config.microbatch={size}"))
  return found


def _of_rollout(config, plan, own: float, wanted: float) -> list[tuple[float, str]]:
  r, found, held = config.rollout, [], plan.held
  own += held.get("cache", 0)
  size = _halved(r.prompts_at_once, own, wanted, 1)
  if size < r.prompts_at_once:
    freed = own * (1 - size / r.prompts_at_once)
    found.append((freed, f"--config.rollout.prompts_at_once={size}"))
  fsdp = plan.mesh["fsdp"]
  if r.layout == "stationary" and fsdp > 1:
    freed = held.get("sampler", 0) * (1 - 1 / fsdp)
    found.append((freed, "--config.rollout.layout='\"update\"', and gathers for every token"))
  return found


def _halved(size: int, own: float, wanted: float, least: int) -> int:
  """`size` halved until that frees `wanted` of the `own` bytes, which are in proportion to it."""
  left = size
  while own * (1 - left / size) < wanted and left % 2 == 0 and left // 2 >= least:
    left //= 2
  return left


def _of_both(config, plan) -> list[tuple[float, str]]:
  held, found = plan.held, []
  tensor = plan.mesh["tensor"]
  if tensor < 4:
    found.append((held.get("sampler", 0) / 2, f"--config.mesh.tensor={2 * tensor}"))
  if not config.lora.rank:
    freed = held["optimizer"] + held["reference"] + held["parameters"]
    found.append((freed, "LoRA, the variant lora: optimizer, gradients and reference of adapters"))
  return found


def _ways(plan) -> int:
  return plan.mesh["data"] * plan.mesh["fsdp"]
