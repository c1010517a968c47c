"""`Run` alone, around a toy of a training: whatever ends it, it continues as if nothing had."""

import contextlib
import itertools
import json
import os
import random
import resource
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy_run
from unigrpo_jax import errors
from unigrpo_jax.runtime import checkpoints, hosts, metrics, resumption, run, state

REWARDS = {0: 0.1, 2: 0.9, 4: 0.5, 5: 0.3}  # of the evaluations, by step
STEPS = 5
SIZE = 3  # of the toy's parameters
CONFIG = {
  "steps": STEPS, "seed": 0, "schedule": "constant", "learning_rate": {"und": 1.0, "gen": 0.0},
  "text": {"clip_low": 0.2}, "rewards": {},
}


def _spec(**changes):
  values = dict(
    config=CONFIG, defaults={}, mutable_keys=resumption.MUTABLE_KEYS, steps=STEPS,
    checkpoint_every=3, keep_checkpoints=1, keep_every=0, writers=(), shown=("loss",),
    evaluate_every=2, best_metric="eval/plain/reward",
  )
  return run.RunSpec(**values | changes)


@pytest.fixture
def network():
  return toy_run.make_network("a/folder")


def _train(
  network, workdir, spec, *, at=lambda place, step: None, pinned=None, may_change=(), values=None
):
  """Trains the toy; `at` is called in the middle of each step and each evaluation, and may raise.

  Args:
    values: step -> further metrics of the step.
  """
  def evaluate(params, step, between, wait):
    between()
    at("evaluation", step)
    between()
    return {"eval/plain/reward": REWARDS[step]}

  return toy_run.train(
    network, workdir, spec, size=SIZE, evaluate=evaluate, in_step=lambda step: at("step", step),
    metrics=lambda step, _: {"loss": 1.0 / step} | (values or {}).get(step, {}), pinned=pinned,
    may_change=may_change,
  )


def _rows(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != run.EVALUATION_SECONDS} for row in rows]


def _kept(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


WHOLE = [
  {"step": 0, "eval/plain/reward": 0.1}, {"step": 1, "loss": 1.0},
  {"step": 2, "loss": 0.5}, {"step": 2, "eval/plain/reward": 0.9}, {"step": 3, "loss": 1 / 3},
  {"step": 4, "loss": 0.25}, {"step": 4, "eval/plain/reward": 0.5},
  {"step": 5, "loss": 0.2}, {"step": 5, "eval/plain/reward": 0.3},
]


def _check_whole(network, workdir, last):
  """What an uninterrupted run leaves: its rows, its last and its best checkpoint, its state."""
  assert _rows(workdir) == WHOLE
  assert _kept(workdir) == [2, STEPS]
  expected = toy_run.first_state(network.mesh, SIZE)
  for by in range(1, STEPS + 1):
    expected = toy_run.moved(expected, by)
  np.testing.assert_array_equal(last.params["llm2vae"]["kernel"],
                                expected.params["llm2vae"]["kernel"])
  assert int(last.step) == STEPS
  # Its shape on disk is the last state's, and its record what a resumption needs.
  saved = checkpoints.TrainCheckpoints(workdir / "checkpoints", keep=None, clean=False)
  assert saved.record(STEPS)["prompt_position"] == STEPS
  assert saved.record(STEPS)["config"] == CONFIG


class Killed(BaseException):
  """A SIGKILL: nothing that the run does about errors may help."""


class _Ends:
  """Ends a run at the so many-th place where something could: by a kill, or by a signal."""

  def __init__(self, patch, *, kill_at=None, stop_at=None):
    self._kills, self._looks = itertools.count(), itertools.count()
    self._kill_at, self._stop_at = kill_at, stop_at
    for cls, name in ((metrics.MetricsLog, "write"), (checkpoints.TrainCheckpoints, "save")):
      patch.setattr(cls, name, self._around(getattr(cls, name)))
    patch.setattr(hosts, "any_host", self._look)
    patch.setattr(hosts.AgreedFlag, "read", lambda flag: self._look(False))

  def _around(self, method):
    def called(this, *args):
      self.place()
      method(this, *args)
      if isinstance(this, checkpoints.TrainCheckpoints):
        this._checkpointer.wait()  # A killed process does not save on.
      self.place()

    return called

  def place(self, *_):
    if next(self._kills) == self._kill_at:
      raise Killed

  def _look(self, flag):
    return flag or next(self._looks) == self._stop_at


def _run_until_end(network, workdir, spec, **end):
  """The last state, or None where the run was killed."""
  with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
    ends = _Ends(patch, **end)
    return _train(network, workdir, spec, at=ends.place)


def test_an_uninterrupted_run(network, tmp_path):
  _check_whole(network, tmp_path, _train(network, tmp_path, _spec()))
  # A run that is complete is not run again, however it is asked.
  last = _train(network, tmp_path, _spec(), at=lambda *_: pytest.fail("it ran"))
  _check_whole(network, tmp_path, last)
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["resumed"] and record["parameters"] == {"latent": SIZE}
  assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("end", ["kill_at", "stop_at"])
def test_a_run_ended_anywhere_continues(network, tmp_path, end):
  """At every place: rows, checkpoints, state are those of an uninterrupted run."""
  for place in itertools.count():
    workdir = tmp_path / str(place)
    ended = _run_until_end(network, workdir, _spec(), **{end: place})
    if ended is not None and int(ended.step) == STEPS and _rows(workdir) == WHOLE:
      break
    _check_whole(network, workdir, _train(network, workdir, _spec()))
  assert place >= 15


@pytest.mark.parametrize("seed", [
  pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(6)
])
def test_a_run_ended_again_and_again_continues(network, tmp_path, seed):
  """Also with an evaluation between two steps that are saved, and rows that none has seen yet."""
  rng = random.Random(seed)
  spec = _spec(checkpoint_every=rng.choice((1, 2, 9)), keep_checkpoints=rng.choice((1, 2)))
  for _ in range(8):
    end = rng.choice(("kill_at", "stop_at"))
    _run_until_end(network, tmp_path, spec, **{end: rng.randrange(9)})
  _train(network, tmp_path, spec)
  assert _rows(tmp_path) == WHOLE
  assert {2, STEPS} <= set(_kept(tmp_path))


def test_what_a_stop_before_the_first_step_saves_is_not_kept_for_good(network, tmp_path):
  spec = _spec(keep_every=2, checkpoint_every=2)
  _run_until_end(network, tmp_path, spec, stop_at=3)
  assert _kept(tmp_path) == [0]
  _train(network, tmp_path, spec)
  assert _kept(tmp_path) == [2, 4, STEPS]


def test_a_made_up_evaluation_counts_for_the_best(network, tmp_path):
  """The stop within it saves the state; where it is the best the checkpoint stays."""
  stopped = _run_until_end(network, tmp_path, _spec(), stop_at=7)
  assert int(stopped.step) == 2 and _kept(tmp_path) == [2]
  assert _rows(tmp_path) == WHOLE[:3]
  _check_whole(network, tmp_path, _train(network, tmp_path, _spec()))


def test_the_evaluation_before_the_first_step_is_not_repeated(network, tmp_path):
  """The stop in the first step saves the state that it evaluated."""
  _run_until_end(network, tmp_path, _spec(), stop_at=3)
  assert _kept(tmp_path) == [0] and _rows(tmp_path) == WHOLE[:1]
  repeated = _raise_at("evaluation", 0, AssertionError("evaluated again"))
  _check_whole(network, tmp_path, _train(network, tmp_path, _spec(), at=repeated))


def test_an_evaluation_without_a_result_is_not_repeated(network, tmp_path):
  spec = _spec(best_metric="eval/other/reward")
  _train(network, tmp_path, spec)
  assert _kept(tmp_path) == [STEPS]  # none has that metric
  _train(network, tmp_path, spec, at=lambda *_: pytest.fail("it ran"))


def test_a_signal_saves_and_ends(network, tmp_path, capsys):
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  for number, step in zip(numbers, (2, 4)):
    send = lambda place, at, number=number, step=step: (
      os.kill(os.getpid(), number) if (place, at) == ("step", step) else None
    )
    last = _train(network, tmp_path, _spec(evaluate_every=0, best_metric=""), at=send)
    assert int(last.step) == step and _kept(tmp_path) == [step]
    assert f"stopped by a signal at step {step}; run the same" in capsys.readouterr().out
  assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_in_the_last_step_ends_a_run_that_is_complete(
  network, tmp_path, monkeypatch, capsys
):
  exported = []
  monkeypatch.setattr(state, "export", lambda *args: exported.append(args[2:]))
  monkeypatch.setattr(run.folders, "check_target", lambda *args, **options: None)
  spec = _spec(evaluate_every=0, best_metric="", export_to="out")
  stop = lambda place, step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
  _train(network, tmp_path, spec, at=stop)
  assert not exported
  stop = lambda place, step: os.kill(os.getpid(), signal.SIGTERM) if step == STEPS else None
  _train(network, tmp_path, spec, at=stop)
  assert exported == [("out", "bfloat16")]
  assert capsys.readouterr().out.count("stopped by a signal") == 1


def _raise_at(place, step, error):
  def at(*now):
    if now == (place, step):
      raise error

  return at


@pytest.mark.parametrize("error, kept", [
  (errors.InputError("no"), [3]),
  (errors.Diverged("no"), []),
  (errors.Storage("no"), []),
  (Killed(), []),
])
def test_what_an_error_in_a_step_leaves(network, tmp_path, error, kept):
  spec = _spec(checkpoint_every=9, evaluate_every=0)
  with pytest.raises(type(error)) as raised:
    _train(network, tmp_path, spec, at=_raise_at("step", 4, error))
  assert raised.value is error and _kept(tmp_path) == kept
  _train(network, tmp_path, spec)
  assert _rows(tmp_path) == [row for row in WHOLE if "loss" in row]
  spec, at = _spec(checkpoint_every=3, evaluate_every=0), _raise_at("step", 4, error)
  with pytest.raises(type(error)):  # A save that is under way ends first.
    _train(network, tmp_path / "other", spec, at=at)
  assert (tmp_path / "other" / "checkpoints" / "3" / "checksums.json").exists()


def test_an_error_in_an_evaluation_saves_the_step(network, tmp_path):
  with pytest.raises(errors.InputError, match="^no reward$"):
    _train(network, tmp_path, _spec(checkpoint_every=9),
           at=_raise_at("evaluation", 4, errors.InputError("no reward")))
  assert _kept(tmp_path) == [2, 4] and _rows(tmp_path) == WHOLE[:6]
  _check_whole(network, tmp_path, _train(network, tmp_path, _spec()))


def test_nothing_is_saved_where_nothing_was_done(network, tmp_path):
  for place in ("evaluation", "step"):
    with pytest.raises(errors.InputError, match="^no$"):
      _train(network, tmp_path / place, _spec(evaluate_every=2 * (place == "evaluation")),
             at=_raise_at(place, int(place == "step"), errors.InputError("no")))
    assert _kept(tmp_path / place) == []


@pytest.mark.parametrize("step", [1, 3])
def test_a_rejected_update_leaves_the_state_before(network, tmp_path, step):
  """Its step and the outcome are named. Where the update moved something it cannot be saved."""
  spec = _spec(checkpoint_every=9, evaluate_every=0)
  before = toy_run.first_state(network.mesh, SIZE)
  for by in range(1, step):
    before = toy_run.moved(before, by)
  unmoved = errors.UpdateRejected("drift of 3, at most 1", before)
  with pytest.raises(errors.InputError) as error:
    _train(network, tmp_path / "a", spec, at=_raise_at("step", step, unmoved))
  assert str(error.value) == (
    f"step {step}: drift of 3, at most 1; the state before it is saved"
  )
  assert _kept(tmp_path / "a") == [step - 1]
  _train(network, tmp_path / "a", spec)
  assert _rows(tmp_path / "a") == [row for row in WHOLE if "loss" in row]

  with pytest.raises(errors.InputError, match=f"^step {step}: not finite; the run starts anew$"):
    _train(network, tmp_path / "b", spec,
           at=_raise_at("step", step, errors.UpdateRejected("not finite")))
  assert _kept(tmp_path / "b") == []


def test_a_rejected_update_after_a_saved_step(network, tmp_path):
  """Its state is not saved twice, and where it was moved the step that was saved is named."""
  first = toy_run.first_state(network.mesh, SIZE)
  for name, value, outcome in (
    ("a", errors.UpdateRejected("drift", first), "the state before it is"),
    ("b", errors.UpdateRejected("drift"), "the run continues from step 2"),
  ):
    with pytest.raises(errors.InputError, match=f"^step 3: drift; {outcome}"):
      _train(network, tmp_path / name, _spec(checkpoint_every=2, evaluate_every=0),
             at=_raise_at("step", 3, value))
    assert _kept(tmp_path / name) == [2]


@pytest.mark.parametrize("log_every, checkpoint_every, step, logged", [
  (1, 9, 3, [1, 2]),  # a step that is logged
  (9, 3, 3, [1]),  # one that is saved
])
def test_metrics_that_are_not_finite_end_the_run(
  network, tmp_path, log_every, checkpoint_every, step, logged
):
  """The state is not saved; the metric and the step are named."""
  spec = _spec(log_every=log_every, checkpoint_every=checkpoint_every, evaluate_every=0)
  with pytest.raises(errors.InputError) as error:
    _train(network, tmp_path, spec, values={step: {"mse": jnp.nan}})
  assert str(error.value) == (
    f"step {step}: mse not finite; lower the learning rate and resume; the run starts anew"
  )
  assert _kept(tmp_path) == [] and [row["step"] for row in _rows(tmp_path)] == logged


@pytest.mark.parametrize("end", [errors.InputError("no"), None], ids=["error", "signal"])
def test_what_diverged_unseen_is_not_saved_at_an_end(network, tmp_path, end):
  """Of a step that is neither logged nor saved the metrics are looked at when it would be."""
  def at(place, step):
    if step == 3:
      if end is not None:
        raise end
      os.kill(os.getpid(), signal.SIGTERM)

  spec = _spec(log_every=9, checkpoint_every=9, evaluate_every=0)
  values = {step: {"mse": jnp.inf} for step in (2, 3)}
  expected = "^no$" if end else "step 3: mse not finite; .*; the run starts anew"
  with pytest.raises(errors.InputError, match=expected):
    _train(network, tmp_path, spec, at=at, values=values)
  assert _kept(tmp_path) == []


def test_rows_between_two_that_are_logged(network, tmp_path, capsys):
  """The first step of a start is logged, with its phases printed, and again by no other."""
  spec = _spec(log_every=4, evaluate_every=0, checkpoint_every=1)
  _train(network, tmp_path, spec, at=lambda place, step: (
    os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
  ))
  _train(network, tmp_path, spec)
  assert [row["step"] for row in _rows(tmp_path)] == [1, 3, 4, 5]
  assert capsys.readouterr().out.count("first step: move\n") == 2


def test_a_save_that_fails_ends_the_run_with_its_kind(network, tmp_path, monkeypatch):
  """It is not tried again: on several hosts it may have failed on one alone."""
  calls = []

  def save(self, step, *rest):
    calls.append(step)
    raise errors.Storage("the disk is full")

  monkeypatch.setattr(checkpoints.TrainCheckpoints, "save", save)
  with pytest.raises(errors.Storage, match="^the disk is full$"):
    _train(network, tmp_path, _spec(evaluate_every=0))
  assert calls == [3]


@pytest.mark.parametrize("size, limit, file", [
  (100_000, 100_000, "checkpoints"), (SIZE, 60, "metrics.jsonl"),
])
def test_a_full_disk_ends_the_run_with_its_kind(network, tmp_path, monkeypatch, size, limit, file):
  """Here files may not grow beyond a limit; what is saved in the background fails at the next."""
  monkeypatch.setitem(globals(), "SIZE", size)
  spec, limits = _spec(evaluate_every=0), resource.getrlimit(resource.RLIMIT_FSIZE)

  def at(place, step):
    if step == 3:
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))

  try:
    with pytest.raises(errors.Storage, match=f"{file}: cannot be written .*free disk space"):
      _train(network, tmp_path, spec, at=at)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  _train(network, tmp_path, spec)
  assert _kept(tmp_path) == [STEPS]
  assert _rows(tmp_path) == [row for row in WHOLE if "loss" in row]


def test_a_step_without_a_commit_is_a_mistake_of_the_program(network, tmp_path, monkeypatch):
  monkeypatch.setattr(run.Run, "commit", lambda *_: None)
  with pytest.raises(RuntimeError, match="step 1 was not committed"):
    _train(network, tmp_path, _spec(evaluate_every=0))


def _with(path, value):
  config = json.loads(json.dumps(CONFIG))
  *sections, key = path.split(".")
  node = config
  for section in sections:
    node = node.setdefault(section, {})
  node[key] = value
  return config


@pytest.mark.parametrize("path, value, old", [
  ("seed", 1, "0"), ("text.clip_low", 0.1, "0.2"), ("learning_rate.gen", 1.0, "0.0"),
  ("new_key", 5, "None"), ("text.other", 5, "3"), ("rewards.a", 1.0, "None"),
])
def test_another_config_is_refused_by_its_key(network, tmp_path, path, value, old):
  """Also a key that older runs lack, where its value is not what they did."""
  _train(network, tmp_path, _spec(evaluate_every=0))
  spec = _spec(config=_with(path, value), defaults={"text.other": 3})
  with pytest.raises(errors.InputError) as error:
    _train(network, tmp_path, spec)
  assert str(error.value) == (
    f"config.{path}={value!r} but the run in the workdir has {old}; give it back its value, or "
    "choose a new --workdir"
  )


@pytest.mark.parametrize("path, value", [
  ("steps", 6), ("mesh", {"data": 8}), ("learning_rate.und", 0.5), ("text.other", 3),
])
def test_what_a_resumed_run_may_change(network, tmp_path, path, value):
  """Also keys that the run lacks and that have the value of what it did."""
  spec = _spec(evaluate_every=0)
  _train(network, tmp_path, spec)
  changed = _spec(
    evaluate_every=0, config=_with(path, value), defaults={"text.other": 3}, steps=STEPS + 1
  )
  assert int(_train(network, tmp_path, changed).step) == STEPS + 1


def test_a_cosine_fixes_the_number_of_steps():
  before = CONFIG | {"schedule": "cosine"}
  now = before | {"steps": 9}
  with pytest.raises(errors.InputError, match="config.steps=9 but the run"):
    resumption.check(before, now, resumption.mutable_keys(before, now, {"steps"}), {})


def test_another_kind_of_training_is_refused_by_name(network, tmp_path):
  """Whose positions the checkpoints lack, and whose config has more keys that differ."""
  _train(network, tmp_path, _spec(evaluate_every=0, config=CONFIG | {"algorithm": "sft"}))
  other = _spec(evaluate_every=0, config=CONFIG | {"algorithm": "unigrpo", "advantage": 5.0})
  made = run.Run(tmp_path, other, network, positions={"another_position": toy_run.Position()})
  with pytest.raises(errors.InputError, match="^config.algorithm='unigrpo' but the run in the"):
    made.restore(None, lambda: None)
  assert _kept(tmp_path) == [STEPS]


def test_what_is_pinned_stays(network, tmp_path):
  spec = _spec(evaluate_every=0)
  _train(network, tmp_path, spec, pinned={"prompts": "12ab"})
  _train(network, tmp_path, spec, pinned={"prompts": "12ab"})
  with pytest.raises(errors.InputError, match="^config.prompts reads other contents than when"):
    _train(network, tmp_path, spec, pinned={"prompts": "34cd"})


def test_what_may_change_is_said_and_kept(network, tmp_path, capsys):
  """A corpus of which a bad line was left out does not end the run that met it."""
  spec = _spec(evaluate_every=0)
  note = "note: config.data.folder reads other contents than when the run in the workdir began"
  for contents, said in (("12ab", False), ("34cd", True)):
    _train(network, tmp_path, spec, pinned={"data.folder": contents}, may_change={"data.folder"})
    assert (note in capsys.readouterr().out) == said


def test_what_is_pinned_may_lie_elsewhere(network, tmp_path):
  """Where the run knows its contents; one of before that was kept is continued from its place."""
  spec, moved = _spec(evaluate_every=0), _spec(evaluate_every=0, config=_with("text.file", "new"))
  _train(network, tmp_path / "a", spec, pinned={"text.file": "12ab"})
  _train(network, tmp_path / "a", moved, pinned={"text.file": "12ab"})
  with pytest.raises(errors.InputError, match="^config.text.file reads other contents than when"):
    _train(network, tmp_path / "a", spec, pinned={"text.file": "34cd"})
  assert json.loads((tmp_path / "a" / "run.json").read_text())["pinned"] == {"text.file": "12ab"}
  _train(network, tmp_path / "b", spec)
  with pytest.raises(errors.InputError, match="^config.text.file='new' but the run"):
    _train(network, tmp_path / "b", moved, pinned={"text.file": "12ab"})
  _train(network, tmp_path / "b", spec, pinned={"text.file": "12ab"})


def test_a_damaged_checkpoint_is_passed_over_and_its_steps_repeated(network, tmp_path, capsys):
  spec = _spec(keep_checkpoints=3, checkpoint_every=1)
  _train(network, tmp_path, spec)
  for step, file in ((5, "_CHECKPOINT_METADATA"), (4, "state/_METADATA")):
    (tmp_path / "checkpoints" / str(step) / file).write_text("")
  (tmp_path / "checkpoints" / "99").mkdir()
  _train(network, tmp_path, spec)
  assert _rows(tmp_path) == WHOLE
  printed = capsys.readouterr().out
  assert "99 is damaged: it is empty" in printed and "resumed" in printed
  assert _kept(tmp_path)[-1] == STEPS
  for path in (tmp_path / "checkpoints").iterdir():
    (path / "state" / "_METADATA").unlink()
  with pytest.raises(errors.InputError, match="is damaged.*choose a new --workdir"):
    _train(network, tmp_path, spec)
