"""Images from text: one velocity, and whole sampling loops with and without guidance."""

from __future__ import annotations

import ast
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases, network
from unigrpo_jax import types
from unigrpo_jax.models import vae
from unigrpo_jax.sampling import flow

# The officials' names of what `flow.Guidance` holds.
GUIDANCE_KEYS = {
  "cfg_text_scale": "text_scale",
  "cfg_img_scale": "image_scale",
  "cfg_interval": "interval",
  "cfg_renorm_type": "renorm",
  "cfg_renorm_min": "renorm_min",
}
NO_GUIDANCE = flow.Guidance(text_scale=1.0)


def guidance_from(settings: dict) -> flow.Guidance:
  """Guidance of the official argument names; raises NotCovered where one is missing.

  The renorm's lower bound may be missing: the official inferencer's default is 0.
  """
  settings = {"cfg_renorm_min": 0.0} | settings
  missing = [key for key in GUIDANCE_KEYS if key not in settings]
  if missing:
    raise cases.NotCovered(f"no record of {', '.join(missing)}")
  values = {ours: settings[theirs] for theirs, ours in GUIDANCE_KEYS.items()}
  return flow.Guidance(**values | {"interval": tuple(values["interval"])}, pack_coupled=True)


def check_active(rec: cases.Recording, case: str, key: str, guidance: flow.Guidance, times) -> None:
  """Compares the times at which guidance acts."""
  acts = active(guidance, times)
  # At a text scale of 1 a recording may hold the test of the interval, which then has no effect.
  interval = active(dataclasses.replace(guidance, text_scale=2.0), times)
  if guidance.text_scale <= 1 and np.array_equal(rec.get(key, acts), interval):
    acts = interval
  rec.check(case, key, acts, cases.EXACT)


def active(guidance: flow.Guidance, times) -> np.ndarray:
  """Whether guidance acts at each time: whether the text branch changes the result."""
  v = jnp.array([[[1.0, 0.0]]])
  combined = flow.guided(lambda x, t: v, lambda x, t: v[..., ::-1], lambda x, t: v, guidance)
  changed = lambda t: (combined(v, t) != v).any()
  return np.asarray(network.compiled(lambda times: jax.lax.map(changed, times))(times), np.int32)


class Pack:
  """The images of a recording: packed arrays in, padded rows to the network and back."""

  def __init__(self, net: network.Network, sizes):
    self.sizes = [(int(height), int(width)) for height, width in sizes]
    self.grid = net.latent_grid(self.sizes)
    self.lengths = self.grid.mask.sum(1)

  def rows(self, packed):
    """[sum of I, C] -> [M, I, C]."""
    return network.pad(network.split(packed, self.lengths), self.grid.mask.shape[1])[0]

  def packed(self, padded):
    """[M, I, C], or [steps, M, I, C], -> [..., sum of I, C]."""
    padded = np.asarray(padded)
    if padded.ndim == 4:
      return np.stack([self.packed(step) for step in padded])
    return network.unpad(padded, self.grid.mask)


def texts_context(net: network.Network, rec: cases.Recording, name: str) -> types.Context:
  """Context of `in_{name}_ids`, a row a sample; without lengths it is one sample."""
  ids = rec[f"in_{name}_ids"]
  lengths = rec.get(f"in_{name}_lens", [len(ids)])
  context = net.empty(len(lengths), max(lengths))
  return net.append_text(context, network.split(ids, lengths))[0]


def time_grid(rec: cases.Recording):
  return flow.time_grid(rec.number("in_num_timesteps"), rec.number("in_timestep_shift"))


def check_steps(rec: cases.Recording, times) -> None:
  rec.check("schedule", "out_t", times[:-1], cases.FORMULA)
  # A difference of numbers up to 1: 1e-6 of the times, not of their difference.
  rec.check("steps", "out_dt", times[:-1] - times[1:], cases.Tolerance(1e-6, 0.0))


@cases.case("e_t2i_velocity")
def velocity(folder, rec):
  net = folder.network
  context = texts_context(net, rec, "prompt")
  network.check_cache(rec, "cache", context)
  pack = Pack(net, rec["in_image_sizes"])
  x, t = pack.rows(rec["in_x_t"]), np.broadcast_to(rec["in_t"], len(pack.sizes))
  v, (und, gen) = net.velocity(context, x, t, pack.grid)
  rec.check("velocity", "out_velocity", pack.packed(v), cases.MODEL)
  hidden = [np.concatenate([u[:1], g[:n], u[1:]])
            for u, g, n in zip(np.asarray(und), np.asarray(gen), pack.lengths)]
  rec.check("velocity", "out_query_hidden", np.concatenate(hidden), cases.MODEL)
  v, _ = net.velocity(context, x, 0.0, pack.grid)
  rec.check("velocity", "out_velocity_t0", pack.packed(v), cases.MODEL)
  for m in rec.matches(r"out_velocity_single(\d+)"):
    i = int(m[1])
    alone = Pack(net, pack.sizes[i : i + 1])
    v, _ = net.velocity(
      network.rows(context, i, i + 1), x[i : i + 1, : pack.lengths[i]], t[i : i + 1], alone.grid
    )
    rec.check("alone", m[0], v[0], cases.MODEL)


@cases.case("e_t2i_velocity")
def layout(folder, rec):
  net = folder.network
  context = texts_context(net, rec, "prompt")
  pack = Pack(net, rec["in_image_sizes"])
  rec.check("layout", "aux_packed_vae_position_ids", pack.packed(pack.grid.ids), cases.EXACT)
  rec.check("layout", "aux_packed_seqlens", pack.lengths + 2, cases.EXACT)
  rec.check("layout", "aux_packed_position_ids",
            np.repeat(context.position, pack.lengths + 2), cases.EXACT)
  rec.check("layout", "aux_key_values_lens", network.cached(context, 0)[2], cases.EXACT)


@cases.case("f_generate_nocfg")
def without_guidance(folder, rec):
  net = folder.network
  context = texts_context(net, rec, "prompt")
  pack = Pack(net, rec["in_image_sizes"])
  times = time_grid(rec)
  check_steps(rec, times)
  noise = pack.rows(rec["in_init_noise"])
  xs, vs = net.integrate((context, None, None), noise, pack.grid, times, NO_GUIDANCE)
  rec.check("loop", "out_x", pack.packed(xs), cases.LOOP)
  rec.check("loop", "out_v", pack.packed(vs), cases.LOOP)
  for m in rec.matches(r"out_image(\d*)_uint8"):
    i = int(m[1] or 0)
    picture = net.picture(xs[-1, i, : pack.lengths[i]], *pack.sizes[i])
    rec.check("image", m[0], picture, cases.PIXELS)


@cases.case("g_generate_cfg", "g2_generate_cfg_pack")
def guided_runs(folder, rec):
  net = folder.network
  main = texts_context(net, rec, "prompt")
  # The official text-to-image path: nothing without the text, and no image to leave out.
  contexts = main, net.empty(main.order.shape[0], 1), main
  pack = Pack(net, rec["in_image_sizes"])
  times = time_grid(rec)
  check_steps(rec, times)
  noise = pack.rows(rec["in_init_noise"])
  branches = {}
  for name, context in zip(("cond", "text_uncond", "img_uncond"), contexts):
    branches[name] = pack.packed(net.velocity(context, noise, times[0], pack.grid)[0])
  for run in dict.fromkeys(m[1] for m in rec.matches(r"(.+?)__out_.+")):
    settings = run_settings(folder, rec.name, run)
    if settings is None:
      rec.not_covered(run, f"README.md has no [run {run}: {{...}}]")
      continue
    guidance = guidance_from(settings)
    xs, vs = net.integrate(contexts, noise, pack.grid, times, guidance)
    rec.check(run, f"{run}__out_x", pack.packed(xs), cases.LOOP)
    rec.check(run, f"{run}__out_v", pack.packed(vs), cases.LOOP)
    check_active(rec, f"{run}/active", f"{run}__out_cfg_active", guidance, times[:-1])
    for name, velocity in branches.items():
      rec.check(f"{run}/first_step", f"{run}__out_first_step_v_{name}", velocity, cases.MODEL)


def run_settings(folder, file: str, run: str) -> dict | None:
  """The arguments of a run, which only the README records: `[run name: {...}]`."""
  found = re.search(rf"\[run {re.escape(run)}: (\{{.*?\}})\]", folder.readme.section(file))
  return ast.literal_eval(found[1]) if found else None


@cases.case("g3_negative_prompt")
def negative_prompt(folder, rec):
  net = folder.network
  main = texts_context(net, rec, "prompt")
  negative = texts_context(net, rec, "negative")
  pack = Pack(net, rec["in_image_sizes"])
  times = time_grid(rec)
  check_steps(rec, times)
  noise = pack.rows(rec["in_init_noise"])
  # The section's title is the record of the renorm; guidance acts at every step.
  renorm = re.search(r"(\w+) renorm", folder.readme.title(rec.name))
  if renorm is None:
    raise cases.NotCovered("README.md does not say which renorm")
  guidance = flow.Guidance(
    rec.number("in_cfg_text_scale"), interval=(0.0, 1.0), renorm=renorm[1], pack_coupled=True
  )
  v, v_text = (net.velocity(c, noise, times[0], pack.grid)[0] for c in (main, negative))
  rec.check("first_step", "out_first_step_v_cond", pack.packed(v), cases.MODEL)
  rec.check("first_step", "out_first_step_v_text_uncond", pack.packed(v_text), cases.MODEL)
  raw = flow.guide(v, v_text, None, dataclasses.replace(guidance, renorm_min=1.0))
  ratio = np.linalg.norm(pack.packed(v), axis=-1) / np.linalg.norm(pack.packed(raw), axis=-1)
  rec.check("first_step", "out_first_step_raw_ratio", ratio, cases.MODEL)
  xs, vs = net.integrate((main, negative, None), noise, pack.grid, times, guidance)
  rec.check("loop", "out_x", pack.packed(xs), cases.LOOP)
  rec.check("loop", "out_v", pack.packed(vs), cases.LOOP)


def pack_tokens(net: network.Network, latents: np.ndarray) -> np.ndarray:
  """[M, h, w, z] -> latent tokens [M, I, C]."""
  return np.asarray(vae.pack_latents(latents, net.config.latent_patch_size))
