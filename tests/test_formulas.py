"""The recorded formulas are reproduced, and a wrong number in any file is noticed."""

import pathlib
import shutil

import numpy as np
import pytest

from tests.parity import __main__ as runner
from tests.parity import cases

RECORDED = pathlib.Path(__file__).parent / "golden_formulas"
# A result of each file, and the case that compares it.
RESULTS = {
  "schedule": ("window/bagel_lora/flow_grpo_start", "window"),
  "sde_bagel": ("sde/a0.8/i0/log_prob_new", "sde/a0.8/log_prob_new"),
  "sde_sd3_verl": ("verl_omni/cps/norm0/i2/std_dev_t", "verl_omni/cps/norm0/std_dev_t"),
  "sde_dance_mix": ("dance/i5/log_prob", "dance/log_prob"),
  "policy_loss": ("tiny/i1/drift2e-05/verl_grad_mean", "guard/grad"),
  "regularizer": ("i1/verl_latent_kl", "verl_latent_kl"),
  "advantage": ("shuffled_uneven/unirl", "unirl"),
  "text_grpo": ("dapo/gspo/token-mean/grad", "gspo/grad"),
  "mixgrpo_schedule": ("decay/window", "decay"),
  "forward_process": ("awm/ghuber/log_prob", "awm"),
  "cfg_ema": ("ema/trace", "ema/trace"),
  "refl": ("refl/c1_shift3_crossing/dloss_dv", "gradients"),
  "draft": ("draft/shift3/k2/dloss_dw1", "gradients"),
  "srpo": ("srpo/c0/inversion/score", "scores"),
  "fpo": ("fpo_pp/aspo/drift3/grad_cfm", "fpo_pp/aspo/grad"),
  "awm": ("times/discrete_wo_init/indices", "times/discrete_wo_init"),
}


def test_every_file_has_its_case_here():
  assert {file.stem for file in RECORDED.glob("*.npz")} == set(RESULTS)


@pytest.mark.parametrize("file", RESULTS)
def test_recorded_formulas_are_reproduced(file, tmp_path):
  shutil.copy(RECORDED / f"{file}.npz", tmp_path)
  lines = runner.check(tmp_path)
  assert lines and all(line.result == cases.PASS for line in lines), "\n".join(map(str, lines))
  key, case = RESULTS[file]
  with np.load(tmp_path / f"{file}.npz") as arrays:
    arrays = {name: arrays[name] for name in arrays.files}
  changed = arrays[key].copy()
  # A thousandth more, where numbers are not whole.
  changed.flat[-1] += 1 if changed.dtype.kind == "i" else 1e-3 * np.abs(changed).max()
  np.savez(tmp_path / f"{file}.npz", **arrays | {key: changed})
  failed = {line.name for line in runner.check(tmp_path) if line.result == cases.FAIL}
  assert failed == {f"{file}/{case}"}
