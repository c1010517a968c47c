"""The pages: every command's flags and keys exist, names are those of the code, examples run, the
site builds. `-m slow` runs the commands themselves."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from tests import pages
from unigrpo_jax import errors, rewards
from unigrpo_jax.algorithms import forward
from unigrpo_jax.recipe import checks, config_files, parts, rl, sft
from unigrpo_jax.rewards.judge import forms

ROOT = pages.ROOT
COMMANDS = [
  pytest.param(command, id=f"{block.page}:{block.line}:{number}")
  for block in pages.blocks("bash") for number, command in enumerate(block.commands)
]
OF_NOTEBOOK = [
  pytest.param(command, id=f"{cell.page}:{cell.line}")
  for cell in pages.cells() if cell.language == "bash"
  for command in cell.commands if command.startswith("python ")
]
# Why a command is not run by the slow test -> what such commands contain.
NOT_RUN = {
  "needs the released checkpoint, 27 GiB, or another that users have":
    r"BAGEL-7B-MoT|SFT_FOLDER|--source=bagel|runs/lora",
  "needs a Google Cloud project": r"^gcloud",
  "needs vLLM and an accelerator": r"^vllm",
  "needs a file of a benchmark; tests/test_importers.py has made-up ones": r"--import",
  "takes hours":
    r"\.build |\.compare |\.reward_model |runs/built|--scaling|--shape=all|tests\.iconworld_table",
  "needs an accelerator": r"--device-check|rewards\.sh geneval",
  "downloads a package; tests/test_nanodet.py has a stand-in": r"rewards\.fetch",
  "needs what that downloads, or a server of it": r"--rewards geneval|unigrpo\.py:\S*geneval",
  "needs the TPU compiler, and minutes; tests/test_plan.py runs the planner": r"\.plan |^pip ",
  "installs and runs this; tests/test_launch.py runs it with stand-ins":
    r"launch/(local|test|rewards)\.sh",
}
# Less of the same, so that the slow test takes minutes: words in a command -> added to it.
LESS = {
  r"\.train .*unigrpo\.py:tiny": [
    "--config.steps=2", "--config.eval.prompts=20", "--config.eval.batch_size=20",
    "--config.prompts_per_step=4", "--config.rollout.prompts_at_once=4",
  ],
  r"\.train .*refl\.py:tiny": [
    "--config.steps=2", "--config.eval.prompts=20", "--config.eval.batch_size=20",
  ],
  r"\.evaluate (?!.*--geneval_results)": ["--prompts=8"],
}
OTHERS = {"enable-hierarchical-namespace", "mmproj"}  # flags of other programs


class _Parsed(BaseException):
  """The arguments were understood; raised in place of what the command would do."""


def parse(command: str) -> None:
  """Lets a `python -m` command read its arguments, and its config where it has one, no more.

  Raises:
    AssertionError: it refuses them; says how.
  """
  words = shlex.split(command)
  assert words[:2] == ["python", "-m"], command

  def known(parser, args=None, namespace=None):
    found, rest = super(errors.ArgumentParser, parser).parse_known_args(args, namespace)
    raise _Parsed(found, rest)

  def whole(parser, args=None, namespace=None):
    found, rest = super(errors.ArgumentParser, parser).parse_known_args(args, namespace)
    if rest:
      parser.error(f"unrecognized arguments: {' '.join(rest)}")
    raise _Parsed(found, [])

  said = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
    patch.setattr(sys, "argv", words[2:])
    patch.setattr(errors.ArgumentParser, "parse_known_args", known)
    patch.setattr(errors.ArgumentParser, "parse_args", whole)
    patch.chdir(ROOT)
    try:
      runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as error:
      raise AssertionError(f"{command}: status {error.code}, {said.getvalue()}") from None
    except _Parsed as parsed:
      args, overrides = parsed.args
      if getattr(args, "config", None):
        config = config_files.load(args.config, overrides)
        (sft if config.algorithm == "sft" else rl).read(config)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS + OF_NOTEBOOK)
def test_the_arguments_of_a_command_are_understood(command):
  words = shlex.split(command)
  if words[0] == "python" and words[2].startswith("unigrpo_jax"):
    parse(command)
  elif words[0] == "python":
    assert words[1] == "-m" and importlib.util.find_spec(words[2]), command
  elif words[0] == "pip":
    assert words[:3] == ["pip", "install", "-r"] and (ROOT / words[3]).is_file()
  elif words[0] == "bash":
    assert (ROOT / words[1]).is_file()
    if "--dry-run" in words:
      subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=300)
  else:
    assert words[0] in ("gcloud", "vllm"), command


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("wrong, why", [
  ("python -m unigrpo_jax.generate --promt=kite", "promt"),
  ("python -m unigrpo_jax.train --config=configs/unigrpo.py:tiny --workdir=w --config.sede=1",
   "sede"),
  ("python -m unigrpo_jax.train --config=configs/unigrpo.py:tny --workdir=w", "tny"),
  ("python -m unigrpo_jax.train --config=configs/unigrpo.py --workdir=w --config.group_size=1",
   "group_size"),
])
def test_wrong_arguments_would_be_seen(wrong, why):
  with pytest.raises((AssertionError, errors.InputError), match=why):
    parse(wrong)


@functools.cache
def _keys():
  """Every dotted key and section of the configs."""
  def walk(config, prefix="config"):
    for key, value in config.items():
      yield f"{prefix}.{key}"
      if isinstance(value, ConfigDict):
        yield from walk(value, f"{prefix}.{key}")

  return {
    key for name in ("unigrpo", "sft")
    for key in walk(config_files.load(str(ROOT / "configs" / f"{name}.py")))
  }


@functools.cache
def _sources():
  """The text of all code."""
  folders = [ROOT / name for name in ("unigrpo_jax", "configs", "launch", "tests")]
  paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
  paths.remove(pathlib.Path(__file__))  # it has wrong ones
  return "\n".join(path.read_text() for path in paths if path.suffix in (".py", ".sh", ".yaml"))


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_the_names_in_sentences_exist(path):
  """Config keys, flags and files."""
  wrong = []
  for code in pages.inline(path):
    for key in re.findall(r"\bconfig\.[a-z0-9_.]*[a-z0-9_]", code):
      # Below the options of rewards names are the user's.
      if key not in _keys() | {"config.json"} and not key.startswith("config.reward_options."):
        wrong.append(key)
    for flag in re.findall(r"(?<![\w-])--([a-z_-]+)\b(?![.\w])", code):
      if flag not in OTHERS and not re.search(rf"--{flag}\b|[\"']{flag}[\"']", _sources()):
        wrong.append(f"--{flag}")
    if re.fullmatch(r"(unigrpo_jax|configs|launch|tests|docs)/[\w./]+", code):
      if not (ROOT / code).exists():
        wrong.append(code)
  assert wrong == []


@functools.cache
def _messages():
  """Every text of the package, with … for what is filled in, in single spaces."""
  def joined(node):
    if isinstance(node, ast.JoinedStr):
      return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return node.value

  found = []
  for path in sorted((ROOT / "unigrpo_jax").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
      ):
        found.append(" ".join(joined(node).replace("`", "").split()))
  return "\n".join(found)


def test_the_messages_of_troubleshooting_are_those_of_the_code():
  """Each piece of a heading, between … and punctuation, is in a text of the package."""
  text = (ROOT / "docs" / "troubleshooting.md").read_text()
  lines = re.findall(r"^(\*\*`.*)\n:   ", text, re.MULTILINE)
  headings = [heading for line in lines for heading in re.findall("`([^`]+)`", line)]
  assert len(headings) > 20
  wrong = [
    (heading, piece) for heading in headings for piece in re.split("[…;:,()=]", heading)
    if piece.strip(" .,;()") not in _messages()
  ]
  assert wrong == []


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
  """The module that the pages write, found by its name."""
  written = [b.text for b in pages.blocks("python") if b.text.startswith("# my_rewards.py\n")]
  assert len(written) == 3  # two pages show the first of two
  (tmp_path / "my_rewards.py").write_text("\n".join(dict.fromkeys(written)))
  monkeypatch.syspath_prepend(str(tmp_path))
  yield
  sys.modules.pop("my_rewards", None)


def test_the_rewards_of_the_pages_score(my_rewards, capsys):
  [trial] = [b for b in pages.blocks("python") if "a white square" in b.text]
  exec(compile(trial.text, trial.page, "exec"), {})
  assert capsys.readouterr().out == "[2.]\n"
  half = np.zeros((4, 4, 3), np.uint8)
  half[:2] = 255
  samples = [rewards.Sample("half", half), rewards.Sample("none", 0 * half)]
  contrast = rewards.make("my_rewards:Contrast", percent=5)
  np.testing.assert_allclose(rewards.evaluate(contrast, samples).values, [1, 0])


def test_the_algorithm_of_the_page_learns():
  """Its loss is the weighted matching error, and an advantage of 0 has no gradient."""
  [block] = [b for b in pages.blocks("python") if "class WeightedMatching" in b.text]
  names = dict(vars(forward))
  exec(compile("from __future__ import annotations\n" + block.text, block.page, "exec"), names)
  fields = dict.fromkeys(f.name for f in forward.ForwardProcess.__dataclass_fields__.values())
  algorithm = names["WeightedMatching"](**fields, scale=2.0)
  v, x_0, noise = jax.random.normal(jax.random.key(0), (3, 2, 1, 3, 4))  # [B, W, I, C]
  matching = dict(x_0=x_0, noise=noise, t=jnp.full((2, 1), 0.5), mask=jnp.ones((2, 1, 3), bool))
  weights = jnp.full((2, 1), 0.5)
  loss = lambda v, adv: algorithm._matching_loss(v, v, adv, weights, matching)[0]
  errors_of = np.square(v - (noise - x_0)).mean((1, 2, 3))
  np.testing.assert_allclose(
    loss(v, jnp.array([1.0, -3.0])), 2 * 0.5 * (errors_of[0] - 3 * errors_of[1]), rtol=1e-5
  )
  np.testing.assert_array_equal(jax.grad(loss)(v, jnp.zeros(2)), 0)


def test_the_numbers_of_an_algorithm_have_their_places():
  text = (ROOT / "docs" / "adding_an_algorithm.md").read_text()
  places = re.findall(r"^\| `(rl|parts)\.py`, `(\w+)`", text, re.MULTILINE)
  assert len(places) == 4
  for module, name in places:
    assert hasattr({"rl": rl, "parts": parts}[module], name), name
  [module] = re.findall(r'an entry `"weighted": (\w+)\.WeightedMatching`', text)
  assert getattr(rl, module) is forward
  [key] = re.findall(r"`(\"flow\.weighted_scale\": checks\.[^`]+)`", text)
  eval(f"{{{key}}}", {"checks": checks})


def test_the_page_of_the_judge_has_its_forms_and_options():
  text = (ROOT / "docs" / "judge.md").read_text()
  options = [field.name for field in dataclasses.fields(forms.Options)]
  for name in [*forms.FORMS, *options]:
    assert re.search(rf"`{name}[`=]", text), name


def test_python_in_the_pages_is_python():
  for block in pages.blocks("python"):
    compile(block.text, f"{block.page}:{block.line}", "exec")


def test_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_links_to_what_is_there():
  """mkdocs checks those between the pages."""
  headings = lambda text: {
    re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  }
  for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
    if not link.startswith("https://"):
      path, _, anchor = link.partition("#")
      assert (ROOT / path).is_file(), link
      assert not anchor or anchor in headings((ROOT / path).read_text()), link


def test_the_site_builds(tmp_path):
  """Every link and anchor leads somewhere, and every page is in the navigation."""
  pytest.importorskip("mkdocs", reason="pip install -r requirements.txt brings it")
  pytest.importorskip("material", reason="pip install -r requirements.txt brings it")
  built = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"],
    cwd=ROOT, capture_output=True, text=True, timeout=600,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
  )
  assert built.returncode == 0, built.stdout + built.stderr
  for path in pages.PAGES[1:]:
    name = path.stem
    page = tmp_path / ("index.html" if name == "index" else f"{name}/index.html")
    # A reader without a network sees all of it.
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?://(?!127)", text), name


@functools.cache
def _why_not_run(command: str) -> str | None:
  return next((why for why, pattern in NOT_RUN.items() if re.search(pattern, command + " ")), None)


def test_most_commands_are_run():
  """A pattern that fits nothing, or everything, would be a mistake."""
  commands = [param.values[0] for param in COMMANDS]
  run = [command for command in commands if not _why_not_run(command)]
  assert len(run) >= 15
  assert {_why_not_run(command) for command in commands} >= set(NOT_RUN)


@pytest.mark.slow
def test_the_commands_run(tmp_path, my_rewards):
  """In the order of the pages, in one folder, as a reader would; see NOT_RUN and LESS."""
  for name in ("unigrpo_jax", "configs", "launch", "tests"):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / "runs").mkdir()
  for name in ("a", "b"):
    (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a red kite"}\n')
  [exam] = [b for b in pages.blocks("json") if "how many kites are there?" in b.text]
  (tmp_path / "exam.jsonl").write_text(exam.text)
  (tmp_path / "question.txt").write_text("{question}")
  judged = {"prompt": "p", "tag": "colors", "metadata": "{}", "correct": True}
  (tmp_path / "results.jsonl").write_text(json.dumps(judged) + "\n")
  environment = os.environ | {"PYTHONPATH": str(tmp_path)}
  environment.pop("XLA_FLAGS")  # eight devices are for tests within this process
  python = lambda words: [sys.executable if words[0] == "python" else words[0], *words[1:]]
  done = set()
  with contextlib.ExitStack() as servers:
    for param in COMMANDS:
      [command] = param.values
      if _why_not_run(command) or command in done:
        continue
      done.add(command)
      words = shlex.split(command)
      for pattern, less in LESS.items():
        words += less * bool(re.search(pattern, command))
      if "unigrpo_jax.rewards.serve" in words:
        with _served(python(words), tmp_path, environment, port=8901):
          _ask_reward()
        continue
      if "unigrpo_jax.serve" in words:  # for the commands below it
        servers.enter_context(_served(python(words), tmp_path, environment, port=8000))
        continue
      ended = subprocess.run(
        python(words), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
      )
      assert not ended.returncode, f"{param.id}: {shlex.join(words)}\n{ended.stdout}{ended.stderr}"
  assert (tmp_path / "runs/tiny.png").stat().st_size > 10_000
  client = "\n".join(b.text for b in pages.blocks("python") if "pipeline" in b.text)
  subprocess.run(
    [sys.executable, "-c", client], cwd=tmp_path, env=environment, check=True, timeout=3000
  )


def _ask_reward() -> None:
  """Runs the client of rewards.md."""
  [client] = [b for b in pages.blocks("python") if "http://127.0.0.1:8901" in b.text]
  names = {"image": np.full((8, 8, 3), 255, np.uint8)}
  exec(compile(client.text, client.page, "exec"), names)
  np.testing.assert_allclose(names["total"], [1.0])


@contextlib.contextmanager
def _served(words, folder: pathlib.Path, environment, *, port: int):
  """Within, the server that a command starts answers."""
  server = subprocess.Popen(words, cwd=folder, env=environment)
  try:
    for _ in range(120):
      time.sleep(1)
      with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        break
    yield
  finally:
    server.terminate()
    server.wait(60)
