"""Which steps of the flow have noise, and are trained, in an iteration. On the host."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np

from unigrpo_jax import errors

CONVENTIONS = ("per_iteration", "per_prompt", "per_rank_const", "scattered", "progressive")
DWELLS = ("constant", "linear", "exponential")


@dataclasses.dataclass(frozen=True)
class Moving:
  """How the window of MixGRPO (Li et al. 2025) moves from noise to data."""

  iterations: int = 25  # that the window stays where it starts
  stride: int | None = None  # steps by which it moves; None: its own size
  roll_back: bool = False  # starts over after the end of the range, instead of staying there
  # How long it stays further on, one of DWELLS: as long; falling linearly to a quarter (at least 1)
  # at the end of the range; or iterations * exp(-0.1 max(steps done - 13, 0)).
  dwell: str = "constant"


def draw(
  convention: str, *, low: int, high: int, size: int, seed: int, iteration: int, prompts: int,
  group_size: int, num_steps: int, ranks: np.ndarray | None = None, moving: Moving = Moving(),
) -> np.ndarray:
  """The steps with noise of each trajectory of an iteration.

  A window is `size` neighbouring steps of low, ..., high - 1; every start is as likely.

    per_iteration   one window for all, a function of (seed, iteration)
    per_prompt      a window a prompt
    per_rank_const  a constant window a rank, a function of the rank alone (Flow-GRPO's BAGEL)
    scattered       `size` steps anywhere in the range, not neighbours, the same for all
    progressive     one window for all, moving (MixGRPO); the last one is full: it ends at `high`

  Args:
    low, high, size: the range, `high` excluded, and the steps of a window; size 0 is no window.
    prompts, group_size: trajectories are `group_size` neighbours a prompt. All of the iteration's
      prompts, so that what is drawn does not depend on the number of processes.
    num_steps: of the schedule; one less than its points.
    ranks: which process samples each trajectory, [prompts * group_size], for per_rank_const.
    moving: for progressive.

  Returns:
    [prompts * group_size, size] int32, increasing along each row.

  Raises:
    InputError: the convention is unknown, or the window does not fit the range or the schedule.
  """
  if convention not in CONVENTIONS:
    raise errors.InputError(f"window={convention!r} is unknown; choose one of {CONVENTIONS}")
  if not 0 <= low <= high <= num_steps:
    raise errors.InputError(
      f"window range [{low}, {high}] must lie within the {num_steps} steps of the schedule, 0 to "
      f"{num_steps}"
    )
  if not 0 <= size <= high - low:
    raise errors.InputError(
      f"window size {size} must be 0 to {high - low}, the steps of the range [{low}, {high}]"
    )
  errors.require("seed", seed, low=0)
  if size == 0:
    return np.zeros((prompts * group_size, 0), np.int32)
  if convention == "per_rank_const":
    # Python's generator, seeded with the rank alone.
    starts = [random.Random(int(rank)).randint(low, high - size) for rank in ranks]
    starts = np.array(starts)
    return (starts[:, None] + np.arange(size)).astype(np.int32)
  rng = np.random.default_rng((seed, iteration))
  if convention == "scattered":
    steps = np.sort(rng.choice(np.arange(low, high), size, replace=False))[None]
  else:
    if convention == "progressive":
      starts = low + moving_start(moving, iteration, steps=high - low, size=size, full=True)
    else:
      count = prompts if convention == "per_prompt" else 1
      starts = random_starts(rng, count, low=low, high=high, size=size)
    steps = np.reshape(starts, (-1, 1)) + np.arange(size)
  steps = np.broadcast_to(steps, (prompts, size))
  return np.repeat(steps, group_size, axis=0).astype(np.int32)


def random_starts(
  rng: np.random.Generator, count: int, *, low: int, high: int, size: int
) -> np.ndarray:
  """First steps of windows, each from `low` to high - size with the same chance: [count]."""
  return rng.integers(low, high - size, count, endpoint=True)



def moving_start(
  moving: Moving, iteration: int, *, steps: int, size: int, full: bool = False
) -> int:
  """The first step of the moving window, counted from the start of a range of `steps`.

  With `full` the whole window stays within the range. Without, as MixGRPO's code does, it moves on
  until it starts at the end of the range, where it is empty.
  """
  stride = size if moving.stride is None else moving.stride
  if moving.dwell not in DWELLS:
    raise errors.InputError(f"window dwell={moving.dwell!r} is unknown; choose one of {DWELLS}")

  last = steps - size if full else steps
  start = spent = 0
  for _ in range(iteration):
    spent += 1
    if spent < _dwell(moving, start, steps):
      continue
    spent = 0
    if full and start < last:
      start = min(start + stride, last)
    else:
      start += stride
    if start > last:
      start = 0 if moving.roll_back else last
  return start


def _dwell(moving: Moving, start: int, steps: int) -> float:
  """Iterations that the window stays at `start`."""
  if moving.dwell == "linear":
    least, done = max(1, moving.iterations // 4), start / steps
    return max(least, int(moving.iterations * (1 - done) + least * done))
  if moving.dwell == "exponential":
    return math.ceil(moving.iterations * math.exp(-0.1 * max(start - 13, 0)))
  return moving.iterations
