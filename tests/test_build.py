"""The build of the tiny checkpoint: interrupted in each stage, it ends in the same bytes."""

import json

import jax
import pytest

from tests.refusals import refusal
from unigrpo_jax.runtime import folders
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.tools import build

SMALL = [
  "--config.steps=3", "--config.sequences_per_step=4", "--config.microbatch=4",
  "--config.noise_draws=1", "--config.checkpoint_every=1", "--config.log_every=1",
  "--config.limits.images=4", "--config.ema_decay=0.9",
]


def _build(folder, out):
  build.build(
    folder, out, seed=3, vae_steps=5, vae_rows=2, vae_checkpoint_every=2, overrides=SMALL,
    devices=jax.devices()[:1],
  )


def _files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_build_interrupted_in_each_stage_makes_the_same_files(tmp_path, monkeypatch):
  _build(tmp_path / "once", tmp_path / "a")

  parts, out, seen = tmp_path / "parts", tmp_path / "b", []
  with monkeypatch.context() as patch:
    pictures = build.pictures

    def interrupted(seed, step, count):
      seen.append(step)
      if step == 3:
        raise KeyboardInterrupt
      return pictures(seed, step, count)

    patch.setattr(build, "pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
      _build(parts, out)
  assert seen == [0, 1, 2, 3] and not (parts / "base").exists()

  with monkeypatch.context() as patch:
    def counted(seed, step, count):
      seen.append(step)
      return pictures(seed, step, count)

    commit = run_lib.Run.commit

    def stopping(run, *args):
      commit(run, *args)
      if run.step == 2:
        run.request_stop()

    patch.setattr(build, "pictures", counted)
    patch.setattr(run_lib.Run, "commit", stopping)
    _build(parts, out)
  # The autoencoder resumed from its checkpoint of step 2; the last call measures its latents.
  assert seen == [0, 1, 2, 3, 2, 3, 4, 5] and (parts / "base").exists() and not out.exists()
  steps = [json.loads(line)["step"] for line in (parts / "sft/metrics.jsonl").open()]
  assert steps == [1, 2]

  monkeypatch.setattr(build, "train_vae", None)  # It is made already.
  _build(parts, out)
  assert _files(parts / "base") == _files(tmp_path / "once/base")
  assert _files(out) == _files(tmp_path / "a")
  assert {"ae.safetensors", "ema.safetensors", "bagel_config.json", "tokenizer.json"} <= set(
    _files(out)
  )
  assert folders.open_folder(out).config.generation.max_tokens == build.GENERATION["max_tokens"]
  assert sum(leaf.size for leaf in jax.tree.leaves(folders.open_folder(out).load_params())) <= 8e6


@pytest.mark.parametrize(
  "args, words",
  [
    (["--seed=-1"], "--seed=-1 must be at least 0"),
    (["--vae_steps=0"], "--vae_steps=0 must be at least 1"),
    (["--config.stepz=1"], "stepz"),
    (["--config.microbatch=7"], "config.sequences_per_step=48 is not a multiple of config.microb"),
    (["--config.seed=7"], "--config.seed=7: the stages set config.seed themselves; leave it out"),
    (["--config.export_to=x"], "the stages set config.export_to themselves"),
    (["--set", "steps=3"], "Unknown command line flag 'set'"),
    (["--workdir=w2", "--out=there"], "there exists already; choose another folder"),
    (["--out=file/o"], "--out: target "),
    (["--out=w/look"], "overlaps its source"),
    (["--out=other"], "other but the build in"),
    (["--workdir=file"], "--workdir="),
    (["--seed=1"], "--seed=1 but the build in"),
    (["--vae_rows=8"], "--vae_rows=8 but the build in"),
    (["--config.steps=3"], "--config=['--config.steps=3'] but the build in"),
    (["--workdir=damaged"], "damaged/build.json: not readable as JSON"),
  ],
)
def test_mistakes_give_one_line_before_anything_is_trained(tmp_path, monkeypatch, args, words):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(build, "make_base", lambda *_, **__: (tmp_path / "w/first").mkdir())
  monkeypatch.setattr(build.finetune, "train", lambda *_: None)
  build.main(["--workdir=w", "--out=o"])
  monkeypatch.setattr(build, "make_base", None)
  (tmp_path / "there").mkdir()
  (tmp_path / "file").write_text("")
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged/build.json").write_text('{"x')
  before = sorted(tmp_path.rglob("*"))
  assert words in refusal(build.main, ["--workdir=w", "--out=o", *args])
  assert sorted(tmp_path.rglob("*")) == before


def test_the_config_may_change_until_the_supervised_training_begins(tmp_path, monkeypatch):
  """What only its devices refuse must not cost the autoencoder again."""
  seen = []
  monkeypatch.setattr(build, "make_base", lambda *_, **__: None)
  monkeypatch.setattr(build.finetune, "train", lambda config, *_: seen.append(config.microbatch))
  place = [f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'o'}"]
  build.main([*place, "--config.microbatch=6"])
  build.main([*place, "--config.microbatch=8"])
  (tmp_path / "w/sft").mkdir()
  assert "--config=['--config.microbatch=6'] but" in refusal(
    build.main, [*place, "--config.microbatch=6"])
  assert seen == [6, 8]


def test_a_build_resumes_under_another_spelling_of_its_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  seen = []
  made = lambda folder, **_: (folder / "first").mkdir(exist_ok=True)
  monkeypatch.setattr(build, "make_base", made)
  monkeypatch.setattr(build.finetune, "train", lambda config, *_: seen.append(config.init_from))
  for workdir in ("w", str(tmp_path / "w"), "../" + tmp_path.name + "/w"):
    build.main([f"--workdir={workdir}", "--out=o"])
  assert seen == [str(tmp_path / "w/first")] * 3
