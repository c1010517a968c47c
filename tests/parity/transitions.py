"""Formulas recorded from other projects: noisy steps of the flow, and distances between policies.

A recorded group holds one step: x, v and times, what the step made of them, and what it becomes
when the velocity changes. Its std_dev_t is of the step (`full`) or lacks sqrt|dt|, by project.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from unigrpo_jax.losses import regularizers
from unigrpo_jax.sampling import sde

NUMBER = r"[\d.e-]+"
# Latents and log-densities are of order 1, and both sides round them to float32 along the way.
STEP = cases.Tolerance(2e-6, 2e-6)
GRADIENT = cases.Tolerance(1e-8, 5e-6, of_norm=True)
# Means of order 1 in float32 differ by 1e-4 here: their difference is known to some 1e-4 of itself.
LATENT_KL = cases.Tolerance(0.0, 5e-4)
LATENT_KL_GRADIENT = cases.Tolerance(0.0, 5e-4, of_norm=True)


def tokens(array: np.ndarray, batched: bool = True) -> jnp.ndarray:
  """Latents of any shape as [B, I, C], or [I, C]: what counts is which elements are one image's."""
  lead = array.shape[:1] if batched else ()
  return jnp.asarray(array.reshape(*lead, -1, array.shape[-1]))


class Step:
  """One recorded step, and ours from the same numbers."""

  def __init__(self, rec, prefix, times, *, kind, level, full, normalised=False, batched=True):
    self.rec, self.prefix, self.times = rec, prefix, [jnp.float32(t) for t in times]
    self.kind, self.level, self.full, self.normalised = kind, level, full, normalised
    self.batched = batched
    self.x = tokens(rec[f"{prefix}/x"], batched)
    self.case = prefix.rpartition("/i")[0]

  def move(self, v):
    return sde.transition(self.x, v, *self.times, kind=self.kind, noise_level=self.level)

  def value(self, name):
    return tokens(self.rec[f"{self.prefix}/{name}"], self.batched)

  def logp(self, v):
    move = self.move(v)
    x_next = self.value("x_next")
    mask = jnp.ones(x_next.shape[:-1], bool)
    return sde.log_prob(
      x_next, move.mean, move.std, mask, kind=self.kind, normalised=self.normalised
    )

  def check(self, name, actual, tolerance=STEP):
    key = f"{self.prefix}/{name}"
    if key in self.rec:
      shape = self.rec.get(key, None).shape
      if np.size(actual) == 1:
        actual = np.broadcast_to(np.reshape(actual, ()), shape)
      self.rec.check(f"{self.case}/{name}", key, np.reshape(actual, shape), tolerance)

  def compare(self):
    v = self.value("v")
    move = self.move(v)
    self.check("mean", move.mean)
    self.check("dt", move.dt)
    self.check("sqrt_dt", jnp.sqrt(-move.dt))
    self.check("std_dev_t", move.std if self.full else move.std / jnp.sqrt(-move.dt))
    self.check("x0", self.x - self.times[0] * v)
    self.check("x_next_ode", self.x + v * move.dt)
    if self.level == 0:
      self.check("x_next", move.mean)
      # 0 / 0 on both sides: a step without noise has no density.
      undefined = np.isnan(self.rec[f"{self.prefix}/log_prob"])
      self.rec.check_equal(
        f"{self.case}/no_density", f"{self.prefix}/log_prob", np.isnan(self.logp(v)), undefined,
        cases.EXACT,
      )
      return
    # x_next - mean is of the size of std, and rounded at the size of x_next.
    rounding = 2e-7 * float(jnp.std(self.value("x_next")) / jnp.maximum(move.std, 1e-4))
    logp = dataclasses.replace(STEP, relative=max(STEP.relative, rounding))
    gradient = dataclasses.replace(GRADIENT, relative=max(GRADIENT.relative, rounding))
    self.check("log_prob", self.logp(v), logp)
    if f"{self.prefix}/v_new" not in self.rec:
      return
    v_new = self.value("v_new")
    self.check("mean_new", self.move(v_new).mean)
    self.check("log_prob_new", self.logp(v_new), logp)
    self.check("dlogp_dv_new", jax.grad(lambda v: self.logp(v).sum())(v_new), gradient)


@cases.case("sde_bagel")
def bagel_steps(folder, rec):
  for m in rec.matches(rf"(sde|cps)/a{NUMBER}/i\d+/x"):
    prefix = m[0].removesuffix("/x")
    times = [rec[f"{prefix}/{name}"] for name in ("t", "t_next", "sigma_max")]
    kind = {"sde": "flow", "cps": "cps"}[m[1]]
    level = rec.number(f"{prefix}/noise_level")
    Step(rec, prefix, times, kind=kind, level=level, full=kind == "cps", batched=False).compare()


@cases.case("sde_sd3_verl")
def sd3_steps(folder, rec):
  for m in rec.matches(rf"flow_grpo_sd3/(sde|cps)/a{NUMBER}/i\d+/x"):
    kind = {"sde": "flow", "cps": "cps"}[m[1]]
    _scheduled(rec, m[0], kind, full=kind == "cps", normalised=True)


@cases.case("sde_sd3_verl")
def verl_omni_steps(folder, rec):
  for m in rec.matches(r"verl_omni/(sde|cps|dance_sde)/norm(0|1)/i\d+/x"):
    kind = {"sde": "flow", "cps": "cps", "dance_sde": "dance"}[m[1]]
    _scheduled(rec, m[0], kind, full=kind != "flow", normalised=m[2] == "1")


@cases.case("sde_dance_mix")
def dance_and_mix_steps(folder, rec):
  for m in rec.matches(r"(dance|mixgrpo_flow)/i\d+/x"):
    kind = {"dance": "dance", "mixgrpo_flow": "flow"}[m[1]]
    _scheduled(rec, m[0], kind, full=True, normalised=True, level="eta")


def _scheduled(rec, key, kind, *, full, normalised, level="noise_level"):
  prefix = key.removesuffix("/x")
  times = [rec[f"{prefix}/sigma"], rec[f"{prefix}/sigma_next"]]
  # Only the clamp at t = 1 asks for the second time; `dance` records none.
  second = f"{prefix}/sigma_max"
  times.append(rec[second] if second in rec else times[1])
  level = rec.number(f"{prefix}/{level}")
  Step(rec, prefix, times, kind=kind, level=level, full=full, normalised=normalised).compare()


@cases.case("sde_sd3_verl", "sde_dance_mix")
def schedules(folder, rec):
  """The schedule is other models'; the steps must be of it, so that they are steps of ours."""
  sigmas = rec["sched/sigmas"]
  rec.check("sched", "sched/timesteps", sigmas[:-1] * 1000, cases.FORMULA)
  for m in rec.matches(r"(?:flow_grpo_sd3|dance|mixgrpo_flow)/(?:.+/)?i(\d+)/sigma"):
    step = int(m[1])
    rec.check("sched", m[0], sigmas[step], cases.FORMULA)
    rec.check("sched", m[0] + "_next", sigmas[step + 1], cases.FORMULA)
    rec.check("sched", m[0] + "_max", sigmas[1], cases.FORMULA)


@cases.case("regularizer")
def distances(folder, rec):
  for m in rec.matches(r"(i\d+)/v_ref"):
    _distance(rec, m[1])


def _distance(rec, case):
  times = [jnp.float32(rec[f"{case}/{name}"]) for name in ("t", "t_next", "sigma_max")]
  level = rec.number(f"{case}/noise_level")
  x, v, v_ref = (tokens(rec[f"{case}/{name}"]) for name in ("x", "v", "v_ref"))
  mask = jnp.ones(x.shape[:-1], bool)
  move = lambda v: sde.transition(x, v, *times, kind="flow", noise_level=level)
  rec.check("dt", f"{case}/dt", move(v).dt, STEP)

  def latent_kl(v):
    of_v, of_ref = move(v), move(v_ref)
    return regularizers.latent_kl(of_v.mean, of_ref.mean, of_v.std, of_v.dt, mask, form="code")

  def mse(v):
    return regularizers.velocity_mse(v, v_ref, mask).mean()

  shape = rec[f"{case}/v"].shape
  rec.check("bagel_latent_kl", f"{case}/bagel_latent_kl", latent_kl(v), LATENT_KL)
  rec.check("verl_latent_kl", f"{case}/verl_latent_kl", latent_kl(v).mean(), LATENT_KL)
  gradient = jax.grad(lambda v: latent_kl(v).mean())(v).reshape(shape)
  rec.check("verl_latent_kl_dv", f"{case}/verl_latent_kl_dv", gradient, LATENT_KL_GRADIENT)
  rec.check("velocity_mse", f"{case}/velocity_mse_mean", mse(v), cases.FORMULA)
  gradient = jax.grad(mse)(v).reshape(shape)
  rec.check("velocity_mse_dv", f"{case}/velocity_mse_mean_dv", gradient, GRADIENT)
