"""ReFL end to end, small: resumed it is the same run, and nothing but the drawing has moved."""

import json

import chex
import jax
import numpy as np
import pytest

from tests import stand_in_reward_model
from tests.test_train_unigrpo import rows_of, saved_in
from unigrpo_jax import errors, train
from unigrpo_jax.recipe import config_files
from unigrpo_jax.runtime import folders, optim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reward_model(shallow, tmp_path_factory):
  return stand_in_reward_model.make(shallow, tmp_path_factory.mktemp("made") / "reward_model")


def _config(shallow, reward_model, variants="tiny", **changes):
  config = config_files.load(f"configs/refl.py:{variants}")
  config.rewards = dict(brightness=1.0)
  small = {
    "init_from": str(shallow), "refl.reward_model": str(reward_model), "steps": 3,
    "prompts_per_step": 4,
    "microbatch": 2, "rollout.prompts_at_once": 2, "rollout.max_tokens": 6,
    "rollout.num_timesteps": 6, "text.chunk": 8, "checkpoint_every": 1, "keep_checkpoints": 1,
    "eval.every": 0,
  }
  config.update_from_flattened_dict(small | changes)
  return config


def _train(config, workdir):
  return train.train(config, workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(shallow, reward_model, tmp_path_factory):
  """(workdir, last state) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, jax.device_get(_train(_config(shallow, reward_model), workdir))


def test_only_the_drawing_moves(whole, shallow, reward_model):
  workdir, state = whole
  first = folders.open_folder(shallow).load_params(dtype=np.float32)["bagel"]
  _, rest = optim.split(state.params, {"gen"})
  chex.assert_trees_all_equal(rest, optim.split(first, {"gen"})[1])
  rows = rows_of(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3] and int(state.step) == 6
  for row in rows:
    assert 0 < row["refl/reward"] < 1 and row["refl/zero_gradient"] == 0
    assert row["refl/gradient_rms"] > 0 and row["grad_norm/gen"] > 0
    # Every ten iterations, from the first.
    assert ("refl/grad_reward" in row) == (row["step"] == 1)
  assert 0 < rows[0]["refl/grad_regulariser"] < rows[0]["refl/grad_reward"]
  assert list(reward_model.iterdir()) and "reward_model" not in str(state.opt_state)


def test_stopped_and_resumed_it_is_the_same_run(whole, shallow, reward_model, tmp_path):
  _train(_config(shallow, reward_model, steps=1), tmp_path)
  state = jax.device_get(_train(_config(shallow, reward_model), tmp_path))
  chex.assert_trees_all_equal(state, whole[1])
  assert rows_of(tmp_path) == rows_of(whole[0])
  assert saved_in(tmp_path)[0] == 3


def test_another_reward_model_is_refused(whole, shallow, reward_model, tmp_path):
  other = stand_in_reward_model.make(shallow, tmp_path / "other", tau=2.0)
  with pytest.raises(errors.InputError, match="refl.reward_model"):
    _train(_config(shallow, other, steps=4), whole[0])
  record = json.loads((reward_model / "reward.json").read_text())
  (other / "reward.json").write_text(json.dumps(record | {"checksums": {"ema.safetensors": [0]}}))
  with pytest.raises(errors.InputError, match="is not the file that reward.json was written for"):
    _train(_config(shallow, other), tmp_path / "run")


def test_with_thinking(shallow, reward_model, tmp_path):
  state = _train(_config(shallow, reward_model, "tiny,think", steps=1), tmp_path)
  first = folders.open_folder(shallow).load_params(dtype=np.float32)["bagel"]
  chex.assert_trees_all_equal(
    optim.split(jax.device_get(state.params), {"und"})[0], optim.split(first, {"und"})[0]
  )
  [row] = rows_of(tmp_path)
  assert row["text/length"] > 0 and 0 < row["refl/reward"] < 1 and "loss/text" not in row


def test_supervised_examples_beside(whole, shallow, reward_model, tmp_path):
  """Their error is a term of the same steps, as they are a function of the step."""
  sft = tmp_path / "sft.py"
  sft.write_text(
    "import runpy\n\n\ndef get_config():\n"
    f"  config = runpy.run_path({str(config_files.FOLDER / 'sft.py')!r})['get_config']('tiny')\n"
    "  config.data.mixture.update(dict(answer=0.0, edit=0.0))\n"
    "  config.sequences_per_step, config.microbatch, config.noise_draws = 4, 2, 1\n"
    "  config.limits.images = 2\n"
    "  return config\n"
  )
  changes = {"refl.sft_weight": 0.5, "refl.sft_config": str(sft)}
  config = _config(shallow, reward_model, steps=2, **changes)
  _train(config, tmp_path / "run")
  for row in rows_of(tmp_path / "run"):
    assert 0 < row["loss/sft"] < 2
    parts = sum(row[f"loss/{name}"] for name in ("flow", "regulariser", "sft"))
    np.testing.assert_allclose(row["loss/total"], parts, rtol=1e-5)
  sft.write_text(sft.read_text().replace("noise_draws = 4, 2, 1", "noise_draws = 4, 2, 2"))
  with pytest.raises(errors.InputError, match="refl.sft_config"):
    _train(config, tmp_path / "run")
