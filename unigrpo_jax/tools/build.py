"""Makes a tiny BAGEL for IconWorld from scratch, as the embedded one was made.

  1. a tokenizer for IconWorld's prompts and reasonings, in the Qwen2 file format;
  2. a small FLUX autoencoder for its pictures;
  3. supervised training of the network: to think and draw (`configs/sft.py:tiny`), then to see as
     well (`configs/sft.py:tiny_look`);
  4. the official folder.

Each stage resumes where it was interrupted, and the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unigrpo_jax import errors, finetune
from unigrpo_jax.data import bpe, files
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.iconworld import prompts, renderer, tasks
from unigrpo_jax.models import bagel, vae
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.recipe import config_files, sft
from unigrpo_jax.runtime import checkpoints, folders, hosts, metrics, optim, sharding
from unigrpo_jax.runtime import run as run_lib

VOCABULARY = 640
LLM = {
  "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
  "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
  "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 1024,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}
VIT = {
  "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128,
  "num_attention_heads": 4, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8,
}
VAE = {
  "resolution": 32, "in_channels": 3, "downsample": 4, "ch": 32, "out_ch": 3,
  "ch_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 8,
}
BAGEL = {
  "latent_patch_size": 2, "max_latent_size": 4, "vit_max_num_patch_per_side": 4,
  "connector_act": "gelu_pytorch_tanh", "interpolate_pos": False, "timestep_shift": 1.0,
}
IMAGES = {
  "vae": {"max_image_size": 32, "min_image_size": 32, "image_stride": 8},
  "vit": {"max_image_size": 32, "min_image_size": 32, "image_stride": 8},
}
# Defaults of sampling.
GENERATION = {
  "num_timesteps": 25, "timestep_shift": 1.0, "cfg_text_scale": 2.0, "cfg_interval": [0.0, 1.0],
  "temperature": 1.0, "max_tokens": 64,
}


def write_base(folder: pathlib.Path, seed: int) -> None:
  """Writes the tokenizer and the configs of LLM and ViT."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng((seed, 1))
  examples = [prompts.sample(rng, "train") for _ in range(4000)]
  texts = [text for example in examples for text in (example.prompt, example.reasoning)]
  for example in examples:
    texts += [*tasks.question(rng, example.scene), tasks.edit(rng, example.scene)[0]]
  # Repeated so often that the system prompts, which many sequences begin with, take few tokens.
  texts += [tokenizer_lib.SYSTEM_PROMPT_GEN, tokenizer_lib.SYSTEM_PROMPT_VLM] * 400
  bpe.train_tokenizer(texts, VOCABULARY, folder)
  (folder / config_lib.LLM_FILE).write_text(json.dumps(LLM, indent=2) + "\n", encoding="utf-8")
  (folder / config_lib.VIT_FILE).write_text(json.dumps(VIT, indent=2) + "\n", encoding="utf-8")


def pictures(seed: int, step: int, count: int) -> np.ndarray:
  """Rendered scenes of the training split, [count, H, W, 3] float32 in [-1, 1]."""
  rng = np.random.default_rng((seed, 2, step))
  scenes = [prompts.sample(rng, "train").scene for _ in range(count)]
  return np.stack([images_lib.to_array(renderer.render(scene, rng)) for scene in scenes])


def train_vae(
  workdir: pathlib.Path, *, steps: int, rows: int, seed: int, checkpoint_every: int = 200
):
  """Trains the autoencoder on rendered scenes; resumes from its latest checkpoint.

  The objective is mean squared error + 1e-4 mean KL: up to a factor, the evidence lower bound for
  pixels of standard deviation 0.017 (Kingma and Welling 2014).

  Args:
    workdir: of its checkpoints.
    steps: optimizer steps.
    rows: scenes per step.
    seed: of everything.
    checkpoint_every: steps between checkpoints.

  Returns:
    (parameters, {"scale_factor", "shift_factor"} that normalise the latents).
  """
  values = {k: v for k, v in VAE.items() if k not in ("resolution", "downsample", "out_ch")}
  config = config_lib.VAEConfig(
    **(values | dict(ch_mult=tuple(VAE["ch_mult"]))), scale_factor=1.0, shift_factor=0.0
  )
  model = vae.VAE(config)
  optimizer = optax.adamw(optim.warmup_cosine(2e-3, 50, steps), weight_decay=0.0)

  def fresh():
    params = model.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))["params"]
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(params)}

  def loss_fn(params, images, noise):
    run = functools.partial(model.apply, {"params": params})
    mean, logvar = run(images, method="encode")
    latents = vae.latents_from_moments(mean, logvar, noise, scale=1.0, shift=0.0)
    error = jnp.mean((run(latents, method="decode") - images) ** 2)
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    return error + 1e-4 * kl, {"error": error, "kl": kl}

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, images):
    key = jax.random.fold_in(jax.random.key(seed), state["step"])
    side = 32 // config.downsample
    noise = jax.random.normal(key, (rows, side, side, config.z_channels))
    grads, values = jax.grad(loss_fn, has_aux=True)(state["params"], images, noise)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"step": state["step"] + 1, "params": params, "opt": opt}, values

  saved = checkpoints.TrainCheckpoints(workdir / "checkpoints", keep=1)
  where = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), jax.eval_shape(fresh)
  )
  state = fresh()
  if saved.steps:
    _, state = saved.newest(lambda step: saved.load(step, abstract))
  clock = metrics.Clock(int(state["step"]), steps)
  try:
    for step in range(int(state["step"]), steps):
      state, values = step_fn(state, pictures(seed, step, rows))
      if (step + 1) % 50 == 0:
        print("autoencoder", clock.line(step + 1, jax.device_get(values)), flush=True)
      if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
        saved.save(step + 1, state, {})
  finally:
    # Also when interrupted: waits for a save that is running.
    saved.close()
  encode = jax.jit(functools.partial(model.apply, {"params": state["params"]}, method="encode"))
  mean, logvar = encode(pictures(seed, steps, 256))
  spread = float(jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.exp(logvar))))
  return state["params"], {"scale_factor": 1.0 / spread, "shift_factor": float(mean.mean())}


def build(
  workdir: pathlib.Path, out: pathlib.Path, *, seed: int, vae_steps: int, vae_rows: int,
  overrides: Sequence[str], vae_checkpoint_every: int = 200, devices=None,
) -> None:
  """Runs all stages; see the module's docstring.

  Args:
    workdir: folder of the stages.
    out: official folder to make.
    seed: of everything.
    vae_steps, vae_rows, vae_checkpoint_every: see `train_vae`.
    overrides: `--config.KEY=VALUE` for both configs of the supervised training.
    devices: for the supervised training; None: all.

  Raises:
    InputError: an argument is impossible, or differs from those that the workdir was begun with.
      This is checked before anything is trained.
  """
  workdir = workdir.resolve()  # The configs contain its path, which must not depend on the cwd.
  file = config_files.FOLDER / "sft.py"
  first, look = (config_files.load(f"{file}:{name}", overrides) for name in ("tiny", "tiny_look"))
  for argument in overrides:
    key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
    if key in ("seed", "init_from", "random_init", "export_to"):
      raise errors.InputError(f"{argument}: the stages set config.{key} themselves; leave it out")
  for config in (first, look):
    sft.read(config)  # Before the autoencoder is trained.
  with errors.at("--out"):
    for stage in ("base", "draft", "vae", "sft", "first", "look"):
      folders.check_target(workdir / stage, out, overwrite=True)
  _check_arguments(workdir, {
    "seed": seed, "vae_steps": vae_steps, "vae_rows": vae_rows, "out": str(out.resolve()),
    "config": list(overrides),
  })
  make_base(
    workdir, seed=seed, vae_steps=vae_steps, vae_rows=vae_rows,
    vae_checkpoint_every=vae_checkpoint_every,
  )
  if not (workdir / "first").exists():
    first.seed, first.init_from, first.random_init = seed, str(workdir / "base"), True
    # In full precision, since the next stage continues from it.
    first.export_to, first.export_dtype = str(workdir / "first"), "float32"
    finetune.train(first, workdir / "sft", devices)
  if (workdir / "first").exists():  # Unless a signal stopped its training.
    look.seed, look.init_from = seed + 1, str(workdir / "first")
    look.export_to = str(out)
    finetune.train(look, workdir / "look", devices)


def _check_arguments(workdir: pathlib.Path, arguments: Mapping[str, Any]) -> None:
  """Records the arguments of a build; raises InputError where it was begun with others.

  Those of the supervised training may change until it begins.
  """
  record = workdir / "build.json"
  if record.exists():
    before = {"config": []} | config_lib.read_json(record)
    trains = any((workdir / stage).exists() for stage in ("sft", "first"))
    for name, value in arguments.items():
      if value != before.get(name) and (name != "config" or trains):
        raise errors.InputError(
          f"--{name}={value} but the build in {workdir} has {before.get(name)}; give it back its "
          "value, or choose a new --workdir"
        )
  elif pathlib.Path(arguments["out"]).exists():
    raise errors.InputError(f"--out={arguments['out']} exists already; choose another folder")
  run_lib.check_workdir(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  run_lib.write_json(record, arguments)


def make_base(
  workdir: pathlib.Path, *, seed: int, vae_steps: int, vae_rows: int,
  vae_checkpoint_every: int = 200,
) -> None:
  """Makes `workdir/base`: tokenizer, configs, trained autoencoder and a random network."""
  base = workdir / "base"
  if not (base / "ae.safetensors").exists():
    draft = workdir / "draft"
    write_base(draft, seed)
    params, scale = train_vae(
      workdir / "vae", steps=vae_steps, rows=vae_rows, seed=seed,
      checkpoint_every=vae_checkpoint_every,
    )
    rest = {
      "vae": VAE | scale, "bagel": BAGEL, "image_transforms": IMAGES, "generation": GENERATION
    }
    (draft / config_lib.BAGEL_FILE).write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")
    config = config_lib.read_config(draft)
    network = jax.jit(bagel.Bagel(config, (0, 1)).init)(
      jax.random.key(seed), bagel.example_batch(config)
    )
    folder = folders.ModelFolder(draft, "official", draft, config)
    folders.write_official(
      base, folder, {"bagel": sharding.unbox(network["params"]), "vae": params}, dtype=jnp.float32
    )
    print(f"wrote {base}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.build", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="--config.KEY=VALUE changes a key of both configs of the supervised training.",
  )
  add = parser.add_argument
  add("--workdir", type=files.local_path, required=True,
      help="folder of the stages; the same command resumes from it")
  add("--out", type=files.local_path, required=True, help="official folder to make")
  add("--seed", type=int, default=0, help="seed of all stages (default: %(default)s)")
  add("--vae_steps", type=int, default=3000,
      help="steps that train the autoencoder (default: %(default)s)")
  add("--vae_rows", type=int, default=32,
      help="pictures in each of these steps (default: %(default)s)")
  args, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  errors.require("--seed", args.seed, low=0, high=errors.SEED["high"] - 1)  # the look's is one more
  errors.require("--vae_steps", args.vae_steps, low=1)
  errors.require("--vae_rows", args.vae_rows, low=1)
  with hosts.hold(args.workdir, "--workdir"):
    build(
      args.workdir, args.out, seed=args.seed, vae_steps=args.vae_steps, vae_rows=args.vae_rows,
      overrides=overrides,
    )
