"""Supervised fine-tuning, UniGRPO's first stage: words by cross entropy, images by velocity."""

from __future__ import annotations

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.algorithms import step as step_lib
from unigrpo_jax.episodes import packing, phases
from unigrpo_jax.models import vae
from unigrpo_jax.recipe import checks
from unigrpo_jax.runtime import folders, hosts, metrics, resumption, runs, sharding
from unigrpo_jax.supervised import corpus, feed

RESUMABLE = resumption.RESUMABLE | {"limits"}

# Bounds of numbers; see `checks`.
NUMBERS: checks.Numbers = (
  ({"low": 0}, ("ce_weight", "mse_weight")),
  ({"low": 1}, (
    "sequences_per_step", "noise_draws", "label_chunk", "log_every", "limits.tokens",
    "limits.labels", "limits.images", "limits.patches", "limits.clean", "limits.latents",
  )),
  ({"above": 0}, ("timestep_shift",)),
  ({"low": 0, "high": 1}, ("drop_text", "drop_vit", "drop_vae")),
)


def train(config, workdir: pathlib.Path, devices=None) -> types.TrainState:
  """Runs the training that `config` describes, in or from `workdir`; returns its last state.

  Args:
    config: see `configs/sft.py`.
    workdir: holds the run's checkpoints and metrics.
    devices: to train on; None: all of them.

  Raises:
    InputError: the config or an example is impossible, or the run cannot go on; says why.
  """
  # --- Model, optimizer, examples.
  with hosts.raise_on_all_hosts():
    network = runs.open_network(config, devices)
    check_config(config, network.mesh)
    optimizer = runs.make_optimizer(config)
    examples = corpus.shards(config.data.folder) if config.data.folder else corpus.iconworld(
      dict(config.data.mixture), wrong_plan_rate=config.data.wrong_plan_rate
    )
  folder, tokenizer, mesh = network.folder, network.tokenizer, network.mesh
  ema_decay = config.ema_decay or None
  layout = runs.state_layout(network, optimizer, ema=ema_decay is not None, reference=False)

  # --- State: 1. resume, else 2. the folder's network, else 3. random weights.
  saved, state, record = runs.resume_or_start(
    workdir, config, network, optimizer, layout, RESUMABLE
  )
  plain = json.loads(config.to_json())
  run_id = runs.introduce(workdir, plain, network, state.params, record.get("run_id"))

  # --- Batches.
  batches = feed.Feed(
    examples, folder.config, tokenizer, make_encoder(folder),
    feed.Recipe(config.noise_draws, config.timestep_shift, config.drop_text, config.drop_vit,
                config.drop_vae, config.ce_weighting),
    padding(config), rows=config.microbatch // hosts.count(),
    microbatches=config.sequences_per_step // config.microbatch, seed=config.seed,
  )

  # --- The step.
  step_fn = jax.jit(
    step_lib.make_supervised_step(
      network.model, optimizer, ema_decay=ema_decay, ce_weight=config.ce_weight,
      mse_weight=config.mse_weight, label_chunk=config.label_chunk,
    ),
    donate_argnums=0, out_shardings=(layout[1], sharding.replicated(mesh)),
  )

  # --- The loop.
  first = int(state.step)
  print_start(config, network, state, workdir, first)
  with hosts.raise_on_all_hosts():
    log = runs.open_log(workdir, plain, run_id, first)
  clock = metrics.Clock(first, config.steps)
  record, values = {"config": plain, "run_id": run_id}, {}
  # Not where nothing was learnt yet, nor what diverged in a step that nobody looked at.
  worth = lambda: bool(values) and not runs.not_finite(jax.device_get(values))
  with (
    sharding.activate(mesh), runs.stop_on_signal() as stopping,
    contextlib.closing(batches.batches(first, config.steps)) as made,
  ):
    for number in range(first + 1, config.steps + 1):
      with runs.saving_before(saved, number, state, record, worth), hosts.raise_on_all_hosts():
        host_batch = next(made)
      state, values = step_fn(state, spread(host_batch, mesh, config.microbatch))
      stopped = hosts.any_host(stopping.is_set())
      tell = number % config.log_every == 0 or number in (first + 1, config.steps)
      save = number % config.checkpoint_every == 0 or number == config.steps or stopped
      if tell or save:
        values = jax.device_get(values)
        runs.check_finite(values, number, saved, kept=False)
      if tell:
        log.write(number, values)
        hosts.print_first(clock.line(number, {"ce": values["ce"], "mse": values["mse"]}))
      if save:
        saved.save(number, state, record)
      if stopped:
        hosts.print_first(f"stopped by a signal at step {number}; the same command goes on")
        break
    saved.close()
  log.close()
  if int(state.step) == config.steps:
    runs.finish(network, state, config, workdir)
  return state


def make_encoder(folder: folders.ModelFolder) -> feed.EncodeFn:
  """What encodes the feed's images: the folder's autoencoder, on one device.

  It runs in the feed's thread, and programs over all devices that two threads launch in different
  orders wait for each other for ever.
  """
  encoder = vae.VAE(folder.config.vae)
  params = folder.load_params(dtype=jnp.float32, parts=("vae",))["vae"]

  def encode(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    count, height, width, _ = pixels.shape
    # Few shapes, whatever the number of images: filled up to a multiple of 16, or to what fits.
    fill = min(count + -count % 16, max(phases.VAE_PIXELS // (height * width), 1))
    rows = np.arange(fill) % count
    latents = phases.encode_images(encoder, params, pixels[rows], noise[rows])
    return np.asarray(vae.pack_latents(latents, folder.config.latent_patch_size))[:count]

  return encode


def padding(config) -> packing.PadTo:
  """The sizes of a microbatch's arrays on this host, of whose rows it has a share."""
  sizes = dict(config.limits) | {"images": config.limits.images // hosts.count()}
  return packing.PadTo(noisy=config.noise_draws, **sizes)


def spread(batch: types.PackedBatch, mesh, rows: int) -> types.PackedBatch:
  """The batch of all hosts, on the devices, from what each of them made.

  Args:
    batch: this host's, [microbatches, its rows or ViT images, ...]; `vit_row` counts its own rows.
    mesh: devices.
    rows: of a microbatch, all hosts together.
  """
  own = np.flatnonzero(sharding.row_hosts(mesh, rows) == jax.process_index()).astype(np.int32)
  batch = batch.replace(vit_row=own[batch.vit_row])
  where = sharding.along_batch(mesh, axis=1)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)


def check_config(config, mesh) -> None:
  """Refuses what cannot run, before anything is loaded or compiled.

  Raises:
    InputError: names the key, its value, and what to do.
  """
  checks.check(config, {"ce_weighting": feed.CE_WEIGHTINGS}, NUMBERS)
  if config.sequences_per_step % config.microbatch:
    raise errors.InputError(
      f"config.sequences_per_step={config.sequences_per_step} is not a multiple of "
      f"config.microbatch={config.microbatch}; change one of them"
    )
  ways = sharding.batch_multiple(mesh)
  for key, size in (("microbatch", config.microbatch), ("limits.images", config.limits.images)):
    if size % ways or size % hosts.count():
      raise errors.InputError(
        f"config.{key}={size} does not divide over data x fsdp = {ways} devices and "
        f"{hosts.count()} hosts; make it a multiple of both"
      )
  shares = np.bincount(sharding.row_hosts(mesh, config.microbatch), minlength=hosts.count())
  if mesh.is_multi_process and shares.min() < shares.max():
    raise errors.InputError(
      f"config.mesh.tensor={config.mesh.tensor} joins devices of several hosts, which would each "
      "make the same examples; make it a divisor of a host's devices"
    )


def print_start(config, network: runs.Network, state, workdir, first: int) -> None:
  """What will run, before it compiles."""
  hosts.print_first("\n".join([
    runs.start_line(config, network, workdir, first),
    runs.device_line(network.mesh),
    f"a step: {config.sequences_per_step} sequences in "
    f"{config.sequences_per_step // config.microbatch} microbatch(es), "
    f"{config.noise_draws} noisy copies of each image",
    *runs.group_lines(config, state.params),
    "compiling the step",
  ]))
