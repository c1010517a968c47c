"""The training runs of a comparison: their configs, whether they are done, and what they logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.runtime import folders, metrics, resumption
from unigrpo_jax.tools.compare import methods

LAST, BEST = "last", "best"


@dataclasses.dataclass(frozen=True)
class Training:
  """The run of one method with one seed.

  Attributes:
    name: "METHOD, seed SEED".
    method: a key of `methods.ALL`.
    seed: of the run.
    rate: the sweep's factor of the learning rates.
    folder: its workdir.
    steps: number of iterations.
    mode: of its validation, which decides the best checkpoint.
    arguments: of `unigrpo_jax.train`.
    settings: its config as plain values.
  """

  name: str
  method: str
  seed: int
  rate: float
  folder: pathlib.Path
  steps: int
  mode: str
  arguments: Sequence[str]
  settings: Mapping[str, Any]

  def rows(self) -> dict[int, dict[str, float]]:
    """{step: metrics} of its log so far; {} before it begins."""
    log = self.folder / "metrics.jsonl"
    return metrics.by_step(metrics.read(log)[0]) if log.exists() else {}

  def validation(self) -> dict[int, float]:
    """{step: mean reward of the validation prompts in `mode`} so far."""
    key = f"eval/{self.mode}/reward"
    return {step: row[key] for step, row in self.rows().items() if key in row}

  def is_done(self) -> bool:
    """Whether its last iteration is both validated and saved."""
    return self.steps in self.validation() and self.steps in self._saved()

  def _saved(self) -> set[int]:
    """Steps of the checkpoints."""
    places = (self.folder / "checkpoints").glob("*")
    return {int(place.name) for place in places if place.name.isdecimal()}

  def step(self, which: str) -> int:
    """The step of the checkpoint `which`, LAST or BEST (the highest reward on validation)."""
    if which == LAST:
      return self.steps
    saved, validation = self._saved(), self.validation()
    scored = {
      step: validation[step] for step in saved if math.isfinite(validation.get(step, math.nan))
    }
    return max(scored, key=lambda step: (scored[step], step), default=self.steps)

  def config_hash(self) -> str:
    """A hash of its config, 16 hexadecimal digits."""
    config = config_lib.read_json(self.folder / "config.json")
    text = json.dumps(config, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()

  def command(self) -> list[str]:
    """The command that trains it, or continues its training."""
    return [sys.executable, "-m", "unigrpo_jax.train", *self.arguments]


def prepare(
  method: str, seed: int, *, folder: pathlib.Path, init_from: str, variants: str,
  shared: Sequence[str], overrides: Sequence[str] = (), rate: float = 1.0,
) -> Training:
  """Describes the run of a method with a seed; it may have begun already.

  Args:
    method: a key of `methods.ALL`.
    seed: of prompts, samples and windows.
    folder: its workdir.
    init_from: folder of the checkpoint that it starts from.
    variants: of its config; the method's own are added.
    shared: `--config.KEY=VALUE` of all methods; the method's own come after these.
    overrides: those of the user, which come last.
    rate: factor of the learning rates.

  Raises:
    InputError: the config is impossible or does not evaluate the method's mode, or the folder holds
      a run of another config.
  """
  m = methods.ALL[method]
  variants = ",".join(filter(None, (variants, *m.variants)))
  file = f"{config_files.FOLDER / m.config}.py{':' * bool(variants)}{variants}"
  ours = [*shared, f"--config.init_from={init_from}", f"--config.eval.modes={m.modes}"]
  given = [*ours, *m.overrides, *overrides, f"--config.seed={seed}"]
  config = config_files.load(file, given)
  errors.require("config.steps", config.steps, low=1, integer=True)
  steps = max(round(config.steps * m.share), 1)
  given.append(f"--config.steps={steps}")
  if rate * m.rate != 1:
    given += [
      f"--config.learning_rate.{group}={value * rate * m.rate:.6g}"
      for group, value in config.learning_rate.items() if value
    ]
  spec = rl.read(config_files.load(file, given))
  every, modes = spec.evaluation.every, tuple(spec.evaluation.modes)
  if not every or modes[:1] != m.modes[:1]:
    raise errors.InputError(
      f"config.eval.every={every}, config.eval.modes={modes}: {method} is compared by its "
      f"evaluations with mode {m.modes[0]}; make the run evaluate it, and first"
    )
  _check_same(folder, spec)
  return Training(
    f"{method}, seed {seed}", method, seed, rate, folder, spec.run.steps, m.modes[0],
    (f"--config={file}", f"--workdir={folder}", *given), spec.run.config,
  )


def _check_same(folder: pathlib.Path, spec: rl.Spec) -> None:
  """Raises InputError if the folder holds a run with another config.

  A finished run is not trained again, so `train` itself would never notice.
  """
  record = folder / "config.json"
  if record.exists():
    before, now = config_lib.read_json(record), spec.run.config
    mutable = resumption.mutable_keys(before, now, spec.run.mutable_keys - {"eval"})
    with errors.at(str(folder)):
      moved = _moved(before, spec, folder / "run.json")
      resumption.check(before, now, mutable - {"learning_rate"} | moved, spec.run.defaults)


def _moved(before: Mapping[str, Any], spec: rl.Spec, record: pathlib.Path) -> set[str]:
  """Keys of the config whose paths have changed since, but whose contents are the same."""
  pinned = config_lib.read_json(record).get("pinned", {}) if record.exists() else {}
  fingerprints: dict[str, Callable[[], str]] = {
    "init_from": lambda: fingerprint(spec.network.init_from),
    "prompts": lambda: prompts_lib.open_set(
      spec.prompts.source, spec.prompts.split
    ).without_tags(spec.prompts.held_out_tags).fingerprint(),
  }
  return {
    name for name, made in fingerprints.items()
    if before.get(name) != spec.run.config[name] and pinned.get(name) == made()
  }


@functools.lru_cache(maxsize=512)
def fingerprint(folder: str) -> str:
  """Fingerprint of the weights in a model's folder."""
  return folders.open_folder(folder).fingerprint()
