"""The update over eight fake devices: it equals that of one, compiles once, and moves no data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax import types
from unigrpo_jax.algorithms import update
from unigrpo_jax.models import bagel, layers
from unigrpo_jax.runtime import sharding

# Whole runs on many devices are in test_train_meshes.py, which is slow too.
pytestmark = pytest.mark.slow
TOLERANCE = 3e-6  # Absolute, beside 1e-4 relative: float32 sums in another order.
MESHES = {"fsdp8": dict(fsdp=8), "2x2x2": dict(data=2, fsdp=2, tensor=2)}


@pytest.fixture(scope="module")
def networks(model):
  small = model.clone(remat="none")
  return {"full": small, "lora": small.clone(lora=layers.Lora(rank=2, alpha=4.0))}


@pytest.fixture(scope="module")
def starts(networks, params):
  """Random parameters of each network on the host, its adapters not at zero."""
  def start(network):
    fresh = sharding.unbox(network.init(jax.random.key(0), bagel.example_batch(network.config)))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    # Not the golden weights: theirs are large, and so is what rounding makes of them.
    return jax.device_get(jax.tree.map(
      lambda a: a + 0.03 * jax.random.normal(next(keys), a.shape), fresh["params"]))

  return {name: start(network) for name, network in networks.items()}


@pytest.fixture(scope="module")
def experience(networks, starts):
  return jax.device_get(joint.sample(networks["full"], starts["full"]))


def _update(network, start, experience, sizes, updates=1, compilations=None):
  """State on the host and metrics after some updates on a mesh, with the guard on."""
  count = int(np.prod(list(sizes.values())))
  mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:count])
  transformation, full = joint.optimizer(), network.lora is None

  def fresh(key) -> types.TrainState:
    params = network.init(key, bagel.example_batch(network.config))["params"]
    return joint.state(params, transformation, ema=True).replace(reference=params if full else None)

  places = sharding.shardings(jax.eval_shape(fresh, jax.random.key(0)), mesh)
  state = joint.state(jax.tree.map(jnp.asarray, start), transformation, ema=True)
  # By way of the host, so that no two leaves share the memory that is donated.
  state = jax.device_get(state.replace(reference=start if full else None))
  state = jax.tree.map(lambda a, place: jax.device_put(np.array(a), place), state, places)
  run = update.Update(
    *update.make_update(
      network, transformation, jax.device_get(joint.grid(network.config)), joint.algorithm(),
      joint.schedule(microbatches=1), trained={"und", "gen"}, ema_decay=0.9,
      reference_model=network.clone(lora=None),
    ),
    row_sharding=sharding.along_batch(mesh), out_shardings=(places, None), drift_limits={},
  )
  with sharding.activate(mesh):
    rows = jax.tree.map(lambda a: sharding.put_rows(mesh, a), experience)
    before = None
    for number in range(updates):
      state, metrics = run(state, run.precompute(state, rows))
      if compilations is not None:
        before = before or len(compilations)
        assert len(compilations) == before, f"compiled again in update {number}"
  return jax.device_get((state, metrics)), state


@pytest.fixture(scope="module")
def alone(networks, starts, experience):
  """What one device makes of it, for each network."""
  return {
    name: _update(networks[name], starts[name], experience, dict(data=1))[0] for name in networks
  }


@pytest.mark.parametrize(
  "name, mesh",
  [("full", "fsdp8"), ("full", "2x2x2"), ("lora", "2x2x2")],
)
def test_many_devices_equal_one(networks, starts, experience, alone, name, mesh):
  got, state = _update(networks[name], starts[name], experience, MESHES[mesh])
  key = "kernel" if name == "full" else layers.LORA_UP
  kernel = state.params["layers"]["gen"]["mlp"]["gate"][key]
  assert kernel.addressable_shards[0].data.size < kernel.size
  chex.assert_trees_all_close(got[0], alone[name][0], rtol=1e-4, atol=TOLERANCE)
  for metric, value in alone[name][1].items():
    if not metric.startswith("drift/"):
      np.testing.assert_allclose(got[1][metric], value, rtol=2e-3, atol=1e-5, err_msg=metric)
  moved = joint.moved(starts[name], got[0].params)
  assert moved["und"] > 30 * TOLERANCE < moved["gen"]
  assert {group for group, size in moved.items() if size} == {"und", "gen"}


def test_it_compiles_once(networks, starts, experience, compilations):
  _update(networks["full"], starts["full"], experience, dict(fsdp=8), updates=3,
          compilations=compilations)
