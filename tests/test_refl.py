"""ReFL on a toy network: what is differentiated, what is constant, and when nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unigrpo_jax.losses import refl
from unigrpo_jax.sampling import direct, flow

B, I, C, P, N = 4, 3, 2, 5, 12
TIMES = flow.time_grid(N + 1, 3.0)
KEYS = iter(jax.random.split(jax.random.key(0), 8))
NORMAL = lambda *shape: jax.random.normal(next(KEYS), shape)
PARAMS = {"w1": NORMAL(C, 7), "w2": NORMAL(7, C)}
DECODE, WANTED, NOISE = NORMAL(C, P), NORMAL(B, I, P), NORMAL(B, I, C)
CLOSE = dict(rtol=1e-5, atol=1e-7)


def velocity(params):
  return lambda x, t: jnp.tanh(x @ params["w1"] + t) @ params["w2"]


def reward(x_0, wanted=WANTED):
  """A probability, of pixels that are clipped."""
  image = jnp.clip(x_0 @ DECODE, -1, 1)
  return jax.nn.sigmoid(jnp.mean(image * wanted, axis=(1, 2)))


def before(steps, params=PARAMS):
  """(x_m, t_m) of each row."""
  steps = jnp.asarray(steps, jnp.int32)[:, None]
  drawn = flow.integrate_recording(velocity(params), NOISE, TIMES, steps)
  return drawn.x_t[:, 0], drawn.t[:, 0], drawn.latents


def loss_fn(params, x_t, t, wanted=WANTED, margin=1.0, weight=1.0):
  """(F1) without its regularisers, of some rows as their share of all."""
  x_0 = direct.predict(x_t, velocity(params)(x_t, t[:, None, None]), t)
  rewards, _ = refl.reward_with_gradient(reward, x_0, wanted)
  return refl.reward_loss(rewards, jnp.full(len(x_t), weight / B), margin=margin)[0]


LATE = np.array([9, 11, 10, 11])
X_T, T, FINISHED = jax.jit(before)(LATE)
gradient_of = jax.jit(jax.grad(loss_fn))
GRADIENT = gradient_of(PARAMS, X_T, T)


@pytest.mark.parametrize("steps, low", [(24, 18), (12, 9), (40, 30), (13, 10), (1, 0), (2, 1)])
def test_the_last_quarter_of_the_steps(steps, low):
  # N = 24, shift 3: times from 0.5 down to 0.115, none of them 0.
  assert direct.late_range(steps) == (low, steps)
  if steps == 24:
    t = flow.time_grid(25, 3.0)[low:steps]
    np.testing.assert_allclose([t[0], t[-1]], [0.5, 3 / 26], rtol=1e-6)


def test_recorded_states_are_those_of_the_ode():
  x, (history, _) = jax.jit(lambda: flow.integrate(velocity(PARAMS), NOISE, TIMES, record=True))()
  np.testing.assert_array_equal(X_T, history[LATE, jnp.arange(B)])
  np.testing.assert_array_equal(T, TIMES[LATE])
  np.testing.assert_array_equal(FINISHED, x)


def test_the_last_step_predicts_the_finished_image():
  v = velocity(PARAMS)(X_T, T[:, None, None])
  x_0 = direct.predict(X_T, v, T)
  last = LATE == N - 1
  # Two programs, which a compiler may round apart.
  np.testing.assert_allclose(x_0[last], FINISHED[last], rtol=1e-6)
  assert np.abs(x_0 - FINISHED)[~last].max() > 1e-3


def test_the_reward_carries_its_exact_gradient():
  x_0 = FINISHED
  scale = jnp.arange(1.0, B + 1)
  rewards, gradient = refl.reward_with_gradient(reward, x_0)
  np.testing.assert_array_equal(rewards, reward(x_0))
  of = lambda reward_fn: jax.grad(lambda x: jnp.sum(scale * reward_fn(x)))(x_0)
  ours = of(lambda x: refl.reward_with_gradient(reward, x)[0])
  np.testing.assert_allclose(ours, of(reward), **CLOSE)
  np.testing.assert_allclose(gradient, of(reward) / scale[:, None, None], **CLOSE)


def test_the_gradient_is_that_of_the_differentiated_step():
  def plain(params):
    v = velocity(params)(X_T, T[:, None, None])
    return jnp.mean(1 - reward(X_T - T[:, None, None] * v))

  for name, expected in jax.grad(plain)(PARAMS).items():
    np.testing.assert_allclose(GRADIENT[name], expected, **CLOSE)


def test_nothing_flows_into_the_steps_before():
  def through(params, earlier):
    x_t, t, _ = before(LATE, earlier)
    return loss_fn(params, x_t, t)

  of_params, of_earlier = jax.jit(jax.grad(through, (0, 1)))(PARAMS, PARAMS)
  for name, gradient in GRADIENT.items():
    np.testing.assert_allclose(of_params[name], gradient, **CLOSE)
    np.testing.assert_array_equal(of_earlier[name], 0)


def test_microbatches_of_any_size_add_up():
  rows = [slice(row, row + 1) for row in range(B)]
  parts = [gradient_of(PARAMS, X_T[row], T[row], WANTED[row]) for row in rows]
  for name, gradient in GRADIENT.items():
    np.testing.assert_allclose(sum(part[name] for part in parts), gradient, rtol=1e-6, atol=1e-7)


def test_good_enough_is_left_alone():
  v = velocity(PARAMS)(X_T, T[:, None, None])
  rewards = reward(direct.predict(X_T, v, T))
  gradient = gradient_of(PARAMS, X_T, T, margin=float(rewards.min()))
  for value in gradient.values():
    np.testing.assert_array_equal(value, 0)
  _, signals = refl.reward_loss(rewards, jnp.full(B, 0.25), margin=float(np.median(rewards)))
  assert signals["zero_gradient"].sum() == 2


def test_a_row_without_weight_counts_for_nothing():
  rewards = jnp.array([0.25, jnp.nan, 0.5, 1.5])
  value, gradient = jax.value_and_grad(
    lambda r: refl.reward_loss(r, jnp.array([0.5, 0.0, 0.25, 0.25]), margin=1.0)[0]
  )(rewards)
  np.testing.assert_allclose(value, 0.5 * 0.75 + 0.25 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(gradient, [-0.5, 0, -0.25, 0])


def test_adam_does_not_see_the_weight():
  adam = optax.adam(1e-3, eps=1e-30)
  update = jax.jit(lambda gradient: adam.update(gradient, adam.init(PARAMS))[0])
  heavy = update(gradient_of(PARAMS, X_T, T, weight=10.0))
  for name, expected in update(GRADIENT).items():
    np.testing.assert_allclose(heavy[name], expected, rtol=1e-4)


def test_a_small_step_raises_the_reward():
  moved = jax.tree.map(lambda p, g: p - 1e-3 * g, PARAMS, GRADIENT)
  loss = jax.jit(loss_fn)
  assert loss(moved, X_T, T) < loss(PARAMS, X_T, T)


def drafted(params, gradient_steps):
  first = direct.first_differentiated(N, gradient_steps)
  x_t = flow.integrate(velocity(params), NOISE, TIMES[: first + 1])
  return jnp.mean(1 - reward(direct.finish(velocity(params), x_t, TIMES[first:])))


drafted_gradient = jax.jit(jax.grad(drafted), static_argnums=1)


def test_one_differentiated_step_is_refl_at_the_last_index():
  x_t, t, _ = jax.jit(before)(np.full(B, N - 1))
  expected = gradient_of(PARAMS, x_t, t)
  for name, gradient in drafted_gradient(PARAMS, 1).items():
    np.testing.assert_allclose(gradient, expected[name], **CLOSE)


def test_all_steps_are_differentiated_for_0_and_for_more_than_there_are():
  def plain(params):
    x = NOISE
    for t, t_next in zip(TIMES[:-1], TIMES[1:]):
      x = x - velocity(params)(x, t) * (t - t_next)
    return jnp.mean(1 - reward(x))

  expected = jax.jit(jax.grad(plain))(PARAMS)
  for steps in (0, N + 3):
    for name, gradient in drafted_gradient(PARAMS, steps).items():
      np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_direct_alignment_gives_the_image_back():
  """Where the velocity is the true one, whatever the times; v moves it by t - t_next."""
  x_0, noise = FINISHED, NOISE
  t, t_next = jnp.full(B, 0.9), jnp.full(B, 0.8)
  x_t = direct.noised(x_0, noise, t)
  align = lambda v: direct.align(x_t, v, noise, t, t_next)
  np.testing.assert_allclose(align(noise - x_0), x_0, rtol=1e-4, atol=1e-5)
  moved = align(noise - x_0 + 1) - align(noise - x_0)
  np.testing.assert_allclose(moved, -0.1 / 0.2, rtol=1e-3)
