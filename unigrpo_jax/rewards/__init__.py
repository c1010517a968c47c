"""Rewards of finished samples, on the host; no module here imports jax."""

# These register their rewards.
from unigrpo_jax.rewards import geneval, http, iconworld, judge, ocr, pixels, protocols  # noqa: F401
from unigrpo_jax.rewards.base import Reward, Sample, Scores, evaluate, score_encodable
from unigrpo_jax.rewards.making import make, names, register
from unigrpo_jax.rewards.scorer import RESERVED, Failure, Scorer

__all__ = [
  "RESERVED", "Failure", "Reward", "Sample", "Scorer", "Scores", "evaluate", "make", "names",
  "register", "score_encodable",
]
