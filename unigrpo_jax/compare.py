"""Trains several methods from the same checkpoint: `python -m unigrpo_jax.compare --help`."""

from unigrpo_jax import errors
from unigrpo_jax.tools.compare import command

if __name__ == "__main__":
  errors.report(command.main)
