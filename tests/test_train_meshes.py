"""Training over eight fake devices, however they are laid out: the run of one device."""

import json

import chex
import jax
import pytest

from unigrpo_jax import train
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.runtime import state

MESHES = {"1x8x1": (1, 8, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
STEPS = 5
slow = pytest.mark.slow


def _config(base, variant, sizes, steps=STEPS):
  config = config_files.load("configs/unigrpo.py:" + ",".join(filter(None, ("tiny", variant))))
  # Fewer prompts than devices along the batch: each is read for parts of its group.
  config.update_from_flattened_dict({
    "init_from": str(base), "steps": steps, "prompts_per_step": 4, "rollout.prompts_at_once": 2,
    "group_size": 4, "microbatch": 16, "rollout.max_tokens": 8, "rollout.num_timesteps": 5,
    # Words that are certain have no gradient, and Adam makes whole steps of its rounding; as it
    # does of any gradient of rounding's size without a larger epsilon.
    "rollout.temperature": 4.0, "eps": 1e-5,
    "rollout.window_range": (0, 3), "rollout.window_size": 2, "text.chunk": 8,
    "checkpoint_every": 1, "keep_checkpoints": 3, "eval.every": 0, "schedule": "constant",
  })
  config.rewards = dict(brightness=1.0)
  config.learning_rate.und = config.learning_rate.gen = 1e-4
  for axis, size in zip(("data", "fsdp", "tensor"), sizes):
    config.mesh[axis] = size
  return config


def _run(config, workdir):
  count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
  last = train.train(config, workdir, jax.devices()[:count])
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return jax.device_get(last), rows


@pytest.fixture(scope="module")
def alone(shallow, tmp_path_factory):
  """(state, metrics, workdir) of one device, for each kind of training."""
  runs = {}
  for variant in ("", "lora"):
    workdir = tmp_path_factory.mktemp("alone")
    runs[variant] = (*_run(_config(shallow, variant, (1, 1, 1)), workdir), workdir)
  return runs


@pytest.mark.parametrize("variant", ["", "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("name", MESHES)
@slow
def test_meshes_equal_one_device_and_compile_once(shallow, alone, tmp_path, name, variant):
  last, rows = _run(_config(shallow, variant, MESHES[name]), tmp_path)
  want, expected, _ = alone[variant]
  chex.assert_trees_all_close(last.params, want.params, rtol=1e-4, atol=3e-6)
  start = _start(_config(shallow, variant, (1, 1, 1)))
  moved = jax.tree.map(lambda a, b: abs(a - b).max(), want.params, start)
  assert max(jax.tree.leaves(moved)) > 1e-4
  for row, other in zip(rows, expected, strict=True):
    for metric in ("loss/total", "loss/text", "loss/flow", "reward/mean"):
      assert row[metric] == pytest.approx(other[metric], rel=2e-3, abs=1e-5), metric
  # The first two iterations compile: the state's layout is the compiler's only after an update.
  assert [row["seconds/compile"] for row in rows[2:]] == [0.0] * (STEPS - 2)


def _start(config):
  """The parameters before the first step."""
  spec = rl.read(config)
  network, optimizer = state.open_network(spec.network, jax.devices()[:1]), spec.optimizer.make()
  layout = state.layout(network, optimizer, ema=False, reference=False)
  return jax.device_get(state.first_state(
    network, optimizer, layout, random_init=False, seed=spec.seed
  ).params)


@pytest.mark.parametrize("there, here", [("2x2x2", "1x8x1"), ("1x8x1", None), (None, "2x4x1")])
@slow
def test_a_checkpoint_of_one_mesh_resumes_on_another(shallow, alone, tmp_path, there, here):
  """Two steps there and the rest here are the run of one device."""
  one = (1, 1, 1)
  _run(_config(shallow, "", MESHES.get(there, one), steps=2), tmp_path)
  last, rows = _run(_config(shallow, "", MESHES.get(here, one)), tmp_path)
  chex.assert_trees_all_close(last.params, alone[""][0].params, rtol=1e-4, atol=3e-6)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
