"""What a failed or interrupted conversion leaves behind: one line on stderr, and no folder."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.data import atomic
from unigrpo_jax.models import safetensors_files
from unigrpo_jax.runtime import conversion, folders, stored_params

ROOT = pathlib.Path(__file__).parent.parent

# A program that fails in many ways, one after the other. Each way is a section of its stderr, so
# that what a thread says late is counted too, in the section after; the last one stays empty.
PROGRAM = r"""
import os, pathlib, resource, shutil, signal, sys, time, types

source, converted, broken, work = (pathlib.Path(path) for path in sys.argv[1:])
from unigrpo_jax import convert, errors
assert "jax" not in sys.modules, "jax is imported before the arguments are read"

def section(name, arguments, main=convert.main):
  print("===", name, file=sys.stderr, flush=True)
  try:
    errors.report(lambda: main([str(x) for x in arguments]))
    status = 0
  except SystemExit as stop:
    status = stop.code
  print(name, status, *sorted(path.name for path in work.iterdir()), file=answers, flush=True)

answers, sys.stdout = sys.stdout, open(os.devnull, "w")
forward = [f"--source={source}", f"--target={work / 'new'}"]

class Interrupted:
  def find_spec(self, name, path=None, target=None):
    if name == "jax":
      sys.meta_path.remove(self)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)

# What is started in the background or by nohup ignores some signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.meta_path.insert(0, Interrupted())
section("import", forward)

from unigrpo_jax import generate
from unigrpo_jax.runtime import conversion, folders, stored_params
conversion._PIECE_BYTES, stored_params._COMMIT_BYTES = 2**15, 2**20

class limited:
  def __init__(self, kind, value):
    self.kind, self.value = kind, value
  def __enter__(self):
    self.old = resource.getrlimit(self.kind)
    resource.setrlimit(self.kind, (self.value, self.old[1]))
  def __exit__(self, *_):
    resource.setrlimit(self.kind, self.old)

# Fails as a full disk does, in the same threads: first those of Orbax, then of TensorStore.
with limited(resource.RLIMIT_FSIZE, 50_000):
  section("orbax", forward)
with limited(resource.RLIMIT_FSIZE, 200_000):
  section("tensorstore", forward)
  stored_params._COMMIT_BYTES = 2**27
  section("commit", forward)
with limited(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + 2):
  section("files", forward)

def signal_in(owner, function, name):
  # The function sends the process a signal the next time it is called.
  called = getattr(owner, function)
  def kill(*arguments, **keywords):
    setattr(owner, function, called)
    # The second one meets the cleaning that the first one started.
    for _ in range(2):
      os.kill(os.getpid(), getattr(signal, name))
    return called(*arguments, **keywords)
  setattr(owner, function, kill)

for name in ("SIGINT", "SIGTERM", "SIGHUP"):
  signal_in(stored_params.Writer, "write", name)
  section(name, forward)
signal_in(stored_params.ocp, "save", "SIGINT")  # in a thread, which goes on
section("making", forward)
signal_in(stored_params.Reader, "read", "SIGINT")
section("load", [], lambda _: folders.open_folder(converted).load_params())

section("generate", [f"--checkpoint={broken}", "--prompt=x", f"--out={work / 'x.png'}"],
        generate.main)

# The filters drop what Orbax's loops leave, and nothing else.
import logging
section("loud", [], lambda _: (
  logging.getLogger("absl").warning("kept"), logging.getLogger("asyncio").error("kept")
))
class Fails:
  def __init__(self, text): self.text = text
  def __del__(self): raise RuntimeError(self.text)
for text in ("kept", "Event loop is closed"):
  Fails(text)
print("=== rest", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("failures") / "official"
  shutil.copytree(golden, folder, ignore=shutil.ignore_patterns("*.npz", "*.md", "SHA*"))
  return folder


@pytest.fixture(scope="module")
def converted(official) -> pathlib.Path:
  conversion.convert(official, official.parent / "converted")
  return official.parent / "converted"


def test_every_failure_is_one_line_and_leaves_nothing(official, converted, tmp_path):
  broken, work = tmp_path / "broken", tmp_path / "work"
  shutil.copytree(converted, broken)
  work.mkdir()
  # The arrays' descriptions are intact, their values are gone.
  for file in (broken / folders.PARAMS).rglob("*"):
    if file.is_file() and file.stat().st_size > 200_000:
      file.write_bytes(b"")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, official, converted, broken, work], cwd=ROOT,
    capture_output=True, text=True, timeout=300,
  )
  assert done.returncode == 0, done.stderr
  statuses = {"import": 130, "orbax": 1, "tensorstore": 1, "commit": 1, "files": 1}
  statuses |= {"SIGINT": 130, "SIGTERM": 130, "SIGHUP": 130, "making": 130, "load": 130}
  statuses |= {"generate": 2}
  statuses |= {"loud": 0}
  # Name and status: a name after them would be a folder that was left.
  assert done.stdout.splitlines() == [f"{name} {status}" for name, status in statuses.items()]
  printed = {part.split("\n")[0]: part.splitlines()[1:] for part in done.stderr.split("=== ")[1:]}
  assert printed.pop("rest") == []
  loud = "\n".join(printed.pop("loud"))
  printed["generate"] = [x for x in printed["generate"] if not x.startswith("loading ")]
  for name, lines in printed.items():
    assert len(lines) == 1, (name, lines)
    expected = "interrupted" if statuses[name] == 130 else "error: "
    assert lines[0].startswith(expected), (name, lines)
  for name in ("orbax", "tensorstore", "commit"):
    assert "File too large" in printed[name][0] and ".partial-" not in printed[name][0]
  assert "Too many open files" in printed["files"][0]
  assert loud.count("kept") >= 3 and "closed" not in loud
  assert f"{broken / 'params'}: parameter " in printed["generate"][0]
  assert "cannot be read" in printed["generate"][0]


def test_folder_that_is_made_again_while_it_is_removed(tmp_path):
  folder = tmp_path / "new.partial-1"

  def write_on():
    for number in range(8):
      (folder / "params").mkdir(parents=True, exist_ok=True)
      (folder / "params" / str(number)).write_text("")
      time.sleep(0.05)

  writer = threading.Thread(target=write_on)
  writer.start()
  atomic._remove(folder)
  writer.join()
  assert not folder.exists()


@pytest.fixture
def interruptible():
  """What is started in the background ignores Ctrl-C; under this it does not."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_written_ends_however_often_it_is_interrupted(interruptible, fails):
  ended = []

  def write():
    for _ in range(3):
      time.sleep(0.05)
      os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    ended.append(True)
    if fails:
      raise OSError("disk")

  with pytest.raises(KeyboardInterrupt):
    stored_params._uninterrupted(write)
  assert ended
  if fails:
    with pytest.raises(ZeroDivisionError):
      stored_params._uninterrupted(lambda: 1 / 0)


def test_a_commit_is_waited_for_however_often_it_is_interrupted(interruptible, tmp_path):
  ended = []

  class Commit:
    def exception(self):
      for _ in range(3):
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
      ended.append(True)

  arrays = {("a",): stored_params.NewArray((2,), (2,), np.dtype(np.float32))}
  with pytest.raises(KeyboardInterrupt):
    with stored_params.Writer(tmp_path / "params", arrays) as writer:
      writer._commit = Commit()
      raise KeyboardInterrupt
  assert ended


def test_ignored_signals_stay_ignored():
  """Under nohup a closing terminal does not stop the conversion."""
  before, terminate = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
  try:
    with atomic._interruptible():
      os.kill(os.getpid(), signal.SIGHUP)
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is terminate
  finally:
    signal.signal(signal.SIGHUP, before)


def flipped(file: pathlib.Path, text: bytes) -> bool:
  """Flips a bit of the first occurrence of `text` in a file, if there is one."""
  data = bytearray(file.read_bytes())
  place = data.find(text)
  if place < 0:
    return False
  data[place + 2] ^= 1
  file.write_bytes(data)
  return True


def test_damaged_numbers_are_found_by_checksum(official, converted, params, tmp_path, capsys):
  broken = tmp_path / "broken"
  shutil.copytree(converted, broken)
  # One layer of a stack, transposed as it is stored.
  kernel = np.asarray(params["bagel"]["layers"]["gen"]["mlp"]["down"]["kernel"])
  files = [file for file in (broken / folders.PARAMS).rglob("*") if file.is_file()]
  assert sum(flipped(file, kernel[1].tobytes()[:64]) for file in files) == 1
  name = "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
  with pytest.raises(errors.InputError, match=f"tensor {name} .* is damaged") as info:
    conversion.export(broken, tmp_path / "o")
  assert "\n" not in str(info.value) and not (tmp_path / "o").exists()
  capsys.readouterr()
  assert not conversion.check(official, broken)
  (line,) = [x for x in capsys.readouterr().out.splitlines() if "changed since" in x]
  assert line.startswith(name) and line.endswith("(converted changed since the conversion)")


def test_damaged_manifest(converted, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(converted, broken)
  path = broken / folders.MANIFEST
  good = path.read_text()
  for bad in (good[:-100], "[1]", good.replace('"crc32"', '"crc"'), "[" * 100_000,
              good.replace("F32", "F31", 1), good.replace('"dtypes"', '"types"', 1),
              good.replace('"llm2vae.bias"', '"llm2vae.scale"', 1)):
    path.write_text(bad)
    with pytest.raises(errors.InputError) as info:
      conversion.export(broken, tmp_path / "o")
    text = str(info.value)
    assert folders.MANIFEST in text and "convert the official folder again" in text, text
    assert "download" not in text


def test_interrupted_read(official, tmp_path, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "preadv", interrupt)
  with pytest.raises(KeyboardInterrupt):
    conversion.convert(official, tmp_path / "new")
  assert not list(tmp_path.iterdir())


def test_what_is_not_copied_is_named(official, tmp_path, capsys):
  source = tmp_path / "official"
  shutil.copytree(official, source)
  (source / "assets").mkdir()
  (source / "model.bin").symlink_to("absent")
  (source / "notes.txt").symlink_to(official / "llm_config.json")
  conversion.convert(source, tmp_path / "new")
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("note: not copied from") and "notes.txt" not in line
  assert "assets (sub-folder), model.bin (dangling link" in line
  assert (tmp_path / "new" / folders.OFFICIAL / "notes.txt").is_file()


def test_targets_and_checkpoints_that_are_files(official, tmp_path):
  file = tmp_path / "afile.txt"
  file.write_text("")
  for target in (file / "new", file / "deep" / "new"):
    with pytest.raises(errors.InputError, match=r"afile.txt is a file, not a folder") as info:
      conversion.convert(official, target)
    assert "partial" not in str(info.value)
  with pytest.raises(errors.InputError, match="afile.txt: is a file"):
    folders.open_folder(file)


def nan_and_zero(source: pathlib.Path, target: pathlib.Path, name: str, *bits: int) -> None:
  """Copies an official folder with the first numbers of a float32 tensor replaced."""
  shutil.copytree(source, target)
  path = target / "ema.safetensors"
  with safetensors_files.SafetensorsFile(path) as file:
    offset = file.entries[name].start
  with path.open("r+b") as file:
    file.seek(offset)
    file.write(np.array(bits, np.uint32).tobytes())


def test_check_with_nan_and_negative_zero(official, tmp_path, capsys):
  a, b = tmp_path / "a", tmp_path / "b"
  nan_and_zero(official, a, "llm2vae.bias", 0x7FC00000, 0x80000000)
  nan_and_zero(official, b, "llm2vae.bias", 0x7FC00000, 0x00000000)
  conversion.convert(a, tmp_path / "c")
  capsys.readouterr()
  assert conversion.check(a, tmp_path / "c")
  out = capsys.readouterr().out
  assert "287 compared, 0 differ, worst 0\n" in out
  assert "tensors: 1 NaN in the official folder, 1 in the converted one\n" in out
  assert "max abs difference 0, 16 of 256 are NaN on both sides" in out
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(conversion, "_check_forward", lambda *_: True)
    assert not conversion.check(b, tmp_path / "c")
  out = capsys.readouterr().out
  assert "287 compared, 1 differ, worst 0\n" in out
  (line,) = [x for x in out.splitlines() if x.startswith("llm2vae.bias")]
  assert line.endswith("0 (1 differ in their bits) (official changed since the conversion)")


def test_difference_where_one_side_is_no_number():
  difference = conversion.Difference()
  nan, half = np.float32(np.nan), np.float16
  difference.add(np.array([nan, 1, 2], np.float32), np.array([nan, 1, 2], half))
  assert (difference.different, difference.official_nans, difference.converted_nans) == (0, 1, 1)
  difference.add(np.array([nan, 1], np.float32), np.array([0, 3], np.float32))
  assert difference.different == 2 and difference.largest == np.inf
  assert difference.official_nans == 2 and difference.converted_nans == 1
