"""The sections of a config that every kind of training has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict
import optax

from unigrpo_jax import errors
from unigrpo_jax.models import adapters, layers
from unigrpo_jax.runtime import hub, optim, resumption, state
from unigrpo_jax.runtime import run as run_lib


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """AdamW; see `optim.adamw_by_group`.

  Attributes:
    learning_rate: by group of parameters; 0 freezes it.
    schedule: "constant" or "cosine".
    warmup_steps, steps: optimizer steps.
    b1, b2, eps, weight_decay, clip_norm: of `optim.adamw_by_group`.
    ema_decay: of a moving average of the parameters; None for none.
  """

  learning_rate: Mapping[str, float]
  schedule: str
  warmup_steps: int
  steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  ema_decay: float | None

  @property
  def trained(self) -> set[str]:
    """The groups of parameters that have a learning rate."""
    return optim.trained(self.learning_rate)

  def make(self) -> optax.GradientTransformation:
    """AdamW with the learning rate and schedule of each group."""
    def schedule(rate):
      if not rate:
        return None
      if self.schedule == "cosine":
        return optim.warmup_cosine(rate, self.warmup_steps, self.steps)
      return optim.warmup_constant(rate, self.warmup_steps)

    return optim.adamw_by_group(
      {group: schedule(rate) for group, rate in self.learning_rate.items()},
      b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay,
      clip_norm=self.clip_norm,
    )


def fill(cls: type, section: ConfigDict, **more: Any) -> Any:
  """A dataclass from the keys of a section that have the names of its fields, and more."""
  names = {field.name for field in dataclasses.fields(cls)} - more.keys()
  values = {name: _plain(section[name]) for name in names if name in section}
  return cls(**values, **more)


def _plain(value: Any) -> Any:
  if isinstance(value, ConfigDict):
    return value.to_dict()
  return tuple(value) if isinstance(value, list) else value


def plain(config: ConfigDict) -> dict[str, Any]:
  """A config as JSON gives it back."""
  return json.loads(config.to_json())


def network(config: ConfigDict) -> state.NetworkSpec:
  lora = config.get("lora")
  return fill(
    state.NetworkSpec, config, mesh=config.mesh.to_dict(),
    lora=layers.Lora(lora.rank, lora.alpha) if lora and lora.rank else None,
    adapter=lora.get("adapter", "") if lora else "",
  )


def fill_rank(config: ConfigDict) -> None:
  """Where a run starts from adapters and names no rank, sets theirs, and their alpha.

  Raises:
    InputError: the folder cannot be read.
  """
  if config.lora.adapter and not config.lora.rank:
    try:
      with errors.at("config.lora.adapter"):
        _, lora = adapters.read_config(hub.find(config.lora.adapter))
    except errors.InputError as error:
      error.args = (
        f"{error}; a run that goes on does not need it where config.lora.rank and "
        "config.lora.alpha are given, as in its config.json",
      )
      raise
    config.lora.rank, config.lora.alpha = lora.rank, float(lora.alpha)


def optimizer(config: ConfigDict, steps: int) -> OptimizerSpec:
  """`steps`: of the optimizer in the whole run."""
  return fill(OptimizerSpec, config, steps=steps, ema_decay=config.ema_decay or None)


def run(
  config: ConfigDict, mutable_keys: Collection[str], defaults: Mapping[str, Any],
  kept: Collection[str] = (), **more: Any
) -> run_lib.RunSpec:
  """What a run is around its steps.

  Args:
    config: of the run.
    mutable_keys: what it may change when it continues, besides `resumption.MUTABLE_KEYS`.
    defaults: of keys that an older config lacks.
    kept: of both sets, what it may not.
    more: other fields of `RunSpec`.
  """
  return fill(
    run_lib.RunSpec, config, config=plain(config), defaults=dict(defaults),
    mutable_keys=(resumption.MUTABLE_KEYS | set(mutable_keys)) - set(kept),
    **more,
  )
