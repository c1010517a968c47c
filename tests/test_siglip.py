"""The SigLIP tower against recorded outputs of the official code, and what padding must not do."""

import dataclasses
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import siglip
from unigrpo_jax.runtime import folders

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = config_lib.read_config(GOLDEN).vit


@pytest.fixture(scope="module")
def params():
  tree = folders.open_folder(GOLDEN).load_params(parts=("bagel",))
  return tree["bagel"]["vit"]


@pytest.fixture(scope="module")
def recorded():
  return dict(np.load(GOLDEN / "c_vit.npz"))


def unpack(recorded, length):
  """The recorded pack of two images as a batch of padded rows."""
  lengths = recorded["in_vit_token_seqlens"]
  mask = np.arange(length) < lengths[:, None]
  patches = np.zeros((*mask.shape, CONFIG.patch_dim), np.float32)
  ids = np.zeros(mask.shape, np.int32)
  patches[mask] = recorded["out_packed_vit_tokens"]
  ids[mask] = recorded["out_packed_vit_position_ids"]
  return patches, ids, mask


def apply(params, *inputs, config=CONFIG, dtype=jnp.float32):
  return siglip.SigLIP(config, dtype).apply({"params": params}, *inputs)


@pytest.mark.parametrize("length", [12, 19])
def test_recorded_output(params, recorded, length):
  patches, ids, mask = unpack(recorded, length)
  out = apply(params, patches, ids, mask)
  np.testing.assert_allclose(out[mask], recorded["out_vit_hidden"], atol=1e-4, rtol=1e-4)


def test_parameter_tree_is_the_checkpoint_s(params):
  inputs = unpack(dict(np.load(GOLDEN / "c_vit.npz")), 12)
  boxed = jax.eval_shape(siglip.SigLIP(CONFIG).init, jax.random.key(0), *inputs)["params"]
  shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)
  names = boxed["layers"]["attention"]["q"]["kernel"].names
  assert names == ("layers", "embed", "heads", "head_dim")


def test_padding_is_never_read(params, recorded):
  patches, ids, mask = unpack(recorded, 19)
  clean = apply(params, patches, ids, mask)
  patches[~mask], ids[~mask] = np.nan, 63
  dirty = apply(params, patches, ids, mask)
  np.testing.assert_array_equal(clean[mask], dirty[mask])


def test_batched_equals_alone(params, recorded):
  patches, ids, mask = unpack(recorded, 12)
  both = np.asarray(apply(params, patches, ids, mask))
  for row, length in enumerate(recorded["in_vit_token_seqlens"]):
    alone = apply(params, *(a[row : row + 1, :length] for a in (patches, ids, mask)))
    np.testing.assert_allclose(both[row, :length], alone[0], atol=2e-6)


def test_image_of_padding_only_is_finite_with_finite_gradients(params, recorded):
  patches, ids, mask = unpack(recorded, 12)
  mask[1] = False

  def loss(params, patches):
    return (apply(params, patches, ids, mask) ** 2).sum()

  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, (weight_grads, patch_grads) = gradient(params, patches)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weight_grads))
  np.testing.assert_array_equal(patch_grads[1], 0)
  assert np.abs(patch_grads[0]).min(axis=-1).max() > 0


def test_query_blocks_change_nothing(params, recorded, monkeypatch):
  inputs = unpack(recorded, 12)
  mask = inputs[-1]
  whole = apply(params, *inputs)
  monkeypatch.setattr(siglip, "QUERY_BLOCK", 5)
  np.testing.assert_allclose(apply(params, *inputs)[mask], whole[mask], atol=2e-6)


def test_largest_image_never_holds_all_scores(params):
  num_patches = 4900
  inputs = (
    jax.ShapeDtypeStruct((1, num_patches, CONFIG.patch_dim), jnp.float32),
    jax.ShapeDtypeStruct((1, num_patches), jnp.int32),
    jax.ShapeDtypeStruct((1, num_patches), jnp.bool_),
  )
  compiled = jax.jit(lambda *inputs: apply(params, *inputs)).lower(*inputs).compile()
  all_scores = 4 * CONFIG.num_heads * num_patches**2
  assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 2


def test_bfloat16_activations_keep_float32_norms(params, recorded):
  patches, ids, mask = unpack(recorded, 12)
  out = apply(params, patches, ids, mask, dtype=jnp.bfloat16)
  assert out.dtype == jnp.bfloat16
  error = np.asarray(out[mask], np.float32) - recorded["out_vit_hidden"]
  assert np.linalg.norm(error) < 0.02 * np.linalg.norm(recorded["out_vit_hidden"])


def test_epsilon_comes_from_the_config(params, recorded):
  inputs = unpack(recorded, 12)
  mask = inputs[-1]
  wide = apply(params, *inputs, config=dataclasses.replace(CONFIG, layer_norm_eps=1e6))[mask]
  # Under an overwhelming epsilon the final norm gives its bias alone.
  np.testing.assert_allclose(wide - params["post_norm"]["bias"], 0, atol=2e-2)
  assert np.abs(recorded["out_vit_hidden"] - params["post_norm"]["bias"]).max() > 0.5
