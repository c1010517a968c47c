"""Formulas recorded from other projects: FPO, FPO++ and AWM, and the times that AWM draws."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from tests.parity.objectives import GRADIENT, SUM
from unigrpo_jax.losses import flow, forward_process, regularizers
from unigrpo_jax.sampling import times

FPO_WEIGHTINGS = {"u": "uniform", "eps": "one_minus_t2"}
SOFTPLUS = "softplus"  # advantages of gridworld that are never negative


def _weights(rows: int, pairs: int):
  return flow.step_weights(jnp.ones(rows, bool), pairs)


def _check_ratios(rec, case, name, metrics):
  """The ratios, one a row or a pair, however they were recorded."""
  ratios = np.exp(np.asarray(metrics["log_ratio"]))
  if f"{case}/ratio" in rec:
    rec.check(name, f"{case}/ratio", ratios.reshape(rec[f"{case}/ratio"].shape), SUM)
  for kind in ("mean", "min", "max"):
    rec.check(name, f"{case}/ratio_{kind}", getattr(ratios, kind)(), SUM)
  rec.check(name, f"{case}/clip_fraction", np.asarray(metrics["outside"]).mean(), SUM)


@cases.case("fpo")
def playground(folder, rec):
  for m in rec.matches(r"(fpo/(u|eps)/(mean_first|per_pair)/[^/]+)/v"):
    _playground(rec, *m.groups())


def _playground(rec, case, weighting, ratio):
  x_0, noise, v, v_old = (
    rec[f"{case}/{name}"][..., None, :] for name in ("x_0", "noise", "v", "v_old")
  )
  t, adv = (rec[f"{case}/{name}"] for name in ("t", "adv"))
  (value, (losses, metrics)), gradient = _fpo(
    v, v_old, np.broadcast_to(x_0[:, None], v.shape), noise, t, adv, rec[f"{case}/clip"],
    weighting=FPO_WEIGHTINGS[weighting], ratio=ratio,
  )
  name = f"{weighting}/{ratio}"
  for key, ours in zip(("cfm", "cfm_old"), losses):
    rec.check(f"{name}/losses", f"{case}/{key}", ours, SUM)
  rec.check(f"{name}/loss", f"{case}/policy_loss", value - adv.mean(), SUM)
  _check_ratios(rec, case, f"{name}/ratio", metrics)
  rec.check(f"{name}/grad", f"{case}/grad_v", gradient[..., 0, :], GRADIENT)


@functools.partial(jax.jit, static_argnames=("weighting", "ratio"))
@functools.partial(jax.value_and_grad, has_aux=True)
def _fpo(v, v_old, x_0, noise, t, adv, clip, *, weighting, ratio):
  mask = jnp.ones(v.shape[:-1], bool)
  losses = forward_process.fpo_losses(v, v_old, x_0, noise, t, mask, weighting=weighting)
  loss, metrics = forward_process.fpo_surrogate(
    *losses, adv, _weights(*t.shape), ratio=ratio, clip=clip
  )
  return loss, (losses, metrics)


@cases.case("fpo")
def gridworld(folder, rec):
  for m in rec.matches(r"(gridworld/[^/]+/([^/]+))/cfm"):
    raw = rec[f"{m[1]}/adv_raw"]
    # Normalised by the sample's standard deviation, or made positive.
    adv = np.log1p(np.exp(raw)) if m[2] == SOFTPLUS else (raw - raw.mean()) / raw.std(ddof=1)
    rec.check("gridworld/adv", f"{m[1]}/adv", adv, SUM)
    _matching_losses(rec, m[1], f"gridworld/{m[2]}", ratio="clamped_mean")


@cases.case("fpo")
def fpo_plus_plus(folder, rec):
  for m in rec.matches(r"(fpo_pp/(ppo|spo|aspo)/[^/]+)/cfm"):
    _matching_losses(
      rec, m[1], f"fpo_pp/{m[2]}", ratio="straight_through", surrogate=m[2],
      cap=rec.number(f"{m[1]}/cfm_clamp"), bound=rec.number(f"{m[1]}/diff_clamp_max"),
      cap_negative=rec.number(f"{m[1]}/cfm_clamp_negative"),
    )


def _matching_losses(rec, case, name, **settings):
  """A case that starts from matching losses."""
  losses, old, adv = (rec[f"{case}/{key}"] for key in ("cfm", "cfm_old", "adv"))
  (value, metrics), gradient = _surrogate(losses, old, adv, rec[f"{case}/clip"], **settings)
  rec.check(f"{name}/loss", f"{case}/loss", value - adv.mean(), SUM)
  _check_ratios(rec, case, f"{name}/ratio", metrics)
  rec.check(f"{name}/grad", f"{case}/grad_cfm", gradient, GRADIENT)


@functools.partial(
  jax.jit, static_argnames=("ratio", "surrogate", "cap", "bound", "cap_negative"))
@functools.partial(jax.value_and_grad, has_aux=True)
def _surrogate(losses, old, adv, clip, **settings):
  return forward_process.fpo_surrogate(
    losses, old, old - losses, adv, _weights(*losses.shape), clip=clip, **settings
  )


@cases.case("awm")
def weighted_matching(folder, rec):
  weightings = "|".join(forward_process.AWM_WEIGHTINGS)
  for m in rec.matches(rf"(awm/({weightings})/(exp_first|sum_first)/[^/]+)/v"):
    _weighted_matching(rec, *m.groups())


def _weighted_matching(rec, case, weighting, ratio):
  """Recorded by time, then by image: [T, B, ...] is [B, T, 1, D] here."""
  number = lambda name: np.float32(rec.number(f"{case}/{name}"))
  t = rec[f"{case}/t"].T
  rows, count = t.shape
  by_image = lambda name: np.moveaxis(
    rec[f"{case}/{name}"].reshape(count, rows, 1, -1), 0, 1)
  names = ("v", "v_old", "v_ref", "v_ema", "noise")
  v, v_old, v_ref, v_ema, noise = map(by_image, names)
  x_0 = np.broadcast_to(rec[f"{case}/x_0"].reshape(rows, 1, 1, -1), v.shape)
  (total, (policy, kl, ema, metrics, *logps)), gradient = _awm(
    v, v_old, v_ref, v_ema, x_0, noise, t, rec[f"{case}/adv"],
    {name: number(name) for name in ("adv_clip_max", "advantage_max", "clip", "beta", "ema_beta")},
    weighting=weighting, ratio=ratio,
  )
  name = f"{weighting}/{ratio}"
  for key, logp in zip(("log_prob", "log_prob_old"), logps):
    rec.check(f"{name}/log_prob", f"{case}/{key}", logp.T, SUM)
  _check_ratios(rec, case, f"{name}/ratio", metrics | {"log_ratio": metrics["log_ratio"].T})
  for key, value in (("loss", total), ("policy_loss", policy), ("kl_loss", kl),
                     ("ema_kl_loss", ema)):
    rec.check(f"{name}/loss", f"{case}/{key}", value, SUM)
  gradient = np.moveaxis(gradient, 1, 0).reshape(rec[f"{case}/v"].shape)
  rec.check(f"{name}/grad", f"{case}/grad_v", gradient, GRADIENT)


@functools.partial(jax.jit, static_argnames=("weighting", "ratio"))
@functools.partial(jax.value_and_grad, has_aux=True)
def _awm(v, v_old, v_ref, v_ema, x_0, noise, t, adv, numbers, *, weighting, ratio):
  mask, weights = jnp.ones(v.shape[:-1], bool), _weights(*t.shape)
  unit = forward_process.unit_advantages(adv, bound=numbers["adv_clip_max"])
  unit *= numbers["advantage_max"]
  policy, metrics = forward_process.awm_loss(
    v, v_old, x_0, noise, t, mask, unit, weights, weighting=weighting, ratio=ratio,
    clip=numbers["clip"], bound=None,
  )
  policy -= unit.mean()
  kl, ema = (
    jnp.sum(weights * regularizers.velocity_mse(v, other, mask)) for other in (v_ref, v_ema)
  )
  logps = [
    forward_process.awm_log_prob(velocity, x_0, noise, t, mask, weighting=weighting)
    for velocity in (v, v_old)
  ]
  total = policy + numbers["beta"] * kl + numbers["ema_beta"] * ema
  return total, (policy, kl, ema, metrics, *logps)


@cases.case("awm")
def drawn_times(folder, rec):
  """Without their shuffles. The same time for all images of a batch, but for `uniform`."""
  for m in rec.matches(r"(times/(\w+))/times"):
    read = lambda name, case=m[1]: rec[f"{case}/{name}"]
    u, grid, shift = jnp.asarray(read("uniform")), read("sampler_times"), float(read("shift"))
    # A fraction such as 0.9, which float32 rounds down.
    end = int(len(grid) * float(f"{read('fraction').item():.6g}"))
    if m[2].startswith("discrete"):
      low = 0 if m[2] == "discrete" else 1
      indices = times.stratified_indices(u, low, end)
      if m[2] == "discrete_with_init":
        indices = jnp.concatenate([jnp.zeros(1, jnp.int32), indices])
      rec.check(f"times/{m[2]}", f"{m[1]}/indices", indices, cases.EXACT)
      drawn = grid[indices]
    elif m[2] == "logit_normal":
      drawn = times.logit_normal(u, shift)
    else:
      drawn = times.stratified_uniform(u.T, shift).T
    drawn = drawn if drawn.ndim == 2 else drawn[:, None]
    rec.check(
      f"times/{m[2]}/times", f"{m[1]}/times", np.broadcast_to(drawn, read("times").shape), SUM)
