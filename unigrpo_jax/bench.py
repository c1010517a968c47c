"""Times a joint iteration on random weights: `python -m unigrpo_jax.bench --help`."""

from unigrpo_jax import errors
from unigrpo_jax.tools import bench

if __name__ == "__main__":
  errors.report(bench.main)
