"""Impossible values in a run's config, refused before anything is loaded or compiled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from unigrpo_jax import errors
from unigrpo_jax.models import layers
from unigrpo_jax.runtime import metrics

EXPORT_DTYPES = ("bfloat16", "float16", "float32")
# (bounds, see `errors.require`; the keys that lie within them).
Bounds = Iterable[tuple[Mapping[str, float], Collection[str]]]
# Of all runs.
BOUNDS: Bounds = (
  ({"low": 0}, ("warmup_steps", "weight_decay", "eps")),
  ({"low": 1}, ("steps", "microbatch", "checkpoint_every", "keep_checkpoints")),
  ({"above": 0}, ("clip_norm",)),
  ({"low": 0, "high": 1}, ("ema_decay", "b1", "b2")),
)


def check(
  config: ConfigDict, choices: Mapping[str, Collection[str]], bounds: Bounds
) -> None:
  """Refuses values of a config that no run, or not this kind of run, can have.

  Args:
    config: of the run.
    choices: what its own keys, dotted, may be.
    bounds: of its own keys, as BOUNDS.

  Raises:
    InputError: names the key, its value, and what it may be.
  """
  general = {
    "export_dtype": EXPORT_DTYPES, "schedule": ("constant", "cosine"), "remat": tuple(layers.REMAT),
  }
  for key, options in (general | dict(choices)).items():
    errors.choose(f"config.{key}", _value(config, key), options)
  for name in config.writers:
    errors.choose("config.writers", name, metrics.WRITERS)
  for limits, keys in (*BOUNDS, *bounds):
    for key in keys:
      errors.require(f"config.{key}", _value(config, key), **limits)
  for group, rate in config.learning_rate.items():
    errors.require(f"config.learning_rate.{group}", rate, low=0)


def _value(config: ConfigDict, key: str) -> Any:
  section, _, name = key.rpartition(".")
  return (config[section] if section else config)[name]
