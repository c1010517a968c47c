"""Which steps have noise: each convention's promise, and what is refused."""

import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.sampling import windows

RANGE = dict(low=0, high=5, size=3, num_steps=24)


def draw(convention, iteration=0, *, seed=0, prompts=2, group_size=2, ranks=None, **options):
  ranks = np.arange(prompts * group_size) if ranks is None else ranks
  return windows.draw(
    convention, seed=seed, iteration=iteration, prompts=prompts, group_size=group_size,
    ranks=ranks, **(RANGE | options),
  )


@pytest.mark.parametrize("convention", windows.CONVENTIONS)
def test_every_row_is_of_its_range_and_int32(convention):
  for iteration in range(40):
    steps = draw(convention, iteration, low=2, high=9, size=3)
    assert steps.shape == (4, 3) and steps.dtype == np.int32
    assert steps.min() >= 2 and steps.max() < 9 and (np.diff(steps) > 0).all()
    if convention != "scattered":
      assert (np.diff(steps) == 1).all()


def test_one_window_an_iteration_from_seed_and_iteration_alone():
  drawn = [draw("per_iteration", i) for i in range(300)]
  assert all((steps == steps[0]).all() for steps in drawn)
  starts = np.array([steps[0, 0] for steps in drawn])
  # 0, 1, 2, each as likely: 100 +- four standard deviations of a binomial draw.
  assert (np.abs(np.bincount(starts, minlength=3) - 100) < 4 * np.sqrt(300 * 2 / 9)).all()
  again = [draw("per_iteration", i, prompts=5, group_size=7)[-1, 0] for i in range(300)]
  np.testing.assert_array_equal(starts, again)
  assert any(draw("per_iteration", i, seed=1)[0, 0] != starts[i] for i in range(9))


def test_a_window_a_prompt_is_the_groups():
  steps = draw("per_prompt", prompts=50, group_size=4).reshape(50, 4, 3)
  assert (steps == steps[:, :1]).all()
  assert set(steps[:, 0, 0]) == {0, 1, 2}


def test_a_rank_keeps_its_window():
  """The starts of ranks 0 to 7 of the range [0, 5] with 3 steps, as BAGEL's Flow-GRPO has them."""
  starts = np.array([1, 0, 0, 0, 0, 2, 2, 1])
  for iteration, seed in ((0, 0), (99, 5)):
    steps = draw("per_rank_const", iteration, seed=seed, prompts=4, group_size=2)
    np.testing.assert_array_equal(steps, starts[:, None] + np.arange(3))
  # A trajectory's window is that of its rank, wherever it lies.
  ranks = np.array([7, 7, 1, 5])
  np.testing.assert_array_equal(draw("per_rank_const", ranks=ranks)[:, 0], starts[ranks])


def test_the_ranks_of_a_run_are_the_devices_ways_of_a_chunk():
  """Four prompts of 6, two at once: 4 ways of a chunk have 3 trajectories each, in both chunks."""
  config = config_files.load(f"{config_files.FOLDER / 'unigrpo.py'}:tiny", [
    "--config.rollout.window=per_rank_const", "--config.rollout.window_range=(0,5)",
    "--config.prompts_per_step=4", "--config.group_size=6", "--config.rollout.prompts_at_once=2",
  ])
  spec, starts = rl.read(config), [1, 0, 0, 0]
  for iteration in (1, 7):
    steps = rl.window_steps(spec, iteration, ways=4)
    want = np.tile(np.repeat(starts, 3), 2)[:, None] + np.arange(3)
    np.testing.assert_array_equal(steps, want)
    np.testing.assert_array_equal(rl.window_steps(spec, iteration), np.tile([1, 2, 3], (24, 1)))
  # A way a trajectory: the first eight are the ranks whose starts are above.
  assert rl.window_steps(spec, 1, ways=12)[:8, 0].tolist() == [1, 0, 0, 0, 0, 2, 2, 1]


def test_scattered_steps_are_distinct_and_reach_everywhere():
  drawn = np.array([draw("scattered", i)[0] for i in range(100)])
  assert set(drawn.ravel()) == {0, 1, 2, 3, 4}
  assert (np.diff(drawn) > 1).any() and (np.diff(drawn) > 0).all()


@pytest.mark.parametrize(("moving", "starts"), [
  (windows.Moving(2), [0, 0, 2, 2, 4, 4, 5, 5, 5]),
  (windows.Moving(2, stride=1), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
  (windows.Moving(2, roll_back=True), [0, 0, 2, 2, 4, 4, 5, 5, 0]),
])
def test_a_moving_window_stays_full(moving, starts):
  got = [
    draw("progressive", i, low=3, high=10, size=2, moving=moving)[0] for i in range(len(starts))
  ]
  np.testing.assert_array_equal(got, [[3 + start, 4 + start] for start in starts])


def test_as_mixgrpo_moves_the_window_ends_empty():
  starts = [windows.moving_start(windows.Moving(1), i, steps=5, size=2) for i in range(6)]
  assert starts == [0, 2, 4, 5, 5, 5]
  back = windows.Moving(1, roll_back=True)
  starts = [windows.moving_start(back, i, steps=5, size=2) for i in range(6)]
  assert starts == [0, 2, 4, 0, 2, 4]


def test_dwells_shrink():
  linear = windows.Moving(6, dwell="linear")
  starts = [windows.moving_start(linear, i, steps=14, size=2) for i in range(25)]
  # int(6 (1 - s / 14) + s / 14) iterations at start s: 6, 5, 4, 3, 3, 2, 1.
  assert [starts.count(s) for s in range(0, 14, 2)] == [6, 5, 4, 3, 3, 2, 1]
  falling = windows.Moving(5, dwell="exponential")
  starts = [windows.moving_start(falling, i, steps=20, size=1) for i in range(89)]
  # ceil(5 exp(-0.1 max(s - 13, 0))): 5 up to s = 15 (5 e^-0.2 = 4.09), then 4 (3.7, 3.35, ...).
  assert [starts.count(s) for s in (0, 13, 14, 15, 16, 17)] == [5, 5, 5, 5, 4, 4]


def test_no_window():
  for convention in windows.CONVENTIONS:
    assert draw(convention, low=3, high=3, size=0).shape == (4, 0)


@pytest.mark.parametrize(("options", "words"), [
  (dict(convention="often"), "window='often' is unknown"),
  (dict(high=25), "24 steps"),
  (dict(low=6), r"range \[6, 5\]"),
  (dict(low=-1), r"range \[-1, 5\]"),
  (dict(size=6), "size 6 must be 0 to 5"),
  (dict(size=-1), "size -1"),
  (dict(seed=-1), "seed=-1"),
  (dict(convention="progressive", moving=windows.Moving(dwell="no")), "dwell='no'"),
])
def test_refusals(options, words):
  with pytest.raises(errors.InputError, match=words):
    draw(options.pop("convention", "per_iteration"), **options)
