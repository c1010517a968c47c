"""The table of official tensors against the published list, and reading them, broken or not."""

import json
import math
import os
import pathlib
import shutil
import struct
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.models import bagel, safetensors_files, vae, weights
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import folders

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def read_raw(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file, read without the code under test."""
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + length])
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    tensors[name] = np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
  return tensors


def write_raw(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
  header, data = {}, b""
  for name, array in tensors.items():
    raw = array.tobytes()
    header[name] = {
      "dtype": kinds[array.dtype], "shape": list(array.shape),
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def official(golden, tmp_path) -> pathlib.Path:
  """A copy of the golden folder that a test may damage."""
  folder = tmp_path / "official"
  folder.mkdir()
  for name in ("ema.safetensors", "ae.safetensors", *(f"{x}_config.json" for x in
               ("llm", "vit", "bagel"))):
    shutil.copyfile(golden / name, folder / name)
  return folder


# The list of the released checkpoint, written out by hand from its published key listing.


def released_ema() -> dict[str, tuple[int, ...]]:
  shapes = {
    "language_model.model.embed_tokens.weight": (152064, 3584),
    "language_model.lm_head.weight": (152064, 3584),
    "language_model.model.norm.weight": (3584,),
    "language_model.model.norm_moe_gen.weight": (3584,),
    "time_embedder.mlp.0.weight": (3584, 256),
    "time_embedder.mlp.0.bias": (3584,),
    "time_embedder.mlp.2.weight": (3584, 3584),
    "time_embedder.mlp.2.bias": (3584,),
    "vae2llm.weight": (3584, 64),
    "vae2llm.bias": (3584,),
    "llm2vae.weight": (64, 3584),
    "llm2vae.bias": (64,),
    "latent_pos_embed.pos_embed": (4096, 3584),
    "vit_pos_embed.pos_embed": (4900, 3584),
    "connector.fc1.weight": (3584, 1152),
    "connector.fc1.bias": (3584,),
    "connector.fc2.weight": (3584, 3584),
    "connector.fc2.bias": (3584,),
    "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 588),
    "vit_model.vision_model.embeddings.patch_embedding.bias": (1152,),
    "vit_model.vision_model.embeddings.position_embedding.weight": (4900, 1152),
    "vit_model.vision_model.post_layernorm.weight": (1152,),
    "vit_model.vision_model.post_layernorm.bias": (1152,),
  }
  for layer in range(28):
    for e in ("", "_moe_gen"):
      shapes |= {
        f"language_model.model.layers.{layer}.{name}": shape
        for name, shape in {
          f"input_layernorm{e}.weight": (3584,),
          f"post_attention_layernorm{e}.weight": (3584,),
          f"self_attn.q_proj{e}.weight": (3584, 3584),
          f"self_attn.q_proj{e}.bias": (3584,),
          f"self_attn.k_proj{e}.weight": (512, 3584),
          f"self_attn.k_proj{e}.bias": (512,),
          f"self_attn.v_proj{e}.weight": (512, 3584),
          f"self_attn.v_proj{e}.bias": (512,),
          f"self_attn.o_proj{e}.weight": (3584, 3584),
          f"self_attn.q_norm{e}.weight": (128,),
          f"self_attn.k_norm{e}.weight": (128,),
          f"mlp{e}.gate_proj.weight": (18944, 3584),
          f"mlp{e}.up_proj.weight": (18944, 3584),
          f"mlp{e}.down_proj.weight": (3584, 18944),
        }.items()
      }
  for layer in range(26):
    start = f"vit_model.vision_model.encoder.layers.{layer}"
    for name in ("layer_norm1", "layer_norm2"):
      shapes |= {f"{start}.{name}.{x}": (1152,) for x in ("weight", "bias")}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      shapes[f"{start}.self_attn.{name}.weight"] = (1152, 1152)
      shapes[f"{start}.self_attn.{name}.bias"] = (1152,)
    shapes |= {
      f"{start}.mlp.fc1.weight": (4304, 1152), f"{start}.mlp.fc1.bias": (4304,),
      f"{start}.mlp.fc2.weight": (1152, 4304), f"{start}.mlp.fc2.bias": (1152,),
    }
  return shapes


def released_ae() -> dict[str, tuple[int, ...]]:
  shapes = {}

  def conv(name, inputs, outputs, kernel=3):
    shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
    shapes[f"{name}.bias"] = (outputs,)

  def norm(name, size):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

  def block(name, inputs, outputs):
    norm(f"{name}.norm1", inputs)
    conv(f"{name}.conv1", inputs, outputs)
    norm(f"{name}.norm2", outputs)
    conv(f"{name}.conv2", outputs, outputs)

  for side in ("encoder", "decoder"):
    block(f"{side}.mid.block_1", 512, 512)
    block(f"{side}.mid.block_2", 512, 512)
    norm(f"{side}.mid.attn_1.norm", 512)
    for name in ("q", "k", "v", "proj_out"):
      conv(f"{side}.mid.attn_1.{name}", 512, 512, 1)
  conv("encoder.conv_in", 3, 128)
  for level, (inputs, outputs) in enumerate([(128, 128), (128, 256), (256, 512), (512, 512)]):
    block(f"encoder.down.{level}.block.0", inputs, outputs)
    block(f"encoder.down.{level}.block.1", outputs, outputs)
  conv("encoder.down.1.block.0.nin_shortcut", 128, 256, 1)
  conv("encoder.down.2.block.0.nin_shortcut", 256, 512, 1)
  for level, size in enumerate([128, 256, 512]):
    conv(f"encoder.down.{level}.downsample.conv", size, size)
  norm("encoder.norm_out", 512)
  conv("encoder.conv_out", 512, 32)
  conv("decoder.conv_in", 16, 512)
  for level, inputs, outputs in [(3, 512, 512), (2, 512, 512), (1, 512, 256), (0, 256, 128)]:
    block(f"decoder.up.{level}.block.0", inputs, outputs)
    block(f"decoder.up.{level}.block.1", outputs, outputs)
    block(f"decoder.up.{level}.block.2", outputs, outputs)
  conv("decoder.up.1.block.0.nin_shortcut", 512, 256, 1)
  conv("decoder.up.0.block.0.nin_shortcut", 256, 128, 1)
  for level, size in [(3, 512), (2, 512), (1, 256)]:
    conv(f"decoder.up.{level}.upsample.conv", size, size)
  norm("decoder.norm_out", 128)
  conv("decoder.conv_out", 128, 3)
  return shapes


@pytest.mark.parametrize(
  "part, released, tensors, elements",
  [
    ("bagel", released_ema, 1223, 14_607_260_128),
    ("vae", released_ae, 244, 83_819_683),
  ],
)
def test_table_is_the_released_checkpoint(part, released, tensors, elements):
  leaves = weights.table(config_lib.bagel_7b(), (part,))
  ours = [(name, leaf.official_shape) for leaf in leaves for name in leaf.names]
  assert len(ours) == tensors
  assert dict(ours) == released()
  assert sum(math.prod(leaf.shape) for leaf in leaves) == elements


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_table_fills_exactly_the_parameters_of_the_modules(size, config):
  config = config if size == "tiny" else config_lib.bagel_7b()
  key = jax.random.key(0)
  network = bagel.Bagel(config, image_markers=(0, 1))
  autoencoder = vae.VAE(config.vae)
  image = jax.ShapeDtypeStruct((1, 16, 16, config.vae.in_channels), jnp.float32)
  made = {
    "bagel": jax.eval_shape(network.init, key, bagel.example_batch(config))["params"],
    "vae": jax.eval_shape(autoencoder.init, key, image)["params"],
  }
  shapes = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  unboxed = jax.tree.map(lambda x: getattr(x, "value", x), made,
                         is_leaf=lambda x: hasattr(x, "value"))
  expected = {"/".join(leaf.path): leaf.shape for leaf in weights.table(config)}
  assert shapes(unboxed) == expected


def test_transforms_element_by_element(golden, params):
  """Heads are head-major rows, Linear is transposed, convolutions become HWIO."""
  ema, ae = read_raw(golden / "ema.safetensors"), read_raw(golden / "ae.safetensors")
  H = 16
  theirs = "language_model.model.layers.1.self_attn"
  und, gen = (params["bagel"]["layers"][expert]["attention"] for expert in ("und", "gen"))
  k = ema[f"{theirs}.k_proj_moe_gen.weight"]  # [K*H, D]
  assert gen["k"]["kernel"][1, 5, 1, 3] == k[1 * H + 3, 5]
  assert gen["k"]["bias"][1, 1, 3] == ema[f"{theirs}.k_proj_moe_gen.bias"][1 * H + 3]
  o = ema[f"{theirs}.o_proj.weight"]  # [D, N*H]
  assert und["o"]["kernel"][1, 2, 7, 9] == o[9, 2 * H + 7]
  gate = ema["language_model.model.layers.0.mlp_moe_gen.gate_proj.weight"]  # [F, D]
  assert params["bagel"]["layers"]["gen"]["mlp"]["gate"]["kernel"][0, 4, 11] == gate[11, 4]
  embed = ema["language_model.model.embed_tokens.weight"]
  np.testing.assert_array_equal(params["bagel"]["embed_tokens"]["embedding"], embed)
  conv = ae["encoder.down.2.block.0.conv1.weight"]  # [out, in, kh, kw]
  ours = params["vae"]["encoder"]["down_2_block_0"]["conv1"]["kernel"]
  assert ours[0, 2, 5, 6] == conv[6, 5, 0, 2]
  scale = params["vae"]["decoder"]["norm_out"]["scale"]
  np.testing.assert_array_equal(scale, ae["decoder.norm_out.weight"])


def test_every_transform_has_its_inverse(golden, config, params):
  raw = read_raw(golden / "ema.safetensors") | read_raw(golden / "ae.safetensors")
  for leaf in weights.table(config):
    array = np.asarray(weights.lookup(params, leaf.path))
    for layer, name in enumerate(leaf.names):
      ours = leaf.to_official(array[layer] if leaf.stacked else array)
      np.testing.assert_array_equal(ours, raw.pop(name), err_msg=name)
  assert not raw


def test_sharded_equals_whole_and_reads_only_its_slices(golden, params, monkeypatch):
  """Two-way over D and over heads: no read may exceed a quarter of a tensor split both ways."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  spec = jax.sharding.PartitionSpec
  sharding = lambda *axes: jax.sharding.NamedSharding(mesh, spec(*axes))
  shardings = jax.tree.map(lambda x: sharding(), params)
  attention = shardings["bagel"]["layers"]["gen"]["attention"]
  attention["q"]["kernel"] = sharding(None, "fsdp", "tensor")
  attention["o"]["kernel"] = sharding("data", "tensor", None, "fsdp")
  attention["v"]["kernel"] = sharding(None, None, None, "tensor")  # inside a head
  shardings["vae"]["encoder"]["conv_in"]["kernel"] = sharding(None, None, None, "fsdp")
  read, largest, calls = safetensors_files.SafetensorsFile.read, {}, {}

  def recorded(self, name, index=()):
    result = read(self, name, index)
    largest[name] = max(largest.get(name, 0), result.size)
    calls[name] = calls.get(name, 0) + 1
    return result

  monkeypatch.setattr(safetensors_files.SafetensorsFile, "read", recorded)
  sharded = folders.open_folder(golden).load_params(shardings=shardings)

  def compare(a, b, sharding):
    np.testing.assert_array_equal(a, b)
    assert b.sharding == sharding

  jax.tree.map(compare, params, sharded, shardings)
  q = "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight"
  assert largest[q] == 64 * 64 // 4
  # Four different slices on eight devices: each is read once, not once a replica.
  assert calls[q] == 4


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), ("fsdp", None), (None, None)])
def test_a_host_holds_one_shard_at_a_time(golden, config, params, spec, monkeypatch):
  """Numbers read from the files and not yet handed to their devices, at any moment."""
  mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  where = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  shardings = jax.tree.map(lambda x: where(), {"bagel": params["bagel"]})
  shardings["bagel"]["layers"]["gen"]["mlp"]["gate"]["kernel"] = where(None, *spec)
  # The table's own row only: a file read is a layer of a shard, on top of it.
  (leaf,) = [x for x in weights.table(config) if x.path[1:] == ("layers", "gen", "mlp", "gate",
                                                               "kernel")]
  read, put, live, most = weights.OfficialReader.read, jax.device_put, [0], [0]

  def counted(self, wanted, *arguments):
    array = read(self, wanted, *arguments)
    if wanted == leaf:
      live[0] += array.size
      most[0] = max(most[0], live[0])
      weakref.finalize(array, lambda size=array.size: live.__setitem__(0, live[0] - size))
    return array

  monkeypatch.setattr(weights.OfficialReader, "read", counted)
  # As an accelerator does; the CPU backend would keep the host's own array.
  monkeypatch.setattr(jax, "device_put", lambda x, place: put(np.array(x), place))
  loaded = folders.open_folder(golden).load_params(shardings=shardings, parts=("bagel",))
  kernel = weights.lookup(loaded, leaf.path)
  assert most[0] == kernel.addressable_shards[0].data.size
  assert live[0] == 0


def test_dtype_by_part_and_widening(official):
  """bfloat16 files load as bfloat16; a stack of two dtypes becomes the float32 that holds both."""
  path = official / "ema.safetensors"
  tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in read_raw(path).items()}
  mixed = "language_model.model.layers.1.mlp.up_proj.weight"
  tensors[mixed] = tensors[mixed].astype(np.float16)
  write_raw(path, tensors)
  params = folders.open_folder(official).load_params()
  up = params["bagel"]["layers"]["und"]["mlp"]["up"]["kernel"]
  assert up.dtype == jnp.float32
  np.testing.assert_array_equal(up[1], tensors[mixed].astype(np.float32).T)
  down = params["bagel"]["layers"]["und"]["mlp"]["down"]["kernel"]
  assert down.dtype == jnp.bfloat16
  theirs = tensors["language_model.model.layers.0.mlp.down_proj.weight"]
  np.testing.assert_array_equal(np.asarray(down[0]), theirs.T)
  by_part = folders.open_folder(official).load_params(dtype={"bagel": jnp.float16})
  assert {x.dtype for x in jax.tree.leaves(by_part["bagel"])} == {jnp.dtype(jnp.float16)}
  assert {x.dtype for x in jax.tree.leaves(by_part["vae"])} == {jnp.dtype(jnp.float32)}


def test_one_part_needs_only_its_own_file(official):
  (official / "ema.safetensors").unlink()
  assert set(folders.open_folder(official).load_params(parts=("vae",))) == {"vae"}


def message(folder: pathlib.Path) -> str:
  """The one-line complaint about loading `folder`."""
  with pytest.raises(errors.InputError) as info:
    folders.open_folder(folder).load_params()
  text = str(info.value)
  assert "\n" not in text
  return text


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_broken_files(official, name):
  path = official / name
  good = path.read_bytes()
  path.write_bytes(good[:-1000])
  assert name in message(official) and "truncated" in message(official)
  path.write_bytes(good[:100])
  assert "truncated" in message(official)
  path.write_bytes(good + b"\0\0")
  assert "2 bytes too long" in message(official)
  path.write_bytes(b"<html>not found</html>" * 10)
  assert "not a safetensors file" in message(official)
  path.write_bytes(struct.pack("<Q", 16) + b'{"a": [not json}')
  assert "not a safetensors file" in message(official)
  path.write_bytes(b"abc")
  assert "not a safetensors file" in message(official)
  path.unlink()
  assert f"{name}: file not found" in message(official)


def test_offsets_that_contradict_the_shape(official):
  path = official / "ae.safetensors"
  header = {"decoder.conv_in.bias": {"dtype": "F32", "shape": [64], "data_offsets": [0, 128]}}
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(128))
  assert "decoder.conv_in.bias" in message(official)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("[" * 100_000, "unreadable header"),
    ('{"a": 3}', "tensor a is described by 3, not by a dtype of F32, BF16, F16, a shape and"),
    ('{"a": {"shape": [1], "data_offsets": [0, 4]}}', "tensor a is described by {'shape': [1]"),
    ('{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', "tensor a is described by {'dtype': "),
    ('{"a": {"dtype": "F32", "shape": [1]}}', "'shape': [1]}, not by"),
    ('{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "{'dtype': [], "),
    ('{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}', "{'dtype': 'F8', "),
    ('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', "'shape': [inf]"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}', "[0, inf]}"),
    ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "'shape': [-1]"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "'data_offsets': [0]}"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "[4, 0]}, not by"),
  ],
)
def test_headers_that_cannot_be(official, text, expected):
  path = official / "ae.safetensors"
  path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
  assert expected in message(official) and "ae.safetensors: " in message(official)


@pytest.mark.parametrize("rows_bytes", [1, 1000, 2**24])
def test_any_slice_is_read(golden, rows_bytes, monkeypatch):
  """Whole rows, columns, and a system that gives a few bytes at a time."""
  monkeypatch.setattr(safetensors_files, "_ROWS_BYTES", rows_bytes)
  preadv = os.preadv
  monkeypatch.setattr(
    os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:1700]], offset)
  )
  rng = np.random.default_rng(0)
  for file in ("ema.safetensors", "ae.safetensors"):
    raw = read_raw(golden / file)
    with safetensors_files.SafetensorsFile(golden / file) as opened:
      for name in rng.choice(sorted(raw), 20):
        array = raw[name]
        np.testing.assert_array_equal(opened.read(name), array)
        ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in array.shape]
        index = tuple(slice(*pair) for pair in ends)
        for part in (index, index[:1], (slice(None), *index[1:])):
          piece = opened.read(name, part)
          np.testing.assert_array_equal(piece, array[part])
          assert piece.dtype == array.dtype and piece.shape == array[part].shape


def test_file_that_shrinks_while_it_is_read(official):
  path = official / "ae.safetensors"
  with safetensors_files.SafetensorsFile(path) as file:
    last = max(file.entries, key=lambda name: file.entries[name].start)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(errors.InputError, match="ae.safetensors: ends at byte .* shorter"):
      file.read(last)


@pytest.mark.parametrize("start", [4, 12])
def test_overlapping_tensors_and_gaps(official, start):
  path = official / "ae.safetensors"
  header = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]},
  }
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(start + 8))
  assert f"tensor b starts at {start}" in message(official)


def test_missing_unused_and_misshapen_tensors(official):
  path = official / "ema.safetensors"
  tensors = read_raw(path)
  tensors["vae2llm.extra"] = np.zeros(3, np.float32)
  del tensors["llm2vae.bias"]
  tensors["connector.fc1.bias"] = np.zeros(65, np.float32)
  write_raw(path, tensors)
  text = message(official)
  assert "1 missing: llm2vae.bias [16]" in text
  assert "1 unused: vae2llm.extra [3]" in text
  assert "1 wrong shape: connector.fc1.bias is [65] in the file but [64]" in text


@pytest.mark.parametrize(
  "file, key, value, expected",
  [
    ("llm_config.json", "hidden_size", 128,
     "language_model.model.layers.0.input_layernorm.weight is [64] in the file but [128]"),
    ("llm_config.json", "num_hidden_layers", 3,
     "28 missing: language_model.model.layers.2.input_layernorm.weight [64]"),
    ("llm_config.json", "num_hidden_layers", 1, "28 unused: language_model.model.layers.1."),
    ("llm_config.json", "vocab_size", 301,
     "language_model.model.embed_tokens.weight is [300, 64] in the file but [301, 64]"),
    ("vit_config.json", "intermediate_size", 104,
     "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight is [100, 48] in the file"),
  ],
)
def test_config_that_contradicts_the_weights(official, file, key, value, expected):
  path = official / file
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  text = message(official)
  assert expected in text and file in text


def test_long_lists_are_cut_to_ten(official):
  path = official / "llm_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 9}))
  text = message(official)
  assert f"{7 * 28} missing" in text and text.count("language_model.model.layers.") == 10


def test_folder_of_neither_kind(tmp_path):
  with pytest.raises(errors.InputError, match="not a BAGEL folder"):
    folders.open_folder(tmp_path)
  with pytest.raises(errors.InputError, match="no such folder"):
    folders.open_folder(tmp_path / "absent")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (300, 257), (257, 300)])
def test_contiguous_is_a_plain_copy(dtype, shape):
  array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
  np.testing.assert_array_equal(safetensors_files.contiguous(array.T), array.T)
  assert safetensors_files.contiguous(array.T).flags.c_contiguous
