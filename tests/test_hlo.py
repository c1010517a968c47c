"""What a compiled program does: against formulas, numbers by hand, and texts for a TPU."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.runtime import sharding
from unigrpo_jax.tools.plan import hlo, hlo_text

B, D, F, L = 4, 8, 16, 5


def _read(function, *arrays, **options):
  return hlo.read(jax.jit(function).lower(*arrays).compile().as_text(), **options)


def _shape(*dims, dtype=jnp.float32, sharding=None):
  return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def _stack(x, weights, remat=False):
  """A stack of layers; a layer's pre-activation is needed again for its gradient."""
  def layer(x, w):
    return jnp.sin(jnp.sin(x @ w["up"]) @ w["down"]), None

  return lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0]


@pytest.mark.parametrize("remat, passes", [(False, 3), (True, 4)])
def test_flops_of_a_scanned_stack_with_gradient(remat, passes):
  """Each product once forward, once for each of its operands' gradients, once more under remat."""
  weights = {"up": _shape(L, D, F), "down": _shape(L, F, D)}
  loss = lambda x, w: jnp.sum(_stack(x, w, remat))
  forward = L * 2 * (2 * B * D * F)
  assert _read(loss, _shape(B, D), weights).flops == forward
  gradient = _read(jax.grad(loss, argnums=(0, 1)), _shape(B, D), weights)
  assert gradient.flops == passes * forward
  known = _read(jax.grad(loss, argnums=(0, 1)), _shape(B, D), weights, unknown_trips=99)
  assert known.flops == gradient.flops, "all trips are known"


def test_loops_in_loops_multiply():
  def outer(x, _):
    x = lax.fori_loop(0, 3, lambda _, x: jnp.einsum("bij,bjk->bik", x, x), x)
    return x, jnp.sum(x @ x[0])

  program = _read(lambda x: lax.scan(outer, x, None, length=7), _shape(2, D, D))
  assert program.flops == 7 * (3 + 1) * 2 * 2 * D**3


CONVOLUTIONS = {
  "same": ((3, 3), {"padding": "SAME"}),
  "strided": ((3, 4), {"padding": [(0, 1), (2, 0)], "window_strides": (2, 3)}),
  "transposed": ((4, 2), {"padding": [(2, 2), (1, 0)], "lhs_dilation": (2, 3)}),
  "both": ((2, 3), {"padding": [(5, 3), (0, 4)], "window_strides": (4, 2), "lhs_dilation": (6, 3)}),
  "holes": ((3, 3), {"padding": [(2, 2), (-1, 3)], "rhs_dilation": (2, 3)}),
  "grouped": ((3, 3), {"padding": "SAME", "feature_group_count": 2}),
}


@pytest.mark.parametrize("kernel, options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_flops_of_a_convolution_are_its_products(kernel, options):
  """A convolution of ones with ones counts its products."""
  group = options.get("feature_group_count", 1)
  given, weights = jnp.ones((2, 9, 7, 4)), jnp.ones((*kernel, 4 // group, 6))
  convolve = functools.partial(
    lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    **{"window_strides": (1, 1), **options},
  )
  assert _read(convolve, given, weights).flops == 2 * jnp.sum(convolve(given, weights))


def test_the_most_expensive_branch_counts():
  branches = [lambda x: x, lambda x: jnp.sin(x @ x) @ x, lambda x: x @ x]
  program = _read(lambda i, x: lax.switch(i, branches, x), _shape(dtype=jnp.int32), _shape(D, D))
  assert program.flops == 2 * 2 * D**3


def test_a_loop_that_ends_early_takes_the_given_trips():
  def early(x):
    go_on = lambda carry: (carry[0] < 50) & (jnp.sum(carry[1]) < 10)
    return lax.while_loop(go_on, lambda carry: (carry[0] + 1, jnp.sin(carry[1] @ x)), (0, x))[1]

  repeated = lambda x: lax.scan(lambda x, _: (early(x), None), x, None, length=3)[0]
  once, often = (_read(repeated, _shape(D, D), unknown_trips=trips) for trips in (1, 20))
  assert once.flops == 3 * 2 * D**3
  assert often.flops == 20 * once.flops


def test_collectives_of_a_hand_sharded_scan():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  spec = jax.sharding.PartitionSpec

  def step(x, _):  # x is [8, 16] on each device
    x = jnp.sin(lax.psum(x, "tensor"))
    x = jnp.sin(lax.all_gather(x, "fsdp", axis=0, tiled=True))  # [16, 16]
    x = jnp.sin(lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=0, tiled=True))  # [4, 16]
    x = jnp.sin(lax.ppermute(x, "data", [(0, 1), (1, 0)]))
    x = jnp.sin(lax.all_to_all(x, "tensor", 1, 0, tiled=True))  # [8, 8]
    return jnp.concatenate([x, x], axis=1), None

  run = jax.shard_map(
    lambda x: lax.scan(step, x, None, length=6)[0], mesh=mesh, in_specs=spec(("data", "fsdp")),
    out_specs=spec(("data", "fsdp")), check_vma=False,
  )
  program = _read(run, _shape(32, 16))
  collectives = {
    c.kind: (c.bytes, hlo.axes(c.groups, dict(mesh.shape)), c.times) for c in program.collectives
  }
  assert collectives == {
    "all-reduce": (8 * 16 * 4, ("tensor",), 6),
    "all-gather": (16 * 16 * 4, ("fsdp",), 6),
    "reduce-scatter": (16 * 16 * 4, ("data", "fsdp"), 6),
    "collective-permute": (4 * 16 * 4, ("data",), 6),
    "all-to-all": (4 * 16 * 4, ("tensor",), 6),
  }


@pytest.mark.parametrize("text, ids", [
  ("{{0,2},{1,3}}", np.array([[0, 2], [1, 3]])),
  ("{}", np.arange(8)[None]),
  ("[4,2]<=[8]", np.arange(8).reshape(4, 2)),
  ("[2,4]<=[4,2]T(1,0)", np.arange(8).reshape(4, 2).T.reshape(2, 4)),
  ("[4,6]<=[2,3,4]T(2,0,1)", np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).reshape(4, 6)),
  ("[8]<=[8]", np.arange(8)[None]),
  ("mesh['a'=4,'b'=1,'c'=2] {'a'}", np.arange(8).reshape(4, 2).T),
  ("mesh['a'=4,'b'=2] {'a','b'}", np.arange(8)[None]),
  ("mesh['a'=2,'b'=4] {'b':(1)2}", np.arange(8).reshape(2, 2, 2).transpose(0, 2, 1).reshape(4, 2)),
  ("mesh['a'=2,'b'=4] {'a','b':(2)2}",
   np.arange(8).reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)),
  ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", np.array([[0, 2], [1, 3]])),
  ("mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", np.arange(6).reshape(3, 2).T),
])
def test_groups_in_every_form(text, ids):
  assert hlo_text.groups(text, 8) == tuple(map(tuple, ids.tolist()))


@pytest.mark.parametrize("dims, axes", [
  ((2,), ("tensor",)),
  ((1,), ("fsdp",)),
  ((0, 2), ("data", "tensor")),
  ((0, 1, 2), ("data", "fsdp", "tensor")),
  ((), ()),
])
def test_axes_of_groups_along_whole_axes(dims, axes):
  positions = np.arange(24).reshape(2, 3, 4)
  others = [axis for axis in range(3) if axis not in dims]
  size = int(np.prod([positions.shape[axis] for axis in dims]))
  groups = positions.transpose(*others, *dims).reshape(-1, size).tolist()
  assert hlo.axes(groups, {"data": 2, "fsdp": 3, "tensor": 4}) == axes


def test_axes_of_other_groups_and_of_pairs():
  mesh = {"data": 2, "tensor": 4}
  assert hlo.axes([[0, 1], [2, 3], [4, 5], [6, 7]], mesh) == ("other",), "half an axis"
  assert hlo.axes([[0, 5], [1, 4], [2, 7], [3, 6]], mesh) == ("other",), "a diagonal"
  assert hlo.axes([[0, 8]], mesh) == ("other",), "outside the mesh"
  assert hlo.axes([[0, 1], [1, 2], [2, 3], [3, 0]], mesh) == ("tensor",), "a ring"
  assert hlo.axes([[0, 4], [4, 0], [1, 1]], mesh) == ("data",), "one keeps its own"


@pytest.mark.parametrize("kind, sent", [
  ("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150),
  ("collective-permute", 100),
])
def test_bytes_on_the_wire_of_a_ring_of_four(kind, sent):
  groups = ((0, 1), (1, 2), (2, 3), (3, 0)) if "permute" in kind else ((0, 1, 2, 3), (4, 5, 6, 7))
  assert hlo.wire_bytes(hlo.Collective(kind, 100, groups, 1)) == sent


def test_other_texts_are_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.read("module @jit_f { }")
