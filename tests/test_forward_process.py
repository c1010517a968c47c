"""Objectives that noise the image again: by hand, limits, gradients, masks."""

import math

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.losses import flow, forward_process

jitted_and_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def image(*values):
  return jnp.array(values, jnp.float32).reshape(1, -1, 1)


def batch():
  """v, v_old, x_0, noise, t, mask of two images of different sizes."""
  v, v_old, x_0, noise = jax.random.normal(jax.random.key(0), (4, 2, 3, 2))
  return v, v_old, x_0, noise, jnp.array([0.3, 0.9]), jnp.arange(3) < jnp.array([[3], [2]])


def test_optimality_by_hand():
  adv = jnp.array([-10, -2.5, 0, 2.5, 10])
  expected = {
    "all": [0, 0.25, 0.5, 0.75, 1], "positive_only": [0.5, 0.5, 0.5, 0.75, 1],
    "negative_only": [0, 0.25, 0.5, 0.5, 0.5], "one_only": [0.5, 0.5, 0.5, 0.6, 0.6],
    "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
  }
  assert set(expected) == set(forward_process.OPTIMALITIES)
  for kind, values in expected.items():
    good = forward_process.optimality(adv, bound=5.0, kind=kind)
    np.testing.assert_allclose(good, values, rtol=1e-6)


@jitted_and_not
def test_nft_by_hand(wrap):
  # t = 1/2, x_0 = 0, noise 2: x_t = 1. beta = 1/2, v_old = 1, v = 3: v+ = 2, v- = 0.
  # Predictions 1 - 1 = 0 and 1 - 0 = 1: errors 0 over 1e-5, and 1 over 1; (1 - r) * scale / beta.
  run = wrap(lambda v, r: forward_process.nft_losses(
    v, image(1), image(0), image(2), jnp.array([0.5]), r, jnp.ones((1, 1), bool), beta=0.5,
    scale=3.0,
  ))
  np.testing.assert_allclose(run(image(3), jnp.array([0.25])), [0.75 * 3 / 0.5])
  # v = v_old: both miss by 1/2, 1/4 over 1/2, whatever r.
  np.testing.assert_allclose(run(image(1), jnp.array([0.25])), [0.5 * 3 / 0.5])


def test_nft_pulls_good_images_and_pushes_bad_ones():
  _, v_old, x_0, noise, t, mask = batch()
  run = lambda v, r: forward_process.nft_losses(
    v, v_old, x_0, noise, t, jnp.full(2, r), mask, beta=0.1, scale=1.0
  ).sum()
  good, bad, even = (jax.grad(run)(v_old, r) for r in (1.0, 0.0, 0.5))
  # At v = v_old the two mirror each other, and cancel at r = 1/2.
  np.testing.assert_allclose(good, -bad, rtol=1e-5)
  np.testing.assert_allclose(even, 0, atol=1e-6)
  # The gradient of the good ones points from the target, noise - x_0, to the velocity.
  assert (jnp.sign(good) == jnp.sign(v_old - (noise - x_0)))[mask].all()


def test_nft_gradient_numerically_and_masked_equals_deleted():
  v, v_old, x_0, noise, t, mask = batch()
  good = jnp.array([0.8, 0.3])

  def loss(v, weight=None):
    return forward_process.nft_losses(
      v, v_old, x_0, noise, t, good, mask, beta=0.5, scale=2.0
    ).sum()

  # Denominators are constants of the gradient: differences of a function that has them fixed.
  away, time = t[:, None, None] * (noise - x_0), t[:, None, None]
  misses = lambda v, s: away - time * ((1 - s * 0.5) * v_old + s * 0.5 * v)
  sizes = [flow.element_mean(jnp.abs(misses(v, s)), mask) for s in (1, -1)]

  def fixed(v):
    plus, minus = (flow.element_mean(jnp.square(misses(v, s)), mask) / size
                   for s, size in zip((1, -1), sizes))
    return jnp.sum(good * plus + (1 - good) * minus) * 2.0 / 0.5

  np.testing.assert_allclose(loss(v), fixed(v), rtol=1e-5)
  test_util.check_grads(fixed, (v,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
  np.testing.assert_allclose(jax.grad(loss)(v), jax.grad(fixed)(v), rtol=1e-4, atol=1e-6)
  spoiled = jnp.where(mask[..., None], v, jnp.nan)
  np.testing.assert_array_equal(jax.grad(loss)(spoiled), jax.grad(loss)(v))
  alone = forward_process.nft_losses(
    v[1:, :2], v_old[1:, :2], x_0[1:, :2], noise[1:, :2], t[1:], good[1:], mask[1:, :2], beta=0.5,
    scale=2.0,
  )
  whole = forward_process.nft_losses(
    spoiled, v_old, x_0, noise, t, good, mask, beta=0.5, scale=2.0
  )
  np.testing.assert_allclose(whole[1:], alone, rtol=1e-6)


@jitted_and_not
def test_awm_by_hand(wrap):
  # Misses 3 and 5: m = 17. t = 1/2.
  run = lambda kind: wrap(lambda v: forward_process.awm_log_prob(
    v, image(1, 1), image(2, 2), jnp.array([0.5]), jnp.ones((1, 2), bool), weighting=kind
  ))(image(4, 6)).item()
  expected = {"uniform": -17, "t": -8.5, "t2": -4.25, "huber": -math.sqrt(17) / 2,
              "ghuber": -2 * (17**0.25 - 1e-10**0.25)}
  assert set(expected) == set(forward_process.AWM_WEIGHTINGS)
  for kind, value in expected.items():
    np.testing.assert_allclose(run(kind), value, rtol=1e-5)


@pytest.mark.parametrize("weighting", forward_process.AWM_WEIGHTINGS)
def test_awm_gradient_numerically(weighting):
  v, _, x_0, noise, t, mask = batch()
  run = lambda v: forward_process.awm_log_prob(
    v, x_0, noise, t, mask, weighting=weighting
  ).sum()
  test_util.check_grads(run, (v,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
  spoiled = jnp.where(mask[..., None], v, jnp.nan)
  np.testing.assert_array_equal(jax.grad(run)(spoiled), jax.grad(run)(v))
  # A perfect prediction has probability 1, and a finite gradient.
  perfect = jax.value_and_grad(run)(noise - x_0)
  np.testing.assert_allclose(perfect[0], 0, atol=1e-5)
  assert jnp.isfinite(perfect[1]).all()


def test_refusals():
  with pytest.raises(ValueError, match="'some'"):
    forward_process.optimality(batch()[4], bound=1.0, kind="some")
