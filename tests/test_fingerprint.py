"""What makes two folders the same model."""

import shutil

import numpy as np
import pytest

from unigrpo_jax.runtime import conversion, folders
from unigrpo_jax.supervised import corpus


@pytest.fixture(scope="module")
def copies(golden, tmp_path_factory):
  """The recorded BAGEL without its reference outputs: (official folder, converted folder)."""
  place = tmp_path_factory.mktemp("copies")
  shutil.copytree(golden, place / "official", ignore=shutil.ignore_patterns("*.npz"))
  conversion.convert(place / "official", place / "converted")
  return place / "official", place / "converted"


def _fingerprint(folder):
  return folders.open_folder(folder).fingerprint()


def test_a_model_is_the_same_wherever_it_lies_and_in_either_form(copies, golden):
  official, converted = map(_fingerprint, copies)
  assert official == converted == _fingerprint(golden) and len(official) == 16


@pytest.mark.parametrize("part", ["bagel", "vae"])
def test_other_weights_of_the_same_shapes_are_another_model(copies, tmp_path, part):
  folder = folders.open_folder(copies[0])
  params = folder.load_params(dtype=np.float32, parts=(part,))
  tree = [params[part]["layers"] if part == "bagel" else params[part]]
  while isinstance(tree[-1], dict):
    tree.append(next(iter(tree[-1].values())))
  leaf = np.array(tree[-1])
  leaf.reshape(-1)[0] += 1
  tree[-2][next(iter(tree[-2]))] = leaf
  folders.write_official(tmp_path / "other", folder, {part: params[part]}, dtype=np.float32)
  assert _fingerprint(tmp_path / "other") != _fingerprint(copies[0])


def test_another_config_is_another_model_and_a_readme_is_not(copies, tmp_path):
  other = shutil.copytree(copies[0], tmp_path / "other")
  (other / "README.md").write_text("other words")
  assert _fingerprint(other) == _fingerprint(copies[0])
  file = other / "bagel_config.json"
  file.write_text(file.read_text() + "\n")
  assert _fingerprint(other) != _fingerprint(copies[0])


def test_shards_are_known_by_their_lines(tmp_path):
  (tmp_path / "a.jsonl").write_text("1\n2\n")
  before = corpus.fingerprint(tmp_path)
  moved = shutil.copytree(tmp_path, tmp_path / "moved")
  assert corpus.fingerprint(moved) == before
  (tmp_path / "a.jsonl").write_text("1\n3\n")
  assert corpus.fingerprint(tmp_path) != before
