"""A reward model as a reward of finished pictures: uint8 in, the same numbers as in a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.episodes import requests
from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import sharding

AT_ONCE, PIXELS = 48, 2**20  # pictures that are scored together, and their pixels


def at_once(size: tuple[int, int]) -> int:
  """How many pictures of a height and width are scored together."""
  return max(min(AT_ONCE, PIXELS // (size[0] * size[1])), 1)


def device_bytes(
  model: learned.RewardModel, params: Any, size: tuple[int, int], question_tokens: int
) -> int:
  """What `LearnedReward` takes of its device: parameters, and what its program needs while it runs.

  `params` are shapes, for a device that need not be there; `size` is that of the pictures.
  """
  rows = at_once(size)
  questions = learned.Questions(
    jax.ShapeDtypeStruct((rows, question_tokens), np.int32),
    jax.ShapeDtypeStruct((rows,), np.int32),
  )
  pixels = jax.ShapeDtypeStruct((rows, *size, 3), np.float32)
  return sharding.program_bytes(jax.jit(model.score).lower(params, pixels, questions).compile())


class LearnedReward:
  """The reward `reward_model`: how likely a model answers "yes" when asked if a picture fits.

  It runs on this host's last device, whatever the policy's mesh. A prompt that the model cannot be
  asked about scores NaN.

  Attributes:
    fingerprint: of the reward model; see `rewards.Reward`.
  """

  def __init__(self, *, folder: str = learned.TINY, readout: str = ""):
    """Loads a reward model.

    Args:
      folder: see `learned.open_folder`.
      readout: one of `readout.READOUTS`; "": the one that the folder names.

    Raises:
      InputError: see `learned.open_folder`.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[-1:])
    self._model, self._params = learned.open_folder(folder, mesh)
    if readout:
      self._model = dataclasses.replace(self._model, readout=readout)
    self._score = jax.jit(self._model.score)
    made = self._model
    self.fingerprint = f"{made.checksum} {made.readout}"
    self.settings = {"model": made.checksum} | {
      name: getattr(made, name)
      for name in ("readout", "tau", "question", "prompt_form", "vit_max")
    }

  def __call__(self, samples: Sequence[rewards.Sample]) -> rewards.Scores:
    """Scores N pictures; see the class."""
    model = self._model
    return rewards.score_encodable(
      samples, lambda sample: model.questions([model.words(sample.prompt, sample.metadata)]),
      lambda able, asked: score_all(
        self._score, self._params, [sample.image for sample in able], asked
      ),
    )


def score_all(
  score: Callable[..., jax.Array], params: Any, images: Sequence[np.ndarray],
  asked: Sequence[learned.Questions],
) -> np.ndarray:
  """Scores N pictures of any sizes.

  Args:
    score: the jitted `RewardModel.score`; compiles once per size of pictures and of questions.
    params: of the network.
    images: [H, W, 3] uint8 each.
    asked: one question per picture, `RewardModel.questions` of a single prompt each.

  Returns:
    [N] float32.
  """
  values = np.empty(len(images), np.float32)
  for places, size in requests.by_size([image.shape[:2] for image in images], PIXELS):
    step = at_once(size)
    for first in range(0, len(places), step):
      part = places[first : first + step]
      filled = [part[i % len(part)] for i in range(step)]  # one shape, so one program
      pixels = np.stack([images_lib.to_array(images[place]) for place in filled])
      questions = learned.stack([asked[place] for place in filled])
      values[part] = np.asarray(score(params, pixels, questions))[: len(part)]
  return values
