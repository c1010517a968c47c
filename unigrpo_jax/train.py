"""Trains BAGEL: `python -m unigrpo_jax.train --config=configs/sft.py:tiny --workdir=runs/tiny`."""

from __future__ import annotations

import json
import pathlib
import signal
import threading

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from unigrpo_jax import (
  checkpoints,
  corpus,
  errors,
  feed,
  folders,
  metrics,
  optim,
  phases,
  sharding,
  types,
)
from unigrpo_jax import (
  step as step_lib,
)
from unigrpo_jax.data import packing
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.models import bagel, vae

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/sft.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics; a run that "
                               "finds its own checkpoints there goes on.")

# What may differ between a run and its resumption.
RESUMABLE = {
  "steps", "log_every", "checkpoint_every", "keep_checkpoints", "export_to", "mesh", "limits",
}


def train(config, workdir: pathlib.Path, devices=None) -> types.TrainState:
  """Runs the training that `config` describes, in or from `workdir`; returns its last state.

  Args:
    config: see `configs/sft.py`.
    workdir: holds the run's checkpoints and metrics.
    devices: to train on; None: all of them.
  """
  # --- Devices.
  devices = jax.devices() if devices is None else devices
  mesh_sizes = dict(config.mesh)
  others = mesh_sizes["data"] * mesh_sizes["tensor"]
  mesh_sizes["fsdp"] = mesh_sizes["fsdp"] or max(len(devices) // others, 1)
  mesh = sharding.make_mesh(**mesh_sizes, devices=devices)
  check_config(config, mesh)

  # --- Model and optimizer.
  folder = folders.open_folder(config.init_from)
  tokenizer = tokenizer_lib.load(folder.files)
  tokenizer.check_fits(folder.config.llm.vocab_size)
  model = bagel.Bagel(
    folder.config, (tokenizer.vision_start, tokenizer.vision_end),
    dtype=jnp.dtype(config.dtype), remat=config.remat,
  )
  optimizer = make_optimizer(config)
  ema_decay = config.ema_decay or None

  def fresh(key) -> types.TrainState:
    params = model.init(key, bagel.example_batch(folder.config))["params"]
    return types.TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
      ema=params if ema_decay else None,
    )

  abstract = jax.eval_shape(fresh, jax.random.key(0))
  state_shardings = sharding.shardings(abstract, mesh)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    sharding.unbox(abstract), state_shardings,
  )

  # --- State: 1. resume, else 2. the folder's network, else 3. random weights.
  saved = checkpoints.TrainCheckpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
  plain = json.loads(config.to_json())
  if saved.latest is not None:
    check_resumable(saved.record(saved.latest)["config"], plain)
    state = saved.load(saved.latest, abstract)
    print(f"resumed {workdir} at step {saved.latest}", flush=True)
  elif config.random_init:
    with sharding.activate(mesh):
      make = jax.jit(lambda key: sharding.unbox(fresh(key)), out_shardings=state_shardings)
      state = make(jax.random.key(config.seed))
  else:
    params = folder.load_params(
      dtype=jnp.float32, shardings={"bagel": state_shardings.params}, parts=("bagel",)
    )["bagel"]
    start = lambda params: types.TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params),
      jax.tree.map(jnp.copy, params) if ema_decay else None,
    )
    state = jax.jit(start, out_shardings=state_shardings)(params)

  # --- Data.
  # On one device: it runs in the feed's thread, and programs over all devices that two threads
  # launch in different orders wait for each other for ever.
  encoder = vae.VAE(folder.config.vae)
  encoder_params = folder.load_params(dtype=jnp.float32, parts=("vae",))["vae"]

  def encode(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    # Few shapes, whatever the number of images: filled up to a multiple of 16.
    rows = np.arange(len(pixels) + -len(pixels) % 16) % len(pixels)
    latents = phases.encode_images(encoder, encoder_params, pixels[rows], noise[rows])
    tokens = vae.pack_latents(latents, folder.config.latent_patch_size)
    return np.asarray(tokens)[: len(pixels)]

  local_rows = config.microbatch // jax.process_count()
  examples = corpus.shards(config.data.folder) if config.data.folder else corpus.iconworld(
    dict(config.data.mixture), wrong_plan_rate=config.data.wrong_plan_rate
  )
  batches = feed.Feed(
    examples, folder.config, tokenizer, encode,
    feed.Recipe(config.noise_draws, config.timestep_shift, config.drop_text, config.drop_vit,
                config.drop_vae, config.ce_weighting),
    packing.PadTo(noisy=config.noise_draws, **config.limits),
    rows=local_rows, microbatches=config.sequences_per_step // config.microbatch,
    seed=config.seed,
  )
  along_rows = sharding.along_batch(mesh, axis=1)

  # --- The step.
  step_fn = jax.jit(
    step_lib.make_supervised_step(
      model, optimizer, ema_decay=ema_decay, ce_weight=config.ce_weight,
      mse_weight=config.mse_weight, label_chunk=config.label_chunk,
    ),
    donate_argnums=0, out_shardings=(state_shardings, None),
  )

  # --- The loop.
  first = int(state.step)
  print_start(config, folder, state, mesh, workdir, first)
  log = metrics.MetricsLog(workdir / "metrics.jsonl", first)
  clock = metrics.Clock(first, config.steps)
  stopping = stop_on_signal()
  record = {"config": plain}
  with sharding.activate(mesh):
    for number, host_batch in enumerate(batches.batches(first, config.steps), first + 1):
      batch = jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(along_rows, a), host_batch
      )
      state, values = step_fn(state, batch)
      if number % config.log_every == 0 or number in (first + 1, config.steps):
        values = jax.device_get(values)
        check_finite(values, number, saved, workdir)
        log.write(number, values)
        print(clock.line(number, {"ce": values["ce"], "mse": values["mse"]}), flush=True)
      last = number == config.steps or stopping.is_set()
      if number % config.checkpoint_every == 0 or last:
        saved.save(number, state, record)
      if stopping.is_set():
        print(f"stopped by a signal at step {number}; the same command goes on", flush=True)
        break
  saved.close()
  if config.export_to and int(state.step) == config.steps:
    export(config, folder, state)
  return state


def check_config(config, mesh) -> None:
  """Refuses impossible numbers before anything is loaded or compiled."""
  if not config.init_from:
    raise errors.InputError("config.init_from is empty; give an official or converted folder")
  if config.sequences_per_step % config.microbatch:
    raise errors.InputError(
      f"config.sequences_per_step={config.sequences_per_step} is not a multiple of "
      f"config.microbatch={config.microbatch}; change one of them"
    )
  ways = sharding.batch_multiple(mesh)
  if config.microbatch % ways or config.microbatch % jax.process_count():
    raise errors.InputError(
      f"config.microbatch={config.microbatch} does not divide over data x fsdp = {ways} devices "
      f"and {jax.process_count()} hosts; make it a multiple of both"
    )
  if config.limits.images % ways:
    raise errors.InputError(
      f"config.limits.images={config.limits.images} does not divide over data x fsdp = {ways} "
      "devices; make it a multiple"
    )
  if config.ce_weighting not in feed.CE_WEIGHTINGS:
    raise errors.InputError(
      f"config.ce_weighting={config.ce_weighting!r} is none of {', '.join(feed.CE_WEIGHTINGS)}"
    )
  if config.schedule not in ("constant", "cosine"):
    raise errors.InputError(f"config.schedule={config.schedule!r} is neither constant nor cosine")


def make_optimizer(config):
  """AdamW with the learning rate and schedule of each group."""
  def schedule(rate):
    if not rate:
      return None
    if config.schedule == "cosine":
      return optim.warmup_cosine(rate, config.warmup_steps, config.steps)
    return optim.warmup_constant(rate, config.warmup_steps)

  return optim.adamw_by_group(
    {group: schedule(config.learning_rate[group]) for group in optim.GROUPS},
    b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
    clip_norm=config.clip_norm,
  )


def check_resumable(before: dict, now: dict) -> None:
  """Refuses to go on with another configuration; names the first key that differs."""
  fixed = RESUMABLE - {"steps"} if now["schedule"] == "cosine" else RESUMABLE
  for key in sorted(before.keys() | now.keys()):
    if key not in fixed and before.get(key) != now.get(key):
      raise errors.InputError(
        f"config.{key}={now.get(key)!r} but the run in the workdir has {before.get(key)!r}; "
        "give it back its value, or choose a new --workdir"
      )


def check_finite(values, number: int, saved, workdir) -> None:
  """Stops a run whose numbers are not finite, naming them; its last checkpoint stays."""
  bad = sorted(name for name, value in values.items() if not np.isfinite(value))
  if bad:
    saved.close()
    raise errors.InputError(
      f"step {number}: {', '.join(bad)} not finite; the newest checkpoint in {workdir} is of step "
      f"{saved.latest}; lower the learning rate and resume from it"
    )


def print_start(config, folder, state, mesh, workdir, first: int) -> None:
  """What will run, before it compiles."""
  labels = jax.tree.leaves(optim.groups(state.params))
  counts = dict.fromkeys(optim.GROUPS, 0)
  for leaf, group in zip(jax.tree.leaves(state.params), labels):
    counts[group] += leaf.size
  print(f"training {folder.path} in {workdir}, steps {first} to {config.steps}")
  shape = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.MESH_AXES)
  print(f"devices: {jax.default_backend()}, {shape}; {jax.process_count()} host(s)")
  print(
    f"a step: {config.sequences_per_step} sequences in "
    f"{config.sequences_per_step // config.microbatch} microbatch(es), "
    f"{config.noise_draws} noisy copies of each image"
  )
  for group, count in counts.items():
    rate = config.learning_rate[group]
    print(f"  {group:7} {count:>15,} parameters, {f'learning rate {rate:g}' if rate else 'frozen'}")
  print("compiling the step", flush=True)


def stop_on_signal() -> threading.Event:
  """Set by SIGTERM or SIGINT: the loop then saves and ends."""
  stopping = threading.Event()
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda *_: stopping.set())
  return stopping


def export(config, folder: folders.ModelFolder, state: types.TrainState) -> None:
  """Writes the trained network (its moving average if there is one) as an official folder."""
  params = state.params if state.ema is None else state.ema
  target = pathlib.Path(config.export_to)
  folders.write_official(target, folder, {"bagel": params}, dtype=jnp.dtype(config.export_dtype))
  print(f"exported {target}", flush=True)


def main(_) -> None:
  def run():
    if _CONFIG.value is None or not _WORKDIR.value:
      raise errors.InputError("give --config, for example configs/sft.py:tiny, and --workdir")
    train(_CONFIG.value, pathlib.Path(_WORKDIR.value))

  errors.report(run)


if __name__ == "__main__":
  app.run(main)
