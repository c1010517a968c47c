"""Official folder -> Orbax -> official folder: nothing changes, and nothing half-made stays."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest
import safetensors

from tests.refusals import refusal
from unigrpo_jax import convert, errors
from unigrpo_jax.runtime import conversion, folders, hub, stored_params


def digests(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in folder.rglob("*") if file.is_file()
  }


def run(capsys, *arguments: str) -> tuple[int, str, str]:
  """Runs the command as a shell would: (exit status, stdout, stderr)."""
  status = 0
  try:
    errors.report(lambda: convert.main(list(arguments)))
  except SystemExit as stop:
    status = stop.code or 0
  out, err = capsys.readouterr()
  return status, out, err


def refuse(capsys, *arguments: str, expected: int = 2) -> str:
  """Runs a command that must fail with one line and that status; returns the line."""
  status, _, err = run(capsys, *arguments)
  assert status == expected and err.startswith("error: ") and err.count("\n") == 1, err
  return err


@pytest.fixture
def pieces(monkeypatch):
  """Makes the tiny model stream as the large one does: by layers, and by rows within a tensor."""
  monkeypatch.setattr(conversion, "_PIECE_BYTES", 2**15)
  monkeypatch.setattr(stored_params, "_CHUNK_BYTES", 2**13)
  monkeypatch.setattr(stored_params, "_COMMIT_BYTES", 2**16)


@pytest.fixture
def official(golden, tmp_path) -> pathlib.Path:
  """The golden model without the recordings, to be damaged."""
  folder = tmp_path / "official"
  folder.mkdir()
  for file in golden.iterdir():
    if file.suffix in (".json", ".safetensors"):
      shutil.copyfile(file, folder / file.name)
  return folder


@pytest.fixture
def converted(official, tmp_path) -> pathlib.Path:
  conversion.convert(official, tmp_path / "converted")
  return tmp_path / "converted"


IN_FLOAT16 = "language_model.model.layers.1.mlp.up_proj.weight"


def contents(path: pathlib.Path) -> tuple[dict, dict]:
  """Metadata, and {name: (dtype, shape, bytes)}, by the safetensors library."""
  with safetensors.safe_open(path, framework="np") as file:
    metadata = file.metadata()
  tensors = safetensors.deserialize(path.read_bytes())
  return metadata, {
    name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in tensors
  }


def assert_equal(exported: pathlib.Path, official: pathlib.Path) -> None:
  """Every tensor and the metadata of weight files, and every other file, bit for bit."""
  after, before = digests(exported), digests(official)
  assert after.keys() == before.keys()
  for name in before:
    if name.endswith(".safetensors"):
      assert contents(exported / name) == contents(official / name), name
    else:
      assert after[name] == before[name], name


def to_bfloat16(path: pathlib.Path) -> None:
  """Rewrites a float32 file in bfloat16, one tensor in float16, with an unusual header."""
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header, entries, body = json.loads(data[8 : 8 + length]), {}, b""
  for name in reversed(header):
    start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
    kind, dtype = ("F16", np.float16) if name == IN_FLOAT16 else ("BF16", ml_dtypes.bfloat16)
    raw = np.frombuffer(data[start:stop], np.float32).astype(dtype).tobytes()
    entries[name] = {
      "shape": header[name]["shape"], "data_offsets": [len(body), len(body) + len(raw)],
      "dtype": kind,
    }
    body += raw
  # The order of names is not the order of the data.
  entries = {"__metadata__": {"format": "pt", "note": "ünïcode"}} | dict(sorted(entries.items()))
  text = json.dumps(entries, indent=1, ensure_ascii=False).encode() + b"   "
  path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_round_trip_of_every_file(golden, tmp_path, capsys, pieces):
  before = digests(golden)
  assert run(capsys, f"--source={golden}", f"--target={tmp_path / 'c'}")[0] == 0
  status, out, _ = run(
    capsys, "--export", f"--source={tmp_path / 'c'}", f"--target={tmp_path / 'o'}"
  )
  assert status == 0 and "wrote" in out
  assert_equal(tmp_path / "o", golden)
  assert digests(golden) == before
  assert sorted(x.name for x in tmp_path.iterdir()) == ["c", "o"]


def test_round_trip_of_the_embedded_checkpoint(tmp_path):
  """It is an official folder like any other."""
  convert.main(["--source=tiny", f"--target={tmp_path / 'c'}"])
  conversion.export(tmp_path / "c", tmp_path / "o")
  assert_equal(tmp_path / "o", folders.TINY_FOLDER)
  assert sum(file.stat().st_size for file in folders.TINY_FOLDER.iterdir()) <= 12e6
  params = folders.open_folder(tmp_path / "c").load_params()
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 8e6


def test_what_a_folder_lacks_is_taken_from_the_embedded_checkpoint(tmp_path):
  (tmp_path / "tuned").mkdir()
  shutil.copy(folders.TINY_FOLDER / "ema.safetensors", tmp_path / "tuned")
  target = tmp_path / "c"
  convert.main([f"--source={tmp_path / 'tuned'}", "--missing_from=tiny", f"--target={target}"])
  assert folders.open_folder(target).fingerprint() == folders.open_folder("tiny").fingerprint()


def test_what_fills_a_fine_tune_is_not_replaced_by_it(official, tmp_path):
  (tmp_path / "tuned").mkdir()
  shutil.copy(official / "ema.safetensors", tmp_path / "tuned")
  before = {path.name: path.read_bytes() for path in official.iterdir()}
  message = refusal(
    conversion.convert, tmp_path / "tuned", official, missing_from=official, overwrite=True)
  assert str(official) in message
  assert {path.name: path.read_bytes() for path in official.iterdir()} == before


def test_round_trip_of_mixed_dtypes_and_an_unusual_header(official, tmp_path, pieces):
  to_bfloat16(official / "ema.safetensors")
  conversion.convert(official, tmp_path / "c")
  params = folders.open_folder(tmp_path / "c").load_params()
  # A stack of two dtypes is stored in float32, which holds both.
  mixed = params["bagel"]["layers"]["und"]["mlp"].pop("up")
  assert mixed["kernel"].dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(params["bagel"])} == {jnp.dtype(jnp.bfloat16)}
  conversion.export(tmp_path / "c", tmp_path / "o")
  assert_equal(tmp_path / "o", official)


def test_orbax_alone_reads_what_was_streamed(official, tmp_path, params, pieces):
  conversion.convert(official, tmp_path / "c")
  loaded = ocp.load(tmp_path / "c" / folders.PARAMS)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_sharded_restore(converted, params):
  mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec

  def split(x):
    axes = [name if x.ndim > 1 and size % mesh.shape[name] == 0 else None
            for name, size in zip(("fsdp", "tensor"), x.shape[-2:])]
    return jax.sharding.NamedSharding(mesh, spec(*(None,) * (x.ndim - len(axes)), *axes))

  shardings = jax.tree.map(split, params)
  loaded = folders.open_folder(converted).load_params(
    dtype={"bagel": jnp.bfloat16}, shardings=shardings
  )

  def compare(a, b, sharding):
    assert b.sharding == sharding
    np.testing.assert_array_equal(a.astype(b.dtype), b)

  jax.tree.map(compare, params, loaded, shardings)
  assert loaded["bagel"]["lm_head"]["kernel"].dtype == jnp.bfloat16
  assert loaded["vae"]["encoder"]["conv_in"]["kernel"].dtype == jnp.float32


def test_one_part(converted):
  assert set(folders.open_folder(converted).load_params(parts=("vae",))) == {"vae"}


def to_version_1(converted: pathlib.Path, official: pathlib.Path, params) -> None:
  """Makes of a converted folder what the first version of the conversion wrote."""
  manifest = json.loads((converted / folders.MANIFEST).read_text())
  for name, record in manifest["weights"].items():
    data = (official / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    manifest["weights"][name] = {
      "header": data[8 : 8 + length].decode(), "crc32": record["crc32"],
    }
  manifest |= {"format_version": 1, "params": 123}
  (converted / folders.MANIFEST).write_text(json.dumps(manifest, indent=1))
  shutil.rmtree(converted / folders.PARAMS)
  ocp.save(converted / folders.PARAMS, params)


def test_folders_of_the_first_version_still_work(official, converted, params, tmp_path, capsys):
  to_version_1(converted, official, params)
  jax.tree.map(np.testing.assert_array_equal, folders.open_folder(converted).load_params(), params)
  conversion.export(converted, tmp_path / "o")
  assert_equal(tmp_path / "o", official)
  assert conversion.check(official, converted)
  changed = params | {"vae": jax.tree.map(lambda x: x + 1, params["vae"])}
  to_version_1(converted, official, changed)
  with pytest.raises(errors.InputError, match="tensor encoder.conv_in.weight .* is damaged"):
    conversion.export(converted, tmp_path / "o2")


def test_check_passes_on_a_conversion(official, converted, capsys):
  status, out, _ = run(capsys, "--check", f"--source={official}", f"--target={converted}")
  assert status == 0
  assert "tensors: 287 compared, 0 differ, worst 0\n" in out
  assert "different: none" in out and "forward pass: velocity" in out


def test_check_finds_one_changed_number(official, converted, params, capsys):
  bias = params["bagel"]["llm2vae"]["bias"]
  changed = params | {"bagel": params["bagel"] | {"llm2vae": params["bagel"]["llm2vae"] | {
    "bias": bias.at[3].add(0.25)}}}
  shutil.rmtree(converted / folders.PARAMS)
  ocp.save(converted / folders.PARAMS, changed)
  status, out, _ = run(capsys, "--check", f"--source={official}", f"--target={converted}")
  assert status == 1
  assert "tensors: 287 compared, 1 differ, worst 0.25\n" in out
  (line,) = [line for line in out.splitlines() if line.startswith("llm2vae.bias")]
  assert line.endswith(" 0.25 (converted changed since the conversion)")
  velocity = [line for line in out.splitlines() if "velocity" in line][0]
  assert float(velocity.split()[-1]) == pytest.approx(0.25, rel=1e-5)


def test_check_finds_a_changed_file(official, converted, capsys):
  (converted / folders.OFFICIAL / "vit_config.json").write_text(
    (official / "vit_config.json").read_text() + "\n"
  )
  status, out, _ = run(capsys, "--check", f"--source={official}", f"--target={converted}")
  assert status == 1 and "different: vit_config.json" in out


def test_existing_target_is_refused_then_replaced(official, converted, capsys):
  line = refuse(capsys, f"--source={official}", f"--target={converted}")
  assert "--overwrite" in line
  (converted / "stale").write_text("")
  assert run(capsys, f"--source={official}", f"--target={converted}", "--overwrite")[0] == 0
  assert not (converted / "stale").exists()
  assert sorted(x.name for x in converted.parent.iterdir()) == ["converted", "official"]


def test_overwrite_spares_what_is_no_model_folder(official, tmp_path, capsys):
  home = tmp_path / "home"
  home.mkdir()
  (home / "thesis.tex").write_text("x")
  line = refuse(capsys, f"--source={official}", f"--target={home}", "--overwrite")
  assert "holds something else" in line and (home / "thesis.tex").exists()


@pytest.mark.parametrize("target", [".", "..", "inside/.."])
def test_the_current_folder_is_not_replaced(official, tmp_path, target, capsys, monkeypatch):
  (tmp_path / "here" / "inside").mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "here" / ("inside" if target == ".." else ""))
  line = refuse(capsys, f"--source={official}", f"--target={target}", "--overwrite")
  assert "is the current folder or holds it" in line


@pytest.mark.parametrize("target", [".", "inside", ".."])
def test_target_may_not_overlap_the_source(official, target, capsys):
  before = digests(official)
  line = refuse(capsys, f"--source={official}", f"--target={official / target}", "--overwrite")
  assert "overlaps" in line and digests(official) == before


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_nothing(official, converted, tmp_path, failure, exists, monkeypatch):
  class Progress(contextlib.nullcontext):
    def update(self, nbytes):
      raise failure

  monkeypatch.setattr(conversion.progress, "bar", lambda *_, **__: Progress(Progress()))
  before = digests(tmp_path)
  new = converted if exists else tmp_path / "deep" / "new"
  with pytest.raises(type(failure)):
    conversion.convert(official, new, overwrite=exists)
  assert digests(tmp_path) == before
  back = tmp_path / "back"
  with pytest.raises(type(failure)):
    conversion.export(converted, back)
  assert digests(tmp_path) == before
  assert sorted(x.name for x in tmp_path.iterdir()) == ["converted", "official"]


def test_full_disk_is_refused_before_writing(official, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**20))
  line = refuse(capsys, f"--source={official}", f"--target={tmp_path / 'c'}", expected=1)
  assert "needs 0.01 GB" in line and not (tmp_path / "c").exists()


def test_wrong_direction(official, converted, tmp_path, capsys):
  target = f"--target={tmp_path / 'new'}"
  assert "--export" in refuse(capsys, f"--source={converted}", target)
  assert "convert it first" in refuse(capsys, "--export", f"--source={official}", target)
  line = refuse(capsys, "--check", "--overwrite", f"--source={official}", target)
  assert "--overwrite has no effect with --check" in line


def test_hub_that_does_not_answer(tmp_path):
  """A server that accepts the connection and stays silent: the command gives up in seconds."""
  pytest.importorskip("huggingface_hub")
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    code = (
      "from unigrpo_jax import convert, errors; convert.hub._SECONDS = 1; "
      "errors.report(lambda: convert.main(['--source=some/model', '--target=never']))"
    )
    # A process of its own: the hub's library reads its endpoint when it is imported.
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
      [sys.executable, "-c", code], env=environment,
      cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, timeout=60,
    )
  assert done.returncode == 1 and "hub did not deliver it" in done.stderr


def test_hub_download_is_converted(official, tmp_path, capsys, monkeypatch):
  find = lambda source, *_: official if source == "some/model" else pathlib.Path(source)
  monkeypatch.setattr(hub, "find", find)
  assert run(capsys, "--source=some/model", f"--target={tmp_path / 'c'}")[0] == 0
  assert folders.open_folder(tmp_path / "c").kind == "converted"


def test_missing_source(tmp_path, capsys):
  line = refuse(capsys, f"--source={tmp_path / 'absent'}", f"--target={tmp_path / 'c'}")
  assert "no such folder" in line


def test_damaged_converted_folders(converted, tmp_path, capsys):
  back = ("--export", f"--source={converted}", f"--target={tmp_path / 'o'}")
  config = converted / folders.OFFICIAL / "llm_config.json"
  good = config.read_text()
  config.write_text(json.dumps(json.loads(good) | {"hidden_size": 128}))
  assert "llm_config.json" in refuse(capsys, *back)
  with pytest.raises(errors.InputError, match=r"stored as \[2, 64\].* asks for \[2, 128\]"):
    folders.open_folder(converted).load_params()
  config.write_text(good)

  manifest = converted / folders.MANIFEST
  good = manifest.read_text()
  manifest.write_text(json.dumps(json.loads(good) | {"format_version": 99}))
  assert "format_version=99" in refuse(capsys, *back)
  manifest.write_text(json.dumps({"format_version": 2, "weights": {}}))
  assert "the record of ema.safetensors is damaged; convert" in refuse(capsys, *back)
  manifest.write_text(good)

  data = max((converted / folders.PARAMS).rglob("*"), key=lambda x: x.is_file() * x.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  assert "cannot be read" in refuse(capsys, *back)
  with pytest.raises(errors.InputError, match="cannot be read"):
    folders.open_folder(converted).load_params()
  shutil.rmtree(converted / folders.PARAMS)
  assert "no such checkpoint folder" in refuse(capsys, *back)
  assert not (tmp_path / "o").exists()


def test_parameter_absent_from_the_checkpoint(converted, params, tmp_path, capsys):
  shutil.rmtree(converted / folders.PARAMS)
  partial = {part: dict(tree) for part, tree in params.items()}
  del partial["bagel"]["vae2llm"]
  ocp.save(converted / folders.PARAMS, partial)
  line = refuse(capsys, "--export", f"--source={converted}", f"--target={tmp_path / 'o'}")
  assert "bagel/vae2llm/kernel cannot be read" in line
  with pytest.raises(errors.InputError, match="bagel/vae2llm/kernel"):
    folders.open_folder(converted).load_params()


def test_stored_dtypes_are_those_of_the_files(converted):
  with folders.open_folder(converted).open_params() as reader:
    assert {reader.dtype(leaf) for leaf in reader.leaves} == {np.dtype(np.float32)}
