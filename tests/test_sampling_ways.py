"""Sampling with fewer tensor ways than the update: the same trajectories, the same step."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from tests import test_train_unigrpo
from unigrpo_jax import errors, train
from unigrpo_jax.episodes import rollout
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import parts, rl
from unigrpo_jax.runtime import folders, sharding, state
from unigrpo_jax.tools.plan import topology


def _config(shallow, ways, **changes):
  return test_train_unigrpo._config(shallow, **{
    "steps": 1, "group_size": 4, "rollout.prompts_at_once": 2, "microbatch": 8, "eval.every": 0,
    "rollout.temperature": 4.0, "eps": 1e-5, "mesh.fsdp": 2, "mesh.tensor": 4,
    "rollout.tensor": ways,
  } | changes)


def _run(config, workdir, monkeypatch):
  """(metrics, the last state, episodes)."""
  episodes, sample = [], rollout.Rollout.sample

  def listening(self, *arguments):
    episodes.append(sample(self, *arguments))
    return episodes[-1]

  with monkeypatch.context() as patch:
    patch.setattr(rollout.Rollout, "sample", listening)
    last = train.train(config, workdir, jax.devices()[: 2 * config.mesh.tensor])
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return rows, jax.device_get(last), episodes


@pytest.mark.slow
def test_fewer_ways_give_the_same_step(shallow, tmp_path, monkeypatch):
  """Of 2 tensor ways in the update, and as many or 1 in sampling."""
  config = lambda ways: _config(shallow, ways, **{"mesh.tensor": 2})
  want, state_2, [episode_2] = _run(config(0), tmp_path / "2", monkeypatch)
  got, state_1, [episode_1] = _run(config(1), tmp_path / "1", monkeypatch)
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  for arrays in (episode_1.text, episode_1.flow, episode_1.inputs.texts["prompt"]):
    for array in jax.tree.leaves(arrays):
      assert array.sharding.is_equivalent_to(sharding.along_batch(mesh), array.ndim)
  np.testing.assert_array_equal(episode_1.text.ids, episode_2.text.ids)
  read_1, read_2 = episode_1.read(), episode_2.read()
  assert read_1.texts == read_2.texts and len(set(read_1.texts)) > 1
  # Each prompt once, as the update reads it, though it was sampled from by two ways each.
  chex.assert_trees_all_equal(*(jax.device_get(e.inputs) for e in (episode_1, episode_2)))
  assert episode_1.inputs.texts["prompt"].ids.shape[0] == 2
  np.testing.assert_allclose(episode_1.flow.latents, episode_2.flow.latents, atol=2e-4)
  np.testing.assert_array_equal(read_1.rows, read_2.rows)
  pixels = [np.stack(read.images).astype(int) for read in (read_1, read_2)]
  assert np.abs(pixels[0] - pixels[1]).max() <= 1
  for row, other in zip(want, got, strict=True):
    for name, value in row.items():
      if not name.startswith(("drift/", *test_train_unigrpo.VOLATILE)):
        assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
  assert got[0]["drift/text"] < 1e-5 and got[0]["drift/flow"] < 1e-7
  chex.assert_trees_all_close(state_1.params, state_2.params, rtol=1e-4, atol=3e-6)


def test_parameters_are_whole_along_the_ways_that_sampling_has_not(shallow):
  """And a chunk that its batch's ways do not divide is refused."""
  spec = rl.read(_config(shallow, 2))
  network = state.open_network(spec.network)
  sampled = rollout.Rollout(network, None, spec.rollout)
  kernel = sampled.sampler.layout["layers"]["gen"]["mlp"]["up"]["kernel"]
  assert dict(kernel.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert [axis for axis in kernel.spec if axis] == ["tensor"]
  parts.check_fits(spec, network)
  spec = rl.read(_config(shallow, 1, **{"rollout.prompts_at_once": 1}))
  with pytest.raises(errors.InputError, match=r"x group_size=4 .*\(config.rollout.tensor\)=8"):
    parts.check_fits(spec, network)


@pytest.mark.parametrize(
  "gib, ways", [(None, 4), (192, 1), (95.74, 2), (80, 2), (31.25, 4), (8, 4)]
)
def test_the_fewest_ways_that_leave_three_quarters_of_the_memory(shallow, gib, ways):
  """Of BAGEL-7B-MoT in bfloat16, 27.4 GiB: as a chip of 192 GiB, a v5p, an H100, a v6e."""
  folder = folders.ModelFolder(None, "official", None, config_lib.bagel_7b())
  config = _config(shallow, 0, dtype="bfloat16")
  network = state.build_network(rl.read(config).network, folder, topology.stub_tokenizer())
  network = dataclasses.replace(network, device_memory=gib and gib * 2**30)
  rollout_mesh = lambda **keys: rl.read(_config(shallow, **keys)).rollout.mesh(network)
  assert rollout_mesh(ways=0).shape["tensor"] == ways
  assert rollout_mesh(ways=2).shape["tensor"] == 2, "what is given counts"
  assert rollout_mesh(ways=0, **{"rollout.layout": "update"}).shape["tensor"] == 4
