"""One writer a folder: who is refused, and whose lock is no obstacle."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, locks
from unigrpo_jax.runtime import hosts


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  for name, seconds in (("BEAT", 0.05), ("DEAD", 0.3), ("SETTLE", 0.1), ("POLL", 0.05)):
    monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


def _hold(folder):
  return locks.hold(locks.inside(folder), f"--workdir={folder}")


def _left_by(folder, **changes):
  """Writes the lock of a holder elsewhere."""
  holder = dataclasses.replace(locks._this_process(), token="other", **changes)
  folder.mkdir(exist_ok=True)
  locks._write(locks.inside(folder), holder)
  return holder


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
  with _hold(tmp_path / "run"):
    with pytest.raises(errors.InputError) as error, _hold(tmp_path / "run"):
      pass
    with _hold(tmp_path / "other"):
      pass
  line = str(error.value)
  assert line.startswith(f"--workdir={tmp_path / 'run'} is in use by ") and "\n" not in line
  for part in (os.uname().nodename, f"process {os.getpid()}", "since 2", "pytest"):
    assert part in line
  assert not any(tmp_path.iterdir())  # also the folders that were made for it


@pytest.mark.parametrize("command, arguments", [
  ("train", ["--config=configs/unigrpo.py:tiny", "--workdir={}"]),
  ("train", ["--config=configs/sft.py:tiny", "--workdir={}"]),
  ("evaluate", ["--out={}"]),
  ("tools.build", ["--workdir={}", "--out={}/out"]),
  ("tools.compare.command", ["--workdir={}", "--methods", "UniGRPO", "--reward_model="]),
])
def test_every_command_that_fills_a_folder_holds_it(tmp_path, command, arguments):
  main = importlib.import_module(f"unigrpo_jax.{command}").main
  with _hold(tmp_path), pytest.raises(errors.InputError, match=f"={tmp_path} is in use by "):
    main([argument.format(tmp_path) for argument in arguments])


def test_a_run_stays_in_its_folder_where_the_current_one_changes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  train = hosts.holds_workdir(lambda config, workdir, devices: workdir)
  assert train({}, pathlib.Path("run")) == tmp_path / "run"


def test_a_file_is_left_by_no_error(tmp_path):
  with pytest.raises(ZeroDivisionError), _hold(tmp_path):
    raise ZeroDivisionError
  with _hold(tmp_path):
    (tmp_path / "file").touch()
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_holder_of_this_machine_is_no_obstacle(tmp_path):
  code = (
    "import pathlib, sys, time; from unigrpo_jax.data import locks\n"
    "with locks.hold(locks.inside(pathlib.Path(sys.argv[1])), 'it'): print(flush=True); input()"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as child:
    child.stdout.readline()
    with pytest.raises(errors.InputError, match=f"process {child.pid},"), _hold(tmp_path):
      pass
    child.kill()  # a zombie until it is waited for
    time.sleep(0.1)
    with _hold(tmp_path):
      pass


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "1"}])
def test_another_process_with_its_id_is_not_the_holder(tmp_path, changes):
  _left_by(tmp_path, **changes)
  with _hold(tmp_path):
    pass


@pytest.mark.parametrize("age", [0, -500, 500, 1e6])
def test_a_dead_holder_elsewhere_is_no_obstacle_whatever_its_clock(tmp_path, age, capsys):
  _left_by(tmp_path, machine="elsewhere", beat=time.time() - age)
  with _hold(tmp_path):
    pass
  assert ("waiting at most" in capsys.readouterr().err) == (age < 1e6)


def test_a_holder_elsewhere_that_beats_is_alive(tmp_path):
  holder = _left_by(tmp_path, machine="elsewhere", host="far", beat=time.time() - 300)
  stop = threading.Event()
  beats = threading.Thread(
    target=locks._beat, args=(locks.inside(tmp_path), "it", holder, stop), daemon=True
  )
  beats.start()
  with pytest.raises(errors.InputError, match="in use by far, process"), _hold(tmp_path):
    pass
  stop.set()
  beats.join()
  with _hold(tmp_path):
    pass


def test_a_holder_that_goes_while_it_is_watched(tmp_path):
  _left_by(tmp_path, machine="elsewhere")
  threading.Timer(0.1, locks.inside(tmp_path).unlink).start()
  with _hold(tmp_path):
    pass


@pytest.mark.parametrize("changes", [{"pid": 0}, {"pid": -1}, {"pid": 10**30}, {"pid": "x"},
                                     {"pid": 1.5}, {"beat": None, "machine": "elsewhere"}])
def test_a_lock_of_no_process_is_no_obstacle(tmp_path, changes):
  _left_by(tmp_path, **changes)
  with _hold(tmp_path):
    pass


@pytest.mark.parametrize("argument", [
  '{"a": {"url": "u", "token": "hush", "token_env": "SHOWN"}}', "{'a': {'api_key':'hush'}}",
  "--config.reward_options.a.token=hush", "{a: {password: hush}}",
])
def test_a_lock_shows_no_secret_of_the_command(tmp_path, monkeypatch, argument):
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", argument, "--out=SHOWN"])
  with _hold(tmp_path):
    text = locks.inside(tmp_path).read_text()
  command = json.loads(text)["command"]
  assert "hush" not in text and "(hidden)" in command
  assert command.count("SHOWN") == argument.count("SHOWN") + 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 3}', "[" * 100_000])
def test_a_damaged_lock_is_no_obstacle(tmp_path, text):
  locks.inside(tmp_path).write_text(text)
  with _hold(tmp_path):
    pass
  assert not any(tmp_path.iterdir())


def test_of_two_that_replace_a_dead_holder_one_wins(tmp_path, monkeypatch):
  _left_by(tmp_path, pid=2**22 + 1)
  ready, write = threading.Barrier(2), locks._write

  def write_together(path, holder):
    ready.wait()
    write(path, holder)

  monkeypatch.setattr(locks, "_write", write_together)
  monkeypatch.setattr(locks, "BEAT_SECONDS", 60)
  outcomes = []

  def take():
    try:
      with _hold(tmp_path):
        outcomes.append("held")
        time.sleep(0.3)
    except errors.InputError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=take) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert outcomes.count("held") == 1 and any("in use by" in outcome for outcome in outcomes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_holder_that_was_taken_for_dead_ends(tmp_path, monkeypatch, capfd):
  ended = threading.Event()

  def end(status):
    assert status == 1
    ended.set()
    raise SystemExit  # of the thread

  monkeypatch.setattr(os, "_exit", end)
  with _hold(tmp_path):
    _left_by(tmp_path, host="far")
    assert ended.wait(10)
  assert "was taken over by far, process" in capfd.readouterr().err
  assert locks.inside(tmp_path).exists()  # It is the other's.


def test_a_lock_that_was_deleted_comes_back(tmp_path):
  with _hold(tmp_path):
    locks.inside(tmp_path).unlink()
    deadline = time.monotonic() + 10
    while not locks.inside(tmp_path).exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(errors.InputError, match="written to .(Not a dir|File exists)"):
      with _hold(folder):
        pass

  def full(path, text):
    raise OSError(28, "No space left on device")

  _left_by(tmp_path / "run", pid=2**22 + 1)
  monkeypatch.setattr(atomic, "write_text", full)
  with pytest.raises(errors.Storage, match="No space left"), _hold(tmp_path / "run"):
    pass


def test_what_killed_processes_left_beside_a_target_is_removed(tmp_path):
  """What was being replaced comes back first; other names are somebody's own."""
  kept = ["a[1].old-mine", "a[1].partial-1", "b.partial-0123abcd"]
  for name in (*kept, "a[1].partial-0123abcd", "a[1].old-0123abcd", "a[1].old-ffffffff"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text(name)
  with pytest.raises(ZeroDivisionError), locks.staging(tmp_path / "a[1]") as staged:
    assert (tmp_path / "a[1]" / "file").read_text() == "a[1].old-0123abcd"
    # The heartbeat may be writing the lock file anew, under a name of its own.
    names = {path.name for path in tmp_path.iterdir() if ".lock.json." not in path.name}
    assert names == {*kept, "a[1]", "a[1].lock.json", staged.name}
    raise ZeroDivisionError
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a[1]"])


def test_the_lock_of_a_folder_is_beside_it_however_it_is_named(tmp_path, monkeypatch):
  (tmp_path / "a" / "b").mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "a")
  for name in (".", "b/..", "../a"):
    assert locks.beside(pathlib.Path(name)) == tmp_path.resolve() / "a.lock.json"


def test_of_two_that_make_one_target_the_second_is_refused(tmp_path):
  with locks.staging(tmp_path / "a") as staged:
    with pytest.raises(errors.InputError, match="^target .*/a is in use by"):
      with locks.staging(tmp_path / "a"):
        pass
    (staged / "file").touch()
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
