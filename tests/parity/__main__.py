"""Checks a folder of recorded reference outputs: of .npz files, or of folders of files of any kind.

  python -m tests.parity DIR [--strict]

Prints one line a case, `name  worst_abs  worst_rel  tolerance  PASS|FAIL|NOT COVERED`, where
worst_rel is relative to the largest recorded number (to the norm, for gradients). Exits 1 on any
FAIL, and with --strict on any NOT COVERED.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import pathlib
import pkgutil
import sys
import time

from tests import parity
from tests.parity import cases, network
from unigrpo_jax import errors

# Importing a module of cases registers them.
for module in pkgutil.iter_modules(parity.__path__, "tests.parity."):
  if not module.name.endswith("__main__"):
    importlib.import_module(module.name)

# What gives away a file's kind where its name is not one that a case asks for (a second edit, say).
SIGNS = {
  r"in_ids_chunk\d+": "a_text_forward",
  r"in_start_token": "b_greedy_text",
  r"out_vit_hidden": "c_vit",
  r"out_moments\d+": "d_vae",
  r"out_velocity": "e_t2i_velocity",
  r".+__out_x": "g_generate_cfg",
  r"in_negative_ids": "g3_negative_prompt",
  r"call\d+_\w+": "i_edit",
  r"out_losses": "j_training",
  r"out_vae\d+_size": "k_transforms",
  r"out_sizes_\w+": "k_transforms",
  r"out_mask\d+": "l_tables",
  r"out_schedule_.+": "l_tables",
  r"out_infer_velocity": "m_train_vs_infer",
  r"in_init_noise": "f_generate_nocfg",
  r"p_yes/.+/logits": "reward",
  r".+/dloss_dx0": "refl",
  r".+/k\d+/dloss_dw1": "draft",
  r".+/dtotal_dw1": "srpo",
}


def check(path: pathlib.Path, only: str = "") -> list[cases.Line]:
  """Runs every case of a folder, printing as it goes.

  Args:
    path: the folder; its README.md says which files it should hold.
    only: the start of the names of the files to look at.

  Raises:
    InputError: the folder does not exist or holds no recordings.
  """
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such folder; give a folder of recorded outputs")
  found = {file.stem for file in path.glob("*.npz")}
  if not found:
    return _check_tree(path, only)
  folder = network.Folder(path)
  lines = []
  for name in sorted(found | folder.readme.files):
    if not name.startswith(only):
      continue
    for line in _check_file(folder, name):
      print(line, flush=True)
      lines.append(line)
  return lines


def _check_tree(path: pathlib.Path, only: str) -> list[cases.Line]:
  """Runs the cases of a folder of folders, of files of any kind; see `cases.file_case`."""
  files = sorted(file for file in path.glob("*/**/*") if file.is_file())
  if not files:
    raise errors.InputError(f"{path}: no .npz file in it; give a folder of recorded outputs")
  lines = []
  for file in files:
    name = file.relative_to(path).as_posix()
    if not name.startswith(only):
      continue
    matches = functools.partial(fnmatch.fnmatch, name)
    report = cases.Report(name.rpartition(".")[0])
    for case in cases.FILE_CASES:
      if matches(case.pattern):
        report.run(case.run, file)
    if not report.lines and not any(map(matches, _given())):
      report.not_covered("rest", f"no case reads {name}")
    for line in report.lines:
      print(line, flush=True)
    lines += report.lines
  return lines


def _given() -> list[str]:
  return [pattern for case in cases.FILE_CASES for pattern in case.given]


def _check_file(folder: network.Folder, name: str) -> list[cases.Line]:
  path = folder.path / f"{name}.npz"
  if not path.is_file():
    return [cases.Line(name, result=cases.NOT_COVERED, notes=["the folder has no such file"])]
  try:
    recording = cases.Recording(path, folder.readme.arrays(name))
  except Exception as error:  # A damaged archive raises whatever zipfile or numpy met first.
    return [cases.Line(name, result=cases.FAIL, notes=[f"not readable: {error}"])]
  for case in cases.CASES.get(_kind(recording), []):
    recording.run(case, folder)
  recording.close()
  return recording.lines


def _kind(recording: cases.Recording) -> str:
  """The name under which the cases of a file are registered."""
  if recording.name in cases.CASES:
    return recording.name
  return next((kind for sign, kind in SIGNS.items() if any(recording.matches(sign))), "")


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m tests.parity", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", type=pathlib.Path, help="holds the recordings")
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
