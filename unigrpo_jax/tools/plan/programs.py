"""The programs of an iteration of UniGRPO, compiled for chips that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from unigrpo_jax import train
from unigrpo_jax.episodes import phases, pipeline, rollout
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.recipe import recipe
from unigrpo_jax.runtime import optim, runs, sharding
from unigrpo_jax.tools import flops
from unigrpo_jax.tools.plan import plans


def on_a_chip(tree: Any) -> int:
  """Bytes that a chip holds of arrays with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


class Planner:
  """A run's programs, from its config and the sizes of its network."""

  def __init__(self, config, network: runs.Network):
    """Checks the config as training does.

    Args:
      config: see `configs/unigrpo.py`.
      network: whose folder needs a config only, and whose mesh may be of chips that are not there.

    Raises:
      InputError: the config is impossible on this mesh.
    """
    recipe.check(config, network)
    self.config, self.network = config, network
    self.optimizer = runs.make_optimizer(config)
    self.state, where = runs.state_layout(
      network, self.optimizer, ema=config.ema_decay > 0,
      reference=recipe.copies_reference(config),
    )
    self.vae = vae_lib.VAE(network.folder.config.vae)
    self.sampler = rollout.Sampler(
      network.model, self.vae, None, network.tokenizer, network.mesh,
      recipe.rollout_settings(config, network.mesh),
    )
    self.sampled = _placed(
      jax.tree.map(lambda a: a.update(dtype=network.model.dtype), self.state.params),
      self.sampler.layout,
    )
    # Made before the mesh is active: there are no chips to compute anything on.
    self.update = recipe.make_update(config, network, self.optimizer, self.sampler, where)
    self.keys = jax.eval_shape(
      lambda: rollout.trajectory_keys(jax.random.key(0), 0, self.rows)
    )
    key, c = jax.random.key(0), network.folder.config
    pixels = jnp.zeros((1, c.latent_stride, c.latent_stride, c.vae.in_channels))
    self.vae_params = _placed(
      sharding.unbox(jax.eval_shape(self.vae.init, key, pixels)["params"]),
      pipeline.param_shardings(network.model, network.mesh, ("vae",))["vae"],
    )

  @property
  def rows(self) -> int:
    """Trajectories of a chunk."""
    return self.config.rollout.prompts_at_once * self.config.group_size

  @property
  def chunks(self) -> int:
    return self.config.prompts_per_step // self.config.rollout.prompts_at_once

  def run(
    self, progress: Callable[[str], None] = lambda name: None,
    only: Collection[str] = plans.PHASES, texts: pathlib.Path | None = None,
  ) -> plans.Plan:
    """Compiles phases.

    Args:
      progress: is told the name of each before it is compiled.
      only: which.
      texts: folder for the compiled texts; None keeps none.
    """
    self.progress, self.only, self.texts = progress, only, texts
    held, found = self._state_bytes(), {}
    with sharding.activate(self.network.mesh):
      for phase, more in self._phases():
        if phase is not None:
          found[phase.name] = phase
        held |= more
    mesh = dict(self.network.mesh.shape)
    return plans.Plan(mesh, held, found, recipe.trajectories_of(self.config))

  def _state_bytes(self) -> dict[str, int]:
    state = self.state
    held = {
      "parameters": state.params, "optimizer": state.opt_state, "moving average": state.ema,
      "reference": state.reference,
    }
    return {name: on_a_chip(tree) for name, tree in held.items()}

  def _phases(self) -> Iterator[tuple[plans.Phase | None, dict[str, int]]]:
    """Each phase as it is compiled, and the bytes of what it adds to a chip."""
    work, sampler, s = self._work(), self.sampler, self.sampler.settings
    _, phase = self._compile("layout", sampler.lay_out, self.state.params, runs=1)
    params = self.sampled
    yield phase, {"sampler": on_a_chip(params)}
    prompts = self.config.rollout.prompts_at_once * s.prompt_copies
    inputs = phases.Inputs(
      prompt_ids=self._rows(jnp.int32, prompts, s.prompt_tokens),
      prompt_mask=self._rows(bool, prompts, s.prompt_tokens), system_ids=sampler.system_ids,
    )
    # What each phase reads comes from the one before it, laid out as the compiler left it.
    contexts, phase = self._compile(
      "read", sampler.read, params, inputs, runs=self.chunks, model_flops=work["read"]
    )
    yield phase, {}
    written = None
    if s.think:
      contexts, _ = self._compile("fork", sampler.fork, contexts, runs=self.chunks)
      out, phase = self._compile(
        "decode", sampler.write, params, contexts.main, self._keys("text"), None,
        runs=self.chunks, model_flops=work["decode"], trips=s.max_tokens,
      )
      yield phase, {}
      written, main = out
      # An update in place: where it was not compiled, it is as it was before.
      contexts = contexts if phase is None else contexts.replace(main=main)
    steps = self._rows(jnp.int32, self.rows, self.config.rollout.window_size)
    grid = jax.tree.map(
      lambda a: self._rows(a.dtype, self.rows, *a.shape[1:]), sampler.grid
    )
    drawn, phase = self._compile(
      "denoise", sampler.explore, params, contexts, self._keys("image"), steps, grid,
      runs=self.chunks, model_flops=work["denoise"],
    )
    yield phase, {} if phase is None else {"cache": on_a_chip(contexts.main)}
    yield self._vae(), {}
    parts = [(inputs.prompt_ids, inputs.prompt_mask, written, drawn)] * self.chunks
    count = recipe.trajectories_of(self.config)
    experience = jax.eval_shape(
      train.join, parts, self._rows(jnp.float32, count), self._rows(bool, count)
    )
    experience = jax.tree.map(lambda a: self._rows(a.dtype, *a.shape), experience)
    _, phase = self._compile(
      "update", self.update, self.state, experience, runs=1, model_flops=work["update"]
    )
    yield phase, {"recorded": on_a_chip(experience)}

  def _compile(self, name, fn, *args, runs, model_flops=None, trips=1):
    """(results, phase) of a program; the phase is None where it is not asked for.

    Results of what was not compiled, or does not fit, are laid out by rows. What thinking and
    drawing read is always compiled with them, since only the compiler knows its layout.
    """
    phase = results = None
    before = ("read", "fork") if {"decode", "denoise"} & set(self.only) else ()
    if name in self.only or name in before:
      self.progress(name)
      phase, results = plans.compile_phase(
        name, fn, *args, runs=runs, model_flops=model_flops, trips=trips, texts=self.texts
      )
    if results is None:
      by_rows = lambda a: self._rows(a.dtype, *a.shape) if a.ndim else a
      results = jax.tree.map(by_rows, jax.eval_shape(fn, *args))
    return results, phase

  def _vae(self) -> plans.Phase | None:
    r, c = self.config.rollout, self.network.folder.config
    at_once = min(self.sampler.images_at_once * self.network.mesh.size, self.rows)
    latents = jax.ShapeDtypeStruct(
      (at_once, r.height // c.vae.downsample, r.width // c.vae.downsample, c.vae.z_channels),
      jnp.float32, sharding=sharding.along_all(self.network.mesh),
    )
    return self._compile(
      "vae", self.sampler.decode_images, self.vae_params, latents,
      runs=self.chunks * -(-self.rows // at_once),
    )[1]

  def _rows(self, dtype, *shape) -> jax.ShapeDtypeStruct:
    place = sharding.row_sharding(self.network.mesh, shape[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def _keys(self, name: str) -> jax.ShapeDtypeStruct:
    key = self.keys[name]
    place = sharding.replicated(self.network.mesh)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)

  def _work(self) -> dict[str, float]:
    """Model FLOPs of the phases in an iteration; reasonings as long as they may be.

    Those of the update contain the forward that `remat` computes again.
    """
    c, network = self.config, self.network
    sizes, r = flops.Sizes.of(network.folder.config), c.rollout
    system = 0 if self.sampler.system_ids is None else len(self.sampler.system_ids)
    before, tokens = system + r.prompt_tokens, r.max_tokens if r.think else 0
    latents = self.sampler.grid.ids.shape[1]
    count = recipe.trajectories_of(c)
    drawn = flops.velocity(sizes, latents, context=before + tokens)
    # Under adapters, whose own products are not counted, the weights have no gradient.
    trained = set() if c.lora.rank else optim.trained(c.learning_rate) & set(flops.PARTS)
    parts = recipe.schedule(c, network.mesh).group_parts * self.sampler.settings.prompt_copies
    read = flops.text(sizes, before) * (parts * c.prompts_per_step)
    write = flops.text(sizes, tokens, context=before, scored=tokens) * count
    said = read + write
    image = drawn * (r.window_size * count if c.flow.train else 0)
    once_more = int(c.remat)
    if c.text.train and r.think:
      epoch = said.update(trained & {"und", "text"}) + once_more * said.forward
    else:
      epoch = said.forward
    epoch += image.update(trained & {"gen", "latent"}) + once_more * image.forward
    update = c.epochs * epoch
    if recipe.needs_reference(c):
      update += said.forward + image.forward
    return {
      "read": flops.text(sizes, before).forward * c.prompts_per_step,
      "decode": flops.decode(sizes, tokens, context=before).forward * count,
      "denoise": drawn.forward * (r.num_timesteps - 1) * count,
      "update": update,
    }


def _placed(tree: Any, places: Any) -> Any:
  return jax.tree.map(
    lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, places
  )
