"""The supervised objectives: numbers by hand, masked equals deleted, gradients, memory."""

import math

import chex
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.losses import supervised

jitted_and_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def cross_entropy(hidden, ids, weight, kernel, *, chunk=2):
  return supervised.cross_entropy(lambda h: h @ kernel, hidden, ids, weight, chunk=chunk)


def random_labels(rows=2, count=5, width=3, vocab=7):
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (rows, count, width)),
    jax.random.randint(keys[1], (rows, count), 0, vocab),
    jax.random.uniform(keys[2], (rows, count), minval=0.1),
    jax.random.normal(keys[3], (width, vocab)),
  )


@jitted_and_not
def test_cross_entropy_by_hand(wrap):
  # Logits (0, 0): log 2. Logits (log 3, 0): label 0 has 3/4, label 1 has 1/4.
  hidden = jnp.array([[[0.0], [math.log(3)], [math.log(3)]]])
  loss, ce = wrap(cross_entropy)(
    hidden, jnp.array([[0, 0, 1]]), jnp.array([[1.0, 2.0, 1.0]]), jnp.array([[1.0, 0.0]])
  )
  expected = np.array([[math.log(2), math.log(4 / 3), math.log(4)]])
  np.testing.assert_allclose(ce, expected, rtol=1e-6)
  np.testing.assert_allclose(loss, (expected @ [1, 2, 1]).item() / 4, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_cross_entropy_does_not_depend_on_the_chunk(chunk):
  hidden, ids, weight, kernel = random_labels()
  logp = jax.nn.log_softmax(hidden @ kernel)
  expected = -jnp.take_along_axis(logp, ids[..., None], -1)[..., 0]
  loss, ce = cross_entropy(hidden, ids, weight, kernel, chunk=chunk)
  np.testing.assert_allclose(ce, expected, rtol=1e-5)
  np.testing.assert_allclose(loss, (expected * weight).sum() / weight.sum(), rtol=1e-5)


@jitted_and_not
def test_masked_labels_equal_deleted_labels(wrap):
  hidden, ids, weight, kernel = random_labels()
  weight = weight.at[:, 2:4].set(0.0)
  hidden = hidden.at[:, 2:4].set(jnp.nan)
  run = wrap(jax.value_and_grad(cross_entropy, has_aux=True, argnums=(0, 3)))
  (loss, ce), (by_hidden, by_kernel) = run(hidden, ids, weight, kernel)
  keep = np.array([0, 1, 4])
  (loss_kept, ce_kept), (by_hidden_kept, by_kernel_kept) = run(
    hidden[:, keep], ids[:, keep], weight[:, keep], kernel
  )
  np.testing.assert_allclose(loss, loss_kept, rtol=1e-6)
  np.testing.assert_allclose(ce[:, keep], ce_kept, rtol=1e-6)
  np.testing.assert_array_equal(ce[:, 2:4], 0)
  np.testing.assert_allclose(by_hidden[:, keep], by_hidden_kept, rtol=1e-5)
  np.testing.assert_array_equal(by_hidden[:, 2:4], 0)
  np.testing.assert_allclose(by_kernel, by_kernel_kept, rtol=1e-5, atol=1e-7)


def test_cross_entropy_gradients_numerically():
  hidden, ids, weight, kernel = random_labels(count=3)
  test_util.check_grads(
    lambda h, k: cross_entropy(h, ids, weight, k)[0], (hidden, kernel), order=1, modes=["rev"],
    atol=1e-2, rtol=1e-2,
  )


def test_nothing_to_predict_is_no_loss_and_no_gradient():
  hidden, ids, weight, kernel = random_labels()
  run = jax.value_and_grad(lambda h: cross_entropy(h, ids, 0 * weight, kernel)[0])
  loss, gradient = run(hidden)
  assert loss == 0
  np.testing.assert_array_equal(gradient, 0)


def test_never_holds_the_logits_of_all_labels():
  rows, count, vocab, chunk = 2, 32, 1000, 4
  hidden, ids, weight, kernel = random_labels(rows, count, 3, vocab)
  run = jax.value_and_grad(
    lambda h, k: cross_entropy(h, ids, weight, k, chunk=chunk)[0], argnums=(0, 1)
  )
  largest = max(_sizes(jax.make_jaxpr(run)(hidden, kernel).jaxpr))
  # Of the size of the kernel or of a chunk of logits, forward and backward.
  assert largest <= rows * chunk * vocab < rows * count * vocab
  # The probe itself: unchunked logits are seen.
  whole = jax.make_jaxpr(lambda h, k: cross_entropy(h, ids, weight, k, chunk=count))
  assert max(_sizes(whole(hidden, kernel).jaxpr)) == rows * count * vocab


def _sizes(jaxpr):
  """Element counts of everything that a jaxpr and those inside it compute."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        yield from _sizes(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
  return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_bfloat16_logits_are_summed_in_float32():
  hidden, ids, weight, kernel = random_labels()
  low = lambda h: (h @ kernel).astype(jnp.bfloat16)
  _, ce = supervised.cross_entropy(low, hidden, ids, weight, chunk=2)
  expected = -jax.nn.log_softmax(low(hidden).astype(jnp.float32))
  chex.assert_type(ce, jnp.float32)
  picked = jnp.take_along_axis(expected, ids[..., None], -1)[..., 0]
  np.testing.assert_allclose(ce, picked, rtol=1e-5)


def test_cross_entropy_refuses_other_shapes():
  hidden, ids, weight, kernel = random_labels()
  with pytest.raises(AssertionError):
    cross_entropy(hidden, ids[:, :-1], weight, kernel)


@jitted_and_not
def test_velocity_mse_by_hand(wrap):
  # noise - target is (1, 2) for every token; errors (1, -1), (3, 0), and one that does not count.
  target, noise = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 2)) + jnp.array([1.0, 2.0])
  velocity = jnp.array([[[2.0, 1.0], [4.0, 2.0], [jnp.nan, 9.0]]])
  loss, squared = wrap(supervised.velocity_mse)(
    velocity, target, noise, jnp.array([[True, True, False]])
  )
  np.testing.assert_allclose(squared, [[[1, 1], [9, 0], [0, 0]]], rtol=1e-6)
  np.testing.assert_allclose(loss, (1.0 + 4.5) / 2, rtol=1e-6)


def test_velocity_mse_masked_equals_deleted_with_gradients():
  velocity, target, noise = (jax.random.normal(jax.random.key(i), (2, 2, 4, 3)) for i in range(3))
  mask = jnp.arange(4) < jnp.array([2, 2])[:, None]
  mask = jnp.broadcast_to(mask[:, None], (2, 2, 4))
  run = jax.value_and_grad(lambda v, *rest: supervised.velocity_mse(v, *rest)[0])
  loss, gradient = run(velocity.at[:, :, 2:].set(jnp.nan), target, noise, mask)
  cut = lambda a: a[:, :, :2]
  loss_cut, gradient_cut = run(cut(velocity), cut(target), cut(noise), cut(mask))
  np.testing.assert_allclose(loss, loss_cut, rtol=1e-6)
  np.testing.assert_allclose(cut(gradient), gradient_cut, rtol=1e-6)
  np.testing.assert_array_equal(gradient[:, :, 2:], 0)
  test_util.check_grads(
    lambda v: supervised.velocity_mse(v, target, noise, mask)[0], (velocity,), order=1,
    modes=["rev"], atol=1e-2, rtol=1e-2,
  )


@jitted_and_not
def test_shifted_timesteps_by_hand(wrap):
  times = wrap(lambda z: supervised.shifted_timesteps(z, shift=3.0))
  # sigma(0) = 1/2: 3/2 / (1 + 2/2) = 3/4. sigma(log 3) = 3/4: 9/4 / (1 + 3/2) = 9/10.
  draws = jnp.array([0.0, math.log(3), -jnp.inf, jnp.inf])
  np.testing.assert_allclose(times(draws), [0.75, 0.9, 0.0, 1.0], rtol=1e-6)


def test_shift_of_one_is_the_sigmoid():
  draws = jax.random.normal(jax.random.key(0), (50,))
  np.testing.assert_allclose(
    supervised.shifted_timesteps(draws, shift=1.0), jax.nn.sigmoid(draws), rtol=1e-6
  )
