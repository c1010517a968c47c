"""The toy of `toy_run`, slow enough to be killed anywhere, and started in a second."""

from __future__ import annotations

import pathlib
import time

import jax.numpy as jnp
import numpy as np

from tests import toy_run
from unigrpo_jax.runtime import hosts, resumption, run, stopping

STEPS, SIZE, SECONDS = 40, 50_000, 0.05  # of a step and of an evaluation
CONFIG = {"steps": STEPS, "schedule": "constant", "learning_rate": {"und": 1.0}}


def evaluate(params, step: int, between, wait) -> dict[str, float]:
  """A reward that depends on the parameters."""
  time.sleep(SECONDS)
  between()
  wait(lambda seconds: not time.sleep(SECONDS), lambda: "the toy")
  return {"eval/plain/reward": float(jnp.cos(params["llm2vae"]["kernel"]).mean()) + step}


@stopping.end_on_sigterm()
def main(argv) -> None:
  """Runs in, or continues from, the folder that is the only argument; leaves `final.npy` there."""
  train(CONFIG, pathlib.Path(argv[0]))


@hosts.holds_workdir
def train(config, workdir: pathlib.Path, devices=None) -> None:
  spec = run.RunSpec(
    config=config, defaults={}, mutable_keys=resumption.MUTABLE_KEYS, steps=STEPS,
    checkpoint_every=2, keep_checkpoints=2, keep_every=10, writers=(), shown=("loss",),
    evaluate_every=5, best_metric="eval/plain/reward",
  )
  train_state = toy_run.train(
    toy_run.make_network("toy", devices), workdir, spec, size=SIZE, evaluate=evaluate,
    in_step=lambda step: time.sleep(SECONDS), metrics=lambda step, by: {"loss": 1.0 / step + by},
  )
  if train_state.step == STEPS:
    np.save(workdir / "final.npy", train_state.params["llm2vae"]["kernel"])
