"""FlowGRPO: the reward trains the drawing alone (UniGRPO, arXiv 2603.23500, eqs. 6 and 8).

  python -m unigrpo_jax.train --config=configs/flow_grpo.py:tiny --workdir=runs/flow_grpo
  python -m unigrpo_jax.train --config=configs/flow_grpo.py:tiny,no_think --workdir=runs/no_think

Everything else is that of `configs/unigrpo.py`, whose variants and keys it has. It reasons before
it draws, by the network that training started from; with the variant `no_think` it does not.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_UNIGRPO = pathlib.Path(__file__).with_name("unigrpo.py")


def get_config(variants: str = "") -> ConfigDict:
  """The configuration of UniGRPO without its text objective."""
  unigrpo = runpy.run_path(_UNIGRPO)
  unigrpo["VARIANTS"]["no_think"] = unigrpo["draw_alone"]
  config = unigrpo["get_config"](variants)
  config.text.train = False  # its words are only sampled
  config.learning_rate.und = 0.0  # without a gradient, weight decay would still move it
  return config
