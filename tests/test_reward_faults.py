"""Rewards that raise what ends programs, never return, or cannot be made or closed."""

import asyncio
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl

from tests import reward_requests as shared
from tests.refusals import refusal
from unigrpo_jax import errors, rewards
from unigrpo_jax.rewards import base, making, threads


class Unprintable(BaseException):
  def __str__(self):
    sys.exit(0)


def exits(samples):
  sys.exit(0)


class ExitsWhenMade:
  def __init__(self):
    sys.exit(0)


class LosesItsServer:
  def __init__(self):
    raise ConnectionRefusedError("no model server")


class Hanging:
  """Never returns, until `go` is set."""

  def __init__(self, concurrent=False):
    self.concurrent, self.calls = concurrent, 0
    self.begun, self.go = threading.Event(), threading.Event()

  def __call__(self, samples):
    self.calls += 1
    self.begun.set()
    self.go.wait(60)
    return shared.value(samples)


def scorer(reward, **options):
  return rewards.Scorer({"r": reward}, {"r": 1.0}, **options)


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (SystemExit(0), "SystemExit: 0"), (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"), (asyncio.CancelledError(), "CancelledError"),
    (StopIteration(3), "StopIteration: 3"), (Unprintable(), "Unprintable"),
  ],
)
def test_whatever_a_reward_raises_is_nan_and_counted(error, words, caplog):
  def raises(samples):
    raise error

  one = scorer(raises)
  for _ in range(3):  # The thread lives on.
    np.testing.assert_array_equal(one.score(shared.numbered(2))["r"], [shared.NAN] * 2)
  assert one.failures["r"].count == 6 and words in one.failures["r"].last
  assert len(caplog.records) == 1
  assert words in refusal(one.check, np.full(6, shared.NAN))
  one.close()


@pytest.mark.parametrize("close", [exits, lambda: 1 / 0, lambda: time.sleep(60)])
def test_a_reward_that_does_not_close_costs_nothing(close, caplog, monkeypatch):
  monkeypatch.setattr(rewards.scorer, "CLOSE_SECONDS", 0.2)

  class Reward:
    def __call__(self, samples):
      return shared.value(samples)

  reward, start = Reward(), time.monotonic()
  reward.close = lambda: close(None) if close is exits else close()
  scorer(reward).close()
  assert time.monotonic() - start < 5
  assert "reward r did not close" in caplog.text


def test_closing_does_not_wait_for_a_call_that_never_returns(monkeypatch, caplog):
  monkeypatch.setattr(rewards.scorer, "CLOSE_SECONDS", 0.2)
  reward = Hanging()
  one = scorer(reward, threads=1)
  running, queued = one.submit(shared.numbered(1)), one.submit(shared.numbered(1))
  assert reward.begun.wait(10)
  start = time.monotonic()
  one.close()
  assert time.monotonic() - start < 5 and "still run" in caplog.text
  assert queued.wait(0) and running.awaited() == ["r"]
  assert one.submit(shared.numbered(1)).wait(0)  # Cancelled, as nothing will score it.
  reward.go.set()


def test_the_program_ends_while_a_reward_hangs():
  code = """if True:
    import time, numpy, unigrpo_jax.rewards as rewards
    scorer = rewards.Scorer({"r": lambda samples: time.sleep(600)}, {"r": 1.0})
    pending = scorer.submit([rewards.Sample("", numpy.zeros((1, 1, 3), numpy.uint8))])
    time.sleep(0.1)
    assert not pending.done()
    print("the end")"""
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert (ended.returncode, ended.stdout) == (0, "the end\n"), ended.stderr


HANGING = {
  "thread": "threading.Thread(target=time.sleep, args=(600,)).start()",
  "executor": "futures.ThreadPoolExecutor(1).submit(time.sleep, 600)",
  "process": "spawn.Process(target=time.sleep, args=(600,)).start()",
  "executor of processes": "futures.ProcessPoolExecutor(1, spawn).submit(time.sleep, 600)",
}


@pytest.mark.parametrize("began", HANGING)
def test_a_program_ends_soon_whatever_a_reward_began(began, tmp_path):
  (tmp_path / "program.py").write_text(f"""
from concurrent import futures
import multiprocessing, sys, threading, time
from unigrpo_jax import errors
errors.ENDING_SECONDS = 0.5
spawn = multiprocessing.get_context("spawn")
def main():
  {HANGING[began]}
  print("saved", flush=True)
  raise errors.Unavailable("the reward hangs")
if __name__ == "__main__":
  errors.report(main)
""")
  ended = subprocess.run(
    [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=100,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
  )
  assert (ended.returncode, ended.stdout) == (1, "saved\n"), ended.stderr
  assert "error: the reward hangs" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
  ("name", "kind", "words"),
  [
    (f"{__name__}:ExitsWhenMade", errors.InputError, "cannot be made: SystemExit: 0"),
    (f"{__name__}:LosesItsServer", errors.Unavailable, "ConnectionRefusedError: no model server"),
    ("exits_when_imported:score", errors.InputError, "cannot be imported: SystemExit: 3"),
    ("no_python:score", errors.InputError, "cannot be imported: File"),
  ],
)
def test_a_reward_that_cannot_be_made_is_bad_input(name, kind, words, tmp_path, monkeypatch):
  (tmp_path / "exits_when_imported.py").write_text("raise SystemExit(3)")
  (tmp_path / "no_python.py").write_text("def score(samples:")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(errors.InputError) as caught:
    rewards.make(name)
  assert type(caught.value) is kind and words in str(caught.value)
  assert caught.value.status == (1 if kind is errors.Unavailable else 2)


# Time limits.


def test_what_takes_longer_than_its_limit_is_nan_and_counted(caplog):
  reward = Hanging()
  one = scorer(base.TimeLimited(reward, 0.05))
  with caplog.at_level(logging.ERROR):
    np.testing.assert_array_equal(one.score(shared.numbered(2))["r"], [shared.NAN] * 2)
    assert "it took longer than time_limit=0.05 s" in one.failures["r"].last
    # Only one call at a time: the next one waits for it, as long as it may take itself.
    np.testing.assert_array_equal(one.score(shared.numbered(2))["r"], [shared.NAN] * 2)
  assert "still runs" in one.failures["r"].last and reward.calls == 1
  assert one.failures["r"].count == 4
  with pytest.raises(errors.Unavailable, match="time_limit=0.05 s still runs"):
    one.check(np.full(4, shared.NAN))
  reward.go.set()
  np.testing.assert_array_equal(one.score(shared.numbered(2))["r"], [0, 1])
  one.close()


def test_a_concurrent_reward_is_called_again_at_once():
  reward = Hanging(concurrent=True)
  limited = base.TimeLimited(reward, 0.05)
  for _ in range(2):
    with pytest.raises(TimeoutError, match="it took longer"):
      limited(shared.numbered(1))
  assert reward.calls == 2 and limited.concurrent
  reward.go.set()


@pytest.mark.parametrize("kind", [5, None, ("http",), {}])
def test_a_kind_is_text(kind):
  assert "must be text" in refusal(rewards.make, kind)


def test_a_limit_is_an_option_of_any_reward():
  reward = rewards.make("brightness", time_limit=60)
  scores = reward([rewards.Sample("", np.full((1, 1, 3), 255, np.uint8))])
  np.testing.assert_array_equal(scores.values, [1])
  assert "time_limit=0" in refusal(rewards.make, "brightness", time_limit=0)
  assert "must be a number" in refusal(rewards.make, "brightness", time_limit="soon")
  limited = rewards.make(f"{__name__}:exits", time_limit=60)
  with pytest.raises(SystemExit):
    limited(shared.numbered(1))


class Annotated:
  def __init__(self, count: int = 3, scale: float = 1.0, free=2):
    pass

  def __call__(self, samples):
    return shared.value(samples)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"count": 1.5}, "count=1.5 must be an integer"), ({"count": None}, "count=None must be"),
    ({"scale": None}, "scale=None must be a number"), ({"free": "x"}, "free='x' must be a number"),
    ({"time_limit": 1e300}, "must be more than 0 and at most"),
  ],
)
def test_options_are_what_their_defaults_and_annotations_say(options, words):
  rewards.make(f"{__name__}:Annotated", count=2, scale=2, free=None)
  assert words in refusal(rewards.make, f"{__name__}:Annotated", **options)


@pytest.mark.parametrize(
  "options",
  [{"workers": 1.5}, {"workers": None}, {"batch_size": 0.5}, {"retries": 1e300}, {"retries": None},
   {"timeout": 1e300}, {"timeout": None}, {"backoff": None}, {"outage": None}],
)
def test_numbers_of_a_served_reward(options):
  [name] = options
  line = refusal(rewards.make, "http", url="http://127.0.0.1:1", reward="r", **options)
  assert f"{name}=" in line


def test_a_pool_has_no_more_threads_than_calls():
  pool, before = threads.Pool(2**31, "test"), threading.active_count()
  pool.submit(time.sleep, 0).result(10)
  assert threading.active_count() <= before + 1
  pool.close()
  assert pool.join(10)


def test_calls_in_a_pool_do_not_divide_their_products():
  openblas = threadpoolctl.ThreadpoolController().select(internal_api="openblas")
  with openblas.limit(limits=2):
    assert {library["num_threads"] for library in openblas.info()} == {2}
    threads.Pool(2, "test").close()
    assert {library["num_threads"] for library in openblas.info()} == {1}


# The status says whether to try again.


def counted(*failures):
  """What a check of two groups blames after these (temporary, samples)."""
  one = scorer(exits)
  for temporary, count in failures:
    one._add_failure("r", rewards.Failure(count, temporary, f"because {temporary}"), None)
  with pytest.raises(errors.InputError) as caught:
    one.check(np.array([shared.NAN, 1, 1, shared.NAN]), np.array([0, 0, 1, 1]))
  one.close()
  return caught.value


def test_most_failures_decide_whether_trying_again_helps():
  assert counted((True, 3), (False, 2)).status == 1
  error = counted((True, 1), (False, 2))
  assert error.status == 2
  assert str(error) == (
    "each of the 2 groups has a sample without a reward, and is dropped; reward r: because False; "
    "repair the reward"
  )


def test_a_place_leaves_the_kind_of_an_error():
  with pytest.raises(errors.Unavailable, match="^here: gone$"), errors.at("here"):
    raise errors.Unavailable("gone")


@pytest.mark.parametrize(
  ("error", "temporary"),
  [
    (ConnectionResetError(), True), (TimeoutError(), True), (OSError(5, "I/O error"), True),
    (FileNotFoundError(), False), (PermissionError(), False), (ValueError(), False),
    (SystemExit(), False),
  ],
)
def test_what_trying_again_may_cure(error, temporary):
  assert making.is_temporary(error) == temporary


def test_a_sample_keeps_its_image_and_the_metadata_of_its_prompt():
  image, metadata = np.zeros((2, 2, 3), np.uint8), {"include": [{"class": "kite"}]}
  sample = rewards.Sample("a kite", image, None, metadata)

  def paints(samples):
    samples[0].metadata["include"][0]["class"] = "boat"
    samples[0].image[:] = 1
    return np.ones(1)

  with pytest.raises(ValueError, match="read-only"):
    rewards.evaluate(paints, [sample])
  assert not sample.image.any() and metadata == {"include": [{"class": "kite"}]}
  image[:] = 2  # its owner may
  assert sample.image.all()


def test_a_reward_does_not_move_the_program(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(errors, "_home", str(tmp_path))
  errors._say_moved.cache_clear()
  (tmp_path / "other").mkdir()
  sample = rewards.Sample("a kite", np.zeros((2, 2, 3), np.uint8))

  def moves(samples):
    os.chdir("other")
    return np.ones(1)

  for _ in range(2):
    rewards.evaluate(moves, [sample])
    assert pathlib.Path.cwd() == tmp_path
  with pytest.raises(errors.InputError), making.made("no"):
    os.chdir("other")
    raise ValueError
  assert pathlib.Path.cwd() == tmp_path
  assert capsys.readouterr().err == (
    f"note: a reward changed the current folder; it is {tmp_path} again\n"
  )


def test_the_folder_is_the_callers_after_a_program(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("make_streams_safe", "_end_soon"):  # They are for the rest of the process.
    monkeypatch.setattr(errors, name, lambda *_: None)
  errors.report(lambda: None)
  (tmp_path / "other").mkdir()
  os.chdir("other")
  rewards.evaluate(lambda samples: np.ones(1), [rewards.Sample("a kite", np.zeros((2, 2, 3)))])
  assert pathlib.Path.cwd() == tmp_path / "other"


def test_a_pool_runs_calls_in_order_and_keeps_nothing():
  pool, seen = threads.Pool(1, "test"), []
  for number in range(5):
    last = pool.submit(seen.append, number)
  last.result(10)
  pool.close()
  pool.close()
  assert seen == [0, 1, 2, 3, 4] and pool.join(10)
