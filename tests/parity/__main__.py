"""Checks a folder of recorded reference outputs.

  python -m tests.parity DIR [--strict]

Prints one line a case, `name  worst_abs  worst_rel  tolerance  PASS|FAIL|NOT COVERED`, where
worst_rel is relative to the largest recorded number (to the norm, for gradients). Exits 1 on any
FAIL, and with --strict on any NOT COVERED.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

from tests.parity import cases, network
from unigrpo_jax import errors

# Importing a module of cases registers them.
from tests.parity import algo, flow, inferencer, tables, text, training, vision  # noqa: F401  isort: skip

MODEL_FILES = (
  "a_text_forward", "b_greedy_text", "c_vit", "d_vae", "e_t2i_velocity", "f_generate_nocfg",
  "g_generate_cfg", "g2_generate_cfg_pack", "g3_negative_prompt", "h_think_t2i", "i_edit",
  "i2_edit_think_global", "i3_understand_think", "j_training", "k_transforms", "l_tables",
  "m_train_vs_infer",
)
FORMULA_FILES = (
  "schedule", "sde_bagel", "sde_sd3_verl", "sde_dance_mix", "policy_loss", "regularizer",
  "advantage", "text_grpo", "mixgrpo_schedule", "forward_process", "cfg_ema",
)


def check(path: pathlib.Path, only: str = "") -> list[cases.Line]:
  """Runs every case of a folder, printing as it goes.

  Args:
    path: the folder; which files it should hold is told by what it holds.
    only: the start of the names of the files to look at.

  Raises:
    InputError: the folder does not exist or holds no recordings.
  """
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such folder; give a folder of recorded outputs")
  found = sorted(file.stem for file in path.glob("*.npz"))
  expected = [files for files in (MODEL_FILES, FORMULA_FILES) if set(files) & set(found)]
  if not found:
    raise errors.InputError(f"{path}: no .npz file; give a folder of recorded outputs")
  names = sorted({*found, *(name for files in expected for name in files)})
  folder = network.Folder(path)
  lines = []
  for name in names:
    if not name.startswith(only):
      continue
    for line in _check_file(folder, name):
      print(line, flush=True)
      lines.append(line)
  return lines


def _check_file(folder: network.Folder, name: str) -> list[cases.Line]:
  path = folder.path / f"{name}.npz"
  if not path.is_file():
    return [cases.Line(name, result=cases.NOT_COVERED, notes=["the folder has no such file"])]
  try:
    recording = cases.Recording(path)
  except Exception as error:  # A damaged archive raises whatever zipfile or numpy met first.
    return [cases.Line(name, result=cases.FAIL, notes=[f"not readable: {error}"])]
  for case in cases.CASES.get(name, []):
    recording.run(case, folder)
  recording.close()
  return recording.lines


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m tests.parity", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", type=pathlib.Path, help="holds the recordings (*.npz)")
  parser.add_argument("--strict", action="store_true", help="exit 1 on any NOT COVERED too")
  parser.add_argument("--only", default="", metavar="NAME", help="files whose name starts so")
  args = parser.parse_args()
  start = time.monotonic()
  lines = check(args.folder, args.only)
  count = {kind: sum(line.result == kind for line in lines)
           for kind in (cases.PASS, cases.FAIL, cases.NOT_COVERED)}
  summary = ", ".join(f"{number} {kind}" for kind, number in count.items())
  print(f"{len(lines)} cases: {summary}; {time.monotonic() - start:.0f} s")
  if count[cases.FAIL] or (args.strict and count[cases.NOT_COVERED]) or not lines:
    sys.exit(1)


if __name__ == "__main__":
  errors.report(main)
