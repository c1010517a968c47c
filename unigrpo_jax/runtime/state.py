"""A network on its devices, and the state that training changes: shapes, places, first values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from unigrpo_jax import errors, types
from unigrpo_jax.data import files, locks
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.models import adapters, bagel, layers, lowering, safetensors_files, weights
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import checksums, folders, hub, optim, sharding

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
  """Which network is trained, and how it is computed.

  Attributes:
    init_from: official or converted folder.
    random_init: keep its sizes, tokenizer and autoencoder, not its network.
    dtype: of activations, one of DTYPES; trained parameters are float32.
    remat: what the backward pass computes again, one of `layers.REMAT`.
    attention: one of `lowering.ATTENTION`.
    mesh: {axis: size}; fsdp 0 takes all devices that the others leave.
    lora: adapters, or None.
    adapter: folder of the first adapters, which PEFT can read; "": fresh ones.
  """

  init_from: str
  random_init: bool
  dtype: str
  remat: str
  attention: str
  mesh: Mapping[str, int]
  lora: layers.Lora | None = None
  adapter: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A checkpoint's network on a mesh, without weights.

  Attributes:
    folder: it came from.
    tokenizer: its tokenizer.
    model: the `Bagel`.
    mesh: devices.
    device_memory: bytes of one of them; None: not known.
  """

  folder: folders.ModelFolder
  tokenizer: tokenizer_lib.Tokenizer
  model: bagel.Bagel
  mesh: jax.sharding.Mesh
  device_memory: float | None = None

  @property
  def config(self) -> config_lib.BagelConfig:
    return self.folder.config

  def load_vae(self):
    """The autoencoder's parameters, float32."""
    return self.folder.load_params(
      dtype=jnp.float32, parts=("vae",),
      shardings=param_shardings(self.model, self.mesh, ("vae",)),
    )["vae"]


def open_network(spec: NetworkSpec, devices=None) -> Network:
  """Devices, tokenizer and network of a training run.

  Raises:
    InputError: the mesh or the attention does not fit the devices, the dtype is unknown, or the
      folder cannot be used.
  """
  if not spec.init_from:
    raise errors.InputError(
      "config.init_from is empty; give an official or converted folder, or a name of the Hugging "
      "Face hub such as ByteDance-Seed/BAGEL-7B-MoT"
    )
  folder = folders.open_folder(spec.init_from)
  tokenizer = tokenizer_lib.load(folder.files)
  tokenizer.check_fits(folder.config.llm.vocab_size)
  return build_network(spec, folder, tokenizer, devices)


def pinned(spec: NetworkSpec, network: Network) -> dict[str, Any]:
  """{key of the config: fingerprint} of the folders that a run begins with; see `Run`."""
  found = {"init_from": network.folder.fingerprint()}
  adapter = files.path(spec.adapter) if spec.adapter else None
  # Only the first start needs it.
  if adapter and all((adapter / name).is_file() for name in adapters.FILES):
    found["lora.adapter"] = [list(checksums.of(adapter / name)) for name in adapters.FILES]
  return found


def build_network(
  spec: NetworkSpec, folder: folders.ModelFolder, tokenizer, devices=None
) -> Network:
  """The network of a run on its mesh, from its sizes; see `open_network`."""
  devices = jax.devices() if devices is None else devices
  sizes = dict(spec.mesh)
  others = sizes["data"] * sizes["tensor"]
  sizes["fsdp"] = sizes["fsdp"] or max(len(devices) // others, 1)
  mesh = sharding.make_mesh(**sizes, devices=devices)
  model = _bagel(
    folder.config, tokenizer, mesh, spec.attention, dtype=jnp.dtype(spec.dtype), remat=spec.remat,
    lora=spec.lora,
  )
  return Network(folder, tokenizer, model, mesh, sharding.device_memory(devices))


def fewest_tensor_ways(network: Network) -> int:
  """The fewest tensor ways whose share of the parameters takes a quarter of a device, or less.

  The ways divide those of the mesh, and are as many where the memory is not known. Tensor ways
  wait for each other in every layer, but each token reads all that a device holds; the rest of the
  memory is for the state and activations.
  """
  most, memory = network.mesh.shape["tensor"], network.device_memory
  if memory is None:
    return most
  size = _param_bytes(network.config, network.model.dtype)
  fits = (ways for ways in range(1, most) if most % ways == 0 and 4 * size <= ways * memory)
  return next(fits, most)


def _param_bytes(config: config_lib.BagelConfig, dtype) -> int:
  count = sum(math.prod(leaf.shape) for leaf in weights.table(config))
  return count * jnp.dtype(dtype).itemsize


def open_for_sampling(
  path: pathlib.Path | str, *, adapter: pathlib.Path | str | None = None, dtype=None, mesh=None
) -> Network:
  """The network of a folder that is only sampled from; its parameters have the dtype too.

  Args:
    path: official or converted folder.
    adapter: folder of LoRA adapters, which are added to its weights; None for none.
    dtype: of the network; None: float32 on CPU, bfloat16 elsewhere.
    mesh: devices; None: all of them.

  Raises:
    InputError: it is no such folder, or its config or tokenizer cannot be used.
  """
  folder = folders.open_folder(path)
  if adapter is not None:
    folder = dataclasses.replace(folder, adapter=_open_adapter(adapter, folder.config))
  tokenizer = tokenizer_lib.load(folder.files)
  tokenizer.check_fits(folder.config.llm.vocab_size)
  if dtype is None:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  if mesh is None:
    size = _param_bytes(folder.config, dtype)
    mesh = sharding.sampling_mesh(folder.config.llm.num_kv_heads, size)
  model = _bagel(folder.config, tokenizer, mesh, "auto", dtype=dtype, param_dtype=dtype)
  return Network(folder, tokenizer, model, mesh)


def _bagel(config, tokenizer, mesh, attention: str, *, dtype, **options) -> bagel.Bagel:
  return bagel.Bagel(
    config, (tokenizer.vision_start, tokenizer.vision_end), dtype=dtype,
    lowering=lowering.choose(attention, mesh, dtype), **options,
  )


def param_shardings(
  model: bagel.Bagel, mesh: jax.sharding.Mesh, parts: Sequence[str], rules=sharding.RULES
):
  """Shardings of the parameter tree {"bagel": ..., "vae": ...} of `model` on `mesh`."""
  key, c = jax.random.key(0), model.config
  pixels = jnp.zeros((1, c.latent_stride, c.latent_stride, c.vae.in_channels))
  make = {
    "bagel": lambda: model.init(key, bagel.example_batch(c)),
    "vae": lambda: vae_lib.VAE(c.vae).init(key, pixels),
  }
  return {
    part: sharding.shardings(jax.eval_shape(make[part])["params"], mesh, rules) for part in parts
  }


@dataclasses.dataclass(frozen=True, eq=False)
class StateLayout:
  """What a run's state looks like.

  Attributes:
    abstract: shapes, dtypes and shardings.
    shardings: the last of these alone.
    anchor: groups of parameters that the state has a moving average of; see `layout`.
  """

  abstract: types.TrainState
  shardings: types.TrainState
  anchor: Collection[str] = ()


def _stored(params, model: bagel.Bagel):
  """Parameters as they are kept: those under adapters never change, so in the network's dtype."""
  if model.lora is None:
    return params
  return jax.tree.map(
    lambda leaf, group: leaf.astype(model.dtype) if group == "base" else leaf,
    params, optim.groups(params),
  )


def layout(
  network: Network, optimizer: optax.GradientTransformation, *, ema: bool, reference: bool,
  anchor: Collection[str] = (),
) -> StateLayout:
  """The shapes and the shardings of a run's state.

  Args:
    network: what is trained.
    optimizer: of its parameters.
    ema: whether a moving average is kept.
    reference: whether a copy of the first parameters is kept, in the network's own dtype.
    anchor: groups of parameters whose moving average the flow is held near; () for none.
  """
  model = network.model

  def fresh(key) -> types.TrainState:
    params = model.init(key, bagel.example_batch(network.config))["params"]
    return _state_of(
      _stored(params, model), model, optimizer, ema=ema, reference=reference, anchor=anchor
    )

  abstract = jax.eval_shape(fresh, jax.random.key(0))
  where = sharding.shardings(abstract, network.mesh)
  return StateLayout(
    jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      sharding.unbox(abstract), where,
    ), where, anchor,
  )


def _state_of(
  params, model, optimizer, *, ema: bool, reference: bool, anchor: Collection[str]
) -> types.TrainState:
  cast = lambda a: jnp.copy(a).astype(model.dtype)
  return types.TrainState(
    step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    reference=jax.tree.map(cast, params) if reference else None,
    anchor=jax.tree.map(jnp.copy, optim.split(params, anchor)[0]) if anchor else None,
  )


def first_state(
  network: Network, optimizer: optax.GradientTransformation, where: StateLayout, *,
  random_init: bool, seed: int, adapter: str = "",
) -> types.TrainState:
  """The state before the first step: from the folder's weights, or from random ones.

  Raises:
    InputError: the weights or the folder of adapters, "" for fresh ones, cannot be used.
  """
  model, config = network.model, network.config
  init = lambda key: sharding.unbox(model.init(key, bagel.example_batch(config))["params"])
  copies = dict(
    ema=where.shardings.ema is not None, reference=where.shardings.reference is not None,
    anchor=where.anchor,
  )
  state_of = lambda params: _state_of(_stored(params, model), model, optimizer, **copies)
  key, loaded = jax.random.key(seed), {}
  if adapter:
    opened = _open_adapter(adapter, config)
    loaded = opened.params(model.lora, where.shardings.params)
  with sharding.activate(network.mesh):
    if not random_init:
      plain = layers.without(where.shardings.params, (layers.LORA_DOWN, layers.LORA_UP))
      loaded = _join(loaded, network.folder.load_params(
        dtype=jnp.float32, shardings={"bagel": plain}, parts=("bagel",)
      )["bagel"])
    # The compiler drops the initialisation of whatever the loaded weights replace.
    start = lambda key, loaded: state_of(_update(init(key), loaded))
    return jax.jit(start, out_shardings=where.shardings, donate_argnums=1)(key, loaded)


def _open_adapter(path: pathlib.Path | str, config: config_lib.BagelConfig) -> adapters.Adapter:
  return adapters.Adapter(files.local_copy(hub.find(path)), config)


def _update(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """`tree` with the leaves that `values` has."""
  return {
    name: _update(value, values.get(name, {})) if isinstance(value, Mapping)
    else values.get(name, value)
    for name, value in tree.items()
  }


def _join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of both trees."""
  flat = traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second)
  return traverse_util.unflatten_dict(flat)


def export(network: Network, params, target: str, dtype: str) -> None:
  """Writes a network as an official folder, its adapters merged into it."""
  if network.model.lora is not None:
    params = jax.jit(lambda params: layers.merge_lora(params, network.model.lora))(params)
  folders.write_official(
    files.path(target), network.folder, {"bagel": params}, dtype=jnp.dtype(dtype)
  )
  print(f"exported {target}", flush=True)


def export_adapter(
  network: Network, params, target: pathlib.Path, dtype: str, *, base: str, overwrite: bool
) -> None:
  """Writes the adapters of a network as a folder that PEFT reads.

  Args:
    network, params: what was trained, with adapters.
    target: folder to write.
    dtype: of the two matrices of each layer.
    base: what the adapters are of.
    overwrite: whether an existing folder of adapters is replaced.

  Raises:
    InputError: the target cannot be made.
  """
  lora = network.model.lora
  contents = adapters.contents(params, network.config, lora.rank, jnp.dtype(dtype))
  folders.check_target(
    network.folder.path, target, overwrite=overwrite, is_replaceable=adapters.is_folder,
    needed_bytes=safetensors_files.total_bytes(contents.tensors),
  )
  with locks.staging(target) as staged:
    config = json.dumps(adapters.config_of(lora, base), indent=2)
    (staged / adapters.CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    safetensors_files.write(staged / adapters.FILE, contents)
  print(f"exported the adapters to {target}", flush=True)


def group_sizes(params) -> dict[str, int]:
  """How many parameters each group has."""
  counts = dict.fromkeys(optim.GROUPS, 0)
  for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(optim.groups(params))):
    counts[group] += leaf.size
  return counts


def describe_devices(mesh: jax.sharding.Mesh) -> str:
  """The backend, the mesh and the hosts in one line."""
  shape = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  return f"{jax.default_backend()}, {shape}; {jax.process_count()} host(s)"
