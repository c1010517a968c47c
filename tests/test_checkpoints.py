"""Checkpoints in Orbax: what a failure shows, and what calls from several threads leave behind."""

import asyncio
import concurrent.futures
import logging
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.models import weights
from unigrpo_jax.runtime import checkpoints, stored_params


def test_overlapping_writers_in_threads_both_succeed(config, tmp_path):
  leaves = weights.table(config, ("vae",))[:8]
  arrays = {
    leaf.path: stored_params.NewArray(leaf.shape, leaf.shape, np.dtype(np.float32))
    for leaf in leaves
  }
  new_event_loop = asyncio.new_event_loop

  def write(number: int) -> None:
    with stored_params.Writer(tmp_path / str(number), arrays) as writer:
      for leaf in leaves:
        writer.write(leaf.path, (), np.full(leaf.shape, number, np.float32))

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    list(threads.map(write, range(4)))
  assert asyncio.new_event_loop is new_event_loop
  for number in range(4):
    with stored_params.Reader(tmp_path / str(number), leaves) as reader:
      assert all((reader.read(leaf) == number).all() for leaf in leaves)


@pytest.fixture
def saved(tmp_path):
  return checkpoints.TrainCheckpoints(tmp_path / "run", keep=3)


def test_a_failed_save_is_one_error_without_traces(saved, caplog, capfd):
  state = {"a": np.random.default_rng(0).normal(size=2**19)}
  saved.save(1, state, {})
  saved._checkpointer.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # as a full disk
  try:
    saved.save(2, state, {})
    with pytest.raises(errors.Storage, match="run: cannot be written .*File too large"):
      saved.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert saved.steps == [1]
  assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_a_checkpoint_of_another_tree_is_refused_by_its_cause(saved):
  array = jnp.arange(8.0)
  saved.save(1, {"a": array}, {"seed": 3})
  saved._checkpointer.wait()
  assert saved.record(1) == {"seed": 3}
  with pytest.raises(errors.InputError, match="checkpoint 1 cannot be loaded .*not match") as error:
    saved.load(1, {"a": array, "b": array})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "file, level, has_trace, shown",
  [
    ("orbax/checkpoint/_src/path/deleter.py", logging.WARNING, False, True),
    ("orbax/checkpoint/_src/path/deleter.py", logging.ERROR, True, True),
    ("orbax/checkpoint/_src/futures/future.py", logging.ERROR, False, True),
    ("orbax/checkpoint/_src/futures/future.py", logging.ERROR, True, False),
    ("elsewhere/future.py", logging.ERROR, True, True),
  ],
)
def test_only_traces_of_background_threads_are_dropped(
  saved, caplog, file, level, has_trace, shown
):
  trace = (ValueError, ValueError("disk"), None) if has_trace else None
  logger = logging.getLogger("absl")
  logger.handle(logging.LogRecord("absl", level, f"/lib/{file}", 1, "slow disk", (), trace))
  assert ("slow disk" in caplog.text) == shown


@pytest.mark.parametrize(
  "where, shown", [("/lib/orbax/checkpoint/x.py", False), ("/app/mine.py", True)]
)
def test_only_lost_tasks_of_orbax_are_dropped(saved, caplog, where, shown):
  logging.getLogger("asyncio").error(
    "Task exception was never retrieved\nfuture: <Task coro=<read() done, defined at %s:3>>", where
  )
  assert ("never retrieved" in caplog.text) == shown
