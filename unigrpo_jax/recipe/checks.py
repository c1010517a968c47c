"""Impossible values in a run's config, refused before anything is loaded or compiled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.runtime import metrics, runs

# (bounds, see `errors.require`; the keys that all runs have within them).
Numbers = Iterable[tuple[Mapping[str, float], Collection[str]]]
NUMBERS: Numbers = (
  ({"low": 0}, ("warmup_steps", "weight_decay", "eps")),
  ({"low": 1}, ("steps", "microbatch", "checkpoint_every", "keep_checkpoints")),
  ({"above": 0}, ("clip_norm",)),
  ({"low": 0, "high": 1}, ("ema_decay", "b1", "b2")),
)


def check(config, choices: Mapping[str, Collection[str]], numbers: Numbers) -> None:
  """Refuses values of a config that no run, or not this kind of run, can have.

  Args:
    config: of the run.
    choices: what its own keys, dotted, may be.
    numbers: bounds and its own keys within them, as NUMBERS.

  Raises:
    InputError: names the key, its value, and what it may be.
  """
  for key, options in ({"export_dtype": runs.EXPORT_DTYPES} | dict(choices)).items():
    errors.choose(f"config.{key}", _value(config, key), options)
  for name in config.writers:
    errors.choose("config.writers", name, metrics.WRITERS)
  for bounds, keys in (*NUMBERS, *numbers):
    for key in keys:
      errors.require(f"config.{key}", _value(config, key), **bounds)
  for group, rate in config.learning_rate.items():
    errors.require(f"config.learning_rate.{group}", rate, low=0)


def _value(config, key: str) -> Any:
  section, _, name = key.rpartition(".")
  return (config[section] if section else config)[name]
