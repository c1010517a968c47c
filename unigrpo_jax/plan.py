"""Plans a run before a chip is rented: `python -m unigrpo_jax.plan --help`."""

from unigrpo_jax import errors
from unigrpo_jax.tools.plan import command

if __name__ == "__main__":
  errors.report(command.main)
