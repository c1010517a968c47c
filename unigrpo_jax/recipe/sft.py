"""From a config of supervised training to frozen dataclasses; impossible ones are refused here."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax
from ml_collections import ConfigDict
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.episodes import packing, requests
from unigrpo_jax.recipe import checks, sections
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.supervised import feed

# The numbers of a step depend on neither, but for rounding.
MUTABLE_KEYS = {"limits", "microbatch", "remat"}
# Keys that configs of older runs lack, with what those runs did.
DEFAULTS = {
  "attention": "auto", "keep_every": 0, "lora.rank": 0, "lora.alpha": 128.0, "lora.adapter": "",
  "image_sizes": [],
}
_COUNT, _PART = checks.Integer(low=1), checks.Number(low=0, high=1)
KEYS: checks.Keys = {
  "data.folder": checks.Text(), "data.mixture": checks.Table(checks.Number(low=0)),
  "image_sizes": checks.Several(checks.Several(_COUNT, 2)),
  "data.wrong_plan_rate": _PART, "sequences_per_step": _COUNT, "noise_draws": _COUNT,
  "timestep_shift": checks.Number(above=0), "drop_text": _PART, "drop_vit": _PART,
  "drop_vae": _PART, "limits.tokens": _COUNT, "limits.labels": _COUNT, "limits.images": _COUNT,
  "limits.patches": _COUNT, "limits.clean": _COUNT, "limits.latents": _COUNT,
  "ce_weight": checks.Number(low=0), "ce_weighting": checks.OneOf(feed.CE_WEIGHTINGS),
  "mse_weight": checks.Number(low=0), "label_chunk": _COUNT, "log_every": _COUNT,
  "lora.rank": checks.Integer(low=0), "lora.alpha": checks.Number(above=0),
  "lora.adapter": checks.Text(),
}


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What is learnt: a folder of shards, or IconWorld's examples where it is ""."""

  folder: str
  mixture: Mapping[str, float]
  wrong_plan_rate: float


@dataclasses.dataclass(frozen=True)
class Spec:
  """A run of supervised training.

  Attributes:
    network, run, optimizer: see their classes.
    data: what is learnt.
    feed: how an example becomes a sequence.
    limits: sizes of a microbatch's arrays, all hosts together.
    sequences_per_step, microbatch: all hosts together.
    ce_weight, mse_weight, label_chunk: of the loss.
    seed: of examples, noise and times.
  """

  network: state.NetworkSpec
  run: run_lib.RunSpec
  optimizer: sections.OptimizerSpec
  data: DataSpec
  feed: feed.Recipe
  limits: packing.PadTo
  sequences_per_step: int
  microbatch: int
  ce_weight: float
  mse_weight: float
  label_chunk: int
  seed: int


def read(config: ConfigDict) -> Spec:
  """A config as frozen dataclasses.

  Raises:
    InputError: a number or a combination is impossible; names the key, its value, and what to do.
  """
  config = checks.read(config, KEYS, DEFAULTS)
  sections.fill_rank(config)
  if config.sequences_per_step % config.microbatch:
    raise errors.InputError(
      f"config.sequences_per_step={config.sequences_per_step} is not a multiple of "
      f"config.microbatch={config.microbatch}; change one of them"
    )
  if not any(config.learning_rate.values()):
    raise errors.InputError("config.learning_rate is 0 for all groups; give one of them a rate")
  return sections.fill(
    Spec, config, network=sections.network(config),
    run=sections.run(config, MUTABLE_KEYS, DEFAULTS, shown=("ce", "mse")),
    optimizer=sections.optimizer(config, config.steps),
    data=sections.fill(DataSpec, config.data), feed=sections.fill(feed.Recipe, config),
    limits=packing.PadTo(noisy=config.noise_draws, **config.limits.to_dict()),
  )


def check_fits(spec: Spec, network: state.Network) -> None:
  """Refuses what this model or its devices cannot run, before anything is loaded or compiled.

  Raises:
    InputError: names the key, its value, and what to do.
  """
  if spec.feed.image_sizes:
    with errors.at("config.image_sizes"):
      requests.check_sizes(network.config, spec.feed.image_sizes)
  mesh = network.mesh
  ways, hosts = sharding.batch_multiple(mesh), jax.process_count()
  for key, size in (("microbatch", spec.microbatch), ("limits.images", spec.limits.images)):
    if size % ways or size % hosts:
      raise errors.InputError(
        f"config.{key}={size} does not divide over data x fsdp = {ways} devices and {hosts} hosts; "
        "make it a multiple of both"
      )
  shares = np.bincount(sharding.row_hosts(mesh, spec.microbatch), minlength=hosts)
  if mesh.is_multi_process and shares.min() < shares.max():
    raise errors.InputError(
      f"config.mesh.tensor={mesh.shape['tensor']} joins devices of several hosts, which would each "
      "make the same examples; make it a divisor of a host's devices"
    )
