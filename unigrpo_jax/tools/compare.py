"""Trains several methods from the same checkpoint and compares them: one table.

  python -m unigrpo_jax.compare --workdir=runs/compare

Every method and seed is a run of `unigrpo_jax.train` in a folder of its own, with the same prompts,
rollouts and steps; a run that is interrupted goes on, one that is finished is only read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from unigrpo_jax import errors

# Name -> (config file, variants, the evaluation mode that the method is made for).
METHODS = {
  "UniGRPO": ("unigrpo", "", "think"),
  "TextGRPO": ("text_grpo", "", "think"),
  "FlowGRPO with thinking": ("flow_grpo", "", "think"),
  "FlowGRPO": ("flow_grpo", "no_think", "plain"),
}
REWARDS = ("reward", "iconworld_strict", "iconworld_soft", "iconworld_reasoning")


def run(
  method: str, seed: int, workdir: pathlib.Path, variants: str, overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Trains one method with one seed, or reads what it gave.

  Returns:
    {"before", "after": {"eval/<mode>/<reward>": mean}}.

  Raises:
    InputError: the folder's run is of another configuration, or is not evaluated.
  """
  from unigrpo_jax import train
  from unigrpo_jax.recipe import config_files, recipe
  from unigrpo_jax.runtime import metrics, resumption

  name, own, mode = METHODS[method]
  config = config_files.load(name, ",".join(filter(None, (variants, own))), overrides)
  config.seed = seed
  if not config.eval.every or mode not in config.eval.modes:
    raise errors.InputError(
      f"config.eval.every={config.eval.every}, config.eval.modes={tuple(config.eval.modes)}: "
      f"{method} is compared by its evaluations with mode {mode}; ask for them"
    )
  folder = workdir / f"{name}{'_' + own if own else ''}_{seed}"
  log, before = folder / "metrics.jsonl", folder / "config.json"
  if before.exists():
    # What is finished is not trained again, so it must have been trained like this.
    old, new = json.loads(before.read_text()), json.loads(config.to_json())
    free = train.RESUMABLE - {"eval"} | recipe.transport(config)
    with errors.at(str(folder)):
      resumption.check(old, new, resumption.may_change(old, new, free) - {"learning_rate"})
  rows = {row["step"]: row for row in metrics.read(log)[0]} if log.exists() else {}
  if config.steps not in rows:
    print(f"== {method}, seed {seed}", flush=True)
    train.train(config, folder)
    rows = {row["step"]: row for row in metrics.read(log)[0]}
  if config.steps not in rows:
    raise KeyboardInterrupt  # It was stopped by a signal.
  return {"before": rows[0], "after": rows[config.steps]}


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
  """Markdown: a line a method, means over seeds and each seed's own.

  Args:
    found: method -> seed -> what `run` returns.
  """
  lines = [
    "| method | mode | " + " | ".join(REWARDS) + " | gain in reward, by seed |",
    "|" + " --- |" * (len(REWARDS) + 3),
  ]
  start = [numbers["before"] for seeds in found.values() for numbers in seeds.values()]
  for mode in ("think", "plain"):
    cells = [_mean(start, mode, reward) for reward in REWARDS]
    lines.append(f"| SFT | {mode} | " + " | ".join(cells) + " | |")
  for method, seeds in found.items():
    mode = METHODS[method][2]
    cells = [_mean([n["after"] for n in seeds.values()], mode, reward) for reward in REWARDS]
    key = f"eval/{mode}/reward"
    gains = [n["after"][key] - n["before"][key] for n in seeds.values()]
    shown = ", ".join(f"{gain:+.3f}" for gain in gains)
    lines.append(f"| {method} | {mode} | " + " | ".join(cells) + f" | {shown} |")
  return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, Any]], mode: str, reward: str) -> str:
  values = [row[f"eval/{mode}/{reward}"] for row in rows if f"eval/{mode}/{reward}" in row]
  return f"{np.mean(values):.3f}" if values else ""


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.compare", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", type=pathlib.Path, required=True, help="folder of the runs and of results.md")
  add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
      help=f"of {', '.join(METHODS)} (default: all)")
  add("--seeds", nargs="*", type=int, default=[0, 1, 2], help="default: 0 1 2")
  add("--variants", default="tiny", help="of the configs (default: %(default)s)")
  add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every config")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  import jax

  jax.config.update("jax_compilation_cache_dir", str(args.workdir / "compiled"))
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for seed in args.seeds:
    for method in args.methods:
      result = run(method, seed, args.workdir, args.variants, args.set)
      found.setdefault(method, {})[seed] = result
      # After every run, so that an interrupted comparison can be read.
      text = table(found)
      (args.workdir / "results.md").write_text(text, encoding="utf-8")
      (args.workdir / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
  print(text)
