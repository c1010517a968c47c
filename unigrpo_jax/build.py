"""Makes the embedded tiny BAGEL from nothing: `python -m unigrpo_jax.build --help`."""

from unigrpo_jax import errors
from unigrpo_jax.tools import build

if __name__ == "__main__":
  errors.report(build.main)
