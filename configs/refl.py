"""ReFL, a baseline of UniGRPO (2603.23500): a frozen reward's gradient trains the drawing.

  python -m unigrpo_jax.train --config=configs/refl.py:tiny --workdir=runs/refl \\
    --config.refl.reward_model=REWARD_MODEL
  python -m unigrpo_jax.train --config=configs/refl.py:tiny,think --workdir=runs/refl_think \\
    --config.refl.reward_model=REWARD_MODEL

Everything else is that of `configs/unigrpo.py`, whose variants and keys it has, but for `cfg`,
`latent_kl` and those of other objectives. It draws from the prompt alone; with the variant `think`
it reasons first, by the network that training started from.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_UNIGRPO = pathlib.Path(__file__).with_name("unigrpo.py")


def get_config(variants: str = "") -> ConfigDict:
  """As many trajectories an iteration as UniGRPO has, but of as many prompts."""
  unigrpo = runpy.run_path(_UNIGRPO)
  unigrpo["refuse_objectives"](variants, "the drawing's objective is ReFL here")
  unigrpo["VARIANTS"]["think"] = lambda config: None  # below: it is the default of UniGRPO
  config = unigrpo["get_config"](variants)
  is_tiny, thinks = config.init_from == "tiny", "think" in variants.split(",")
  config.flow.objective = "refl"
  config.refl.reward_model = "tiny_reward_model" if is_tiny else ""
  for section, key in ((config, "prompts_per_step"), (config.rollout, "prompts_at_once")):
    section[key] *= config.group_size
  config.group_size = 1  # nothing is compared
  config.epochs, config.minibatches = 1, 2  # two halves, two optimizer steps
  config.text.train, config.rollout.think = False, thinks
  config.learning_rate.und = 0.0  # without a gradient, weight decay would still move it
  if "lora" not in variants.split(","):  # which has its own
    config.learning_rate.gen = 1e-4 if is_tiny else 1e-5
  config.flow.regulariser_weight = 0.1  # as it is, at any size
  config.schedule = "constant"
  modes = ("think", "plain") if thinks else ("plain", "think")
  config.eval.modes = modes if is_tiny else (*modes, *(f"{mode}+guidance" for mode in modes))
  return config
