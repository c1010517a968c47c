"""Makes a learned reward: a BAGEL that judges whether a picture shows a prompt, by the probability
of its answer "yes".

  make       IconWorld's triples of picture, prompt and answer, for training and for validation
  train      supervised training on the answers
  calibrate  asks the trained network about the validation triples; fits the temperature tau
  measure    its accuracy by source and category, and the gates; writes the folder of --out

Each stage continues where it was interrupted, and is not repeated once it is done. Without a stage,
all of them run. The last one prints a page; if a gate is missed, the status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import hashlib
import sys
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files
from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import hosts
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.tools.reward_model import making, measuring, pictures, training
from unigrpo_jax.tools.reward_model import triples as triples_lib

STAGES = ("make", "train", "calibrate", "measure")
ALL = "all"
EPILOG = """--config.KEY=VALUE changes a key of the config of the training.

examples:
  python -m unigrpo_jax.reward_model --workdir=runs/reward_model --out=reward_models/iconworld
  python -m unigrpo_jax.reward_model make --workdir=runs/reward_model --triples=3000
  python -m unigrpo_jax.reward_model train --workdir=runs/reward_model --config.steps=500
  python -m unigrpo_jax.reward_model --workdir=runs/reward_model_7b --out=reward_models/bagel \\
    --config=configs/sft.py:reward_model --config.init_from=BAGEL-7B-MoT \\
    --train_file=pairs/train.jsonl --validation_file=pairs/held_out.jsonl
"""
DEFAULTS = {"triples": 30_000, "validation": 3000, "groups": 64, "seed": 0}
# What the stages of a workdir depend on, with its kind.
SAME = dict.fromkeys(("triples", "validation", "groups", "vit_max", "seed"), int) | {
  "question": str, "train_file": files.path, "validation_file": files.path,
}
TEMPERATURE = "temperature.json"  # what calibrate writes
COMPARED = 96  # number of pictures whose scores as floats and as uint8 are compared


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.reward_model", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
  )
  add = parser.add_argument
  add("stage", nargs="?", default=ALL, metavar="STAGE",
      help=f"one of {', '.join(STAGES)}, or {ALL} (default: %(default)s)")
  add("--workdir", type=files.local_path, required=True,
      help="folder of the stages; the same command resumes from it")
  add("--out", type=files.local_path,
      help="folder of the reward model, which the stage measure writes")
  add("--config", default="configs/sft.py:tiny_reward_model", metavar="FILE:VARIANT",
      help="config of the training (default: %(default)s)")
  begun = "that of the workdir's stages"
  add("--triples", type=int,
      help=f"IconWorld: triples to train on (default: {begun}, or {DEFAULTS['triples']})")
  add("--validation", type=int, help="IconWorld: triples to calibrate on and to measure "
      f"(default: {begun}, or {DEFAULTS['validation']})")
  add("--groups", type=int, help="IconWorld: prompts whose pictures are compared with each other "
      f"(default: {begun}, or {DEFAULTS['groups']})")
  add("--train_file", type=files.path, metavar="FILE",
      help="JSON lines to train on in place of IconWorld; see docs/reward_model.md")
  add("--validation_file", type=files.path, metavar="FILE", help="the same, to measure on")
  add("--question", help="what the model is asked, with {prompt} in it (default: one for "
      "IconWorld, another for models of the released size)")
  add("--vit_max", type=int,
      help="longest side of the picture that the ViT sees, pixels (default: the checkpoint's)")
  add("--seed", type=int, help=f"seed of IconWorld's triples (default: {begun}, or "
      f"{DEFAULTS['seed']})")
  args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  errors.choose("STAGE", args.stage, (*STAGES, ALL))
  if args.stage in (ALL, "measure") and args.out is None:
    raise errors.InputError("--out is missing: the folder of the reward model that measure writes")
  for name in ("triples", "validation"):
    errors.require(f"--{name}", getattr(args, name), low=len(making.SPLITS) * 100)
  errors.require("--groups", args.groups, low=0)
  errors.require("--seed", args.seed, **errors.SEED)
  if (args.train_file is None) != (args.validation_file is None):
    raise errors.InputError("give both of --train_file and --validation_file, or none")
  args.workdir = args.workdir.resolve()
  with hosts.hold(args.workdir, "--workdir"):
    Stages(args, overrides).run()


class Stages:
  """The stages of one workdir; see the module's docstring."""

  def __init__(self, args: argparse.Namespace, overrides: Sequence[str]):
    """Checks the arguments.

    Raises:
      InputError: they are impossible, or differ from those that the workdir was begun with.
    """
    self._args, self._workdir = args, args.workdir
    self._config = config_files.load(args.config, overrides)
    self._take_recorded()
    self._iconworld = args.train_file is None
    if not args.question:
      args.question = learned.TINY_QUESTION if self._iconworld else learned.QUESTION
    self._question = args.question
    learned.check_question(self._question)
    self._trained = self._workdir / "trained"
    if not self._config.init_from:
      raise errors.InputError("--config.init_from is empty; give the BAGEL to train")
    self._check_same()

  def _take_recorded(self) -> None:
    """Gives the arguments that were left out what the workdir was begun with, or else DEFAULTS."""
    self._record = self._workdir / "reward_model.json"
    self._before: dict[str, str] = {}
    if self._record.exists():
      self._before = config_lib.read_json(self._record)
    for name, kind in SAME.items():
      if getattr(self._args, name) is None:
        recorded = self._before.get(name, "None")
        value = DEFAULTS.get(name) if recorded == "None" else kind(recorded)
        setattr(self._args, name, value)

  def _check_same(self) -> None:
    """Raises InputError where what the stages depend on has changed."""
    self._now = {"init_from": self._config.init_from} | {
      name: str(getattr(self._args, name)) for name in SAME
    }
    for name, value in self._now.items() if self._before else ():
      if value != self._before.get(name):
        raise errors.InputError(
          f"{name}={value} but the stages in {self._workdir} have {self._before.get(name)}; give "
          "it back its value, or choose a new --workdir"
        )

  def run(self) -> None:
    """Runs the requested stages, until a signal stops one of them."""
    stages = STAGES if self._args.stage == ALL else (self._args.stage,)
    if not self._before and ("make" in stages or (not self._iconworld and "train" in stages)):
      for path in () if self._iconworld else (self._args.train_file, self._args.validation_file):
        triples_lib.read_lines(path, self._question, 0)  # One that cannot be read begins nothing.
      run_lib.check_workdir(self._workdir)
      self._workdir.mkdir(parents=True, exist_ok=True)
      run_lib.write_json(self._record, self._now)
    for stage in stages:
      print(f"{stage}:", flush=True)
      if getattr(self, f"_{stage}")() is False:
        return  # A signal stopped it.

  def _triples(self, split: str) -> triples_lib.Triples:
    """IconWorld's triples of a split; made if they do not exist yet."""
    args, validation = self._args, split == "validation"
    return making.make(
      self._workdir, self._config.init_from, split,
      count=args.validation if validation else args.triples,
      group_prompts=args.groups if validation else 0, seed=args.seed,
    )

  def _make(self) -> None:
    if not self._iconworld:
      for path in (self._args.train_file, self._args.validation_file):
        _, count = triples_lib.read_lines(path, self._question, 0)
        print(f"{path}: {count} answers")
      triples_lib.load_lines(self._args.validation_file)  # refused now, not after the training
      return
    for split in ("validation", "train"):
      triples = self._triples(split)
      cells = triples.balance()
      shares = [yes / count for (source, _), (count, yes) in cells.items() if source != "group"]
      print(
        f"{split}: {len(triples)} triples of {len(triples.pixels)} pictures, "
        f"{min(shares):.2f} to {max(shares):.2f} yes in each cell of source and category",
        flush=True,
      )

  def _train(self) -> bool:
    if self._trained.exists():
      if (steps := self._steps()) != self._config.steps:
        raise errors.InputError(
          f"config.steps={self._config.steps} but {self._trained} took {steps}; leave it out, or "
          f"choose a new --workdir, which may go on with --config.init_from={self._trained}"
        )
      print(f"{self._trained} is there already")
      return True
    config = self._config.copy_and_resolve_references()
    config.export_to = str(self._trained)
    if self._iconworld:
      triples = triples_lib.Triples.load(making.path_of(self._workdir, "train"))
      examples = triples_lib.learnt(triples, self._question, config.seed)
      contents = making.path_of(self._workdir, "train").read_bytes()
    else:
      examples, _ = triples_lib.read_lines(self._args.train_file, self._question, config.seed)
      contents = self._args.train_file.read_bytes()
    pinned = {"triples": hashlib.blake2b(contents, digest_size=8).hexdigest()}
    training.train(
      config, self._workdir / "training", examples, vit_max=self._args.vit_max, pinned=pinned
    )
    return self._trained.exists()

  def _steps(self) -> int:
    """How many steps the trained network took."""
    return int(config_lib.read_json(self._workdir / "training" / "config.json")["steps"])

  def _calibrated(self) -> tuple[Any, Any, triples_lib.Triples, dict[str, np.ndarray]]:
    """(trained model at the fitted temperature, its parameters, validation triples,
    `measuring.ask` of them)."""
    if not self._trained.exists():
      raise errors.InputError(
        f"{self._trained}: there is no trained network; run the stage train first, with the same "
        "--workdir"
      )
    model, params = measuring.open_trained(
      self._trained, question=self._question, vit_max=self._args.vit_max,
      prompt_form="plain" if self._iconworld else "prompt",
    )
    if self._iconworld:
      triples = triples_lib.Triples.load(making.path_of(self._workdir, "validation"))
    else:
      triples = triples_lib.load_lines(self._args.validation_file)
    found = measuring.ask(model, params, triples, self._workdir / "asked.npz")
    model = dataclasses.replace(model, tau=measuring.temperature(triples, found))
    run_lib.write_json(self._workdir / TEMPERATURE, {"tau": model.tau})
    return model, params, triples, found

  def _calibrate(self) -> None:
    model, *_ = self._calibrated()
    print(f"tau = {model.tau:.4f}")

  def _measure(self) -> None:
    record = self._workdir / TEMPERATURE
    if not record.exists():
      raise errors.InputError(
        f"{record}: there is no temperature; run the stage calibrate first, with the same --workdir"
      )
    model, params, triples, found = self._calibrated()  # The triples may have changed since.
    measured = measuring.measure(triples, found, model.tau)
    measured["steps"] = self._steps()
    if self._iconworld:
      rows = np.flatnonzero(triples.source == "render")[:COMPARED]
      decoded = pictures.Painter(self._config.init_from).decoded(
        triples.pixels[triples.image[rows]], (self._args.seed,)
      )
      measured["float_uint8"] = measuring.float_uint8(
        model, params, decoded, triples.prompt[rows].tolist()
      )
      measured["ascent"] = measuring.ascent(model, params, self._args.seed)
    text = measuring.page(measured)
    atomic.write_text(self._workdir / "page.md", text)
    print(text)
    measuring.write_folder(self._trained, self._args.out, model, measured)
    print(f"wrote {self._args.out}")
    measuring.check_gates(measured)
