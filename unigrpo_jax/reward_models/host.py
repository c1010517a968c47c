"""A judge as a reward of finished pictures: uint8 in, the same numbers as in a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from unigrpo_jax import errors, rewards
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.episodes import requests
from unigrpo_jax.reward_models import judge as judge_lib
from unigrpo_jax.runtime import sharding

AT_ONCE, PIXELS = 48, 2**20  # pictures that are scored together, and their pixels


class JudgeReward:
  """How likely the judge's "yes" is to "does the picture show the prompt?"; `rewards.Reward`.

  It runs on this host's last device, whatever the policy's mesh. A prompt that it cannot ask about
  scores NaN.

  Attributes:
    fingerprint: of the judge; a run that continues with another is refused.
  """

  def __init__(self, *, folder: str = judge_lib.TINY, readout: str = ""):
    """Loads a judge's folder; `readout` is one of `readout.READOUTS`, "" for the folder's own.

    Raises:
      InputError: see `judge.open_judge`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[-1:])
    self._judge, self._params = judge_lib.open_judge(folder, mesh)
    if readout:
      self._judge = dataclasses.replace(self._judge, readout=readout)
    self._score = jax.jit(self._judge.score)
    self.fingerprint = f"{self._judge.checksum} {self._judge.readout}"

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    values, reason = np.full(len(samples), np.nan, np.float32), None
    able, asked = [], []
    for row, sample in enumerate(samples):
      try:
        asked.append(self._judge.questions([self._judge.words(sample.prompt, sample.metadata)]))
        able.append(row)
      except errors.InputError as error:
        reason = str(error)
    values[able] = score_all(
      self._score, self._params, [samples[row].image for row in able], asked
    )
    return rewards.Scores(values, reason)


def score_all(
  score: Callable[..., jax.Array], params: Any, images: Sequence[np.ndarray],
  asked: Sequence[judge_lib.Questions],
) -> np.ndarray:
  """Scores of N pictures [H, W, 3] uint8 of any sizes, a question each: [N] float32.

  `score` is a jitted `Judge.score`, which compiles once a size of pictures and of questions.
  """
  values = np.empty(len(images), np.float32)
  for places, size in requests.by_size([image.shape[:2] for image in images], PIXELS):
    step = max(min(AT_ONCE, PIXELS // (size[0] * size[1])), 1)
    for first in range(0, len(places), step):
      part = places[first : first + step]
      filled = [part[i % len(part)] for i in range(step)]  # one shape, so one program
      pixels = np.stack([images_lib.to_array(images[place]) for place in filled])
      questions = judge_lib.stack([asked[place] for place in filled])
      values[part] = np.asarray(score(params, pixels, questions))[: len(part)]
  return values
