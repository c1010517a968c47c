"""What every training run does around its steps: devices, state, resuming, stopping, exporting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import secrets
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unigrpo_jax import errors, types
from unigrpo_jax.data import atomic
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.models import attention, bagel, layers
from unigrpo_jax.runtime import checkpoints, folders, hosts, metrics, optim, resumption, sharding

DTYPES = ("float32", "bfloat16")
EXPORT_DTYPES = ("bfloat16", "float16", "float32")
WORKDIR_SECONDS = 30  # A shared folder shows a new file to all hosts by then.


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A checkpoint's network, ready to be trained on a mesh.

  Attributes:
    folder: it came from.
    tokenizer: its.
    model: the `Bagel`.
    mesh: devices.
  """

  folder: folders.ModelFolder
  tokenizer: tokenizer_lib.Tokenizer
  model: bagel.Bagel
  mesh: jax.sharding.Mesh


def open_network(config, devices=None) -> Network:
  """Devices, tokenizer and network of a run, without weights.

  Raises:
    InputError: the mesh or the attention does not fit the devices, the dtype is unknown, or the
      folder cannot be used.
  """
  if not config.init_from:
    raise errors.InputError("config.init_from is empty; give an official or converted folder")
  folder = folders.open_folder(config.init_from)
  tokenizer = tokenizer_lib.load(folder.files)
  tokenizer.check_fits(folder.config.llm.vocab_size)
  return build_network(config, folder, tokenizer, devices)


def build_network(config, folder: folders.ModelFolder, tokenizer, devices=None) -> Network:
  """The network of a run on its mesh, from its sizes; see `open_network`."""
  errors.choose("config.dtype", config.dtype, DTYPES)
  devices = jax.devices() if devices is None else devices
  sizes = dict(config.mesh)
  for axis, size in sizes.items():
    errors.require(f"config.mesh.{axis}", size, low=0 if axis == "fsdp" else 1)
  others = sizes["data"] * sizes["tensor"]
  sizes["fsdp"] = sizes["fsdp"] or max(len(devices) // others, 1)
  mesh = sharding.make_mesh(**sizes, devices=devices)
  # The config of a checkpoint may be from before there was a choice.
  backend = config.get("attention", "auto")
  errors.choose("config.attention", backend, attention.BACKENDS)
  backend = attention.choose_backend(backend, devices[0].platform, config.dtype)
  lora = config.get("lora")
  model = bagel.Bagel(
    folder.config, (tokenizer.vision_start, tokenizer.vision_end),
    dtype=jnp.dtype(config.dtype), remat=config.remat,
    lora=layers.Lora(lora.rank, lora.alpha) if lora and lora.rank else None,
    backend=backend, unroll=sharding.needs_straight_programs(mesh),
  )
  return Network(folder, tokenizer, model, mesh)


def make_optimizer(config) -> optax.GradientTransformation:
  """AdamW with the learning rate and schedule of each group."""
  errors.choose("config.schedule", config.schedule, ("constant", "cosine"))

  def schedule(rate):
    if not rate:
      return None
    if config.schedule == "cosine":
      return optim.warmup_cosine(rate, config.warmup_steps, optimizer_steps(config))
    return optim.warmup_constant(rate, config.warmup_steps)

  return optim.adamw_by_group(
    {group: schedule(rate) for group, rate in config.learning_rate.items()},
    b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
    clip_norm=config.clip_norm,
  )


def steps_an_iteration(config) -> int:
  """Optimizer steps of an iteration; supervised training takes one."""
  return config.get("epochs", 1) * config.get("minibatches", 1)


def optimizer_steps(config) -> int:
  """Optimizer steps of a whole run."""
  return config.steps * steps_an_iteration(config)


def state_layout(
  network: Network, optimizer: optax.GradientTransformation, *, ema: bool, reference: bool
) -> tuple[types.TrainState, types.TrainState]:
  """The shapes and the shardings of a run's state.

  Args:
    network: what is trained.
    optimizer: of its parameters.
    ema: whether a moving average is kept.
    reference: whether a copy of the first parameters is kept, in the network's own dtype.
  """
  model, folder = network.model, network.folder

  def fresh(key) -> types.TrainState:
    params = model.init(key, bagel.example_batch(folder.config))["params"]
    return types.TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
      ema=params if ema else None,
      reference=jax.tree.map(lambda a: a.astype(model.dtype), params) if reference else None,
    )

  abstract = jax.eval_shape(fresh, jax.random.key(0))
  where = sharding.shardings(abstract, network.mesh)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    sharding.unbox(abstract), where,
  ), where


def first_state(
  network: Network, optimizer: optax.GradientTransformation, where: types.TrainState, *,
  random_init: bool, seed: int,
) -> types.TrainState:
  """The state before the first step: from the folder's weights, or from random ones."""
  model, config = network.model, network.folder.config
  init = lambda key: sharding.unbox(model.init(key, bagel.example_batch(config))["params"])

  def state_of(params) -> types.TrainState:
    copy = lambda kept, cast: None if kept is None else jax.tree.map(cast, params)
    return types.TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
      ema=copy(where.ema, jnp.copy),
      reference=copy(where.reference, lambda a: jnp.copy(a).astype(model.dtype)),
    )

  key = jax.random.key(seed)
  with sharding.activate(network.mesh):
    if random_init:
      return jax.jit(lambda key: state_of(init(key)), out_shardings=where)(key)
    # The compiler drops the initialisation of whatever the folder's weights replace.
    plain = _without_adapters(where.params)
    loaded = network.folder.load_params(
      dtype=jnp.float32, shardings={"bagel": plain}, parts=("bagel",)
    )["bagel"]
    start = lambda key, loaded: state_of(_update(init(key), loaded))
    return jax.jit(start, out_shardings=where, donate_argnums=1)(key, loaded)


def resume_or_start(
  workdir: pathlib.Path, config, network: Network, optimizer: optax.GradientTransformation,
  layout: tuple[types.TrainState, types.TrainState], free: Collection[str],
) -> tuple[checkpoints.TrainCheckpoints, types.TrainState, dict[str, Any]]:
  """A run's checkpoints, and the state and the record of the newest.

  Where there is none, the state is that before the first step, from the folder's network or from
  random weights, and the record is empty.

  Args:
    workdir, config, network, optimizer: of the run.
    layout: see `state_layout`.
    free: see `resumption.may_change`.

  Raises:
    InputError: the checkpoint is of another configuration, or the run's export could not be written
      where it is to go, which shows now rather than in the end.
  """
  abstract, where = layout
  if config.export_to and hosts.count() == 1:
    with errors.at("config.export_to"):
      folders.check_target(network.folder.path, pathlib.Path(config.export_to), overwrite=True)
  saved = open_checkpoints(workdir, config)
  newest = hosts.broadcast(saved.latest)
  if newest is None:
    state = first_state(
      network, optimizer, where, random_init=config.random_init, seed=config.seed
    )
    return saved, state, {}
  record, now = saved.record(newest), json.loads(config.to_json())
  resumption.check(record["config"], now, resumption.may_change(record["config"], now, free))
  state = saved.load(newest, abstract)
  hosts.print_first(f"resumed {workdir} at step {newest}")
  return saved, state, record


def _without_adapters(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: _without_adapters(value) if isinstance(value, Mapping) else value
    for name, value in tree.items() if name not in (layers.LORA_DOWN, layers.LORA_UP)
  }


def _update(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """`tree` with the leaves that `values` has."""
  return {
    name: _update(value, values[name]) if isinstance(value, Mapping)
    else values.get(name, value)
    for name, value in tree.items()
  }


def introduce(
  workdir: pathlib.Path, config: Mapping[str, Any], network: Network, params, resumed: str | None
) -> str:
  """Writes config.json and run.json of a run; returns its name, kept over its resumptions."""
  own = resumed or hosts.broadcast(secrets.token_hex(4))
  if hosts.first():
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config)
    write_json(workdir / "run.json", {
      "run_id": own,
      "resumed": resumed is not None,
      "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "versions": {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
      },
      "devices": device_line(network.mesh).removeprefix("devices: "),
      "device_kind": network.mesh.devices.flat[0].device_kind,
      "parameters": {group: count for group, count in group_sizes(params).items() if count},
    })
  with hosts.raise_on_all_hosts():
    _check_shared(workdir, own)
  return own


def _check_shared(workdir: pathlib.Path, run_id: str) -> None:
  """Refuses a workdir that not all hosts see: checkpoints would lose some of their parts."""
  for _ in range(WORKDIR_SECONDS):
    with contextlib.suppress(OSError, ValueError):
      if json.loads((workdir / "run.json").read_text())["run_id"] == run_id:
        return
    time.sleep(1)  # A shared folder may show a new file late.
  raise errors.InputError(
    f"--workdir={workdir} is not the folder that host 0 writes to; give one that all hosts share"
  )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Puts a JSON file in place whole."""
  atomic.write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def open_log(
  workdir: pathlib.Path, config: Mapping[str, Any], run_id: str, first_step: int
) -> metrics.MetricsLog:
  """What a run tells of its steps, on the first host; see `metrics.MetricsLog`."""
  names = ("jsonl", *config["writers"]) if hosts.first() else ()
  return metrics.MetricsLog(names, workdir, run_id, config, first_step=first_step)


def told(workdir: pathlib.Path, step: int) -> bool:
  """Whether the log has a row of a step; asked on the first host, which has the log."""
  log = workdir / "metrics.jsonl"
  return log.exists() and any(row["step"] == step for row in metrics.read(log)[0])


def check_finite(
  values: Mapping[str, Any], number: int, saved: checkpoints.TrainCheckpoints, kept: bool
) -> None:
  """Stops a run whose numbers are not finite, naming them.

  Args:
    values: what was measured.
    number: of the step.
    saved: checkpoints of the run.
    kept: whether the state before it will be saved; else there is the newest of those.
  """
  if bad := not_finite(values):
    where = "the state before it is saved" if kept else go_on_from(saved.latest)
    raise errors.InputError(
      f"step {number}: {', '.join(bad)} not finite; {where}; lower the learning rate and resume"
    )


def not_finite(values: Mapping[str, Any]) -> list[str]:
  """The names of the values that are not finite."""
  return sorted(name for name, value in values.items() if not np.isfinite(value))


def keep(
  saved: checkpoints.TrainCheckpoints, number: int, state: types.TrainState,
  record: Mapping[str, Any],
) -> None:
  """Saves the state of a step that may have been saved already."""
  if hosts.broadcast(saved.latest) != number:
    saved.save(number, state, record)


@contextlib.contextmanager
def saving_before(
  saved: checkpoints.TrainCheckpoints, number: int, state: types.TrainState,
  record: Mapping[str, Any], worth: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
  """Saves the state before step `number` where what it encloses stops the run.

  Not where the policy is found to have diverged.

  Args:
    saved, number, state, record: see `keep`.
    worth: asked then, whether that state is worth it; the same on all hosts.
  """
  try:
    yield
  except errors.InputError as error:
    if worth() and not isinstance(error, errors.Diverged):
      keep(saved, number - 1, state, record)
    saved.close()
    raise


def group_sizes(params) -> dict[str, int]:
  """How many parameters each group has."""
  counts = dict.fromkeys(optim.GROUPS, 0)
  for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(optim.groups(params))):
    counts[group] += leaf.size
  return counts


def group_lines(config, params) -> list[str]:
  """A line a group of parameters: how many there are, and whether they are trained."""
  lines = []
  for group, count in group_sizes(params).items():
    rate = config.learning_rate.get(group, 0.0)
    if count:
      state = f"learning rate {rate:g}" if rate else "frozen"
      lines.append(f"  {group:7} {count:>15,} parameters, {state}")
  return lines


def start_line(config, network: Network, workdir: pathlib.Path, first: int) -> str:
  """What is trained, where, from which step to which."""
  weights = ", random weights" if config.random_init and not first else ""
  return (
    f"training {network.folder.path}{weights} in {workdir}, steps {first} to {config.steps}"
  )


def device_line(mesh: jax.sharding.Mesh) -> str:
  shape = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  return f"devices: {jax.default_backend()}, {shape}; {jax.process_count()} host(s)"


def how_to_go_on(workdir: pathlib.Path) -> str:
  """What a run that ended goes on from; asks nobody, as other hosts may be dead."""
  steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return go_on_from(max(steps, default=None))


def go_on_from(step: int | None) -> str:
  return "the run starts anew" if step is None else f"the run goes on from step {step}"


class CompileTimer:
  """Seconds that XLA compiled, while it is entered."""

  def __enter__(self) -> CompileTimer:
    self._seconds = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, name: str, seconds: float, **_) -> None:
    if name.endswith("backend_compile_duration"):
      self._seconds += seconds

  def take(self) -> float:
    """Since the last call."""
    seconds, self._seconds = self._seconds, 0.0
    return seconds


def finish(network: Network, state: types.TrainState, config, workdir: pathlib.Path) -> None:
  """Exports what a run that is over asked for."""
  if not config.export_to:
    return
  if hosts.count() > 1:
    hosts.print_first(
      f"not exported: python -m unigrpo_jax.export {workdir} {config.export_to} on one host does it"
    )
    return
  export(network, state.averaged, config.export_to, config.export_dtype)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
  """What SIGTERM or SIGINT sets, while it is entered: the loop then saves and ends."""
  stopping, before = threading.Event(), {}
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGINT):
      before[number] = signal.signal(number, lambda *_: stopping.set())
  try:
    yield stopping
  finally:
    for number, handler in before.items():
      signal.signal(number, handler or signal.SIG_DFL)


def export(network: Network, params, target: str, dtype: str) -> None:
  """Writes a network as an official folder, its adapters merged into it."""
  if network.model.lora is not None:
    merge = lambda params: layers.merge_lora(params, network.model.lora)
    params = jax.jit(merge)(params)
  folders.write_official(
    pathlib.Path(target), network.folder, {"bagel": params}, dtype=jnp.dtype(dtype)
  )
  print(f"exported {target}", flush=True)


def open_checkpoints(workdir: pathlib.Path, config) -> checkpoints.TrainCheckpoints:
  """The checkpoints of a run."""
  return checkpoints.TrainCheckpoints(
    workdir / "checkpoints", keep=config.keep_checkpoints, every=config.get("keep_every", 0),
    best="reward",
  )


def read_checkpoints(workdir: pathlib.Path) -> checkpoints.TrainCheckpoints:
  """The checkpoints of a run that may be going on elsewhere; nothing is removed."""
  return checkpoints.TrainCheckpoints(workdir / "checkpoints", keep=None, clean=False)
