"""Names of the Hugging Face hub: downloaded once, from the cache when offline, one line else."""

import errno
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import pytest

from unigrpo_jax import errors
from unigrpo_jax.runtime import folders, hub

ROOT = pathlib.Path(__file__).parents[1]
COMMIT = "c" * 40
NAME = "ByteDance-Seed/BAGEL-7B-MoT"


class FakeHub(types.ModuleType):
  """Stands for huggingface_hub: a repository whose snapshot is a folder."""

  def __init__(self, folder, cache, failure=None):
    super().__init__("huggingface_hub")
    self.folder, self.failure, self.cached, self.calls = folder, failure, set(), []
    self.constants = types.SimpleNamespace(HF_HUB_CACHE=str(cache))

  def HfApi(self):
    return self

  def repo_info(self, name, revision, timeout, files_metadata):
    if self.failure:
      raise self.failure
    names = [*os.listdir(self.folder), "other.safetensors", "sub/a.json", "big.bin"]
    files = [types.SimpleNamespace(rfilename=name, size=10**9) for name in names]
    return types.SimpleNamespace(sha=COMMIT, siblings=files)

  def try_to_load_from_cache(self, name, file, revision):
    return str(self.folder / file) if file in self.cached else None

  def snapshot_download(self, name, revision, allow_patterns, local_files_only=False):
    self.calls.append((name, revision, sorted(allow_patterns)))
    if local_files_only and not self.cached:
      raise FileNotFoundError("not in the cache")
    snapshot = pathlib.Path(self.constants.HF_HUB_CACHE) / COMMIT
    snapshot.mkdir(exist_ok=True)
    for file in () if local_files_only else allow_patterns:
      (snapshot / file).write_bytes((self.folder / file).read_bytes())
      self.cached.add(file)
    return str(snapshot)


@pytest.fixture
def fake(golden, tmp_path, monkeypatch):
  made = FakeHub(golden, tmp_path)
  monkeypatch.setitem(sys.modules, "huggingface_hub", made)
  monkeypatch.chdir(tmp_path)
  return made


def test_configs_come_first_and_weights_when_they_are_read(fake, capsys):
  folder = folders.open_folder(NAME)
  [(name, revision, files)] = fake.calls
  assert (name, revision) == (NAME, None)
  assert "llm_config.json" in files and not [f for f in files if f.endswith((".safetensors", "/"))]
  line = capsys.readouterr().err
  assert f"downloading {NAME} from the Hugging Face hub: {len(files)} file(s), " in line
  assert f"{len(files)}.0 GB, into {fake.constants.HF_HUB_CACHE}; " in line
  assert folder.kind == "official" and folder.config.llm.num_layers == 2

  folder.load_params(parts=("vae",))
  name, revision, files = fake.calls[-1]
  assert (name, revision) == (NAME, COMMIT)  # of the same commit, whatever was pushed since
  assert {"ema.safetensors", "ae.safetensors"} <= set(files)
  assert not {"other.safetensors", "sub/a.json", "big.bin"} & set(files)
  assert "2 file(s), 2.0 GB" in capsys.readouterr().err
  folder.load_params(parts=("vae",))
  assert not capsys.readouterr().err  # nothing is missing, so nothing is announced


def test_a_folder_of_that_name_wins(fake, golden, tmp_path):
  (tmp_path / "ByteDance-Seed").mkdir()
  (tmp_path / NAME).symlink_to(golden)
  assert folders.open_folder(NAME).path == pathlib.Path(NAME) and not fake.calls


@pytest.mark.parametrize("path", ["tiny", "a/b/c", "/a/b", "./a", "../a", "a", "a/", "~/a"])
def test_other_paths_are_no_names(fake, path):
  assert hub.find(path) == pathlib.Path(path).expanduser() and not fake.calls


def test_a_revision(fake):
  hub.find(f"{NAME}@v1.0")
  assert fake.calls[0][:2] == (NAME, "v1.0")


def _named(name, message):
  return type(name, (Exception,), {})(message)


@pytest.mark.parametrize("failure, kind, words", [
  (_named("RepositoryNotFoundError", "404"), errors.InputError, "does not give it .404.; check"),
  (_named("GatedRepoError", "\n403\nmore"), errors.InputError, "(403).*set HF_TOKEN"),
  (_named("OfflineModeIsEnabled", "x"), errors.InputError, "HF_HUB_OFFLINE is set: unset it"),
  (ConnectionError("no route\nmore"), errors.Storage, "did not deliver it .no route.; check"),
  (TimeoutError(), errors.Storage, "TimeoutError"),
])
def test_without_the_hub_the_cache_serves_and_its_lack_is_one_line(fake, failure, kind, words):
  fake.failure = failure
  with pytest.raises(errors.InputError, match=f"{NAME}: no such folder, and .*{words}") as raised:
    hub.find(NAME)
  assert type(raised.value) is kind
  # With configs in the cache but no weights, only the configs can be had.
  fake.failure = None
  hub.find(NAME, hub.CONFIGS)
  fake.failure = failure
  assert hub.find(NAME, hub.CONFIGS).name == COMMIT
  with pytest.raises(errors.InputError, match=words):
    hub.find(NAME)
  fake.failure = None
  hub.find(NAME)
  fake.failure = failure
  assert (hub.find(NAME) / "ae.safetensors").is_file()


def test_no_library_no_room_and_a_full_disk(fake, monkeypatch):
  usage = types.SimpleNamespace(free=10**9)
  with monkeypatch.context() as patch:
    patch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(errors.InputError, match=r"takes \d+.0 GB, 1.0 GB are free in .*HF_HOME"):
      hub.find(NAME)
  full = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
  monkeypatch.setattr(FakeHub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(full))
  with pytest.raises(errors.Storage, match="/cache/blob.*free disk space"):
    hub.find(NAME)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(errors.InputError, match="pip install huggingface_hub"):
    hub.find(NAME)


def _serve(folder):
  """A hub on loopback with one repository, some/model; its address, and the server."""
  files = {path.name: path for path in folder.iterdir()}

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
      pass

    def answer(self, body, status=200, **headers):
      self.send_response(status)
      for name, value in {"Content_Length": str(len(body)), **headers}.items():
        self.send_header(name.replace("_", "-"), value)
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    def do_GET(self):
      path, repository = self.path.partition("?")[0], "/some/model"
      sizes = {name: path.stat().st_size for name, path in files.items()}
      if path.startswith(f"/api/models{repository}/tree"):
        self.answer(json.dumps([
          {"type": "file", "path": name, "size": size, "oid": "a"} for name, size in sizes.items()
        ]).encode())
      elif path.startswith(f"/api/models{repository}"):
        self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [
          {"rfilename": name, "size": size} for name, size in sizes.items()
        ]}).encode())
      elif path.startswith(f"{repository}/resolve/"):
        data = files[path.rsplit("/", 1)[1]].read_bytes()
        self.answer(data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
      else:
        self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return f"http://127.0.0.1:{server.server_address[1]}", server


def test_the_library_itself_and_a_hub_on_loopback(golden, tmp_path):
  pytest.importorskip("huggingface_hub")
  address, server = _serve(golden)

  def find(*sources, **environment):
    code = "import sys\nfrom unigrpo_jax import errors\nfrom unigrpo_jax.runtime import hub\n"
    code += "for source in sys.argv[1:]: errors.report(lambda: print(hub.find(source)))"
    # A process of its own: the library reads its environment when it is imported.
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)} | environment
    return subprocess.run(
      [sys.executable, "-c", code, *sources], env=environment, cwd=ROOT, capture_output=True,
      text=True, timeout=300,
    )

  with server:
    done = find("some/model", "some/other")
    server.shutdown()
  snapshot = pathlib.Path(done.stdout.strip())
  assert "downloading some/model from the Hugging Face hub: " in done.stderr
  for name in ("llm_config.json", "ema.safetensors", "ae.safetensors"):
    assert (snapshot / name).read_bytes() == (golden / name).read_bytes()
  assert not list(snapshot.glob("*.npz"))
  assert done.returncode == 2 and "error: some/other: no such folder" in done.stderr
  offline = find("some/model", HF_HUB_OFFLINE="1")
  assert pathlib.Path(offline.stdout.strip()) == snapshot
