"""A learned reward as the judge of exam points."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from unigrpo_jax.benchmarks import ta
from unigrpo_jax.reward_models import host, learned

QUESTION = "{prompt} Answer yes or no."  # about a point; the wording of the paper's judge


def open_ask(folder: str) -> ta.Ask:
  """Opens a learned reward as a function that answers exam points; see `ta.Ask`.

  A model that was trained on plain descriptions ("two red kites") is asked as in its training.

  Args:
    folder: of the reward model, with a reward.json.

  Raises:
    InputError: see `learned.open_folder`.
  """
  reward_model, params = learned.open_folder(folder)
  question = reward_model.question if reward_model.prompt_form == "plain" else QUESTION
  reward_model = dataclasses.replace(reward_model, question=question, readout="two_token")
  score = jax.jit(reward_model.score)

  def ask(images: Sequence[np.ndarray], statements: Sequence[str]) -> np.ndarray:
    asked = [reward_model.questions([statement]) for statement in statements]
    return host.score_all(score, params, images, asked)

  return ask
