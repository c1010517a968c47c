"""One table between official BAGEL tensors and our parameter tree, both ways.

Names and shapes are those of ByteDance-Seed/BAGEL-7B-MoT. Every transform is one transpose of the
official axes and a split of some into heads, so a slice of a parameter is one of its tensor.

Letters: L layers, D model width, N query heads, K kv heads, H head dim, F ffn width, V vocab,
C latent features; the same of the vision tower with suffix v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.models import safetensors_files, weight_files

FILES = weight_files.FILES
PARTS = tuple(FILES)
# What decides the shapes of the tensors whose name starts so; longest names first.
_CONFIG_FILES = (
  ("language_model.", "llm_config.json"), ("vit_model.", "vit_config.json"),
  ("connector.fc1.weight", "vit_config.json or llm_config.json"),
  ("connector.", "llm_config.json"), ("time_embedder.", "llm_config.json"),
  ("", "bagel_config.json (or, without that file, the released model)"),
)

# Of what the network sees with: a fine-tune for drawing alone leaves it out.
_VISION = ("vit_model.", "connector.", "vit_pos_embed.")

Index = tuple[slice, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter and the official tensors that fill it."""

  path: Path  # keys into the parameter tree; the first is the part
  names: tuple[str, ...]  # official tensors, one a layer when `stacked`, else one
  axes: tuple[tuple[int, ...], ...]  # ours without L, grouped by the official axis they split
  order: tuple[int, ...]  # order[i] is the official axis of group i
  stacked: bool = False  # has a leading L axis

  @property
  def file(self) -> str:
    return FILES[self.path[0]]

  @property
  def layer_shape(self) -> tuple[int, ...]:
    """Shape of one layer of the parameter."""
    return tuple(size for group in self.axes for size in group)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter, L first when stacked."""
    return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

  @property
  def official_shape(self) -> tuple[int, ...]:
    sizes = dict(zip(self.order, (math.prod(group) for group in self.axes)))
    return tuple(sizes[axis] for axis in range(len(self.order)))

  def to_official(self, layer: np.ndarray) -> np.ndarray:
    """One layer of the parameter -> its official tensor; also for a slice of whole heads."""
    sizes, position = [], 0
    for group in self.axes:
      sizes.append(math.prod(layer.shape[position : position + len(group)]))
      position += len(group)
    return layer.reshape(sizes).transpose(np.argsort(self.order))

  @property
  def row_axis(self) -> int:
    """Our axis, L not counted, along which consecutive slices are consecutive rows of the file."""
    group = self.order.index(0)
    return sum(len(axes) for axes in self.axes[:group])

  def read_layer(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
    """One layer of `parameter[index]`, cut out of the official slice that `read` gives.

    Only the first axis of a group narrows that slice: splitting heads over devices does.
    """
    official = [slice(None)] * len(self.order)
    sizes: list[int] = []
    rest: list[slice] = []
    for group, axis in zip(self.axes, self.order):
      position = len(sizes)
      start, stop, _ = index[position].indices(group[0])
      inner = math.prod(group[1:])
      official[axis] = slice(start * inner, stop * inner)
      sizes += [stop - start, *group[1:]]
      rest += [slice(None), *index[position + 1 : position + len(group)]]
    tensor = read(tuple(official))
    turned = safetensors_files.contiguous(tensor.transpose(self.order))
    return turned.reshape(sizes)[tuple(rest)]


def _leaf(source: str, target: str, axes, order) -> Leaf:
  """A leaf before `table` adds its part and its layers: `source` may hold `{layer}`."""
  return Leaf(tuple(target.split("/")), (source,), axes, order)


def _vector(source: str, target: str, *sizes: int) -> Leaf:
  """A bias or scale, one official axis, split into `sizes`."""
  return _leaf(source, target, (sizes,), (0,))


def _matrix(source: str, target: str, rows: int, columns: int) -> Leaf:
  """An embedding table, stored as we keep it."""
  return _leaf(source, target, ((rows,), (columns,)), (0, 1))


def _linear(source, target, inputs: Sequence[int], outputs: Sequence[int], *, bias=True):
  """A torch Linear: weight [out, in] becomes a kernel [*inputs, *outputs]."""
  axes = (tuple(inputs), tuple(outputs))
  yield _leaf(f"{source}.weight", f"{target}/kernel", axes, (1, 0))
  if bias:
    yield _vector(f"{source}.bias", f"{target}/bias", *outputs)


def _norm(source: str, target: str, size: int, *, bias: bool = True) -> Iterator[Leaf]:
  """LayerNorm or GroupNorm; RMSNorm without bias."""
  yield _vector(f"{source}.weight", f"{target}/scale", size)
  if bias:
    yield _vector(f"{source}.bias", f"{target}/bias", size)


def _conv(source: str, target: str, inputs: int, outputs: int, kernel: int) -> Iterator[Leaf]:
  """A torch Conv2d: weight [out, in, kh, kw] becomes [kh, kw, in, out]."""
  axes = ((kernel,), (kernel,), (inputs,), (outputs,))
  yield _leaf(f"{source}.weight", f"{target}/kernel", axes, (2, 3, 1, 0))
  yield _vector(f"{source}.bias", f"{target}/bias", outputs)


def _llm_layers(llm) -> Iterator[Leaf]:
  D, F, H = llm.hidden_size, llm.intermediate_size, llm.head_dim
  N, K = llm.num_heads, llm.num_kv_heads
  source = "language_model.model.layers.{layer}"
  for expert, suffix in (("layers/und", ""), ("layers/gen", "_moe_gen")):
    attention, mlp = f"{source}.self_attn", f"{source}.mlp{suffix}"
    for name in ("input", "post_attention"):
      yield from _norm(f"{source}.{name}_layernorm{suffix}", f"{expert}/{name}_norm", D, bias=False)
    target = f"{expert}/attention"
    for name, heads in (("q", N), ("k", K), ("v", K)):
      yield from _linear(f"{attention}.{name}_proj{suffix}", f"{target}/{name}", (D,), (heads, H))
    yield from _linear(f"{attention}.o_proj{suffix}", f"{target}/o", (N, H), (D,), bias=False)
    for name in ("q_norm", "k_norm"):
      yield from _norm(f"{attention}.{name}{suffix}", f"{target}/{name}", H, bias=False)
    for name, wide, out in (("gate", D, F), ("up", D, F), ("down", F, D)):
      yield from _linear(f"{mlp}.{name}_proj", f"{expert}/mlp/{name}", (wide,), (out,), bias=False)


def _vit_layers(vit) -> Iterator[Leaf]:
  Dv, Fv, Nv, Hv = vit.hidden_size, vit.intermediate_size, vit.num_heads, vit.head_dim
  source, target = "vit_model.vision_model.encoder.layers.{layer}", "vit/layers"
  yield from _norm(f"{source}.layer_norm1", f"{target}/norm1", Dv)
  yield from _norm(f"{source}.layer_norm2", f"{target}/norm2", Dv)
  attention = f"{source}.self_attn"
  for name in ("q", "k", "v"):
    yield from _linear(f"{attention}.{name}_proj", f"{target}/attention/{name}", (Dv,), (Nv, Hv))
  yield from _linear(f"{attention}.out_proj", f"{target}/attention/out", (Nv, Hv), (Dv,))
  yield from _linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1", (Dv,), (Fv,))
  yield from _linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2", (Fv,), (Dv,))


def _bagel_rest(config) -> Iterator[Leaf]:
  """Everything of `ema.safetensors` outside the two layer stacks."""
  llm, vit = config.llm, config.vit
  D, V, Dv, C = llm.hidden_size, llm.vocab_size, vit.hidden_size, config.latent_dim
  yield _matrix("language_model.model.embed_tokens.weight", "embed_tokens/embedding", V, D)
  yield from _linear("language_model.lm_head", "lm_head", (D,), (V,), bias=False)
  yield from _norm("language_model.model.norm", "norm/und", D, bias=False)
  yield from _norm("language_model.model.norm_moe_gen", "norm/gen", D, bias=False)
  tower = "vit_model.vision_model"
  patches, positions = (f"{tower}.embeddings.{kind}_embedding" for kind in ("patch", "position"))
  yield from _linear(patches, "vit/patch_embed", (vit.patch_dim,), (Dv,))
  yield _matrix(f"{positions}.weight", "vit/position_embed/embedding", vit.num_positions, Dv)
  yield from _norm(f"{tower}.post_layernorm", "vit/post_norm", Dv)
  yield from _linear("connector.fc1", "connector/fc1", (Dv,), (D,))
  yield from _linear("connector.fc2", "connector/fc2", (D,), (D,))
  # 256: features of the sinusoidal time embedding, fixed in the official class.
  yield from _linear("time_embedder.mlp.0", "time_embedder/fc1", (256,), (D,))
  yield from _linear("time_embedder.mlp.2", "time_embedder/fc2", (D,), (D,))
  yield from _linear("vae2llm", "vae2llm", (C,), (D,))
  yield from _linear("llm2vae", "llm2vae", (D,), (C,))
  sides = {"latent": config.max_latent_size, "vit": config.vit_max_patches_per_side}
  for name, side in sides.items():
    yield _matrix(f"{name}_pos_embed.pos_embed", f"{name}_pos_embed/embedding", side**2, D)


def _res_block(source: str, target: str, inputs: int, outputs: int) -> Iterator[Leaf]:
  yield from _norm(f"{source}.norm1", f"{target}/norm1", inputs)
  yield from _conv(f"{source}.conv1", f"{target}/conv1", inputs, outputs, 3)
  yield from _norm(f"{source}.norm2", f"{target}/norm2", outputs)
  yield from _conv(f"{source}.conv2", f"{target}/conv2", outputs, outputs, 3)
  if inputs != outputs:
    yield from _conv(f"{source}.nin_shortcut", f"{target}/nin_shortcut", inputs, outputs, 1)


def _vae_middle(side: str, width: int) -> Iterator[Leaf]:
  for block in (1, 2):
    yield from _res_block(f"{side}.mid.block_{block}", f"{side}/mid_block_{block}", width, width)
  source, target = f"{side}.mid.attn_1", f"{side}/mid_attention"
  yield from _norm(f"{source}.norm", f"{target}/norm", width)
  for name in ("q", "k", "v", "proj_out"):
    yield from _conv(f"{source}.{name}", f"{target}/{name}", width, width, 1)


def _vae(vae) -> Iterator[Leaf]:
  widths = [vae.ch * factor for factor in vae.ch_mult]
  last = len(widths) - 1
  yield from _conv("encoder.conv_in", "encoder/conv_in", vae.in_channels, vae.ch, 3)
  width = vae.ch
  for level, outputs in enumerate(widths):
    for block in range(vae.num_res_blocks):
      yield from _res_block(
        f"encoder.down.{level}.block.{block}", f"encoder/down_{level}_block_{block}", width, outputs
      )
      width = outputs
    if level != last:
      yield from _conv(
        f"encoder.down.{level}.downsample.conv", f"encoder/down_{level}_downsample", width, width, 3
      )
  yield from _vae_middle("encoder", width)
  yield from _norm("encoder.norm_out", "encoder/norm_out", width)
  # Mean and log-variance, one after the other on the channel axis.
  yield from _conv("encoder.conv_out", "encoder/conv_out", width, 2 * vae.z_channels, 3)

  yield from _conv("decoder.conv_in", "decoder/conv_in", vae.z_channels, width, 3)
  yield from _vae_middle("decoder", width)
  for level, outputs in reversed(list(enumerate(widths))):
    for block in range(vae.num_res_blocks + 1):
      yield from _res_block(
        f"decoder.up.{level}.block.{block}", f"decoder/up_{level}_block_{block}", width, outputs
      )
      width = outputs
    if level:
      yield from _conv(
        f"decoder.up.{level}.upsample.conv", f"decoder/up_{level}_upsample", width, width, 3
      )
  yield from _norm("decoder.norm_out", "decoder/norm_out", width)
  yield from _conv("decoder.conv_out", "decoder/conv_out", width, vae.out_channels, 3)


def table(config, parts: Sequence[str] = PARTS) -> tuple[Leaf, ...]:
  """Every parameter of `parts` of a `BagelConfig`, with the official tensors that fill it."""
  leaves: list[Leaf] = []

  def add(part: str, rows: Iterator[Leaf], layers: int | None = None) -> None:
    for row in rows:
      [name], path = row.names, (part, *row.path)
      if layers is not None:
        names = tuple(name.replace("{layer}", str(layer)) for layer in range(layers))
        row = dataclasses.replace(row, names=names, stacked=True)
      leaves.append(dataclasses.replace(row, path=path))

  if "bagel" in parts:
    add("bagel", _llm_layers(config.llm), config.llm.num_layers)
    add("bagel", _vit_layers(config.vit), config.vit.num_layers)
    add("bagel", _bagel_rest(config))
  if "vae" in parts:
    add("vae", _vae(config.vae))
  return tuple(leaves)


def lookup(nested: Mapping[str, Any], path: Path) -> Any:
  """Value at `path` of nested dicts; KeyError when absent."""
  for key in path:
    nested = nested[key]
  return nested


class OfficialReader(contextlib.ExitStack):
  """The parameters of an official folder, checked against the table when opened.

  `leaves` is the table of `parts`, `files` is {file name in the release: its Tensors}.

  Raises:
    InputError: a file is missing, broken, or does not match the config.
  """

  def __init__(
    self, folder: pathlib.Path, config, parts: Sequence[str] = PARTS,
    *, observe: Callable[[str, np.ndarray], None] = lambda name, rows: None,
    fallback: pathlib.Path | None = None,
  ):
    """Opens the files of `folder`, and those of the official folder `fallback` for what it lacks.

    `observe` gets whatever is read from the files: a tensor's name and a slice of it.
    """
    super().__init__()
    self._observe = observe
    self.leaves = table(config, parts)
    self.files: dict[str, weight_files.Tensors] = {}
    self.filled: list[str] = []  # names of tensors of the fallback
    try:
      for name in (FILES[part] for part in parts):
        leaves = [leaf for leaf in self.leaves if leaf.file == name]
        file = self.enter_context(weight_files.Tensors(folder, name, fallback))
        if fallback is not None:
          other = self.enter_context(weight_files.Tensors(fallback, name))
          self.filled += file.fill_from(other, [name for leaf in leaves for name in leaf.names])
        _check(file, leaves)
        self.files[name] = file
    except BaseException:
      self.close()
      raise

  def dtype(self, leaf: Leaf) -> np.dtype:
    """Dtype of the parameter: its tensors' own, or float32 where layers are stored differently."""
    entries = self.files[leaf.file].entries
    dtypes = {entries[name].dtype for name in leaf.names}
    # float32 holds bfloat16 and float16 exactly, so export still returns the bytes that came in.
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

  def read(self, leaf: Leaf, index: Index = (), dtype: Any = None) -> np.ndarray:
    """`parameter[index]` cast to `dtype`, reading only what it needs, one layer at a time."""
    file = self.files[leaf.file]
    index = (*index, *(slice(None),) * (len(leaf.shape) - len(index)))
    shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape)]
    out = np.empty(shape, dtype if dtype is not None else self.dtype(leaf))

    def read(name: str, part: Index) -> np.ndarray:
      tensor = file.read(name, part)
      self._observe(name, tensor)
      return tensor

    names, targets, inner = leaf.names, [out], index
    if leaf.stacked:
      names, targets, inner = leaf.names[index[0]], out, index[1:]
    for name, target in zip(names, targets):
      target[...] = leaf.read_layer(functools.partial(read, name), inner)
    return out


def _check(file: weight_files.Tensors, leaves: Sequence[Leaf]) -> None:
  """Refuses a file whose tensors are not those of the table; names the first ten of each kind."""
  expected = {name: leaf.official_shape for leaf in leaves for name in leaf.names}
  actual = {name: entry.shape for name, entry in file.entries.items()}
  lines = mismatches(actual, expected, config_file)
  if not lines:
    return
  merge = (
    f"take them from the model that it was tuned from: python -m unigrpo_jax.convert --source="
    f"{file.path.parent} --missing_from=BAGEL-7B-MoT --target=FOLDER"
  )
  missing = [name for name in expected if name not in actual]
  if len(lines) == 1 and missing and all(name.startswith(_VISION) for name in missing):
    raise errors.InputError(
      f"{file.path}: a model that draws and does not see: the {len(missing)} tensors of its vision "
      f"tower ({', '.join(prefix[:-1] for prefix in _VISION)}) are missing; {merge}"
    )
  advice = "correct the config file, or use the weights that belong to it"
  if any(".lora_" in name for name in actual):
    advice = "these are LoRA adapters, not a model: give them to --adapter or config.lora.adapter"
  elif len(lines) == 1 and missing:
    advice = f"{advice}, or {merge}"
  raise errors.InputError(
    f"{file.path}: the tensors do not match the config: {' | '.join(lines)} | {advice}"
  )


def mismatches(
  actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]],
  config_file: Callable[[str], str],
) -> list[str]:
  """How tensors of a file are not those expected, both {name: shape}: a text for each kind.

  `config_file` gives the file that decides the shape of a tensor.
  """
  problems = {
    "wrong shape": [
      f"{name} is {list(actual[name])} in the file but {list(shape)} by {config_file(name)}"
      for name, shape in expected.items() if actual.get(name, shape) != shape
    ],
    "missing": [
      f"{name} {list(shape)} asked for by {config_file(name)}"
      for name, shape in expected.items() if name not in actual
    ],
    "unused": [
      f"{name} {list(shape)} not asked for by {config_file(name)}"
      for name, shape in actual.items() if name not in expected
    ],
  }
  return [
    f"{len(names)} {title}: {'; '.join(names[:10])}{'; ...' if len(names) > 10 else ''}"
    for title, names in problems.items() if names
  ]


def config_file(name: str) -> str:
  """The file of a BAGEL folder that decides the shape of official tensor `name`."""
  return next(file for prefix, file in _CONFIG_FILES if name.startswith(prefix))


def load(reader, leaf: Leaf, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """One parameter, read and placed a shard at a time; `dtype` None keeps the stored one.

  `reader` has `dtype(leaf)` and `read(leaf, index, dtype)`, as `OfficialReader`.
  `jax.make_array_from_callback` would hold all of a host's shards at once.
  """
  dtype = dtype if dtype is not None else reader.dtype(leaf)
  holders: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    key = tuple(part.indices(size) for part, size in zip(index, leaf.shape))
    holders.setdefault(key, []).append(device)
  shards = []
  for key, devices in holders.items():  # replicas hold the same slice: it is read once
    host = reader.read(leaf, tuple(slice(*part) for part in key), dtype)
    for device in devices:
      place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
      shards.append(jax.device_put(host, place))
    # A copy still under way would keep the host's slice alive while the next one is read.
    jax.block_until_ready(shards[-len(devices):])
    del host
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=dtype)
