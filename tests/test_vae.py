"""The autoencoder against recorded outputs of the official code, and its array formulas."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.episodes import programs
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import lowering, vae
from unigrpo_jax.runtime import folders

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = config_lib.read_config(GOLDEN).vae
UNITS = dict(scale=CONFIG.scale_factor, shift=CONFIG.shift_factor)
TOLERANCE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def params():
  tree = folders.open_folder(GOLDEN).load_params(parts=("vae",))
  return tree["vae"]


@pytest.fixture(scope="module")
def recorded():
  """The recordings, NCHW made NHWC."""
  arrays = np.load(GOLDEN / "d_vae.npz")
  return {name: np.moveaxis(arrays[name], 1, -1) for name in arrays.files}


@pytest.fixture(scope="module")
def encode(params):
  return jax.jit(lambda x: vae.VAE(CONFIG).apply({"params": params}, x, method="encode"))


@pytest.fixture(scope="module")
def decode(params):
  return jax.jit(lambda x: vae.VAE(CONFIG).apply({"params": params}, x, method="decode"))


@pytest.mark.parametrize("image", ["0", "1"])
def test_recorded_encode(encode, recorded, image):
  mean, logvar = encode(recorded[f"in_image{image}"])
  moments = np.concatenate([mean, logvar], axis=-1)
  np.testing.assert_allclose(moments, recorded[f"out_moments{image}"], **TOLERANCE)
  fixed = vae.latents_from_moments(mean, logvar, None, **UNITS)
  np.testing.assert_allclose(fixed, recorded[f"out_latent_mean{image}"], **TOLERANCE)
  sampled = vae.latents_from_moments(mean, logvar, recorded[f"in_noise{image}"], **UNITS)
  np.testing.assert_allclose(sampled, recorded[f"out_latent_sampled{image}"], **TOLERANCE)


@pytest.mark.parametrize("image", ["0", "1"])
def test_recorded_decode(decode, recorded, image):
  out = decode(recorded[f"out_latent_sampled{image}"])
  np.testing.assert_allclose(out, recorded[f"out_decoded{image}"], **TOLERANCE)


def test_recorded_low_contrast(encode, recorded):
  moments = np.concatenate(encode(recorded["in_lowcontrast_image"]), axis=-1)
  np.testing.assert_allclose(moments, recorded["out_lowcontrast_moments"], **TOLERANCE)


def test_recorded_padded_batch(encode, recorded):
  moments = encode(recorded["in_padded_images"])
  latents = vae.latents_from_moments(*moments, recorded["in_padded_noise"], **UNITS)
  np.testing.assert_allclose(latents, recorded["out_padded_latent"], **TOLERANCE)


def test_its_programs_convolve_on_all_cores_of_a_cpu(params, recorded, encode, decode):
  """By Eigen, whose convolutions stay operations of their own; every caller has the same program.
  """
  pixels = jnp.asarray(recorded["in_image0"])
  mean, _ = encode(pixels)
  encode_images, decode_images = programs.encode_images("cpu"), programs.decode_images("cpu")
  latents = encode_images(vae.VAE(CONFIG), params, pixels, jnp.zeros_like(mean))
  np.testing.assert_allclose(
    latents, vae.latents_from_moments(mean, None, None, **UNITS), **TOLERANCE
  )
  images = decode_images(vae.VAE(CONFIG), params, latents).astype(int)
  assert np.abs(images - vae.to_uint8(decode(latents)).astype(int)).max() <= 1
  for program, inputs in ((encode_images, (pixels, latents)), (decode_images, (latents,))):
    text = program.lower(vae.VAE(CONFIG), params, *inputs).compile().as_text()
    assert " convolution(" in text and "ynn" not in text
  assert programs.decode_images("cpu") is decode_images is not programs.decode_images("tpu")


@pytest.mark.parametrize("options", lowering.CONVOLUTIONS.values(), ids=lowering.CONVOLUTIONS)
def test_its_options_are_known(options):
  """To JAX, or to XLA on a CPU; an unknown one is refused."""
  compiled = lambda options: (
    jax.jit(vae.convolve, compiler_options=options)
    .lower(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))).compile()
  )
  compiled(options)
  with pytest.raises(jax.errors.JaxRuntimeError):
    compiled({f"no_{name}": value for name, value in options.items()})


def test_parameter_tree_is_the_checkpoint_s(params):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  created = jax.eval_shape(vae.VAE(CONFIG).init, jax.random.key(0), images)["params"]
  shape_and_dtype = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
  assert jax.tree.map(shape_and_dtype, created) == jax.tree.map(shape_and_dtype, params)


def test_released_sizes():
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  net = vae.VAE(config_lib.VAEConfig())
  created = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
  count = {side: sum(leaf.size for leaf in jax.tree.leaves(created[side])) for side in created}
  assert count == {"encoder": 34_274_208, "decoder": 49_545_475}
  mean, _ = jax.eval_shape(lambda p, x: net.apply({"params": p}, x, method="encode"),
                           created, images)
  assert mean.shape == (1, 8, 8, 16)


def test_query_blocks_change_nothing(params, monkeypatch):
  x = jax.random.normal(jax.random.key(0), (2, 5, 6, 64))
  run = lambda: vae.MidAttention().apply(  # noqa: E731
    {"params": params["decoder"]["mid_attention"]}, x
  )
  whole = run()
  monkeypatch.setattr(vae, "QUERY_BLOCK", 7)
  np.testing.assert_allclose(run(), whole, atol=5e-6)


def test_mid_attention_never_holds_all_scores():
  x = jax.ShapeDtypeStruct((1, 128, 128, 32), jnp.float32)
  net = vae.MidAttention()
  params = jax.eval_shape(net.init, jax.random.key(0), x)
  compiled = jax.jit(net.apply).lower(params, x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 16384**2 / 4


def test_images_of_a_batch_do_not_meet(encode, recorded):
  images = np.concatenate([recorded["in_image0"], recorded["in_lowcontrast_image"]])
  for together, alone in zip(encode(images), encode(images[:1])):
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_latents_from_moments_by_hand():
  # exp(2 ln 3 / 2) = 3, so 0.5 * (1 + 3 * 2 - 0.2) = 3.4; without noise 0.5 * (1 - 0.2) = 0.4.
  mean, logvar = jnp.ones(1), jnp.full(1, 2 * np.log(3.0))
  sampled = vae.latents_from_moments(mean, logvar, jnp.full(1, 2.0), scale=0.5, shift=0.2)
  np.testing.assert_allclose(sampled, [3.4], rtol=1e-6)
  fixed = vae.latents_from_moments(mean, logvar, None, scale=0.5, shift=0.2)
  np.testing.assert_allclose(fixed, [0.4], rtol=1e-6)


def test_to_uint8_truncates():
  # 127.5 and 254.9 would round up.
  pixels = jnp.array([-3.0, -1.0, 0.0, 2 * 254.9 / 255 - 1, 1.0, 7.0])
  np.testing.assert_array_equal(vae.to_uint8(pixels), np.uint8([0, 0, 127, 254, 255, 255]))


def test_recorded_packing():
  tables = np.load(GOLDEN / "l_tables.npz")
  latents = np.moveaxis(tables["in_latent"], 0, -1)[None]
  tokens = vae.pack_latents(latents, 2)
  np.testing.assert_array_equal(tokens[0], tables["out_packed_latent"])
  np.testing.assert_array_equal(vae.unpack_latents(tokens, 2, 3, 2), latents)


@pytest.mark.slow
def test_a_gradient_keeps_the_inputs_of_blocks_alone(monkeypatch):
  config = config_lib.VAEConfig(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, scale_factor=0.4, shift_factor=0.1
  )
  latents = jax.random.normal(jax.random.key(0), (2, 4, 4, config.z_channels))
  params = vae.VAE(config).init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]

  def loss(latents):
    return jnp.sum(jnp.sin(vae.VAE(config).apply({"params": params}, latents, method="decode")))

  def kept():
    residuals = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(loss, x)[1], latents))
    return sum(a.size for a in residuals if a.shape[:1] == latents.shape[:1])

  gradient, few = jax.jit(jax.grad(loss))(latents), kept()
  monkeypatch.setattr(vae, "RematResBlock", vae.ResBlock)
  monkeypatch.setattr(vae, "RematMidAttention", vae.MidAttention)
  np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(latents), rtol=1e-5, atol=1e-6)
  assert 3 * few < kept()


@pytest.mark.parametrize("side", [1, 3])
def test_a_convolutions_own_gradients_are_exact(side):
  with jax.enable_x64(True):
    x, kernel, of = (
      jax.random.normal(jax.random.key(i), shape, jnp.float64)
      for i, shape in enumerate([(2, 5, 4, 3), (side, side, 3, 6), (2, 5, 4, 6)])
    )
    got, pull = jax.vjp(vae.convolve, x, kernel)
    want, true_pull = jax.vjp(lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), x, kernel)
    np.testing.assert_array_equal(got, want)
    for mine, true in zip(pull(of), true_pull(of), strict=True):
      np.testing.assert_allclose(mine, true, rtol=1e-12, atol=1e-12)
