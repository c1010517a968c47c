"""Rewards of finished samples, on the host: what scores an image, and threads that run it."""

# These register what they hold.
from unigrpo_jax.rewards import http, iconworld, pixels  # noqa: F401
from unigrpo_jax.rewards.base import Reward, Sample, evaluate, make, names, register
from unigrpo_jax.rewards.scorer import Scorer

__all__ = ["Reward", "Sample", "Scorer", "evaluate", "make", "names", "register"]
