"""One mesh of three axes, and which of them each named axis of an array is split over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from unigrpo_jax import errors

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters are split over fsdp along the model width and over tensor
# along heads, ffn and vocabulary; activations over data and fsdp along the batch.
RULES = (
  ("batch", ("data", "fsdp")), ("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"),
  ("mlp", "tensor"), ("vocab", "tensor"),
)
# For sampling, in "stationary" every device of fsdp has all it needs: no token waits for a gather.
LAYOUTS = {"stationary": tuple(rule for rule in RULES if rule[0] != "embed"), "update": RULES}


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh over `devices` (all of them by default), laid out along their interconnect.

  Raises:
    InputError: the axes do not multiply to the number of devices, or `data` is no multiple of the
      number of TPU slices, which a slower network connects.
  """
  devices = jax.devices() if devices is None else devices
  if data * fsdp * tensor != len(devices):
    raise errors.InputError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, "
      f"but there are {len(devices)}; change one of the three"
    )
  slices = 1
  if devices[0].platform == "tpu":  # GPUs have a slice_index as well: that of their host.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
  if data % slices:
    raise errors.InputError(
      f"config.mesh.data={data} must be a multiple of the {slices} slices: the slower network "
      "between them carries nothing but the sum of gradients"
    )
  # Axes may have to share one of the torus: 64 x 4 devices on 16 x 16.
  options = dict(devices=devices, allow_split_physical_axes=True)
  shape = (data // slices, fsdp, tensor)
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, **options)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), **options)
  # Auto is given explicitly: under the Explicit default, Linen's logical constraints fail.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sampling_mesh(num_kv_heads: int, param_bytes: int) -> Mesh:
  """All devices, laid out for sampling: tensor as wide as the key-value heads allow.

  Where a device's share of the parameters then fits in 0.7 of it, the other devices are replicas:
  sharded further, every layer would be gathered again for every token.
  """
  count = len(jax.devices())
  tensor = math.gcd(count, num_kv_heads)
  # The CPU backend, for one, does not know its limit.
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
  axis = "data" if param_bytes / tensor <= 0.7 * limit else "fsdp"
  return make_mesh(**{axis: count // tensor}, tensor=tensor)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
  """Within it, the models' named axes follow `RULES` on `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def batch_multiple(mesh: Mesh) -> int:
  """The number of batch rows must be a multiple of this."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(boxed: Any, mesh: Mesh, rules=RULES) -> Any:
  """Shardings of a tree made by `Module.init`, whose leaves carry their logical axis names.

  An axis that its mesh axes do not divide (an odd vocabulary, say) stays whole.
  """
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)

  def sharding_of(leaf):
    logical = leaf.get_partition_spec() if is_box(leaf) else ()
    axes = nn.logical_to_mesh_axes(tuple(logical), rules)

    def fit(array):
      spec = [None] * len(array.shape)
      for i, (axis, size) in enumerate(zip(axes, array.shape)):
        if axis and size % mesh.shape[axis] == 0:
          spec[i] = axis
      return NamedSharding(mesh, PartitionSpec(*spec))

    # A box may hold nothing: the optimizer's place for a parameter of another group.
    return jax.tree.map(fit, unbox(leaf))

  return jax.tree.map(sharding_of, boxed, is_leaf=is_box)


def unbox(boxed: Any) -> Any:
  """A tree made by `Module.init` as plain arrays."""
  return nn.meta.unbox(boxed)


def along_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Sharding of an array whose `axis` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def along_all(mesh: Mesh) -> NamedSharding:
  """Sharding of an array whose first axis is spread over every device."""
  return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array of which every device has a copy."""
  return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Sharding of an array of so many rows: along the batch where that divides them."""
  return along_batch(mesh) if rows % batch_multiple(mesh) == 0 else replicated(mesh)


def put_rows(mesh: Mesh, array: Any) -> jax.Array:
  """Puts an array on the devices, its first axis along the batch where that divides it."""
  return put(array, row_sharding(mesh, array.shape[0]))


def put(array: Any, where: NamedSharding) -> jax.Array:
  """Puts an array, which every host has, on the devices; of several hosts too."""
  if where.is_fully_addressable:
    return jax.device_put(array, where)
  # `device_put` would first compare the arrays of all hosts.
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def fetch(tree: Any) -> Any:
  """A tree of arrays as NumPy arrays, complete on every host; all hosts call it together."""
  return start_fetch(tree)()


def start_fetch(tree: Any) -> Callable[[], Any]:
  """The first half of `fetch`, which launches what all hosts run together and waits for nothing.

  The function that it returns is the second half: it waits, launches nothing, and may be called in
  any thread.
  """
  def launch(array):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return _replicate(replicated(array.sharding.mesh))(array).addressable_data(0)
    return array

  launched = jax.tree.map(launch, tree)
  return lambda: jax.device_get(launched)


@functools.lru_cache(maxsize=8)
def _replicate(where: NamedSharding):
  return jax.jit(lambda array: array, out_shardings=where)


def row_hosts(mesh: Mesh, rows: int) -> np.ndarray:
  """Which host reads each of `rows` rows along the batch: [rows] process indices.

  Where the tensor axis spans several hosts, all of which have a row, it is the first of them.
  """
  hosts = np.full(rows, np.iinfo(np.int32).max)
  for device, (index,) in along_batch(mesh).devices_indices_map((rows,)).items():
    hosts[index] = np.minimum(hosts[index], device.process_index)
  return hosts


def local_rows(mesh: Mesh, arrays: Any) -> tuple[np.ndarray, Callable[[], Any]]:
  """The rows that this host reads of `arrays`, a tree of [rows, ...] along the batch.

  Rows are a multiple of `batch_multiple`. Returns (this host's indices, [n] int64, increasing; what
  waits for the tree with [n, ...] NumPy arrays: as in `start_fetch`, in any thread).
  """
  rows = jax.tree.leaves(arrays)[0].shape[0]
  if jax.process_count() == 1:
    return np.arange(rows), lambda: jax.device_get(arrays)
  local = np.flatnonzero(row_hosts(mesh, rows) == jax.process_index())
  # The compiler may have split them along other axes.
  placed = jax.tree.map(lambda array: jax.device_put(array, along_batch(mesh)), arrays)

  def read(array):
    values = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
      values[shard.index] = shard.data
    return values[local]

  return local, lambda: jax.tree.map(read, placed)
