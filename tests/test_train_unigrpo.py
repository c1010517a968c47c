"""UniGRPO end to end, small: stopped and resumed it is the same run, bit for bit."""

import contextlib
import json

import chex
import jax
import ml_collections
import numpy as np
import pytest

from unigrpo_jax import errors, export, train
from unigrpo_jax.benchmarks import evaluation
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import rollout
from unigrpo_jax.recipe import config_files, recipe
from unigrpo_jax.runtime import checkpoints, folders, resumption, runs
from unigrpo_jax.sampling import flow

VOLATILE = ("seconds/", "share/", "trajectories_per_second")


def _config(shallow, **changes):
  config = config_files.load("unigrpo", "tiny")
  config.rewards = dict(brightness=1.0)
  small = {
    "init_from": str(shallow), "steps": 3, "prompts_per_step": 2,
    "group_size": 2, "microbatch": 2, "rollout.prompts_at_once": 1, "rollout.max_tokens": 6,
    "rollout.num_timesteps": 5, "rollout.window_range": (0, 3), "rollout.window_size": 2,
    "text.chunk": 8, "checkpoint_every": 1, "keep_checkpoints": 1, "eval.every": 2,
    "eval.prompts": 2, "eval.batch_size": 2, "eval.keep": 1, "eval.modes": ("think",),
    "eval.num_timesteps": 4, "warmup_steps": 0, "schedule": "constant",
  }
  config.update_from_flattened_dict(small | changes)
  return config


def _train(config, workdir):
  return train.train(config, workdir, jax.devices()[:1])


def rows_of(workdir):
  """The metrics without what the clock says."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def saved_in(workdir):
  """(step of the last checkpoint, its state on the host, its record)."""
  saved = runs.read_checkpoints(workdir)
  record = saved.record(saved.latest)
  config = ml_collections.ConfigDict(record["config"])
  config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
  network = runs.open_network(config, jax.devices()[:1])
  abstract, _ = runs.state_layout(
    network, runs.make_optimizer(config), ema=config.ema_decay > 0, reference=True
  )
  return saved.latest, jax.device_get(saved.load(saved.latest, abstract)), record


class _Stop:
  """A signal that comes when the loop has looked `looks` times."""

  def __init__(self, looks):
    self.left = looks

  def is_set(self):
    self.left -= 1
    return self.left < 0


@pytest.fixture(scope="module")
def whole(shallow, tmp_path_factory):
  """(workdir, last state, prompts in their order) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  with _Listening() as prompts:
    state = _train(_config(shallow), workdir)
  return workdir, state, prompts


class _Listening:
  """The prompts of every chunk that is sampled, in order."""

  def __enter__(self):
    prompts, self.sample = [], rollout.Sampler.sample

    def sample(sampler, params, texts, *rest):
      prompts.append(tuple(texts))
      return self.sample(sampler, params, texts, *rest)

    rollout.Sampler.sample = sample
    return prompts

  def __exit__(self, *_):
    rollout.Sampler.sample = self.sample


def test_a_run_says_what_it_did(whole):
  workdir, state, prompts = whole
  rows = rows_of(workdir)
  assert [row["step"] for row in rows] == [0, 1, 2, 3] and len(prompts) == 6
  assert int(state.step) == 6  # two epochs an iteration
  for row in rows[1:]:
    assert 0 < row["reward/mean"] < 1 and row["reward/std"] > 0
    assert 0 < row["drift/text"] < 1e-5 and row["drift/flow"] < 1e-7
    assert row["groups/dropped"] == 0 and row["grad_norm/und"] > 0 < row["grad_norm/gen"]
  # Everything was compiled in the first iteration, and the evaluation before it.
  told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert told[1]["seconds/compile"] > 0 == told[2]["seconds/compile"] == told[3]["seconds/compile"]
  assert [("eval/think/reward" in row) for row in rows] == [True, False, True, True]
  for number in (0, 2, 3):
    results = workdir / "evaluations" / f"{number:06d}" / "results.json"
    assert len(json.loads(results.read_text())["rows"]) == 2


def test_a_checkpoint_is_exported_on_demand(whole, tmp_path, monkeypatch):
  """From the workdir alone, on other devices than it was trained on; the optimizer is not read."""
  workdir, state, _ = whole
  read, load = [], checkpoints.TrainCheckpoints.load

  def listening(self, step, abstract, **options):
    loaded = load(self, step, abstract, **options)
    read.append(sum(leaf.size for leaf in jax.tree.leaves(loaded)))
    return loaded

  monkeypatch.setattr(checkpoints.TrainCheckpoints, "load", listening)
  export.main([str(workdir), str(tmp_path / "out"), "--dtype=float32"])
  assert read == [sum(leaf.size for leaf in jax.tree.leaves(state.params))]
  loaded = folders.open_folder(tmp_path / "out").load_params(parts=("bagel",))["bagel"]
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state.params), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), b)
  with pytest.raises(errors.InputError, match=r"no checkpoint 7; it has \[.*3\]"):
    export.main([str(workdir), str(tmp_path / "out"), "--step=7"])
  with pytest.raises(errors.InputError, match="holds no checkpoints"):
    export.main([str(tmp_path), str(tmp_path / "out")])


def test_the_best_checkpoint_stays(whole):
  """The last one does, and the evaluated one with the highest reward."""
  workdir, _, _ = whole
  rows = {
    row["step"]: row["eval/think/reward"] for row in rows_of(workdir) if row["step"] in (2, 3)
  }
  best = max(rows, key=lambda number: rows[number])
  kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
  assert kept == {3, best}


@pytest.mark.parametrize(
  "looks", [0, 1, 3, 6],
  ids=["before the first evaluation", "while sampling", "in an update", "before an evaluation"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
  shallow, whole, tmp_path, monkeypatch, looks
):
  workdir, want, order = whole
  with _Listening() as prompts:
    with monkeypatch.context() as patch:
      patch.setattr(runs, "stop_on_signal", lambda: contextlib.nullcontext(_Stop(looks)))
      stopped = _train(_config(shallow), tmp_path)
    assert int(stopped.step) < 6
    sampled = len(prompts)
    got = _train(_config(shallow), tmp_path)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)
  assert rows_of(tmp_path) == rows_of(workdir)
  # It takes up the iteration it was stopped in.
  assert prompts[sampled:] == order[int(stopped.step) // 2 * 2 :]


def test_a_signal_ends_an_evaluation_between_two_batches(shallow, tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "stop_on_signal", lambda: contextlib.nullcontext(_Stop(1)))
  state = _train(_config(shallow, **{"eval.batch_size": 1}), tmp_path)
  assert int(state.step) == 0 and not rows_of(tmp_path)
  assert not (tmp_path / "evaluations").exists()
  assert runs.read_checkpoints(tmp_path).latest is None


def test_prompts_are_looked_at_before_the_first_step(shallow, whole, tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="rollout.prompt_tokens=6; raise that or leave"):
    _train(_config(shallow, **{"rollout.prompt_tokens": 6}), tmp_path)
  assert not (tmp_path / "config.json").exists()
  workdir, _, _ = whole
  monkeypatch.setattr(prompts_lib.PromptSet, "fingerprint", lambda self: "0" * 16)
  with pytest.raises(errors.InputError, match="'iconworld' has other prompts than when the run"):
    _train(_config(shallow), workdir)


def test_what_may_change_and_what_not(shallow, whole):
  workdir, _, _ = whole
  for changes, words in (
    ({"group_size": 4, "microbatch": 4}, "config.group_size=4 but the run in the workdir has 2"),
    ({"text.clip_low": 0.1}, "config.text.clip_low=0.1 but the run"),
    ({"learning_rate.text": 1e-5}, "config.learning_rate.text=1e-05 but the run"),
    ({"schedule": "cosine", "steps": 4}, "config.schedule='cosine' but the run"),
  ):
    with pytest.raises(errors.InputError, match=words):
      _train(_config(shallow, **changes), workdir)
  # Advice that a diverged run is given, and a run that is already over.
  before = json.loads(_config(shallow).to_json())
  now = json.loads(_config(shallow, steps=9, **{"learning_rate.und": 1e-7}).to_json())
  resumption.check(before, now, resumption.may_change(before, now, train.RESUMABLE))


def test_a_sampler_that_drifts_moves_nothing(shallow, whole, tmp_path):
  """The state before the step is saved; with another limit it goes on to where it would have."""
  none = {"checkpoint_every": 100, "eval.every": 0}
  with pytest.raises(errors.InputError, match="step 1: drift/text_scaled=.*config.drift.text"):
    _train(_config(shallow, **none, **{"drift.text": 1e-12}), tmp_path)
  saved = runs.read_checkpoints(tmp_path)
  assert saved.latest == 0 and saved.record(0)["prompt_position"] == 0
  state = _train(_config(shallow, **none), tmp_path)
  chex.assert_trees_all_equal(state.params, whole[1].params)


def test_an_evaluation_that_fails_loses_nothing(shallow, tmp_path, monkeypatch):
  config = _config(shallow, checkpoint_every=100, writers=())
  calls = []

  def run(self, params, progress):
    calls.append(params)
    if len(calls) == 2:
      raise errors.InputError("nothing to see")
    return evaluate(self, params, progress)

  evaluate = evaluation.Evaluation.run
  monkeypatch.setattr(evaluation.Evaluation, "run", run)
  with pytest.raises(errors.InputError, match="nothing to see"):
    _train(config, tmp_path)
  # The first evaluation is before the first step, the second after step 2.
  saved = runs.read_checkpoints(tmp_path)
  assert saved.latest == 2 and saved.record(2)["prompt_position"] == 4
  # The log as JSON is there whatever `writers` says.
  assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]
  # And the run that goes on makes it up.
  _train(config, tmp_path)
  assert [("eval/think/reward" in row) for row in rows_of(tmp_path)] == [True, False, True, True]


def test_drift_limits_stop_with_the_key(shallow):
  config = _config(shallow)
  limits = recipe.drift_limits(config, runs.open_network(config, jax.devices()[:1]))
  assert limits["drift/text_scaled"] == 3e-5 and 1e-8 <= limits["drift/flow"] < 1e-7
  pattern = "step 4: drift/text_scaled=0.1.*config.drift.text;?$"
  with pytest.raises(errors.InputError, match=pattern):
    train.check_drift({"drift/text_scaled": 0.1}, limits, 4)
  train.check_drift({"drift/text_scaled": 1e-6, "drift/flow": 1e-9}, limits, 4)


def test_drift_limits_of_bfloat16(shallow):
  """They follow the steps: a mean moves with the velocity by dt (1 + a^2 / 2)."""
  changes = {"dtype": "bfloat16", "drift.text": 0.0, "rollout.window_range": (1, 3)}
  config = _config(shallow, **changes)
  network = runs.open_network(config, jax.devices()[:1])
  limits = recipe.drift_limits(config, network)
  longest = max(-np.diff(flow.time_grid(config.rollout.num_timesteps, config.rollout.shift))[1:3])
  slope = longest * (1 + config.rollout.noise_level**2 / 2)
  assert limits["drift/text_scaled"] == 1.0
  np.testing.assert_allclose(limits["drift/flow"], 5 * 0.02 * slope / 512**0.5, rtol=1e-5)


def test_adapters_without_thinking_are_trained_and_exported(shallow, tmp_path):
  """The export is an official folder with the adapters in its kernels."""
  changes = {
    "steps": 1, "rollout.think": False, "text.train": False, "lora.rank": 2, "eval.every": 0,
    "export_to": str(tmp_path / "out"), "export_dtype": "float32", "learning_rate.und": 0.0,
  }
  state = _train(_config(shallow, **changes), tmp_path / "run")
  assert state.reference is None
  loaded = folders.open_folder(tmp_path / "out").load_params()["bagel"]
  gate = state.params["layers"]["gen"]["mlp"]["gate"]
  change = np.asarray(loaded["layers"]["gen"]["mlp"]["gate"]["kernel"]) - np.asarray(gate["kernel"])
  want = np.einsum("ldr,lrf->ldf", gate["lora_down"], gate["lora_up"]) * 128.0 / 2
  assert np.abs(want).max() > 1e-4
  np.testing.assert_allclose(change, want, atol=1e-6)


@pytest.mark.parametrize(
  "name, broken", [("nft", "rollout"), ("awm", "rollout"), ("fpo", "update")]
)
def test_other_objectives_train_and_what_diverged_is_not_saved(
  shallow, tmp_path, monkeypatch, name, broken
):
  """Neither a policy that the rollout finds broken, nor a state that half an update has moved."""
  changes = {"flow.objective": name, "eval.every": 0, "checkpoint_every": 9, "steps": 2}
  told, sample = [], rollout.Sampler.sample

  def diverging(self, *args):
    if told:
      raise errors.Diverged("the latents are not finite")
    return sample(self, *args)

  def looked(values, number, saved, kept):
    told.append(values)
    if broken == "update":
      assert not kept
      raise errors.InputError("not finite")

  monkeypatch.setattr(rollout.Sampler, "sample", diverging)
  monkeypatch.setattr(runs, "check_finite", looked)
  with pytest.raises(errors.InputError, match="not finite"):
    _train(_config(shallow, **changes), tmp_path)
  assert runs.read_checkpoints(tmp_path).latest is None
  [values] = told
  assert np.isfinite(list(values.values())).all() and values["grad_norm/gen"] > 0
