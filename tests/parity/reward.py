"""The learned reward's read-out, resizing and metrics, as recorded from other projects."""

from __future__ import annotations

import functools

import jax
import numpy as np

from tests.parity import cases
from unigrpo_jax.reward_models import metrics, readout, resize

BASELINES = cases.Tolerance(1e-7, 1e-5)
GRADIENTS = cases.Tolerance(1e-6, 1e-5)
OF_NORM = cases.Tolerance(0.0, 1e-5, of_norm=True)
LEVELS = cases.Tolerance(1e-3, 0.0)  # float32 sums of levels up to 255, in another order


@cases.case("reward")
def p_yes(folder, rec):
  for m in rec.matches(r"(p_yes/[^/]+)/logits"):
    yes, no, tau = (rec.number(f"{m[1]}/{name}") for name in ("yes", "no", "temperature"))
    for name, kind in (("vqascore", "vocabulary"), ("two_token", "two_token")):
      read = functools.partial(readout.read, yes_id=yes, no_id=no, tau=tau, readout=kind)
      score, back = jax.vjp(read, rec[m[0]])
      rec.check(f"p_yes/{kind}", f"{m[1]}/{name}", score, BASELINES)
      gradient = back(np.ones_like(score))[0]
      rec.check(f"p_yes/{kind}_gradient", f"{m[1]}/d{name}_dlogits", gradient, GRADIENTS)


@cases.case("reward")
def resizing(folder, rec):
  for m in rec.matches(r"(resize/(\d+)to(\d+))/image"):
    case, image = m[1], rec[m[0]].astype(np.float32)
    smooth, plain = (rec[f"{case}/float_{kind}"] for kind in ("antialias", "plain"))
    height, width = smooth.shape[:2]
    to_size = functools.partial(resize.resize, height=height, width=width)
    free, back = jax.vjp(functools.partial(to_size, bounds=None), image)
    rec.check("resize/antialias", f"{case}/float_antialias", free, LEVELS)
    gradient = back(rec[f"{case}/cotangent"])[0]
    # Each is a sum over many pixels of the cotangent, whose terms cancel.
    rec.check("resize/gradient", f"{case}/grad_image", gradient, OF_NORM)
    # Pillow rounds after each pass; the second weighs the first one's rounding.
    rounding = 0.5 + 0.5 * np.abs(resize.weights(image.shape[0], height)).sum(axis=1).max()
    rec.check(
      "resize/pillow", f"{case}/pillow", to_size(image, bounds=(0.0, 255.0)),
      cases.Tolerance(round(rounding, 2) + 0.01, 0.0),
    )
    # Without antialiasing it is another image: ours is not that one.
    far = np.abs(plain - smooth).max() > 100 * LEVELS.absolute
    near = np.abs(free - plain).max() < 100 * LEVELS.absolute
    rec.check_equal("resize/not_plain", case, near, not far, cases.EXACT)


@cases.case("reward")
def answers(folder, rec):
  for m in rec.matches(r"(metrics/[^/]+)/labels"):
    yes, z = rec[m[0]].astype(bool), rec[f"{m[1]}/logits"].astype(np.float64)
    found = metrics.summary(z, yes)
    tau = metrics.best_temperature(z, yes)
    found |= {
      "average_precision": metrics.average_precision(z, yes), "ece15": found["ece"],
      "best_temperature": tau, "log_loss_at_best": metrics.log_loss(z, yes, tau),
    }
    for name in ("auc", "average_precision", "accuracy", "brier", "log_loss", "ece15",
                 "best_temperature", "log_loss_at_best"):
      rec.check(f"metrics/{name}", f"{m[1]}/{name}", found[name], BASELINES)


@cases.case("reward")
def soft_tifa(folder, rec):
  for m in rec.matches(r"(soft_tifa/[^/]+)/atoms"):
    geometric, arithmetic = metrics.soft_tifa(rec[m[0]])
    rec.check("soft_tifa/gm", f"{m[1]}/gm", geometric, cases.FORMULA)
    rec.check("soft_tifa/am", f"{m[1]}/am", arithmetic, cases.FORMULA)
