"""The workloads of the benchmark: their shapes, configs, and FLOPs by formula."""

from __future__ import annotations

from collections.abc import Collection, Sequence
import dataclasses
import math

import numpy as np

from unigrpo_jax.data import tokenizer
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files
from unigrpo_jax.runtime import folders, state
from unigrpo_jax.tools import flops


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is timed: a group of trajectories of one prompt.

  Attributes:
    layers, width, heads, kv_heads, ffn, vocab: sizes of the network.
    system, prompt, tokens: number of tokens of system prompt, prompt and reasoning.
    latents: latent tokens of an image, a square number.
    points: of the time grid; there is one denoising step less.
    window: number of SDE steps.
    group: number of trajectories.
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
# {update: parameter groups that it trains}.
TRAINED = {
  "image_update": ("gen",), "text_update": ("und",), "joint_update": ("und", "gen"),
}
MATMUL_SIDE = 2048
MATMULS = 2  # before each phase
# Id of the terminator: no sampled id equals it, so every reasoning has full length. As an index it
# is the last row of the embeddings.
NEVER = -1


def network_config(work: Workload) -> config_lib.BagelConfig:
  """The network's sizes; the ViT is not used, so it is as small as possible."""
  return config_lib.BagelConfig(
    llm=config_lib.LLMConfig(
      hidden_size=work.width, intermediate_size=work.ffn, num_layers=work.layers,
      num_heads=work.heads, num_kv_heads=work.kv_heads, vocab_size=work.vocab, rope_theta=1e6,
      rms_norm_eps=1e-6, max_positions=32768,
    ),
    vit=config_lib.ViTConfig(
      hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, patch_size=2, image_size=8
    ),
    max_latent_size=max(math.isqrt(work.latents), 8), vit_max_patches_per_side=4,
  )


def network(work: Workload, spec: state.NetworkSpec, devices: Sequence) -> state.Network:
  """The network of a workload, on devices but without weights, with a stub of a tokenizer."""
  folder = folders.ModelFolder(None, "official", None, network_config(work))

  def encode(text: str) -> list[int]:
    """Random ids for any text; with its two markers it is as long as the workload says."""
    count = (work.system if text == tokenizer.SYSTEM_PROMPT_GEN else work.prompt) - 2
    return np.random.default_rng(count).integers(3, work.vocab - 3, count).tolist()

  stub = tokenizer.Tokenizer(
    None, im_start=1, im_end=NEVER, vision_start=work.vocab - 3, vision_end=work.vocab - 2,
    size=work.vocab, encode_text=encode, decode_ids=lambda ids: "",
  )
  return state.build_network(spec, folder, stub, devices)


def training_config(
  work: Workload, dtype: str, remat: str, trained: Collection[str] = ("und", "gen"), *,
  attention: str = "auto",
):
  """`configs/unigrpo.py` for a workload: one epoch, one microbatch, no reference policy."""
  config = config_files.load(f"{config_files.FOLDER / 'unigrpo.py'}:no_regulariser")
  pixels = math.isqrt(work.latents) * network_config(work).latent_stride
  config.update(dict(
    dtype=dtype, remat=remat, attention=attention, epochs=1, prompts_per_step=1,
    group_size=work.group, microbatch=work.group,
  ))
  config.mesh.tensor = 1
  config.rollout.update(dict(
    prompts_at_once=1, prompt_tokens=work.prompt, max_tokens=work.tokens, height=pixels,
    width=pixels, num_timesteps=work.points, window_size=work.window,
    window_range=(0, min(max(5, work.window), work.points - 1)),
  ))
  config.text.train, config.flow.train = "und" in trained, "gen" in trained
  for group, rate in config.learning_rate.items():
    config.learning_rate[group] = rate if group in trained else 0.0
  return config


def phase_flops(work: Workload) -> dict[str, int]:
  """{phase: model FLOPs}, of all trajectories of the group together."""
  sizes = flops.Sizes.of(network_config(work))
  before = work.system + work.prompt
  context = before + work.tokens
  velocity = flops.velocity(sizes, work.latents, context=context)
  # The context has no backward pass where the generation expert alone trains.
  window = (work.window * velocity).update(TRAINED["image_update"])
  text = flops.text(sizes, context, scored=work.tokens).update(TRAINED["text_update"])
  decode = flops.decode(sizes, work.tokens, context=before)
  return {
    "matmul": len(PHASES) * MATMULS * 2 * MATMUL_SIDE**3,
    "read": flops.text(sizes, before).forward,
    "decode": work.group * decode.forward,
    "denoise": work.group * (work.points - 1) * velocity.forward,
    "image_update": work.group * (flops.text(sizes, context).forward + window),
    "text_update": work.group * text,
    "joint_update": work.group * (text + window),  # the context is read once
  }
