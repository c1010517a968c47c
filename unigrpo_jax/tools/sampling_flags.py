"""The flags of sampling that `generate` and `evaluate` share; imports no jax at first."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from unigrpo_jax import errors

BOUNDS = {
  "seed": errors.SEED, "shift": dict(above=0, high=1e6),
  "cfg_text_scale": dict(low=0, high=1e6), "max_tokens": dict(low=1, high=10**6),
  "batch_size": dict(low=1, high=10**6),
}


def add(parser: argparse.ArgumentParser, *, batch_size: int | None) -> None:
  """Adds the flags; `batch_size` is a default, None: all rows."""
  add = parser.add_argument
  add("--num_timesteps", "--steps", type=int, help="points of the time grid (default: 50); one "
      "velocity evaluation less")
  add("--shift", type=float,
      help="moves the time grid towards noise; 1 leaves it even (default: 3)")
  add("--cfg_text_scale", type=float, help="strength of the guidance by the prompt; 1 turns all "
      "guidance off (default: 4)")
  add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
      help="guide only at times LOW < t <= HIGH; t=1 is noise (default: 0.4 1)")
  add("--cfg_renorm", choices=("global", "channel", "text_channel"),
      help="what guidance may not make longer: the velocity of the whole image, of each latent "
      "token, or of each token before the guidance by the image (default: global)")
  add("--seed", type=int, default=0, help="seed of the first prompt's first image "
      "(default: %(default)s)")
  add("--temperature", type=float, help="of the sampling of text; 0 takes the likeliest token "
      "(default: 0.3)")
  add("--max_tokens", type=int, help="most tokens of a reasoning or an answer (default: 1000)")
  add("--batch_size", type=int, default=batch_size,
      help=f"rows that run together, fewer need less memory (default: {batch_size or 'all'})")


def check(args: argparse.Namespace) -> None:
  """Raises InputError for impossible values."""
  errors.require("--num_timesteps", args.num_timesteps, low=2, high=100_000)
  for name, bounds in BOUNDS.items():
    errors.require(f"--{name}", getattr(args, name), **bounds)
  errors.require_temperature("--temperature", args.temperature, high=1e6)
  if args.cfg_interval and not 0 <= args.cfg_interval[0] < args.cfg_interval[1]:
    low, high = args.cfg_interval
    raise errors.InputError(f"--cfg_interval={low} {high} must have 0 <= LOW < HIGH")


def settings(args: argparse.Namespace, defaults: Any):
  """`requests.Settings` from the flags, or from `defaults` (`GenerationDefaults`) without one."""
  # Imported here because importing jax takes seconds.
  from unigrpo_jax.episodes import requests

  given = lambda **values: {name: value for name, value in values.items() if value is not None}
  made = requests.Settings.of(defaults, **given(
    num_timesteps=args.num_timesteps, shift=args.shift, temperature=args.temperature,
    max_tokens=args.max_tokens,
  ))
  return dataclasses.replace(made, guidance=dataclasses.replace(made.guidance, **given(
    text_scale=args.cfg_text_scale, interval=args.cfg_interval and tuple(args.cfg_interval),
    renorm=args.cfg_renorm,
  )))
