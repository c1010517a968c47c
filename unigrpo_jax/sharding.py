"""One mesh of three axes, and which of them each named axis of an array lies along."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unigrpo_jax import errors

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters are split over fsdp along the model width and over tensor
# along heads, ffn and vocabulary; activations over data and fsdp along the batch.
RULES = (
  ("batch", ("data", "fsdp")),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
)


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh over `devices` (all of them by default).

  Raises:
    InputError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data * fsdp * tensor != len(devices):
    raise errors.InputError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, "
      f"but there are {len(devices)}; change one of the three"
    )
  # Auto is given explicitly: under the Explicit default, Linen's logical constraints fail.
  kinds = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=kinds, devices=devices)


def default_mesh(num_kv_heads: int) -> Mesh:
  """All devices: tensor as wide as the key-value heads allow, the rest fsdp."""
  count = len(jax.devices())
  tensor = math.gcd(count, num_kv_heads)
  return make_mesh(fsdp=count // tensor, tensor=tensor)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
  """Within it, the models' named axes follow `RULES` on `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def batch_multiple(mesh: Mesh) -> int:
  """What the number of batch rows must be a multiple of."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree made by `Module.init`, whose leaves carry their logical axis names.

  An axis that its mesh axes do not divide (an odd vocabulary, say) stays whole.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

  def fit(leaf, spec):
    names = [spec[i] if i < len(spec) else None for i in range(len(leaf.shape))]
    sizes = [mesh.shape[name] if name else 1 for name in names]
    kept = [name if size % ways == 0 else None for name, size, ways in
            zip(names, leaf.shape, sizes)]
    return NamedSharding(mesh, PartitionSpec(*kept))

  return jax.tree.map(fit, nn.meta.unbox(boxed), specs)


def along_batch(mesh: Mesh) -> NamedSharding:
  """Sharding of an array whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
