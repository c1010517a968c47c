"""Supervised fine-tuning, UniGRPO's first stage: text by cross entropy, images by velocity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.episodes import programs
from unigrpo_jax.models import lowering, vae
from unigrpo_jax.recipe import sft
from unigrpo_jax.runtime import folders, hosts, sharding, state, stopping
from unigrpo_jax.runtime import run as run_lib
from unigrpo_jax.supervised import corpus, feed
from unigrpo_jax.supervised import step as step_lib


@hosts.holds_workdir
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
    sft.check_fits(spec, network)
    examples, data, pinned = make_corpus(spec), spec.data, {}
    if data.folder:
      pinned["data.folder"] = corpus.fingerprint(data.folder)
  return learn(
    spec, workdir, network, examples, pinned=pinned, ce_weight=spec.ce_weight,
    mse_weight=spec.mse_weight, label_chunk=spec.label_chunk,
  )


def learn(
  spec: sft.Spec, workdir: pathlib.Path, network: state.Network, examples: corpus.Corpus, *,
  pinned: Mapping[str, Any], **loss: Any,
) -> types.TrainState:
  """Trains a network by examples, in or from `workdir`; returns its last state.

  Args:
    spec: of the run; see `sft.check_fits`.
    workdir: holds the run's checkpoints and metrics.
    network: what is trained.
    examples: what it learns.
    pinned: what must be the same when the run continues; see `Run`.
    loss: keywords of `step.make_supervised_step`: the loss and its weights.

  Raises:
    InputError: an example is impossible, or the run cannot continue; says why.
  """
  optimizer = spec.optimizer.make()
  layout = state.layout(
    network, optimizer, ema=spec.optimizer.ema_decay is not None, reference=False
  )
  with hosts.raise_on_all_hosts():
    pinned = state.pinned(spec.network, network) | dict(pinned)
  # A bad example may be mended or left out before the run goes on.
  run = run_lib.Run(
    workdir, spec.run, network, pinned=pinned, may_change={"data.folder"}, deferred_stop=True
  )
  train_state = run.restore(layout, lambda: state.first_state(
    network, optimizer, layout, random_init=spec.network.random_init, seed=spec.seed,
    adapter=spec.network.adapter,
  ))
  examples_feed = make_feed(spec, network, examples)
  step_fn = jax.jit(
    step_lib.make_supervised_step(
      network.model, optimizer, trained=spec.optimizer.trained,
      ema_decay=spec.optimizer.ema_decay, **loss,
    ),
    donate_argnums=0, out_shardings=(layout.shardings, sharding.replicated(network.mesh)),
    compiler_options=lowering.GATHERED_PARAMETERS.get(lowering.platform(network.mesh)),
  )
  run.print_start(train_state, spec.optimizer.learning_rate, [
    f"a step: {spec.sequences_per_step} sequences in "
    f"{spec.sequences_per_step // spec.microbatch} microbatch(es), "
    f"{spec.feed.noise_draws} noisy copies of each image",
  ])
  # A bad example raises when its batch is needed; of several hosts, the one that has it would leave
  # the others waiting. They agree on a stop one step after it is requested, so it looks two ahead.
  ahead = 0 if hosts.count() == 1 else 2
  steps = range(run.step, spec.run.steps)
  with contextlib.closing(feed.Prefetch(examples_feed.batch, steps)) as batches, run:
    _raise_if_bad(batches, ahead)
    try:
      for _ in run.steps():
        batch = put(batches.next(), network.mesh)
        train_state, metrics = step_fn(train_state, batch)
        if batches.error(ahead):
          run.request_stop()
        run.commit(train_state, metrics)
    except stopping.Stopped:
      _raise_if_bad(batches, ahead)
      raise
  run.finish(train_state)
  return train_state


@contextlib.contextmanager
def examples_beside(spec: sft.Spec | None, network: state.Network, steps: Iterable[int]):
  """What gives the examples of each of `steps` on the devices, in order; without a spec, None.

  Raises, within, on all hosts alike:
    InputError: the spec does not fit the devices, or an example is impossible.
  """
  if spec is None:
    yield lambda: None
    return
  with hosts.raise_on_all_hosts():
    sft.check_fits(spec, network)
    examples = make_corpus(spec)
  with contextlib.closing(feed.Prefetch(make_feed(spec, network, examples).batch, steps)) as made:
    def next_batch() -> types.PackedBatch:
      _raise_if_bad(made, 1)
      return put(made.next(), network.mesh)

    yield next_batch


def make_corpus(spec: sft.Spec) -> corpus.Corpus:
  data = spec.data
  return corpus.shards(data.folder, seed=spec.seed) if data.folder else corpus.iconworld(
    data.mixture, wrong_plan_rate=data.wrong_plan_rate
  )


def _raise_if_bad(batches: feed.Prefetch, count: int) -> None:
  """Raises on all hosts what is wrong with one of the next `count` batches of any of them."""
  with hosts.raise_on_all_hosts():
    if error := batches.error(count):
      raise error


def make_feed(spec: sft.Spec, network: state.Network, examples: corpus.Corpus) -> feed.Feed:
  """What makes this host's part of every batch."""
  is_local = sharding.row_hosts(network.mesh, spec.microbatch) == jax.process_index()
  limits = dataclasses.replace(spec.limits, images=spec.limits.images // hosts.count())
  return feed.Feed(
    examples, network.config, network.tokenizer, make_encoder(network.folder), spec.feed, limits,
    sequences_per_step=spec.sequences_per_step, microbatch=spec.microbatch,
    local_rows=np.flatnonzero(is_local).astype(np.int32), seed=spec.seed,
  )


def make_encoder(folder: folders.ModelFolder) -> feed.EncodeFn:
  """What encodes the feed's images: the folder's autoencoder, on this host's last device.

  It runs in the feed's thread, so on one device: programs over several devices that two threads
  launch in different orders wait for each other in a deadlock. The first device is the default of
  small programs.
  """
  encoder, device = vae.VAE(folder.config.vae), jax.local_devices()[-1]
  encode_images = programs.encode_images(device.platform)
  where = jax.sharding.SingleDeviceSharding(device)
  params = folder.load_params(dtype=jnp.float32, parts=("vae",), shardings=where)["vae"]

  def encode(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    count, height, width, _ = pixels.shape
    # Few shapes, whatever the number of images: filled up to a multiple of 16, or to what fits.
    fill = min(count + -count % 16, max(programs.VAE_PIXELS // (height * width), 1))
    rows = np.arange(fill) % count
    latents = encode_images(encoder, params, pixels[rows], noise[rows])
    return np.asarray(vae.pack_latents(latents, folder.config.latent_patch_size))[:count]

  return encode


def put(batch: types.PackedBatch, mesh) -> types.PackedBatch:
  """The batch of all hosts, on the devices, from each host's part of it; see `feed.Feed.batch`."""
  where = sharding.along_batch(mesh, axis=1)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)


def _refuse() -> None:
  raise errors.InputError(
    "no command; run python -m unigrpo_jax.train --config=configs/sft.py --workdir=WORKDIR"
  )


if __name__ == "__main__":
  errors.report(_refuse)
