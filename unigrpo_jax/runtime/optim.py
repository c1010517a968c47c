"""AdamW with a learning rate for each group of parameters; learning rates; the moving average."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unigrpo_jax.models import layers

# Group -> its top-level parameters of the network; layers and norms belong to their expert's.
GROUPS = {
  "und": (), "gen": (),
  "text": ("embed_tokens", "lm_head"),
  "latent": ("time_embedder", "vae2llm", "llm2vae"),
  "vit": ("vit", "connector"),
  "tables": ("latent_pos_embed", "vit_pos_embed"),
  "base": (),  # parameters of the experts, where they have LoRA adapters
}
_ADAPTERS = ("lora_down", "lora_up")


def trained(learning_rate: Mapping[str, float]) -> set[str]:
  """The groups of parameters that have a learning rate."""
  return {group for group, rate in learning_rate.items() if rate}


def groups(params: Mapping[str, Any]) -> Any:
  """The tree of `params` with each leaf's group in its place; LoRA adapters alone are an expert's.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  adapted = any(layers.path_keys(path)[-1] in _ADAPTERS for path, _ in leaves)
  group_of = {name: group for group, names in GROUPS.items() for name in names}

  def label(path, _) -> str:
    name, *rest = layers.path_keys(path)
    if name in ("layers", "norm"):
      return "base" if adapted and rest[-1] not in _ADAPTERS else rest[0]
    if name not in group_of:
      raise ValueError(f"parameter {'/'.join([name, *rest])} belongs to no group of {list(GROUPS)}")
    return group_of[name]

  return jax.tree_util.tree_map_with_path(label, params)


def split(params: Mapping[str, Any], trained: Collection[str]) -> tuple[Any, Any]:
  """The parameters of the trained groups and the others, each with None in the others' places."""
  labels = groups(params)
  pick = lambda wanted: jax.tree.map(
    lambda leaf, group: leaf if (group in trained) == wanted else None, params, labels
  )
  return pick(True), pick(False)


def join(first: Any, second: Any) -> Any:
  """Undoes `split`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
  )


def warmup_constant(learning_rate: float, warmup_steps: int) -> optax.Schedule:
  """Rises linearly over `warmup_steps`, then stays."""
  return lambda step: learning_rate * jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)


def warmup_cosine(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
  """Rises linearly over `warmup_steps`, then falls to zero at `steps` along a cosine."""
  rising = warmup_constant(learning_rate, warmup_steps)

  def schedule(step):
    done = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    return rising(step) * 0.5 * (1 + jnp.cos(jnp.pi * done))

  return schedule


def adamw_by_group(
  schedules: Mapping[str, optax.Schedule | None], *, b1: float, b2: float, eps: float,
  weight_decay: float, clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) for each group, its gradient clipped by its own norm.

  `schedules` has the learning rate of each group of GROUPS; with None, or no entry, it is frozen
  and has no state.
  """
  def one(schedule):
    if schedule is None:
      return optax.set_to_zero()
    return optax.chain(
      optax.clip_by_global_norm(clip_norm),
      optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )

  return optax.multi_transform({group: one(schedules.get(group)) for group in GROUPS}, groups)


def group_norms(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The norm of a tree of gradients or updates, by group."""
  totals = {group: jnp.zeros(()) for group in GROUPS}
  for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(groups(tree))):
    totals[group] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return {group: jnp.sqrt(total) for group, total in totals.items()}


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
  """The decay of a moving average at a step counted from 0: min((1 + s) / (10 + s), decay)."""
  return jnp.minimum((1.0 + step) / (10.0 + step), decay)


def update_average(average: Any, params: Any, step: jax.Array, *, decay: float) -> Any:
  """Moves a moving average of parameters towards them after a step.

    average <- d average + (1 - d) params,   d = ema_decay(step, decay)

  Both trees are float32; `step`, [] int32, is the optimizer's just taken, counted from 0; `decay`
  is the largest d. Source: `EMAModuleWrapper` of Flow-GRPO.
  """
  return move_average(average, params, ema_decay(step, decay))


def rising_decay(step: jax.Array, *, rise: float, highest: float) -> jax.Array:
  """The decay of an average that first follows its parameters: min(rise step, highest).

  Source: AWM's `kl_ema_decay`, DiffusionNFT's `return_decay`.
  """
  return jnp.minimum(rise * step, highest)


def move_average(average: Any, params: Any, d: jax.Array) -> Any:
  """d average + (1 - d) params, of float32 trees; d [] float32."""
  # d < 1 always, but without the `where` XLA fuses multiply and add, and rounds differently.
  move = lambda old, new: jnp.where(d < 1, d * old + (1 - d) * new, old)
  return jax.tree.map(move, average, params)
