"""What `unigrpo_jax.convert` does: official BAGEL folder <-> Orbax folder, and comparing the two.

Everything streams through memory in pieces. A converted folder remembers a checksum of every
official tensor, so that damage to it is found when it is exported or checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.models import bagel, safetensors_io, weights
from unigrpo_jax.runtime import checkpoints, folders

# What is read, transformed and written at once; one layer of BAGEL-7B's widest kernel fits.
_PIECE_BYTES = 144 * 2**20


class Checksums:
  """crc32 of tensors, in the bytes of their official file, fed some rows after the others."""

  def __init__(self):
    self.values: dict[str, int] = {}

  def add(self, name: str, rows: np.ndarray) -> None:
    data = safetensors_io.contiguous(rows).reshape(-1).view(np.uint8)
    self.values[name] = zlib.crc32(data, self.values.get(name, 0))


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
  sums = Checksums()
  with weights.OfficialReader(folder.path, folder.config, observe=sums.add) as reader:
    leaves = [_streamed(reader, leaf) for leaf in reader.leaves]
    others = folders.other_files(folder.path, note=True)
    total = sum(leaf.nbytes for leaf in leaves)
    needed = total + sum(file.stat().st_size for file in others)
    print(f"converting {folder.path}: {len(leaves)} parameters, {total / 1e9:.2f} GB", flush=True)
    with folders.staging(folder.path, target, overwrite=overwrite, needed_bytes=needed) as staged:
      _copy(others, staged / folders.OFFICIAL)
      params = staged / folders.PARAMS
      checkpoints.save_streaming(params, leaves, weights.tree, progress=Progress(total).add)
      manifest = {
        "format_version": folders.FORMAT_VERSION,
        "params": _identity(params),
        "weights": {
          name: {
            "header": file.header.text,
            "crc32": {tensor: sums.values[tensor] for tensor in file.entries},
          }
          for name, file in reader.files.items()
        },
      }
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


def _identity(params: pathlib.Path) -> int | None:
  """Differs from one saved checkpoint to the next: Orbax writes the time into this file."""
  try:
    return zlib.crc32((params / "_CHECKPOINT_METADATA").read_bytes())
  except OSError:
    return None


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
        f"{list(leaf.shape)}; {folders.AGAIN}"
      )
  sums = _read_checksums(folder)
  others = folders.other_files(folder.files, note=True)
  total = sum(header.data_bytes for header in headers.values())
  needed = total + sum(file.stat().st_size for file in others)
  progress = Progress(total)
  print(f"exporting {folder.path}: {total / 1e9:.2f} GB", flush=True)
  with folders.staging(folder.path, target, overwrite=overwrite, needed_bytes=needed) as staged:
    _copy(others, staged)
    for name, header in headers.items():
      own = [leaf for leaf in leaves if leaf.file == name]
      pieces = _official_pieces(stored, own, header, sums, progress)
      safetensors_io.write(staged / name, header, pieces)
  print(f"wrote {target}", flush=True)


def _read_headers(folder: folders.ModelFolder) -> dict[str, safetensors_io.Header]:
  """The official headers that a converted folder remembers, checked against its config."""
  path, manifest = folder.path / folders.MANIFEST, folders.read_manifest(folder.path)
  headers = {}
  for part, name in weights.FILES.items():
    try:
      text = manifest["weights"][name]["header"]
    except (KeyError, TypeError):
      raise errors.InputError(
        f"{path}: the header of {name} is missing; {folders.AGAIN}"
      ) from None
    headers[name] = safetensors_io.parse_header(text, source=path, advice=folders.AGAIN)
    weights.check(weights.table(folder.config, (part,)), {str(path): headers[name]})
  return headers


def _read_checksums(folder: folders.ModelFolder) -> dict[str, int]:
  """{official tensor: crc32} of a converted folder; empty if its parameters were replaced since."""
  manifest = folders.read_manifest(folder.path)
  if manifest.get("params") != _identity(folder.path / folders.PARAMS):
    print(
      f"note: {folder.path / folders.PARAMS} was not written by the conversion: there are no "
      "checksums to verify it with", file=sys.stderr,
    )
    return {}
  try:
    return {
      name: sum for file in weights.FILES.values()
      for name, sum in manifest["weights"][file]["crc32"].items()
    }
  except (KeyError, TypeError, AttributeError):
    raise errors.InputError(
      f"{folder.path / folders.MANIFEST}: the checksums are missing; {folders.AGAIN}"
    ) from None


def _official_pieces(
  stored: checkpoints.StoredTree,
  leaves: Sequence[weights.Leaf],
  header: safetensors_io.Header,
  sums: Mapping[str, int],
  progress: Progress,
) -> Iterator[tuple[str, int, np.ndarray]]:
  """The tensors of one official file in pieces: (name, first row, rows), a parameter at a time.

  Raises:
    InputError: a tensor is not what it was when it was converted.
  """
  found = Checksums()
  for leaf in leaves:
    itemsize = stored.leaves[leaf.path].dtype.itemsize
    step, size = _row_step(leaf, itemsize), leaf.layer_shape[leaf.row_axis]
    for layer, name in enumerate(leaf.names):
      entry = header.entries[name]
      for start in range(0, size, step):
        rows = _official_rows(stored, leaf, layer, slice(start, min(start + step, size)))
        rows = rows.astype(entry.dtype, copy=False)
        found.add(name, rows)
        yield name, start * (entry.shape[0] // size), rows
        progress.add(name, rows.nbytes)
      if sums and found.values[name] != sums.get(name):
        raise errors.InputError(
          f"{stored.path}: tensor {name} (in {'/'.join(leaf.path)}) is damaged: its checksum is "
          f"not the one it was converted with; {folders.AGAIN}"
        )


def _official_rows(
  stored: checkpoints.StoredTree, leaf: weights.Leaf, layer: int, rows: slice
) -> np.ndarray:
  """Some consecutive rows of a stored official tensor; `rows` counts along `leaf.row_axis`."""
  index = [slice(None)] * len(leaf.layer_shape)
  index[leaf.row_axis] = rows
  piece = stored.read(leaf.path, ((layer,) if leaf.stacked else ()) + tuple(index))
  return safetensors_io.contiguous(leaf.to_official(piece))


def check(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Prints how an official and a converted folder differ; returns whether they agree exactly."""
  official, converted = _open(source, "official"), _open(target, "converted")
  equal = _check_files(official.path, converted.files)
  equal &= _check_tensors(official, converted)
  return _check_forward(official, converted) and equal


def _check_files(official: pathlib.Path, copied: pathlib.Path) -> bool:
  theirs = {file.name: file for file in folders.other_files(official)}
  ours = {file.name: file for file in folders.other_files(copied)}
  different = sorted(
    name for name in theirs.keys() | ours.keys()
    if name not in theirs or name not in ours
    or theirs[name].read_bytes() != ours[name].read_bytes()
  )
  print(f"files: {len(theirs)} beside the weights, different: {', '.join(different) or 'none'}")
  return not different


@dataclasses.dataclass
class Difference:
  """How the two sides of one tensor differ.

  Attributes:
    different: elements that differ: in any bit where both sides have one dtype, else in value.
    largest: largest absolute difference; inf where one side alone is not a number.
    official_nans, converted_nans: elements that are not numbers.
    note: which side is not what was converted, where that is known.
  """

  different: int = 0
  largest: float = 0.0
  official_nans: int = 0
  converted_nans: int = 0
  note: str = ""

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    """Counts one piece: official `a`, converted `b`."""
    bits = np.dtype(f"u{a.itemsize}")
    same_bits = a.dtype == b.dtype
    x, y = a.astype(np.float32), b.astype(np.float32)
    nans = np.isnan(x), np.isnan(y)
    self.official_nans += int(nans[0].sum())
    self.converted_nans += int(nans[1].sum())
    # Values alone would not tell -0.0 from 0.0, nor one NaN from another.
    same = a.view(bits) == b.view(bits) if same_bits else (x == y) | (nans[0] & nans[1])
    self.different += int((~same).sum())
    apart = ~same & ~(nans[0] & nans[1])
    if apart.any():
      difference = np.abs(x[apart] - y[apart])
      difference[np.isnan(difference)] = np.inf
      self.largest = max(self.largest, float(difference.max()))

  def __str__(self) -> str:
    words = [f"{self.largest:.6g}"]
    if self.different and not self.largest:
      words.append(f"({self.different} differ in their bits)")
    return " ".join([*words, self.note]).strip()


def _check_tensors(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  """One line a tensor, a piece of one at a time in memory."""
  stored = checkpoints.StoredTree(converted.path / folders.PARAMS)
  sums = _read_checksums(converted)
  worst, count, problems, nans = 0.0, 0, 0, [0, 0]
  print(f"{'tensor':72} {'shape':20} {'official':9} {'converted':9} max abs difference")
  with weights.OfficialReader(official.path, official.config) as reader:
    for leaf in reader.leaves:
      found = stored.leaves.get(leaf.path)
      for layer, name in enumerate(leaf.names):
        entry = reader.files[leaf.file].entries[name]
        line = f"{name:72} {str(list(entry.shape)):20} {entry.dtype.name:9}"
        if found is None or tuple(found.shape) != leaf.shape:
          print(f"{line} {'missing' if found is None else f'stored as {list(found.shape)}'}")
          problems += 1
          continue
        difference = _compare(reader, stored, leaf, layer, sums.get(name))
        print(f"{line} {found.dtype.name:9} {difference}", flush=True)
        count, worst = count + 1, max(worst, difference.largest)
        problems += difference.different > 0
        nans[0] += difference.official_nans
        nans[1] += difference.converted_nans
  known = {leaf.path for leaf in reader.leaves}
  surplus = sorted("/".join(path) for path in stored.leaves.keys() - known)
  if surplus:
    print(f"parameters that no official tensor fills: {', '.join(surplus[:10])}")
  print(f"tensors: {count} compared, {problems} differ, worst {worst:.6g}")
  if any(nans):
    print(f"tensors: {nans[0]} NaN in the official folder, {nans[1]} in the converted one")
  return not problems and not surplus


def _compare(
  reader: weights.OfficialReader,
  stored: checkpoints.StoredTree,
  leaf: weights.Leaf,
  layer: int,
  converted_sum: int | None,
) -> Difference:
  """One tensor of both sides; `converted_sum` is the checksum it had when it was converted."""
  difference, sums, name = Difference(), Checksums(), leaf.names[layer]
  file = reader.files[leaf.file]
  entry = file.entries[name]
  size, step = leaf.layer_shape[leaf.row_axis], _row_step(leaf, 4)
  rows = entry.shape[0] // size
  for start in range(0, size, step):
    stop = min(start + step, size)
    a = file.read(name, (slice(start * rows, stop * rows),))
    b = _official_rows(stored, leaf, layer, slice(start, stop))
    difference.add(a, b)
    sums.add("official", a)
    sums.add("converted", b.astype(entry.dtype, copy=False))
  changed = [side for side, value in sums.values.items() if value != converted_sum]
  if changed and converted_sum is not None:
    difference.note = f"({' and '.join(changed)} changed since the conversion)"
  return difference


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
  for name, a in outputs[0].items():
    b = outputs[1][name]
    nans = np.isnan(a) & np.isnan(b)
    difference = float(np.abs(np.where(nans, 0, a) - np.where(nans, 0, b)).max())
    note = f", {nans.sum()} of {nans.size} are NaN on both sides" if nans.any() else ""
    print(f"forward pass: {name} {list(a.shape)} max abs difference {difference:.6g}{note}")
    equal &= bool(np.array_equal(a, b, equal_nan=True))
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
