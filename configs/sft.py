"""Supervised fine-tuning: the first stage of UniGRPO (arXiv 2603.23500), the way to a tiny BAGEL.

  python -m unigrpo_jax.train --config=configs/sft.py --config.init_from=BAGEL-7B-MoT \\
    --config.data.folder=shards --workdir=runs/sft     # BAGEL-7B-MoT on up to 8 chips; on N also
    # --config.microbatch=N --config.limits.images=N
  python -m unigrpo_jax.train --config=configs/sft.py:tiny --workdir=runs/tiny   # IconWorld, on CPU

`:tiny` and `:tiny_look` are stages of `python -m unigrpo_jax.build`, which makes the embedded BAGEL
from random weights; by themselves they go on from it. `:reward_model` and
`:tiny_reward_model` are for `python -m unigrpo_jax.reward_model`, whose triples take the
place of the section data.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  """The configuration for BAGEL-7B-MoT, or with a variant for IconWorld."""
  config = ConfigDict()
  config.algorithm = "sft"  # which training this is; "unigrpo" is that of configs/unigrpo.py
  config.seed = 0  # of examples, noise and random weights
  config.steps = 10_000  # optimizer steps
  config.init_from = ""  # official or converted folder, or a name of the Hugging Face hub
  config.random_init = False  # keep the folder's sizes, tokenizer and VAE, not its network
  config.export_to = ""  # official folder to write at the end; "" for none
  config.export_dtype = "bfloat16"  # of its weights

  # Data
  config.data = ConfigDict()
  config.data.folder = ""  # of *.jsonl shards, which leave the two below unread; "" is IconWorld
  config.data.mixture = ConfigDict(  # IconWorld: relative frequency of each task
    dict(draw_think=0.55, draw=0.1, answer=0.2, describe=0.0, edit=0.15))
  config.data.wrong_plan_rate = 0.0  # IconWorld: part of the reasonings that go wrong
  config.sequences_per_step = 64  # of all hosts together; a multiple of microbatch
  config.microbatch = 8  # sequences at once, all hosts together
  # () keeps their shapes, and the autoencoder compiles for each size: a minute's wait on a TPU.
  config.image_sizes = ()  # (height, width), pixels: images to draw or edit are cropped to them
  config.noise_draws = 1  # noisy copies of each target image, which share its context
  config.timestep_shift = 4.0  # of the training times towards noise; 1 for none
  config.drop_text = 0.1  # probability of drawing without prompt and reasoning, for guidance
  config.drop_vit = 0.3  # of editing without what the ViT sees of the source
  config.drop_vae = 0.3  # of editing without the latents of the source
  config.limits = ConfigDict()  # sizes of every batch; a sample beyond them stops the run
  config.limits.tokens = 8192  # understanding tokens a sequence, ViT patches included
  config.limits.labels = 1536  # a sequence
  config.limits.images = 8  # ViT images a microbatch, all hosts together
  config.limits.patches = 4900  # an image
  config.limits.clean = 4096  # clean latent tokens a sequence
  config.limits.latents = 4096  # latent tokens an image to draw

  # Loss
  config.ce_weight = 0.25  # of the cross entropy of words
  config.ce_weighting = "token"  # what counts alike: "token", "sample", or between them "square"
  config.mse_weight = 1.0  # of the error of velocities
  config.label_chunk = 256  # labels a sequence whose logits exist at once

  # Adapters
  config.lora = ConfigDict()
  config.lora.rank = 0  # 0: everything that has a learning rate trains
  config.lora.alpha = 128.0  # adapters count alpha / rank times
  config.lora.adapter = ""  # PEFT folder to start from; with rank 0, its rank and alpha count

  # Optimizer: AdamW
  config.learning_rate = ConfigDict()  # by group of parameters; 0 freezes it
  config.learning_rate.und = 2e-5  # understanding expert
  config.learning_rate.gen = 2e-5  # generation expert
  config.learning_rate.text = 2e-5  # embeddings and head
  config.learning_rate.latent = 2e-5  # time embedder, vae2llm, llm2vae
  config.learning_rate.vit = 2e-5  # ViT and its connector
  config.learning_rate.tables = 0.0  # position tables
  config.schedule = "constant"  # or "cosine", to zero at `steps`
  config.warmup_steps = 500  # optimizer steps
  config.b1, config.b2, config.eps = 0.9, 0.95, 1e-15  # of AdamW
  config.weight_decay = 0.0  # times the learning rate, a step
  config.clip_norm = 1.0  # of each group's gradient
  config.ema_decay = 0.9999  # of the moving average, which is exported; 0 for none

  # Devices
  config.dtype = "bfloat16"  # of activations; parameters are float32
  config.remat = "full"  # computed again in the backward pass; see configs/unigrpo.py
  config.attention = "auto"  # "splash" (TPU), "cudnn" (GPU), "blocked" (CPU), "plain"
  config.mesh = ConfigDict()
  config.mesh.data = 1  # ways that hold whole copies of the parameters
  config.mesh.fsdp = 0  # 0: all devices that data and tensor leave
  config.mesh.tensor = 1  # ways that each layer is cut into

  # Log
  config.writers = ("jsonl",)  # and "tensorboard", "wandb"
  config.log_every = 1  # steps
  config.checkpoint_every = 500  # steps
  config.keep_checkpoints = 3  # the last so many
  config.keep_every = 0  # checkpoints of steps that are its multiples stay; 0 for none
  known = ("", "reward_model", "tiny", "tiny_look", "tiny_reward_model")
  if variant not in known:
    raise ValueError(f"variant {variant!r} is none of {', '.join(known[1:])}")
  if variant.startswith("tiny"):
    tiny(config)
  if variant == "tiny_look":
    look(config)
  if variant == "reward_model":
    reward_model(config)
  if variant == "tiny_reward_model":
    tiny_reward_model(config)
  return config


def tiny(config: ConfigDict) -> None:
  """The numbers for IconWorld on two cores."""
  config.steps = 2400
  config.init_from = "tiny"
  config.data.wrong_plan_rate = 0.3
  config.data.mixture = ConfigDict(dict(draw_think=0.5, draw=0.1, answer=0.25, edit=0.15))
  config.sequences_per_step = config.microbatch = 48
  config.noise_draws = 4
  config.timestep_shift = 1.0
  config.limits.update(dict(
    tokens=136, labels=64, images=48, patches=16, clean=16, latents=16))
  config.label_chunk = 64
  config.ce_weight, config.ce_weighting = 1.0, "sample"
  for group in ("und", "gen", "text", "latent", "vit"):
    config.learning_rate[group] = 2e-3
  config.schedule = "cosine"
  config.warmup_steps = 50
  config.eps = 1e-8
  config.weight_decay = 0.01
  config.ema_decay = 0.995
  config.dtype = "float32"
  config.remat = "none"
  config.log_every = 10
  config.checkpoint_every = 200
  config.keep_checkpoints = 2


def look(config: ConfigDict) -> None:
  """What comes after `tiny`: descriptions of whole images teach the ViT to see."""
  config.seed = 1
  config.steps = 2000
  config.data.mixture = ConfigDict(
    dict(draw_think=0.3, draw=0.0, answer=0.25, describe=0.3, edit=0.15))
  config.ce_weighting = "square"
  for group in ("und", "gen", "text", "latent", "vit"):
    config.learning_rate[group] = 1e-3
  config.learning_rate.vit = 2e-3


def reward_model(config: ConfigDict) -> None:
  """A reward model from BAGEL-7B-MoT: adapters on its understanding expert; the ViT stays."""
  config.steps = 2000  # about an epoch: triples / sequences_per_step
  config.limits.update(dict(tokens=5400, labels=8, clean=1, latents=1))
  config.ce_weighting = "sample"  # every answer counts alike
  config.lora.rank = 64
  for group in ("gen", "text", "latent", "vit"):
    config.learning_rate[group] = 0.0
  config.learning_rate.und = 1e-4
  config.schedule = "cosine"
  config.warmup_steps = 50
  config.weight_decay = 0.01
  config.ema_decay = 0.0  # it would hold the frozen parameters too


def tiny_reward_model(config: ConfigDict) -> None:
  """A reward model of IconWorld: all of the embedded BAGEL that reads pictures and words."""
  config.steps = 4000
  config.sequences_per_step = config.microbatch = 96
  config.noise_draws = 1
  config.limits.update(dict(tokens=56, labels=4, images=96, clean=1, latents=1))
  for group in ("gen", "latent"):
    config.learning_rate[group] = 0.0
  for group in ("und", "text", "vit"):
    config.learning_rate[group] = 3e-4
