"""Printing never costs work: encodings, readers that leave, disks that are full."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from unigrpo_jax.data import progress

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = r"""
import logging, pathlib, sys
import tqdm
from unigrpo_jax import errors

def main():
  for number in range(3000):
    print(f"row {number}: \u4e2d\U0001fa81 \udcff", flush=number % 2)
    print("\u8272", file=sys.stderr)
  logging.getLogger("x").warning("\u8272")
  for _ in tqdm.tqdm(range(3), desc="\u8272", mininterval=0):
    pass
  sys.stdout.buffer.write(b"bytes\n")
  pathlib.Path(sys.argv[1]).write_text("done", encoding="utf-8")
  if len(sys.argv) > 2:
    raise errors.InputError("\u8272 is wrong")

errors.report(main)
"""


def test_a_line_of_progress_is_not_repeated(capsys):
  lines = progress._Lines()
  for text in ("\ra: 1 of 2", "\n", "\ra: 1 of 2", "\ra: 2 of 2", "\n"):
    lines.write(text)
  assert capsys.readouterr().err == "a: 1 of 2\na: 2 of 2\n"


def _run(tmp_path, redirect="", environ=(), wrong=False):
  """Status, standard output and error of PROGRAM, and whether it reached its end."""
  done = tmp_path / "done"
  command = [sys.executable, "-c", PROGRAM, str(done), *["wrong"] * wrong]
  result = subprocess.run(
    ["bash", "-c", f"set -o pipefail; \"$@\" {redirect}", "bash", *command], cwd=ROOT,
    env=os.environ | dict(environ), capture_output=True, check=False, timeout=120,
  )
  return result.returncode, result.stdout, result.stderr, done.exists()


@pytest.mark.parametrize("environ", [
  {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii:strict"},
  {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
], ids=["latin-1", "ascii", "locale"])
def test_what_the_terminal_cannot_show_is_an_escape(tmp_path, environ):
  status, out, err, done = _run(tmp_path, environ=environ)
  assert (status, done) == (0, True)
  lines = out.decode("ascii").splitlines()
  assert lines[2999] == r"row 2999: \u4e2d\U0001fa81 \udcff" and lines[-1] == "bytes"
  assert rb"\u8272" in err and b"Error" not in err


def test_utf_8_is_printed_as_it_is(tmp_path):
  out = _run(tmp_path, environ={"PYTHONIOENCODING": "utf-8"})[1]
  assert "row 0: \u4e2d\U0001fa81 \\udcff" in out.decode()


@pytest.mark.parametrize("redirect, printed", [
  ("| head -n 2", b"row 1"), ("2>&1 | head -n 1", b""), ("| true", b""), (">&-", b""),
  (">&- 2>&-", b""), (">/dev/full", b""), (">/dev/full 2>/dev/full", b""),
])
def test_work_goes_on_without_a_reader(tmp_path, redirect, printed):
  status, out, err, done = _run(tmp_path, redirect)
  assert (status, done) == (0, True)
  assert printed in out and b"Error" not in err
  assert (b"note: nothing more is printed (No space left on device)" in err) == (
    redirect == ">/dev/full")


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything(tmp_path):
  reader = (
    "import os, sys, time; os.set_blocking(0, False); time.sleep(0.3); os.set_blocking(0, True); "
    "print(len(sys.stdin.buffer.read().splitlines()))")
  assert _run(tmp_path, f"| {sys.executable} -c '{reader}'")[1] == b"3001\n"


def test_bad_input_has_its_status_without_a_reader(tmp_path):
  assert _run(tmp_path, "2>&1 | true", wrong=True)[0] == 2
  status, _, err, _ = _run(tmp_path, environ={"PYTHONIOENCODING": "ascii"}, wrong=True)
  assert status == 2 and err.endswith(b"error: \\u8272 is wrong\n")


def test_printing_goes_on_whatever_a_reward_does_to_the_streams(tmp_path):
  code = """if True:
    import contextlib, io, logging, sys, numpy
    from unigrpo_jax import errors, rewards

    def closes(samples):
      sys.stdout.close()
      sys.stderr.close()
      return [1.0]

    def leaves_a_closed_one(samples):
      sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
      sys.stdout.close()
      sys.stderr.close()
      raise ValueError("no score")

    def main():
      print("begun")
      for reward in (closes, leaves_a_closed_one):
        scorer = rewards.Scorer({"r": reward}, {"r": 1.0})
        scorer.score([rewards.Sample("", numpy.zeros((1, 1, 3), numpy.uint8))])
        print(scorer.failures["r"].last or "scored")

    errors.report(main)"""
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert (ended.returncode, ended.stdout) == (0, "begun\nscored\nValueError: no score\n"), (
    ended.stderr
  )
  assert "reward r gave 1 NaN: ValueError: no score" in ended.stderr


def test_too_little_memory_is_one_line():
  code = """if True:
    import numpy
    from unigrpo_jax import errors
    errors.report(lambda: numpy.zeros(2**55))"""
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert ended.returncode == 1 and ended.stderr.startswith("error: too little memory (Unable to")
  assert ended.stderr.count("\n") == 1


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
  code = """if True:
    import os, sys
    from unigrpo_jax import errors
    os.mkdir(sys.argv[1])
    os.chdir(sys.argv[1])
    os.rmdir(sys.argv[1])
    errors.report(lambda: print("ran"))"""
  ended = subprocess.run(
    [sys.executable, "-c", code, tmp_path / "gone"], capture_output=True, text=True, timeout=60
  )
  assert (ended.returncode, ended.stdout) == (2, "")
  assert ended.stderr == (
    "error: the current folder cannot be used (No such file or directory); change to another\n"
  )


def test_streams_made_safe_twice_outlive_the_one_they_replace():
  code = """
import os, sys
from unigrpo_jax import errors
sys.stdout = open(os.devnull, "w")
for _ in range(2):
  errors.make_streams_safe()
  print("dropped", flush=True)
print("printed", file=sys.stderr)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, "printed\n")


def test_text_of_a_command_line_is_utf_8_in_any_locale():
  code = "from unigrpo_jax import generate as g; print(ascii(g.parse_args().prompt))"
  done = subprocess.run(
    [sys.executable, "-c", code, "--prompt", "\u8272"], cwd=ROOT, capture_output=True, text=True,
    env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, check=True,
  )
  assert done.stdout == "'\\u8272'\n"


def test_every_command_reports_and_every_text_file_names_its_encoding():
  """A file without one would be in the locale's."""
  for path in (ROOT / "unigrpo_jax").rglob("*.py"):
    source = path.read_text(encoding="utf-8")
    if "\nif __name__ ==" in source:
      assert source.rstrip().split("\n")[-1].startswith("  errors.report("), path
    for node in ast.walk(ast.parse(source)):
      if not isinstance(node, ast.Call) or ast.unparse(node.func) == "atomic.write_text":
        continue
      names = [keyword.arg for keyword in node.keywords]
      name = ast.unparse(node.func).rpartition(".")[2]
      opens = name == "open" and any(
        isinstance(a, ast.Constant) and a.value in ("r", "w", "a", "rt", "wt") for a in node.args)
      if opens or (name in ("write_text", "read_text") and isinstance(node.func, ast.Attribute)):
        assert "encoding" in names, (path, node.lineno)
