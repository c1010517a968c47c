"""Official BAGEL folder <-> Orbax folder, streaming: `python -m unigrpo_jax.convert --help`.

Converting keeps every file and the exact header of each weight file, so that `--export` gives back
the official folder byte for byte. Memory stays near 1 GiB whatever the size of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import json
import os
import pathlib
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import checkpoints, errors, folders, safetensors_io, types, weights
from unigrpo_jax.models import bagel
from unigrpo_jax.models import config as config_lib

# What is read, transformed and written at once; one layer of BAGEL-7B's widest kernel fits.
_PIECE_BYTES = 144 * 2**20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_SECONDS = 5  # that one request may take; the library retries a few times
_HUB_FILES = ("*.json", "*.txt", "*.md", "LICENSE*", *weights.FILES.values())


class Progress:
  """Prints a line every few seconds: what, GB done of all, GB/s, time left."""

  def __init__(self, total_bytes: int, seconds: float = 2.0):
    self._total, self._seconds = max(total_bytes, 1), seconds
    self._done, self._start = 0, time.monotonic()
    self._printed = self._start

  def add(self, name: str, nbytes: int) -> None:
    self._done += nbytes
    now = time.monotonic()
    if now - self._printed < self._seconds and self._done < self._total:
      return
    self._printed = now
    rate = self._done / max(now - self._start, 1e-3)
    left = (self._total - self._done) / max(rate, 1.0)
    print(
      f"{self._done / 1e9:8.2f} / {self._total / 1e9:.2f} GB  {rate / 1e9:5.2f} GB/s  "
      f"{left:5.0f} s left  {name}",
      flush=True,
    )


def convert(source: pathlib.Path, target: pathlib.Path, *, overwrite: bool = False) -> None:
  """Official folder -> converted folder.

  Raises:
    InputError: the source is not a complete official folder, or the target cannot be made.
  """
  folder = _open(source, "official")
  with weights.OfficialReader(folder.path, folder.config) as reader:
    leaves = [_streamed(reader, leaf) for leaf in reader.leaves]
    others = _other_files(folder.path)
    total = sum(leaf.nbytes for leaf in leaves)
    needed = total + sum(file.stat().st_size for file in others)
    print(f"converting {folder.path}: {len(leaves)} parameters, {total / 1e9:.2f} GB", flush=True)
    with folders.staging(folder.path, target, overwrite=overwrite, needed_bytes=needed) as staged:
      _copy(others, staged / folders.OFFICIAL)
      manifest = {
        "format_version": folders.FORMAT_VERSION,
        "weights": {name: {"header": file.header.text} for name, file in reader.files.items()},
      }
      checkpoints.save_streaming(staged / folders.PARAMS, leaves, progress=Progress(total).add)
      # Last: a folder is recognised by this file, so it never names an incomplete one.
      (staged / folders.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
  print(f"wrote {target}", flush=True)


def _open(path: pathlib.Path, kind: str) -> folders.ModelFolder:
  folder = folders.open_folder(path)
  if folder.kind != kind:
    advice = {
      "official": "it is converted already; to go back to official files, pass --export",
      "converted": "it is an official folder; convert it first, without --export",
    }
    raise errors.InputError(f"{path}: expected a folder of kind {kind}: {advice[kind]}")
  return folder


def _other_files(folder: pathlib.Path) -> list[pathlib.Path]:
  names = set(weights.FILES.values())
  return sorted(file for file in folder.iterdir() if file.is_file() and file.name not in names)


def _copy(files: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
  folder.mkdir(exist_ok=True)
  for file in files:
    shutil.copyfile(file, folder / file.name)


def _row_step(leaf: weights.Leaf, itemsize: int) -> int:
  """Slices along `leaf.row_axis` in one piece; whole tiles of 128, which stored chunks share."""
  size = leaf.layer_shape[leaf.row_axis]
  slice_bytes = int(np.prod(leaf.layer_shape, dtype=np.int64)) // size * itemsize
  step = max(_PIECE_BYTES // slice_bytes, 1)
  return min(step - step % 128 if step >= 128 else step, size)


def _streamed(reader: weights.OfficialReader, leaf: weights.Leaf) -> checkpoints.StreamedLeaf:
  """How to write one parameter in pieces: by layer where stacked, else by rows of the file."""
  dtype = reader.dtype(leaf)
  layer_bytes = int(np.prod(leaf.layer_shape, dtype=np.int64)) * dtype.itemsize
  if leaf.stacked:
    axis, step = 0, min(max(_PIECE_BYTES // layer_bytes, 1), len(leaf.names))
  else:
    axis, step = leaf.row_axis, _row_step(leaf, dtype.itemsize)

  def read(start: int, stop: int) -> np.ndarray:
    index = [slice(None)] * len(leaf.shape)
    index[axis] = slice(start, stop)
    return reader.read(leaf, tuple(index))

  return checkpoints.StreamedLeaf(leaf.path, leaf.shape, dtype, axis, step, read)


def export(source: pathlib.Path, target: pathlib.Path, *, overwrite: bool = False) -> None:
  """Converted folder -> official folder: same files, same headers, parameters cast to their dtypes.

  Raises:
    InputError: the source is not a complete converted folder, or the target cannot be made.
  """
  folder = _open(source, "converted")
  headers = _read_headers(folder)
  stored = checkpoints.StoredTree(folder.path / folders.PARAMS)
  leaves = weights.table(folder.config)
  for leaf in leaves:
    found = stored.leaves.get(leaf.path)
    if found is None or tuple(found.shape) != leaf.shape:
      raise errors.InputError(
        f"{stored.path}: parameter {'/'.join(leaf.path)} is "
        f"{'missing' if found is None else f'stored as {list(found.shape)}'}; its config asks for "
        f"{list(leaf.shape)}; convert the official folder again"
      )
  others = _other_files(folder.files)
  total = sum(header.data_bytes for header in headers.values())
  needed = total + sum(file.stat().st_size for file in others)
  progress = Progress(total)
  print(f"exporting {folder.path}: {total / 1e9:.2f} GB", flush=True)
  with folders.staging(folder.path, target, overwrite=overwrite, needed_bytes=needed) as staged:
    _copy(others, staged)
    for name, header in headers.items():
      own = [leaf for leaf in leaves if leaf.file == name]
      pieces = _official_pieces(stored, own, header, progress)
      safetensors_io.write(staged / name, header, pieces)
  print(f"wrote {target}", flush=True)


def _read_headers(folder: folders.ModelFolder) -> dict[str, safetensors_io.Header]:
  """The official headers that a converted folder remembers, checked against its config."""
  path = folder.path / folders.MANIFEST
  manifest = config_lib.read_json(path)
  headers = {}
  for part, name in weights.FILES.items():
    try:
      text = manifest["weights"][name]["header"]
    except (KeyError, TypeError):
      raise errors.InputError(
        f"{path}: the header of {name} is missing; convert the official folder again"
      ) from None
    headers[name] = safetensors_io.parse_header(text, source=path)
    weights.check(weights.table(folder.config, (part,)), {str(path): headers[name]})
  return headers


def _official_pieces(
  stored: checkpoints.StoredTree,
  leaves: Sequence[weights.Leaf],
  header: safetensors_io.Header,
  progress: Progress,
) -> Iterator[tuple[str, int, np.ndarray]]:
  """The tensors of one official file in pieces: (name, first row, rows), a parameter at a time."""
  for leaf in leaves:
    itemsize = stored.leaves[leaf.path].dtype.itemsize
    step, size = _row_step(leaf, itemsize), leaf.layer_shape[leaf.row_axis]
    for layer, name in enumerate(leaf.names):
      entry = header.entries[name]
      for start in range(0, size, step):
        index = [slice(None)] * len(leaf.layer_shape)
        index[leaf.row_axis] = slice(start, min(start + step, size))
        piece = stored.read(leaf.path, ((layer,) if leaf.stacked else ()) + tuple(index))
        rows = leaf.to_official(piece)
        yield name, start * (entry.shape[0] // size), rows
        progress.add(name, rows.size * entry.dtype.itemsize)


def check(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Prints how an official and a converted folder differ; returns whether they agree exactly."""
  official, converted = _open(source, "official"), _open(target, "converted")
  equal = _check_files(official.path, converted.files)
  equal &= _check_tensors(official, converted)
  return _check_forward(official, converted) and equal


def _check_files(official: pathlib.Path, copied: pathlib.Path) -> bool:
  theirs = {file.name: file for file in _other_files(official)}
  ours = {file.name: file for file in _other_files(copied)}
  different = sorted(
    name for name in theirs.keys() | ours.keys()
    if name not in theirs or name not in ours
    or theirs[name].read_bytes() != ours[name].read_bytes()
  )
  print(f"files: {len(theirs)} beside the weights, different: {', '.join(different) or 'none'}")
  return not different


def _check_tensors(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  """One line a tensor, a layer of one at a time in memory."""
  stored = checkpoints.StoredTree(converted.path / folders.PARAMS)
  worst, count, problems = 0.0, 0, 0
  print(f"{'tensor':72} {'shape':20} {'official':9} {'converted':9} max abs difference")
  with weights.OfficialReader(official.path, official.config) as reader:
    for leaf in reader.leaves:
      found = stored.leaves.get(leaf.path)
      for layer, name in enumerate(leaf.names):
        entry = reader.files[leaf.file].entries[name]
        if found is None or tuple(found.shape) != leaf.shape:
          stored_as = "missing" if found is None else f"stored as {list(found.shape)}"
          print(f"{name:72} {str(list(entry.shape)):20} {entry.dtype.name:9} {stored_as}")
          problems += 1
          continue
        difference = _largest_difference(reader, stored, leaf, layer)
        print(
          f"{name:72} {str(list(entry.shape)):20} {entry.dtype.name:9} {found.dtype.name:9} "
          f"{difference:.6g}", flush=True,
        )
        count, worst, problems = count + 1, max(worst, difference), problems + (difference != 0)
  known = {leaf.path for leaf in reader.leaves}
  surplus = sorted("/".join(path) for path in stored.leaves.keys() - known)
  if surplus:
    print(f"parameters that no official tensor fills: {', '.join(surplus[:10])}")
  print(f"tensors: {count} compared, {problems} differ, worst {worst:.6g}")
  return not problems and not surplus


def _largest_difference(
  reader: weights.OfficialReader, stored: checkpoints.StoredTree, leaf: weights.Leaf, layer: int
) -> float:
  """Largest absolute difference of one tensor; inf where one side alone is not a number."""
  largest = 0.0
  size, step = leaf.layer_shape[leaf.row_axis], _row_step(leaf, 4)
  for start in range(0, size, step):
    index = [slice(None)] * len(leaf.layer_shape)
    index[leaf.row_axis] = slice(start, min(start + step, size))
    stacked = (slice(layer, layer + 1),) if leaf.stacked else ()
    a = reader.read(leaf, (*stacked, *index)).astype(np.float32)
    b = stored.read(leaf.path, (*stacked, *index)).astype(np.float32)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
      difference = np.abs(a[~same] - b[~same])
      largest = max(largest, float(np.where(np.isnan(difference), np.inf, difference).max()))
  return largest


def _check_forward(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  """Runs both sides on one prompt and one noisy image, if one side fits in memory."""
  leaves = weights.table(official.config, ("bagel",))
  # float32 activations make the backend widen a bfloat16 kernel while it multiplies.
  needed = 1.3 * sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves) * 2
  free = _available_memory()
  if jax.default_backend() == "cpu" and needed > free:
    print(
      f"forward pass: not run, needs {needed / 2**30:.0f} GiB of memory, "
      f"{free / 2**30:.0f} are available"
    )
    return True
  try:
    outputs = [_forward_check(folder) for folder in (official, converted)]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(f"forward pass: not run, needs {needed / 2**30:.0f} GiB on one device")
    return True
  equal = True
  for name in outputs[0]:
    difference = float(np.abs(outputs[0][name] - outputs[1][name]).max())
    shape = list(outputs[0][name].shape)
    print(f"forward pass: {name} {shape} max abs difference {difference:.6g}")
    equal &= bool(np.array_equal(outputs[0][name], outputs[1][name]))
  return equal


def _available_memory() -> float:
  """Bytes that a new program may use on this host, page cache included."""
  try:
    text = pathlib.Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024.0
  except (OSError, TypeError):  # not Linux: let it try
    return float("inf")


def _forward_check(folder: folders.ModelFolder) -> dict[str, np.ndarray]:
  """Logits of a fixed prompt and one velocity after it, float32 on the host."""
  config = folder.config
  vocab, side = config.llm.vocab_size, min(4, config.max_latent_size)
  model = bagel.Bagel(config, image_markers=(vocab - 2, vocab - 1), dtype=jnp.float32)
  params = {"params": folder.load_params(parts=("bagel",))["bagel"]}
  ids = jnp.arange(8)[None] * 37 % vocab
  latents = jnp.sin(jnp.arange(side * side * config.latent_dim, dtype=jnp.float32))
  places = jnp.arange(side)[:, None] * config.max_latent_size + jnp.arange(side)
  grid = types.LatentGrid(places.reshape(1, -1), jnp.ones((1, side * side), bool))

  @jax.jit
  def forward(params):
    context = bagel.empty_context(config, 1, ids.shape[1], jnp.float32)
    context, hidden = model.apply(
      params, context, ids, jnp.ones(ids.shape, bool), method="append_text"
    )
    x = latents.reshape(1, side * side, config.latent_dim)
    velocity = model.apply(params, context, x, jnp.full(1, 0.5), grid, method="velocity")
    return {"logits": model.apply(params, hidden, method="logits"), "velocity": velocity}

  return {name: np.asarray(value, np.float32) for name, value in forward(params).items()}


def find_source(source: str) -> pathlib.Path:
  """The folder that `--source` names: a path, or a repository of the Hugging Face hub.

  Raises:
    InputError: neither exists, or the hub cannot be reached.
  """
  path = pathlib.Path(source)
  if path.exists() or not _HUB_NAME.fullmatch(source):
    return path
  # Read when huggingface_hub is imported: an unreachable hub must fail in seconds, not hang.
  os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(_HUB_SECONDS))
  os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_SECONDS))
  try:
    import huggingface_hub
  except ImportError:
    raise errors.InputError(
      f"--source={source}: no such folder, and downloading it from the hub needs "
      "huggingface_hub: pip install 'unigrpo_jax[hub]'"
    ) from None
  reached = None
  try:
    # snapshot_download would wait for ever for a hub that accepts connections but does not answer.
    huggingface_hub.HfApi().repo_info(source, timeout=_HUB_SECONDS)
    print(f"downloading {source} from the Hugging Face hub", flush=True)
  except Exception as error:  # network, authentication and name errors of several libraries
    reached = error
  try:
    # Without a network, what was downloaded before will do.
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        source, allow_patterns=list(_HUB_FILES), local_files_only=reached is not None
      )
    )
  except Exception as error:
    cause = reached or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    raise errors.InputError(
      f"--source={source}: no such folder, and the hub did not deliver it ({reason}); check the "
      "name and the network, or download it elsewhere and pass the folder"
    ) from None


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.convert",
    description="Converts an official BAGEL folder to an Orbax checkpoint that loads sharded, and "
    "back, byte for byte. Streams: about 1 GiB of memory, and disk for one copy of the model.",
    epilog="examples: --source=ByteDance-Seed/BAGEL-7B-MoT --target=bagel | --export "
    "--source=bagel --target=bagel_official | --check --source=BAGEL-7B-MoT --target=bagel",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--source", required=True,
    help="folder to read: official (with ema.safetensors and ae.safetensors), or converted with "
    "--export; or a repository name of the Hugging Face hub, which is downloaded",
  )
  parser.add_argument("--target", required=True, type=pathlib.Path, help="folder to make")
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument(
    "--export", action="store_true", help="from a converted folder back to official files"
  )
  mode.add_argument(
    "--check", action="store_true",
    help="write nothing: compare official --source with converted --target, tensor by tensor and "
    "by a forward pass; exit status 1 if they differ",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing model folder, after success only"
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(sys.argv[1:] if argv is None else argv)
  source = find_source(args.source)
  try:
    if args.check:
      if not check(source, args.target):
        sys.exit(1)
    elif args.export:
      export(source, args.target, overwrite=args.overwrite)
    else:
      convert(source, args.target, overwrite=args.overwrite)
  except OSError as error:
    raise errors.InputError(
      f"{error.filename or args.target}: {error.strerror or error}; "
      "check permissions and free space"
    ) from error


if __name__ == "__main__":
  errors.report(main)
