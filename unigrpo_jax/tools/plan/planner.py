"""Compiles the programs of an iteration of UniGRPO for chips that need not exist here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import prompts as prompt_sets
from unigrpo_jax.episodes import programs, rollout, script
from unigrpo_jax.episodes import sampler as sampler_lib
from unigrpo_jax.models import bagel, layers, vae
from unigrpo_jax.recipe import parts, rl
from unigrpo_jax.reward_models import host, learned
from unigrpo_jax.reward_models.clip import host as clip_host
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.tools import flops
from unigrpo_jax.tools.plan import plans

QUESTION_TOKENS = 16  # assumed length of a reward model's question, without the prompt


class Planner:
  """Plans a run from its spec and the sizes of its network."""

  def __init__(
    self, spec: rl.Spec, network: state.Network,
    progress: Callable[[str], None] = lambda name: None,
    only: Collection[str] = plans.PHASES, texts: pathlib.Path | None = None,
  ):
    """Checks the spec as training does; compiles nothing yet.

    Args:
      spec: of the run.
      network: its folder needs just a config, and its mesh may be of a topology that is only named.
      progress: called with the name of each program before it is compiled.
      only: phases to compile.
      texts: folder for the compiled programs' texts; None: they are not saved.

    Raises:
      InputError: the spec is impossible on this mesh.
    """
    parts.check_fits(spec, network)
    if spec.by_gradient and spec.refl.sft_weight:
      raise errors.InputError(
        f"config.refl.sft_weight={spec.refl.sft_weight}: supervised examples beside are not "
        "planned; set it to 0"
      )
    self.spec, self.network, self.mesh = spec, network, network.mesh
    self._progress, self._only, self._texts = progress, set(only), texts
    self._phases: dict[str, plans.Phase] = {}
    # All of this comes before the mesh is activated, on whose chips nothing can be computed.
    optimizer = spec.optimizer.make()
    layout = state.layout(
      network, optimizer, ema=spec.optimizer.ema_decay is not None,
      reference=spec.copies_reference, anchor=spec.anchored,
    )
    self.state = layout.abstract
    self.rollout = rollout.Rollout(network, None, spec.rollout)
    self.batch = self.rollout.prepare(["a"] * spec.rollout.prompts_at_once)
    self.vae_params = _params(self.rollout.network, "vae")
    self.algorithm = self._algorithm()
    self.update = parts.make_update(
      spec, network, self.algorithm, optimizer, self.rollout.grid, layout
    )
    self.chunks = spec.prompts.per_step // spec.rollout.prompts_at_once
    self.model_flops = self._model_flops()

  def _algorithm(self):
    """The run's algorithm. ReFL's reward model gets the network's sizes, and shapes as parameters.
    """
    network, spec = self.network, self.spec
    if not spec.by_gradient:
      return parts.make_algorithm(spec, network, self.rollout)
    reward_model, params = _reward_model(network)
    made = parts.make_algorithm(
      spec, network, self.rollout, reward_model=(reward_model, params)
    )
    length = spec.rollout.prompt_tokens + QUESTION_TOKENS
    ask = lambda prompts: learned.Questions(
      np.zeros((len(prompts), length), np.int32), np.full(len(prompts), length, np.int32)
    )
    fixed = {"reward_model": params, "vae": _params(network, "vae")}
    return dataclasses.replace(made, ask=ask, fixed=fixed)

  def run(self) -> plans.Plan:
    """Compiles the phases; returns the plan."""
    s = self.state
    self._held = {
      name: bytes_on_chip(tree) for name, tree in (
        ("parameters", s.params), ("optimizer", s.opt_state), ("moving average", s.ema),
        ("reference", s.reference), ("anchor", s.anchor), ("reward_model", self.algorithm.fixed),
      )
    }
    self._held["rewards"] = self._reward_bytes()
    with sharding.activate(self.rollout.network.mesh):
      chunk = self._compile_rollout()
    with sharding.activate(self.mesh):
      self._compile_update(chunk)
    return plans.Plan(
      dict(self.mesh.shape), dict(self.rollout.network.mesh.shape), self._held, self._phases,
      self.spec.trajectories,
    )

  def _reward_bytes(self) -> int:
    """What the rewards that run on the training's own devices take of the one that has most."""
    devices = list(self.mesh.devices.flat)
    taken = clip_bytes(self.spec.rewards, devices)
    if "reward_model" in self.spec.rewards.kinds.values():
      self._progress("reward_model")
      spec = dataclasses.replace(self.spec.network, lora=None, mesh=dict(data=1, fsdp=1, tensor=1))
      folder, tokenizer = self.network.folder, self.network.tokenizer
      network = state.build_network(spec, folder, tokenizer, devices[:1])
      made, r = _reward_model(network), self.spec.rollout
      with sharding.activate(network.mesh):
        taken += host.device_bytes(
          *made, (r.height, r.width), r.prompt_tokens + QUESTION_TOKENS
        )
    return taken

  def _compile_rollout(self) -> sampler_lib.Episode:
    """Compiles the programs of a chunk; returns the shapes of their results.

    The inputs of each program have the shardings that the compiler chose for the results of the
    one before it.
    """
    batch, sampler = self.batch, self.rollout.sampler
    run = sampler.programs(batch, self.spec.rollout.sde)
    self._compile("layout", sampler.cast, self.state.params, runs=1)
    params = jax.tree.map(
      _placed, jax.eval_shape(sampler.cast, self.state.params), sampler.layout
    )
    self._held["sampler"] = bytes_on_chip(params)
    inputs = self._by_rows(programs.Inputs(batch.texts))
    randomness = self._randomness()
    contexts = self._compile("read", run.prefill, params, inputs)
    text = None
    if batch.script.has(script.Sampled):
      if batch.copies > 1:
        contexts = self._compile("fork", run.fork, contexts)
      active = self._by_rows(np.ones(batch.rows, bool))
      text, main = self._compile(
        "decode", run.decode_text, params, contexts.main, randomness.text, active,
        trips=batch.settings.max_tokens,
      )
      # Decoding updates the cache in place: where it was not compiled, the sharding is as before.
      if "decode" in self._phases and self._phases["decode"].exceeds is None:
        contexts = contexts.replace(main=main)
    window = rl.window_steps(self.spec, 1)[:batch.rows]
    flow = self._compile(
      "denoise", run.denoise, params, contexts, randomness.noise, self._by_rows(batch.grid),
      randomness.steps, self._by_rows(window),
    )
    if "denoise" in self._phases:
      self._held["cache"] = bytes_on_chip(contexts.main)
    self._compile_vae()
    return sampler_lib.Episode(inputs, text, flow)

  def _randomness(self) -> sampler_lib.Randomness:
    """Shapes of the randomness: noise is sharded by rows, keys are replicated."""
    shapes = jax.eval_shape(lambda: self.rollout.randomness(jax.random.key(0), 0, self.batch))
    place = sharding.replicated(self.rollout.network.mesh)
    keys = {"text": _placed(shapes.text, place), "steps": _placed(shapes.steps, place)}
    return self._by_rows(shapes).replace(**keys)

  def _compile_vae(self) -> None:
    """Compiles the decoding of as many images as `Sampler` decodes at once."""
    c, r, rows = self.network.config.vae, self.spec.rollout, self.batch.rows
    spread = sharding.along_all if rows % self.mesh.size == 0 else sharding.along_batch
    place = spread(self.rollout.network.mesh)
    (share,) = place.shard_shape((rows,))
    at_once = min(self.rollout.sampler.images_at_once((r.height, r.width)), share)
    shape = (rows // share * at_once, r.height // c.downsample, r.width // c.downsample)
    latents = jax.ShapeDtypeStruct((*shape, c.z_channels), jnp.float32, sharding=place)
    self._compile(
      "vae", self.rollout.sampler.decode_images, self.vae_params, latents,
      runs=self.chunks * -(-share // at_once),
    )

  def _compile_update(self, chunk: sampler_lib.Episode) -> None:
    """Compiles the two programs of the update, for the experience of chunks like this one."""
    def experience(inputs, text, flow):
      episode = self.rollout.for_update(sampler_lib.Episode(inputs, text, flow))
      prompts = [prompt_sets.Prompt("a", {})] * self.spec.prompts.per_step
      return self.algorithm.experience([episode] * self.chunks, prompts, jax.random.key(0))

    experience = self._by_rows(
      jax.eval_shape(experience, chunk.inputs, chunk.text, chunk.flow), self.mesh
    )
    self._held["recorded"] = bytes_on_chip(experience)
    values = self._compile(
      "precompute", self.update.jitted_precompute, self.state, experience, runs=1, mesh=self.mesh
    )
    self._held["precomputed"] = bytes_on_chip(values)
    count = self.spec.trajectories
    adv, valid = self._by_rows((np.zeros(count, np.float32), np.ones(count, bool)), self.mesh)
    experience = experience.with_only(**values).replace(adv=adv, valid=valid)
    fixed = self.algorithm.fixed
    self._compile("update", self.update.jitted, self.state, experience, fixed, runs=1)

  def _compile(
    self, name: str, fn: Callable, *args, runs: int | None = None, trips: int = 1, mesh=None
  ):
    """Compiles a program, if its phase is wanted, and records the phase.

    "read" and "fork" are always compiled for decoding and denoising, which need the shardings of
    their results.

    Args:
      name: of the phase, or "fork".
      fn, *args: a jitted function, or a partial of one, and shapes of its arguments.
      runs: number of runs in an iteration; None: one per chunk.
      trips: number of trips of a loop that may end early.
      mesh: see `_by_rows`.

    Returns:
      The results as shapes with shardings: the compiler's, or by rows where the program was not
      compiled or does not fit.
    """
    results = None
    before = ("read", "fork") if {"decode", "denoise"} & self._only else ()
    if name in self._only or name in before:
      self._progress(name)
      phase, results = plans.compile_phase(
        name, fn, *args, runs=self.chunks if runs is None else runs, trips=trips,
        model_flops=self.model_flops.get(name), texts=self._texts,
      )
      if name in plans.PHASES:
        self._phases[name] = phase
    return self._by_rows(plans.result_shapes(fn, *args), mesh) if results is None else results

  def _by_rows(self, tree: Any, mesh=None) -> Any:
    """Shapes of arrays, sharded by rows over the batch of a mesh; None: the mesh for sampling."""
    mesh = mesh or self.rollout.network.mesh
    place = lambda a: (
      sharding.row_sharding(mesh, a.shape[0]) if a.ndim else sharding.replicated(mesh)
    )
    return jax.tree.map(lambda a: _placed(a, place(a)), tree)

  def _model_flops(self) -> dict[str, float]:
    """{phase: model FLOPs of an iteration}, with reasonings of full length.

    Those of the update include the forward pass that remat "full" repeats, but not the replays of
    other policies.
    """
    spec, s, count = self.spec, self.spec.rollout.settings, self.spec.trajectories
    sizes, tokens = flops.Sizes.of(self.network.config), s.max_tokens if s.think else 0
    shared = len(self.rollout.system_ids) + spec.rollout.prompt_tokens
    prefill = flops.text(sizes, shared)
    written = flops.decode(sizes, tokens, context=shared) * count
    velocity = flops.velocity(sizes, self.rollout.grid.ids.shape[1], context=shared + tokens)
    reads = parts.schedule(spec, self.mesh).group_parts * spec.rollout.prompt_copies(self.mesh)
    text = prefill * (reads * spec.prompts.per_step) + written
    image = velocity * (spec.steps_an_image * count)
    # With adapters, whose own FLOPs are not counted, the weights have no gradient.
    trained = set() if spec.network.lora else spec.optimizer.trained & set(flops.PARTS)
    forwards = 1 + (spec.network.remat == "full")
    epoch = forwards * image.forward + image.backward(trained & {"gen", "latent"})
    if spec.trains_text:
      epoch += forwards * text.forward + text.backward(trained & {"und", "text"})
    else:
      epoch += text.forward
    replays = (
      spec.needs_reference + bool(spec.anchored) + (spec.update.old_values == "recomputed")
    )
    return {
      "read": prefill.forward * spec.prompts.per_step, "decode": written.forward,
      "denoise": velocity.forward * (s.num_timesteps - 1) * count,
      "precompute": replays * (text.forward + image.forward),
      "update": spec.update.epochs * epoch,
    }


def clip_bytes(spec: rl.RewardsSpec, devices: Sequence[Any]) -> int:
  """What CLIPs that score on a training's own devices take of each of them."""
  own = sum(device.process_index == devices[0].process_index for device in devices)
  return sum(
    clip_host.device_bytes(kind, spec.options.get(name, {}), devices[0], own)
    for name, kind in spec.kinds.items() if kind in clip_host.RELEASES
  )


def _reward_model(network: state.Network) -> tuple[learned.RewardModel, Any]:
  """A reward model with the sizes of a network, and the shapes of its parameters on its mesh."""
  model = learned.RewardModel(
    network.model.clone(lora=None), network.tokenizer, yes_id=0, no_id=1,
    vit_max=network.config.vit_image.max_size,
  )
  params = layers.without(_params(network, "bagel"), bagel.DRAWING)
  return model, _cast(params, network.model.dtype)


def bytes_on_chip(tree: Any) -> int:
  """Bytes on one chip of a tree of arrays, or shapes, with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _params(network: state.Network, part: str) -> Any:
  """Shapes of the parameters of a part: "bagel", the network without adapters, or "vae"."""
  c, model = network.config, network.model.clone(lora=None)
  pixels = jnp.zeros((1, c.latent_stride, c.latent_stride, c.vae.in_channels))
  init, example = {
    "bagel": (model.init, bagel.example_batch(c)), "vae": (vae.VAE(c.vae).init, pixels),
  }[part]
  boxed = jax.eval_shape(init, jax.random.key(0), example)["params"]
  places = state.param_shardings(model, network.mesh, (part,))[part]
  return jax.tree.map(_placed, sharding.unbox(boxed), places)


def _cast(tree: Any, dtype) -> Any:
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding), tree)


def _placed(array, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
