"""Checkpoints in Orbax: what a failure shows, and what calls from several threads leave behind."""

import asyncio
import concurrent.futures
import logging
import os
import pathlib
import resource
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import errors, types
from unigrpo_jax.models import weights
from unigrpo_jax.runtime import checkpoints, checksums, stored_params


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


def test_states_from_before_anchors_are_loaded(saved):
  """What is written of a run without one is what was written before there were any."""
  zero = jnp.zeros(3)
  older = dict(step=jnp.int32(1), params={"a": zero + 1}, opt_state=(), ema=None, reference=None)
  saved.save(1, older, {})
  state = types.TrainState(jnp.int32(2), {"a": zero + 2}, (), None)
  saved.save(2, state, {})
  anchored = state.replace(anchor={"a": zero + 3, "b": None})
  saved.save(3, anchored, {})
  saved._checkpointer.wait()
  loaded = saved.load(1, state)
  assert loaded.anchor is None and loaded.params["a"].tolist() == [1, 1, 1]
  assert saved.load(2, older)["params"]["a"].tolist() == [2, 2, 2]
  assert saved.load(3, anchored).anchor["a"].tolist() == [3, 3, 3]
  with pytest.raises(errors.InputError, match="checkpoint 2 cannot be loaded"):
    saved.load(2, anchored)


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


@pytest.fixture
def three(saved):
  """Checkpoints 1, 2 and 3, complete; their folder."""
  array = np.random.default_rng(0).normal(size=2**12)
  for step in (1, 2, 3):
    saved.save(step, {"a": array, "step": np.array([step])}, {"seed": step})
  saved.close()
  return pathlib.Path(saved._checkpointer.directory)


def _newest(folder, **options):
  again = checkpoints.TrainCheckpoints(folder, keep=1)
  abstract = {"a": np.zeros(2**12), "step": np.array([0])}
  read = lambda step: (again.record(step)["seed"], int(again.load(step, abstract)["step"][0]))
  return again, again.newest(read, **options)


def _damage(step, kind):
  """Damages a checkpoint; `kind` is "empty", "a file", "a link to nowhere", "unsealed", or "HOW
  FILE", with a part of its name.
  """
  if kind == "empty":
    shutil.rmtree(step)
    step.mkdir()
    return
  if kind in ("a file", "a link to nowhere"):
    shutil.rmtree(step)
    step.touch() if kind == "a file" else step.symlink_to("nowhere")
    return
  if kind.startswith("unsealed"):
    (step / checksums.FILE).unlink()
    kind = kind.removeprefix("unsealed ")
  how, _, name = kind.partition(" ")
  file = max(
    (path for path in step.rglob("*") if name in str(path.relative_to(step)) and path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  data = bytearray(file.read_bytes())
  if how == "gone":
    file.unlink()
  elif how == "cut":
    file.write_bytes(data[: len(data) // 2])
  else:
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_saves_leave_no_threads_and_no_open_files(tmp_path):
  saving = checkpoints.TrainCheckpoints(tmp_path / "run", keep=1)
  threads, opened = [], []
  for step in range(1, 25):
    saving.save(step, {"a": jnp.zeros(3)}, {"step": step})
    threads.append(threading.active_count())
    opened.append(len(os.listdir("/proc/self/fd")))
  saving.close()
  # Those of the save under way, and what ends of earlier tests, come and go.
  for held in (threads, opened):
    assert min(held[12:]) < min(held[:4]) + 8


def test_closing_removes_what_a_killed_process_had_yet_to_remove(three):
  saved = checkpoints.TrainCheckpoints(three, keep=1, score={1: 0.5, 2: 0.1}.get)
  assert saved.steps == [1, 2, 3]
  saved.close()
  assert sorted(path.name for path in three.iterdir()) == ["1", "3"]


DAMAGES = [
  "empty", "a file", "a link to nowhere", "gone _CHECKPOINT_METADATA",
  "cut _CHECKPOINT_METADATA", "flip _CHECKPOINT_METADATA",
  "gone _METADATA", "flip state/_METADATA", "cut manifest.ocdbt", "cut process_0/d/",
  "flip process_0/d/", "gone process_0/d/", "cut checksums.json",
  "unsealed cut _CHECKPOINT_METADATA", "unsealed gone _CHECKPOINT_METADATA",
  "unsealed cut process_0/d/", "unsealed gone process_0/d/", "unsealed flip state/_METADATA",
  "unsealed gone state/_METADATA", "unsealed cut state/manifest.ocdbt", "unsealed cut state/d/",
  "unsealed gone state/manifest.ocdbt",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(three, kind, capsys):
  """Its step and what it lost are printed, and it neither stays among the others nor is lost."""
  _damage(three / "3", kind)
  again, found = _newest(three)
  assert found == (2, (2, 2)) and again.steps == [1, 2]
  printed = capsys.readouterr().out
  assert f"{three / '3'} is damaged: " in printed and "step 2: 1 step less; kept" in printed
  [aside] = (three.parent / "run_damaged").iterdir()
  assert aside.name.startswith("3-")
  again.save(3, {"a": np.zeros(2**12), "step": np.array([3])}, {"seed": 4})
  again.close()
  assert _newest(three)[1] == (3, (4, 3))


def test_two_damaged_ones_and_a_stray_one_are_passed_over(three, capsys):
  _damage(three / "3", "cut process_0/d/")
  _damage(three / "2", "gone _CHECKPOINT_METADATA")
  (three / "99").mkdir()
  (three / "old").mkdir()
  (three / "4.orbax-checkpoint-tmp").mkdir()
  assert _newest(three)[1] == (1, (1, 1))
  assert "of step 1: 98 steps less" in capsys.readouterr().out
  assert sorted(path.name for path in three.iterdir()) == ["1", "old"]


def test_where_all_are_damaged_none_is_touched(three):
  for step in "123":
    _damage(three / step, "flip process_0/d/")
  with pytest.raises(errors.InputError, match="3 is damaged.*1 is damaged.*a new") as error:
    _newest(three)
  assert "\n" not in str(error.value)
  assert sorted(path.name for path in three.iterdir()) == ["1", "2", "3"]


def test_a_reader_moves_nothing(three, capsys):
  _damage(three / "3", "empty")
  assert _newest(three, move=False)[1] == (2, (2, 2))
  assert "kept in" not in capsys.readouterr().out and (three / "3").is_dir()
  with pytest.raises(errors.InputError, match="3 is damaged: it is empty; .*choose another one"):
    _newest(three, only=3, move=False)


def test_a_large_file_is_known_by_its_size_and_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(checksums, "_READ_BYTES", 2**10)
  data = np.random.default_rng(0).bytes(2**14)
  (tmp_path / "a").write_bytes(data)
  checksums.write(tmp_path)
  checksums.verify(tmp_path)
  for damaged in (data[:-1], data[:-1] + b"?", b"?" + data[1:]):
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(errors.Damaged, match="is damaged: (a has|the checksum of a)"):
      checksums.verify(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": []}', '{"a": [1]}', '{"a": 1}', "[" * 100_000])
def test_damaged_checksums_are_damage(tmp_path, text):
  (tmp_path / "a").write_text("x")
  (tmp_path / checksums.FILE).write_text(text)
  if text == "[]":
    (tmp_path / checksums.FILE).unlink()
    (tmp_path / checksums.FILE).mkdir()
  with pytest.raises(errors.Damaged, match="is damaged: checksums.json cannot be read"):
    checksums.verify(tmp_path)
