"""Formulas recorded from other projects: schedules, windows, guidance and moving averages."""

from __future__ import annotations

import numpy as np

from tests.parity import cases
from unigrpo_jax.runtime import optim
from unigrpo_jax.sampling import flow, windows

NUMBER = r"[\d.]+"
# The image step subtracts: elements near 0 are known to 1e-7 of those that they were made of.
GUIDED = cases.Tolerance(0.0, 1e-6, of_largest=True)


@cases.case("schedule")
def bagel(folder, rec):
  for m in rec.matches(rf"bagel/T(\d+)_shift({NUMBER})/timesteps"):
    times = np.asarray(flow.time_grid(int(m[1]), float(m[2])))
    rec.check("bagel/timesteps", m[0], times[:-1], cases.FORMULA)
    dts = times[1:] - times[:-1]
    # A difference of numbers up to 1: 1e-6 of the times, not of their difference.
    rec.check("bagel/dts", m[0].replace("timesteps", "dts"), dts, cases.Tolerance(1e-6, 0.0))


@cases.case("schedule")
def verl_omni(folder, rec):
  for m in rec.matches(rf"verl_omni/T(\d+)_shift({NUMBER})/sigmas"):
    times = np.asarray(flow.time_grid(int(m[1]), float(m[2])))
    rec.check("verl_omni/sigmas", m[0], times, cases.FORMULA)
    rec.check("verl_omni/timesteps", m[0].replace("sigmas", "timesteps"), times[:-1],
              cases.FORMULA)


@cases.case("cfg_ema")
def guidance(folder, rec):
  for m in rec.matches(rf"cfg/(\w+)/t({NUMBER})_i({NUMBER})/out"):
    case = m[0].removesuffix("/out")
    settings = flow.Guidance(float(m[2]), float(m[3]), renorm=m[1])
    v, v_text, v_image = (rec[f"{case}/{name}"] for name in ("v", "v_uncond", "v_img"))
    out = flow.guide(v, v_text, v_image if settings.image_scale > 1 else None, settings)
    rec.check(f"cfg/{m[1]}", m[0], out, GUIDED)


@cases.case("schedule")
def rank_windows(folder, rec):
  """A constant window a process: Python's generator seeded with the rank."""
  for m in rec.matches(r"(window/[^/]+)/seeds"):
    low, high, size = (rec.number(f"{m[1]}/{name}") for name in ("lo", "hi", "size"))
    ranks = rec[m[0]]
    steps = windows.draw(
      "per_rank_const", low=low, high=high, size=size, seed=0, iteration=7, prompts=len(ranks),
      group_size=1, num_steps=high, ranks=ranks,
    )
    rec.check("window", f"{m[1]}/flow_grpo_start", steps[:, 0], cases.EXACT)
    ends = steps[:, [0, -1]] + np.array([0, 1])
    rec.check("window", f"{m[1]}/verl_omni_window", ends, cases.EXACT)


@cases.case("mixgrpo_schedule")
def moving_windows(folder, rec):
  for m in rec.matches(r"([^/]+)/sample_strategy"):
    _moving_window(rec, m[1])


def _moving_window(rec, case):
  strategy = rec.number(f"{case}/sample_strategy")
  names = ("max_timesteps", "group_size", "iters_per_group", "seed_offset")
  steps, size, iterations, seed = (rec.number(f"{case}/{name}") for name in names)
  optional = lambda name: f"{case}/{name}" in rec and rec.number(f"{case}/{name}")
  count = len(rec.get(f"{case}/start", ()))
  if strategy == "random":
    # The first iteration is not drawn; the k-th draw is of the generator seeded with k more.
    draws = (np.random.default_rng(seed + draw) for draw in range(count - 1))
    starts = [0, *(windows.random_starts(rng, 1, low=0, high=steps, size=size)[0] for rng in draws)]
  else:
    dwell = {"progressive": "constant", "decay": "linear", "exp_decay": "exponential"}[strategy]
    overlap, stride = optional("prog_overlap"), optional("prog_overlap_step") or 1
    moving = windows.Moving(iterations, stride if overlap else None, bool(optional("roll_back")),
                            dwell)
    starts = [windows.moving_start(moving, i, steps=steps, size=size) for i in range(count)]
  rec.check(strategy, f"{case}/start", starts, cases.EXACT)
  window = np.add.outer(starts, np.arange(size))
  rec.check(strategy, f"{case}/window", np.where(window < steps, window, -1), cases.EXACT)


@cases.case("cfg_ema")
def moving_average(folder, rec):
  """The recorded parameter counts the steps: 1 after the first."""
  decay, every = rec.number("ema/decay"), rec.number("ema/update_step_interval")
  schedule = optim.ema_decay(np.arange(len(rec.get("ema/sched", ()))), decay)
  rec.check("ema/sched", "ema/sched", schedule, cases.FORMULA)
  average, trace = np.zeros(()), []
  for step in range(len(rec.get("ema/trace", ()))):
    if (step + 1) % every == 0:  # ours moves after every step
      average = optim.update_average(average, step + 1.0, step, decay=decay)
    trace.append(average)
  rec.check("ema/trace", "ema/trace", trace, cases.FORMULA)
