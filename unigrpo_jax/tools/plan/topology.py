"""A config on a TPU topology that is only named."""

from __future__ import annotations

from collections.abc import Callable, Collection
import dataclasses
import pathlib

import jax
from jax.experimental import topologies

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import recipe
from unigrpo_jax.runtime import folders, runs
from unigrpo_jax.tools.plan import chips, plans, programs

INSTALL = "install the TPU compiler, pip install -r requirements-tpu.txt"


@dataclasses.dataclass(frozen=True)
class Words:
  """What a plan needs of the tokenizer of BAGEL-7B-MoT: its special ids and lengths.

  The system prompt before a reasoning has 46 tokens in its vocabulary.
  """

  im_start: int = 151644
  im_end: int = 151645
  vision_start: int = 151652
  vision_end: int = 151653

  def encode(self, text: str) -> list[int]:
    return [0] * 46


def devices(name: str) -> tuple[chips.Chip, list]:
  """The chip and the devices of a topology such as "v5p:4x4x4".

  Raises:
    InputError: no compiler, or no such topology.
  """
  kind = name.partition(":")[0]
  if kind not in chips.CHIPS or not name.partition(":")[2]:
    raise errors.InputError(
      f"--topology={name!r}: expected {', '.join(chips.CHIPS)}, a colon and a shape, e.g. v5p:4x4x4"
    )
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except (RuntimeError, ImportError) as error:
    words = " ".join(str(error).split())
    missing = "not installed" in words or "libtpu" in words
    raise errors.InputError(
      f"--topology={name}: {INSTALL} ({words})" if missing else f"--topology={name}: {words}"
    ) from None
  return chips.CHIPS[kind], list(found)


def open_network(config, found: list) -> runs.Network:
  """The network of a config on devices that may not be there, without weights."""
  if config.init_from:
    return runs.open_network(config, found)
  sizes = config_lib.bagel_7b()
  folder = folders.ModelFolder(None, "official", None, sizes)
  return runs.build_network(config, folder, Words(), found)


def plan(
  config, name: str, progress: Callable[[str], None] = lambda phase: None,
  only: Collection[str] = plans.PHASES, texts: pathlib.Path | None = None,
) -> tuple[plans.Plan, chips.Chip]:
  """Compiles the phases of a config, or some of them, for a topology.

  Raises:
    InputError: no compiler, no such topology, or the config does not fit it.
  """
  chip, found = devices(name)
  network = open_network(config, found)
  return programs.Planner(config, network).run(progress, only, texts), chip


def summary(config) -> list[str]:
  """What an iteration of the config is."""
  r = config.rollout
  thought = f"{r.max_tokens} tokens of reasoning" if r.think else "no reasoning"
  how = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "full fine-tuning"
  return [
    f"{config.prompts_per_step} prompts x {config.group_size} = {recipe.trajectories_of(config)} "
    f"trajectories of {r.height} x {r.width} pixels, {thought}, {r.num_timesteps - 1} steps",
    f"{how}, {config.epochs} epoch(s), microbatch {config.microbatch}, "
    f"{r.prompts_at_once} prompts at once; jax {jax.__version__}",
  ]
