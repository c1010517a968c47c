"""UniGRPO end to end, small: stopped and resumed it is the same run, bit for bit."""

import contextlib
import dataclasses
import itertools
import json
import shutil

import chex
import jax
import ml_collections
import numpy as np
import pytest

from tests import toy_run
from unigrpo_jax import errors, export, train
from unigrpo_jax.algorithms import update
from unigrpo_jax.benchmarks import evaluation
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import rollout
from unigrpo_jax.recipe import config_files, parts, rl
from unigrpo_jax.runtime import checkpoints, folders, hosts, resumption, state
from unigrpo_jax.sampling import flow

VOLATILE = ("seconds/", "share/", "trajectories_per_second")


def _config(shallow, **changes):
  config = config_files.load("configs/unigrpo.py:tiny")
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
  saved = _checkpoints(workdir)
  record = saved.record(saved.latest)
  spec = rl.read(ml_collections.ConfigDict(record["config"]))
  one = dataclasses.replace(spec.network, mesh={"data": 1, "fsdp": 1, "tensor": 1})
  layout = state.layout(
    state.open_network(one, jax.devices()[:1]), spec.optimizer.make(),
    ema=spec.optimizer.ema_decay is not None, reference=spec.copies_reference,
  )
  return saved.latest, jax.device_get(saved.load(saved.latest, layout.abstract)), record


def _checkpoints(workdir):
  return checkpoints.TrainCheckpoints(workdir / "checkpoints", keep=None, clean=False)


def _stop_after(patch, looks):
  """A signal that comes when the hosts have agreed so often that there is none."""
  count = itertools.count()
  look = lambda flag: flag or next(count) >= looks
  patch.setattr(hosts, "any_host", look)
  patch.setattr(hosts.AgreedFlag, "read", lambda self: look(False))


@pytest.fixture(scope="module")
def whole(shallow, tmp_path_factory):
  """(workdir, last state, prompts in their order) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  with _Listening() as prompts:
    last = _train(_config(shallow), workdir)
  return workdir, last, prompts


class _Listening:
  """The prompts of every chunk that is sampled, in order."""

  def __enter__(self):
    chunks, self.sample = [], rollout.Rollout.sample

    def sample(sampler, params, prompts, *rest):
      chunks.append(tuple(prompt.prompt for prompt in prompts))
      return self.sample(sampler, params, prompts, *rest)

    rollout.Rollout.sample = sample
    return chunks

  def __exit__(self, *_):
    rollout.Rollout.sample = self.sample


def test_what_a_run_logs(whole):
  """A row a step, and after it one of its evaluation; what compiled, and when."""
  workdir, last, prompts = whole
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  evaluations = [row for row in rows if "seconds/evaluate" in row]
  steps = [row for row in rows if row not in evaluations]
  assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3] and len(prompts) == 6
  assert [row["step"] for row in steps] == [1, 2, 3]
  assert int(last.step) == 6  # two epochs an iteration
  for row in steps:
    assert 0 < row["reward/mean"] < 1 and row["reward/std"] > 0
    assert 0 < row["drift/text_mean"] <= row["drift/text_p99"] <= row["drift/text"] < 1e-5
    assert 0 < row["drift/flow_mean"] <= row["drift/flow_p99"] <= row["drift/flow"] < 1e-7
    assert row["groups/dropped"] == 0 and row["grad_norm/und"] > 0 < row["grad_norm/gen"]
  # Everything was compiled in the first iteration, and the evaluation before it.
  assert steps[0]["seconds/compile"] > 0
  assert steps[1]["seconds/compile"] == steps[2]["seconds/compile"] == 0
  for row in evaluations:
    assert 0 < row["eval/think/reward"] < 1 and row["eval/think/brightness"] > 0
    results = workdir / "evaluations" / f"{row['step']:06d}" / "results.json"
    assert len(json.loads(results.read_text())["rows"]) == 2


def test_a_checkpoint_is_exported_on_demand(whole, shallow, tmp_path, monkeypatch):
  """On other devices than it was trained on, after what it began with moved; not the optimizer."""
  workdir, last, _ = whole
  read, load = [], checkpoints.TrainCheckpoints.load

  def listening(self, step, abstract, **options):
    loaded = load(self, step, abstract, **options)
    read.append(sum(leaf.size for leaf in jax.tree.leaves(loaded)))
    return loaded

  monkeypatch.setattr(checkpoints.TrainCheckpoints, "load", listening)
  shutil.copytree(shallow, tmp_path / "moved")
  out = str(tmp_path / "out")
  export.main([str(workdir), out, "--dtype=float32", f"--init_from={tmp_path / 'moved'}"])
  assert read == [sum(leaf.size for leaf in jax.tree.leaves(last.params))]
  loaded = folders.open_folder(tmp_path / "out").load_params(parts=("bagel",))["bagel"]
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(last.params), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), b)
  with pytest.raises(errors.InputError, match=r"no checkpoint 7; it has \[.*3\]"):
    export.main([str(workdir), str(tmp_path / "out"), "--step=7"])
  with pytest.raises(errors.InputError, match="give --init_from.*: .*tiny_bagel is another model"):
    export.main([str(workdir), out, "--overwrite", "--init_from=tiny"])
  with pytest.raises(errors.InputError, match="holds no checkpoints"):
    export.main([str(tmp_path), str(tmp_path / "out")])


def test_the_best_checkpoint_stays(whole):
  """The last one does, and the evaluated one with the highest reward."""
  workdir, _, _ = whole
  rows = {
    row["step"]: row["eval/think/reward"] for row in rows_of(workdir)
    if "eval/think/reward" in row and row["step"]  # that before the first step has no checkpoint
  }
  best = max(rows, key=lambda number: rows[number])
  kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
  assert kept == {3, best}


# tests/test_run.py stops a run at every place.
@pytest.mark.parametrize("looks", [
  pytest.param(0, id="before the first evaluation", marks=pytest.mark.slow),
  pytest.param(1, id="while sampling"),
  pytest.param(3, id="in an update", marks=pytest.mark.slow),
  pytest.param(6, id="before an evaluation", marks=pytest.mark.slow),
])
def test_an_interrupted_run_equals_an_uninterrupted_one(
  shallow, whole, tmp_path, monkeypatch, looks
):
  workdir, want, order = whole
  with _Listening() as prompts:
    with monkeypatch.context() as patch:
      _stop_after(patch, looks)
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
  _stop_after(monkeypatch, 1)
  last = _train(_config(shallow, **{"eval.batch_size": 1}), tmp_path)
  assert int(last.step) == 0 and not rows_of(tmp_path)
  assert not (tmp_path / "evaluations").exists()
  assert _checkpoints(tmp_path).latest is None


def test_prompts_are_looked_at_before_the_first_step(shallow, whole, tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="rollout.prompt_tokens=6; raise that or leave"):
    _train(_config(shallow, **{"rollout.prompt_tokens": 6}), tmp_path)
  assert not (tmp_path / "config.json").exists()
  workdir, _, _ = whole
  monkeypatch.setattr(prompts_lib.PromptSet, "fingerprint", lambda self: "0" * 16)
  with pytest.raises(errors.InputError, match="^config.prompts reads other contents than when the"):
    _train(_config(shallow), workdir)


@pytest.mark.parametrize("changes, words", [
  ({"group_size": 4, "microbatch": 4}, "config.group_size=4 but the run in the workdir has 2"),
  ({"text.clip_low": 0.1}, "config.text.clip_low=0.1 but the run"),
  ({"learning_rate.text": 1e-5}, "config.learning_rate.text=1e-05 but the run"),
  ({"schedule": "cosine", "steps": 4}, "config.schedule='cosine' but the run"),
])
def test_what_a_resumed_run_may_not_change(shallow, changes, words):
  before, now = (rl.read(_config(shallow, **c)).run for c in ({}, changes))
  keys = resumption.mutable_keys(before.config, now.config, now.mutable_keys)
  with pytest.raises(errors.InputError, match=words):
    resumption.check(before.config, now.config, keys, now.defaults)


def test_a_mesh_of_all_devices_keeps_the_ways_that_say_what_is_learnt(shallow, tmp_path):
  """The config is the same on another number of devices, but not who shares an optimizer step."""
  def begin(count, workdir, **changes):
    network = toy_run.make_network("a/folder", jax.devices()[:count])
    spec = rl.read(_config(shallow, **changes))
    toy_run.train(
      network, workdir, dataclasses.replace(spec.run, evaluate_every=0), size=3, evaluate=None,
      in_step=lambda step: None, metrics=lambda step, by: {}, pinned=parts.pinned(spec, network),
    )

  halves = {"minibatches": 2, "old_values": "recomputed"}
  for number, changes in enumerate((halves, {"rollout.window": "per_rank_const"}, {})):
    begin(1, tmp_path / str(number), **changes)
    begin(1, tmp_path / str(number), **changes)
    with pytest.raises(errors.InputError, match=(
      "^config.mesh has 2 data x fsdp ways on these devices but had 1 data x fsdp ways when"
    )) if changes else contextlib.nullcontext():
      begin(2, tmp_path / str(number), **changes)


def test_what_a_resumed_run_may_change(shallow, whole):
  """What concerns evaluation, speed and memory; the run is complete, so nothing more is done."""
  workdir, last, _ = whole
  before = rows_of(workdir)
  resumed = _train(_config(shallow, **{
    "learning_rate.und": 1e-7, "eval.batch_size": 1, "drift.text": 0.5, "microbatch": 4,
    "rollout.prompts_at_once": 2, "rollout.layout": "update", "text.chunk": 4, "remat": "full",
    "reward.threads": 1, "reward.max_failed_fraction": 0.1, "writers": (), "checkpoint_every": 7,
  }), workdir)
  chex.assert_trees_all_equal(resumed.params, last.params)
  assert rows_of(workdir) == before
  with pytest.raises(errors.InputError, match="config.text.clip_low=0.1 but the run"):
    _train(_config(shallow, **{"text.clip_low": 0.1}), workdir)


@pytest.mark.slow
def test_a_run_from_before_a_key_resumes(shallow, whole, monkeypatch):
  """Where the key has the value of what such a run did."""
  workdir, last, _ = whole
  record = checkpoints.TrainCheckpoints.record

  def older(self, step):
    kept = record(self, step)
    for key in rl.DEFAULTS:
      section, _, name = key.rpartition(".")
      del (kept["config"][section] if section else kept["config"])[name]
    return kept

  monkeypatch.setattr(checkpoints.TrainCheckpoints, "record", older)
  chex.assert_trees_all_equal(_train(_config(shallow), workdir).params, last.params)
  with pytest.raises(errors.InputError, match="config.text.ratio='sequence' but the .* 'token'"):
    _train(_config(shallow, **{"text.ratio": "sequence"}), workdir)
  # The same of a config file that lacks them.
  config = _config(shallow)
  with config.unlocked():
    for key in rl.DEFAULTS:
      section, _, name = key.rpartition(".")
      node = config[section] if section else config
      if name in node:
        del node[name]
  chex.assert_trees_all_equal(_train(config, workdir).params, last.params)


@pytest.mark.slow
def test_a_sampler_that_drifts_moves_nothing(shallow, whole, tmp_path):
  """The state before the step is saved; with another limit it continues as it would have."""
  none = {"checkpoint_every": 100, "eval.every": 0}
  pattern = "^step 1: drift/text_scaled_p99=.*config.drift.text; the state before it is saved$"
  with pytest.raises(errors.InputError, match=pattern):
    _train(_config(shallow, **none, **{"drift.text": 1e-12}), tmp_path)
  saved = _checkpoints(tmp_path)
  assert saved.latest == 0 and saved.record(0)["prompt_position"] == 0
  last = _train(_config(shallow, **none), tmp_path)
  chex.assert_trees_all_equal(last.params, whole[1].params)


@pytest.mark.slow  # tests/test_run.py has an evaluation that fails, of a toy
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
  saved = _checkpoints(tmp_path)
  assert saved.latest == 2 and saved.record(2)["prompt_position"] == 4
  # The log as JSON is there whatever `writers` says.
  assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]
  # And the run that continues makes it up.
  _train(config, tmp_path)
  rows = rows_of(tmp_path)
  assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
  assert ["eval/think/reward" in row for row in rows] == [True, False, False, True, False, True]


def test_drift_limits_of_float32(shallow):
  """Three times what was measured; for D = 512 latent elements."""
  spec = rl.read(_config(shallow))
  limits = parts.drift_limits(spec, state.open_network(spec.network, jax.devices()[:1]))
  assert limits == {
    "drift/text_scaled_p99": pytest.approx(3 * 1.2e-6),
    "drift/flow_p99": pytest.approx(3 * 2.58 * 8.2e-8 / 512**0.5),
  }


def test_drift_limits_of_bfloat16(shallow):
  """They follow the steps: a mean moves with the velocity by dt (1 + a^2 / 2)."""
  changes = {"dtype": "bfloat16", "rollout.window_range": (1, 3)}
  spec = rl.read(_config(shallow, **changes))
  limits = parts.drift_limits(spec, state.open_network(spec.network, jax.devices()[:1]))
  settings = spec.rollout.settings
  longest = max(-np.diff(flow.time_grid(settings.num_timesteps, settings.shift))[1:3])
  slope = longest * (1 + spec.rollout.sde.noise_level**2 / 2)
  assert limits["drift/text_scaled_p99"] == pytest.approx(3 * 5.7e-3)
  np.testing.assert_allclose(
    limits["drift/flow_p99"], 3 * 2.58 * 8.5e-3 * slope / 512**0.5, rtol=1e-5
  )


def test_adapters_without_thinking_are_trained_and_exported(shallow, tmp_path):
  """Merged into an official folder, or as adapters that another run starts from."""
  changes = {
    "steps": 1, "rollout.think": False, "text.train": False, "lora.rank": 2, "eval.every": 0,
    "export_to": str(tmp_path / "out"), "export_dtype": "float32", "learning_rate.und": 0.0,
  }
  last = _train(_config(shallow, **changes), tmp_path / "run")
  assert last.reference is None
  loaded = folders.open_folder(tmp_path / "out").load_params()["bagel"]
  gate = last.params["layers"]["gen"]["mlp"]["gate"]
  change = np.asarray(loaded["layers"]["gen"]["mlp"]["gate"]["kernel"]) - np.asarray(gate["kernel"])
  want = np.einsum("ldr,lrf->ldf", gate["lora_down"], gate["lora_up"]) * 128.0 / 2
  assert np.abs(want).max() > 1e-4
  np.testing.assert_allclose(change, want, atol=1e-6)

  # By themselves, for PEFT; and another run starts from them.
  export.main([str(tmp_path / "run"), str(tmp_path / "adapters"), "--adapter"])
  again = {"lora.rank": 0, "lora.adapter": str(tmp_path / "adapters")}
  spec = rl.read(_config(shallow, **changes | again))
  network = state.open_network(spec.network, jax.devices()[:1])
  optimizer = spec.optimizer.make()
  where = state.layout(network, optimizer, ema=False, reference=spec.copies_reference)
  first = state.first_state(
    network, optimizer, where, random_init=False, seed=0, adapter=spec.network.adapter
  )
  chex.assert_trees_all_equal(first.params, last.params)
  chex.assert_trees_all_equal(first.reference, last.params)  # its policy before the first step


def test_a_run_in_bfloat16(shallow, tmp_path):
  """On the backend that cannot multiply all pairs of bfloat16 arrays."""
  _train(_config(shallow, steps=1, dtype="bfloat16", **{"eval.every": 0}), tmp_path)
  [row] = rows_of(tmp_path)
  assert row["grad_norm/und"] > 0 and row["grad_norm/gen"] > 0 and row["drift/text"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, broken", [("nft", "rollout"), ("awm", "rollout"), ("fpo", "update")]
)
def test_other_objectives_train_and_what_diverged_is_not_saved(
  shallow, tmp_path, monkeypatch, name, broken
):
  """Neither a policy that the rollout finds broken, nor a state that half an update has moved."""
  changes = {"flow.objective": name, "eval.every": 0, "checkpoint_every": 9, "steps": 2}
  updates, sample, call = [], rollout.Rollout.sample, update.Update.__call__

  def diverging(self, *args):
    if updates and broken == "rollout":
      raise errors.Diverged("the latents are not finite")
    return sample(self, *args)

  def listening(self, *args):
    moved, metrics = call(self, *args)
    updates.append(metrics)
    if broken == "update":
      raise errors.UpdateRejected("loss/flow not finite")
    return moved, metrics

  monkeypatch.setattr(rollout.Rollout, "sample", diverging)
  monkeypatch.setattr(update.Update, "__call__", listening)
  with pytest.raises(errors.InputError, match="not finite") as error:
    _train(_config(shallow, **changes), tmp_path)
  if broken == "update":
    assert str(error.value) == "step 1: loss/flow not finite; the run starts anew"
  assert _checkpoints(tmp_path).latest is None
  [metrics] = updates
  assert np.isfinite(list(metrics.values())).all() and metrics["grad_norm/gen"] > 0
