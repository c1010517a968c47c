"""The rewards of zoo/, with stand-ins for PyTorch and for their packages; see its README.md."""

import ast
import contextlib
import importlib
import pathlib
import re
import sys
import types

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, rewards
from zoo import base

ROOT = pathlib.Path(__file__).parents[1]
ZOO = ROOT / "zoo"
CLASSES = {
  "pickscore": "PickScore", "clip": "ClipScore", "aesthetic": "Aesthetic", "hpsv2": "HPSv2",
  "hpsv3": "HPSv3", "imagereward": "ImageReward", "deqa": "DeQA",
}


@pytest.mark.parametrize("path", sorted(ZOO.glob("*.py")), ids=lambda path: path.name)
def test_a_file_needs_the_package_for_rewards_alone(path):
  for node in ast.walk(ast.parse(path.read_text())):
    names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
    module = getattr(node, "module", None)
    for name in [f"{module}.{name}" if module else name for name in names]:
      assert name.split(".")[0] not in ("jax", "flax", "pickle")
      if name.startswith("unigrpo_jax"):
        assert name.split(".")[1] in ("rewards", "errors", "geneval"), name
  assert "trust_remote_code=True" not in path.read_text()


@pytest.mark.parametrize("path", sorted(ZOO.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_requirements_are_pinned(path):
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  assert lines and all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), lines


@pytest.mark.parametrize("name", CLASSES)
def test_without_its_packages_a_reward_is_one_line(name, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
  with pytest.raises(errors.InputError) as error:
    rewards.make(f"zoo.{name}:{CLASSES[name]}")
  assert f"pip install -r zoo/requirements-{name}.txt" in str(error.value)
  assert "\n" not in str(error.value)
  assert (ZOO / f"requirements-{name}.txt").is_file()
  launch = (ROOT / "launch" / "rewards.sh").read_text()
  assert f"{name}) class={name}:{CLASSES[name]} ;;" in launch


class Tensor(np.ndarray):
  """What a stand-in returns in place of a PyTorch tensor."""

  def float(self):
    return self

  cpu = float


@pytest.fixture
def torch(monkeypatch):
  """A stand-in for PyTorch that is there, without a GPU."""
  made = types.ModuleType("torch")
  made.float32, made.float16, made.bfloat16 = "float32", "float16", "bfloat16"
  made.cuda = types.SimpleNamespace(is_available=lambda: False)
  made.inference_mode = contextlib.nullcontext
  monkeypatch.setitem(sys.modules, "torch", made)
  return made


def module(monkeypatch, name, **members):
  """A stand-in for a module, and for the packages that it is in."""
  for end in [i for i, c in enumerate(name) if c == "."]:
    monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
  made = types.ModuleType(name)
  vars(made).update(members)
  monkeypatch.setitem(sys.modules, name, made)


class Fake(base.Reward):
  """The mean of a picture's pixels; a prompt may fail."""

  release = base.Release("fake", "a/b", "1 GB", "MIT", ("*",))

  def __init__(self, weights, batch_size=2, dtype="float32", **options):
    super().__init__(
      weights=weights, device="", dtype=dtype, batch_size=batch_size, revision="", **options
    )

  def score(self, images, prompts):
    if "fail" in prompts:
      raise MemoryError("too large")
    return [np.asarray(image).mean() for image in images]


def sample(value, prompt="a"):
  return rewards.Sample(prompt, np.full((4, 5, 3), value, np.uint8))


def test_a_batch_that_fails_is_nan_with_its_reason(torch, tmp_path, capsys):
  reward = Fake(str(tmp_path), scale="pixels")
  reward.report()
  said = capsys.readouterr().out
  assert "red 85.0000, blue 85.0000" in said and "revision local" in said and str(tmp_path) in said
  scores = rewards.evaluate(reward, [sample(1), sample(2), sample(3, "fail"), sample(4), sample(5)])
  np.testing.assert_array_equal(scores.values, [1, 2, np.nan, np.nan, 5])
  assert "too large" in scores.reason
  assert reward.settings == {
    "model": str(tmp_path), "revision": "local", "dtype": "float32", "scale": "pixels"
  }


@pytest.mark.parametrize("options, expected", [
  ({"weights": "./none"}, "no such folder; give one, or a repository of the"),
  ({"weights": "none"}, "(1 GB, MIT)"), ({"dtype": "int8"}, "dtype='int8' is none of"),
  ({"batch_size": 0}, "batch_size=0 must be at least 1"),
])
def test_options_that_are_wrong_are_refused(torch, tmp_path, options, expected):
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    Fake(**{"weights": str(tmp_path)} | options)


def test_a_repository_is_downloaded_after_a_line(torch, tmp_path, monkeypatch, capsys):
  asked = []

  def snapshot_download(name, **options):
    asked.append((name, options))
    return str(tmp_path / "abc123")

  module(monkeypatch, "huggingface_hub", snapshot_download=snapshot_download)
  reward = Fake("c/d")
  assert asked == [("c/d", {"revision": None, "allow_patterns": ["*"]})]
  assert reward.settings["revision"] == "abc123"
  assert "c/d of the Hugging Face hub (1 GB, MIT)" in capsys.readouterr().out
  module(monkeypatch, "huggingface_hub", snapshot_download=lambda *_, **__: 1 / 0)
  with pytest.raises(errors.InputError, match="cannot be had from the hub.*hf download c/d"):
    Fake("c/d")


def test_weights_of_another_network_are_refused():
  base.refuse_other_weights("x", ["text.position_ids"], [])
  with pytest.raises(errors.InputError, match="1 missing .a.; 2 unexpected .b, c."):
    base.refuse_other_weights("x", ["a"], ["b", "c", "vision.position_ids"])


@pytest.fixture
def weights(tmp_path):
  for name in ("HPSv3.safetensors", "ImageReward.pt", "med_config.json"):
    (tmp_path / name).write_bytes(b"")
  return str(tmp_path)


class Hpsv3Model:
  use_special_tokens = True

  def __init__(self, **options):
    self.options = options

  def reward(self, image_paths, prompts):
    assert all(isinstance(image, PIL.Image.Image) for image in image_paths)
    means = [np.asarray(image).mean() for image in image_paths]
    return np.array([[m, 9.0] for m in means]).view(Tensor)


def test_hpsv3_is_the_mean_and_needs_its_special_tokens(torch, weights, monkeypatch):
  module(monkeypatch, "hpsv3.inference", HPSv3RewardInferencer=Hpsv3Model)
  reward = rewards.make("zoo.hpsv3:HPSv3", weights=weights)
  assert reward.batch_size == 4
  assert rewards.evaluate(reward, [sample(1), sample(7)]).values.tolist() == [1, 7]
  path = f"{weights}/HPSv3.safetensors"
  assert reward._model.options == {"checkpoint_path": path, "device": "cpu"}
  monkeypatch.setattr(Hpsv3Model, "use_special_tokens", False)
  with pytest.raises(errors.InputError, match="use_special_tokens: true"):
    rewards.make("zoo.hpsv3:HPSv3", weights=weights)


def test_deqa_runs_the_code_of_a_clone_alone(torch, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", list(sys.path))
  with pytest.raises(errors.InputError, match="git clone https://github.com/zhiyuanyou/DeQA-Score"):
    rewards.make("zoo.deqa:DeQA", weights=str(tmp_path))
  (tmp_path / "src/evaluate").mkdir(parents=True)
  (tmp_path / "src/evaluate/scorer.py").write_text("")
  levels = lambda **_: lambda images: np.array([4.0] * len(images)).view(Tensor)
  module(monkeypatch, "src.evaluate.scorer", Scorer=levels)
  reward = rewards.make("zoo.deqa:DeQA", weights=str(tmp_path), code=str(tmp_path))
  np.testing.assert_allclose(rewards.evaluate(reward, [sample(1)]).values, [0.8])


def test_imagereward_says_that_a_prompt_is_cut(caplog):
  cut = importlib.import_module("zoo.imagereward").ImageReward._warn
  reward = types.SimpleNamespace(_warned=False)
  tokenizer = lambda prompt: types.SimpleNamespace(input_ids=prompt.split())
  cut(reward, tokenizer, ["w " * 35])
  assert not caplog.records
  cut(reward, tokenizer, ["w " * 36])
  cut(reward, tokenizer, ["w " * 40])
  [record] = caplog.records
  assert "first 35 tokens" in record.message and "has 36" in record.message


def test_the_selftest_has_its_recordings(tmp_path, monkeypatch):
  from zoo import selftest

  assert len(list(selftest.GOLDEN.glob("tiny_clip_*/recorded.npz"))) == 2
  monkeypatch.setattr(selftest, "GOLDEN", tmp_path)
  monkeypatch.setattr("sys.argv", ["selftest"])
  with pytest.raises(errors.InputError, match="holds no tiny_clip"):
    selftest.main()


def test_the_selftest_passes(capsys):
  """Where PyTorch is installed; the rest of this file stands in for it."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from zoo import selftest

  for folder in sorted(selftest.GOLDEN.glob("tiny_clip_*")):
    lines = selftest.check(folder)
    assert len(lines) == 3 and all(line.startswith("PASS") for line in lines), lines


def test_hpsv2_sees_what_its_code_saw():
  torch = pytest.importorskip("torch")
  hpsv2 = importlib.import_module("zoo.hpsv2")
  plain = PIL.Image.new("RGB", (448, 300), (255, 0, 51))
  found = hpsv2.pixels(torch, [plain, plain.resize((30, 90))]).numpy()
  expected = (np.array([1, 0, 0.2]) - hpsv2.MEAN) / hpsv2.STD
  assert found.shape == (2, 3, 224, 224)
  expected = np.broadcast_to(expected[:, None, None], found.shape)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # Halved without antialiasing, alternating columns leave a trace; with it, they would be grey.
  stripes = np.zeros((448, 448, 3), np.uint8)
  stripes[:, ::4] = 255
  assert np.ptp(hpsv2.pixels(torch, [PIL.Image.fromarray(stripes)]).numpy()[0, 0, 100]) > 1
