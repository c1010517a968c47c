"""Noisy flow steps: numbers by hand, limits, marginals, and rows that ignore each other."""

import math

import jax
from jax import test_util
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.sampling import flow, sde

jitted_and_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
every_kind = pytest.mark.parametrize("kind", sde.KINDS)


def image(*values):
  return jnp.array(values, jnp.float32).reshape(1, -1, 1)


def step(x, v, t, t_next, *, kind, level, second=0.9):
  return sde.transition(x, v, t, t_next, second, kind=kind, noise_level=level)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def run(
  velocity, noise, times, steps, *, kind="flow", level=0.8, mask=None, key=None, **options
):
  mask = jnp.ones(noise.shape[:2], bool) if mask is None else mask
  key = keys(len(noise)) if key is None else key
  steps = jnp.asarray(steps, jnp.int32)
  return sde.integrate(
    velocity, noise, times, steps, key, mask, kind=kind, noise_level=level, **options
  )


@jitted_and_not
def test_flow_step_by_hand(wrap):
  # t = 1/2, a = 1: sigma = 1; dt = -1/4. Noise 2 + 1/2 * 4 = 4, push -1/4: 2 - 1 - 1 = 0.
  move = wrap(lambda x, v: step(x, v, 0.5, 0.25, kind="flow", level=1.0))(image(2), image(4))
  np.testing.assert_allclose(move.mean.item(), 0.0, atol=1e-6)
  np.testing.assert_allclose([move.std, move.dt], [0.5, -0.25])
  np.testing.assert_allclose(move.slope, -0.25 - 0.25 * 0.5)


@jitted_and_not
def test_dance_and_cps_steps_by_hand(wrap):
  # dance, eta = 2: push = 4 * -1/4 / (2 * 1/2) = -1: 2 - 1 - 4 = -3, std = 2 * 1/2.
  move = wrap(lambda x, v: step(x, v, 0.5, 0.25, kind="dance", level=2.0))(image(2), image(4))
  np.testing.assert_allclose([move.mean.item(), move.std], [-3, 1], rtol=1e-6)
  # cps, a = 1/3: data 2 - 2 = 0, noise 4; std = 1/4 sin 30, mean = 4 * 1/4 cos 30.
  move = wrap(lambda x, v: step(x, v, 0.5, 0.25, kind="cps", level=1 / 3))(image(2), image(4))
  np.testing.assert_allclose([move.mean.item(), move.std], [math.sqrt(3) / 2, 1 / 8], rtol=1e-6)


def test_the_first_step_is_clamped_at_the_second_time():
  """1 - t_1 = |dt_0|, so the first step's std is the noise level, whatever the shift."""
  for shift in (1.0, 3.0):
    times = flow.time_grid(25, shift)
    move = step(image(1), image(1), times[0], times[1], kind="flow", level=0.8, second=times[1])
    np.testing.assert_allclose(move.std, 0.8, rtol=1e-5)


@pytest.mark.parametrize(("k", "sigma", "std", "x_coefficient", "slope"), [
  (0, 6.693, 0.8000, 0.680, -0.01429), (1, 6.645, 0.8173, 0.661, -0.01997),
  (2, 4.596, 0.5821, 0.826, -0.02118), (4, 3.098, 0.4174, 0.907, -0.02395),
])
def test_the_first_steps_of_25_at_shift_3(k, sigma, std, x_coefficient, slope):
  times = flow.time_grid(25, 3.0)
  at = lambda x, v: step(
    x, v, times[k], times[k + 1], kind="flow", level=0.8, second=times[1]
  )
  move = at(image(1), image(0))
  np.testing.assert_allclose(move.std / jnp.sqrt(-move.dt), sigma, atol=6e-4)
  np.testing.assert_allclose([move.std, move.mean.item()], [std, x_coefficient], atol=6e-4)
  np.testing.assert_allclose(move.slope, slope, atol=6e-6)


@every_kind
def test_slope_is_the_derivative_of_the_mean(kind):
  x, v = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
  t = jnp.array([1.0, 0.7, 0.1])
  at = lambda v: step(x, v, t, t - 0.1, kind=kind, level=0.7)
  _, along = jax.jvp(lambda v: at(v).mean, (v,), (jnp.ones_like(v),))
  expected = jnp.broadcast_to(at(v).slope[:, None, None], along.shape)
  np.testing.assert_allclose(along, expected, rtol=1e-5)


@every_kind
def test_without_noise_a_step_is_eulers(kind):
  x, v = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
  t = jnp.array([1.0, 0.7, 0.1])
  move = step(x, v, t, t - 0.1, kind=kind, level=0.0)
  np.testing.assert_array_equal(move.mean, x + v * (t - 0.1 - t)[:, None, None])
  np.testing.assert_array_equal(move.std, 0)
  np.testing.assert_array_equal(move.slope, move.dt)


@every_kind
def test_without_noise_integration_is_the_odes(kind):
  noise, times = jax.random.normal(jax.random.key(0), (2, 3, 4)), flow.time_grid(8, 3.0)
  velocity = lambda x, t: jnp.sin(x) + t
  expected = flow.integrate(velocity, noise, times)
  window = [[0, 1, 2], [4, 5, 6]]
  np.testing.assert_array_equal(
    run(velocity, noise, times, window, kind=kind, level=0.0).latents, expected
  )
  # No window at all, at any noise level.
  rollout = run(velocity, noise, times, np.zeros((2, 0)), kind=kind)
  np.testing.assert_array_equal(rollout.latents, expected)
  assert rollout.x_t.shape == (2, 0, 3, 4) and rollout.logp.shape == (2, 0)


def test_log_prob_by_hand():
  # Errors 1 and 3, mean square 5; std 2. The last token does not count.
  x_next, mean = image(1, 3, jnp.nan), image(0, 0, 7)
  mask, std = jnp.array([[True, True, False]]), jnp.array([2.0])
  at = lambda **kind: sde.log_prob(x_next, mean, std, mask, **kind)
  np.testing.assert_allclose(at(kind="flow"), [-5 / 8])
  constants = math.log(2) + 0.5 * math.log(2 * math.pi)
  np.testing.assert_allclose(at(kind="dance", normalised=True), [-5 / 8 - constants], rtol=1e-6)
  np.testing.assert_allclose(at(kind="cps", normalised=True), [-5])


@every_kind
def test_log_prob_gradient_numerically_and_not_into_x_next(kind):
  x_next, mean = jax.random.normal(jax.random.key(1), (2, 2, 3, 4))
  std, mask = jnp.array([0.5, 0.8]), jnp.array([[True, True, False], [True, False, False]])
  at = lambda mean: sde.log_prob(x_next, mean, std, mask, kind=kind).sum()
  test_util.check_grads(at, (mean,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
  spoiled = jnp.where(mask[..., None], mean, jnp.nan)
  gradient = jax.grad(at)(spoiled)
  np.testing.assert_array_equal(gradient, jax.grad(at)(mean))
  into = jax.grad(lambda x: sde.log_prob(x, mean, std, mask, kind=kind).sum())(x_next)
  np.testing.assert_array_equal(into, 0)


@every_kind
def test_marginals_are_those_of_the_ode(kind):
  """Data N(1, 1/4): x_t is N(1 - t, s^2), s^2 = (1 - t)^2 / 4 + t^2, and so is its velocity known.

  v = E[noise - data | x] = -1 + (t - (1 - t) / 4) / s^2 (x - (1 - t)).
  """
  def velocity(x, t):
    spread = jnp.square(1 - t) / 4 + jnp.square(t)
    return -1 + (t - (1 - t) / 4) / spread * (x - (1 - t))

  count = 10000
  noise = jax.random.normal(jax.random.key(3), (1, count, 1))
  # Steps of 1/400: their error is then less than the standard errors below.
  times = jnp.linspace(0.9, 0.2, 281)
  start = 0.1 + jnp.sqrt(0.01 / 4 + 0.81) * noise
  steps = np.arange(280)[None]
  level = {"flow": 1.0, "dance": 1.0, "cps": 0.1}[kind]
  x = run(velocity, start, times, steps, kind=kind, level=level).latents
  variance = 0.8**2 / 4 + 0.2**2
  # Four standard errors, of the mean and of the variance of that many normal draws. A push wrong
  # by a tenth moves the variance by more than five.
  assert abs(x.mean() - 0.8) < 4 * math.sqrt(variance / count)
  assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / count)
  # The path is random: it is not the ODE's.
  assert jnp.abs(x - flow.integrate(velocity, start, times)).mean() > 0.05


@every_kind
def test_the_window_is_what_was_drawn(kind):
  """Its means and densities follow from its own latents; outside it the path is Euler's."""
  noise, times = jax.random.normal(jax.random.key(0), (2, 3, 4)), flow.time_grid(7, 3.0)
  velocity = lambda x, t: jnp.cos(3 * x) * t
  mask = jnp.array([[True, True, True], [True, False, False]])
  # Scattered, in any order, and the row's own; the last step too.
  rollout = run(velocity, noise, times, [[4, 1], [0, 5]], kind=kind, mask=mask)
  x, now, after = noise, np.asarray(times), np.asarray(times)[1:]
  np.testing.assert_array_equal(rollout.t, now[[[4, 1], [0, 5]]])
  np.testing.assert_array_equal(rollout.t_next, after[[[4, 1], [0, 5]]])
  for k in range(6):
    euler = x + velocity(x, times[k]) * (times[k + 1] - times[k])
    rows = []
    for row, window in enumerate([[4, 1], [0, 5]]):
      if k not in window:
        rows.append(euler[row])
        continue
      w = window.index(k)
      np.testing.assert_allclose(rollout.x_t[row, w], x[row], atol=1e-5)
      rows.append(rollout.x_next[row, w])
    x = jnp.stack(rows)
  np.testing.assert_allclose(rollout.latents, x, atol=1e-5)
  v = velocity(rollout.x_t, rollout.t[..., None, None])
  move = sde.transition(
    rollout.x_t, v, rollout.t, rollout.t_next, times[1], kind=kind, noise_level=0.8
  )
  np.testing.assert_allclose(rollout.mean, move.mean, atol=1e-6)
  logp = sde.log_prob(rollout.x_next, move.mean, move.std, mask[:, None], kind=kind)
  np.testing.assert_allclose(rollout.logp, logp, rtol=1e-4, atol=1e-6)
  # What was drawn is noise of size std: not its mean.
  assert (jnp.abs(rollout.x_next - rollout.mean).max((2, 3)) > move.std / 2)[move.std > 0].all()


def test_a_row_alone_is_the_row_in_a_batch():
  noise, times = jax.random.normal(jax.random.key(0), (3, 4, 2)), flow.time_grid(6, 3.0)
  velocity, steps = lambda x, t: x * t - 1, np.array([[0, 1], [3, 1], [2, 4]])
  together = run(velocity, noise, times, steps)
  for row in range(3):
    cut = slice(row, row + 1)
    alone = run(velocity, noise[cut], times, steps[cut], key=keys(3)[cut])
    # The latents to the bit; a sum over them may be taken in another order.
    np.testing.assert_array_equal(alone.latents, together.latents[cut])
    np.testing.assert_array_equal(alone.x_next, together.x_next[cut])
    np.testing.assert_array_equal(alone.mean, together.mean[cut])
    np.testing.assert_allclose(alone.logp, together.logp[cut], rtol=1e-6)


def test_padding_equals_deleted_padding():
  noise, times = jax.random.normal(jax.random.key(0), (2, 5, 2)), flow.time_grid(6, 3.0)
  mask = jnp.arange(5) < jnp.array([3, 3])[:, None]
  velocity, steps = lambda x, t: x * t - 1, [[0, 1], [3, 1]]
  padded = run(velocity, noise, times, steps, mask=mask)
  cut = run(velocity, noise[:, :3], times, steps)
  np.testing.assert_array_equal(padded.latents[:, :3], cut.latents)
  np.testing.assert_allclose(padded.logp, cut.logp, rtol=1e-6)


def test_one_program_for_every_window(compilations):
  noise, times = jnp.ones((2, 3, 2)), flow.time_grid(9, 3.0)
  program = jax.jit(lambda steps: run(lambda x, t: x, noise, times, steps).latents)
  windows = [jnp.full((2, 1), start) + jnp.arange(3) for start in (0, 4)]
  first = program(windows[0])
  before = len(compilations)
  second = program(windows[1])
  assert len(compilations) == before
  assert jnp.abs(first - second).max() > 1e-3


def _draws(jaxpr, path=()):
  """For each primitive that draws random bits, the primitives that it lies within."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "random_bits":
      yield path
    for number, sub in enumerate(core.jaxprs_in_params(equation.params)):
      yield from _draws(sub, (*path, (name, number)))


def test_noise_is_drawn_within_the_window_alone():
  noise, times = jnp.ones((2, 3, 2)), flow.time_grid(9, 3.0)
  traced = jax.make_jaxpr(lambda steps, key: run(lambda x, t: x, noise, times, steps, key=key))
  paths = list(_draws(traced(jnp.zeros((2, 2), jnp.int32), keys(2)).jaxpr))
  # One draw, in one branch of the condition on the step.
  assert len(paths) == 1
  assert ("scan", 0) in paths[0] and [part for part in paths[0] if part[0] == "cond"]


@every_kind
def test_keys_matter_within_the_window_alone(kind):
  """Before its first step and after its last the path is the ODE's."""
  noise, times = jax.random.normal(jax.random.key(0), (2, 3, 4)), flow.time_grid(8, 3.0)
  velocity = lambda x, t: jnp.sin(x) + t
  first, second = (
    run(velocity, noise, times, [[2, 3]] * 2, kind=kind, key=keys(2, seed)) for seed in (0, 1)
  )
  before = flow.integrate(velocity, noise, times[:3])
  for rollout in (first, second):
    np.testing.assert_allclose(rollout.x_t[:, 0], before, atol=1e-6)
    after = flow.integrate(velocity, rollout.x_next[:, 1], times[4:])
    np.testing.assert_allclose(rollout.latents, after, atol=1e-6)
  assert float(jnp.abs(first.x_next - second.x_next).min((2, 3)).min()) > 0


def test_steps_are_reported():
  seen = []
  noise, times = jnp.ones((1, 1, 1)), flow.time_grid(4, 1.0)
  run(lambda x, t: x, noise, times, [[1]], on_step=lambda i: seen.append(int(i)))
  jax.effects_barrier()
  assert sorted(seen) == [0, 1, 2]


def test_refusals():
  noise, times = jnp.ones((1, 1, 1)), flow.time_grid(4, 1.0)
  with pytest.raises(ValueError, match="ode"):
    run(lambda x, t: x, noise, times, [[1]], kind="ode")
  with pytest.raises(AssertionError):
    run(lambda x, t: x, noise.astype(jnp.bfloat16), times, [[1]])
  with pytest.raises(AssertionError):
    run(lambda x, t: x, noise, times, [[1], [1]])
  with pytest.raises(AssertionError):
    step(image(1), image(1, 2), 0.5, 0.4, kind="flow", level=0.5)


def test_a_density_of_an_unknown_kind_is_refused():
  x = jnp.zeros((1, 2, 3))
  with pytest.raises(ValueError, match="ode"):
    sde.log_prob(x, x, jnp.ones(1), jnp.ones((1, 2), bool), kind="ode")
