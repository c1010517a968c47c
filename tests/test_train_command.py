"""The command line of training: what is wrong with it is one line, before anything is loaded."""

import pathlib
import subprocess
import sys

import jax
import pytest

from tests import refusals
from unigrpo_jax import errors, finetune, train
from unigrpo_jax.recipe import config_files

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--config=configs/unigrpo.py:tiny"
BROKEN = """
from ml_collections import ConfigDict

def get_config(variants=""):
  config = ConfigDict()
  config.steps = {}
  return config
"""


def _error(capsys, *arguments):
  """The line that the command prints before it ends with status 2."""
  with pytest.raises(SystemExit) as stop:
    errors.report(lambda: train.main(arguments))
  printed = capsys.readouterr()
  assert stop.value.code == 2 and printed.out == ""
  [line] = printed.err.splitlines()
  return line


@pytest.mark.parametrize("arguments, message", [
  ((TINY,), "required: --workdir; --help shows"),
  (("--workdir={tmp}",), "required: --config; --help shows"),
  (("--config", "--workdir={tmp}"), "--config: expected one argument"),
  ((TINY, "--workdir={tmp}", "--stpes=3"), "Unknown command line flag 'stpes'"),
  ((TINY, "--workdir={tmp}", "--steps=3"), "keys of the config are --config.KEY=VALUE"),
  ((TINY, "--workdir="), "--workdir: the path is empty"),
  (("--config=", "--workdir={tmp}"), "--config=.: cannot be read (Is a directory)"),
  ((TINY, "--workdir={tmp}", "more"), "unrecognized arguments: more"),
  ((TINY, "--workdir={tmp}", "--processes=two"), "--processes: invalid int value: 'two'"),
  ((TINY, "--workdir={tmp}", "--processes=2"), "give all of --coordinator, --processes and"),
  ((TINY, "--workdir={tmp}", "--config.stpes=3"), "'stpes'. Did you mean \"steps\""),
  ((TINY, "--workdir={tmp}", "--config.steps=many"), "steps"),
  (("--config=configs/unigrpo.py:tony", "--workdir={tmp}"), "variant 'tony' is none of tiny"),
  (("--config=nowhere.py", "--workdir={tmp}"), "nowhere.py: cannot be read (No such file or"),
])
def test_a_wrong_command_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
  monkeypatch.chdir(ROOT)
  line = _error(capsys, *(text.format(tmp=tmp_path / "run") for text in arguments))
  assert line.startswith("error: ") and message in line
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code, message", [
  # An attribute that is missing in the file is no key that is missing in the config.
  ("config.stpes.more", "{file}, line 6: AttributeError: "),
  ("'a' + 1", "{file}, line 6: TypeError: "),
  ("nothing", "{file}, line 6: NameError: name 'nothing' is not defined"),
  ("1; config.algorithm = 'grpo'", "config.algorithm='grpo' is none of sft, unigrpo"),
  ("1", "config.algorithm=None is none of sft, unigrpo"),
])
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, capsys, code, message):
  file = tmp_path / "mine.py"
  file.write_text(BROKEN.format(code))
  line = _error(capsys, f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert message.format(file=file) in line


@pytest.fixture
def calls(monkeypatch):
  """What is trained, without training."""
  made = []
  for name, module in (("unigrpo", train), ("sft", finetune)):
    monkeypatch.setattr(module, "train", lambda config, workdir, name=name: made.append(
      (name, config.steps, str(workdir), jax.config.jax_compilation_cache_dir)
    ))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield made
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("name", ["unigrpo", "sft"])
def test_the_config_says_which_training_it_is(tmp_path, calls, name):
  """Compiled programs are cached in the workdir, so that a resumed run need not compile again."""
  config = ROOT / "configs" / f"{name}.py"
  train.main([f"--config={config}:tiny", f"--workdir={tmp_path}", "--config.steps=7"])
  assert calls == [(name, 7, str(tmp_path), str(tmp_path / "compiled"))]


def test_a_cache_that_is_set_stays(tmp_path, calls):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  train.main([f"--config={ROOT / 'configs/unigrpo.py'}:tiny", f"--workdir={tmp_path / 'run'}"])
  assert [call[-1] for call in calls] == [str(tmp_path / "mine")]


def test_a_cache_that_cannot_be_written_to_costs_no_run(tmp_path, calls, capsys):
  (tmp_path / "file").write_text("")
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "cache"))
  train.main([f"--config={ROOT / 'configs/unigrpo.py'}:tiny", f"--workdir={tmp_path / 'run'}"])
  jax.config.update("jax_enable_compilation_cache", True)
  assert len(calls) == 1
  assert f"compiled programs are not kept: {tmp_path}/file/cache: cannot" in capsys.readouterr().out


def test_a_mistyped_key_is_one_line_of_the_process(tmp_path):
  arguments = TINY, "--config.stpes=3"
  done = subprocess.run(
    [sys.executable, "-m", "unigrpo_jax.train", *arguments, f"--workdir={tmp_path / 'run'}"],
    cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
  assert "'stpes'. Did you mean \"steps\"" in done.stderr and not (tmp_path / "run").exists()


def test_help_is_soon_there():
  """It needs no device, and shows how to begin."""
  done = subprocess.run(
    [sys.executable, "-m", "unigrpo_jax.train", "--help"],
    capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
  )
  for text in (TINY, "--workdir", "--coordinator", "--config.KEY=VALUE"):
    assert text in done.stdout


def test_a_config_of_ones_own_comes_before_that_of_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  load = lambda name: config_files.load(name, ["--config.steps=7"])
  assert load("configs/unigrpo.py:tiny").init_from == "tiny"
  assert load("./configs/flow_grpo.py").text.train is False  # which reads the file beside it
  (tmp_path / "configs").mkdir()
  for name in ("unigrpo", "mine"):
    (tmp_path / f"configs/{name}.py").write_text(BROKEN.format(1))
    assert load(f"configs/{name}.py").to_dict() == {"steps": 7}
  assert load("configs/text_grpo.py").flow.train is False


@pytest.mark.parametrize("name", [
  "configs/nope.py", "nope.py", "unigrpo.py", "other/configs/unigrpo.py", "configs/sft",
])
def test_a_config_that_is_missing_is_answered_by_those_that_exist(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  message = refusals.refusal(config_files.load, name)
  assert f"--config={name}: cannot be read" in message and "\n" not in message
  assert all(f"configs/{path.name}" in message for path in (ROOT / "configs").glob("*.py"))
