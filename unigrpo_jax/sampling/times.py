"""Times at which a finished image is noised again, for algorithms that need no SDE.

The grid is that of `flow.time_grid`, whose last point, t = 0, is the image itself and no time to
learn at; its N = num_timesteps - 1 other points are those where velocities are evaluated.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.sampling import flow

KINDS = ("uniform", "grid", "stratified", "stratified_uniform", "logit_normal")
LEAST = 0.01  # of times that are on no grid
LOWEST = 0.2  # of "stratified_uniform", before the shift
FRACTION = 0.9  # of the grid that "stratified" draws from: not its last points


@dataclasses.dataclass(frozen=True)
class Times:
  """How many times of each image, and where they come from.

    uniform             of [0.01, 1], each by itself
    grid                points of the grid, each by itself; t = 1 is one of them (FPO)
    stratified          points of the grid but t = 1 and the last tenth of them (rounded up), one a
                        stratum (AWM)
    stratified_uniform  of [0.2, 1], one a stratum, then shifted (AWM)
    logit_normal        sigmoid of a normal variable, one a stratum, then shifted (AWM)

  Attributes:
    count: times of an image.
    kind: one of KINDS.
    num_timesteps, shift: of the sampler's grid.
  """

  count: int
  kind: str = "uniform"
  num_timesteps: int = 2
  shift: float = 1.0

  def check(self) -> None:
    """Refuses a grid that has no point to draw.

    Raises:
      InputError: says how many points there must be.
    """
    errors.choose("times", self.kind, KINDS)
    if self.kind == "stratified" and self._end <= 1:
      raise errors.InputError(
        f"times=stratified leaves out the first point and the last tenth of the "
        f"{self.num_timesteps - 1} velocity evaluations, which is all of them; use at least 3 or "
        "another kind"
      )

  @property
  def _end(self) -> int:
    return int((self.num_timesteps - 1) * FRACTION)

  def draw(self, key, rows: int) -> chex.Array:
    """Times of `rows` images, each with draws of its own: [rows, count] float32 in (0, 1]."""
    shape = (rows, self.count)
    if self.kind == "uniform":
      return jax.random.uniform(key, shape, minval=LEAST)
    grid = flow.time_grid(self.num_timesteps, self.shift)[:-1]
    if self.kind == "grid":
      return grid[jax.random.randint(key, shape, 0, len(grid))]
    u = jax.random.uniform(key, shape)
    if self.kind == "stratified":
      return grid[stratified_indices(u, 1, self._end)]
    between = stratified_uniform if self.kind == "stratified_uniform" else logit_normal
    return between(u, self.shift)


def stratified_indices(u: chex.Array, low: int, high: int) -> chex.Array:
  """One of low, ..., high - 1 from each of N strata, increasing; [..., N] int32.

  Stratum j is from low + j (high - low) / N to the next one's start, both rounded down: strata
  differ in width, and one without a number gives its start. u [..., N] float32 in [0, 1) says which
  of its numbers. Source: the "discrete" times of AWM's code.
  """
  count = u.shape[-1]
  bounds = low + np.arange(count + 1) * (high - low) // max(count, 1)
  start, width = bounds[:-1], np.diff(bounds)
  return jnp.asarray(start, jnp.int32) + (u * jnp.asarray(width, u.dtype)).astype(jnp.int32)


def stratified_uniform(u: chex.Array, shift: float) -> chex.Array:
  """Uniform times of [0.2, 1], one from each of N equal strata, then shifted: [..., N] float32.

  u, the same in [0, 1), says where in its stratum.
  """
  return _shifted(LOWEST + (1 - LOWEST) * _strata(u), shift)


def logit_normal(u: chex.Array, shift: float) -> chex.Array:
  """sigmoid(z), z normal, from each of N strata of equal probability, then shifted; at least 0.01.

  u as in `stratified_uniform`.
  """
  inside = jnp.clip(_strata(u), 1e-7, 1 - 1e-7)
  return jnp.maximum(_shifted(jax.nn.sigmoid(jax.scipy.special.ndtri(inside)), shift), LEAST)


def _strata(u: chex.Array) -> chex.Array:
  count = u.shape[-1]
  return (jnp.arange(count, dtype=u.dtype) + u) / count


def _shifted(t: chex.Array, shift: float) -> chex.Array:
  return shift * t / (1 + (shift - 1) * t)
