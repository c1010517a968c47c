"""What the benchmark times: shapes, their configuration, and their FLOPs by formula."""

from __future__ import annotations

import dataclasses
import math

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files
from unigrpo_jax.tools import flops


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is timed.

  Attributes:
    layers, width, heads, kv_heads, ffn, vocab: sizes of the network.
    system, prompt, tokens: of text: system prompt, prompt, reasoning.
    latents: tokens of an image, a square number.
    points: of the time grid; one velocity evaluation less.
    window: SDE steps.
    group: trajectories.
  """

  layers: int
  width: int
  heads: int
  kv_heads: int
  ffn: int
  vocab: int
  system: int
  prompt: int
  tokens: int
  latents: int
  points: int
  window: int
  group: int


SHAPES = {
  "tiny": Workload(4, 128, 4, 2, 512, 1024, 32, 16, 48, 64, 9, 3, 8),
  "small": Workload(8, 256, 8, 2, 1024, 4096, 48, 24, 96, 256, 15, 3, 8),
  "unigrpo_shape": Workload(4, 256, 8, 2, 1024, 4096, 64, 32, 128, 1024, 25, 3, 4),
}
ROLLOUT = ("read", "decode", "denoise")
ITERATION = (*ROLLOUT, "image_update", "text_update")
JOINT_ITERATION = (*ROLLOUT, "joint_update")
PHASES = (*ITERATION, "joint_update")
TOTALS = {"rollout": ROLLOUT, "iteration": ITERATION, "joint_iteration": JOINT_ITERATION}
# What each update trains.
TRAINED = {
  "image_update": ("gen",), "text_update": ("und",), "joint_update": ("und", "gen"),
}
MATMUL_SIDE = 2048
MATMULS = 2  # before each phase


def network_config(work: Workload) -> config_lib.BagelConfig:
  """Sizes of the network; the ViT, which takes no part, as small as can be."""
  side = math.isqrt(work.latents)
  if side**2 != work.latents:
    raise errors.InputError(f"latents={work.latents} is not a square; choose one, e.g. {side**2}")
  return config_lib.BagelConfig(
    llm=config_lib.LLMConfig(
      hidden_size=work.width, intermediate_size=work.ffn, num_layers=work.layers,
      num_heads=work.heads, num_kv_heads=work.kv_heads, vocab_size=work.vocab, rope_theta=1e6,
      rms_norm_eps=1e-6, max_positions=32768,
    ),
    vit=config_lib.ViTConfig(
      hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, patch_size=2, image_size=8
    ),
    max_latent_size=max(side, 8), vit_max_patches_per_side=4,
  )


def training_config(work: Workload, dtype: str, remat: bool):
  """`configs/unigrpo.py` with one epoch of one microbatch, and nothing that needs a reference."""
  config = config_files.load(f"{config_files.FOLDER / 'unigrpo.py'}:no_regulariser")
  pixels = math.isqrt(work.latents) * network_config(work).latent_stride
  config.update(dict(
    dtype=dtype, remat=remat, epochs=1, prompts_per_step=1, group_size=work.group,
    microbatch=work.group,
  ))
  config.rollout.update(dict(
    prompts_at_once=1, prompt_tokens=work.prompt, max_tokens=work.tokens, height=pixels,
    width=pixels, num_timesteps=work.points, window_size=work.window,
    window_range=(0, min(max(5, work.window), work.points - 1)),
  ))
  return config


def phase_flops(work: Workload) -> dict[str, int]:
  """Model FLOPs of each phase, all trajectories of the group together."""
  sizes = flops.Sizes.of(network_config(work))
  before = work.system + work.prompt
  context = before + work.tokens
  velocity = flops.velocity(sizes, work.latents, context=context)
  image = flops.image_update(
    sizes, context=context, latents=work.latents, window=work.window,
    trained=TRAINED["image_update"],
  )
  text = flops.text_update(
    sizes, prompt=before, tokens=work.tokens, trained=TRAINED["text_update"]
  )
  # Jointly the context runs once, and no gradient of the image reaches it.
  joint = text + (work.window * velocity).update(TRAINED["image_update"])
  decode = flops.decode(sizes, work.tokens, context=before)
  return {
    "matmul": len(PHASES) * MATMULS * 2 * MATMUL_SIDE**3,
    "read": flops.text(sizes, before).forward,
    "decode": work.group * decode.forward,
    "denoise": work.group * (work.points - 1) * velocity.forward,
    "image_update": work.group * image,
    "text_update": work.group * text,
    "joint_update": work.group * joint,
  }
