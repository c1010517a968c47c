"""From a config of UniGRPO to frozen dataclasses; impossible numbers are refused here."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.algorithms import base, grpo, refl, update
from unigrpo_jax.algorithms import forward as forward_lib
from unigrpo_jax.benchmarks import evaluation, monitor, validation
from unigrpo_jax.episodes import replay, requests, rollout
from unigrpo_jax.episodes import sampler as sampler_lib
from unigrpo_jax.losses import advantages, forward_process
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.recipe import checks, combinations, resuming, sections
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.sampling import direct, flow, sde, times, windows

SDE_OBJECTIVES = {"grpo": grpo.GRPO, "dppo": grpo.DPPO}
FORWARD_OBJECTIVES = {
  "nft": forward_lib.NFT, "awm": forward_lib.AWM, "fpo": forward_lib.FPO,
}
GRADIENT_OBJECTIVES = {"refl": refl.ReFL}  # of a differentiable reward
# Keys that configs of older runs lack, with what those runs did.
DEFAULTS = {
  "attention": "auto", "text.ratio": "token", "flow.awm_clip": 1e-4, "flow.awm_ratio": "exp_first",
  "flow.awm_bound": 0.0, "flow.fpo_clip": 0.05, "flow.fpo_weighting": "uniform",
  "flow.fpo_ratio": "mean_first", "flow.fpo_surrogate": "ppo", "flow.fpo_cap": 0.0,
  "flow.times": "uniform", "flow.draws": 3,  # those of Table 3's window; see `_older`
  "flow.anchor_weight": 0.0, "flow.anchor_decay": 0.3, "flow.anchor_rise": 0.001,
  "rollout.moving_stride": 0, "rollout.moving_dwell": "constant", "rollout.layout": "update",
  "rollout.tensor": 0, "lora.adapter": "", "pictures_every": 10, "eval.images": 1,
  "prompts.held_out_tags": "",
  "reward.watch_images": False,
  "refl.reward_model": "",
  "refl.weight": 1.0, "refl.margin": 1.0, "refl.per_batch": False, "refl.sft_weight": 0.0,
  "refl.sft_config": "", "refl.gradient_steps": 1, "refl.direct_align": False,
}
_COUNT, _SCALE = checks.Integer(low=1, high=checks.MANY), checks.Number(low=0)
_POINTS = checks.Integer(low=2, high=100_000)  # of a time grid
_TIMES = checks.Several(checks.Number(), 2)
KEYS: checks.Keys = {
  "prompts.source": checks.Text(), "prompts.split": checks.Text(), "prompts_per_step": _COUNT,
  "prompts.held_out_tags": checks.Text(),
  "group_size": _COUNT, "rewards": checks.Table(checks.Number()),
  "reward_options": checks.Table(checks.Table(checks.Json())), "reward.threads": _COUNT,
  "reward.normalise": checks.Flag(), "reward.watch_images": checks.Flag(),
  "reward.max_failed_fraction": checks.Number(low=0, high=1),
  "advantage.std": checks.OneOf(advantages.STDS), "advantage.ddof": checks.Integer(low=0, high=1),
  "advantage.eps": _SCALE, "advantage.clip": _SCALE,
  "rollout.think": checks.Flag(), "rollout.prompts_at_once": _COUNT,
  "rollout.layout": checks.OneOf(tuple(sharding.LAYOUTS)),
  "rollout.tensor": checks.Integer(low=0),
  "rollout.prompt_tokens": checks.Integer(low=3, high=checks.MANY),
  "rollout.max_tokens": _COUNT, "rollout.temperature": checks.Number(low=errors.LEAST_TEMPERATURE),
  "rollout.height": _COUNT, "rollout.width": _COUNT,
  "rollout.num_timesteps": _POINTS, "rollout.shift": checks.Number(above=0),
  "rollout.sde": checks.OneOf(sde.KINDS), "rollout.noise_level": _SCALE,
  "rollout.window": checks.OneOf(windows.CONVENTIONS),
  "rollout.window_range": checks.Several(checks.Integer(low=0), 2),
  "rollout.window_size": checks.Integer(low=0), "rollout.moving_iterations": _COUNT,
  "rollout.moving_stride": checks.Integer(low=0),
  "rollout.moving_dwell": checks.OneOf(windows.DWELLS), "rollout.moving_roll_back": checks.Flag(),
  "rollout.same_noise": checks.Flag(), "rollout.cfg_text_scale": _SCALE,
  "rollout.cfg_interval": _TIMES, "rollout.cfg_renorm": checks.OneOf(flow.RENORMS),
  "text.train": checks.Flag(), "text.clip_low": _SCALE, "text.clip_high": _SCALE,
  "text.dual_clip": _SCALE, "text.ratio": checks.OneOf(text_losses.RATIOS),
  "text.aggregation": checks.OneOf(text_losses.AGGREGATIONS), "text.kl_weight": _SCALE,
  "text.chunk": _COUNT, "flow.train": checks.Flag(), "flow.weight": _SCALE,
  "flow.objective": checks.OneOf((*SDE_OBJECTIVES, *FORWARD_OBJECTIVES, *GRADIENT_OBJECTIVES)),
  "flow.ratio": checks.OneOf(("norm", "plain")), "flow.clip": _SCALE,
  "flow.scale_with_size": checks.Flag(),
  "flow.grad_reweight": checks.OneOf(flow_losses.REWEIGHTS),
  "flow.regulariser": checks.OneOf(base.REGULARISERS), "flow.regulariser_weight": _SCALE,
  "flow.routing": checks.OneOf(replay.ROUTINGS),
  "flow.reference_context": checks.OneOf(("reference", "policy")),
  "flow.dppo_threshold": _SCALE, "flow.nft_beta": checks.Number(above=0),
  "flow.nft_bound": checks.Number(above=0),
  "flow.draws": _COUNT, "flow.times": checks.OneOf(times.KINDS),
  "flow.awm_weighting": checks.OneOf(forward_process.AWM_WEIGHTINGS),
  "flow.awm_ratio": checks.OneOf(forward_process.AWM_RATIOS), "flow.awm_clip": _SCALE,
  "flow.awm_bound": _SCALE, "flow.fpo_clip": _SCALE,
  "flow.fpo_weighting": checks.OneOf(forward_process.FPO_WEIGHTINGS),
  "flow.fpo_ratio": checks.OneOf(tuple(forward_process.FPO_RATIOS)),
  "flow.fpo_surrogate": checks.OneOf(flow_losses.SURROGATES), "flow.fpo_cap": _SCALE,
  "flow.anchor_weight": _SCALE, "flow.anchor_decay": checks.Number(low=0, high=1),
  "flow.anchor_rise": _SCALE,
  "refl.reward_model": checks.Text(), "refl.weight": checks.Number(above=0),
  "refl.margin": checks.Number(), "refl.per_batch": checks.Flag(),
  "refl.gradient_steps": checks.Integer(low=0), "refl.direct_align": checks.Flag(),
  "refl.sft_weight": _SCALE, "refl.sft_config": checks.Text(),
  "epochs": _COUNT, "minibatches": _COUNT, "old_values": checks.OneOf(update.OLD_VALUES),
  "drift.text": _SCALE, "drift.flow": _SCALE, "lora.rank": checks.Integer(low=0, high=checks.MANY),
  "lora.adapter": checks.Text(), "pictures_every": checks.Integer(low=0),
  "lora.alpha": checks.Number(above=0), "eval.every": checks.Integer(low=0),
  "eval.source": checks.Text(), "eval.split": checks.Text(), "eval.prompts": _COUNT,
  "eval.batch_size": _COUNT, "eval.modes": checks.Several(checks.Text()),
  "eval.num_timesteps": _POINTS, "eval.temperature": _SCALE,
  "eval.cfg_text_scale": _SCALE, "eval.cfg_interval": _TIMES,
  "eval.cfg_renorm": checks.OneOf(flow.RENORMS), "eval.keep": checks.Integer(low=0),
  "eval.images": checks.Integer(low=1, high=evaluation.MOST_IMAGES),
}


@dataclasses.dataclass(frozen=True)
class PromptsSpec:
  """Which prompts, and how many a step, all hosts together."""

  source: str
  split: str
  per_step: int
  held_out_tags: tuple[str, ...]  # of prompts that are left out


@dataclasses.dataclass(frozen=True)
class RewardsSpec:
  """Rewards by name: weights, options; and how they are run."""

  weights: Mapping[str, float]
  options: Mapping[str, Mapping[str, Any]]
  threads: int
  normalise: bool
  max_failed_fraction: float
  watch_images: bool

  @property
  def kinds(self) -> dict[str, str]:
    """{name of a reward: the reward it is an instance of}, for which the option `kind` stands."""
    return {name: self.options.get(name, {}).get("kind", name) for name in self.weights}


@dataclasses.dataclass(frozen=True)
class AdvantageSpec:
  """Keywords of `advantages.group_advantages`."""

  std: str
  ddof: int
  eps: float
  clip: float | None


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """The text's objective, as in the config."""

  train: bool
  clip_low: float
  clip_high: float
  dual_clip: float
  aggregation: str
  ratio: str
  kl_weight: float
  chunk: int


@dataclasses.dataclass(frozen=True)
class FlowSpec:
  """The images' objective, as in the config: clips and weights are still to be scaled."""

  train: bool
  weight: float
  objective: str
  ratio: str
  clip: float
  scale_with_size: bool
  grad_reweight: str
  regulariser: str
  regulariser_weight: float
  routing: str
  reference_context: str
  dppo_threshold: float
  nft_beta: float
  nft_bound: float
  awm_weighting: str
  awm_ratio: str
  awm_clip: float  # 0 for none
  awm_bound: float  # 0 for none
  fpo_weighting: str
  fpo_ratio: str
  fpo_surrogate: str
  fpo_clip: float
  fpo_cap: float  # 0 for none
  anchor_weight: float
  anchor_decay: float
  anchor_rise: float


@dataclasses.dataclass(frozen=True)
class ReFLSpec:
  """The objective of a differentiable reward, as in the config."""

  reward_model: str
  weight: float
  margin: float
  per_batch: bool
  gradient_steps: int
  direct_align: bool
  sft_weight: float
  sft_config: str


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
  """How an experience is gone through, and the drift beyond which it is not; 0: by the dtype."""

  epochs: int
  minibatches: int
  microbatch: int
  old_values: str
  drift_text: float
  drift_flow: float


@dataclasses.dataclass(frozen=True)
class WindowSpec:
  """Which steps have noise, or are recorded; see `windows.draw`. Empty where none is."""

  convention: str
  low: int
  high: int
  size: int
  moving: windows.Moving


@dataclasses.dataclass(frozen=True)
class Spec:
  """A run of UniGRPO or of one of its halves."""

  seed: int  # of prompts, samples, windows, evaluations and fresh parameters
  network: state.NetworkSpec
  run: run_lib.RunSpec
  optimizer: sections.OptimizerSpec
  prompts: PromptsSpec
  rewards: RewardsSpec
  advantage: AdvantageSpec
  rollout: rollout.RolloutSpec
  window: WindowSpec
  times: times.Times  # at which finished images are noised again, where there is no SDE
  text: TextSpec
  flow: FlowSpec
  refl: ReFLSpec
  update: UpdateSpec
  evaluation: validation.ValidationSpec
  pictures_every: int  # iterations from one whose pictures are logged to the next; 0: none

  @property
  def trajectories(self) -> int:
    """Trajectories of an iteration."""
    return self.prompts.per_step * self.rollout.group_size

  @property
  def by_gradient(self) -> bool:
    """Whether the gradient of a reward trains the images."""
    return self.flow.train and self.flow.objective in GRADIENT_OBJECTIVES

  @property
  def trains_text(self) -> bool:
    return self.text.train and self.rollout.settings.think

  @property
  def idle(self) -> frozenset[str]:
    """Groups of parameters with a learning rate, but no loss whose gradient reaches them."""
    if self.by_gradient and self.refl.sft_weight:
      return frozenset()  # The supervised loss reaches all of them.
    reached = {"und", "text"} if self.trains_text else set()
    if self.flow.train:
      reached |= {"und", "text", "gen", "latent", "tables"} - self._constant_in_flow
    return frozenset(self.optimizer.trained - reached)

  @property
  def _constant_in_flow(self) -> frozenset[str]:
    """Groups of parameters at which the flow's gradient is stopped; see `ReplayConfig.routing`."""
    return frozenset({"und", "text"} if self.flow.routing == "expert" else ())

  @property
  def steps_an_image(self) -> int:
    """Times at which a velocity of each image is trained."""
    if not self.flow.train:
      return 0
    return self.window.size or self.times.count

  @property
  def anchored(self) -> frozenset[str]:
    """Groups of parameters whose moving average holds the flow back: those that the flow trains."""
    if not (self.flow.train and self.flow.anchor_weight):
      return frozenset()
    return frozenset(self.optimizer.trained - self._constant_in_flow)

  @property
  def needs_reference(self) -> bool:
    """Whether a regulariser holds the policy to what it started from."""
    return (self.flow.train and self.flow.regulariser != "none") or (
      self.trains_text and self.text.kl_weight > 0
    )

  @property
  def copies_reference(self) -> bool:
    """Whether the reference has parameters of its own: fresh adapters leave the experts as they
    were."""
    untouched = (
      self.network.lora is not None and not self.network.adapter
      and self.optimizer.trained <= {"und", "gen"}
    )
    return self.needs_reference and not untouched


def read(config: ConfigDict) -> Spec:
  """A config as frozen dataclasses.

  Raises:
    InputError: a number or a combination is impossible; names the key, its value, and what to do.
  """
  config = checks.read(config, KEYS, DEFAULTS)
  sections.fill_rank(config)
  c, r, e = config, config.rollout, config.eval
  by_gradient = c.flow.train and c.flow.objective in GRADIENT_OBJECTIVES
  errors.require(
    "config.prompts_per_step x group_size", c.prompts_per_step * c.group_size, high=checks.MANY
  )
  errors.require(
    "config.steps x epochs x minibatches", c.steps * c.epochs * c.minibatches, high=checks.MOST
  )
  if c.flow.objective in GRADIENT_OBJECTIVES and not c.flow.train:
    raise errors.InputError(
      f"config.flow.train=False: config.flow.objective={c.flow.objective} trains nothing else; set "
      "config.flow.objective=grpo"
    )
  forward = c.flow.objective in FORWARD_OBJECTIVES
  combinations.check(c, forward=forward, by_gradient=by_gradient)
  spec = Spec(
    seed=c.seed, network=sections.network(c), pictures_every=c.pictures_every,
    run=sections.run(
      c, resuming.mutable_keys(c, KEYS, SDE_OBJECTIVES | FORWARD_OBJECTIVES, forward), _older(c),
      kept=resuming.kept_keys(c), evaluate_every=e.every,
      best_metric=f"{validation.metric(e.modes[0])}/reward" if e.modes else "",
      shown=("reward/mean", "text/entropy", "text/clip_fraction", "flow/clip_fraction", "flow/mse",
             "drift/text"),
      alarms=("groups/dropped", monitor.OUTSIDE),
      rate=("trajectories", c.prompts_per_step * c.group_size),
    ),
    optimizer=sections.optimizer(c, c.steps * c.epochs * c.minibatches),
    prompts=PromptsSpec(
      c.prompts.source, c.prompts.split, c.prompts_per_step,
      tuple(filter(None, c.prompts.held_out_tags.split(","))),
    ),
    rewards=sections.fill(
      RewardsSpec, c.reward, weights=c.rewards.to_dict(), options=c.reward_options.to_dict()
    ),
    advantage=sections.fill(AdvantageSpec, c.advantage, clip=c.advantage.clip or None),
    rollout=sections.fill(
      rollout.RolloutSpec, r, group_size=c.group_size,
      sde=None if by_gradient else sampler_lib.SDE(r.sde, r.noise_level),
      settings=sections.fill(requests.Settings, r, guidance=_guidance(r)),
    ),
    window=_late_window(c) if by_gradient else _window(c),
    times=times.Times(c.flow.draws, c.flow.times, r.num_timesteps, r.shift),
    text=sections.fill(TextSpec, c.text), flow=sections.fill(FlowSpec, c.flow),
    refl=sections.fill(ReFLSpec, c.refl),
    update=sections.fill(UpdateSpec, c, drift_text=c.drift.text, drift_flow=c.drift.flow),
    evaluation=sections.fill(
      validation.ValidationSpec, e, seed=c.seed, size=(r.height, r.width),
      settings=sections.fill(
        requests.Settings, e, shift=r.shift, max_tokens=r.max_tokens, guidance=_guidance(e)
      ),
    ),
  )
  _check_steps(spec)
  return spec


def _window(config: ConfigDict) -> WindowSpec:
  r = config.rollout
  has_noise = config.flow.train and config.flow.objective in SDE_OBJECTIVES
  return WindowSpec(
    r.window, *(r.window_range if has_noise else (0, 0)), r.window_size if has_noise else 0,
    windows.Moving(
      iterations=r.moving_iterations, stride=r.moving_stride or None,
      roll_back=r.moving_roll_back, dwell=r.moving_dwell,
    ),
  )


def _late_window(config: ConfigDict) -> WindowSpec:
  """One of the late steps: of each trajectory, or the same for all.

  Of the last K steps the first; with direct alignment that from the noise.
  """
  convention = "per_iteration" if config.refl.per_batch else "per_prompt"
  steps = config.rollout.num_timesteps - 1
  low, high = direct.late_range(steps)
  if config.refl.direct_align:
    low, high = 0, 1
  elif config.refl.gradient_steps != 1:
    low = direct.first_differentiated(steps, config.refl.gradient_steps)
    high = low + 1
  return WindowSpec(convention, low, high, 1, windows.Moving())


def _guidance(section: ConfigDict) -> flow.Guidance:
  return flow.Guidance(
    text_scale=section.cfg_text_scale, interval=tuple(section.cfg_interval),
    renorm=section.cfg_renorm,
  )


def _older(config: ConfigDict) -> dict[str, Any]:
  """What runs did that lack a key: they noised an image as often as a window had steps."""
  return DEFAULTS | {"flow.draws": config.rollout.window_size}


def _check_steps(spec: Spec) -> None:
  if not spec.flow.train:
    return
  if spec.flow.objective in FORWARD_OBJECTIVES:
    with errors.at("config.flow.times and config.rollout.num_timesteps"):
      spec.times.check()
    return
  w, points = spec.window, spec.rollout.settings.num_timesteps
  try:
    window_steps(spec, 1)
  except errors.InputError as error:
    raise errors.InputError(
      f"config.rollout.window_range and window_size with num_timesteps={points}: {error}"
    ) from None
  if w.size < 1:
    raise errors.InputError(
      f"config.rollout.window_size={w.size} leaves no step to train; set config.flow.train=False"
    )
  if spec.by_gradient:
    return
  noise = spec.rollout.sde
  errors.require("config.rollout.noise_level", noise.noise_level, above=0)
  if noise.kind == "cps" and noise.noise_level >= 2:
    raise errors.InputError(
      f"config.rollout.noise_level={noise.noise_level} must be less than 2 for config.rollout.sde="
      "cps, whose noise is a sine of it"
    )
  if noise.kind == "cps" and w.high >= points - 1:
    raise errors.InputError(
      f"config.rollout.window_range={(w.low, w.high)}: the last step of config.rollout.sde="
      f"cps has no noise; let it end at {points - 2} or before"
    )


def window_steps(spec: Spec, iteration: int, ways: int = 1) -> np.ndarray:
  """SDE steps of all trajectories of an iteration, [B, W] int32; W = 0 where none is needed.

  Args:
    spec: of the run.
    iteration: counted from 1.
    ways: that the rows of a chunk are cut into: the ranks of a constant window a rank.
  """
  w = spec.window
  chunk = spec.rollout.prompts_at_once * spec.rollout.group_size
  prompts, group_size = spec.prompts.per_step, spec.rollout.group_size
  if spec.by_gradient:  # A late step is each trajectory's own.
    prompts, group_size = spec.trajectories, 1
  return windows.draw(
    w.convention, low=w.low, high=w.high, size=w.size, seed=spec.seed,
    # A window that moves begins where it is after 0 iterations.
    iteration=iteration - (w.convention == "progressive"),
    prompts=prompts, group_size=group_size,
    num_steps=spec.rollout.settings.num_timesteps - 1, moving=w.moving,
    ranks=np.arange(spec.trajectories) % chunk // max(chunk // ways, 1),
  )
