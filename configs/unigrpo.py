"""UniGRPO (arXiv 2603.23500): one reward trains the reasoning and the drawing of BAGEL-7B-MoT.

  python -m unigrpo_jax.train --config=configs/unigrpo.py --config.init_from=SFT_FOLDER \\
    --config.prompts.source=PROMPTS --workdir=runs/unigrpo      # Table 3, on a pod
  python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir=runs/tiny   # CPU, minutes

Variants, after the colon and joined by commas: `tiny` (the embedded BAGEL and IconWorld), `lora`,
`cfg` (classifier-free guidance in rollout and training, the paper's first ablation), `latent_kl`
and `no_regulariser` (its second); `fpo`, `awm` and `nft` (the drawing alone, without reasoning, by
objectives that noise the finished image again) and `unifpo` (UniGRPO with FPO for the drawing);
and of tasks, prompts with their reward, `ocr` (text in pictures), `geneval` (objects, counts,
colours and places, by a served detector), `judge` (P(yes) of a served vision-language model) and
`pickscore` (preference).
"""

from ml_collections import ConfigDict


def get_config(variants: str = "") -> ConfigDict:
  """The configuration of Table 3, changed by each of the comma-separated variants."""
  config = ConfigDict()
  config.algorithm = "unigrpo"  # which training this is; "sft" is that of configs/sft.py
  config.seed = 0  # of prompts, samples, windows and fresh adapters
  config.steps = 1000  # iterations: a rollout and its update
  config.init_from = ""  # the SFT checkpoint, also the reference: a folder, or a name of the hub
  config.random_init = False  # keep the folder's sizes, tokenizer and VAE, not its network
  config.export_to = ""  # official folder to write at the end; "" for none
  config.export_dtype = "bfloat16"  # of its weights

  # Prompts
  config.prompts = ConfigDict()
  config.prompts.source = "iconworld"  # 10,000 of its prompts; or a file or set, unigrpo_jax.data
  config.prompts.split = "train"  # of the prompt set
  config.prompts.held_out_tags = ""  # "counting,position": prompts that training leaves out
  config.prompts_per_step = 32  # of all hosts together
  config.group_size = 24  # trajectories a prompt

  # Reward: of a finished image and its prompt
  # As a whole on a command line: --config.rewards="{'http': 1.0}".
  config.rewards = ConfigDict(dict(iconworld_soft=1.0))  # name -> weight; 0 is only logged
  # name -> keyword arguments of the reward; and "kind", the reward's own name, where it is another;
  # and "time_limit", seconds of a call, after which it is a failure
  config.reward_options = ConfigDict()
  config.reward = ConfigDict()
  config.reward.threads = 4  # samples are scored while the devices go on
  config.reward.normalise = False  # each reward within its group, before they are summed
  config.reward.max_failed_fraction = 0.5  # of an iteration's samples; more stop the run
  config.reward.watch_images = True  # log their statistics; warn where a rising reward changes them
  config.advantage = ConfigDict()
  config.advantage.std = "group"  # divide by that of the "group", of the "batch", or "none"
  config.advantage.ddof = 0  # 1: squares over n - 1
  config.advantage.eps = 1e-4  # added to the standard deviation
  config.advantage.clip = 5.0  # largest |advantage|; 0 for none

  # Rollout
  config.rollout = ConfigDict()
  config.rollout.think = True  # reason before drawing
  config.rollout.prompts_at_once = 16  # of all hosts; fewer need less memory
  config.rollout.layout = "stationary"  # parameters while sampling: copied along fsdp; or "update"
  # A divisor of mesh.tensor. 0: the fewest whose share of the parameters takes a quarter of a
  # device's memory, or less.
  config.rollout.tensor = 0  # ways that each layer is cut into while sampling
  config.rollout.prompt_tokens = 256  # room for a prompt, with its two markers
  config.rollout.max_tokens = 1024  # of a reasoning
  config.rollout.temperature = 1.0  # of sampled tokens, and of their log-probabilities
  config.rollout.height = 1024  # pixels
  config.rollout.width = 1024  # pixels
  config.rollout.num_timesteps = 25  # points of the time grid; one velocity evaluation less
  config.rollout.shift = 3.0  # of the time grid towards noise
  config.rollout.sde = "flow"  # "flow", "dance" or "cps"
  config.rollout.noise_level = 0.8  # a of the SDE
  config.rollout.window = "per_iteration"  # see `sampling/windows.py`
  config.rollout.window_range = (0, 5)  # steps it may lie in, the second excluded
  config.rollout.window_size = 3  # steps with noise
  config.rollout.moving_iterations = 25  # of a "progressive" window in one place
  config.rollout.moving_stride = 0  # steps by which it moves; 0: the window's size
  config.rollout.moving_dwell = "constant"  # how long it stays further on: "linear", "exponential"
  config.rollout.moving_roll_back = False  # it starts over at the end of its range
  config.rollout.same_noise = False  # a group starts from the same noise
  config.rollout.cfg_text_scale = 1.0  # above 1: guidance in rollout and training
  config.rollout.cfg_interval = (0.0, 1.0)  # of flow times: above the first, up to the second
  config.rollout.cfg_renorm = "global"  # or "channel", "text_channel"

  # Text objective (eq 2)
  config.text = ConfigDict()
  config.text.train = True  # False, and learning_rate.und 0: FlowGRPO
  config.text.clip_low = 0.2  # how far a ratio may fall below 1
  config.text.clip_high = 0.2  # how far it may rise above 1
  config.text.dual_clip = 0.0  # more than 1; 0 for none
  config.text.ratio = "token"  # or "sequence": the geometric mean over a reasoning (GSPO)
  config.text.aggregation = "seq-mean-token-mean"  # or "token-mean", "constant"
  config.text.kl_weight = 0.0  # of the k3 estimate
  config.text.chunk = 256  # tokens a row whose logits exist at once

  # Flow objective (eqs 5, 6 and 8)
  config.flow = ConfigDict()
  config.flow.train = True  # False, and learning_rate.gen 0: TextGRPO
  config.flow.weight = 1.0  # lambda of eq 7
  # "nft", "awm", "fpo" have variants, "refl" has configs/refl.py
  config.flow.objective = "grpo"  # or "dppo", "nft", "awm", "fpo", "refl"
  config.flow.ratio = "norm"  # RatioNorm, but for "dppo" and the SDE "cps"; "plain" without
  config.flow.clip = 1e-6  # both sides, at 262,144 latent elements
  # By sqrt(262,144 / elements), where there is an SDE.
  config.flow.scale_with_size = True  # clip, regulariser and anchor
  config.flow.grad_reweight = "none"  # or "inv_dt"
  config.flow.regulariser = "velocity_mse"  # "latent_kl", "latent_kl_exact" or "none"
  # At 262,144 latent elements; without an SDE at any size. 0 only measures the distance.
  config.flow.regulariser_weight = 1.5e-5  # how much the distance from the reference counts
  config.flow.routing = "expert"  # gradients reach the generation expert; "markers", "full"
  config.flow.reference_context = "reference"  # or "policy": whose context its velocities see
  config.flow.dppo_threshold = 1e-5  # divergence from which on "dppo" drops a step
  config.flow.nft_beta = 1.0  # how far the mixtures of "nft" reach
  config.flow.nft_bound = 5.0  # of its advantages
  # "nft", "awm" and "fpo" noise each finished image again, and need no SDE.
  config.flow.draws = 8  # times, each with a noise, of an image; drawn once a rollout
  # "grid": points of the rollout's; or "uniform", "stratified", "stratified_uniform",
  # "logit_normal", see `sampling/times.py`
  config.flow.times = "grid"  # where these times come from
  config.flow.awm_weighting = "ghuber"  # of "awm": or "uniform", "t", "t2", "huber"
  config.flow.awm_ratio = "exp_first"  # one a time; "sum_first": one an image, of their mean
  config.flow.awm_clip = 0.1  # of the ratios of "awm", both sides, at any size; 0 for none
  config.flow.awm_bound = 5.0  # of its advantages, which are divided by it; 0 for none
  config.flow.fpo_weighting = "one_minus_t2"  # of matching errors in "fpo": (1 - t)^2; "uniform"
  # "mean_first": one an image; or "per_pair", "straight_through" (FPO++), "clamped_mean"
  config.flow.fpo_ratio = "mean_first"  # how a ratio is made of matching errors
  config.flow.fpo_surrogate = "ppo"  # or "spo", "aspo" (FPO++: SPO for negative advantages)
  config.flow.fpo_clip = 0.05  # of the ratios of "fpo", both sides, at any size
  config.flow.fpo_cap = 0.0  # largest matching error where the advantage is negative; 0 for none
  # The anchor is a moving average of what the flow trains, moved once a rollout.
  config.flow.anchor_weight = 0.0  # of the distance from its velocities, scaled likewise; 0: none
  config.flow.anchor_decay = 0.3  # of that average, at most
  config.flow.anchor_rise = 0.001  # by which the decay grows, an optimizer step

  # Gradient of a differentiable reward, of "refl"; see configs/refl.py
  config.refl = ConfigDict()
  config.refl.reward_model = ""  # a frozen one's folder; "tiny_reward_model" is embedded
  config.refl.weight = 1.0  # of its term, beside flow.regulariser_weight, which no size scales here
  config.refl.margin = 1.0  # reward from which on an image is good enough; 1 never is
  config.refl.per_batch = False  # one late step for all trajectories, in place of one each
  config.refl.gradient_steps = 1  # the last so many instead, without a draw (DRaFT-K); 0: all
  config.refl.direct_align = False  # any step of the finished image and its noise (SRPO)
  config.refl.sft_weight = 0.0  # of a supervised velocity error, in the same optimizer steps
  config.refl.sft_config = ""  # whose examples, as configs/sft.py:tiny: its data, feed and sizes

  # Update
  config.epochs = 2  # passes over a rollout
  config.minibatches = 1  # optimizer steps a pass
  config.microbatch = 64  # trajectories at once, all hosts together
  config.old_values = "first_epoch"  # "recomputed" (needed with minibatches) or "rollout"
  config.drift = ConfigDict()  # of the sampler from the trainer, at most; 0: by the dtype
  config.drift.text = 0.0  # 99th percentile of |difference| / max(1, |log-probability|)
  config.drift.flow = 0.0  # 99th percentile of |log ratio|
  config.lora = ConfigDict()
  config.lora.rank = 0  # 0: everything trains
  config.lora.alpha = 128.0  # adapters count alpha / rank times
  config.lora.adapter = ""  # PEFT folder to start from; with rank 0, its rank and alpha count
  config.learning_rate = ConfigDict()  # by group of parameters; 0 freezes it
  config.learning_rate.und = 1e-6  # understanding expert: reasons
  config.learning_rate.gen = 3e-5  # generation expert: draws
  config.learning_rate.text = 0.0  # embeddings and head
  config.learning_rate.latent = 0.0  # time embedder, vae2llm, llm2vae
  config.schedule = "constant"  # or "cosine"
  config.warmup_steps = 0  # optimizer steps
  config.b1, config.b2, config.eps = 0.9, 0.999, 1e-8  # of AdamW
  config.weight_decay = 1e-4  # times the learning rate, a step
  config.clip_norm = 1.0  # of each group's gradient
  config.ema_decay = 0.0  # 0 for none

  # Evaluation: fixed prompts and noise, ODE
  config.eval = ConfigDict()
  config.eval.every = 50  # iterations, and before the first and after the last; 0 for never
  config.eval.source = "iconworld"  # as prompts.source
  config.eval.split = "validation"  # of it, never trained on
  config.eval.prompts = 300  # the first of the split
  config.eval.images = 1  # of each prompt
  config.eval.batch_size = 64  # rows at once, all hosts together
  config.eval.modes = (  # the reward of the first tells which checkpoint is the best
    "think", "think+guidance", "plain", "plain+guidance")
  config.eval.num_timesteps = 50  # points of the time grid
  config.eval.temperature = 1.0  # of sampled tokens; 0 takes the likeliest
  config.eval.cfg_text_scale = 4.0  # of the modes with guidance
  config.eval.cfg_interval = (0.4, 1.0)  # as that of the rollout
  config.eval.cfg_renorm = "global"  # as that of the rollout
  config.eval.keep = 24  # prompts whose images are saved

  # Devices
  config.dtype = "bfloat16"  # of activations; parameters are float32
  # The backward pass computes again: all of a layer ("full", the least memory), all but its
  # attention or its MLP ("attention", "mlp"), what is cheap ("layer"), all but products with
  # weights ("dots"), nothing ("none").
  config.remat = "layer"  # one of these names; True and False are refused
  config.attention = "auto"  # "splash" (TPU), "cudnn" (GPU), "blocked" (CPU), "plain"
  config.mesh = ConfigDict()
  config.mesh.data = 1  # ways that hold whole copies of the parameters
  config.mesh.fsdp = 0  # 0: all devices that data and tensor leave
  config.mesh.tensor = 4  # ways that each layer is cut into; BAGEL has 4 key-value heads

  # Log
  config.writers = ("jsonl",)  # and "tensorboard", "wandb"
  config.pictures_every = 10  # iterations between groups of a rollout shown by these two; 0: none
  config.checkpoint_every = 20  # iterations
  config.keep_checkpoints = 2  # the last so many; the best one stays besides
  config.keep_every = 0  # checkpoints of steps that are its multiples stay; 0 for none
  chosen = set(filter(None, variants.split(",")))
  for variant in chosen - VARIANTS.keys():
    raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
  for group in ALTERNATIVES:
    if len(both := [variant for variant in group if variant in chosen]) > 1:
      raise ValueError(f"variants {' and '.join(both)} exclude each other; leave one out")
  for variant in VARIANTS:  # In their own order, whatever that of the command.
    if variant in chosen:
      VARIANTS[variant](config)
  return config


def tiny(config: ConfigDict) -> None:
  """The numbers for the embedded BAGEL and IconWorld on two cores."""
  config.init_from = "tiny"
  config.steps = 32
  config.prompts_per_step = config.rollout.prompts_at_once = 16
  config.group_size = 12
  config.rewards = ConfigDict(
    dict(iconworld_strict=0.5, iconworld_soft=0.5, iconworld_reasoning=0.0))
  config.reward.threads = 2
  config.rollout.update(dict(
    prompt_tokens=32, max_tokens=56, height=32, width=32, num_timesteps=13, shift=1.0,
    window_size=3, window_range=(0, 6)))
  config.text.chunk = 56
  # A few iterations must do, so a step is larger than the paper's, and so is the clip: by it most
  # steps of the second epoch would be beyond it.
  config.flow.clip = 2e-5
  config.microbatch = 48
  config.learning_rate.und = 3e-4
  config.learning_rate.gen = 2e-4
  config.schedule = "cosine"
  config.eval.update(dict(
    every=32, prompts=300, batch_size=100, modes=("think", "plain"), num_timesteps=25,
    cfg_text_scale=2.0, cfg_interval=(0.0, 1.0)))
  config.dtype = "float32"
  config.remat = "none"
  config.mesh.tensor = 1


def lora(config: ConfigDict) -> None:
  """Adapters on both experts; what lies under them is the reference."""
  config.lora.rank = 64
  config.learning_rate.und, config.learning_rate.gen = 1e-5, 1e-4


def cfg(config: ConfigDict) -> None:
  """Classifier-free guidance in rollout and training."""
  config.rollout.cfg_text_scale = 4.0


def latent_kl(config: ConfigDict) -> None:
  """The latent KL of Flow-GRPO in place of the velocity error, weighed as by its code."""
  config.flow.regulariser = "latent_kl"
  config.flow.regulariser_weight = 1.0  # scaled like the velocity error's


def no_regulariser(config: ConfigDict) -> None:
  config.flow.regulariser = "none"


def fpo(config: ConfigDict) -> None:
  """Flow policy optimization (2507.21053): 8 pairs of a time and a noise, the mean first."""
  noise_again(config, "fpo")
  draw_alone(config)


def awm(config: ConfigDict) -> None:
  """Advantage weighted matching (2509.25050): one step a rollout, held near an anchor."""
  noise_again(config, "awm")
  config.flow.update(dict(
    draws=6, times="stratified", awm_clip=0.0, regulariser_weight=1e-3, anchor_weight=1.0))
  config.epochs = 1  # its ratios are 1, so nothing is to be clipped
  draw_alone(config)


def nft(config: ConfigDict) -> None:
  """DiffusionNFT (2509.16117)."""
  noise_again(config, "nft")
  draw_alone(config)


def unifpo(config: ConfigDict) -> None:
  """FPO in place of FlowGRPO; thinking is trained as it is in UniGRPO."""
  noise_again(config, "fpo")


def noise_again(config: ConfigDict, objective: str) -> None:
  config.flow.objective = objective
  config.microbatch //= 2  # a trajectory has more noised images than a window has steps


def draw_alone(config: ConfigDict) -> None:
  """It draws from the prompt alone, and is evaluated so first; nothing of text is trained."""
  config.text.train = config.rollout.think = False
  config.learning_rate.und = 0.0  # without a gradient, weight decay would still move it
  config.eval.modes = tuple(sorted(config.eval.modes, key=lambda mode: "plain" not in mode))


def refuse_objectives(variants: str, reason: str) -> None:
  """Raises ValueError for a variant that changes the drawing's objective."""
  for variant in filter(set(ALTERNATIVES[0]).__contains__, variants.split(",")):
    raise ValueError(f"variant {variant!r} is one of configs/unigrpo.py alone: {reason}")


def make_room(config: ConfigDict, tokens: int) -> None:
  """For prompts that are longer than IconWorld's, for which `tiny` has room."""
  config.rollout.prompt_tokens = max(config.rollout.prompt_tokens, tokens)


def ocr(config: ConfigDict) -> None:
  """Text in pictures: prompts that quote words, and the share of them that tesseract reads."""
  make_room(config, 64)
  config.prompts.source = config.eval.source = "words"
  config.eval.prompts = 200
  # The two others are only logged: what reward hacking would move first.
  config.rewards = ConfigDict(dict(ocr=1.0, ocr_exact=0.0, ocr_extra_characters=0.0))
  config.reward_options = ConfigDict({
    f"ocr_{measure}": {"kind": "ocr", "measure": measure}
    for measure in ("exact", "extra_characters")
  })


def geneval(config: ConfigDict) -> None:
  """GenEval: its kind of prompts, and the strict verdict of a server on this machine."""
  make_room(config, 64)
  config.prompts.source, config.eval.source = "geneval_train", "geneval"
  config.eval.prompts = 553
  config.rewards = ConfigDict(dict(geneval=1.0))
  config.reward_options = ConfigDict(
    dict(geneval=dict(kind="http", url="http://127.0.0.1:8901", reward="geneval")))


def judge(config: ConfigDict) -> None:
  """A served vision-language model's P(yes) that the picture shows the prompt; docs/judge.md."""
  make_room(config, 64)
  config.prompts.source, config.eval.source = "geneval_train", "geneval"
  config.eval.prompts = 553
  config.rewards = ConfigDict(dict(judge=1.0))
  config.reward_options = ConfigDict(
    dict(judge=dict(url="http://127.0.0.1:8000/v1", form="p_yes")))


def pickscore(config: ConfigDict) -> None:
  """What people prefer, by PickScore, about 0.7 to 0.95; prompts and weights: docs/pickscore.md."""
  make_room(config, 256)
  config.prompts.source = config.eval.source = "pickscore_sfw"
  config.eval.split = "test"
  config.rewards = ConfigDict(dict(pickscore=1.0))
  config.reward_options = ConfigDict({"pickscore": {"folder": "PickScore_v1"}})


# Of each at most one: objectives of the drawing; tasks.
ALTERNATIVES = (("fpo", "awm", "nft", "unifpo"), ("ocr", "geneval", "judge", "pickscore"))
VARIANTS = {
  "tiny": tiny, "lora": lora, "cfg": cfg, "latent_kl": latent_kl, "no_regulariser": no_regulariser,
  "fpo": fpo, "awm": awm, "nft": nft, "unifpo": unifpo, "ocr": ocr, "geneval": geneval,
  "judge": judge, "pickscore": pickscore,
}
