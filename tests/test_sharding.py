"""How devices become a mesh, whose rows are whose, and a mesh for sampling on the same devices."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.runtime import sharding

# Chips along each axis of a torus, in hosts of 2 x 2.
TORUS = {"v5p:4x4x4": (4, 4, 4), "v6e:4x4": (4, 4, 1), "v6e:16x16": (16, 16, 1)}
GROUP_SIZE = 24


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device."""

  id: int
  process_index: int
  coords: tuple[int, int, int] = ()
  platform: str = "tpu"
  slice_index: int = 0


def _torus(name, slices=1):
  """Devices in an order that is not that of their hosts."""
  x_size, y_size, z_size = TORUS[name]
  devices, count = [], x_size * y_size * z_size
  for n, z, y, x in itertools.product(range(slices), range(z_size), range(y_size), range(x_size)):
    number = x + x_size * (y + y_size * z)
    host = x // 2 + x_size // 2 * (y // 2 + y_size // 2 * z)
    devices.append(Device(n * count + number, n * count // 4 + host, (x, y, z), slice_index=n))
  return devices


def _hops(first, second, sizes):
  distances = [abs(a - b) for a, b in zip(first.coords, second.coords)]
  return sum(min(d, size - d) for d, size in zip(distances, sizes))


@pytest.mark.parametrize("tensor", [4, 2, 1])
@pytest.mark.parametrize("name", TORUS)
def test_a_host_has_consecutive_ways_and_a_tensor_group_one_host(name, tensor):
  devices = _torus(name)
  mesh = sharding.make_mesh(fsdp=len(devices) // tensor, tensor=tensor, devices=devices)
  ways = len(devices) // tensor
  hosts = sharding.row_hosts(mesh, 2 * ways)
  runs = [host for host, _ in itertools.groupby(hosts)]
  assert sorted(runs) == sorted({device.process_index for device in devices})
  for group in mesh.devices.reshape(ways, tensor):
    assert len({device.process_index for device in group}) == 1
    assert max(_hops(a, b, TORUS[name]) for a in group for b in group) <= 2
  # Along fsdp the next device is that of the next host, two chips on but at the end of a row.
  along = mesh.devices[0, :, 0]
  assert np.median([_hops(a, b, TORUS[name]) for a, b in itertools.pairwise(along)]) <= 2


@pytest.mark.parametrize("tensor", [4, 2, 1])
def test_the_mesh_of_sampling_has_the_same_devices_in_the_same_order(tensor):
  devices = _torus("v5p:4x4x4")
  mesh = sharding.make_mesh(data=2, fsdp=8, tensor=4, devices=devices)
  sampling = sharding.with_tensor_ways(mesh, tensor)
  assert dict(sampling.shape) == {"data": 2, "fsdp": 32 // tensor, "tensor": tensor}
  assert sampling.devices.ravel().tolist() == mesh.devices.ravel().tolist()
  assert (sampling == mesh) == (tensor == 4)


def test_slices_are_blocks_of_data():
  mesh = sharding.make_mesh(data=4, fsdp=2, tensor=4, devices=_torus("v6e:4x4", slices=2))
  slices = [{device.slice_index for device in way.ravel()} for way in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(errors.InputError, match="must be a multiple of the 2 slices"):
    sharding.make_mesh(fsdp=32, devices=_torus("v6e:4x4", slices=2))


@pytest.mark.parametrize("tensor", [3, 8])
def test_tensor_ways_of_sampling_divide_those_of_the_update(tensor):
  mesh = sharding.make_mesh(data=2, tensor=4)
  with pytest.raises(errors.InputError, match=f"rollout.tensor={tensor} .* config.mesh.tensor=4"):
    sharding.with_tensor_ways(mesh, tensor)


def test_a_row_of_two_hosts_is_the_first_ones():
  """A mesh whose tensor axis joins the hosts, and one whose does not."""
  devices = [Device(n, n // 4, platform="cpu") for n in range(8)]
  mesh = lambda **sizes: sharding.make_mesh(devices=devices, **sizes)
  assert sharding.row_hosts(mesh(data=2, fsdp=2, tensor=2), 8).tolist() == [0] * 4 + [1] * 4
  assert sharding.row_hosts(mesh(tensor=8), 4).tolist() == [0] * 4


@pytest.mark.parametrize("name, tensor, groups, readers", [
  ("v5p:4x4x4", 4, 16, 16), ("v5p:4x4x4", 2, 16, 16), ("v5p:4x4x4", 1, 16, 16),
  ("v5p:4x4x4", 1, 32, 16), ("v5p:4x4x4", 1, 8, 8), ("v5p:4x4x4", 4, 2, 2),
  # More hosts than groups: of two hosts the first reads a group.
  ("v6e:16x16", 4, 32, 32), ("v6e:16x16", 1, 32, 32), ("v6e:16x16", 1, 64, 64),
  ("v6e:4x4", 4, 4, 4), ("v6e:4x4", 1, 6, 2),
])
def test_one_host_reads_a_group(name, tensor, groups, readers):
  devices = _torus(name)
  mesh = sharding.make_mesh(fsdp=len(devices) // tensor, tensor=tensor, devices=devices)
  reading = sharding.with_whole_groups(mesh, groups)
  hosts = sharding.row_hosts(reading, groups * GROUP_SIZE).reshape(groups, GROUP_SIZE)
  assert (hosts == hosts[:, :1]).all() and len(set(hosts.ravel().tolist())) == readers
  assert reading.devices.ravel().tolist() == mesh.devices.ravel().tolist()
  split = sharding.row_hosts(mesh, groups * GROUP_SIZE).reshape(groups, GROUP_SIZE)
  assert (reading == mesh) == bool((split == split[:, :1]).all())


def test_each_host_reads_its_rows_once(monkeypatch):
  """The rows of the host whose number is that of the devices here, whatever has copies of them."""
  mesh = sharding.make_mesh(fsdp=2, tensor=4)
  array = sharding.put_rows(mesh, np.arange(12).reshape(6, 2))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(sharding, "row_hosts", lambda mesh, rows: np.arange(rows) * 2 // rows)
  rows, read = sharding.local_rows(mesh, [array])
  assert rows.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(*read(), [[0, 1], [2, 3], [4, 5]])
  monkeypatch.setattr(sharding, "row_hosts", lambda mesh, rows: np.ones(rows, int))
  rows, read = sharding.local_rows(mesh, [array])
  assert rows.shape == (0,) and read()[0].shape == (0, 2)
