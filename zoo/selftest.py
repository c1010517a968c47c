"""Runs pickscore, clip and aesthetic on small CLIPs with random weights, against a recording.

  python -m zoo.selftest [FOLDER ...]

A FOLDER holds a CLIP, `recorded.npz` and `recorded.json`, as those of tests/golden_rewards do,
which are the default. Prints a line a check, and ends with status 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np

from unigrpo_jax import errors, rewards
from zoo import aesthetic, base, clip, pickscore

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden_rewards"
TOLERANCE = 2e-5


def check(folder: pathlib.Path) -> list[str]:
  """Compares the three with the recording of a folder; a line each, which begins with PASS or FAIL.
  """
  recorded = np.load(folder / "recorded.npz")
  prompts = json.loads((folder / "recorded.json").read_text())["prompts"]
  samples = [rewards.Sample(prompt, recorded[f"image_{i}"]) for i, prompt in enumerate(prompts)]
  options = {"weights": str(folder), "device": "cpu", "batch_size": 3}
  with tempfile.TemporaryDirectory() as made:
    head = pathlib.Path(made) / aesthetic.HEAD
    expected = write_head(head, recorded["image_features"])
    found = {
      "pickscore": (pickscore.PickScore(**options), recorded["pickscore"]),
      "clip": (clip.ClipScore(**options), recorded["clip_over_30"]),
      "aesthetic": (aesthetic.Aesthetic(head=str(head), **options), expected),
    }
  lines = []
  for name, (reward, values) in found.items():
    worst = float(np.abs(reward(samples).values - values).max())
    said = "PASS" if worst <= TOLERANCE else "FAIL"  # NaN fails
    lines.append(f"{said} {name} on {folder.name}: {worst:.1e} from the recording")
  return lines


def write_head(path: pathlib.Path, features: np.ndarray) -> np.ndarray:
  """Writes an aesthetic head with random weights; what it must say of image features [N, P]: [N].
  """
  torch = base.load_module("torch", "aesthetic")
  random, tensors = np.random.default_rng(0), {}
  x = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
  for layer, out in aesthetic.LAYERS.items():
    matrix = random.normal(0, x.shape[1] ** -0.5, (out, x.shape[1])).astype(np.float32)
    bias = random.normal(0, 1, out).astype(np.float32)
    tensors |= {f"layers.{layer}.weight": matrix, f"layers.{layer}.bias": bias}
    x = x @ matrix.T + bias
  torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path)
  return x[:, 0]


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m zoo.selftest", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folders", nargs="*", type=pathlib.Path, metavar="FOLDER")
  folders = parser.parse_args().folders or sorted(GOLDEN.glob("tiny_clip_*"))
  if not folders:
    raise errors.InputError(f"{GOLDEN} holds no tiny_clip_*, the recordings of the repository")
  lines = [line for folder in folders for line in check(folder)]
  print("\n".join(lines))
  if any(line.startswith("FAIL") for line in lines):
    sys.exit(1)


if __name__ == "__main__":
  errors.report(main)
