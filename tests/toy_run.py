"""A training without a network, around which everything is real: `Run`, its checkpoints and log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import pathlib
import types as python_types
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import types
from unigrpo_jax.runtime import run, sharding, state


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


def make_network(path: str, devices=None) -> state.Network:
  """What `Run` asks of a network: a path, and a mesh, by default of one device."""
  devices = devices or jax.devices()[:1]
  mesh = sharding.make_mesh(fsdp=len(devices), devices=devices)
  return state.Network(python_types.SimpleNamespace(path=path), None, None, mesh)


def first_state(mesh, size: int) -> types.TrainState:
  """A state of `size` parameters."""
  params = {"llm2vae": {"kernel": jnp.sin(jnp.arange(size))}}
  made = types.TrainState(step=jnp.int32(0), params=params, opt_state=(), ema=None)
  return jax.device_put(made, sharding.replicated(mesh))


def moved(train_state: types.TrainState, by: int) -> types.TrainState:
  """The state after a step on what the stream gave."""
  return train_state.replace(
    step=train_state.step + 1,
    params=jax.tree.map(lambda a: 0.9 * a + by, train_state.params),
  )


def train(
  network: state.Network, workdir: pathlib.Path, spec: run.RunSpec, *, size: int,
  evaluate: Callable[..., Any], in_step: Callable[[int], Any],
  metrics: Callable[[int, int], Mapping[str, float]], pinned: Mapping[str, str] | None = None,
  may_change: Collection[str] = (),
) -> types.TrainState:
  """Runs in, or continues from, a folder.

  Args:
    network, workdir, spec, pinned, may_change: of the run.
    size: of the state.
    evaluate: see `Run.evaluate`.
    in_step: called in the middle of each step.
    metrics: (step, what the stream gave) -> those of the step.

  Returns:
    The last state.
  """
  stream, first = Position(), first_state(network.mesh, size)
  made = run.Run(
    workdir, spec, network, positions={"prompt_position": stream}, pinned=pinned,
    may_change=may_change,
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
      in_step(step)
      with made.timer("move"):
        train_state = moved(train_state, by)
      made.commit(train_state, metrics(step, by))
      made.evaluate(evaluate, train_state)
  made.finish(train_state)
  return train_state
