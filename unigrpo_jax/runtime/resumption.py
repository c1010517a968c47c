"""What may differ between the config of a run and that of its resumption."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flax import traverse_util

from unigrpo_jax import errors
from unigrpo_jax.runtime import optim

# In any run; each kind of run adds its own.
MUTABLE_KEYS = frozenset({
  "steps", "writers", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every",
  "export_to", "export_dtype", "mesh", "attention",
})


def mutable_keys(
  before: Mapping[str, Any], now: Mapping[str, Any], keys: Collection[str]
) -> set[str]:
  """The keys of `keys`, and learning rates unless another group is trained; see `check`.

  A cosine depends on the number of steps, which may then not change.
  """
  same = optim.trained(before["learning_rate"]) == optim.trained(now["learning_rate"])
  cosine = now["schedule"] == "cosine"
  return set(keys) - ({"steps"} if cosine else set()) | ({"learning_rate"} if same else set())


def check(
  before: Mapping[str, Any], now: Mapping[str, Any], mutable: Collection[str],
  defaults: Mapping[str, Any],
) -> None:
  """Refuses to resume with another configuration; names the first key that differs, `algorithm`
  before all others.

  Args:
    before, now: the configurations, nested mappings.
    mutable: keys that may differ, dotted; a section frees all in it.
    defaults: {dotted key: value} of keys that an older run lacks.
  """
  before, now = (traverse_util.flatten_dict(dict(config), sep=".") for config in (before, now))
  for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "algorithm", name)):
    sections = name.split(".")
    if any(".".join(sections[: i + 1]) in mutable for i in range(len(sections))):
      continue
    old, new = before.get(name, defaults.get(name)), now.get(name)
    if old != new:
      raise errors.InputError(
        f"config.{name}={new!r} but the run in the workdir has {old!r}; "
        "give it back its value, or choose a new --workdir"
      )
