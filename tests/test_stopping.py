"""How a run is asked to stop, and how it waits for what may never come."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests import test_run, toy_run
from unigrpo_jax.runtime import run, stopping

network = test_run.network  # its fixture


def test_waiting_ends_when_it_is_finished():
  answers = [False, True]
  stopping.wait(lambda seconds: answers.pop(0), lambda: "reward a", lambda: len(answers) == 0)
  assert not answers


def test_a_stop_ends_waiting_and_says_for_what(capsys):
  stop = threading.Event()
  stop.set()
  start = time.monotonic()
  with pytest.raises(stopping.Stopped):
    stopping.wait(threading.Event().wait, lambda: "reward a, reward b", stop.is_set)
  assert stopping.GRACE_SECONDS <= time.monotonic() - start < 10
  words = r"no longer waiting for reward a, reward b, after \d s\n"
  assert re.fullmatch(words, capsys.readouterr().out)


def test_what_ends_soon_after_a_stop_is_not_lost():
  answers = [False, True]
  stopping.wait(lambda seconds: answers.pop(0), lambda: "reward a", lambda: True)


def test_what_is_waited_for_is_printed_now_and_then(capsys, monkeypatch):
  monkeypatch.setattr(stopping, "PROGRESS_SECONDS", 0.0)
  answers = [False, False, True]
  stopping.wait(lambda seconds: answers.pop(0), lambda: "reward a")
  assert capsys.readouterr().out == "waiting for reward a, after 0 s\n" * 2


def test_signals_are_caught_only_while_it_is_entered():
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  for number in numbers:
    event = threading.Event()
    with stopping.stop_on_signal(event):
      assert not event.is_set()
      os.kill(os.getpid(), number)
      assert event.is_set()
  assert [signal.getsignal(number) for number in numbers] == before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_a_run_that_waits_for_what_never_comes_is_saved(network, tmp_path, capsys, place):
  made = run.Run(
    tmp_path, test_run._spec(evaluate_every=99, checkpoint_every=99, steps=3), network,
    positions={"prompt_position": toy_run.Position()},
  )
  train_state = made.restore(None, lambda: toy_run.first_state(network.mesh, test_run.SIZE))

  def hang(wait):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    wait(threading.Event().wait, lambda: "reward a")

  def evaluate(params, step, between, wait):
    return {"eval/plain/reward": 0.5} if step == 0 else hang(wait)

  with made:
    made.evaluate(evaluate, train_state)
    for step in made.steps():
      if step == 3 and place == "step":
        hang(made.wait)
      train_state = toy_run.moved(train_state, 1)
      made.commit(train_state, {"loss": 1.0})
      made.evaluate(evaluate, train_state)
  last = 2 if place == "step" else 3
  assert test_run._kept(tmp_path)[-1] == last
  words = capsys.readouterr().out
  assert "no longer waiting for reward a, after" in words
  assert f"stopped by a signal at step {last}; run the same command again" in words


# The main thread is in native code, which returns for no signal.
NATIVE = """if True:
  import ctypes, threading
  from unigrpo_jax.runtime import stopping
  with stopping.stop_on_signal(threading.Event()):
    print("entered", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
      ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


END = """if True:
  import ctypes, pathlib, sys, threading
  from unigrpo_jax.data import locks
  from unigrpo_jax.runtime import stopping
  stopping.END_SECONDS = 2.0
  how = sys.argv[1]
  with stopping.end_on_sigterm(), locks.hold(pathlib.Path(sys.argv[2]), "it"):
    with (
      stopping.stop_on_signal(threading.Event(), lambda: how == "saved")
      if how != "outside" else locks.contextlib.nullcontext()
    ):
      print("entered", flush=True)
      mutex = ctypes.create_string_buffer(64)
      for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("how", ["outside", "saved", "unsaved"])
def test_sigterm_ends_native_code_where_nothing_is_lost(tmp_path, how):
  """Before and after a run at once, within it where all steps are saved; the lock is released."""
  process = subprocess.Popen(
    [sys.executable, "-c", END, how, str(tmp_path / "lock.json")], stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )
  try:
    assert process.stdout.readline() == "entered\n"
    process.send_signal(signal.SIGTERM)
    if how == "unsaved":
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
      return
    _, printed = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0 and "run the same command again" in printed, printed
  assert not any(tmp_path.iterdir())


def test_a_second_interrupt_ends_the_process_at_once():
  process = subprocess.Popen(
    [sys.executable, "-c", NATIVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  try:
    assert process.stdout.readline() == "entered\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, second = process.communicate(timeout=60)
  finally:
    process.kill()
  assert "another Ctrl-C" in first and process.returncode == 130, second
  assert second == "interrupted again: ended at once\n"
