"""CLIP: what is read from a folder and refused of it, and its rewards; see tests/parity/clip.py."""

import json
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from unigrpo_jax import errors, rewards
from unigrpo_jax.geneval import classes
from unigrpo_jax.recipe import rl
from unigrpo_jax.reward_models.clip import colors, convert, host, preprocess
from unigrpo_jax.reward_models.clip import config as config_lib
from unigrpo_jax.rewards import colors as geneval_colors
from unigrpo_jax.tools.plan import planner

GOLDEN = pathlib.Path(__file__).parent / "golden_rewards"
LEGACY, NEW = GOLDEN / "tiny_clip_legacy", GOLDEN / "tiny_clip_h"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """A copy of a recorded CLIP that a test may change."""
  return shutil.copytree(LEGACY, tmp_path / "clip")


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(LEGACY / convert.FILE)


def load(folder, dtype=jnp.float32):
  return convert.load(folder, config_lib.read(folder), dtype, jax.devices()[0])


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def samples(folder) -> list[rewards.Sample]:
  recorded = np.load(folder / "recorded.npz")
  prompts = json.loads((folder / "recorded.json").read_text())["prompts"]
  return [rewards.Sample(prompt, recorded[f"image_{i}"]) for i, prompt in enumerate(prompts)]


def change(folder, name, **keys):
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_missing_key_has_the_default_of_clip(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  config = config_lib.read(tmp_path)
  assert config == config_lib.Config(config_lib.Vision(), config_lib.Text())
  assert config.vision.num_positions == 50 and config.text.eos_token_id == 49407
  # An old file has both, and transformers takes the second with its own defaults.
  (tmp_path / "config.json").write_text(json.dumps({
    "model_type": "clip", "text_config": {"hidden_size": 64, "eos_token_id": 2},
    "text_config_dict": {"hidden_size": 128},
  }))
  text = config_lib.read(tmp_path).text
  assert (text.hidden_size, text.eos_token_id) == (128, 49407)


@pytest.mark.parametrize("change, expected", [
  ({"model_type": "siglip"}, "model_type='siglip' must be 'clip'"),
  ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act='relu' must be 'quick_gelu'"),
  ({"vision_config": {"hidden_size": 50}}, "vision_config.hidden_size=50 must be a multiple"),
  ({"vision_config": {"image_size": 33}}, "vision_config.image_size=33 must be a multiple"),
  ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers=0 must be an integer from 1"),
])
def test_a_config_of_another_network_is_refused(tmp_path, change, expected):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | change))
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    config_lib.read(tmp_path)


@pytest.mark.parametrize("config, millions, tensors_of_file", [
  (config_lib.LARGE, 427.6, 590), (config_lib.HUGE, 986.1, 910),
])
def test_the_released_ones_have_so_many_parameters(config, millions, tensors_of_file):
  leaves = jax.tree_util.tree_flatten_with_path(convert.abstract_params(config, jnp.float32))[0]
  assert round(sum(leaf.size for _, leaf in leaves) / 1e6, 1) == millions
  count = sum(len(convert.sources(path, leaf, config, False)) for path, leaf in leaves)
  assert count == tensors_of_file


def open_clip_form(tensors):
  """The same tensors as open_clip names and stacks them."""
  found, rest = {}, dict(tensors)
  for side, ours in (("visual.", "vision_model."), ("", "text_model.")):
    blocks = sorted({int(m[1]) for name in tensors
                     if (m := re.match(rf"{ours}encoder\.layers\.(\d+)\.", name))})
    for i in blocks:
      source, target = f"{ours}encoder.layers.{i}.", f"{side}transformer.resblocks.{i}."
      for kind in ("weight", "bias"):
        found[f"{target}attn.in_proj_{kind}"] = np.concatenate(
          [rest.pop(f"{source}self_attn.{x}_proj.{kind}") for x in "qkv"])
        for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"),
                     ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
          found[f"{target}{a}.{kind}"] = rest.pop(f"{source}{b}.{kind}")
  names = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
  }
  for a, b in (("visual.ln_pre", "vision_model.pre_layrnorm"),
               ("visual.ln_post", "vision_model.post_layernorm"),
               ("ln_final", "text_model.final_layer_norm")):
    names |= {f"{a}.{kind}": f"{b}.{kind}" for kind in ("weight", "bias")}
  found |= {a: rest.pop(b) for a, b in names.items()}
  found["visual.proj"] = rest.pop("visual_projection.weight").T.copy()
  found["text_projection"] = rest.pop("text_projection.weight").T.copy()
  assert not rest
  return found


def test_the_form_of_open_clip_is_the_same_network(folder, tensors):
  safetensors.numpy.save_file(open_clip_form(tensors), folder / convert.FILE)
  assert_same(load(folder), load(LEGACY))


def test_shards_float16_and_positions_are_read(folder, tensors):
  (folder / convert.FILE).unlink()
  half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
  ids = {f"{side}_model.embeddings.position_ids": np.arange(9)[None] for side in ("text", "vision")}
  parts = [dict(list(half.items())[::2]) | ids, dict(list(half.items())[1::2])]
  names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  for name, part in zip(names, parts):
    safetensors.numpy.save_file(part, folder / name)
  (folder / "model.safetensors.index.json").write_text(json.dumps(
    {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}
  ))
  expected = jax.tree.map(lambda a: a.astype(np.float16), load(LEGACY))
  assert_same(load(folder), expected)
  # Matrices are rounded, and the scale of logits is not: exp(4.6) would be 0.6 % off.
  rounded = load(folder, jnp.bfloat16)
  assert rounded["visual_projection"]["kernel"].dtype == ml_dtypes.bfloat16
  assert rounded["logit_scale"].dtype == np.float32


@pytest.mark.parametrize("change, expected", [
  (lambda t: t.update(extra=np.zeros(2)), "1 unused: extra [2] not asked for by config.json"),
  (lambda t: t.pop("logit_scale"), "1 missing: logit_scale [] asked for by config.json"),
  (lambda t: t.update({"visual_projection.weight": np.zeros((24, 5))}),
   "1 wrong shape: visual_projection.weight is [24, 5] in the file but [24, 48] by config.json"),
])
@pytest.mark.parametrize("form", [lambda t: t, open_clip_form])
def test_surplus_missing_and_misshapen_tensors_are_named(folder, tensors, change, expected, form):
  changed = {name: tensor.copy() for name, tensor in form(tensors).items()}
  if "visual_projection" in expected and form is open_clip_form:
    change = lambda t: t.update({"visual.proj": np.zeros((5, 24))})
    expected = "1 wrong shape: visual.proj is [5, 24] in the file but [48, 24] by config.json"
  change(changed)
  as_float = {name: tensor.astype(np.float32) for name, tensor in changed.items()}
  safetensors.numpy.save_file(as_float, folder / convert.FILE)
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    load(folder)


def test_a_pickle_is_refused_with_the_conversion(folder):
  (folder / convert.FILE).rename(folder / "pytorch_model.bin")
  with pytest.raises(errors.InputError, match=r"pytorch_model.bin may be a pickle.*save_file\("):
    load(folder)


@pytest.mark.parametrize("keys, expected", [
  ({"do_center_crop": False}, "do_center_crop=False must be true"),
  ({"resample": 9}, "resample=9 must be 0 or"),
  ({"size": {"height": 32, "width": 32}}, "size={'height': 32, 'width': 32} must be one number"),
  ({"crop_size": {"height": 32, "width": 30}}, "must be one number"),
  ({"crop_size": 24}, "crop_size=24 must be the network's 32 pixels"),
  ({"image_std": [0.1, 0.0, 0.1]}, "image_std=[0.1, 0.0, 0.1] must be positive"),
  ({"do_sharpen": True}, "do_sharpen=True must be left out"),
])
def test_a_preprocessing_that_is_not_understood_is_refused(folder, keys, expected):
  change(folder, preprocess.IMAGE_FILE, **keys)
  with pytest.raises(errors.InputError, match=re.escape(expected)):
    preprocess.read_pixels(folder, 32)


def test_an_old_preprocessing_has_plain_numbers(folder):
  expected = preprocess.read_pixels(folder, 32)
  change(folder, preprocess.IMAGE_FILE, size=32, crop_size=32, resample=3, do_pad=None)
  assert preprocess.read_pixels(folder, 32) == expected


def test_a_prompt_is_cut_before_its_end_token(caplog):
  words = preprocess.Words(LEGACY, 9, 714)
  short, long = words(["a kite", "word " * 40])
  assert short[0] == long[0] == 712 and long[-1] == 713 and short[-1] == 713
  assert len(long) == 9 and (long == 713).sum() == 1
  words(["word " * 40])
  assert len(caplog.records) == 1  # said once
  with pytest.raises(errors.InputError, match="714 tokens are more than the network's 700"):
    preprocess.Words(LEGACY, 9, 700)


def test_a_missing_folder_is_one_line_with_what_to_fetch(tmp_path):
  for name, hub, size in (
    ("pickscore", "yuvalkirstain/PickScore_v1", "3.9 GB"),
    ("clip", "openai/clip-vit-large-patch14", "1.7 GB"),
  ):
    for options in ({}, {"folder": str(tmp_path / "none")}, {"folder": str(tmp_path)}):
      with pytest.raises(errors.InputError) as error:
        rewards.make(name, **options)
      said = str(error.value)
      assert hub in said and size in said and "MIT" in said and "hf download" in said
      assert "\n" not in said


@pytest.fixture(scope="module")
def pickscore() -> rewards.Reward:
  return rewards.make("pickscore", folder=str(LEGACY), dtype="float32", batch_size=5)


def test_pickscore_is_that_of_the_recording(pickscore):
  recorded = np.load(LEGACY / "recorded.npz")
  given = samples(LEGACY) * 3  # more than a batch
  found = rewards.evaluate(pickscore, given).values
  np.testing.assert_allclose(found, np.tile(recorded["pickscore"], 3), atol=2e-5)
  # Neither its neighbours nor its place matter.
  alone = rewards.evaluate(pickscore, given[2:3]).values
  np.testing.assert_allclose(alone, found[2], atol=1e-6)


def test_it_runs_on_this_hosts_devices_without_a_collective(pickscore):
  program = pickscore._score.args[0]
  text = program.as_text()
  assert len(program.input_shardings[0][1].device_set) == len(jax.local_devices()) == 8
  assert not re.search("all-reduce|all-gather|all-to-all|collective|reduce-scatter", text)


def test_what_changes_a_score_is_in_its_settings(pickscore, folder):
  settings = json.loads(pickscore.fingerprint)
  assert settings["dtype"] == "float32" and settings["scale"] == "logit / 26"
  assert set(settings["checksums"]) == {
    "config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"
  }


def test_a_prompt_that_is_no_text_is_nan_with_a_reason(pickscore):
  given = samples(LEGACY)[:2] + [rewards.Sample("\ud800", np.zeros((8, 8, 3), np.uint8))]
  scores = rewards.evaluate(pickscore, given)
  assert np.isfinite(scores.values[:2]).all() and np.isnan(scores.values[2])
  assert "no Unicode" in scores.reason


def head(path, features=24) -> dict[str, np.ndarray]:
  """Writes an aesthetic head with random weights."""
  random, made, wide = np.random.default_rng(0), {}, features
  for name, out in host._HEAD.items():
    made[f"layers.{name}.weight"] = random.normal(0, wide**-0.5, (out, wide)).astype(np.float32)
    made[f"layers.{name}.bias"] = random.normal(0, 1, out).astype(np.float32)
    wide = out
  safetensors.numpy.save_file(made, path)
  return made


def aesthetic(features, made) -> np.ndarray:
  x = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
  for name in host._HEAD:
    x = x @ made[f"layers.{name}.weight"].T.astype(np.float64) + made[f"layers.{name}.bias"]
  return x[:, 0]


def test_the_aesthetic_head_has_no_activation(tmp_path):
  made = head(tmp_path / "head.safetensors")
  features = np.random.default_rng(1).normal(size=(3, 24)).astype(np.float32)
  layers = host.read_head(tmp_path / "head.safetensors", 24)
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  found = host.aesthetic(layers, jnp.asarray(unit))
  np.testing.assert_allclose(found, aesthetic(features, made), atol=1e-5)
  with pytest.raises(errors.InputError, match="layers.0.weight is .1024, 24. in the file but"):
    host.read_head(tmp_path / "head.safetensors", 32)
  with pytest.raises(errors.InputError, match="no such file; it is sac.*weights_only=True"):
    host.read_head(tmp_path / "none.safetensors", 24)


def test_a_colour_is_the_nearest_mean_of_its_templates():
  random = np.random.default_rng(3)
  texts, asked = random.normal(size=(30, 6)), []
  texts /= np.linalg.norm(texts, axis=1, keepdims=True)
  made = colors.Colors.__new__(colors.Colors)
  made._weights_of = {}
  made._clip = types.SimpleNamespace(words=asked.extend, pixels=lambda crop: crop[0, 0])
  made._texts = lambda ids: texts
  features = random.normal(size=(5, 6))
  made._images = lambda pixels: features[pixels[:, 0]]
  crops = [PIL.Image.new("RGB", (3, 2), (i, 0, 0)) for i in range(5)]
  found = made(crops, "bus")
  weights = texts.reshape(10, 3, 6).mean(1)
  weights /= np.linalg.norm(weights, axis=1, keepdims=True)
  assert found == [classes.COLORS[i] for i in (features @ weights.T).argmax(1)]
  assert made([], "bus") == [] and made(crops[:1], "bus") == found[:1]
  assert len(asked) == 30  # once a class
  assert asked[:4] == ["a photo of a red bus", "a photo of a red-colored bus",
                       "a photo of a red object", "a photo of a orange bus"]


def test_a_plan_counts_the_rewards_on_its_own_chips(monkeypatch):
  taken = lambda reward, options, device, devices: 100 + options.get("batch_size", 16) / devices
  monkeypatch.setattr(host, "device_bytes", taken)
  device = lambda host: types.SimpleNamespace(process_index=host)
  spec = rl.RewardsSpec(
    weights={"ocr": 1.0, "pickscore": 1.0, "far": 0.0, "l14": 0.0},
    options={"far": {"kind": "http"}, "l14": {"kind": "clip", "batch_size": 8}},
    threads=1, normalise=False, max_failed_fraction=0.0, watch_images=False,
  )
  assert planner.clip_bytes(spec, [device(h) for h in (3, 3, 3, 3, 4)]) == 104 + 102


@pytest.mark.slow
def test_the_bytes_of_a_reward_are_its_parameters_and_its_programs():
  options = {"folder": str(LEGACY), "dtype": "float32"}
  params = sum(leaf.nbytes for leaf in jax.tree.leaves(load(LEGACY)))
  few, many = (
    host.device_bytes("pickscore", options | {"batch_size": size}, jax.devices()[0], 2)
    for size in (2, 64)
  )
  assert params < few < many


@pytest.mark.slow
def test_the_colours_of_a_clip(folder):
  made = geneval_colors.make("clip", {"folder": str(LEGACY), "batch_size": 3})
  crops = [PIL.Image.fromarray(sample.image) for sample in samples(LEGACY)]
  found = made(crops, "bus")
  recorded = np.load(LEGACY / "recorded.npz")["image_features"]
  assert found == [classes.COLORS[i] for i in (recorded @ made._weights_of["bus"].T).argmax(1)]
  assert re.fullmatch(r"clip openai/clip-vit-large-patch14 [0-9a-f]{8} float32", made.name)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [LEGACY, NEW], ids=lambda folder: folder.name)
def test_rewards_in_bfloat16_are_near(folder):
  found = rewards.evaluate(rewards.make("pickscore", folder=str(folder)), samples(folder)).values
  np.testing.assert_allclose(found, np.load(folder / "recorded.npz")["pickscore"], atol=2e-2)


@pytest.mark.slow
def test_clip_and_aesthetic_are_those_of_the_recording(folder):
  recorded = np.load(NEW / "recorded.npz")
  new = shutil.copytree(NEW, folder.parent / "new")
  made = head(new / host.HEAD_FILE, 20)
  options = {"folder": str(new), "dtype": "float32", "batch_size": 4}
  found = rewards.evaluate(rewards.make("clip", **options), samples(new)).values
  np.testing.assert_allclose(found, recorded["clip_over_30"], atol=2e-5)
  cosine = rewards.evaluate(rewards.make("clip", cosine=True, **options), samples(new)).values
  np.testing.assert_allclose(cosine, recorded["clip_over_30"] * 30 / 100.003, atol=2e-5)
  found = rewards.evaluate(rewards.make("aesthetic", **options), samples(new)).values
  np.testing.assert_allclose(found, aesthetic(recorded["image_features"], made), atol=2e-5)
