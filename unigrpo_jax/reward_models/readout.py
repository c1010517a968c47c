"""From the logits of the answer's first token to a reward.

Letters: V vocabulary; l_y, l_n the logits of "yes" and "no"; tau the temperature.
"""

from __future__ import annotations

import jax

from unigrpo_jax.models import layers

# Ways to read a reward from logits; see `read`.
READOUTS = ("two_token", "vocabulary", "logit", "log")


def margin(logits: jax.Array, *, yes_id: int, no_id: int, tau: float = 1.0) -> jax.Array:
  """z = (l_y - l_n) / tau of logits [..., V]: [...], at least float32."""
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  return (logits[..., yes_id] - logits[..., no_id]) / tau


def read(
  logits: jax.Array, *, yes_id: int, no_id: int, tau: float = 1.0, readout: str = "two_token"
) -> jax.Array:
  """The reward of logits [..., V]: [...], at least float32.

    two_token   R = sigmoid(z), z = (l_y - l_n) / tau: softmax over the two tokens
    vocabulary  softmax(l / tau)[yes], over all tokens, as in VQAScore (arXiv 2404.01291)
    logit       z
    log         log R

  `two_token` depends only on the difference of the two logits: dR/dl_y = R (1 - R) / tau =
  -dR/dl_n. `vocabulary` also falls when a third token becomes likelier.
  """
  if readout == "vocabulary":
    logits = logits.astype(layers.at_least_float32(logits.dtype))
    return jax.nn.softmax(logits / tau, axis=-1)[..., yes_id]
  z = margin(logits, yes_id=yes_id, no_id=no_id, tau=tau)
  return {"two_token": jax.nn.sigmoid, "log": jax.nn.log_sigmoid, "logit": lambda z: z}[readout](z)
