"""A learned reward as the judge of exam points."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax.benchmarks import ta
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.reward_models import judge as judge_lib

QUESTION = "{prompt} Answer yes or no."  # about a point, as the paper's judge is asked
ROWS = 64  # points at once


def open_ask(folder: str) -> ta.Ask:
  """What asks the model of a folder with reward.json about points, one a question.

  A model that was trained on plain descriptions ("two red kites") is asked as it was trained.

  Raises:
    InputError: see `judge.open_judge`.
  """
  judge, params = judge_lib.open_judge(folder)
  question = judge.question if judge.prompt_form == "plain" else QUESTION
  judge = dataclasses.replace(judge, question=question, readout="two_token")
  score = jax.jit(judge.score)

  def ask(images: Sequence[np.ndarray], statements: Sequence[str]) -> np.ndarray:
    made = np.empty(len(statements))
    for shape in dict.fromkeys(image.shape for image in images):
      rows = [row for row, image in enumerate(images) if image.shape == shape]
      for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        filled = [*part, *part[:1] * (ROWS - len(part))]  # one shape, which compiles once
        pixels = jnp.stack([images_lib.to_array(images[row]) for row in filled])
        questions = judge.questions([statements[row] for row in filled])
        made[part] = np.asarray(score(params, pixels, questions))[: len(part)]
    return made

  return ask
