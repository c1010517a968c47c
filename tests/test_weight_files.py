"""Weights as people have them: other names, shards, wrappers; and what does not load, and why."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import safetensors_files, weight_files, weights
from unigrpo_jax.runtime import conversion, folders

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
VISION = ("vit_model.", "connector.", "vit_pos_embed.")


@pytest.fixture(scope="module")
def released(golden):
  """{file: {tensor: array}} of an official folder."""
  tensors = {}
  for name in weight_files.FILES.values():
    with safetensors_files.SafetensorsFile(golden / name) as file:
      tensors[name] = {tensor: file.read(tensor) for tensor in file.entries}
  return tensors


@pytest.fixture
def folder(tmp_path, golden):
  """An official folder without its network's weights."""
  folder = tmp_path / "model"
  folder.mkdir()
  for path in golden.iterdir():
    if path.suffix == ".json" or path.name == "ae.safetensors":
      shutil.copyfile(path, folder / path.name)
  return folder


def _write(path, tensors, metadata=None):
  shapes = {name: (value.dtype, value.shape) for name, value in tensors.items()}
  pieces = ((name, 0, value) for name, value in tensors.items())
  safetensors_files.write(path, safetensors_files.Contents(shapes, pieces, metadata))


def _check_same(folder, released):
  """What is read from a folder is the release."""
  opened = folders.open_folder(folder)
  with opened.open_params() as reader:
    for file, tensors in released.items():
      for name, value in tensors.items():
        np.testing.assert_array_equal(reader.files[file].read(name), value)
    leaf = next(leaf for leaf in reader.leaves if leaf.stacked)
    assert reader.read(leaf).shape == leaf.shape
  others = {path.name for path in folders.other_files(opened)}
  assert "llm_config.json" in others and not [name for name in others if "safetensors" in name]


@pytest.mark.parametrize("name", ["model.safetensors", "my_finetune.safetensors"])
@pytest.mark.parametrize("prefix", [
  "", "module.", "model.", "_orig_mod.", "module._orig_mod.", "bagel.model.", "model.module.",
])
def test_a_file_of_another_name_and_wrapped_names_load(folder, released, name, prefix):
  network = released["ema.safetensors"]
  _write(folder / name, {f"{prefix}{tensor}": value for tensor, value in network.items()})
  _check_same(folder, released)


def test_wrappers_within_a_name_are_taken_off():
  for name in (
    "language_model.model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.up.weight",
    "_orig_mod.language_model.module.model.layers.0._orig_mod.mlp.up.weight",
  ):
    assert weight_files.canonical(name) == "language_model.model.layers.0.mlp.up.weight"


def _shards(folder, network, stem="model", count=3):
  names = sorted(network)
  shards = {}
  for number in range(count):
    file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
    own = names[number::count]
    _write(folder / file, {name: network[name] for name in own}, {"format": "pt"})
    shards |= dict.fromkeys(own, file)
  return shards


@pytest.mark.parametrize("index", [
  "model.safetensors.index.json", "ema.safetensors.index.json", "x.safetensors.index.json", None,
])
def test_shards_load_with_and_without_an_index(folder, released, index):
  shards = _shards(folder, released["ema.safetensors"], stem="part")
  if index:
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
  _check_same(folder, released)


def test_the_releases_name_comes_first(folder, released):
  _write(folder / "ema.safetensors", released["ema.safetensors"])
  _write(folder / "model.safetensors", {"x": np.zeros(1, np.float32)})
  with folders.open_folder(folder).open_params() as reader:
    assert reader.files["ema.safetensors"].path.name == "ema.safetensors"


@pytest.mark.parametrize("change, words", [
  (lambda f, shards: (f / "part-00002-of-00003.safetensors").unlink(),
   r"1 of its shards are missing \(part-00002"),
  (lambda f, shards: shards.update(a="../ae.safetensors"), '"weight_map" must say which'),
  (lambda f, shards: shards.update(a="/etc/x.safetensors"), '"weight_map" must say which'),
  (lambda f, shards: shards.update(a=5), '"weight_map" must say which'),
  (lambda f, shards: shards.update(a="part-00001-of-00003.safetensors"), r"lacks 1 .*\(a\);"),
  (lambda f, shards: shards.clear(), '"weight_map" must say which'),
])
def test_a_wrong_index_is_refused(folder, released, change, words):
  shards = _shards(folder, released["ema.safetensors"], stem="part")
  change(folder, shards)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
  config = config_lib.read_config(folder)
  assert re.search(words, refusal(weights.OfficialReader, folder, config))


def test_what_may_be_meant_twice_is_refused(folder, released):
  network = released["ema.safetensors"]
  _write(folder / "one.safetensors", network)
  _write(folder / "two.safetensors", network)
  config = config_lib.read_config(folder)
  message = refusal(weights.OfficialReader, folder, config)
  assert "holds several weight files (one.safetensors, two.safetensors)" in message
  (folder / "two.safetensors").unlink()
  name = next(iter(network))
  _write(folder / "one.safetensors", network | {f"module.{name}": network[name]})
  assert f"{name} is the tensor that" in refusal(weights.OfficialReader, folder, config).replace(
    "module.", "")


@pytest.mark.parametrize("make, words", [
  (lambda f: None, "ema.safetensors: file not found; a BAGEL folder must contain it"),
  (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"), "pytorch_model.bin may be a pickle"),
  (lambda f: (f / "ae.safetensors").unlink(), "ema.safetensors: file not found"),
  (lambda f: _write(f / "adapter_model.safetensors", {
    "base_model.model.language_model.q.lora_A.weight": np.zeros((2, 2), np.float32)}),
   "these are LoRA adapters, not a model: give them"),
  (lambda f: (f / "ema.safetensors").write_bytes(POINTER), "a Git LFS pointer, not the file"),
  (lambda f: (f / "model.safetensors").write_bytes(
    (len(h := b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}')).to_bytes(8, "little")
    + h + b"x"), "tensor a has the dtype F8_E4M3, as quantised checkpoints have; take one in bf"),
])
def test_what_cannot_load_says_what_it_is(folder, make, words):
  make(folder)
  assert words in refusal(weights.OfficialReader, folder, folders.open_folder(folder).config)


def test_what_is_no_model_folder_says_what_it_is(folder):
  (folder / "llm_config.json").write_bytes(POINTER)
  assert "llm_config.json: a Git LFS pointer" in refusal(folders.open_folder, folder)
  adapters = folder.parent / "adapters"
  adapters.mkdir()
  (adapters / "adapter_config.json").write_text("{}")
  assert "adapters: holds LoRA adapters; give the checkpoint" in refusal(
    folders.open_folder, adapters)


def test_a_fine_tune_for_drawing_says_how_to_merge_it(folder, released, tmp_path, golden):
  """Then its tensors are its own, and the vision tower is the original's."""
  drawing = {
    name: value + np.asarray(1, value.dtype) for name, value in released["ema.safetensors"].items()
    if not name.startswith(VISION)
  }
  _write(folder / "ema.safetensors", drawing)
  (folder / "ae.safetensors").unlink()
  message = refusal(conversion.convert, folder, tmp_path / "out")
  assert "draws and does not see" in message and f"--source={folder} --missing_from=" in message
  conversion.convert(folder, tmp_path / "out", missing_from=golden)
  assert conversion._check_tensors(
    folders.open_folder(folder, golden), folders.open_folder(tmp_path / "out"))
  conversion.export(tmp_path / "out", tmp_path / "back")
  with safetensors_files.SafetensorsFile(tmp_path / "back" / "ema.safetensors") as file:
    for name, value in (released["ema.safetensors"] | drawing).items():
      np.testing.assert_array_equal(file.read(name), value)


@pytest.mark.parametrize("make", [
  lambda f: None, lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"),
  lambda f: ((f / "checkpoint-2").mkdir(), (f / "checkpoint-2/model.safetensors").touch()),
])
def test_a_fine_tune_without_weights_is_not_the_original(tmp_path, golden, make):
  (tmp_path / "tuned").mkdir()
  make(tmp_path / "tuned")
  message = refusal(folders.open_folder, tmp_path / "tuned", golden)
  assert "holds no weights of a network, so all would be those of" in message


@pytest.mark.parametrize("name", ["vit_config.json", "tokenizer.json", "bagel_config.json"])
def test_a_fine_tune_takes_the_small_files_that_it_lacks(folder, released, golden, tmp_path, name):
  base = shutil.copytree(golden, tmp_path / "base")
  (base / "tokenizer.json").write_text("{}")
  _write(folder / "ema.safetensors", released["ema.safetensors"])
  (folder / "mine.json").write_text("{}")
  before = config_lib.read_config(folder)
  (folder / name).unlink(missing_ok=True)
  opened = folders.open_folder(folder, base)
  names = {path.name for path in folders.other_files(opened)}
  assert opened.config == before and names >= {name, "mine.json", "llm_config.json"}
  assert (folder / "mine.json").exists() and not (folder / name).exists()


def test_an_index_of_another_model_hides_no_weights(folder, released):
  """As of the release, copied beside a fine-tune with its small files."""
  _write(folder / "my_tuned.safetensors", released["ema.safetensors"])
  shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": shards}))
  with folders.open_folder(folder).open_params() as reader:
    name = next(iter(released["ema.safetensors"]))
    np.testing.assert_array_equal(
      reader.files["ema.safetensors"].read(name), released["ema.safetensors"][name])
  (folder / "my_tuned.safetensors").unlink()
  assert "2 of its shards are missing" in refusal(
    weights.OfficialReader, folder, config_lib.read_config(folder))


def test_what_is_trained_has_no_weights_of_before_beside_it(folder, released, tmp_path, golden):
  """Whoever loads them would have another model; a conversion keeps every file."""
  _write(folder / "ema.safetensors", released["ema.safetensors"])
  _write(folder / "model.safetensors", released["ema.safetensors"])
  (folder / "optimizer.00000-of-00001.pt").write_bytes(b"PK")
  opened = folders.open_folder(folder)
  params = opened.load_params()
  folders.write_official(tmp_path / "out", opened, params, dtype=np.float32)
  kept = {path.name for path in (tmp_path / "out").iterdir()}
  assert {"ema.safetensors", "ae.safetensors", "llm_config.json"} <= kept
  assert not {"model.safetensors", "optimizer.00000-of-00001.pt"} & kept


def test_weights_alone_take_the_rest_from_the_original(tmp_path, released, golden):
  folder = tmp_path / "tuned"
  folder.mkdir()
  _write(folder / "model.safetensors", released["ema.safetensors"])
  assert "holds weights (model.safetensors) but no llm_config.json" in refusal(
    folders.open_folder, folder)
  opened = folders.open_folder(folder, golden)
  with opened.open_params() as reader:
    assert len(reader.leaves) and not reader.filled
  assert "llm_config.json" in {path.name for path in folders.other_files(opened)}
