"""A vision-language model behind an OpenAI-compatible server as a reward."""

from unigrpo_jax.rewards.judge import reward  # noqa: F401  Registers it.
