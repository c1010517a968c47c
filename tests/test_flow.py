"""The flow sampler and guidance, by hand and by their limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.sampling import flow


def _velocities(seed=0, images=2, tokens=3, features=4):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(images, tokens, features)), jnp.float32) for _ in range(3)]


def test_time_grid_by_hand():
  np.testing.assert_allclose(flow.time_grid(3, 1.0), [1, 0.5, 0])
  # u = 1/2 at shift 3: 1.5 / (1 + 2 * 0.5)
  np.testing.assert_allclose(flow.time_grid(3, 3.0), [1, 0.75, 0])


@pytest.mark.parametrize("shift", [1.0, 2.16, 3.0])
def test_time_begins_at_one_and_ends_at_zero_also_compiled(shift):
  """The noise of the first step is singular there, and known to be by t >= 1."""
  for count in (2, 25, 42, 48, 50, 56, 62, 98):
    grid = flow.time_grid(count, shift)
    compiled = jax.jit(lambda count=count: flow.time_grid(count, shift))()
    np.testing.assert_array_equal(grid, compiled)
    assert grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()


def test_n_points_make_n_minus_one_evaluations():
  times = []
  velocity = lambda x, t: (jax.debug.callback(lambda t: times.append(float(t)), t), x)[1]
  flow.integrate(velocity, jnp.ones((1, 1, 1)), flow.time_grid(5, 1.0))
  jax.effects_barrier()
  assert sorted(times, reverse=True) == [1.0, 0.75, 0.5, 0.25]


def test_euler_steps_by_hand():
  """v = 2 t from x = 10 on [1, 1/2, 0]: 10 - 2 * 1/2 - 1 * 1/2."""
  steps = []
  x, (before, v) = flow.integrate(
    lambda x, t: jnp.full_like(x, 2 * t), jnp.full((1, 1, 1), 10.0), flow.time_grid(3, 1.0),
    record=True, on_step=lambda i: steps.append(int(i)),
  )
  jax.effects_barrier()
  assert x.item() == 8.5 and before.ravel().tolist() == [10, 9] and v.ravel().tolist() == [2, 1]
  assert sorted(steps) == [0, 1]


def test_a_straight_flow_arrives_at_its_data():
  data, noise, _ = _velocities()
  x = flow.integrate(lambda x, t: noise - data, noise, flow.time_grid(11, 3.0))
  np.testing.assert_allclose(x, data, atol=1e-5)


def test_latents_must_be_float32():
  with pytest.raises(AssertionError):
    flow.integrate(lambda x, t: x, jnp.ones((1, 1, 1), jnp.bfloat16), flow.time_grid(3, 1.0))


def test_guide_by_hand():
  """One token of two features: v = (3, 4), a = (1, 1), scale 2: w = (5, 7), renormed to |v| = 5."""
  v, a = jnp.array([[[3.0, 4.0]]]), jnp.array([[[1.0, 1.0]]])
  w = np.array([5.0, 7.0])
  for renorm in flow.RENORMS:
    got = flow.guide(v, a, None, flow.Guidance(text_scale=2.0, renorm=renorm))
    np.testing.assert_allclose(got[0, 0], w * 5 / np.linalg.norm(w), rtol=1e-6)
  got = flow.guide(v, a, None, flow.Guidance(text_scale=2.0, renorm_min=1.0))
  np.testing.assert_allclose(got[0, 0], w, rtol=1e-6)


def test_image_step_by_hand():
  """b = (0, 1), image scale 3: b + 3 (w - b) with w = (5, 7) is (15, 19), renormed to 5."""
  v, a, b = (jnp.array([[pair]]) for pair in ([3.0, 4.0], [1.0, 1.0], [0.0, 1.0]))
  last = np.array([15.0, 19.0])
  got = flow.guide(v, a, b, flow.Guidance(text_scale=2.0, image_scale=3.0, renorm="channel"))
  np.testing.assert_allclose(got[0, 0], last * 5 / np.linalg.norm(last), rtol=1e-6)
  # text_channel renorms w first, and leaves what the image step makes of it.
  got = flow.guide(v, a, b, flow.Guidance(text_scale=2.0, image_scale=3.0, renorm="text_channel"))
  w = np.array([5.0, 7.0]) * 5 / np.sqrt(74)
  np.testing.assert_allclose(got[0, 0], [0 + 3 * w[0], 1 + 3 * (w[1] - 1)], rtol=1e-6)


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_an_image_ignores_its_neighbours_unless_coupled(renorm):
  v, a, b = _velocities()
  b = b.at[1].mul(100)
  guidance = flow.Guidance(image_scale=1.5, renorm=renorm)
  together = flow.guide(v, a, b, guidance)
  alone = flow.guide(v[:1], a[:1], b[:1], guidance)
  np.testing.assert_allclose(together[0], alone[0], rtol=1e-6)
  coupled = flow.guide(v, a, b, flow.Guidance(image_scale=1.5, renorm=renorm, pack_coupled=True))
  assert (np.abs(coupled[0] - alone[0]).max() > 1e-3) == (renorm == "global")


@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_padding_equals_deleted_padding(renorm):
  pad = lambda a: jnp.pad(a, ((0, 0), (0, 2), (0, 0)))
  v, a, b = _velocities()
  guidance = flow.Guidance(image_scale=1.5, renorm=renorm)
  padded = flow.guide(pad(v), pad(a), pad(b), guidance)
  np.testing.assert_allclose(padded[:, :3], flow.guide(v, a, b, guidance), rtol=1e-6)
  assert (padded[:, 3:] == 0).all()


def test_guidance_acts_inside_its_interval_only():
  calls = []

  def text_fn(x, t):
    jax.debug.callback(lambda t: calls.append(float(t)), t)
    return jnp.zeros_like(x)

  guidance = flow.Guidance(text_scale=4.0, interval=(0.25, 0.75), renorm_min=1.0)
  velocity = flow.guided(lambda x, t: jnp.ones_like(x), text_fn, None, guidance)
  _, (_, v) = flow.integrate(
    velocity, jnp.zeros((1, 1, 1)), flow.time_grid(5, 1.0), record=True
  )
  jax.effects_barrier()
  # t = 1, 0.75, 0.5, 0.25: open below, closed above.
  assert v.ravel().tolist() == [1, 4, 4, 1]
  assert sorted(calls) == [0.5, 0.75]


def test_scale_one_turns_everything_off():
  main = lambda x, t: x
  for scale in (1.0, 0.5):
    guidance = flow.Guidance(text_scale=scale, image_scale=9.0)
    assert flow.guided(main, None, None, guidance) is main


def test_jitted_equals_not():
  v, a, b = _velocities()
  guidance = flow.Guidance(image_scale=2.0)
  run = lambda: flow.guide(v, a, b, guidance)
  chex.assert_trees_all_close(jax.jit(run)(), run(), rtol=1e-6)
