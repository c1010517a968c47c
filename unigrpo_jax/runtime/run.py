"""A training run in its folder: resuming, saving, stopping, logging, the same on all hosts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import secrets
import threading
import time
from typing import Any, Protocol

import jax

from unigrpo_jax import errors, types
from unigrpo_jax.data import atomic, files
from unigrpo_jax.runtime import (
  checkpoints,
  compile_timer,
  folders,
  hosts,
  metrics,
  resumption,
  sharding,
  state,
  stopping,
)

WORKDIR_SECONDS = 30  # A shared folder shows a new file to all hosts by then.
STOPPED = "stopped by a signal at step {}; run the same command again to continue"
EVALUATION_SECONDS = "seconds/evaluate"  # Only rows of evaluations have it.


class Position(Protocol):
  """Something whose place a checkpoint keeps, such as a stream of prompts."""

  def state(self) -> Any: ...

  def restore(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """What a run is, around its steps.

  Attributes:
    config: the whole configuration, plain values; kept with every checkpoint.
    defaults: {dotted key: value} of keys that the configs of older runs lack.
    mutable_keys: of it, dotted: what a resumed run may change.
    steps: to take in all.
    checkpoint_every, keep_checkpoints, keep_every: see `checkpoints.TrainCheckpoints`.
    writers: of metrics, besides the file.
    log_every: steps from one row of metrics to the next.
    evaluate_every: steps from one evaluation to the next, the first before the first step; 0: none.
    best_metric: of an evaluation: the checkpoint where it is highest is kept.
    shown: metrics that the terminal shows.
    alarms: metrics that it shows where they are not 0.
    rate: (name, number a step) of what is counted by second; None: not timed.
    export_to, export_dtype: official folder to write in the end; "" for none.
    random_init: it starts from random weights.
  """

  config: Mapping[str, Any]
  defaults: Mapping[str, Any]
  mutable_keys: frozenset[str]
  steps: int
  checkpoint_every: int
  keep_checkpoints: int
  keep_every: int
  writers: Sequence[str]
  shown: Sequence[str]
  alarms: Sequence[str] = ()
  log_every: int = 1
  evaluate_every: int = 0
  best_metric: str = ""
  rate: tuple[str, int] | None = None
  export_to: str = ""
  export_dtype: str = "bfloat16"
  random_init: bool = False


class Run:
  """One run. An error or a signal within it saves the last state worth saving.

    run = Run(workdir, spec, network, positions={"prompt_position": stream})
    train_state = run.restore(layout, lambda: first_state(...))
    with run:
      run.evaluate(evaluation, train_state)
      for step in run.steps():
        ...
        run.commit(train_state, metrics)
        run.evaluate(evaluation, train_state)
    run.finish(train_state)

  Attributes:
    step: steps taken.
    timer: of the phases of a step.
  """

  def __init__(
    self, workdir: pathlib.Path, spec: RunSpec, network: state.Network, *,
    positions: Mapping[str, Position] | None = None, pinned: Mapping[str, Any] | None = None,
    may_change: Collection[str] = (), deferred_stop: bool = False,
  ):
    """Opens the folder's checkpoints.

    Args:
      workdir: holds the run's checkpoints, metrics and evaluations.
      spec: what the run is.
      network: what is trained.
      positions: by name: kept with every checkpoint and restored from it.
      pinned: {key or section of the config: fingerprint of what it reads}, which must be the same
        on all hosts and as when the run began. Where it lies may then change.
      may_change: names of these of which a change since then is only printed.
      deferred_stop: hosts agree on a stop one step late, without waiting for each other.

    Raises:
      InputError: hosts differ, or the folder or the place of the export cannot be used.
    """
    self.step, self.timer = 0, metrics.PhaseTimer(begins=self._say_phase)
    self._workdir, self._spec, self._network = workdir, spec, network
    self._positions, self._pinned = dict(positions or {}), dict(pinned or {})
    self._may_change = may_change
    self._deferred = hosts.AgreedFlag(network.mesh) if deferred_stop else None
    self._within = hosts.AgreedFlag(network.mesh)
    self._stop_requested, self._stack = threading.Event(), contextlib.ExitStack()
    self._state: types.TrainState | None = None
    self._record: dict[str, Any] = {}
    self._worth_saving = self._stopped = False
    self._last_metrics: Mapping[str, Any] = {}
    # {step: its `best_metric`, or None} of the evaluations that are logged.
    self._evaluations: dict[int, float | None] = {}
    hosts.compare(self._pinned)
    with hosts.raise_on_all_hosts():
      if hosts.first():
        metrics.check_writers(spec.writers)
    if spec.export_to and hosts.count() == 1:
      with errors.at("config.export_to"):
        folders.check_target(network.folder.path, files.path(spec.export_to), overwrite=True)
    self._saved = checkpoints.TrainCheckpoints(
      workdir / "checkpoints", keep=spec.keep_checkpoints, every=spec.keep_every,
      score=self._evaluations.get,
    )
    self._resumed_from = self._newest = hosts.broadcast(self._saved.latest)

  @property
  def is_new(self) -> bool:
    """Whether the folder holds no checkpoint of the run yet."""
    return self._resumed_from is None

  def restore(
    self, layout: state.StateLayout, first_state: Callable[[], types.TrainState]
  ) -> types.TrainState:
    """The state to continue from: 1. this run's newest sound checkpoint, else 2. `first_state()`.

    Raises:
      InputError: the checkpoints are of another configuration or none can be read, or not all
        hosts see the folder.
    """
    def read(step: int) -> tuple[dict[str, Any], types.TrainState]:
      with hosts.raise_on_all_hosts():
        record = self._saved.record(step)
      # Another kind of training has other positions: first what it is, then whether it is whole.
      if "config" in record:
        self._check(record)
      if missing := {"config", *self._positions} - record.keys():
        raise errors.Damaged(f"checkpoint {step} is damaged: it has no {', '.join(missing)}")
      return record, self._saved.load(step, layout.abstract)

    record = {}
    if self.is_new:
      self._state = first_state()
    else:
      self.step, (record, self._state) = self._saved.newest(read)
      self._newest = self.step
      for name, position in self._positions.items():
        position.restore(record[name])
      hosts.print_first(f"resumed {self._workdir} at step {self.step}")
    self._run_id = record.get("run_id") or hosts.broadcast(secrets.token_hex(4))
    self._introduce(resumed=bool(record))
    self._record = self._make_record()
    return self._state

  def _check(self, record: Mapping[str, Any]) -> None:
    before, spec = record["config"], self._spec
    keys = resumption.mutable_keys(before, spec.config, spec.mutable_keys)
    known = {name for name in self._pinned if name in record}
    resumption.check(before, spec.config, keys | known, spec.defaults)
    for name, value in self._pinned.items():
      if record.get(name, value) == value:
        continue
      changed = f"config.{name} reads other contents than when the run in the workdir began"
      if name == "mesh":
        changed = f"config.mesh has {value} on these devices but had {record[name]} when it began"
      if name not in self._may_change:
        raise errors.InputError(f"{changed}; restore them, or choose a new --workdir")
      hosts.print_first(f"note: {changed}")

  def _make_record(self) -> dict[str, Any]:
    return {"config": self._spec.config, "run_id": self._run_id} | self._pinned | {
      name: position.state() for name, position in self._positions.items()
    }

  def _introduce(self, resumed: bool) -> None:
    """Writes config.json and run.json."""
    with hosts.raise_on_all_hosts():
      if hosts.first():
        self._write_introduction(resumed)
    with hosts.raise_on_all_hosts():
      _check_shared(self._workdir, self._run_id)

  def _write_introduction(self, resumed: bool) -> None:
    self._workdir.mkdir(parents=True, exist_ok=True)
    write_json(self._workdir / "config.json", self._spec.config)
    write_json(self._workdir / "run.json", {
      "run_id": self._run_id,
      "pinned": self._pinned,
      "resumed": resumed,
      "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "versions": {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
      },
      "devices": state.describe_devices(self._network.mesh),
      "device_kind": self._network.mesh.devices.flat[0].device_kind,
      "parameters": {
        group: count for group, count in state.group_sizes(self._state.params).items() if count
      },
    })

  def print_start(
    self, train_state: types.TrainState, learning_rate: Mapping[str, float], lines: Sequence[str]
  ) -> None:
    """Prints what is trained, where, from which step to which; and `lines` about a step."""
    weights = ", random weights" if self._spec.random_init and not self.step else ""
    text = [
      f"training {self._network.folder.path}{weights} in {self._workdir}, steps {self.step} to "
      f"{self._spec.steps}",
      f"devices: {state.describe_devices(self._network.mesh)}", *lines,
    ]
    for group, count in state.group_sizes(train_state.params).items():
      rate = learning_rate.get(group, 0.0)
      if count:
        trained = f"learning rate {rate:g}" if rate else "frozen"
        text.append(f"  {group:7} {count:>15,} parameters, {trained}")
    left = self.step < self._spec.steps
    hosts.print_first("\n".join([*text, "compiling" if left else "all steps are taken already"]))

  # --- Within the run.

  def __enter__(self) -> Run:
    with contextlib.ExitStack() as stack:
      with hosts.raise_on_all_hosts():
        self._log = metrics.MetricsLog(
          ("jsonl", *self._spec.writers) if hosts.first() else (), self._workdir, self._run_id,
          self._spec.config, first_step=-1 if self.is_new else self.step,
        )
      stack.callback(self._log.close)
      self._evaluations.update(self._logged_evaluations())
      stack.enter_context(sharding.activate(self._network.mesh))
      self._compiling = stack.enter_context(compile_timer.CompileTimer())
      stack.enter_context(stopping.stop_on_signal(self._stop_requested, self._loses_nothing))
      self._clock = metrics.Clock(self.step, self._spec.steps)
      self._first_step = self.step + 1
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind, error, trace) -> bool:
    """Saves what is worth saving, after a stop or an error of the user's.

    Not after a failed read or write, maybe of this host alone: a save needs all of them. One host
    by itself lets the save under way end, whatever the error.
    """
    with self._stack:
      if error is None:
        self._saved.close()
      elif isinstance(error, stopping.Stopped):
        self._stopped = True
        self._save_if_missing(self._state)
        self._saved.close()
        hosts.print_first(STOPPED.format(self.step))
      elif isinstance(error, errors.InputError) and not isinstance(error, errors.Storage):
        self._save_before(error)
      elif hosts.count() == 1:
        with contextlib.suppress(errors.Storage):  # `error` came first.
          self._saved.close()
    return isinstance(error, stopping.Stopped)

  def _save_before(self, error: errors.InputError) -> None:
    """Saves the state before an error, unless it diverged.

    Raises:
      InputError: for a rejected update: `error` with its step and what happened to the state.
    """
    rejected, is_saved = isinstance(error, errors.UpdateRejected), False
    if not isinstance(error, errors.Diverged):
      self._worth_saving |= rejected
      is_saved = self._save_if_missing(error.state if rejected else self._state)
    self._saved.close()
    if rejected:
      outcome = "the state before it is saved" if is_saved else continue_from(self._workdir)
      raise errors.InputError(f"step {self._current_step}: {error}; {outcome}") from None

  def steps(self) -> Iterator[int]:
    """The numbers of the steps still to take; a step ends with `commit`.

    Raises:
      Stopped: a signal reached a host, and steps are left.
      UpdateRejected: the state is to be saved, but the metrics of its step are not finite.
    """
    while self.step < self._spec.steps:
      self.timer.read_and_reset()
      self._current_step = self.step + 1
      yield self._current_step
      if self.step != self._current_step:
        raise RuntimeError(f"step {self._current_step} was not committed")
      stopped = self._agree_on_stop()
      due = self.step % self._spec.checkpoint_every == 0 or self.step == self._spec.steps
      if due or stopped or self.step in self._evaluations:
        check_finite(jax.device_get(self._last_metrics))
        self._save()
      if stopped and self.step < self._spec.steps:
        raise stopping.Stopped

  def _say_phase(self, phase: str) -> None:
    """Prints where the first step is: its programs may take minutes to compile."""
    if self.step + 1 == self._first_step:
      hosts.print_first(f"first step: {phase}")

  def _agree_on_stop(self) -> bool:
    if self._deferred is None:
      return hosts.any_host(self._stop_requested.is_set())
    self._deferred.post(self._stop_requested.is_set())
    return self._deferred.read()

  def _loses_nothing(self) -> bool:
    """Whether all steps taken are saved: one that is being taken may be taken again."""
    saved = self._newest or 0
    return hosts.count() == 1 and self.step == saved and not self._saved.is_saving

  def request_stop(self) -> None:
    """Stops the run at the next point that all hosts agree on."""
    self._stop_requested.set()

  def raise_if_stopped(self) -> None:
    """A point within a step at which all hosts may stop; it waits for nothing that runs.

    Raises:
      Stopped: a signal reached a host; where there are several, before the last such point.
    """
    self._within.post(self._stop_requested.is_set())
    if self._within.read():
      raise stopping.Stopped

  def wait(self, finished: Callable[[float], bool], awaited: Callable[[], str]) -> None:
    """Waits on all hosts, which a signal on any of them ends within seconds; see `stopping.wait`.
    """
    stopping.wait(finished, awaited, self._stop_requested.is_set)

  def commit(self, train_state: types.TrainState, values: Mapping[str, Any]) -> None:
    """Ends a step: its state is now the run's, and its metrics are logged where that is due.

    Args:
      train_state: after the step.
      values: {name: number}, on the host or on the devices.

    Raises:
      UpdateRejected: a number that is logged, or of a step that is saved, is not finite.
    """
    spec, step = self._spec, self._current_step
    due = step % spec.log_every == 0 or step in (self._first_step, spec.steps)
    if due or step % spec.checkpoint_every == 0:
      values = jax.device_get(values)
      check_finite(values)
    self.step, self._state, self._last_metrics = step, train_state, values
    self._worth_saving, self._record = True, self._make_record()
    if not due:
      return
    if spec.rate is not None:
      name, count = spec.rate
      values = values | self.timer.read_and_reset()
      values["seconds/compile"] = self._compiling.read_and_reset()
      values[f"{name}_per_second"] = count / values["seconds/total"]
    self._write(values)
    names = [*spec.shown, *(name for name in spec.alarms if values.get(name))]
    shown = {name: values[name] for name in names if name in values}
    hosts.print_first(self._clock.line(self.step, shown))

  def evaluate(
    self, evaluation: Callable[[Any, int, Callable[[], None], Callable], Mapping[str, float]],
    train_state: types.TrainState,
  ) -> None:
    """Evaluates the state where that is due and not logged yet; the results are a row of their own.

    Args:
      evaluation: (parameters, step, what to call between two batches, `wait`) -> metrics.
      train_state: of `step`.

    Raises:
      Stopped: a signal reached a host; the next start makes it up.
    """
    every = self._spec.evaluate_every
    due = every and (self.step % every == 0 or self.step == self._spec.steps)
    if not due or self.step in self._evaluations:
      return
    self.raise_if_stopped()
    start = time.monotonic()
    results = dict(evaluation(train_state.averaged, self.step, self.raise_if_stopped, self.wait))
    self._compiling.read_and_reset()  # What it compiled is no part of the next step.
    self._write(results | {EVALUATION_SECONDS: time.monotonic() - start})
    self._evaluations[self.step] = results.get(self._spec.best_metric)
    self._worth_saving = True

  def _write(self, values: Mapping[str, Any]) -> None:
    """A row of the log. Where the first host cannot write it, all end alike; see `__exit__`."""
    with hosts.raise_on_all_hosts():
      self._log.write(self.step, values)

  def _logged_evaluations(self) -> dict[int, float | None]:
    """Those of the log, which the first host has."""
    log, rows = self._workdir / "metrics.jsonl", []
    if hosts.first() and log.exists():
      rows, _ = metrics.read(log)
    return dict(hosts.broadcast([
      [row["step"], row.get(self._spec.best_metric)] for row in rows if EVALUATION_SECONDS in row
    ]))

  def _save(self) -> None:
    self._saved.save(self.step, self._state, self._record)
    self._newest, self._worth_saving = self.step, False

  def _save_if_missing(self, train_state: types.TrainState | None) -> bool:
    """Saves a state of `step`, unless it diverged or a new start would lose nothing without it.

    Returns whether the step has a checkpoint now.
    """
    usable = train_state is not None and not metrics.not_finite(jax.device_get(self._last_metrics))
    if usable and self._worth_saving and self._newest != self.step:
      self._state = train_state
      self._save()
    return usable and self._newest == self.step

  def finish(self, train_state: types.TrainState) -> None:
    """Exports what a run that is complete asked for."""
    spec = self._spec
    if self._stopped or self.step < spec.steps or not spec.export_to:
      return
    if hosts.count() > 1:
      hosts.print_first(
        f"not exported: run python -m unigrpo_jax.export {self._workdir} {spec.export_to} on one "
        "host"
      )
      return
    state.export(self._network, train_state.averaged, spec.export_to, spec.export_dtype)


def check_workdir(workdir: pathlib.Path) -> None:
  """Refuses a folder that cannot hold a run, before anything is loaded or computed.

  Raises:
    InputError: its name, or whatever is in its place; Storage where trying again may help.
  """
  checkpoints.check_name(workdir)
  parts = () if files.is_object(workdir) else (workdir / "checkpoints", workdir / "evaluations")
  for folder in (workdir, *parts):
    with errors.at(f"--workdir={workdir}" if folder is workdir else str(folder)):
      atomic.probe(folder / "probe")


def _check_shared(workdir: pathlib.Path, run_id: str) -> None:
  """Refuses a workdir that not all hosts see: checkpoints would lose some of their parts."""
  for _ in range(WORKDIR_SECONDS):
    with contextlib.suppress(OSError, ValueError):
      if json.loads((workdir / "run.json").read_text(encoding="utf-8"))["run_id"] == run_id:
        return
    time.sleep(1)  # A shared folder may show a new file late.
  raise errors.InputError(
    f"--workdir={workdir} is not the folder that host 0 writes to; give one that all hosts share"
  )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Puts a JSON file in place whole."""
  atomic.write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def check_finite(values: Mapping[str, Any]) -> None:
  """Raises UpdateRejected, which names those that are not, unless all values are finite."""
  if bad := metrics.not_finite(values):
    raise errors.UpdateRejected(f"{', '.join(bad)} not finite; lower the learning rate and resume")


def continue_from(workdir: pathlib.Path) -> str:
  """From which step a run continues; without the other hosts, which may be dead."""
  steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return f"the run continues from step {max(steps)}" if steps else "the run starts anew"
