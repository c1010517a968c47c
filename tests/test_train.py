"""Supervised training end to end, small: stopped and resumed it is the same run, bit for bit."""

import contextlib
import json

import jax
import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, finetune
from unigrpo_jax.recipe import config_files, resuming, sft
from unigrpo_jax.runtime import folders, resumption, stopping
from unigrpo_jax.supervised import feed

SMALL = [
  "steps=4", "sequences_per_step=8", "microbatch=4", "noise_draws=2", "checkpoint_every=2",
  "log_every=1", "limits.images=4", "ema_decay=0.9",
]


def _load(variant, *overrides):
  return config_files.load(f"configs/sft.py:{variant}", [f"--config.{text}" for text in overrides])


def _config(shallow, *overrides):
  config = _load("tiny", *SMALL, *overrides)
  config.init_from, config.random_init = str(shallow), True
  return config


def _train(config, workdir):
  """On one device: eight that share two cores with the feed's thread may starve each other."""
  return finetune.train(config, workdir, jax.devices()[:1])


def _files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_run_equals_an_uninterrupted_one(shallow, tmp_path, monkeypatch):
  """Stopped by a signal after step 1 and resumed: the state, metrics and export of four steps."""
  whole = _train(_config(shallow, f"export_to={tmp_path / 'a'}"), tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(stopping, "stop_on_signal", lambda event, *_: contextlib.nullcontext(event.set()))
    stopped = _train(_config(shallow, f"export_to={tmp_path / 'b'}"), tmp_path / "parts")
  assert int(stopped.step) == 1 and not (tmp_path / "b").exists()
  parts = _train(_config(shallow, f"export_to={tmp_path / 'b'}"), tmp_path / "parts")
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_array_equal(a, b)
  metrics = lambda name: (tmp_path / name / "metrics.jsonl").read_text()
  assert metrics("whole") == metrics("parts") and metrics("whole").count("\n") == 4
  assert _files(tmp_path / "a") == _files(tmp_path / "b")
  loaded = folders.open_folder(tmp_path / "a").load_params()
  average = np.asarray(whole.ema["llm2vae"]["kernel"])
  np.testing.assert_allclose(
    np.asarray(loaded["bagel"]["llm2vae"]["kernel"], np.float32), average, rtol=1e-2, atol=1e-6
  )


def test_a_diverged_state_is_not_saved(shallow, tmp_path):
  """Also where the step that would be saved is not one that is logged."""
  config = _config(shallow, "log_every=9", "learning_rate.gen=1e30", "warmup_steps=0")
  with pytest.raises(errors.InputError, match=r"step 2: .*mse not finite; .*; the run starts anew"):
    _train(config, tmp_path)
  assert _steps(tmp_path) == []


def _break(patch, step):
  """Makes the batch of a step, counted from 0, one that holds a bad example."""
  batch = feed.Feed.batch

  def broken(made, number):
    if number == step:
      raise errors.InputError("shards/a.jsonl, line 3: a sample has 9 labels")
    return batch(made, number)

  patch.setattr(feed.Feed, "batch", broken)


def _steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_a_bad_example_loses_no_step(shallow, tmp_path, monkeypatch):
  """The step before it is saved; mended, the run continues from there as if there had been none."""
  config = _config(shallow, "steps=2", "checkpoint_every=9", "schedule=constant")
  words = "^shards/a.jsonl, line 3: a sample has 9 labels$"
  with monkeypatch.context() as patch, pytest.raises(errors.InputError, match=words):
    _break(patch, step=0)
    _train(config, tmp_path / "parts")
  assert _steps(tmp_path / "parts") == []  # nothing was learnt
  with monkeypatch.context() as patch, pytest.raises(errors.InputError, match=words):
    _break(patch, step=1)
    _train(config, tmp_path / "parts")
  assert _steps(tmp_path / "parts") == [1]
  parts, whole = _train(config, tmp_path / "parts"), _train(config, tmp_path / "whole")
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_bad_example_does_not_save_what_diverged(shallow, tmp_path, monkeypatch):
  config = _config(shallow, "log_every=9", "checkpoint_every=9", "learning_rate.gen=1e30",
                   "warmup_steps=0")
  _break(monkeypatch, step=3)
  with pytest.raises(errors.InputError, match="a sample has 9 labels"):
    _train(config, tmp_path)
  assert _steps(tmp_path) == []


def test_a_place_for_the_export_is_looked_at_first(shallow, tmp_path):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "notes.txt").write_text("")
  with pytest.raises(errors.InputError, match="export_to: target .*mine holds something else"):
    _train(_config(shallow, f"export_to={mine}"), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_the_tiny_variants_start_from_the_embedded_checkpoint():
  for name in ("tiny", "tiny_look"):
    config = _load(name)
    assert (config.init_from, config.random_init) == ("tiny", False)


def test_another_configuration_does_not_resume(shallow, tmp_path):
  _train(_config(shallow, "steps=1"), tmp_path)
  with pytest.raises(errors.InputError, match="config.ce_weight=2.0 but the run"):
    _train(_config(shallow, "steps=1", "ce_weight=2.0"), tmp_path)
  # A cosine schedule depends on the number of steps.
  with pytest.raises(errors.InputError, match="config.steps=2 but the run"):
    _train(_config(shallow, "steps=2"), tmp_path)


@pytest.mark.parametrize("kind", [sft, resuming], ids=["sft", "unigrpo"])
def test_what_every_run_may_change_when_it_resumes(kind):
  """What it logs, saves and exports, where it runs, and how much at once; how long, where no rate
  depends on it.
  """
  mutable = resumption.MUTABLE_KEYS | kind.MUTABLE_KEYS
  before = {"learning_rate": {"und": 1.0}, "schedule": "constant", "seed": 0}
  for key in ("writers", "export_to", "export_dtype", "checkpoint_every", "mesh", "steps",
              "microbatch"):
    old, new = before | {key: 1}, before | {key: 2}
    resumption.check(old, new, resumption.mutable_keys(old, new, mutable), {})
  other = before | {"seed": 1}
  with pytest.raises(errors.InputError, match="config.seed=1 but the run"):
    resumption.check(before, other, resumption.mutable_keys(before, other, mutable), {})


@pytest.mark.slow
def test_another_microbatch_is_the_same_run(shallow, tmp_path):
  """Two steps of two microbatches, two of one: the metrics of four steps, but for rounding."""
  # A large epsilon: an update is then as exact as its gradient, and not the sign of a rounding.
  config = lambda *overrides: _config(
    shallow, "schedule=constant", "warmup_steps=0", "eps=1e-2", *overrides
  )
  whole = _train(config(), tmp_path / "whole")
  first = _train(config("steps=2"), tmp_path / "parts")
  parts = _train(config("microbatch=8", "limits.images=8"), tmp_path / "parts")
  rows = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("whole", "parts")
  ]
  assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
  for a, b in zip(*rows, strict=True):
    assert a.keys() == b.keys() and {"ce", "mse", "grad_norm/und"} <= a.keys()
    assert a == pytest.approx(b, rel=1e-4)
  largest = lambda one, other: max(
    float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)))
  )
  assert largest(whole, parts) < 1e-5 and largest(first, parts) > 1e-3


def test_an_unreadable_image_stops_by_file_and_line(shallow, tmp_path):
  """Of an epoch of eight examples, in steps of four, one is bad: what came before it is saved."""
  shards = tmp_path / "shards"
  shards.mkdir()
  for number in range(8):
    PIL.Image.new("RGB", (32, 32), (30 * number,) * 3).save(shards / f"{number}.png")
  lines = [{"prompt": "a kite", "image": f"{number}.png"} for number in range(8)]
  (shards / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
  order = np.random.default_rng((0, 1, 0)).permutation(8)  # of seed 0 in epoch 0
  bad = order[6]
  (shards / f"{bad}.png").write_bytes(b"")
  config = _config(
    shallow, f"data.folder={shards}", "sequences_per_step=4", "checkpoint_every=9", "log_every=9"
  )
  with pytest.raises(errors.InputError, match=f"a.jsonl, line {bad + 1}: .*{bad}.png: not reada"):
    _train(config, tmp_path / "run")
  assert _steps(tmp_path / "run") == [1]
  # Without that line the run goes on.
  del lines[bad]
  (shards / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
  _train(config, tmp_path / "run")
  assert _steps(tmp_path / "run")[-1] == config.steps


@pytest.mark.parametrize(
  "override, words",
  [
    ("microbatch=3", "sequences_per_step=8 is not a multiple"),
    ("schedule=linear", "schedule='linear'"),
    ("mesh.data=3", "mesh data=3"),
    ("data.wrong_plan_rate=7.0", "config.data.wrong_plan_rate=7.0"),
    ("data.folder=nowhere", "nowhere: no .*jsonl shards"),
    ("log_every=0", "config.log_every=0"),
  ],
)
def test_impossible_configurations_are_refused(shallow, tmp_path, override, words):
  with pytest.raises(errors.InputError, match=words):
    _train(_config(shallow, override), tmp_path)
  assert not list(tmp_path.iterdir())


def test_overrides_of_unknown_keys_are_refused():
  with pytest.raises(errors.InputError, match="stpes"):
    _load("tiny", "stpes=3")
