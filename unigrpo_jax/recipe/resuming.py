"""What a run of UniGRPO may change of its config when it continues."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ml_collections import ConfigDict

# They change neither what is learnt nor in which order: how the run is judged and watched,
JUDGED = {
  "eval", "drift", "reward.threads", "reward.max_failed_fraction", "reward.watch_images",
  "pictures_every",
}
# and what its programs need of memory and time; but see `kept_keys`.
MEMORY_AND_SPEED = {
  "rollout.prompts_at_once", "rollout.layout", "rollout.tensor", "text.chunk", "microbatch",
  "remat",
}
MUTABLE_KEYS = JUDGED | MEMORY_AND_SPEED
# Rewards of servers, and of their options where they are and how they are asked, not what is asked.
SERVED = ("http", "judge", "unirl", "flow_factory")
ENDPOINT_KEYS = (
  "url", "timeout", "retries", "backoff", "outage", "batch_size", "token", "token_env", "key_env",
  "workers", "deadline", "probe",
)


def mutable_keys(
  config: ConfigDict, keys: Iterable[str], objectives: Collection[str], noises_again: bool
) -> set[str]:
  """The keys, dotted, besides those of any run (`resumption.MUTABLE_KEYS`).

  Args:
    config: of the run.
    keys: all there are.
    objectives: of the flow, whose own keys begin with `flow.NAME_`: a run does not read another's.
    noises_again: the run's objective noises finished images.
  """
  others = tuple(f"flow.{other}_" for other in objectives if other != config.flow.objective)
  idle = {key for key in keys if key.startswith(others)}
  if not noises_again:
    idle |= {"flow.draws", "flow.times"}
  calls = {
    f"reward_options.{name}.{key}" for name, options in config.reward_options.items()
    for key in ("time_limit", *(ENDPOINT_KEYS if options.get("kind", name) in SERVED else ()))
  }
  return MUTABLE_KEYS | calls | idle


def kept_keys(config: ConfigDict) -> set[str]:
  """Keys of memory and speed by which this run would learn something else."""
  layout, kept = {"mesh", "rollout.prompts_at_once"}, set()
  if config.minibatches > 1:  # They say which trajectories share an optimizer step,
    kept |= {"microbatch"} | (layout if config.group_size > 1 else set())
  if config.rollout.window == "per_rank_const":  # and what a rank is.
    kept |= layout
  return kept
