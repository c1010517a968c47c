"""Converts and exports a folder with the shapes of BAGEL-7B-MoT, measuring memory and speed.

The weights are random bits, no two tensors alike. Needs about 60 GB of disk and ten minutes:
  python -m tests.test_stream_7b --workdir=DIR
  pytest -m slow tests/test_stream_7b.py
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import threading
import time

from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import weights
from unigrpo_jax.runtime import folders

LIMIT_BYTES = 8 * 2**30
_BLOCK = 2**24  # elements written at once
_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def random_bits(name: str, shape: tuple[int, ...], dtype: str):
  """The bits of a synthetic tensor in blocks: finite floats below 2, seeded by its name."""
  bits = {"BF16": np.uint16, "F32": np.uint32}[dtype]
  # Clearing the highest exponent bit leaves neither infinities nor NaNs.
  mask = bits(0xBFFF if dtype == "BF16" else 0xBFFFFFFF)
  # SFC64 is the fastest generator of numpy; one a tensor keeps every tensor distinct.
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
  generator = np.random.Generator(np.random.SFC64(seed))
  left = int(np.prod(shape, dtype=np.int64))
  while left:
    count = min(left, _BLOCK)
    numbers = -(-count * mask.itemsize // 8)
    yield generator.integers(0, 2**64, numbers, np.uint64).view(bits)[:count] & mask
    left -= count


def write_official(folder: pathlib.Path, config) -> dict[str, str]:
  """Writes a random official folder; returns the sha256 of each file."""
  folder.mkdir(parents=True)
  (folder / "llm_config.json").write_text(json.dumps(_llm_json(config.llm)))
  (folder / "vit_config.json").write_text(json.dumps(_vit_json(config.vit)))
  digests = {file.name: _sha256(file) for file in folder.iterdir()}
  for part, dtype in (("bagel", "BF16"), ("vae", "F32")):
    shapes = {
      name: leaf.official_shape for leaf in weights.table(config, (part,)) for name in leaf.names
    }
    digests[weights.FILES[part]] = _write_random(folder / weights.FILES[part], shapes, dtype)
  return digests


def _write_random(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> str:
  header, offset = {}, 0
  for name in sorted(shapes):
    stop = offset + int(np.prod(shapes[name], dtype=np.int64)) * {"BF16": 2, "F32": 4}[dtype]
    header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [offset, stop]}
    offset = stop
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  digest = hashlib.sha256()
  with path.open("wb") as file:
    def put(data):
      digest.update(data)
      file.write(data)

    put(struct.pack("<Q", len(text)) + text)
    for name in header:
      for block in random_bits(name, shapes[name], dtype):
        put(memoryview(block).cast("B"))
  return digest.hexdigest()


def _llm_json(llm) -> dict:
  return {
    "hidden_size": llm.hidden_size, "intermediate_size": llm.intermediate_size,
    "num_hidden_layers": llm.num_layers, "num_attention_heads": llm.num_heads,
    "num_key_value_heads": llm.num_kv_heads, "vocab_size": llm.vocab_size,
    "rope_theta": llm.rope_theta, "rms_norm_eps": llm.rms_norm_eps,
    "max_position_embeddings": llm.max_positions,
  }


def _vit_json(vit) -> dict:
  return {
    "hidden_size": vit.hidden_size, "intermediate_size": vit.intermediate_size,
    # The file counts one layer more than is built.
    "num_hidden_layers": vit.num_layers + 1, "num_attention_heads": vit.num_heads,
    "patch_size": vit.patch_size, "image_size": vit.image_size,
  }


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_bytes(folder: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclasses.dataclass(frozen=True)
class Measured:
  """Peak memory in bytes and wall time in seconds of one child process."""

  seconds: float
  peak_rss: int
  peak_anonymous: int


def run_measured(*arguments: str) -> Measured:
  """Runs `python *arguments`; raises CalledProcessError if it fails."""
  start = time.monotonic()
  child = subprocess.Popen([sys.executable, *arguments], cwd=_REPOSITORY)
  anonymous = [0]

  def sample():
    while child.returncode is None:
      try:
        status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
      except OSError:
        return
      if "RssAnon:" in status:
        anonymous[0] = max(anonymous[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)
      time.sleep(0.05)

  sampler = threading.Thread(target=sample, daemon=True)
  sampler.start()
  # wait4, not RUSAGE_CHILDREN: that is the maximum over every child so far.
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  sampler.join()
  if child.returncode:
    raise subprocess.CalledProcessError(child.returncode, child.args)
  return Measured(time.monotonic() - start, usage.ru_maxrss * 1024, anonymous[0])


def restore_sample(converted: pathlib.Path) -> None:
  """Loads two leaves through Orbax alone and compares them with the bits that were made."""
  folder = folders.open_folder(converted)
  # A kernel that was streamed by columns, and a stack that was streamed by layers.
  paths = {("bagel", "lm_head", "kernel"), ("bagel", "layers", "gen", "attention", "k", "kernel")}
  leaves = [leaf for leaf in weights.table(folder.config) if leaf.path in paths]
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
    x.path: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16, sharding=here) for x in leaves
  }
  context = ocp.Context()
  context.pytree_options.loading.partial_load = True
  with context:
    params = ocp.load(converted / folders.PARAMS, traverse_util.unflatten_dict(abstract))
  for leaf in leaves:
    array = np.asarray(weights.lookup(params, leaf.path))
    for layer, name in enumerate(leaf.names):
      bits = np.concatenate(list(random_bits(name, leaf.official_shape, "BF16")))
      ours = leaf.to_official(array[layer] if leaf.stacked else array)
      np.testing.assert_array_equal(
        np.ascontiguousarray(ours).view(np.uint16).reshape(-1), bits, err_msg=name
      )
  print(f"restored {len(leaves)} leaves through Orbax: equal")


def stream(workdir: pathlib.Path, config) -> dict[str, Measured]:
  """Makes, converts, restores and exports; at most two copies of the model exist at a time."""
  official, converted, exported = (workdir / name for name in ("official", "converted", "exported"))
  steps: dict[str, Measured] = {}

  def report(name, measured, nbytes):
    steps[name] = measured
    print(
      f"{name:8} {measured.seconds:7.1f} s  {nbytes / measured.seconds / 1e9:5.2f} GB/s  "
      f"peak RSS {measured.peak_rss / 2**30:5.2f} GiB  "
      f"(anonymous {measured.peak_anonymous / 2**30:5.2f} GiB)", flush=True,
    )

  try:
    start = time.monotonic()
    digests = write_official(official, config)
    nbytes = _folder_bytes(official)
    print(f"made {nbytes / 2**30:.2f} GiB in {time.monotonic() - start:.0f} s", flush=True)
    convert = ("-m", "unigrpo_jax.convert")
    report(
      "convert", run_measured(*convert, f"--source={official}", f"--target={converted}"), nbytes
    )
    shutil.rmtree(official)
    run_measured("-m", "tests.test_stream_7b", f"--restore={converted}")
    report(
      "export", run_measured(*convert, "--export", f"--source={converted}", f"--target={exported}"),
      nbytes,
    )
    print(f"converted folder: {_folder_bytes(converted) / nbytes:.4f} of the official size")
    shutil.rmtree(converted)
    again = {file.name: _sha256(file) for file in exported.iterdir()}
    # The headers too: these are written as the safetensors library writes them.
    assert again == digests, f"exported files differ: {again} != {digests}"
    print(f"exported {len(again)} files: equal byte for byte", flush=True)
  finally:
    for folder in (official, converted, exported):
      shutil.rmtree(folder, ignore_errors=True)
  return steps


@pytest.mark.slow
def test_full_size_streams_in_bounded_memory(tmp_path):
  steps = stream(tmp_path, config_lib.bagel_7b())
  for name, measured in steps.items():
    assert measured.peak_rss < LIMIT_BYTES, f"{name} peaked at {measured.peak_rss / 2**30:.2f} GiB"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  group = parser.add_mutually_exclusive_group(required=True)
  group.add_argument("--workdir", type=pathlib.Path, help="scratch folder with 60 GB free")
  group.add_argument("--restore", type=pathlib.Path, help="(internal) check a converted folder")
  args = parser.parse_args()
  if args.restore:
    restore_sample(args.restore)
    return
  args.workdir.mkdir(parents=True, exist_ok=True)
  steps = stream(args.workdir, config_lib.bagel_7b())
  worst = max(measured.peak_rss for measured in steps.values())
  if worst >= LIMIT_BYTES:
    sys.exit(f"peak RSS {worst / 2**30:.2f} GiB is not under {LIMIT_BYTES / 2**30:.0f} GiB")


if __name__ == "__main__":
  main()
