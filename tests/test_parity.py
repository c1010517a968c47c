"""The recorded reference outputs are reproduced, and the runner that says so can say otherwise."""

import shutil

import numpy as np
import pytest

from tests.parity import __main__ as runner
from tests.parity import cases
from unigrpo_jax import errors, safetensors_io


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
  """Exit status and output of the command."""
  monkeypatch.setattr("sys.argv", ["parity", *map(str, arguments)])
  try:
    runner.main()
    status = 0
  except SystemExit as exit:
    status = exit.code
  return status, capsys.readouterr().out


def test_every_recorded_output_is_reproduced(golden, monkeypatch, capsys):
  status, output = run(monkeypatch, capsys, golden, "--strict")
  not_passed = [line for line in output.splitlines()[:-1] if not line.endswith(cases.PASS)]
  assert status == 0 and not not_passed, "\n".join([*not_passed, output.splitlines()[-1]])
  # A case a file at least: nothing disappeared with its registration.
  assert {line.split("/")[0] for line in output.splitlines()[:-1]} == set(runner.MODEL_FILES)


@pytest.fixture
def copy(golden, tmp_path):
  """A copy of the recorded folder that a test may spoil."""
  return shutil.copytree(golden, tmp_path / "golden")


def spoil(path, change) -> None:
  """Rewrites an npz file after `change` has had its arrays."""
  with np.load(path) as arrays:
    arrays = {key: arrays[key] for key in arrays.files}
  change(arrays)
  np.savez(path, **arrays)


def test_one_wrong_weight_fails(copy, monkeypatch, capsys):
  path = copy / "ema.safetensors"
  name = "language_model.model.layers.0.mlp.down_proj.weight"
  file = safetensors_io.SafetensorsFile(path)
  file.close()
  entry = file.header.entries[name]
  assert entry.dtype == np.float32
  with path.open("r+b") as raw:
    raw.seek(file.header.data_offset + entry.start)
    raw.write(np.float32(1.0).tobytes())
  status, output = run(monkeypatch, capsys, copy, "--only", "a_")
  assert status == 1
  assert "a_text_forward/chunks" in output and "out_hidden_chunk1:" in output
  assert "a_text_forward/positions  0.00e+00  0.00e+00  exact  PASS" in output


def test_one_wrong_recorded_number_fails(copy, monkeypatch, capsys):
  def nudge(arrays):
    arrays["out_latent"] = arrays.pop("out_packed_latent")
    arrays["out_t_embed"][0, 0] += 3e-4 * (1 + abs(arrays["out_t_embed"][0, 0]))
    arrays["out_mask0"][0, 0] ^= True

  spoil(copy / "l_tables.npz", nudge)
  status, output = run(monkeypatch, capsys, copy, "--only", "l_")
  result = {line.split("  ")[0]: line for line in output.splitlines()}
  assert status == 1
  assert "FAIL  out_t_embed:" in result["l_tables/time_embedder"]
  assert "FAIL  out_mask0:" in result["l_tables/masks"]
  assert "PASS" in result["l_tables/position_ids"]
  # The renamed array is missed under its old name and reported under its new one.
  assert "NOT COVERED" in result["l_tables/pack/out_packed_latent"]
  assert result["l_tables/rest"].endswith("NOT COVERED  out_latent")


def test_what_nobody_compares_is_not_covered(copy, monkeypatch, capsys):
  spoil(copy / "k_transforms.npz", lambda arrays: arrays.update(out_new=np.zeros(3)))
  status, output = run(monkeypatch, capsys, copy, "--only", "k_")
  assert status == 0 and "k_transforms/rest  -  -  -  NOT COVERED  out_new" in output
  status, _ = run(monkeypatch, capsys, copy, "--only", "k_", "--strict")
  assert status == 1


def test_missing_files_are_not_covered(copy, monkeypatch, capsys):
  for name in ("README.md", "d_vae.npz", "ema.safetensors"):
    (copy / name).unlink()
  (copy / "e_t2i_velocity.npz").write_bytes(b"not an archive")
  status, output = run(monkeypatch, capsys, copy)
  result = {line.split("  ")[0]: line for line in output.splitlines()}
  assert status == 1
  assert result["d_vae"].endswith("NOT COVERED  the folder has no such file")
  assert "FAIL  not readable" in result["e_t2i_velocity"]
  assert result["a_text_forward/forward"].endswith("NOT COVERED  the folder has no ema.safetensors")
  assert "NOT COVERED  README.md names no" in result["k_transforms/size_tables"]
  assert "PASS" in result["k_transforms/folder_rules"]
  assert "PASS" in result["l_tables/masks"]


def test_a_case_that_raises_fails_alone(copy, monkeypatch, capsys):
  spoil(copy / "l_tables.npz", lambda a: a.update(in_latent=a["in_latent"][:, :3]))
  status, output = run(monkeypatch, capsys, copy, "--only", "l_")
  assert status == 1 and "l_tables/packed_latent  -  -  -  FAIL  ValueError: latents of" in output
  assert "l_tables/masks  0.00e+00" in output


def test_a_folder_without_recordings_is_an_input_error(tmp_path):
  for folder in (tmp_path, tmp_path / "missing"):
    with pytest.raises(errors.InputError, match="give a folder of recorded outputs"):
      runner.check(folder)


@pytest.mark.parametrize(("actual", "recorded", "tolerance", "agrees"), [
  ([1.00019], [1.0], cases.MODEL, True),
  ([1.00021], [1.0], cases.MODEL, False),
  ([2**24 + 1], [2**24], cases.EXACT, False),
  ([255], [254], cases.PIXELS, True),
  ([255], [253], cases.PIXELS, False),
  ([3.0, 4.004], [3.0, 4.0], cases.GRADIENT, True),
  ([3.0, 4.006], [3.0, 4.0], cases.GRADIENT, False),
  ([1 + 2e-6], [1.0], cases.FORMULA, False),
  ([np.nan], [1.0], cases.MODEL, False),
  ([1.0], [np.nan], cases.MODEL, False),
  ([1.0, np.nan], [1.0, np.nan], cases.GRADIENT, False),
  ([np.inf], [1.0], cases.LOOP, False),
])
def test_tolerances(actual, recorded, tolerance, agrees):
  dtype = np.float64 if isinstance(recorded[0], float) else np.int64
  assert tolerance.compare(np.array(actual, dtype), np.array(recorded, dtype))[2] == agrees


def test_a_shape_mismatch_fails(tmp_path):
  np.savez(tmp_path / "x.npz", out_a=np.zeros((2, 1)))
  recording = cases.Recording(tmp_path / "x.npz")
  recording.check("case", "out_a", np.zeros(2), cases.MODEL)
  assert str(recording.lines[0]).endswith("FAIL  out_a: shape [2], recorded [2, 1]")
