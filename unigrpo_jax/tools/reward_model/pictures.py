"""Pictures by a policy: finished ones, predictions of late denoising steps, and VAE round trips."""

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
from unigrpo_jax.models import lowering
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.runtime import sharding, state
from unigrpo_jax.sampling import direct, flow

NOISE = 0.8  # noise level of the SDE, as in UniGRPO
SDE_STEPS, SDE_WITHIN = 3, 6  # number of steps with noise, chosen from the first so many
PREDICTIONS = 2  # number of late steps per picture whose predictions are kept
GUIDANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a policy draws.

  Attributes:
    think: whether it reasons first.
    guided: whether guidance is used.
    points: number of points of the time grid.
    noisy: whether some steps are those of the SDE.
    late: whether predictions of late steps are kept instead of the finished picture.
  """

  think: bool
  guided: bool
  points: int
  noisy: bool = False
  late: bool = False


# Any two of think, guided and (points, noisy) occur in all combinations.
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
    """Loads a checkpoint; raises InputError where its folder cannot be used."""
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
    """Draws pictures.

    Args:
      examples: P objects with `prompt`.
      mode: how to draw.
      group_size: trajectories per prompt.
      seed: of everything.

    Returns:
      [P, n, H, W, 3] uint8, n = `group_size`, times `PREDICTIONS` in modes with `late`.
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
      # An SDE with noise level 0 is the ODE, of which it records steps.
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
    """The finished picture that each recorded step predicts, x_t - t v: [B W, H, W, 3] uint8."""
    t, t_next = (a[..., None, None] for a in (recorded.t, recorded.t_next))
    v = (recorded.x_t - recorded.x_next) / (t - t_next)
    latents = direct.predict(recorded.x_t, v, recorded.t)
    return self._decode(latents.reshape(-1, *latents.shape[2:]))

  def _decode(self, latents: np.ndarray) -> np.ndarray:
    """Latent tokens [B, I, C] -> pictures [B, H, W, 3] uint8."""
    config = self.network.config
    side = renderer.SIZE // config.latent_stride
    grids = vae_lib.unpack_latents(latents, side, side, config.latent_patch_size)
    return np.asarray(self._run(programs.decode_images, grids))

  def _run(self, program, *arrays):
    """A program of the autoencoder."""
    platform = lowering.platform(self.network.mesh)
    return program(platform)(self._vae, self._vae_params, *arrays)

  def round_trip(self, pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Pictures, [B, H, W, 3] uint8, after encoding and decoding by the VAE."""
    return np.asarray(vae_lib.to_uint8(self.decoded(pixels, seed)))

  def decoded(self, pixels: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """The same as the decoder returns it: float32, about in [-1, 1], not clipped."""
    c = self.network.config.vae
    side = renderer.SIZE // c.downsample
    noise = np.random.default_rng(seed).standard_normal(
      (len(pixels), side, side, c.z_channels), np.float32
    )
    given = np.stack([images_lib.to_array(image) for image in pixels])
    latents = self._run(programs.encode_images, given, noise)
    return np.asarray(self._decode_floats(self._vae_params, latents))
