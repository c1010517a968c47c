"""The recorded reference outputs are reproduced, and the runner that says so can say otherwise."""

import shutil

import numpy as np
import pytest

from tests.parity import __main__ as runner
from tests.parity import cases, network, objectives, refl, training
from unigrpo_jax import errors
from unigrpo_jax.episodes import packing
from unigrpo_jax.models import safetensors_files


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
  files = {file.stem for file in golden.glob("*.npz")}
  assert {line.split("/")[0] for line in output.splitlines()[:-1]} == files


def test_recorded_rewards_are_reproduced(golden_rewards, monkeypatch, capsys):
  status, output = run(monkeypatch, capsys, golden_rewards)
  lines = output.splitlines()[:-1]
  assert status == 0 and not [line for line in lines if cases.FAIL in line], output
  # What needs a file that is fetched may be missing; a recording without a case may not.
  assert "no case reads" not in output


def test_a_folder_of_folders_lists_what_no_case_reads(
  golden_rewards, tmp_path, monkeypatch, capsys
):
  rules = golden_rewards / "geneval" / "rules.jsonl"
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "more_rules.jsonl").write_text(rules.read_text().replace("true", "false"))
  (tmp_path / "new" / "other.json").write_text("{}")
  status, output = run(monkeypatch, capsys, tmp_path)
  assert status == 1 and "new/more_rules/official  1.00e+00" in output
  assert "new/other/rest  -  -  -  NOT COVERED  no case reads new/other.json" in output


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
  with safetensors_files.SafetensorsFile(path) as file:
    entry = file.entries[name]
  assert entry.dtype == np.float32
  with path.open("r+b") as raw:
    raw.seek(entry.start)
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
  missing = "NOT COVERED  README.md describes out_packed_latent"
  assert result["l_tables/missing"].endswith(missing)
  assert result["l_tables/rest"].endswith("NOT COVERED  out_latent")


@pytest.mark.parametrize(("file", "change"), [
  ("b_greedy_text", "out_batch_tokens"),
  ("e_t2i_velocity", "out_key_cache_l1"),
  ("g2_generate_cfg_pack", "channel__out_first_step_v_text_uncond"),
  ("i_edit", "call3_text_pos"),
  ("i_edit", "out_image_uint8"),
])
def test_a_wrong_result_of_any_kind_fails(copy, monkeypatch, capsys, file, change):
  def nudge(arrays):
    value = arrays[change]
    # Read by the case as well as compared: reading must not count for comparing.
    step = 0.01 * value if value.dtype.kind == "f" else np.full_like(value, 2)
    arrays[change] = np.where(value > 127, value - step, value + step).astype(value.dtype)

  spoil(copy / f"{file}.npz", nudge)
  status, output = run(monkeypatch, capsys, copy, "--only", file)
  assert status == 1 and f"FAIL  {change}:" in output


def test_a_file_of_another_name_is_known_by_its_arrays(copy, monkeypatch, capsys):
  (copy / "l_tables.npz").rename(copy / "more_tables.npz")
  status, output = run(monkeypatch, capsys, copy, "--only", "more", "--strict")
  assert status == 0 and "more_tables/masks  0.00e+00" in output


def test_what_nobody_compares_is_not_covered(copy, monkeypatch, capsys):
  spoil(copy / "k_transforms.npz", lambda arrays: arrays.update(out_new=np.zeros(3)))
  status, output = run(monkeypatch, capsys, copy, "--only", "k_")
  assert status == 0 and "k_transforms/rest  -  -  -  NOT COVERED  out_new" in output
  status, _ = run(monkeypatch, capsys, copy, "--only", "k_", "--strict")
  assert status == 1


def test_missing_files_are_not_covered(copy, monkeypatch, capsys):
  for name in ("d_vae.npz", "ema.safetensors"):
    (copy / name).unlink()
  (copy / "e_t2i_velocity.npz").write_bytes(b"not an archive")
  status, output = run(monkeypatch, capsys, copy, "--only", "d_vae")
  assert status == 0 and "d_vae  -  -  -  NOT COVERED  the folder has no such file" in output
  # Nobody asks for what nothing describes.
  (copy / "README.md").unlink()
  status, output = run(monkeypatch, capsys, copy)
  result = {line.split("  ")[0]: line for line in output.splitlines()}
  assert status == 1 and "d_vae" not in result
  assert "FAIL  not readable" in result["e_t2i_velocity"]
  assert result["a_text_forward/forward"].endswith("NOT COVERED  the folder has no ema.safetensors")
  assert "out_hidden_chunk1" in result["a_text_forward/rest"]
  assert "NOT COVERED  README.md names no" in result["k_transforms/size_tables"]
  assert "PASS" in result["k_transforms/folder_rules"]
  assert "PASS" in result["l_tables/masks"]


def test_a_case_that_raises_fails_alone(copy, monkeypatch, capsys):
  spoil(copy / "l_tables.npz", lambda a: a.update(in_latent=a["in_latent"][:, :3]))
  status, output = run(monkeypatch, capsys, copy, "--only", "l_")
  assert status == 1
  assert "l_tables/packed_latent  -  -  -  FAIL  ValueError: cannot reshape" in output
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
  ([2.0, 1.9e-5], [2.0, 0.0], refl.VALUE, True),
  ([2.0, 2.1e-5], [2.0, 0.0], refl.VALUE, False),
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


def run_case(tmp_path, case, arrays) -> dict[str, str]:
  """{line: result} of a case of formulas, of a recording of these arrays."""
  np.savez(tmp_path / "made.npz", **arrays)
  recording = cases.Recording(tmp_path / "made.npz")
  recording.run(case, None)
  return {line.name.partition("/")[2]: str(line) for line in recording.lines}


def test_a_group_of_one_as_each_project_has_it(tmp_path):
  """verl-omni takes its reward for its mean, verl takes 0."""
  rewards = np.array([0.25, 0.5, 1.0], np.float32)
  arrays = {"a/rewards": rewards, "a/group_index": np.array([0, 1, 1])}
  pair = np.array([-0.25, 0.25])
  for name in ("verl_omni_nostd", "verl_drgrpo", "verl_omni_global0", "verl_omni_global1"):
    alone = 0.25 if name == "verl_drgrpo" else 0.0
    spread = {"0": np.std(rewards[1:], ddof=1), "1": np.std(rewards, ddof=1)}.get(name[-1])
    scale = 1.0 if spread is None else spread + 1e-4
    arrays[f"a/{name}"] = np.array([alone, *(pair / scale)], np.float32)
  lines = run_case(tmp_path, objectives.group_advantages, arrays)
  assert len(lines) == 5 and all(line.endswith(cases.PASS) for line in lines.values()), lines


def test_images_of_direct_alignment_need_not_be_square(tmp_path):
  """Without noise and movement the image is the clean one, scaled; its pixels lie row by row."""
  rng = np.random.default_rng(0)
  height, width, channels, colours = 1, 3, 2, 2
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  clean, decoder = draw(1, height * width, 8), draw(channels, colours)
  sigmas = np.linspace(1, 0, 1000, endpoint=False, dtype=np.float32)
  image = np.zeros((1, colours, 2 * height, 2 * width), np.float32)
  for token, column in np.ndindex(width, 2 * 2):
    row, column = divmod(column, 2)
    latent = clean[0, token].reshape(channels, 2, 2)[:, row, column]
    decoded = (0.4 / 0.5 * latent / refl.SCALE + refl.SHIFT) @ decoder
    image[0, :, row, 2 * token + column] = np.clip(decoded / 2 + 0.5, 0, 1)
  arrays = {
    "net/w1": draw(8, 4), "net/b1": draw(4), "net/c1": draw(4), "net/w2": np.zeros((4, 8), "f"),
    "head/dec": decoder, "head/q": draw(1, 12, colours), "head/gain": np.float32(1),
    "head/offset": np.float32(0), "clean": clean, "noise": 0 * clean, "sigmas": sigmas,
    "mid": np.int32(500), "denoise/k": np.full(1, 0.2, np.float32),
    "denoise/x_t": 0.4 * clean, "denoise/image": image,
  }
  lines = run_case(
    tmp_path, refl.direct_alignment, {f"c/{name}": array for name, array in arrays.items()}
  )
  assert list(lines) == ["values"] and lines["values"].endswith(cases.PASS), lines


@pytest.fixture
def training_pack(golden, tmp_path):
  """A function (change of the arrays) -> the recorded training pack after it, and its recording."""

  def make(change):
    shutil.copy(golden / "j_training.npz", tmp_path)
    spoil(tmp_path / "j_training.npz", change)
    recording = cases.Recording(tmp_path / "j_training.npz")
    return training.OfficialPack(network.Folder(golden), recording), recording

  return make


@pytest.mark.parametrize(("gap", "result"), [(2, cases.PASS), (-1, cases.FAIL)])
def test_a_gap_in_the_positions_is_a_dropped_image(training_pack, golden, gap, result):
  def shift(arrays):
    # The second split of the first sample, an image to denoise.
    start, length = arrays["in_split_lens"][:2]
    arrays["in_packed_position_ids"][start : start + length] += gap

  pack, recording = training_pack(shift)
  dropped = [split for split in pack.samples()[0] if isinstance(split, packing.Dropped)]
  assert [split.advance for split in dropped] == ([gap] if gap > 0 else [])
  training.layout(network.Folder(golden), recording)
  assert recording.lines[0].result == result


def test_labels_on_end_markers_of_images(training_pack):
  def move(arrays):
    # The last labels of the pack: to the ends of the first ViT image and of the first noisy one.
    ends = arrays["in_packed_vit_token_indexes"][5] + 1, arrays["in_mse_loss_indexes"][5] + 1
    arrays["in_ce_loss_indexes"][-2:] = ends
    arrays["in_ce_loss_weights"][-2:] = 0.25, 0.5

  pack, _ = training_pack(move)
  batch = pack.batch(reweighted=True)
  tokens = batch.und_ids.shape[1]
  # Sample 0 has no label but that of its noisy image 0; sample 1 has its text's before the ViT's.
  assert batch.label_slot[0, 0] == tokens and batch.label_weight[0, 0] == 0.5
  last = len(pack.label_order[1]) - 1
  at = batch.und_order[1, batch.label_slot[1, last]]
  assert at + 16 == pack.rec["in_packed_vit_token_indexes"][5] + 1
  assert batch.label_weight[1, last] == 0.25
  # Values come back in the order of the official list.
  values = pack.labels(batch.label_ids)
  np.testing.assert_array_equal(values, pack.rec["in_packed_label_ids"])


def test_padding_to_a_fixed_length_is_no_sample(training_pack):
  def pad(arrays):
    arrays["in_sample_lens"] = np.append(arrays["in_sample_lens"], 9)
    arrays["in_split_lens"] = np.append(arrays["in_split_lens"], 9)
    arrays["in_attn_modes"] = np.append(arrays["in_attn_modes"], "causal")

  pack, _ = training_pack(pad)
  assert len(pack.samples()) == 3
