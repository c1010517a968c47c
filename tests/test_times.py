"""Times at which finished images are noised again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.refusals import refusal
from unigrpo_jax.sampling import flow, times

GRID = np.asarray(flow.time_grid(13, 3.0))[:-1]


def _draw(kind, count=6, rows=500):
  draws = times.Times(count, kind, num_timesteps=13, shift=3.0)
  drawn = jax.jit(draws.draw, static_argnums=1)(jax.random.key(0), rows)
  assert drawn.shape == (rows, count) and drawn.dtype == jnp.float32
  return np.asarray(drawn)


def test_uniform_times_depend_on_no_grid():
  drawn = _draw("uniform")
  assert 0.01 <= drawn.min() < 0.02 and 0.98 < drawn.max() < 1
  other = jax.jit(times.Times(6, "uniform").draw, static_argnums=1)(jax.random.key(0), 500)
  np.testing.assert_array_equal(drawn, other)


def test_grid_times_are_all_points_but_the_image():
  values, counts = np.unique(_draw("grid"), return_counts=True)
  np.testing.assert_array_equal(values, GRID[::-1])  # 1 is one of them, 0 is not
  assert counts.min() > 0.7 * counts.max()


def test_stratified_times_by_hand():
  """12 points, of which the first and those from floor(0.9 x 12) = 10 on are left out."""
  indices = times.stratified_indices(jnp.zeros(6), 1, 10)
  assert indices.tolist() == [1, 2, 4, 5, 7, 8]  # 1, 2.5, 4, 5.5, ... rounded down
  last = times.stratified_indices(jnp.full(6, 0.999), 1, 10)
  assert last.tolist() == [1, 3, 4, 6, 7, 9]
  drawn = _draw("stratified")
  assert set(np.unique(drawn)) == set(GRID[1:10])
  assert (np.diff(drawn) < 0).all()  # one a stratum
  # More strata than points: some give the same.
  assert times.stratified_indices(jnp.zeros(4), 1, 3).tolist() == [1, 1, 2, 2]


def test_strata_of_continuous_times():
  for kind, low in (("stratified_uniform", 0.2), ("logit_normal", 0.01)):
    drawn = _draw(kind)
    assert (np.diff(drawn) > 0).all() and drawn.max() <= 1
    assert drawn.min() >= low  # a shift above 1 only raises times
  middle = times.logit_normal(jnp.full(1, 0.5), 3.0)
  np.testing.assert_allclose(middle, [0.75], rtol=1e-6)  # 3 (1/2) / (1 + 2 (1/2))
  np.testing.assert_allclose(times.stratified_uniform(jnp.full(2, 0.5), 1.0), [0.4, 0.8])
  assert jnp.isfinite(times.logit_normal(jnp.array([0.0, 1 - 2**-24]), 3.0)).all()


@pytest.mark.parametrize("points", [2, 3])
def test_a_grid_without_points_is_refused(points):
  with_points = times.Times(6, "stratified", num_timesteps=points)
  assert "all of them; use at least 3" in refusal(with_points.check)
  times.Times(6, "stratified", num_timesteps=4).check()
  times.Times(6, "grid", num_timesteps=points).check()
  assert "did you mean 'grid'" in refusal(times.Times(6, "gird").check)
