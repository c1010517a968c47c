"""Formulas recorded from other projects: schedules and the combination of guidance branches."""

from __future__ import annotations

import numpy as np

from tests.parity import cases
from unigrpo_jax.sampling import flow

NUMBER = r"[\d.]+"


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
    rec.check(f"cfg/{m[1]}", m[0], out, cases.FORMULA)
