"""Pictures that a policy draws, finished or as its late steps predict them, and VAE round trips."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from unigrpo_jax.data import images as images_lib
from unigrpo_jax.episodes import programs, requests, rollout
from unigrpo_jax.episodes import sampler as sampler_lib
from unigrpo_jax.iconworld import renderer
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.sampling import direct, flow

NOISE = 0.8  # of the SDE, as UniGRPO samples
SDE_STEPS, SDE_WITHIN = 3, 6  # steps with noise, and the first ones that they are among
PREDICTIONS = 2  # of each picture, by late steps
GUIDANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a policy draws.

  Attributes:
    think: it reasons first.
    guided: with guidance.
    points: of the time grid.
    noisy: by the SDE.
    late: what is kept is what late steps predict, not the finished picture.
  """

  think: bool
  guided: bool
  points: int
  noisy: bool = False
  late: bool = False


# Any two of these settings in all their combinations.
MODES = (
  Mode(think=True, guided=False, points=13, noisy=True),
  Mode(think=False, guided=True, points=13, noisy=True),
  Mode(think=True, guided=True, points=25),
  Mode(think=False, guided=False, points=25),
)
LATE_MODES = (
  Mode(think=True, guided=False, points=25, late=True),
  Mode(think=False, guided=False, points=13, late=True),
)


class Painter:
  """A checkpoint that draws prompts in groups."""

  def __init__(self, folder: str, devices=None):
    """Raises InputError where the folder cannot be used; loads its weights."""
    mesh = sharding.make_mesh(devices=devices or jax.local_devices()[:1])
    self.network = state.open_for_sampling(folder, mesh=mesh)
    params = self.network.folder.load_params(
      dtype={"bagel": self.network.model.dtype, "vae": np.float32},
      shardings=state.param_shardings(self.network.model, mesh, ("bagel", "vae")),
    )
    self._params, self._vae_params = params["bagel"], params["vae"]
    self._vae = vae_lib.VAE(self.network.config.vae)
    self._decode_floats = jax.jit(
      lambda params, latents: self._vae.apply({"params": params}, latents, method="decode")
    )

  def draw(
    self, examples: Sequence[Any], mode: Mode, *, group_size: int, seed: Sequence[int]
  ) -> np.ndarray:
    """Pictures of examples with `prompt`: [P, n, H, W, 3] uint8.

    n is `group_size`, times `PREDICTIONS` where they are of late steps.
    """
    defaults, size = self.network.config.generation, renderer.SIZE
    settings = requests.Settings(
      think=mode.think, num_timesteps=mode.points, shift=defaults.timestep_shift,
      guidance=flow.Guidance(GUIDANCE if mode.guided else 1.0, interval=(0.0, 1.0)),
      temperature=1.0, max_tokens=defaults.max_tokens,
    )
    spec = rollout.RolloutSpec(
      settings=settings, group_size=group_size, prompts_at_once=len(examples), prompt_tokens=40,
      height=size, width=size, sde=sampler_lib.SDE("flow", 0.0 if mode.late else NOISE),
    )
    rng = np.random.default_rng(seed)
    steps, rows = mode.points - 1, len(examples) * group_size
    first, last, count = (0, SDE_WITHIN, SDE_STEPS * mode.noisy)
    if mode.late:
      # An SDE without noise is the ODE, and records its steps.
      (first, last), count = direct.late_range(steps), PREDICTIONS
    window = np.stack([
      np.sort(rng.permutation(np.arange(first, last))[:count]) for _ in range(rows)
    ]).astype(np.int32)
    sampled = rollout.Rollout(self.network, None if mode.late else self._vae_params, spec)
    key = jax.random.key(int(rng.integers(2**31)))
    [(_, _, episode)] = sampled.sample_chunks(
      self._params, examples, key, window, lambda _: contextlib.nullcontext()
    )
    if not mode.late:
      pixels = np.stack(episode.read().images)
    else:
      pixels = self._predictions(jax.device_get(episode.flow))
    return pixels.reshape(len(examples), -1, *pixels.shape[1:])

  def _predictions(self, recorded) -> np.ndarray:
    """What each recorded step takes for the finished picture, x_t - t v: [B W, H, W, 3] uint8."""
    t, t_next = (a[..., None, None] for a in (recorded.t, recorded.t_next))
    v = (recorded.x_t - recorded.x_next) / (t - t_next)
    latents = direct.predict(recorded.x_t, v, recorded.t)
    return self._decode(latents.reshape(-1, *latents.shape[2:]))

  def _decode(self, latents: np.ndarray) -> np.ndarray:
    config = self.network.config
    side = renderer.SIZE // config.latent_stride
    grids = vae_lib.unpack_latents(latents, side, side, config.latent_patch_size)
    return np.asarray(programs.decode_images(self._vae, self._vae_params, grids))

  def round_trip(self, pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """What the autoencoder makes of pictures, [B, H, W, 3] uint8 in and out."""
    return np.asarray(vae_lib.to_uint8(self.decoded(pixels, seed)))

  def decoded(self, pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """The same, as the decoder gives it: float32, about [-1, 1], not clipped."""
    c = self.network.config.vae
    side = renderer.SIZE // c.downsample
    noise = np.random.default_rng(seed).standard_normal(
      (len(pixels), side, side, c.z_channels), np.float32
    )
    given = np.stack([images_lib.to_array(image) for image in pixels])
    latents = programs.encode_images(self._vae, self._vae_params, given, noise)
    return np.asarray(self._decode_floats(self._vae_params, latents))
