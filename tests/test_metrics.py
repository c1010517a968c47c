"""Writers of metrics: what is kept, what is dropped, what is refused; seconds by phase."""

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.runtime import metrics


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_half_a_line(tmp_path):
  path = tmp_path / "run" / "metrics.jsonl"
  log = metrics.MetricsLog(path, 0)
  for step in (1, 2, 3):
    log.write(step, {"loss": step / 2})
  with path.open("a") as file:
    file.write('{"step": 4, "lo')
  assert metrics.read(path) == ([{"step": s, "loss": s / 2} for s in (1, 2, 3)], 0)
  log = metrics.MetricsLog(path, 2)
  log.write(3, {"loss": 7})
  rows, skipped = metrics.read(path)
  assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 7.0)]
  assert skipped == 0 and [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_finite_is_null_on_disk_and_nan_when_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = metrics.MetricsLog(path, 0)
  log.write(1, {"a": math.nan, "b": np.float32(np.inf), "c": jnp.array(0.5)})
  refuse = lambda constant: pytest.fail(f"{constant} is not JSON")
  assert json.loads(path.read_text(), parse_constant=refuse) == {
    "step": 1, "a": None, "b": None, "c": 0.5
  }
  [row], _ = metrics.read(path)
  assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 0.5


def test_lines_that_hold_no_row_are_counted(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1}\nnoise\n[1]\n{"a": 2}\n{"step": 2, "a": "text"}\n{"st')
  assert metrics.read(path) == ([{"step": 1, "a": 1}, {"step": 2}], 3)


@pytest.mark.parametrize("value", ["1.5", np.zeros(2), [1.0], None, jnp.ones(1)])
def test_a_value_that_is_not_one_number_is_named(tmp_path, value):
  log = metrics.MetricsLog(tmp_path / "metrics.jsonl", 0)
  with pytest.raises(TypeError, match="metric reward/mean is"):
    log.write(1, {"reward/mean": value})


def test_an_unknown_writer_and_a_missing_library_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="'csv' is none of jsonl, tensorboard, wandb"):
    metrics.writers(["jsonl", "csv"], tmp_path, "run", {})
  for name, library in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(errors.InputError, match=f"pip install {library}"):
      metrics.writers([name], tmp_path, "run", {})


class _Library(types.ModuleType):
  """Stands for tensorboardX and wandb: remembers what it is told."""

  def __init__(self):
    super().__init__("library")
    self.told = []

  def SummaryWriter(self, **arguments):
    self.told.append(arguments)
    return self

  init = SummaryWriter

  def add_scalar(self, name, value, step):
    self.told.append((name, value, step))

  def log(self, values, step):
    self.told.append((values, step))

  def flush(self):
    pass

  def close(self):
    self.told.append("closed")

  finish = close


def test_every_writer_is_told_every_step(tmp_path, monkeypatch):
  boards, wandb = _Library(), _Library()
  monkeypatch.setitem(sys.modules, "tensorboardX", boards)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  log = metrics.writers(metrics.WRITERS, tmp_path, "an_id", {"seed": 1}, first_step=4)
  log.write(5, {"loss": np.float32(0.5)})
  log.close()
  assert metrics.read(tmp_path / "metrics.jsonl")[0] == [{"step": 5, "loss": 0.5}]
  opened, written, closed = boards.told
  assert opened == {"logdir": str(tmp_path / "tensorboard"), "purge_step": 5}
  assert written == ("loss", 0.5, 5) and closed == "closed"
  opened, written, closed = wandb.told
  assert opened["id"] == "an_id" and opened["config"] == {"seed": 1}
  assert opened["resume"] == "allow" and written == ({"loss": 0.5}, 5) and closed == "closed"


def test_tensorboard_event_files_hold_the_scalars(tmp_path):
  library = pytest.importorskip("tensorboardX")
  log = metrics.writers(["tensorboard"], tmp_path, "run", {})
  log.write(3, {"reward/mean": 0.25})
  log.close()
  from tensorboardX import proto

  assert library and proto
  [path] = (tmp_path / "tensorboard").iterdir()
  assert b"reward/mean" in path.read_bytes()


def test_phases_and_what_lies_between_them():
  """Worked by hand: 1 s outside, rollout 2 + 3 s around a reward of 4 s, update 0 s: 10 s."""
  times = iter([0.0, 1.0, 3.0, 7.0, 10.0, 10.0, 10.0, 10.0, 12.0])
  timer = metrics.PhaseTimer(lambda: next(times))
  with timer("rollout"):
    with timer("reward"):
      pass
  with timer("update"):
    pass
  assert timer.take() == {
    "seconds/rollout": 5.0, "seconds/reward": 4.0, "seconds/update": 0.0,
    "share/rollout": 0.5, "share/reward": 0.4, "share/update": 0.0, "seconds/total": 10.0,
  }
  assert timer.take() == {"seconds/total": 2.0}


def test_a_phase_that_fails_is_closed_and_one_may_be_taken_while_open():
  times = iter([0.0, 0.0, 1.0, 1.0, 3.0, 4.0, 5.0])
  timer = metrics.PhaseTimer(lambda: next(times))
  with pytest.raises(KeyError), timer("a"):
    raise KeyError
  with timer("b"):
    assert timer.take() == {
      "seconds/a": 1.0, "seconds/b": 2.0, "share/a": 1 / 3, "share/b": 2 / 3, "seconds/total": 3.0
    }
  assert timer.take() == {"seconds/b": 1.0, "share/b": 0.5, "seconds/total": 2.0}
