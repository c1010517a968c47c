"""Names of folders, disks that are full and places that cannot be used: one line, nothing lost."""

import errno
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import atomic, files, images, lines, records
from unigrpo_jax.models import config, safetensors_files, weights
from unigrpo_jax.runtime import (
  checkpoints,
  conversion,
  event_files,
  folders,
  metrics,
  run,
  stored_params,
)

NAMES = ("lr[1e-4]", "a#b", "a%20b", "a?b", "a*|b", "a\nb", " '\"{}~$é漢 ", "-" + "x" * 250)
WRONG_NAMES = ("a\\b", "gs:", "a\udcff")


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_resumed_from_a_folder_of_any_name(tmp_path, name):
  folder = tmp_path / name / "checkpoints"
  saved = checkpoints.TrainCheckpoints(folder, keep=2)
  for step in (1, 2, 3):
    saved.save(step, {"a": jnp.full(4, step)}, {"step": step})
  saved.close()
  saved = checkpoints.TrainCheckpoints(folder, keep=2)
  assert saved.steps == [2, 3] and saved.record(2) == {"step": 2}
  assert (saved.load(2, {"a": jnp.zeros(4, int)})["a"] == 2).all()
  assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_parameters_in_pieces_go_to_the_folder_of_that_name(tmp_path, caplog):
  """Not to "a b", which a URL would make of "a%20b"."""
  leaf = weights.Leaf(("a",), ("a",), ((6,), (2,)), (0, 1))
  arrays = {("a",): stored_params.NewArray((6, 2), (2, 2), np.dtype(np.float32))}
  for number, name in enumerate(("a b", "a%20b", "a#b", "a?b", "a|b", "a[b]")):
    with stored_params.Writer(tmp_path / name, arrays) as writer:
      for row in (0, 2, 4):
        writer.write(("a",), (slice(row, row + 2),), np.full((2, 2), number, np.float32))
  for number, name in enumerate(("a b", "a%20b", "a#b", "a?b", "a|b", "a[b]")):
    with stored_params.Reader(tmp_path / name, [leaf]) as reader:
      assert (reader.read(leaf) == number).all()
  assert not caplog.records


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_would_be_another_folder_are_refused_before_work(tmp_path, name):
  with pytest.raises(errors.InputError, match="no checkpoint can be kept under a name with"):
    run.check_workdir(tmp_path / name)
  with pytest.raises(errors.InputError, match="under a name with"):
    conversion.convert(folders.TINY_FOLDER, tmp_path / name / "params")
  assert not list(tmp_path.iterdir())


def test_an_unreadable_checkpoint_is_not_to_be_removed(tmp_path):
  saved = checkpoints.TrainCheckpoints(tmp_path, keep=2)
  saved.save(1, {"a": jnp.zeros(4)}, {})
  saved.close()
  with pytest.raises(errors.InputError, match="checkpoint 1 cannot be loaded") as refused:
    saved.load(1, {"b": jnp.zeros(4)})
  assert not any(word in str(refused.value) for word in ("remove", "delete"))


def _file(folder: pathlib.Path) -> pathlib.Path:
  (folder / "file").write_text("")
  return folder / "file"


def _under_a_file(folder: pathlib.Path) -> pathlib.Path:
  return _file(folder) / "run"


def _dangling(folder: pathlib.Path) -> pathlib.Path:
  (folder / "link").symlink_to(folder / "nowhere")
  return folder / "link"


def _checkpoints_are_a_file(folder: pathlib.Path) -> pathlib.Path:
  (folder / "checkpoints").write_text("")
  return folder


@pytest.mark.parametrize(
  "make, message",
  [
    (_file, "--workdir=.*/file: cannot be written to .Not a directory"),
    (_under_a_file, "--workdir=.*/file/run: cannot be written to .Not a directory"),
    (_dangling, "--workdir=.*/link is a link to a place that does not exist"),
    (_checkpoints_are_a_file, "/checkpoints: cannot be written to .Not a directory"),
    (lambda _: pathlib.Path("/proc/xx/run"), "--workdir=/proc/xx/run: cannot be written to"),
    (lambda folder: folder / ("x" * 256), "File name too long"),
  ],
)
def test_a_workdir_that_cannot_be_one_is_refused_before_work(tmp_path, make, message):
  workdir = make(tmp_path)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(errors.InputError, match=message) as refused:
    run.check_workdir(workdir)
  assert type(refused.value) is errors.InputError
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  "number, kind, status",
  [
    (errno.ENOSPC, errors.Storage, 1), (errno.EDQUOT, errors.Storage, 1),
    (errno.EIO, errors.Storage, 1), (errno.ESTALE, errors.Storage, 1),
    (errno.EACCES, errors.InputError, 2), (errno.EROFS, errors.InputError, 2),
    (errno.EPERM, errors.InputError, 2),
  ],
)
def test_an_error_of_the_file_system_is_one_line_and_says_whether_to_try_again(
  number, kind, status, tmp_path, monkeypatch, capsys
):
  def fail(*_, **__):
    raise OSError(number, errno.errorcode[number], str(tmp_path / "f"))

  with pytest.raises(SystemExit) as ended:
    errors.report(fail)
  assert ended.value.code == status
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {tmp_path}/f: cannot be used ({errno.errorcode[number]}); ")
  for method in ("write_text", "write_bytes", "mkdir"):
    monkeypatch.setattr(pathlib.Path, method, fail)
  for attempt in (
    lambda: run.check_workdir(tmp_path / "run"),
    lambda: metrics.MetricsLog(["jsonl"], tmp_path / "run", "", {}),
    lambda: atomic.staging(tmp_path / "run").__enter__(),
    lambda: results_lib.Results([], {}).save(tmp_path / "run", "title"),
  ):
    with pytest.raises(errors.InputError) as refused:
      attempt()
    assert type(refused.value) is kind


def test_an_argument_that_is_not_utf_8_is_refused():
  with pytest.raises(errors.InputError, match="is not UTF-8"):
    errors.ArgumentParser().parse_known_args(["--workdir=a\udcff"])


def test_an_empty_path_is_not_the_current_folder_and_a_tilde_is_the_home(monkeypatch):
  """`--workdir=$RUN` without RUN, and what a shell leaves as it is in `--workdir=~/run`."""
  monkeypatch.setenv("HOME", "/home/someone")
  parser = errors.ArgumentParser()
  parser.add_argument("--workdir", type=files.path)
  with pytest.raises(errors.InputError, match="^--workdir: the path is empty"):
    parser.parse_args(["--workdir="])
  assert parser.parse_args(["--workdir=~/run"]).workdir == pathlib.Path("/home/someone/run")
  for name in ("a/~/b", "~b", "."):
    assert files.path(name) == pathlib.Path(name)
  assert files.local_path("~/a") == pathlib.Path("/home/someone/a")


@pytest.mark.parametrize("read", [
  lambda path: list(lines.read(path)),
  lambda path: list(records.read(path)),
  config.read_json,
  images.load_rgb,
  safetensors_files.SafetensorsFile,
])
def test_a_read_that_may_succeed_next_time_is_no_bad_input(tmp_path, monkeypatch, read):
  """Launchers start a run again that ends with status 1, not one that ends with 2."""
  path = tmp_path / "a.jsonl"
  path.write_text("{}")

  def fail(number):
    def open_(*_, **__):
      raise OSError(number, "it says so", str(path))
    return open_

  for number, status in ((errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)):
    with monkeypatch.context() as patched:
      for name in ("open", "read_text"):
        patched.setattr(pathlib.Path, name, fail(number))
      patched.setattr(PIL.Image, "open", fail(number))
      with pytest.raises(errors.InputError, match="a.jsonl: .*it says so") as refused:
        read(path)
    assert refused.value.status == status
    assert not isinstance(refused.value, errors.Storage)  # After which a run saves nothing.


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
  saved = checkpoints.TrainCheckpoints(tmp_path / "checkpoints", keep=2)
  for step in (1, 2):
    saved.save(step, {"a": jnp.zeros(4)}, {"step": step})
  saved.close()

  def fail(*_):
    raise OSError(errno.EIO, "Input/output error")

  saved = checkpoints.TrainCheckpoints(tmp_path / "checkpoints", keep=2)
  monkeypatch.setattr(saved._checkpointer, "metadata", fail)
  with pytest.raises(errors.Storage, match="/2: cannot be read .Input/output error.; run the same"):
    saved.newest(saved.record)
  monkeypatch.setattr(saved._names, "unreadable", {2: OSError(errno.EIO, "Input/output error")})
  with pytest.raises(errors.Storage, match="/2: cannot be read .Input/output error.; run the same"):
    saved.newest(saved.record)
  assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
  assert {"1", "2"} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_an_error_that_is_no_file_s_stays_what_it_is():
  for error in (OSError("x"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"), KeyError(1)):
    with pytest.raises(type(error)):
      errors.report(lambda error=error: (_ for _ in ()).throw(error))


def test_a_failed_write_of_tensorboard_s_files_is_an_error_and_no_wait(tmp_path):
  file = event_files.EventFile(tmp_path / "events")
  file.write(b"a")
  file.raise_failed()

  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  close, file._file = file._file.close, types.SimpleNamespace(write=fail, flush=fail, close=fail)
  for call in (lambda: file.write(b"b"), file.flush, file.close, lambda: file.write(b"c")):
    call()  # In tensorboardX's thread, which must not end.
  close()
  with pytest.raises(errors.Storage, match="events: cannot be written .No space left on device"):
    file.raise_failed()


def test_tensorboard_s_writer_is_given_our_files(tmp_path, monkeypatch):
  class Library:  # As tensorboardX does it.
    record_writer = types.SimpleNamespace(
      register_writer_factory=lambda prefix, factory: setattr(Library, prefix, factory)
    )

    def __init__(self, logdir, purge_step):
      factory = getattr(Library, logdir.split(":")[0])
      factory.directory_check(logdir)
      self.file = factory.open(f"{logdir}/events")

    SummaryWriter = property()

    def add_scalar(self, name, value, step):
      self.file.write(f"{name} {value} {step}".encode())

    def flush(self):
      self.file.flush()

  Library.SummaryWriter = Library
  monkeypatch.setitem(sys.modules, "tensorboardX", Library)
  log = metrics.MetricsLog(["tensorboard"], tmp_path / "a:b", "", {})
  log.write(3, {"loss": 2.0})
  assert (tmp_path / "a:b" / "tensorboard" / "events").read_text() == "loss 2.0 3"
  log._board.file._failed = OSError(errno.ENOSPC, "No space left on device")
  with pytest.raises(errors.Storage, match="cannot be written"):
    log.write(4, {"loss": 2.0})
