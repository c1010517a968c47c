"""The logged curves of a comparison's runs, from which its figures are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

from unigrpo_jax.benchmarks import evaluation, hacking, results
from unigrpo_jax.tools.compare import rewards, runs


def record(trainings: Mapping[str, Sequence[runs.Training]]) -> dict[str, dict[str, Any]]:
  """{method: {seed: curves, see `of_run`}} of the runs that have begun."""
  made = {
    method: {str(run.seed): of_run(run) for run in of if run.rows()}
    for method, of in trainings.items()
  }
  return {method: seeds for method, seeds in made.items() if seeds}


def of_run(run: runs.Training) -> dict[str, Any]:
  """The curves of one run.

  Returns:
    {"training": {reward: [[iteration, mean], ...]},
     "validation": {mode: {reward: [[iteration, mean], ...]}},
     "flow_mse": [[iteration, value], ...],
     "velocity_evaluations": number of them in the rollout of an iteration}.
  """
  training: dict[str, list] = {}
  validation: dict[str, dict[str, list]] = {}
  flow_mse = []
  for step, row in sorted(run.rows().items()):
    for key, value in row.items():
      section, _, rest = key.partition("/")
      point = [step, value]
      if not math.isfinite(value):
        continue
      if section == "reward" and rest != "std":
        training.setdefault(rest, []).append(point)
      elif section == "eval":
        mode, _, name = rest.partition("/")
        validation.setdefault(mode, {}).setdefault(name, []).append(point)
      elif key == "flow/mse":
        flow_mse.append(point)
  return {
    "training": training, "validation": validation, "flow_mse": flow_mse,
    "velocity_evaluations": velocity_evaluations(run.settings),
  }


def of_evaluations(run: runs.Training) -> dict[str, Any] | None:
  """What a run's saved evaluations say of the verifier's strict score; see `hacking`.

  Returns:
    {"evaluations": [each as a dictionary], and the members of `hacking.Verdict`}; None where the
    score is a part of the reward, or no evaluation has both.
  """
  if run.settings["rewards"].get(rewards.STRICT) != 0:
    return None
  mode = evaluation.Mode.parse(run.mode).name
  last = max(run.rows(), default=0)  # Later ones are of before the run went back to a checkpoint.
  found = []
  for step, place in results.of_run(run.folder).items():
    _, rows = results.read(place) or ({}, [])
    rows = [row for row in rows if row.mode == mode]
    one = hacking.evaluation(step, rows, rewards.STRICT)
    if one is not None and step <= last:
      found.append(one)
  if not found:
    return None
  return {"evaluations": [one._asdict() for one in found]} | hacking.verdict(found)._asdict()


def velocity_evaluations(config: Mapping[str, Any]) -> int:
  """Number of velocity evaluations in a rollout of one iteration; guidance needs two per step."""
  rollout = config["rollout"]
  images = config["prompts_per_step"] * config["group_size"]
  guided = rollout["cfg_text_scale"] > 1
  return images * (rollout["num_timesteps"] - 1) * (1 + guided)
