"""Makes a learned reward from a BAGEL: `python -m unigrpo_jax.reward_model --help`."""

from unigrpo_jax import errors
from unigrpo_jax.tools.reward_model import command

if __name__ == "__main__":
  errors.report(command.main)
