"""A reward model that knows nothing: the smallest BAGEL that trains, asked about pictures."""

from __future__ import annotations

import json
import pathlib
import shutil

from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import checksums


def make(bagel: pathlib.Path, place: pathlib.Path, **changes) -> pathlib.Path:
  """Makes `place`, a copy of an official folder that a reward model is opened from."""
  shutil.copytree(bagel, place)
  record = dict(
    question=learned.TINY_QUESTION, yes_id=88, no_id=77, tau=1.0, readout="two_token",
    vit_max=32,
    prompt_form="prompt", clip="hard",
    checksums={"ema.safetensors": list(checksums.of(place / "ema.safetensors"))},
  )
  (place / learned.FILE).write_text(json.dumps(record | changes))
  return place
