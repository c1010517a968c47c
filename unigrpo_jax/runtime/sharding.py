"""One mesh of three axes, and which of them each named axis of an array is split over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
import jax
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
  """A mesh over `devices` (all of them by default), host by host along its axes, tensor innermost.

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
  return _mesh(_host_by_host(devices), (data, fsdp, tensor))


def with_tensor_ways(mesh: Mesh, tensor: int) -> Mesh:
  """The same devices in the same order with fewer tensor ways, and so many more of fsdp.

  A way of the batch in `mesh` has the rows of consecutive ones here, on its own devices. Programs
  take arrays of both meshes.

  Raises:
    InputError: `tensor` does not divide the mesh's.
  """
  if tensor < 1 or mesh.shape["tensor"] % tensor:
    raise errors.InputError(
      f"config.rollout.tensor={tensor} does not divide config.mesh.tensor={mesh.shape['tensor']}; "
      "make it a divisor, or 0: chosen by the device's memory"
    )
  return _mesh(mesh.devices, (mesh.shape["data"], -1, tensor))


def _mesh(devices: Any, shape: tuple[int, int, int]) -> Mesh:
  # Auto is given explicitly: under the Explicit default, Linen's logical constraints fail.
  axis_types = (AxisType.Auto,) * len(MESH_AXES)
  return Mesh(np.reshape(np.asarray(devices, object), shape), MESH_AXES, axis_types=axis_types)


def _host_by_host(devices: Sequence[Any]) -> list[Any]:
  """Slices one after the other, in each the hosts along its torus, in each host its devices.

  A host then has consecutive ways of the batch, however many of its devices share a way; and the
  devices of a tensor group are neighbours: on a TPU a host's are a block of the torus.
  """
  own: dict[int, list[Any]] = {}
  for device in sorted(devices, key=lambda device: device.id):
    own.setdefault(device.process_index, []).append(device)

  def place(host):
    # The last axis of the torus changes fastest: hosts often are two chips wide along the others.
    first = host[0]
    coords = tuple(getattr(first, "coords", ()))
    return getattr(first, "slice_index", 0), coords, first.process_index

  return [device for host in sorted(own.values(), key=place) for device in host]


def program_bytes(program: jax.stages.Compiled) -> int:
  """What a compiled program needs of a device: arguments, results and temporaries."""
  memory = program.memory_analysis()
  return (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  )


def device_memory(devices: Sequence[Any]) -> int | None:
  """Bytes of one of the devices; None where none is this host's, or it does not know, as a CPU."""
  own = [device for device in jax.local_devices() if device in devices]
  return (own[0].memory_stats() or {}).get("bytes_limit") if own else None


def sampling_mesh(num_kv_heads: int, param_bytes: int) -> Mesh:
  """All devices, laid out for sampling: tensor as wide as the key-value heads allow.

  Where a device's share of the parameters then fits in 0.7 of it, the other devices are replicas:
  sharded further, every layer would be gathered again for every token.
  """
  count = len(jax.devices())
  tensor = math.gcd(count, num_kv_heads)
  limit = device_memory(jax.devices())
  axis = "data" if limit is None or param_bytes / tensor <= 0.7 * limit else "fsdp"
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

  Where the tensor axis spans several hosts, all of which have a row, it is the first of them. Rows
  are a multiple of `batch_multiple`.
  """
  ways = batch_multiple(mesh)
  hosts = [
    min(device.process_index for device in way) for way in mesh.devices.reshape(ways, -1)
  ]
  return np.repeat(hosts, rows // ways)


def with_whole_groups(mesh: Mesh, groups: int) -> Mesh:
  """`mesh` where each host reads whole ones of so many equal groups of rows, by `row_hosts`.

  Else the same devices in the same order with fewer ways of the batch, each of whole groups: there
  several devices have a row, and the first of their hosts reads it.
  """
  ways = batch_multiple(mesh)
  hosts = row_hosts(mesh, groups * ways).reshape(groups, ways)
  if (hosts == hosts[:, :1]).all():
    return mesh
  return _mesh(mesh.devices, (1, math.gcd(ways, groups), -1))


def local_rows(mesh: Mesh, arrays: Any) -> tuple[np.ndarray, Callable[[], Any]]:
  """The rows that this host reads of `arrays`, a tree of [rows, ...] along the batch.

  Rows are a multiple of `batch_multiple`. Returns (this host's indices, [n] int64, increasing; what
  waits for the tree with [n, ...] NumPy arrays: as in `start_fetch`, in any thread).
  """
  rows = jax.tree.leaves(arrays)[0].shape[0]
  if jax.process_count() == 1:
    return np.arange(rows), lambda: jax.device_get(arrays)
  local = np.flatnonzero(row_hosts(mesh, rows) == jax.process_index())
  owned = set(local.tolist())
  # The compiler may have split them along other axes.
  placed = jax.tree.map(lambda array: jax.device_put(array, along_batch(mesh)), arrays)

  def read(array):
    # One of the copies that tensor ways have of a row.
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    parts = [np.asarray(shards[first]) for first in sorted(shards) if first in owned]
    return np.concatenate([np.empty((0, *array.shape[1:]), array.dtype), *parts])

  return local, lambda: jax.tree.map(read, placed)
