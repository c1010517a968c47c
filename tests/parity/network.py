"""The network of a recorded folder, loaded when first asked for, with its methods compiled."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from unigrpo_jax import types
from unigrpo_jax.data import images, tokenizer
from unigrpo_jax.models import bagel, lowering, vae, weights
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import folders, sharding
from unigrpo_jax.sampling import flow, text

# Lengths are rounded up to these, so that most cases share a compiled program; the padding is a
# test of its own.
TEXT_MULTIPLE = 16
CACHE_MULTIPLE = 512


def compiled(function):
  """jit. A run compiles some fifty small programs and runs each once or twice: quickly is best."""
  quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(function, compiler_options=quick)


class Folder:
  """A folder of recordings and what its files say about the network."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.readme = cases.Readme(path)

  @functools.cached_property
  def config(self) -> config_lib.BagelConfig:
    for name in (config_lib.LLM_FILE, config_lib.VIT_FILE):
      if not (self.path / name).is_file():
        raise cases.NotCovered(f"the folder has no {name}")
    return config_lib.read_config(self.path)

  @functools.cached_property
  def special_ids(self) -> dict[str, int]:
    if not (self.path / config_lib.BAGEL_FILE).is_file():
      raise cases.NotCovered(f"the folder has no {config_lib.BAGEL_FILE}")
    return json.loads((self.path / config_lib.BAGEL_FILE).read_text())["special_token_ids"]

  @property
  def image_markers(self) -> tuple[int, int]:
    return self.special_ids["start_of_image"], self.special_ids["end_of_image"]

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.load(self.path)

  @functools.cached_property
  def network(self) -> Network:
    return Network(self)


class Network:
  """BAGEL and its VAE in float32, over rows of contexts.

  Attributes:
    config: sizes.
    model: the network without its VAE.
    params: {"bagel", "vae"}.
  """

  def __init__(self, folder: Folder):
    for file in weights.FILES.values():
      if not (folder.path / file).is_file():
        raise cases.NotCovered(f"the folder has no {file}")
    self.config = folder.config
    # As it runs on these devices.
    self.model = bagel.Bagel(
      self.config, folder.image_markers, dtype=jnp.float32,
      lowering=lowering.choose("auto", sharding.make_mesh(devices=jax.devices()[:1]), jnp.float32),
    )
    self.params = folders.open_folder(folder.path).load_params(dtype=jnp.float32)
    self.vae = vae.VAE(self.config.vae)
    self._compiled = {}

  def apply(self, method: str, *args, **static):
    """A method of the network, compiled once a shape; keyword arguments are static."""
    key = (method, *static.items())
    if key not in self._compiled:
      self._compiled[key] = compiled(
        lambda params, *args: self.model.apply({"params": params}, *args, method=method, **static)
      )
    return self._compiled[key](self.params["bagel"], *args)

  # Contexts.

  def empty(self, rows: int, tokens: int) -> types.Context:
    """Empty contexts with room for `tokens` each and the padding of some texts."""
    room = tokens + 4 * TEXT_MULTIPLE
    capacity = -(-room // CACHE_MULTIPLE) * CACHE_MULTIPLE
    context = bagel.empty_context(self.config, rows, capacity, jnp.float32)
    # Placed like the results of a compiled method, or each method would compile once for either.
    return jax.device_put(context, jax.devices()[0])

  def append_text(self, context: types.Context, texts: list[np.ndarray]):
    """Appends a text a row, padded: (context, hidden states of each row's own tokens)."""
    length = -(-max(map(len, texts)) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    ids, mask = pad(texts, length)
    context, hidden = self.apply("append_text", context, ids, mask)
    return context, [np.asarray(row)[: len(text)] for row, text in zip(hidden, texts)]

  def logits(self, hidden: np.ndarray) -> np.ndarray:
    """[T, D] -> [T, V]."""
    length = -(-len(hidden) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    padded = np.pad(hidden, ((0, length - len(hidden)), (0, 0)))
    return np.asarray(self.apply("logits", padded))[: len(hidden)]

  def greedy(self, context: types.Context, start: int, end: int, max_tokens: int):
    """Decodes at most `max_tokens` > 0 tokens a row at temperature 0: `TextRollout`."""
    def run(params, context):
      def step(context, ids, active):
        context, hidden = self.model.apply(
          {"params": params}, context, ids[:, None], active[:, None], method="append_text"
        )
        return context, self.model.apply({"params": params}, hidden[:, 0], method="logits")

      rows = context.order.shape[0]
      return text.sample(
        step, context, keys=jax.random.split(jax.random.key(0), rows), start_id=start, end_id=end,
        max_tokens=max_tokens, temperature=0.0,
      )[0]

    key = ("greedy", start, end, max_tokens)
    self._compiled.setdefault(key, compiled(run))
    return self._compiled[key](self.params["bagel"], context)

  # Images.

  def latent_grid(self, sizes) -> types.LatentGrid:
    """Places of the latent tokens of images of `sizes` (H, W) pixels, padded to the longest."""
    ids = [
      images.position_ids(
        int(height), int(width), self.config.latent_stride, self.config.max_latent_size,
        self.config.interpolate_pos,
      )
      for height, width in sizes
    ]
    return types.LatentGrid(*pad(ids, max(map(len, ids))))

  def velocity(self, context: types.Context | None, x, t, grid: types.LatentGrid):
    """Velocities and hidden states of padded images, all at time t or each at its own."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
    return self.apply("velocity", context, x, t, grid, return_hidden=True)

  def integrate(self, contexts, noise, grid: types.LatentGrid, times, guidance: flow.Guidance):
    """Integrates the flow over (main, text-CFG, image-CFG) contexts, recording every step.

    Returns:
      (x before each step and the last one [N, M, I, C], velocities [N - 1, M, I, C]).
    """
    def run(params, contexts, noise, grid, times):
      def under(context):
        return lambda x, t: self.model.apply(
          {"params": params}, context, x, jnp.full(x.shape[0], t), grid, method="velocity"
        )

      velocity_fn = flow.guided(*map(under, contexts), guidance)
      return flow.integrate(velocity_fn, noise, times, record=True)

    key = ("integrate", guidance)
    self._compiled.setdefault(key, compiled(run))
    x, (xs, vs) = self._compiled[key](self.params["bagel"], contexts, noise, grid, times)
    return np.concatenate([xs, x[None]]), np.asarray(vs)

  def encode_image(self, images) -> tuple[np.ndarray, np.ndarray]:
    """[M, 3, H, W] -> posterior mean and log-variance [M, h, w, z]."""
    key = "encode_image"
    self._compiled.setdefault(
      key, compiled(lambda p, x: self.vae.apply({"params": p}, x, method="encode"))
    )
    return self._compiled[key](self.params["vae"], np.moveaxis(images, 1, -1))

  def latents(self, mean, logvar, noise) -> np.ndarray:
    """Latents in model units from posterior moments; noise as recorded [M, z, h, w], or None."""
    noise = None if noise is None else np.moveaxis(noise, 1, -1)
    scale, shift = self.config.vae.scale_factor, self.config.vae.shift_factor
    return np.asarray(vae.latents_from_moments(mean, logvar, noise, scale=scale, shift=shift))

  def decode_image(self, latents) -> np.ndarray:
    """[M, h, w, z] -> [M, H, W, 3]."""
    key = "decode_image"
    self._compiled.setdefault(
      key, compiled(lambda p, x: self.vae.apply({"params": p}, x, method="decode"))
    )
    return np.asarray(self._compiled[key](self.params["vae"], latents))

  def picture(self, tokens, height: int, width: int) -> np.ndarray:
    """Latent tokens [I, C] of an image -> uint8 [H, W, 3]."""
    stride = self.config.latent_stride
    latents = vae.unpack_latents(
      tokens[None], height // stride, width // stride, self.config.latent_patch_size
    )
    return np.asarray(vae.to_uint8(self.decode_image(latents)))[0]


def pad(arrays: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of different lengths -> ([B, length, ...], mask [B, length])."""
  padded = [np.pad(a, [(0, length - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
  return np.stack(padded), np.arange(length) < np.array([len(a) for a in arrays])[:, None]


def split(packed: np.ndarray, lengths) -> list[np.ndarray]:
  """Packed tokens -> one array a sample."""
  return np.split(packed, np.cumsum(lengths)[:-1])


def unpad(padded, mask) -> np.ndarray:
  """[B, T, ...] -> the packed tokens of all rows, one row after the other."""
  return np.asarray(padded)[np.asarray(mask)]


def rows(context: types.Context, start: int, stop: int) -> types.Context:
  """Some rows of a context."""
  return context.replace(
    k=context.k[:, start:stop], v=context.v[:, start:stop], order=context.order[start:stop],
    position=context.position[start:stop],
  )


def cached(context: types.Context, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Keys and values of a layer in sequence order, row after row, and each row's length."""
  order = np.asarray(context.order)
  lengths = (order != types.UNSEEN).sum(1)
  slots = np.argsort(order, axis=1, kind="stable")
  pick = lambda cache: np.concatenate(
    [np.asarray(cache[layer, b])[:, slots[b, :n]].swapaxes(0, 1) for b, n in enumerate(lengths)]
  )
  return pick(context.k), pick(context.v), lengths


def check_cache(recording: cases.Recording, case: str, context: types.Context, name: str = ""):
  """Compares every recorded layer of a cache: `out_{name}key_cache_l{i}` and its values."""
  for found in recording.matches(rf"out_{name}(key|value)_cache_l(\d+)"):
    keys, values, _ = cached(context, int(found[2]))
    recording.check(case, found[0], keys if found[1] == "key" else values, cases.MODEL)
