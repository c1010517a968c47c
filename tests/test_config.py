"""Reading sizes: the released values, and every bad one as a line that names file and key."""

import json
import shutil

import pytest

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib

LLM, VIT, BAGEL = config_lib.LLM_FILE, config_lib.VIT_FILE, config_lib.BAGEL_FILE


def test_sizes_come_from_the_files(golden):
  config = config_lib.read_config(golden)
  llm = json.loads((golden / LLM).read_text())
  assert (config.llm.num_layers, config.llm.rope_theta) == (2, llm["rope_theta"])
  # The file counts a layer that BAGEL does not build.
  assert config.vit.num_layers == json.loads((golden / VIT).read_text())["num_hidden_layers"] - 1
  assert (config.latent_dim, config.latent_stride, config.max_image_side) == (16, 16, 128)


def test_rope_as_transformers_5_writes_it(golden, tmp_path):
  for name in (LLM, VIT):
    shutil.copy(golden / name, tmp_path)
  values = json.loads((golden / LLM).read_text())
  theta = values.pop("rope_theta")
  values["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
  (tmp_path / LLM).write_text(json.dumps(values))
  assert config_lib.read_config(tmp_path).llm.rope_theta == theta != 10_000
  values["rope_parameters"]["rope_type"] = "yarn"
  (tmp_path / LLM).write_text(json.dumps(values))
  with pytest.raises(errors.InputError, match="rope_type"):
    config_lib.read_config(tmp_path)


def test_without_its_own_file_a_folder_has_the_releases_values(golden, tmp_path):
  for name in (LLM, VIT):
    shutil.copy(golden / name, tmp_path)
  config = config_lib.read_config(tmp_path)
  released = config_lib.bagel_7b()
  assert config.vae == released.vae and config.max_latent_size == 64
  assert config.vae_image == released.vae_image and config.vit_image == released.vit_image
  assert config.generation.num_timesteps == 50


@pytest.mark.parametrize(
  "name, path, value",
  [
    (LLM, "rope_theta", "abc"),
    (LLM, "rope_theta", None),
    (LLM, "rope_theta", -1),
    (LLM, "rope_theta", float("nan")),
    (LLM, "rms_norm_eps", 0),
    (LLM, "num_hidden_layers", 10**9),
    (LLM, "num_hidden_layers", True),
    (LLM, "hidden_size", 66),
    (LLM, "num_key_value_heads", 3),
    (LLM, "hidden_act", "gelu"),
    (LLM, "rope_scaling", {"type": "yarn"}),
    (VIT, "layer_norm_eps", "z"),
    (VIT, "num_hidden_layers", 1),
    (BAGEL, "vae", 3),
    (BAGEL, "vae.ch_mult", 3),
    (BAGEL, "vae.ch_mult", [1, "2"]),
    (BAGEL, "vae.ch", 48),
    (BAGEL, "vae.downsample", 4),
    (BAGEL, "vae.scale_factor", 0),
    (BAGEL, "bagel", []),
    (BAGEL, "bagel.max_latent_size", "64"),
    (BAGEL, "bagel.latent_patch_size", 2.0),
    (BAGEL, "bagel.interpolate_pos", "yes"),
    (BAGEL, "bagel.connector_act", "relu"),
    (BAGEL, "image_transforms", []),
    (BAGEL, "image_transforms.vae", 7),
    (BAGEL, "image_transforms.vae.image_stride", 0),
    (BAGEL, "generation.num_timesteps", 1),
    (BAGEL, "generation.cfg_interval", [1, 0]),
  ],
)
def test_bad_values_are_refused_by_name(golden, tmp_path, name, path, value):
  for file in (LLM, VIT, BAGEL):
    shutil.copy(golden / file, tmp_path)
  tree = node = json.loads((tmp_path / name).read_text())
  *sections, key = path.split(".")
  for section in sections:
    node = node.setdefault(section, {})
  node[key] = value
  (tmp_path / name).write_text(json.dumps(tree))
  with pytest.raises(errors.InputError) as error:
    config_lib.read_config(tmp_path)
  assert name in str(error.value) and key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "text", ["", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[]", "\xff"]
)
def test_unreadable_json_names_the_file(golden, tmp_path, text):
  (tmp_path / LLM).write_bytes(text.encode("latin-1"))
  with pytest.raises(errors.InputError, match=LLM):
    config_lib.read_config(tmp_path)
