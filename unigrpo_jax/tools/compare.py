"""Trains several methods from the same checkpoint and compares them: one table.

  python -m unigrpo_jax.compare --workdir=runs/compare

Every method and seed is a run of `unigrpo_jax.train` in a folder of its own, with the same prompts,
rollouts and steps. An interrupted run is resumed; a finished one is only read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, files, locks
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.runtime import folders, metrics, resumption, run

REWARDS = ("reward", "iconworld_strict", "iconworld_soft", "iconworld_reasoning")
# {"eval/<mode>/<reward>": mean}, before and after a run.
Outcome = dict[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Method:
  """What is compared."""

  config: str  # name of its config file
  variant: str  # of that, besides those that all methods share; "" for none
  mode: str  # of the evaluation that the method is judged by


METHODS = {
  "UniGRPO": Method("unigrpo", "", "think"),
  "TextGRPO": Method("text_grpo", "", "think"),
  "FlowGRPO with thinking": Method("flow_grpo", "", "think"),
  "FlowGRPO": Method("flow_grpo", "no_think", "plain"),
}


@dataclasses.dataclass(frozen=True)
class Training:
  """The run of one method with one seed."""

  name: str  # "METHOD, seed SEED"
  mode: str  # of the evaluation that it is judged by
  folder: pathlib.Path  # its workdir
  steps: int
  arguments: Sequence[str]  # of `unigrpo_jax.train`

  def outcome(self) -> Outcome | None:
    """{"before", "after": metrics of the evaluation}; None while the run is not finished."""
    log = self.folder / "metrics.jsonl"
    rows = metrics.by_step(metrics.read(log)[0]) if log.exists() else {}
    evaluated = [step for step, row in rows.items() if f"eval/{self.mode}/reward" in row]
    if self.steps not in evaluated:
      return None
    return {"before": rows[min(evaluated)], "after": rows[self.steps]}


def prepare(
  method: str, seed: int, workdir: pathlib.Path, variants: str, overrides: Sequence[str]
) -> Training:
  """The run of a method with a seed, in or from its folder.

  Raises:
    InputError: the config is impossible or does not evaluate the method, or the folder has a run of
      another configuration.
  """
  m = METHODS[method]
  variants = ",".join(filter(None, (variants, m.variant)))
  file = f"{config_files.FOLDER / m.config}.py{':' * bool(variants)}{variants}"
  overrides = [*overrides, f"--config.seed={seed}"]
  spec = rl.read(config_files.load(file, overrides))
  every, modes = spec.evaluation.every, tuple(spec.evaluation.modes)
  if not every or m.mode not in modes:
    raise errors.InputError(
      f"config.eval.every={every}, config.eval.modes={modes}: {method} is compared by its "
      f"evaluations with mode {m.mode}; make the run evaluate it"
    )
  folder = workdir / f"{m.config}{'_' * bool(m.variant)}{m.variant}_{seed}"
  record = folder / "config.json"
  if record.exists():
    # A finished run is not trained again, so it must have been trained with this configuration.
    before, now = config_lib.read_json(record), spec.run.config
    mutable = resumption.mutable_keys(before, now, spec.run.mutable_keys - {"eval"})
    with errors.at(str(folder)):
      moved = _moved(before, spec, folder / "run.json")
      resumption.check(before, now, mutable - {"learning_rate"} | moved, spec.run.defaults)
  return Training(
    f"{method}, seed {seed}", m.mode, folder, spec.run.steps,
    (f"--config={file}", f"--workdir={folder}", *overrides),
  )


def _moved(before: Mapping[str, Any], spec: rl.Spec, record: pathlib.Path) -> set[str]:
  """What lies elsewhere than before the run, and is the same by its contents."""
  pinned = config_lib.read_json(record).get("pinned", {}) if record.exists() else {}
  fingerprints = {
    "init_from": lambda: folders.open_folder(spec.network.init_from).fingerprint(),
    "prompts": lambda: prompts_lib.open_set(spec.prompts.source, spec.prompts.split).fingerprint(),
  }
  return {
    name for name, fingerprint in fingerprints.items()
    if before.get(name) != spec.run.config[name] and pinned.get(name) == fingerprint()
  }


def train(training: Training, cache: pathlib.Path) -> Outcome:
  """Trains in a process of its own, and returns the outcome.

  A signal is passed on to it, so that it saves itself; this process then exits, as it does when the
  training fails, with a line. `cache` is the folder of compiled programs, which all runs share.
  """
  print(f"== {training.name}", flush=True)
  command = [sys.executable, "-m", "unigrpo_jax.train", *training.arguments]
  stopped = False
  with subprocess.Popen(
    command, env={"JAX_COMPILATION_CACHE_DIR": str(cache)} | os.environ
  ) as process:

    def stop(*_) -> None:
      nonlocal stopped
      stopped = True
      process.terminate()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      status = process.wait()
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
  outcome = training.outcome()
  if stopped or (outcome is None and status == 0):
    print(f"stopped in {training.name}; run the same command again to continue", file=sys.stderr)
    sys.exit(130)
  if outcome is None or status:
    print(f"error: {training.name}: training ended with status {status}", file=sys.stderr)
    sys.exit(status if status > 0 else 1)
  return outcome


def table(outcomes: Mapping[str, Mapping[int, Outcome]]) -> str:
  """Markdown of {method: {seed: outcome}}: a line a method, means over seeds, each seed's gain."""
  lines = [
    "| method | mode | " + " | ".join(REWARDS) + " | gain in reward, by seed |",
    "|" + " --- |" * (len(REWARDS) + 3),
  ]
  first = [outcome["before"] for seeds in outcomes.values() for outcome in seeds.values()]
  for mode in ("think", "plain"):
    cells = [_mean(first, mode, reward) for reward in REWARDS]
    lines.append(f"| SFT | {mode} | " + " | ".join(cells) + " | |")
  for method, seeds in outcomes.items():
    mode = METHODS[method].mode
    last = [outcome["after"] for outcome in seeds.values()]
    cells = [_mean(last, mode, reward) for reward in REWARDS]
    key = f"eval/{mode}/reward"
    gains = [outcome["after"][key] - outcome["before"][key] for outcome in seeds.values()]
    shown = ", ".join(f"{gain:+.3f}" for gain in gains)
    lines.append(f"| {method} | {mode} | " + " | ".join(cells) + f" | {shown} |")
  return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Mapping[str, float]], mode: str, reward: str) -> str:
  values = [row[f"eval/{mode}/{reward}"] for row in rows if f"eval/{mode}/{reward}" in row]
  return f"{np.mean(values):.3f}" if values else ""


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.compare", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="--config.KEY=VALUE changes a key of every method's config.",
  )
  add = parser.add_argument
  add("--workdir", type=files.local_path, required=True,
      help="folder of the runs and of results.md")
  add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
      help=f"of {', '.join(METHODS)} (default: all)")
  add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of each method (default: 0 1 2)")
  add("--variants", default="tiny", help="of the configs (default: %(default)s)")
  args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  for seed in args.seeds:
    errors.require("--seeds", seed, **errors.SEED)
  # All of them, so that a mistake in the last one is found before the first is trained.
  trainings = {
    (method, seed): prepare(method, seed, args.workdir, args.variants, overrides)
    for seed in args.seeds for method in args.methods
  }
  run.check_workdir(args.workdir)
  # Not `hosts.hold`, which would take the devices that the trainings need.
  with locks.hold(locks.inside(args.workdir), f"--workdir={args.workdir}"):
    outcomes: dict[str, dict[int, Outcome]] = {}
    missing = [training for training in trainings.values() if training.outcome() is None]
    start = time.monotonic()
    for (method, seed), training in trainings.items():
      outcome = training.outcome()
      if outcome is None:
        done, left = missing.index(training), "they train one after the other"
        if done:
          minutes = (time.monotonic() - start) / 60 / done * (len(missing) - done)
          left = f"{minutes:.0f} min left"
        print(f"training {done + 1} of {len(missing)}, {left}", flush=True)
        outcome = train(training, args.workdir / "compiled")
      outcomes.setdefault(method, {})[seed] = outcome
      # After every run, so that the table of an interrupted comparison can be read.
      text = table(outcomes)
      atomic.write_text(args.workdir / "results.md", text)
      atomic.write_text(args.workdir / "results.json", json.dumps(outcomes, indent=1))
    print(text)
