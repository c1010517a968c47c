"""Formulas recorded from other projects: advantages, and the objectives of text and images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from tests.parity.transitions import tokens
from unigrpo_jax.losses import advantages, flow, forward_process, regularizers, text
from unigrpo_jax.sampling import sde

# Both sides add some hundred float32 numbers in their own order.
SUM = cases.Tolerance(2e-6, 2e-6)
GRADIENT = cases.Tolerance(1e-9, 5e-6, of_norm=True)
# A recorded ratio is exp of a float32 difference of numbers of order 1: steps of 6e-8 and 1.2e-7.
RATIO = cases.Tolerance(2e-7, 0.0)
# Ratios times advantages of up to 5.
LOSS = cases.Tolerance(5 * RATIO.absolute, 1e-6)
DPPO_THRESHOLD = 1e-5
NFT_BOUND = 5.0

CONVENTIONS = {
  "flow_grpo_global0": dict(std="group", ddof=0, eps=1e-4),
  "flow_grpo_global1": dict(std="batch", ddof=0, eps=1e-4),
  "verl_omni_global0": dict(std="group", ddof=1, eps=1e-4),
  "verl_omni_global1": dict(std="batch", ddof=1, eps=1e-4),
  "verl_omni_nostd": dict(std="none"),
  "verl_grpo": dict(std="group", ddof=1, eps=1e-6),
  "verl_drgrpo": dict(std="none"),
  "unirl": dict(std="group", ddof=1, eps=1e-8),
}
# They give a group of one its reward as it is, over 1 + eps where they divide; the others 0.
REWARD_OF_ONE = {"verl_grpo", "verl_drgrpo"}


@cases.case("advantage")
def group_advantages(folder, rec):
  for m in rec.matches(r"(.+)/rewards"):
    rewards = jnp.asarray(rec[m[0]], jnp.float32)
    _, group, sizes = np.unique(
      rec[f"{m[1]}/group_index"], return_inverse=True, return_counts=True
    )
    for name, convention in CONVENTIONS.items():
      adv, valid, _ = advantages.group_advantages(
        rewards, jnp.asarray(group), num_groups=len(sizes), **convention
      )
      if name in REWARD_OF_ONE:
        alone = rewards / (1 + convention.get("eps", 0.0))
        adv = jnp.where(sizes[group] == 1, alone, adv)
      rec.check(name, f"{m[1]}/{name}", adv, SUM)
      rec.check_equal("valid", f"{m[1]}/{name}", valid, np.ones(valid.shape, bool), cases.EXACT)
      if name == "verl_omni_global0":
        good = forward_process.optimality(adv, bound=NFT_BOUND)
        rec.check("nft_prob", f"{m[1]}/nft_prob", good, SUM)


class Ratios:
  """One recorded group of `policy_loss`: images after one step, by two policies."""

  def __init__(self, rec, case):
    self.rec, self.case = rec, case
    read = lambda name: rec[f"{case}/{name}"]
    self.mean_old, self.mean, self.x_next = map(tokens, map(read, ("mean_old", "mean", "x_next")))
    bound = rec.number(f"{case}/adv_clip_max")
    self.free_adv = jnp.asarray(read("advantages"))
    self.adv = jnp.clip(self.free_adv, -bound, bound)
    self.sqrt_dt = jnp.asarray(read("sqrt_dt"))
    self.std = jnp.asarray(read("std_dev_t")) * self.sqrt_dt
    self.clip = rec.number(f"{case}/clip")
    self.mask = jnp.ones(self.mean.shape[:-1], bool)
    # What float32 added to the recorded log ratio, a difference of two log-densities near -1/2.
    errors = (read(f"log_prob{end}") - self._exact_log_prob(mean)
              for end, mean in (("", self.mean), ("_old", self.mean_old)))
    self.rounding = np.subtract(*errors)
    rows = self.mean.shape[0]
    self.weights = flow.step_weights(jnp.ones(rows, bool), 1)

  def _exact_log_prob(self, mean):
    std, x_next, mean = (np.asarray(a, np.float64) for a in (self.std, self.x_next, mean))
    return -np.square(x_next - mean).mean((1, 2)) / (2 * std**2)

  def log_ratio(self, mean, kind):
    """Ours, rounded as the recorded log-densities are, which `log_prob` compares."""
    exact = flow.log_ratio(mean, self.mean_old, self.x_next, self.std, self.mask, kind=kind)
    scale = self.std if kind == "norm" else 1
    return exact + jnp.float32(self.rounding) * scale

  def divergence(self, mean):
    return flow.divergence(mean, self.mean_old, self.std, self.mask)

  def batch_log_ratio(self, mean):
    """RatioNorm with the quadratic term averaged over the whole batch, as Flow-GRPO has it."""
    return self.std * (self.log_ratio(mean, "plain") + self.divergence(mean).mean())

  def clips(self, log_ratio_fn, recorded):
    """The clip of each row; where float32 decided it, as it did in the recorded gradient."""
    rho = jnp.expm1(log_ratio_fn(self.mean))
    near = jnp.abs(jnp.abs(rho) - self.clip) < RATIO.absolute
    free = jax.grad(lambda mean: self.surrogate(log_ratio_fn(mean), jnp.inf))(self.mean)
    norm = lambda array: np.linalg.norm(np.reshape(array, (len(rho), -1)), axis=-1)
    took = norm(recorded) < 0.5 * norm(free)
    return jnp.where(near, jnp.where(took, 0.0, jnp.inf), self.clip)[:, None]

  def surrogate(self, log_ratio, clip):
    """Ours, with the constant that the others have."""
    loss, _ = flow.policy_loss(
      log_ratio[:, None], self.adv, self.weights, clip_low=clip, clip_high=clip
    )
    return loss - self.adv.mean()

  def loss(self, name, key, log_ratio, *, inv_dt):
    """A loss; one that has a factor 1/|dt| is compared times |dt|."""
    recorded = self.rec[f"{self.case}/{key}"] * self._dt(inv_dt)
    actual = self.surrogate(log_ratio, self.clip)
    self.rec.check_equal(f"{name}/loss", f"{self.case}/{key}", actual, recorded, LOSS)

  def gradient(self, name, key, log_ratio_fn, *, inv_dt):
    """d loss / d mean, likewise."""
    recorded = self.rec[f"{self.case}/{key}"] * self._dt(inv_dt)
    clip = self.clips(log_ratio_fn, recorded)
    gradient = jax.grad(lambda mean: self.surrogate(log_ratio_fn(mean), clip))(self.mean)
    gradient = gradient.reshape(recorded.shape)
    self.rec.check_equal(f"{name}/grad", f"{self.case}/{key}", gradient, recorded, GRADIENT)

  def check(self, name, key, actual, tolerance):
    self.rec.check(name, f"{self.case}/{key}", actual, tolerance)

  def _dt(self, inv_dt):
    return jnp.square(self.sqrt_dt) if inv_dt else jnp.float32(1)


@cases.case("policy_loss")
def image_objectives(folder, rec):
  for m in rec.matches(r"(.+)/mean_old"):
    ratios = Ratios(rec, m[1])
    _guard(ratios)
    _plain(ratios)
    _batch_bias(ratios)
    _dppo(ratios)


def _guard(ratios):
  norm = lambda mean: ratios.log_ratio(mean, "norm")
  log_ratio = norm(ratios.mean)
  ratios.loss("guard", "verl_loss", log_ratio, inv_dt=True)
  ratios.gradient("guard", "verl_grad_mean", norm, inv_dt=True)
  mean = np.exp(np.asarray(log_ratio, np.float64)).mean()
  ratios.check("guard/ratio_mean", "verl_ratio_mean", mean, RATIO)
  ratios.check("guard/ratio", "flow_grpo_single_ratio", jnp.exp(log_ratio), RATIO)
  outside = jnp.abs(jnp.expm1(log_ratio))
  low, high = ((outside > ratios.clip + slack).mean() for slack in (2e-7, -2e-7))
  fraction = ratios.rec[f"{ratios.case}/verl_clipfrac"]
  # Between the fractions of what is outside for sure and of what may be.
  nearest = np.clip(fraction, low, high)
  ratios.check("guard/clipfrac", "verl_clipfrac", nearest, cases.Tolerance(1e-6, 0.0))
  # One image at a time: its own loss, so the mean is that of the batch.
  singles = ratios.rec[f"{ratios.case}/flow_grpo_single_loss"]
  one = jnp.ones((1, 1))
  for row, single in enumerate(singles):
    adv = ratios.adv[row : row + 1]
    loss, _ = flow.policy_loss(
      log_ratio[row].reshape(1, 1), adv, one, clip_low=ratios.clip, clip_high=ratios.clip
    )
    recorded = single * jnp.square(ratios.sqrt_dt)
    what = f"{ratios.case}/flow_grpo_single_loss[{row}]"
    ratios.rec.check_equal("guard/single", what, loss - adv[0], recorded, LOSS)


def _plain(ratios):
  plain = lambda mean: ratios.log_ratio(mean, "plain")
  log_ratio = plain(ratios.mean)
  for name in ("old", ""):
    key = f"{ratios.case}/log_prob{'_' + name if name else ''}"
    mean = ratios.mean_old if name else ratios.mean
    logp = sde.log_prob(ratios.x_next, mean, ratios.std, ratios.mask, kind="flow")
    ratios.rec.check("log_prob", key, logp, SUM)
  ratios.loss("plain", "plain_loss", log_ratio, inv_dt=False)
  ratios.loss("plain", "plain_flow_grpo_loss", log_ratio, inv_dt=False)
  ratios.gradient("plain", "plain_grad_mean", plain, inv_dt=False)
  ratios.check("plain/ratio", "plain_ratio", jnp.exp(log_ratio), RATIO)


def _batch_bias(ratios):
  log_ratio = ratios.batch_log_ratio(ratios.mean)
  ratios.loss("batch_bias", "flow_grpo_batch_loss", log_ratio, inv_dt=True)
  name = "flow_grpo_batch_grad_mean"
  ratios.gradient("batch_bias", name, ratios.batch_log_ratio, inv_dt=True)
  ratios.check("batch_bias/ratio", "flow_grpo_batch_ratio", jnp.exp(log_ratio), RATIO)
  bias = ratios.divergence(ratios.mean).mean()
  ratios.check("batch_bias/bias", "flow_grpo_batch_bias", bias, cases.FORMULA)


def _dppo(ratios):
  log_ratio = ratios.log_ratio(ratios.mean, "plain")
  away = ratios.divergence(ratios.mean)
  # Its advantages are not clipped.
  adv, log_ratio = ratios.free_adv, log_ratio[:, None]
  near = flow.dppo_mask(away[:, None], log_ratio, adv, threshold=DPPO_THRESHOLD)
  loss, _ = flow.policy_loss(
    log_ratio, adv, ratios.weights, clip_low=ratios.clip, clip_high=ratios.clip, loss_mask=near
  )
  ratios.check("flow_dppo/loss", "flow_dppo_loss", loss - jnp.mean(adv * near[:, 0]), LOSS)
  ratios.check("flow_dppo/masked", "flow_dppo_masked_fraction", 1 - near.mean(), SUM)
  ratios.check("flow_dppo/kl", "flow_dppo_kl_mean", away.mean(), cases.FORMULA)


# Name of an aggregation -> ours, L_max (None for the width), and whether it is summed over rows.
AGGREGATIONS = {
  "token-mean": ("token-mean", 1, False),
  "seq-mean-token-sum": ("constant", 1, False),
  "seq-mean-token-mean": ("seq-mean-token-mean", 1, False),
  "seq-mean-token-sum-norm": ("constant", None, True),
}


@cases.case("text_grpo")
def text_objectives(folder, rec):
  modes = "|".join(AGGREGATIONS)
  for m in rec.matches(rf"(.+?)/(gspo/)?({modes})/loss"):
    _text(rec, m)


def _text(rec, m):
  case = m[1]
  new, old, mask = (jnp.asarray(rec[f"{case}/{name}"]) for name in ("new", "old", "mask"))
  counts = mask > 0
  # One advantage a row; where no token counts it may be anything.
  adv = jnp.take_along_axis(jnp.asarray(rec[f"{case}/adv"]), counts.argmax(1)[:, None], 1)[:, 0]
  weights = _weights(m[3], counts)
  settings = dict(clip_low=rec.number(f"{case}/clip_low"),
                  clip_high=rec.number(f"{case}/clip_high"))
  if m[2]:
    # Its mean is of sequences, whatever the file's name for it.
    weights = _weights("seq-mean-token-mean", counts)
    settings["ratio"] = "sequence"
  else:
    settings["dual_clip"] = rec.number(f"{case}/clip_c")
  run = lambda new: text.policy_loss(new, old, adv, weights, **settings)
  (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(new)
  group, prefix = ("gspo" if m[2] else m[3]), m[0].removesuffix("/loss")
  rec.check(group, m[0], loss, SUM)
  rec.check(f"{group}/grad", f"{prefix}/grad", gradient, GRADIENT)
  tokens_mean = lambda values: jnp.sum(values * counts) / counts.sum()
  measured = {"clipfrac": metrics["clipped"], "clipfrac_lower": metrics["dual_clipped"],
              "ppo_kl": -metrics["log_ratio"]}
  for name, values in measured.items():
    rec.check(f"{group}/{name}", f"{prefix}/{name}", tokens_mean(values), SUM)
  ones = jnp.arange(mask.size, dtype=jnp.float32).reshape(mask.shape)
  rec.check("weights", f"{prefix}/agg_ones", jnp.sum(weights * ones), SUM)


def _weights(mode, counts):
  aggregation, max_tokens, summed = AGGREGATIONS[mode]
  weights = text.token_weights(
    counts, jnp.ones(len(counts), bool), aggregation=aggregation,
    max_tokens=max_tokens or counts.shape[1],
  )
  return weights * counts.any(1).sum() if summed else weights


@cases.case("text_grpo")
def divergences(folder, rec):
  estimators = {
    "k1": text.k1, "k2": lambda p, q: jnp.square(text.k1(p, q)) / 2, "k3": text.k3,
    "abs": lambda p, q: jnp.abs(text.k1(p, q)),
  }
  for m in rec.matches(r"(.+)/kl_(k1|k2|k3|abs)/value"):
    _divergence(rec, m, estimators[m[2]])


def _divergence(rec, m, estimate):
  new, ref = (jnp.asarray(rec[f"{m[1]}/{name}"]) for name in ("new", "ref"))
  mask = jnp.asarray(rec[f"{m[1]}/mask"])
  rec.check("kl", m[0], estimate(new, ref), SUM)
  gradient = jax.grad(lambda new: jnp.sum(mask * estimate(new, ref)))(new)
  rec.check("kl/grad", m[0].replace("value", "grad"), gradient, GRADIENT)


@cases.case("forward_process")
def diffusion_nft(folder, rec):
  for m in rec.matches(r"(nft/(\w+)/b[^/]+)/fwd"):
    _diffusion_nft(rec, m)


def _diffusion_nft(rec, m):
  read = lambda name: tokens(rec[f"{m[1]}/{name}"])
  x_0, noise, old, new, ref = map(read, ("x0", "noise", "old", "fwd", "ref"))
  t, adv = (jnp.asarray(rec[f"{m[1]}/{name}"]) for name in ("t", "adv"))
  beta, kl_beta, bound = (
    rec.number(f"{m[1]}/{name}") for name in ("beta", "kl_beta", "adv_clip_max")
  )
  good = forward_process.optimality(adv, bound=bound, kind=m[2])
  rec.check("nft/r", f"{m[1]}/r", good, cases.FORMULA)
  mask = jnp.ones(x_0.shape[:-1], bool)

  def objective(v, good=good):
    losses = forward_process.nft_losses(
      v, old, x_0, noise, t, good, mask, beta=beta, scale=bound
    )
    return losses.mean() + kl_beta * regularizers.velocity_mse(v, ref, mask).mean()

  loss, gradient = jax.value_and_grad(objective)(new)
  for name in ("loss", "policy_loss", "verl_loss"):
    rec.check("nft/loss", f"{m[1]}/{name}", loss, SUM)
  shape = rec[f"{m[1]}/fwd"].shape
  # Where r is 1/2 the pulls of the two mixtures cancel but for their rounding: of one of them.
  pull = float(jnp.linalg.norm(jax.grad(objective)(new, jnp.ones_like(good))))
  tolerance = dataclasses.replace(GRADIENT, absolute=max(GRADIENT.absolute, 5e-7 * pull))
  rec.check("nft/grad", f"{m[1]}/grad", gradient.reshape(shape), tolerance)


# Of the moving average that generates, by its number: step where it starts to rise, rise a step,
# highest.
DECAYS = ((0, 0.0, 0.0), (0, 0.001, 0.5), (75, 0.0075, 0.999))


@cases.case("forward_process")
def nft_decay(folder, rec):
  for m in rec.matches(r"nft/decay/type(\d+)"):
    first, rise, highest = DECAYS[int(m[1])]
    steps = jnp.asarray(rec["nft/decay/step"])
    decay = jnp.minimum(rise * jnp.maximum(steps - first, 0), highest)
    rec.check("nft/decay", m[0], decay, cases.FORMULA)


@cases.case("forward_process")
def matching_densities(folder, rec):
  weightings = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
  for m in rec.matches(r"(awm/(.+))/pred"):
    x_0, noise, v = (tokens(rec[f"{m[1]}/{name}"]) for name in ("x0", "noise", "pred"))
    t = jnp.asarray(rec[f"{m[1]}/t"]).reshape(-1)
    logp = forward_process.awm_log_prob(
      v, x_0, noise, t, jnp.ones(v.shape[:-1], bool), weighting=weightings[m[2]],
      power=rec.number(f"{m[1]}/ghuber_power"),
    )
    rec.check("awm", f"{m[1]}/log_prob", logp, cases.FORMULA)
