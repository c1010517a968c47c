"""A learned reward as the reward model of exam points."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from unigrpo_jax.benchmarks import ta
from unigrpo_jax.reward_models import host, learned

QUESTION = "{prompt} Answer yes or no."  # about a point, as the paper's judge is asked


def open_ask(folder: str) -> ta.Ask:
  """What asks the model of a folder with reward.json about points, one a question.

  A model that was trained on plain descriptions ("two red kites") is asked as it was trained.

  Raises:
    InputError: see `judge.open_folder`.
  """
  reward_model, params = learned.open_folder(folder)
  question = reward_model.question if reward_model.prompt_form == "plain" else QUESTION
  reward_model = dataclasses.replace(reward_model, question=question, readout="two_token")
  score = jax.jit(reward_model.score)

  def ask(images: Sequence[np.ndarray], statements: Sequence[str]) -> np.ndarray:
    asked = [reward_model.questions([statement]) for statement in statements]
    return host.score_all(score, params, images, asked)

  return ask
