"""What may differ between the config of a run and that of its resumption."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.runtime import optim

# In any run; each kind of run adds its own.
RESUMABLE = frozenset({
  "steps", "writers", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every",
  "export_to", "export_dtype", "mesh", "attention",
})


def may_change(
  before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]
) -> set[str]:
  """The keys of `free`, and learning rates unless another group is trained; see `check`.

  A cosine depends on the number of steps, which is then no longer free.
  """
  same = optim.trained(before["learning_rate"]) == optim.trained(now["learning_rate"])
  cosine = now["schedule"] == "cosine"
  return set(free) - ({"steps"} if cosine else set()) | ({"learning_rate"} if same else set())


def check(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]):
  """Refuses to go on with another configuration; names the first key that differs.

  Args:
    before, now: the configurations, nested dicts.
    free: keys that may differ, dotted; a section frees all in it.
  """
  def walk(before, now, path=()):
    for key in sorted(before.keys() | now.keys()):
      name = ".".join((*path, key))
      old, new = before.get(key), now.get(key)
      if name in free or old == new:
        continue
      if isinstance(old, Mapping) and isinstance(new, Mapping):
        walk(old, new, (*path, key))
        continue
      raise errors.InputError(
        f"config.{name}={new!r} but the run in the workdir has {old!r}; "
        "give it back its value, or choose a new --workdir"
      )

  walk(before, now)
