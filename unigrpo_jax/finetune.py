"""Supervised fine-tuning, UniGRPO's first stage: text by cross entropy, images by velocity."""

from __future__ import annotations

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import types
from unigrpo_jax.episodes import programs
from unigrpo_jax.models import vae
from unigrpo_jax.recipe import sft
from unigrpo_jax.runtime import folders, hosts, sharding, state
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.supervised import corpus, feed
from unigrpo_jax.supervised import step as step_lib


def train(config, workdir: pathlib.Path, devices=None) -> types.TrainState:
  """Runs the training that `config` describes, in or from `workdir`; returns its last state.

  Args:
    config: see `configs/sft.py`.
    workdir: holds the run's checkpoints and metrics.
    devices: to train on; None: all of them.

  Raises:
    InputError: the config or an example is impossible, or the run cannot continue; says why.
  """
  with hosts.raise_on_all_hosts():
    spec = sft.read(config)
    network = state.open_network(spec.network, devices)
    sft.check_fits(spec, network.mesh)
    examples = corpus.shards(spec.data.folder) if spec.data.folder else corpus.iconworld(
      spec.data.mixture, wrong_plan_rate=spec.data.wrong_plan_rate
    )
  optimizer = spec.optimizer.make()
  layout = state.layout(
    network, optimizer, ema=spec.optimizer.ema_decay is not None, reference=False
  )
  run = run_lib.Run(workdir, spec.run, network)
  train_state = run.restore(layout, lambda: state.first_state(
    network, optimizer, layout, random_init=spec.network.random_init, seed=spec.network.seed
  ))
  batches = feed.Feed(
    examples, network.config, network.tokenizer, make_encoder(network.folder), spec.feed,
    spec.limits, rows=spec.microbatch // hosts.count(),
    microbatches=spec.sequences_per_step // spec.microbatch, seed=spec.seed,
  )
  step_fn = jax.jit(
    step_lib.make_supervised_step(
      network.model, optimizer, trained=spec.optimizer.trained,
      ema_decay=spec.optimizer.ema_decay, ce_weight=spec.ce_weight, mse_weight=spec.mse_weight,
      label_chunk=spec.label_chunk,
    ),
    donate_argnums=0, out_shardings=(layout.shardings, sharding.replicated(network.mesh)),
  )
  run.print_start(train_state, spec.optimizer.learning_rate, [
    f"a step: {spec.sequences_per_step} sequences in "
    f"{spec.sequences_per_step // spec.microbatch} microbatch(es), "
    f"{spec.feed.noise_draws} noisy copies of each image",
  ])
  with run, contextlib.closing(batches.batches(run.step, spec.run.steps)) as made:
    for _ in run.steps():
      with hosts.raise_on_all_hosts():
        batch = next(made)
      train_state, values = step_fn(train_state, spread(batch, network.mesh, spec.microbatch))
      run.commit(train_state, values)
  run.finish(train_state)
  return train_state


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
    fill = min(count + -count % 16, max(programs.VAE_PIXELS // (height * width), 1))
    rows = np.arange(fill) % count
    latents = programs.encode_images(encoder, params, pixels[rows], noise[rows])
    return np.asarray(vae.pack_latents(latents, folder.config.latent_patch_size))[:count]

  return encode


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
