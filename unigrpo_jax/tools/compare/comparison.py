"""A comparison in its folder: the jobs that are left, and the record of those that are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
import math
import pathlib
import sys
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import evaluation, measured
from unigrpo_jax.data import atomic, files, tokenizer
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import folders
from unigrpo_jax.tools.compare import (
  curves,
  divergence,
  figures,
  measure,
  methods,
  processes,
  rewards,
  runs,
  scores,
  tables,
)

FACTORS = (1 / 3, 1.0, 3.0)  # of the learning rates in a sweep
# Validation of IconWorld's runs, which chooses their best checkpoint.
VALIDATION = ("--config.eval.every=8", "--config.eval.prompts=100")
# Expected seconds on one idle core, to estimate the time that is left: of an iteration of 192
# trajectories and of an image of an evaluation, {thinking: seconds}; and a factor for guidance.
ITERATION, IMAGE, GUIDANCE = {False: 5.5, True: 8.2}, {False: 0.034, True: 0.055}, 1.5
PROCESS, MEASURE = 50.0, 60.0  # start and compilation of a process; image statistics of a run
SHEET, SHEETS = 6, (2, 6, 7, 8)  # prompts per sheet of samples, and the figures' numbers


class Comparison:
  """The comparison of `command`: methods x seeds, each trained, exported and evaluated.

  All state is in the workdir's files. `jobs` compares them with what is wanted, and `record` reads
  the finished ones.

  Attributes:
    failed: {job: why it failed}.
  """

  def __init__(
    self, workdir: pathlib.Path, *, names: Sequence[str], seeds: Sequence[int], variants: str,
    start: str, bagel: str, sweep: bool, benchmark: scores.Benchmark, overrides: Sequence[str],
  ):
    """Checks nothing yet; see `check`.

    Args:
      workdir: folder of everything.
      names: of the methods; the methods that they start from are added.
      seeds: of the runs of each method.
      variants: of all configs.
      start: folder of the checkpoint that all methods start from.
      bagel: folder of the model before supervised training; "": it is not evaluated.
      sweep: whether to choose each method's learning rates first, by the first seed.
      benchmark: how checkpoints are evaluated.
      overrides: the user's `--config.KEY=VALUE`.
    """
    self.failed: dict[str, str] = {}
    self._workdir, self._names, self._seeds = workdir, methods.with_starts(names), list(seeds)
    self._variants, self._start, self._bagel = variants, start, bagel
    self._sweep, self._benchmark, self._overrides = sweep, benchmark, list(overrides)
    extras = [name for name in names if name in methods.EXTRAS]
    self._rows = [*methods.ROWS, *methods.extra_rows(extras)]
    self._made = functools.lru_cache(maxsize=None)(self._make_training)

  def check(self) -> None:
    """Checks all runs before the first one begins.

    Raises:
      InputError: a config is impossible, a folder holds a run of another config, or the folder of a
        model or of the learned reward is missing.
    """
    for flag, folder in (("--start", self._start), ("--bagel", self._bagel)):
      if folder:
        with errors.at(f"{flag}={folder}"):
          runs.fingerprint(folder)
    rewards.check(self._benchmark.reward_model, self._names)
    for name in self._names:
      for seed in self._seeds:
        self._prepare(name, seed, 1.0)
      for rate in FACTORS if self._sweep else ():
        self._prepare(name, self._seeds[0], rate)

  # --- What there is to do.

  def jobs(self) -> list[processes.Job]:
    """All jobs that are not done, in the order in which they should begin."""
    return [
      *self._evaluations_without_training(),
      *(job for name in self._names for job in self._sweep_jobs(name)),
      *(job for seed in self._seeds for name in self._names for job in self._jobs_of(name, seed)),
    ]

  def _prepare(self, name: str, seed: int, rate: float) -> runs.Training:
    """The run of a method with a seed and a factor `rate` of the learning rates."""
    init_from, start = self._start, methods.ALL[name].start
    if start:
      init_from = str(self._model(self._tag(start, seed, self.chosen(start) or 1.0), runs.LAST))
    return self._made(name, seed, rate, init_from)

  def _make_training(self, name: str, seed: int, rate: float, init_from: str) -> runs.Training:
    return runs.prepare(
      name, seed, folder=self._workdir / "runs" / self._tag(name, seed, rate),
      init_from=init_from, variants=self._variants,
      shared=[*(VALIDATION if "tiny" in self._variants.split(",") else ()),
              *rewards.overrides(self._benchmark.reward_model)],
      overrides=self._overrides, rate=rate,
    )

  def training(self, name: str, seed: int) -> runs.Training | None:
    """The run of a method with a seed; None until the sweep has chosen its learning rates."""
    rate = self.chosen(name)
    return None if rate is None else self._prepare(name, seed, rate)

  def chosen(self, name: str) -> float | None:
    """The chosen factor of a method's learning rates; None until its sweep is finished."""
    if not self._sweep:
      return 1.0
    found = self._swept(name)
    if len(found) < len(FACTORS) or max(found.values()) == -math.inf:
      return None
    return max(found, key=found.get)

  def _swept(self, name: str) -> dict[float, float]:
    """{factor: reward on validation after the last iteration} of the sweep's finished runs.

    It is -inf where a run ended with numbers that are not finite.
    """
    start = methods.ALL[name].start
    if start and self.chosen(start) is None:
      return {}
    made = {}
    for rate in FACTORS:
      training = self._prepare(name, self._seeds[0], rate)
      if training.is_done():
        made[rate] = training.validation()[training.steps]
      elif divergence.NOT_FINITE in self.failed.get(self._sweep_name(training, rate), ""):
        made[rate] = -math.inf
    return made

  @staticmethod
  def _sweep_name(training: runs.Training, rate: float) -> str:
    return f"{training.name}, learning rates x {rate:.3g}"

  def _sweep_jobs(self, name: str) -> Iterator[processes.Job]:
    """The unfinished trainings of a method's sweep; none while its start's sweep goes on."""
    start = methods.ALL[name].start
    if not self._sweep or self.chosen(name) is not None:
      return
    for rate in FACTORS if not start or self.chosen(start) is not None else ():
      training = self._prepare(name, self._seeds[0], rate)
      if not training.is_done():
        yield self._train_job(training, self._sweep_name(training, rate))

  def _jobs_of(self, name: str, seed: int) -> Iterator[processes.Job]:
    """What is left to do for a method and a seed: its training, or what follows it."""
    training = self.training(name, seed)
    if training is None:
      if seed != self._seeds[0]:  # The sweep itself trains the first seed.
        yield self._wait(f"{name}, seed {seed}", self._prepare(name, self._seeds[0], 1.0))
      return
    if not training.is_done():
      yield self._train_job(training, training.name)
      return
    modes = methods.evaluated_modes(name, self._rows)
    if name in figures.REGULARISERS.values() and not (training.folder / measure.FILE).exists():
      command = [sys.executable, "-m", measure.__name__, str(training.folder)]
      yield self._job(f"{training.name}: image statistics", [command], MEASURE)
    for which in (runs.LAST, runs.BEST):
      tag, model = training.folder.name, self._model(training.folder.name, which)
      if which == runs.BEST and training.step(which) == training.step(runs.LAST):
        continue
      commands = []
      if not folders.is_folder(model):
        commands.append([
          sys.executable, "-m", "unigrpo_jax.export", str(training.folder), str(model),
          f"--step={training.step(which)}", "--dtype=float32",
        ])
      out = self._evaluation(f"{tag}_{which}")
      if modes and not scores.read(out):
        commands.append(self._benchmark.command(str(model), modes, out))
      if commands:
        yield self._job(f"{training.name}: {which} checkpoint", commands, self._cost(modes))

  def _evaluations_without_training(self) -> Iterator[processes.Job]:
    """Evaluations of the start and of the model before it."""
    for name, folder in ((methods.SFT, self._start), (methods.BAGEL, self._bagel)):
      out, modes = self._evaluation(name.lower()), methods.evaluated_modes(name, self._rows)
      if folder and not scores.read(out):
        command = self._benchmark.command(folder, modes, out, points=name == methods.SFT)
        yield self._job(name, [command], self._cost(modes))

  def _train_job(self, training: runs.Training, name: str) -> processes.Job:
    """A training; ready once the checkpoint that it starts from is exported."""
    start = methods.ALL[training.method].start
    ready = True
    if start:
      before = self.training(start, training.seed)
      ready = before is not None and folders.is_folder(self._model(before.folder.name, runs.LAST))
    return self._job(name, [training.command()], _training_cost(training), ready)

  def _wait(self, name: str, like: runs.Training) -> processes.Job:
    """A placeholder for a training that waits for the sweep; it counts in the time that is left."""
    return self._job(name, [], _training_cost(like), ready=False)

  def _job(self, name: str, commands, cost: float, ready: bool = True) -> processes.Job:
    log = self._workdir / "logs" / f"{methods.slug(name)}.log"
    return processes.Job(name, commands, log, cost, ready)

  def _cost(self, modes: Sequence[str]) -> float:
    """Expected seconds of an evaluation in these modes."""
    images = self._benchmark.prompts * self._benchmark.images
    return PROCESS + images * sum(
      IMAGE["think" in mode] * (GUIDANCE if "guidance" in mode else 1.0) for mode in modes
    )

  def _tag(self, name: str, seed: int, rate: float) -> str:
    """The name of a run's folder."""
    return f"{methods.slug(name)}_{seed}" + (f"_x{rate:.3g}" if rate != 1 else "")

  def _model(self, tag: str, which: str) -> pathlib.Path:
    return self._workdir / "models" / f"{tag}_{which}"

  def _evaluation(self, tag: str) -> pathlib.Path:
    return self._workdir / "evaluations" / f"{tag}_{self._benchmark.name}"

  # --- What the finished parts say.

  def write(self) -> str:
    """Writes results.json, results.md and curves.json; returns the tables as Markdown."""
    record = measured.plain(self.record())
    text = tables.text(record)
    with errors.storage(self._workdir):
      files.path(self._workdir).mkdir(parents=True, exist_ok=True)
      atomic.write_text(self._workdir / "results.json", measured.to_json(record))
      atomic.write_text(self._workdir / "results.md", text)
      logged = curves.record(self._trainings())
      atomic.write_text(self._workdir / "curves.json", measured.to_json(logged))
    return text

  def draw(self) -> list[pathlib.Path]:
    """Draws the figures for which there are data; returns their files."""
    logged, place = self._comparable_curves(), self._workdir / "figures"
    charts = {
      "figure3": figures.learning(logged), "figure4": figures.guidance(logged),
      "figure5": figures.regularisers(logged, self._statistics()),
      "hacking": figures.hacking(logged),
    }
    columns = self._samples()
    prompts = list(dict.fromkeys(prompt for of in columns.values() for prompt in of))
    for number, figure in enumerate(SHEETS):
      part = prompts[number * SHEET : (number + 1) * SHEET]
      charts[f"figure{figure}"] = figures.sheet(columns, part)
    paths = {name: place / f"{name}.png" for name in charts}
    return [paths[name] for name, chart in charts.items() if figures.write(chart, paths[name])]

  def _comparable_curves(self) -> dict[str, dict[str, Any]]:
    """`curves.record` without unfinished seeds, where another seed of the method is finished.

    Otherwise the mean over seeds would end where the shortest one does.
    """
    return curves.record({
      name: [run for run in of if run.is_done()] or of for name, of in self._trainings().items()
    })

  def _statistics(self) -> dict[str, Any]:
    """{method: {seed: what `measure` wrote}}."""
    return {
      name: {str(run.seed): config_lib.read_json(run.folder / measure.FILE)
             for run in of if (run.folder / measure.FILE).exists()}
      for name, of in self._trainings().items()
    }

  def _samples(self) -> dict[str, dict[str, tuple[pathlib.Path, str]]]:
    """{row of the tables: {prompt: (file of the picture, reasoning)}}.

    They are of the first seed's last checkpoint, with guidance.
    """
    made = {}
    for row in self._rows:
      tag = row.trained.lower()
      if row.trained in methods.ALL:
        run = self.training(row.trained, self._seeds[0]) if row.trained in self._names else None
        tag = None if run is None else f"{run.folder.name}_{runs.LAST}"
      if tag is None:
        continue
      folder, mode = self._evaluation(tag), evaluation.Mode(row.thinks, guided=True).name
      name = f"{row.name}, {'thinking' if row.thinks else 'not thinking'}"
      made[name] = {
        each.prompt: (folder / each.image, tokenizer.without_tags(each.text))
        for each in scores.read(folder)
        if each.image and each.mode == mode and not each.k
      }
    return {name: of for name, of in made.items() if of}

  def _trainings(self) -> dict[str, list[runs.Training]]:
    """{method: its runs, by seed}, without those whose learning rates are not chosen yet."""
    made = {name: [self.training(name, seed) for seed in self._seeds] for name in self._names}
    return {name: [run for run in of if run is not None] for name, of in made.items()}

  def record(self) -> dict[str, Any]:
    """The contents of results.json: the scores of all rows, and the hashes of what was scored."""
    first = self._prepare(self._names[0], self._seeds[0], 1.0)
    config = first.settings
    b = self._benchmark
    return {
      "start": self._start, "start_checkpoint": runs.fingerprint(self._start),
      "reward": b.reward_model or rewards.described(config),
      "reward_checksum": rewards.checksum(b.reward_model),
      # Without those that are trained for longer than the others, which their names say.
      "iterations": max(
        self._prepare(name, self._seeds[0], 1.0).steps
        for name in [name for name in self._names if methods.ALL[name].share <= 1] or self._names
      ),
      "reward_calls": config["prompts_per_step"] * config["group_size"],
      "seeds": self._seeds,
      "benchmark": {"prompts": b.prompts, "ta_prompts": b.ta_prompts, "images": b.images,
                    "seed": b.seed},
      "sweep": {
        name: {"rewards": {f"{rate:.6g}": value for rate, value in self._swept(name).items()},
               "chosen": self.chosen(name)}
        for name in self._names
      } if self._sweep else {},
      "rows": [self._row(row) for row in self._rows],
      "agreement": scores.agreement(self._evaluation("sft")),
      "at_equal_reward": figures.at_equal_reward(self._comparable_curves()),
      "hacking": self._hacking(),
      "failed": self.failed,
    }

  def _hacking(self) -> dict[str, Any]:
    """{method: {seed: see `curves.of_evaluations`}} of the runs with such evaluations."""
    made = {
      name: {str(run.seed): found for run in of if (found := curves.of_evaluations(run))}
      for name, of in self._trainings().items()
    }
    return {name: of for name, of in made.items() if of}

  def _row(self, row: methods.Row) -> dict[str, Any]:
    """A row of the tables for `record`: its scores, checkpoints and notes."""
    method = methods.ALL.get(row.trained)
    made: dict[str, Any] = {
      "name": row.name, "extra": row.trained in methods.EXTRAS,
      "trained_from": _trained_from(row), "trained_thinking": method and method.thinks,
      "evaluated_thinking": row.thinks, "note": "", "checkpoints": {}, "scores": {},
    }
    reward = {"reward": rewards.checksum(self._benchmark.reward_model)}
    if row.trained in (methods.SFT, methods.BAGEL):
      folder = self._start if row.trained == methods.SFT else self._bagel
      if not folder:
        return made | {"note": "no folder of the model before supervised training (--bagel)"}
      found = [scores.read(self._evaluation(row.trained.lower()))]
      identities = [scores.identity(None, folder, self._benchmark, runs.LAST) | reward]
      return made | self._scored(row, runs.LAST, found, identities)
    if row.trained not in self._names:
      return made | {"note": "not among --methods"}
    trainings = self._trainings()[row.trained]
    notes = [
      f"{job}: {why}" for job, why in self.failed.items() if job.startswith(f"{row.trained}, seed")
    ]
    diverged = divergence.note(row.trained, trainings, self.failed)
    for which in (runs.LAST, runs.BEST):
      done = [run for run in trainings if run.is_done() and scores.read(self._at(run, which))]
      if which == runs.LAST and len(done) < len(self._seeds):
        notes.append(f"{len(done)} of {len(self._seeds)} seeds are finished")
      identities = [
        scores.identity(
          run, str(self._model(run.folder.name, self._which(run, which))), self._benchmark, which
        ) | reward for run in done
      ]
      part = self._scored(row, which, [scores.read(self._at(run, which)) for run in done],
                          identities)
      made["checkpoints"] |= part["checkpoints"]
      made["scores"] |= {} if diverged else part["scores"]
    return made | {"note": "; ".join([diverged] if diverged else notes)}

  def _which(self, run: runs.Training, which: str) -> str:
    """`which`, or LAST where the best checkpoint is the last one."""
    return runs.LAST if run.step(which) == run.step(runs.LAST) else which

  def _at(self, run: runs.Training, which: str) -> pathlib.Path:
    """The folder of the evaluation of a run's LAST or BEST checkpoint."""
    return self._evaluation(f"{run.folder.name}_{self._which(run, which)}")

  def _scored(self, row: methods.Row, which: str, found, identities) -> dict[str, Any]:
    """A row's scores of its checkpoints `which`; empty where none is evaluated.

    `found` has the rows of each seed's evaluation, `identities` what each is of.
    """
    found = [rows for rows in found if rows]
    if not found:
      return {"checkpoints": {}, "scores": {}}
    reference = None
    if methods.UNIGRPO in self._names and (row.trained, row.thinks) != (methods.UNIGRPO, True):
      runs_of = [run for run in self._trainings()[methods.UNIGRPO] if run.is_done()]
      reference = [rows for run in runs_of if (rows := scores.read(self._at(run, which)))] or None
    return {
      "checkpoints": {which: identities},
      "scores": {
        f"{which}, {tables.GUIDANCE[guided]}": scores.of_seeds(
          found, row.thinks, guided, self._benchmark.ta_prompts, reference
        )
        for guided in (True, False)
      },
    }


def _training_cost(training: runs.Training) -> float:
  """Expected seconds of a training."""
  return PROCESS + training.steps * ITERATION[methods.ALL[training.method].thinks]


def _trained_from(row: methods.Row) -> str:
  """What a row's checkpoint was trained from: "" for the released model."""
  if row.trained == methods.BAGEL:
    return ""
  if row.trained == methods.SFT:
    return methods.BAGEL
  return methods.ALL[row.trained].start or methods.SFT
