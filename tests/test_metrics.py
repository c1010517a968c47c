"""Writers of metrics: what is kept, what is dropped, what is refused; seconds by phase."""

import io
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests import toy_run
from unigrpo_jax import errors
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import progress
from unigrpo_jax.runtime import metrics, run


def _log(workdir, first_step=0):
  return metrics.MetricsLog(["jsonl"], workdir, "run", {}, first_step=first_step)


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_half_a_line(tmp_path):
  path = tmp_path / "run" / "metrics.jsonl"
  log = _log(path.parent)
  for step in (1, 2, 3):
    log.write(step, {"loss": step / 2})
  with path.open("a") as file:
    file.write('{"step": 4, "lo')
  assert metrics.read(path) == ([{"step": s, "loss": s / 2} for s in (1, 2, 3)], 0)
  log = _log(path.parent, 2)
  log.write(3, {"loss": 7})
  rows, skipped = metrics.read(path)
  assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 7.0)]
  assert skipped == 0 and [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_step_may_have_a_row_of_its_evaluation_as_well(tmp_path):
  log = _log(tmp_path)
  log.write(0, {"eval/reward": 0.1})
  for step in (1, 2, 3):
    log.write(step, {"loss": step / 2})
    log.write(step, {"eval/reward": step / 4})
  _log(tmp_path, 2).write(3, {"loss": 7})
  assert metrics.read(tmp_path / "metrics.jsonl")[0] == [
    {"step": 0, "eval/reward": 0.1},
    {"step": 1, "loss": 0.5}, {"step": 1, "eval/reward": 0.25},
    {"step": 2, "loss": 1.0}, {"step": 2, "eval/reward": 0.5},
    {"step": 3, "loss": 7},
  ]


def test_what_is_not_finite_is_null_on_disk_and_nan_when_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = _log(tmp_path)
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
  with pytest.raises(TypeError, match="metric reward/mean is"):
    _log(tmp_path).write(1, {"reward/mean": value})


def test_an_unknown_writer_and_a_missing_library_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="'csv' is none of jsonl, tensorboard, wandb"):
    metrics.MetricsLog(["jsonl", "csv"], tmp_path, "run", {})
  for name, library in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(errors.InputError, match=f"pip install {library}"):
      metrics.MetricsLog([name], tmp_path, "run", {})


class _Library(types.ModuleType):
  """Stands for tensorboardX and wandb: records what it is called with."""

  def __init__(self):
    super().__init__("library")
    self.calls, self.record_writer = [], self

  def register_writer_factory(self, prefix, factory):
    self.prefix = prefix

  def SummaryWriter(self, **arguments):
    self.calls.append(arguments)
    return self

  init = SummaryWriter

  def add_scalar(self, name, value, step):
    self.calls.append((name, value, step))

  def add_image(self, name, image, step, dataformats):
    self.calls.append((name, image.shape, step, dataformats))

  def add_text(self, name, text, step):
    self.calls.append((name, text, step))

  def Image(self, image, caption):
    return image.shape, caption

  def log(self, values, step):
    self.calls.append((values, step))

  def flush(self):
    pass

  def close(self):
    self.calls.append("closed")

  finish = close


def test_every_writer_gets_every_row(tmp_path, monkeypatch):
  boards, wandb = _Library(), _Library()
  monkeypatch.setitem(sys.modules, "tensorboardX", boards)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  log = metrics.MetricsLog(metrics.WRITERS, tmp_path, "an_id", {"seed": 1}, first_step=4)
  log.write(5, {"loss": np.float32(0.5)})
  log.close()
  assert metrics.read(tmp_path / "metrics.jsonl")[0] == [{"step": 5, "loss": 0.5}]
  opened, written, closed = boards.calls
  assert opened == {"logdir": f"{boards.prefix}:{tmp_path / 'tensorboard'}", "purge_step": 5}
  assert written == ("loss", 0.5, 5) and closed == "closed"
  opened, written, closed = wandb.calls
  assert opened["id"] == "an_id" and opened["config"] == {"seed": 1}
  assert opened["resume"] == "allow" and written == ({"loss": 0.5}, 5) and closed == "closed"


def test_a_run_goes_on_without_wandb_where_that_fails(tmp_path, monkeypatch, capsys):
  wandb = _Library()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  log = metrics.MetricsLog(["jsonl", "wandb"], tmp_path, "an_id", {})

  def fail(*_, **__):
    raise ConnectionResetError("the service\nis gone")

  monkeypatch.setattr(wandb, "log", fail)
  for step in (1, 2):
    log.write(step, {"loss": 1.0})
  log.close()
  assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")[0]] == [1, 2]
  assert wandb.calls[1:] == []  # It is not even closed, which might wait for what is gone.
  message = capsys.readouterr().err
  assert message.count("nothing more goes to W&B (ConnectionResetError: the service is gone)") == 1
  log = metrics.MetricsLog(["wandb"], tmp_path, "an_id", {})
  monkeypatch.setattr(wandb, "finish", fail)
  log.close()
  assert "nothing more goes to W&B" in capsys.readouterr().err


@pytest.fixture
def panel():
  """Two drawings of a prompt, as an evaluation gives them."""
  image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  rows = [
    results_lib.Row("think", "all", "a <red> kite", "<think>a|b</think>", {"reward": 0.5}, "a.png"),
    results_lib.Row("plain", "all", "a <red> kite", None, {"reward": 0.25}, "b.png"),
  ]
  [made] = results_lib.Results(rows, {"a.png": image, "b.png": image[::-1]}).panels(3)
  return made


def test_pictures_with_their_words_go_to_tensorboard_and_wandb(tmp_path, monkeypatch, panel):
  """Side by side with reasoning and reward; the file has the numbers of the row alone."""
  boards, wandb = _Library(), _Library()
  monkeypatch.setitem(sys.modules, "tensorboardX", boards)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  log = metrics.MetricsLog(metrics.WRITERS, tmp_path, "an_id", {})
  log.write(7, {"eval/think/reward": 0.5, "samples/eval/0": panel})
  assert metrics.read(tmp_path / "metrics.jsonl")[0] == [{"step": 7, "eval/think/reward": 0.5}]
  _, scalar, image, text = boards.calls
  assert scalar == ("eval/think/reward", 0.5, 7)
  assert image == ("samples/eval/0", panel.sheet.shape, 7, "HWC")
  assert text == ("samples/eval/0", "\n".join([
    "**a &lt;red&gt; kite**", "", "| picture | rewards | reasoning |", "|---|---|---|",
    "| think | reward 0.5 | &lt;think&gt;a\\|b&lt;/think&gt; |", "| plain | reward 0.25 |  |",
  ]), 7)
  shown = [
    ((4, 4, 3), "a <red> kite\nthink: reward 0.5\n<think>a|b</think>"),
    ((4, 4, 3), "a <red> kite\nplain: reward 0.25"),
  ]
  assert wandb.calls[1] == ({"eval/think/reward": 0.5, "samples/eval/0": shown}, 7)
  # Both pictures are in the sheet, enlarged, with words to their left.
  height, width, _ = panel.sheet.shape
  assert height > 128 and width > 2 * 128 and panel.sheet.dtype == np.uint8
  assert (panel.sheet[12:140, -140:-12] == panel.sheet[12:140, -280:-152][::-1]).all()


def test_tensorboard_event_files_hold_scalars_pictures_and_words(tmp_path, panel):
  pytest.importorskip("tensorboardX")
  from tensorboardX import proto

  log = metrics.MetricsLog(["tensorboard"], tmp_path, "run", {})
  log.write(3, {"reward/mean": 0.25, "samples/eval/0": panel})
  log.close()
  [path] = (tmp_path / "tensorboard").iterdir()
  data, values = path.read_bytes(), {}
  while data:  # 8 bytes of length, 4 of its checksum, the event, 4 of its checksum
    length = int.from_bytes(data[:8], "little")
    event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
    values |= {value.tag: value for value in event.summary.value}
    data = data[16 + length :]
  assert values.pop("reward/mean").simple_value == 0.25
  image = values.pop("samples/eval/0").image
  picture = np.asarray(PIL.Image.open(io.BytesIO(image.encoded_image_string)))
  np.testing.assert_array_equal(picture, panel.sheet)
  [(name, text)] = values.items()
  assert name.startswith("samples/eval/0") and b"reward 0.25" in text.tensor.string_val[0]


def test_phases_and_what_lies_between_them():
  """Worked by hand: 1 s outside, rollout 2 + 3 s around a reward of 4 s, update 0 s: 10 s."""
  times = iter([0.0, 1.0, 3.0, 7.0, 10.0, 10.0, 10.0, 10.0, 12.0])
  timer = metrics.PhaseTimer(lambda: next(times))
  with timer("rollout"):
    with timer("reward"):
      pass
  with timer("update"):
    pass
  assert timer.read_and_reset() == {
    "seconds/rollout": 5.0, "seconds/reward": 4.0, "seconds/update": 0.0,
    "share/rollout": 0.5, "share/reward": 0.4, "share/update": 0.0, "seconds/total": 10.0,
  }
  assert timer.read_and_reset() == {"seconds/total": 2.0}


def test_a_phase_begins_once_between_two_resets():
  begun = []
  timer = metrics.PhaseTimer(begins=begun.append)
  for _ in range(2):
    for phase in ("draw", "update", "draw"):
      with timer(phase):
        pass
    timer.read_and_reset()
  assert begun == 2 * ["draw", "update"]


def test_a_phase_that_fails_is_closed_and_one_may_be_taken_while_open():
  times = iter([0.0, 0.0, 1.0, 1.0, 3.0, 4.0, 5.0])
  timer = metrics.PhaseTimer(lambda: next(times))
  with pytest.raises(KeyError), timer("a"):
    raise KeyError
  with timer("b"):
    assert timer.read_and_reset() == {
      "seconds/a": 1.0, "seconds/b": 2.0, "share/a": 1 / 3, "share/b": 2 / 3, "seconds/total": 3.0
    }
  assert timer.read_and_reset() == {"seconds/b": 1.0, "share/b": 0.5, "seconds/total": 2.0}


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
  def run(**options):
    with progress.bar(4, "drawing", unit="pictures", **options) as bar:
      for _ in range(4):
        bar.update(1)
    return capsys.readouterr()

  assert run() == ("", "")  # shorter than the time between two lines
  monkeypatch.setattr(progress, "SECONDS", 0.0)
  out, lines = run()
  assert not out and "\r" not in lines
  lines = lines.splitlines()
  assert [line.split(",")[0] for line in lines[:5]] == [
    f"drawing: {done} of 4 pictures" for done in range(5)
  ]
  assert lines[2].endswith(" left") and run(enabled=False) == ("", "")


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  with progress.bar(2_000_000, "copying", unit="B") as bar:
    bar.update(1_000_000)
  assert "copying:  50%" in capsys.readouterr().err


def _broken(tmp_path, monkeypatch, name, source):
  """A library of that name whose module is `source`."""
  (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("source, words", [
  ("import a_missing_library", "needs wandb, which needs a_missing_library: pip install a_missing"),
  ("raise TypeError('Descriptors cannot be created')", "wandb cannot be imported .TypeError: Desc"),
  ("def login(): raise RuntimeError('api_key not\\n configured (no-tty).')",
   "api_key not configured .no-tty.; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=of"),
])
def test_a_writer_that_cannot_be_opened_says_what_to_do(tmp_path, monkeypatch, source, words):
  _broken(tmp_path, monkeypatch, "wandb", source)
  with pytest.raises(errors.InputError, match=words):
    metrics.check_writers(["jsonl", "wandb"])


def test_writers_that_can_be_opened_pass(monkeypatch):
  library = _Library()
  library.login = lambda: library.calls.append("login")
  monkeypatch.setitem(sys.modules, "wandb", library)
  monkeypatch.setitem(sys.modules, "tensorboardX", library)
  metrics.check_writers(["jsonl"])
  assert not library.calls
  metrics.check_writers(metrics.WRITERS)
  assert library.calls == ["login"]


def test_what_an_evaluation_compiles_is_no_part_of_the_step_after_it(tmp_path):
  def evaluate(*_):
    jax.jit(lambda a: jnp.sort(a) + 1)(jnp.ones(37))
    return {}

  config = {"steps": 2, "schedule": "constant", "learning_rate": {"und": 1.0}}
  spec = run.RunSpec(
    config=config, defaults={}, mutable_keys=frozenset(), steps=2, checkpoint_every=9,
    keep_checkpoints=1, keep_every=0, writers=(), shown=(), evaluate_every=1, rate=("rows", 1),
  )
  toy_run.train(
    toy_run.make_network("a"), tmp_path, spec, size=3, evaluate=evaluate, in_step=lambda _: None,
    metrics=lambda step, _: {"loss": 1.0},
  )
  rows = [row for row in metrics.read(tmp_path / "metrics.jsonl")[0] if "loss" in row]
  assert len(rows) == 2
  assert all(row["seconds/compile"] <= row["seconds/total"] for row in rows)
