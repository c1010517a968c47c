"""A run without a network, around which everything is real: `Run`, its checkpoints, log and lock.

It starts in a second, so that it can be killed often.
"""

from __future__ import annotations

import pathlib
import time
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import types
from unigrpo_jax.runtime import hosts, resumption, run, sharding, state, stopping

STEPS, SIZE, SECONDS = 40, 50_000, 0.05  # of a step and of an evaluation
CONFIG = {"steps": STEPS, "schedule": "constant", "learning_rate": {"und": 1.0}}


class Position:
  """A stream whose place is the number of what it gave."""

  def __init__(self):
    self.value = 0

  def next(self) -> int:
    self.value += 1
    return self.value

  def state(self) -> int:
    return self.value

  def restore(self, value: int) -> None:
    self.value = value


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
  mesh, stream = sharding.make_mesh(devices=devices or jax.devices()[:1]), Position()
  first = types.TrainState(
    step=jnp.int32(0), params={"llm2vae": {"kernel": jnp.sin(jnp.arange(SIZE))}}, opt_state=(),
    ema=None,
  )
  first = jax.device_put(first, sharding.replicated(mesh))
  spec = run.RunSpec(
    config=config, defaults={}, mutable_keys=resumption.MUTABLE_KEYS, steps=STEPS,
    checkpoint_every=2, keep_checkpoints=2, keep_every=10, writers=(), shown=("loss",),
    evaluate_every=5, best_metric="eval/plain/reward",
  )
  folder = python_types.SimpleNamespace(path="toy")
  made = run.Run(
    workdir, spec, state.Network(folder, None, None, mesh), positions={"position": stream}
  )
  layout = state.StateLayout(
    jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), first),
    jax.tree.map(lambda a: a.sharding, first),
  )
  train_state = made.restore(layout, lambda: first)
  with made:
    made.evaluate(evaluate, train_state)
    for step in made.steps():
      by = stream.next()
      made.raise_if_stopped()
      time.sleep(SECONDS)
      train_state = train_state.replace(
        step=train_state.step + 1,
        params={"llm2vae": {"kernel": 0.9 * train_state.params["llm2vae"]["kernel"] + by}},
      )
      made.commit(train_state, {"loss": 1.0 / step + by})
      made.evaluate(evaluate, train_state)
  made.finish(train_state)
  if made.step == STEPS:
    np.save(workdir / "final.npy", train_state.params["llm2vae"]["kernel"])
