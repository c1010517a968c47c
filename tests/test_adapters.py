"""LoRA adapters in PEFT's folders: exact names, and the same network back."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.models import adapters, layers, safetensors_files, weights
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.runtime import folders, state

LORA = layers.Lora(rank=3, alpha=12.0)


@pytest.fixture(scope="module")
def folder(golden):
  return folders.open_folder(golden)


@pytest.fixture(scope="module")
def params(folder):
  """The tree under "bagel" of the golden BAGEL, numpy, with random adapters."""
  rng, tree = np.random.default_rng(0), {}
  with folder.open_params(("bagel",)) as reader:
    for leaf in reader.leaves:
      place = tree
      for key in leaf.path[1:-1]:
        place = place.setdefault(key, {})
      place[leaf.path[-1]] = reader.read(leaf, (), np.float32)
      if leaf.path[1] == "layers" and leaf.path[-1] == "kernel":
        inputs, outputs = leaf.axes
        count, rank = len(leaf.names), LORA.rank
        place[layers.LORA_DOWN] = rng.normal(size=(count, *inputs, rank)).astype(np.float32)
        place[layers.LORA_UP] = rng.normal(size=(count, rank, *outputs)).astype(np.float32)
  return tree


@pytest.fixture(scope="module")
def written(params, config, tmp_path_factory):
  """The adapters of `params` as a PEFT folder."""
  path = tmp_path_factory.mktemp("peft")
  return _write(
    path, adapters.config_of(LORA, "some/base"),
    adapters.contents(params, config, LORA.rank, np.float32),
  )


def _write(path, config, contents):
  (path / adapters.CONFIG_FILE).write_text(json.dumps(config))
  safetensors_files.write(path / adapters.FILE, contents)
  return path


def _folder_of(path, tensors, **config):
  """A PEFT folder of {tensor name: array}."""
  contents = safetensors_files.Contents(
    {name: (value.dtype, value.shape) for name, value in tensors.items()},
    ((name, 0, value) for name, value in tensors.items()),
  )
  return _write(path, {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config, contents)


def test_names_and_shapes_are_those_of_peft(written, config):
  entries = safetensors_files.SafetensorsFile(written / adapters.FILE).entries
  D, F = config.llm.hidden_size, config.llm.intermediate_size
  heads, kv = (n * config.llm.head_dim for n in (config.llm.num_heads, config.llm.num_kv_heads))
  sizes = {
    f"self_attn.{name}_proj": size
    for name, size in dict(q=(heads, D), k=(kv, D), v=(kv, D), o=(D, heads)).items()
  }
  sizes |= {f"{name}_moe_gen": size for name, size in sizes.items()} | {
    f"{mlp}.{name}_proj": size for mlp in ("mlp", "mlp_moe_gen")
    for name, size in dict(gate=(F, D), up=(F, D), down=(D, F)).items()
  }
  expected = {}
  for layer in range(config.llm.num_layers):
    for name, (rows, columns) in sizes.items():
      module = f"base_model.model.language_model.model.layers.{layer}.{name}"
      expected[f"{module}.lora_A.weight"] = (LORA.rank, columns)
      expected[f"{module}.lora_B.weight"] = (rows, LORA.rank)
  assert {name: entry.shape for name, entry in entries.items()} == expected

  recorded = json.loads((written / adapters.CONFIG_FILE).read_text())
  assert (recorded["peft_type"], recorded["r"], recorded["lora_alpha"]) == ("LORA", 3, 12)
  # PEFT adapts the modules that the expression matches in full: these, and none of the ViT.
  modules = {
    name.removesuffix(".weight") for leaf in weights.table(config) for name in leaf.names
  }
  matched = {name for name in modules if re.fullmatch(recorded["target_modules"], name)}
  assert matched == {name[len("base_model.model."):].rsplit(".", 2)[0] for name in expected}


def test_adapters_come_back_as_they_were(written, params, config):
  adapter = adapters.Adapter(written, config)
  assert adapter.lora == LORA
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  loaded = adapter.params(LORA, jax.tree.map(lambda _: here, params))
  for expert in ("und", "gen"):
    for module, name in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
      for key in (layers.LORA_DOWN, layers.LORA_UP):
        np.testing.assert_array_equal(
          loaded["layers"][expert][module][name][key], params["layers"][expert][module][name][key]
        )
  with pytest.raises(errors.InputError, match="config.lora.rank=8.*have rank 3"):
    adapter.params(layers.Lora(8, 8.0), {})


def test_merged_weights_are_those_of_the_merged_network(folder, written, params, config):
  """Whole or in slices, of every kind of kernel; what has no adapter is as it was."""
  merged = layers.merge_lora(params, LORA)
  opened = folders.ModelFolder(
    folder.path, folder.kind, folder.files, config, adapters.Adapter(written, config)
  )
  with opened.open_params(("bagel",)) as reader:
    for leaf in reader.leaves:
      want = np.asarray(weights.lookup(merged, leaf.path[1:]))
      np.testing.assert_allclose(reader.read(leaf, (), np.float32), want, rtol=1e-5, atol=1e-5)
      if leaf.stacked and len(leaf.shape) == 4 and leaf.path[1] == "layers":
        cut = (slice(1, 2), slice(1, 2), slice(None), slice(2, 5))
        np.testing.assert_allclose(
          reader.read(leaf, cut, np.float32), want[cut], rtol=1e-5, atol=1e-5
        )
    assert reader.read(leaf, ()).dtype == reader.dtype(leaf)
  assert state.open_for_sampling(folder.path, adapter=written).folder.adapter.lora == LORA


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "CorDA", "loftq"])
def test_adapters_whose_start_changed_the_base_are_refused(written, tmp_path, start):
  """PEFT takes the first product off the base when it loads them."""
  config = json.loads((written / adapters.CONFIG_FILE).read_text())
  for value, refused in ((start, True), (True, False), ("gaussian", False)):
    config["init_lora_weights"] = value
    (tmp_path / adapters.CONFIG_FILE).write_text(json.dumps(config))
    if refused:
      with pytest.raises(errors.InputError, match="init_lora_weights=.* changed the weights ben"):
        adapters.read_config(tmp_path)
    else:
      adapters.read_config(tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_that_peft_trained(folder, config, tmp_path, rslora):
  """Of some layers, with ranks and alphas of their own, in bfloat16, of the language model."""
  rng = np.random.default_rng(1)
  D, F = config.llm.hidden_size, config.llm.intermediate_size
  make = lambda *shape: rng.normal(size=shape).astype(ml_dtypes.bfloat16)
  gate = "base_model.model.model.layers.1.mlp_moe_gen.gate_proj"
  down = "base_model.model.model.layers.0.mlp.down_proj"
  tensors = {
    f"{gate}.lora_A.weight": make(2, D), f"{gate}.lora_B.weight": make(F, 2),
    f"{down}.lora_A.default.weight": make(5, F), f"{down}.lora_B.default.weight": make(D, 5),
  }
  path = _folder_of(
    tmp_path, tensors, use_rslora=rslora, rank_pattern={"mlp.down_proj": 5},
    alpha_pattern={r"^model.layers.\d+.mlp.down_proj": 7},  # as PEFT's names begin here
  )
  adapter = adapters.Adapter(path, config)
  assert len(adapter) == 2 and adapter.lora.rank == 5
  root = 0.5 if rslora else 1.0
  factor = lambda name: next(v for key, v in tensors.items() if key.startswith(name))
  want = {}
  for key, module, scale in (("gate", gate, 4 / 2**root), ("down", down, 7 / 5**root)):
    a, b = (
      np.asarray(factor(f"{module}.lora_{letter}"), np.float64) for letter in ("A", "B")
    )
    want[key] = scale * (b @ a).T
  # Merged, and as parameters to go on training from.
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  names = [leaf.path[1:] for leaf in weights.table(config, ("bagel",))]
  places = {}
  for path in names:
    place = places
    for key in path[:-1]:
      place = place.setdefault(key, {})
    place.update(dict.fromkeys((layers.LORA_DOWN, layers.LORA_UP), here))
  loaded = adapter.params(adapter.lora, places)["layers"]
  with folder.open_params(("bagel",)) as plain:
    reader = adapters.MergedReader(plain, adapter)
    for leaf in reader.leaves:
      if leaf.path[1] != "layers" or leaf.path[-1] != "kernel" or leaf.path[-3] != "mlp":
        continue
      expert, _, name, _ = leaf.path[2:]
      expected = np.zeros(leaf.shape)
      if (expert, name) in (("gen", "gate"), ("und", "down")):
        expected[1 if name == "gate" else 0] = want[name]
      base = plain.read(leaf, (), np.float32)
      merged = reader.read(leaf, (), np.float32)
      np.testing.assert_allclose(merged - base, expected, rtol=1e-4, atol=1e-4)
      down, up = (
        np.asarray(loaded[expert]["mlp"][name][key]) for key in (layers.LORA_DOWN, layers.LORA_UP)
      )
      scale = adapter.lora.alpha / adapter.lora.rank
      np.testing.assert_allclose(down @ up * scale, expected, rtol=1e-4, atol=1e-4)


def test_a_run_from_adapters_has_their_rank_and_its_own_reference(written):
  """The reference is what training starts from, adapters included."""
  read = lambda *flags: rl.read(config_files.load("configs/unigrpo.py:tiny", flags))
  spec = read(f"--config.lora.adapter={written}")
  assert spec.network.lora == LORA and spec.run.config["lora"]["rank"] == 3
  assert spec.copies_reference and not read("--config.lora.rank=3").copies_reference
  with pytest.raises(errors.InputError, match="lora.adapter: /none: no such folder.*lora.rank"):
    read("--config.lora.adapter=/none")


def _without(key):
  return lambda tensors, config: tensors.pop(key)


@pytest.mark.parametrize("damage, words", [
  (lambda t, c: c.update(peft_type="IA3"), "peft_type='IA3'; only LORA"),
  (lambda t, c: c.update(use_dora=True), "use_dora=True is not supported"),
  (lambda t, c: c.update(modules_to_save=["lm_head"]), "modules_to_save"),
  (lambda t, c: c.update(r="8"), "rank r='8'"),
  (lambda t, c: c.update(lora_alpha=None), "lora_alpha=None"),
  (lambda t, c: c.update(lora_alpha=10**400), "lora_alpha=1000.* must be a number"),
  (lambda t, c: c.update(rank_pattern={"x": 10**400}), "rank x=1000.* must be a whole number"),
  (lambda t, c: c.update(alpha_pattern={"(": 3}), r"adapter_config.json: '\(' is no pattern of"),
  (lambda t, c: c.update(r=1), "has rank 2, but adapter_config.json says 1"),
  (_without("model.layers.0.mlp.up_proj.lora_B.weight"), "not A .r, 64. and"),
  (lambda t, c: t.update({"model.layers.9.mlp.up_proj.lora_A.weight": np.ones((2, 64), "f4")}),
   "layers.9.mlp.up_proj.lora_A.weight belongs to no linear layer"),
  (lambda t, c: t.update({"model.layers.0.mlp.up_proj.lora_A.b.weight": np.ones((2, 64), "f4")}),
   "lora_A.b.weight and model.layers.0.mlp.up_proj.lora_A.weight adapt the same layer"),
  (lambda t, c: t.update({"lm_head.weight": np.ones((2, 2), "f4")}), "lm_head.weight belongs"),
])
def test_what_cannot_be_added_is_refused(config, tmp_path, damage, words):
  F, D = config.llm.intermediate_size, config.llm.hidden_size
  tensors = {
    "model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, D), np.float32),
    "model.layers.0.mlp.up_proj.lora_B.weight": np.ones((F, 2), np.float32),
  }
  changes = {}
  damage(tensors, changes)
  with pytest.raises(errors.InputError, match=words):
    adapters.Adapter(_folder_of(tmp_path, tensors, **changes), config)


def test_no_folder_of_adapters(config, tmp_path):
  with pytest.raises(errors.InputError, match="no such folder"):
    adapters.Adapter(tmp_path / "none", config)
  with pytest.raises(errors.InputError, match="holds no adapter_config.json"):
    adapters.Adapter(tmp_path, config)
  _folder_of(tmp_path, {})
  (tmp_path / adapters.FILE).rename(tmp_path / "adapter_model.bin")
  with pytest.raises(errors.InputError, match="a pickle, which is not read"):
    adapters.Adapter(tmp_path, config)
