"""TextGRPO: the reward of the image trains the reasoning alone (UniGRPO, arXiv 2603.23500, eq. 2).

  python -m unigrpo_jax.train --config=configs/text_grpo.py:tiny --workdir=runs/text_grpo

Everything else is that of `configs/unigrpo.py`, whose variants and keys it has, but for those of
the drawing's objective; the generation expert stays as it is, and draws over what the trained
understanding expert has thought.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_UNIGRPO = pathlib.Path(__file__).with_name("unigrpo.py")


def get_config(variants: str = "") -> ConfigDict:
  """The configuration of UniGRPO without its flow objective."""
  unigrpo = runpy.run_path(_UNIGRPO)
  unigrpo["refuse_objectives"](variants, "the drawing is not trained here")
  config = unigrpo["get_config"](variants)
  config.flow.train = False  # its images are only sampled
  config.learning_rate.gen = 0.0  # without a gradient, weight decay would still move it
  return config
