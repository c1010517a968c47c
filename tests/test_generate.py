"""The command line: all modes, several prompts, and every mistake as one clear line."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from unigrpo_jax import errors, evaluate, generate
from unigrpo_jax.data import progress
from unigrpo_jax.episodes import pipeline
from unigrpo_jax.iconworld import plans
from unigrpo_jax.runtime import folders

ROOT = pathlib.Path(__file__).parents[1]
QUICK = ["--steps=3", "--max_tokens=4", "--temperature=1"]


@pytest.fixture(scope="module")
def picture(golden, tmp_path_factory):
  path = tmp_path_factory.mktemp("picture") / "in.png"
  PIL.Image.fromarray(np.load(golden / "i_edit.npz")["in_pil_image"]).save(path)
  return path


def _run(golden, *args):
  generate.main([f"--checkpoint={golden}", *QUICK, *args])


@pytest.mark.parametrize(
  "flags, image, drawn",
  [
    ([], False, (32, 48)),
    (["--think"], False, (32, 48)),
    ([], True, (48, 64)),
    (["--understand"], True, None),
    (["--understand", "--think"], True, None),
  ],
  ids=["draw", "think", "edit", "understand", "understand_think"],
)
def test_modes(golden, picture, tmp_path, capsys, flags, image, drawn):
  out = tmp_path / ("a.png" if drawn else "a.json")
  flags = flags + ([f"--image={picture}"] if image else [])
  flags += ["--height=32", "--width=48"] if drawn and not image else []
  _run(golden, "--prompt=a red kite", f"--out={out}", "--seed=3", *flags)
  record = json.loads(out.with_suffix(".json").read_text())
  assert record["prompt"] == "a red kite" and record["seed"] == 3
  assert record["settings"]["num_timesteps"] == 3
  phases = {"load", "read"} | ({"denoise", "vae"} if drawn else set())
  assert set(record["seconds"]) == phases | ({"decode"} if record["text"] is not None else set())
  assert (record["text"] is not None) == ("--think" in flags or "--understand" in flags)
  if drawn:
    picture = PIL.Image.open(out)
    assert picture.size == drawn[::-1] and picture.mode == "RGB"
    assert record["size"] == list(drawn)
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"a.json", out.name})
  assert str(out) in capsys.readouterr().out


def test_a_file_of_prompts_is_one_batch_and_repeats_row_by_row(golden, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a red kite\n\n  two birds \n", encoding="utf-8")
  size = ["--height=32", "--width=32"]
  _run(golden, f"--prompts_file={prompts}", f"--out={tmp_path / 'all'}", "--seed=5", *size)
  names = ["00000.json", "00000.png", "00001.json", "00001.png"]
  assert sorted(p.name for p in (tmp_path / "all").iterdir()) == names
  record = json.loads((tmp_path / "all/00001.json").read_text())
  assert (record["prompt"], record["seed"], record["batch"]) == ("two birds", 6, 2)
  _run(golden, "--prompt=two birds", f"--out={tmp_path / 'one.png'}", "--seed=6", *size)
  load = lambda path: np.asarray(PIL.Image.open(path)).astype(int)
  assert np.abs(load(tmp_path / "one.png") - load(tmp_path / "all/00001.png")).max() <= 1


def test_batches_share_their_programs_and_their_bars_begin_anew(
  golden, tmp_path, capsys, monkeypatch, compilations
):
  monkeypatch.setattr(progress, "SECONDS", 0.0)
  prompts, counts, run = tmp_path / "prompts.txt", [], pipeline.Pipeline.run

  def counted(*args):
    compilations.clear()
    results = run(*args)
    counts.append(len(compilations))
    return results

  monkeypatch.setattr(pipeline.Pipeline, "run", counted)
  prompts.write_text("a red kite\n" * 12)
  _run(golden, f"--prompts_file={prompts}", f"--out={tmp_path / 'all'}", "--batch_size=1",
       "--think", "--height=32", "--width=32")
  assert counts[0] > 0 and len(counts) > 1 and not any(counts[1:])
  err = capsys.readouterr().err
  for last in ("decode: 4 of 4 tokens at most", "denoise: 2 of 2 steps"):
    assert err.count(last) >= len(counts)


def test_upscaled_pictures_repeat_every_pixel(golden, tmp_path):
  for scale in (1, 3):
    _run(golden, "--prompt=a", "--height=32", "--width=48", f"--out={tmp_path}/{scale}.png",
         f"--upscale={scale}")
  plain, large = (np.asarray(PIL.Image.open(tmp_path / f"{scale}.png")) for scale in (1, 3))
  np.testing.assert_array_equal(large, np.kron(plain, np.ones((3, 3, 1), np.uint8)))
  assert json.loads((tmp_path / "3.json").read_text())["size"] == [32, 48]


def test_the_embedded_checkpoint_reasons_and_draws(tmp_path):
  """By default, with its own settings."""
  out = tmp_path / "kites.png"
  prompt = "draw half of four kites in the colour of grass"
  generate.main([f"--prompt={prompt}", "--think", f"--out={out}"])
  record = json.loads(out.with_suffix(".json").read_text())
  assert record["checkpoint"] == "tiny" and record["text_finished"]
  assert plans.plan_of(record["text"]) is not None
  defaults = folders.open_folder("tiny").config.generation
  assert record["settings"]["num_timesteps"] == defaults.num_timesteps
  assert record["settings"]["guidance"]["text_scale"] == defaults.cfg_text_scale
  assert PIL.Image.open(out).size == (32, 32)


@pytest.mark.slow
def test_the_embedded_checkpoint_has_learnt(tmp_path):
  """Well above a checkpoint that knows nothing, whose strict score is zero; few prompts."""
  evaluate.main([
    "--prompts=24", "--modes", "think", "think+guidance", "--batch_size=24", "--keep=2",
    f"--out={tmp_path}",
  ])
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  mean = lambda mode, reward: np.mean([r["rewards"][reward] for r in rows if r["mode"] == mode])
  assert mean("think", "reasoning") >= 0.5
  assert mean("think + guidance", "strict") >= 0.25


def _refused(capsys, *args):
  """Status 2 and one line on stderr, which is returned."""
  with pytest.raises(SystemExit) as stop:
    errors.report(lambda: generate.main(list(args)))
  assert stop.value.code == 2
  captured = capsys.readouterr()
  # Before the line there may be lines of progress, and nothing else.
  *progress, line = captured.err.splitlines()
  assert all(text.startswith(("loading ", "loaded ")) for text in progress), progress
  assert line.startswith("error: ") and captured.out == ""
  return line


@pytest.mark.parametrize(
  "args, words",
  [
    (["--prompt="], "--prompt is empty"),
    ([], "--prompt and --prompts_file"),
    (["--prompt=a", "--prompts_file=b"], "--prompt and --prompts_file"),
    (["--prompt=a", "--upscale=0"], "--upscale=0 must be at least 1"),
    (["--prompt=a", "--steps=1"], "--num_timesteps=1 must be at least 2"),
    (["--prompt=a", "--shift=0"], "--shift=0.0 must be more than 0"),
    (["--prompt=a", "--temperature=-1"], "--temperature=-1.0"),
    (["--prompt=a", "--temperature=nan"], "--temperature=nan"),
    (["--prompt=a", "--steps=many"], "--steps"),
    (["--prompt=a", "--cfg_interval", "1", "0"], "LOW < HIGH"),
    (["--prompt=a", "--cfg_renorm=local"], "local"),
    (["--prompt=a", "--image=x.png", "--height=64"], "--height and --width"),
    (["--prompt=a", "--understand", "--upscale=8"], "--upscale has no effect with --understand"),
    (["--prompt=a", "--out=a.jpg"], "a.jpg must end in .png"),
    (["--prompts_file=missing.txt"], "missing.txt"),
    (["--prompt=a", "--image=missing.png"], "missing.png"),
    (["--prompt=a", "--out=/dev/null/a.png"], "/dev/null"),
    (["--prompt=a", "--out=/proc/nowhere/a.png"], "/proc/nowhere"),
    (["--prompt=a", "--out=" + "x" * 300 + ".png"], "cannot be written to"),
    (["--prompt=a", "--shift=1e39"], "--shift=1e+39"),
    (["--prompt=a", "--cfg_text_scale=inf"], "--cfg_text_scale=inf"),
    (["--prompt=a", "--num_timesteps=3", "--height=40"], "height=40"),
    (["--prompt=a", "--steps=3", "--height=256"], "height=256"),
    (["--prompt=" + "a" * 5000, "--steps=3"], "5000 tokens"),
  ],
)
def test_bad_arguments_give_one_line(golden, tmp_path, capsys, monkeypatch, args, words):
  monkeypatch.chdir(tmp_path)
  line = _refused(capsys, f"--checkpoint={golden}", *args)
  assert words in line
  assert list(tmp_path.iterdir()) == []


def test_prompts_must_be_utf8(golden, tmp_path, capsys):
  path = tmp_path / "prompts.txt"
  path.write_bytes(b"fine\n\xff\xfe\n")
  assert "line 2" in _refused(capsys, f"--checkpoint={golden}", f"--prompts_file={path}")
  path = path.with_suffix(".jsonl")
  path.write_text('{"prompt": "fine"}\n{"words": "a kite"}\n')
  assert "line 2: no key" in _refused(capsys, f"--checkpoint={golden}", f"--prompts_file={path}")


@pytest.mark.parametrize("kind", ["text", "truncated", "narrow"])
def test_bad_images_give_one_line(golden, tmp_path, capsys, picture, kind):
  path = tmp_path / "bad.png"
  if kind == "text":
    path.write_text("not an image")
  elif kind == "truncated":
    path.write_bytes(picture.read_bytes()[:200])
  else:
    PIL.Image.new("RGB", (1, 9000)).save(path)
  line = _refused(
    capsys, f"--checkpoint={golden}", "--prompt=a", f"--image={path}", f"--out={tmp_path}/o.png"
  )
  assert str(path) in line and [p.name for p in tmp_path.iterdir()] == ["bad.png"]


@pytest.fixture
def folder(golden, tmp_path):
  """A copy of the recorded checkpoint, to damage."""
  target = tmp_path / "bagel"
  target.mkdir()
  for path in golden.iterdir():
    if path.suffix in (".json", ".safetensors"):
      shutil.copy(path, target)
  return target


def _rewrite(folder, change):
  path = folder / "ema.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def _reconfigure(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAME = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"


@pytest.mark.parametrize(
  "damage, words",
  [
    (lambda f: (f / "ema.safetensors").write_bytes((f / "ema.safetensors").read_bytes()[:9999]),
     ["ema.safetensors"]),
    (lambda f: _rewrite(f, lambda t: t.pop(NAME)), [NAME, "missing", "[64, 64]"]),
    (lambda f: _rewrite(f, lambda t: t.update({NAME: t[NAME][:32]})), [NAME, "[32, 64]"]),
    (lambda f: _rewrite(f, lambda t: t.update(stranger=t[NAME])), ["stranger"]),
    (lambda f: _reconfigure(f / "llm_config.json", num_hidden_layers=3), ["llm_config.json"]),
    (lambda f: _reconfigure(f / "llm_config.json", intermediate_size=128), ["llm_config.json"]),
    (lambda f: _reconfigure(f / "vit_config.json", hidden_size=64), ["vit_config.json"]),
    (lambda f: _reconfigure(f / "llm_config.json", hidden_size="64"), ["hidden_size='64'"]),
    (lambda f: (f / "llm_config.json").write_text("{"), ["llm_config.json", "JSON"]),
    (lambda f: (f / "ae.safetensors").unlink(), ["ae.safetensors"]),
    (lambda f: _rewrite(f, lambda t: t["llm2vae.weight"].fill(np.nan)), ["not finite", "prompt 1"]),
    (lambda f: (f / "bagel_config.json").unlink(), ["tokenizer"]),
    (lambda f: shutil.rmtree(f), ["no such folder"]),
  ],
  ids=["truncated", "missing", "shape", "surplus", "layers", "ffn", "vit", "type", "json", "no_vae",
       "nan", "no_tokenizer", "no_folder"],
)
def test_bad_checkpoints_give_one_line(folder, tmp_path, capsys, damage, words):
  damage(folder)
  line = _refused(
    capsys, f"--checkpoint={folder}", "--prompt=a", "--steps=3", f"--out={tmp_path / 'o.png'}"
  )
  assert all(word in line for word in words), line
  assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("name", ["a.png", "a.json"])
def test_an_output_that_is_a_folder_is_refused_before_anything_runs(
  golden, tmp_path, capsys, name
):
  (tmp_path / name).mkdir()
  line = _refused(
    capsys, f"--checkpoint={golden}", "--prompt=a", f"--out={tmp_path / 'a.png'}"
  )
  assert f"{name} is a folder" in line
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_as_a_program(golden):
  """The real exit status and streams, once."""
  command = [sys.executable, "-m", "unigrpo_jax.generate", f"--checkpoint={golden}"]
  run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
  bad = run([*command, "--prompt="])
  assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stdout == ""
  usage = run([*command, "--help"])
  assert usage.returncode == 0 and "--understand" in usage.stdout and "examples:" in usage.stdout
