"""What `unigrpo_jax.convert` does: official BAGEL folder <-> converted folder, and comparing them.

Everything streams through memory in pieces. A converted folder keeps a checksum of every official
tensor, so that damage to it is found when it is exported or checked.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors, types
from unigrpo_jax.data import locks, progress
from unigrpo_jax.models import bagel, safetensors_files, weight_files, weights
from unigrpo_jax.runtime import checkpoints, folders, stored_params

# What is read, transformed and written at once; one layer of BAGEL-7B's widest kernel fits.
_PIECE_BYTES = 144 * 2**20


class Checksums(dict[str, int]):
  """crc32 of tensors, in the bytes of their official file, fed some rows after the others."""

  def add(self, name: str, rows: np.ndarray) -> None:
    data = safetensors_files.contiguous(rows).reshape(-1).view(np.uint8)
    self[name] = zlib.crc32(data, self.get(name, 0))


class OfficialFile(NamedTuple):
  """What the manifest of a converted folder records of a weight file; dicts are by tensor name."""

  metadata: Any
  dtypes: dict[str, np.dtype]
  checksums: dict[str, int]


def convert(
  source: pathlib.Path | str, target: pathlib.Path, *, overwrite: bool = False,
  missing_from: pathlib.Path | str | None = None,
) -> None:
  """Official folder -> converted folder; what it lacks is that of the official `missing_from`.

  Raises:
    InputError: the source is not a complete official folder, or the target cannot be made.
  """
  folder, checksums = _open(source, "official", missing_from), Checksums()
  with weights.OfficialReader(
    folder.path, folder.config, observe=checksums.add, fallback=folder.fallback
  ) as reader:
    if reader.filled:
      print(f"{len(reader.filled)} tensors are those of {folder.fallback}", flush=True)
    if folder.fallback and not weight_files.find(folder.path, weights.FILES["vae"]):
      print(f"the autoencoder is that of {folder.fallback}", flush=True)
    arrays = {
      leaf.path: stored_params.NewArray(leaf.shape, _piece_shape(leaf, dtype.itemsize), dtype)
      for leaf in reader.leaves for dtype in [reader.dtype(leaf)]
    }
    total = sum(array.nbytes for array in arrays.values())
    others = folders.other_files(folder, note=True)
    needed = total + sum(file.stat().st_size for file in others)
    print(f"converting {folder.path}: {len(arrays)} parameters, {total / 1e9:.2f} GB", flush=True)
    for source in filter(None, (folder.path, folder.fallback)):
      folders.check_target(source, target, overwrite=overwrite, needed_bytes=needed)
    with (
      locks.staging(target, last=(folders.MANIFEST,)) as staged,
      progress.bar(total, "converting", unit="B") as bar,
    ):
      (staged / folders.OFFICIAL).mkdir()
      for file in others:
        shutil.copyfile(file, staged / folders.OFFICIAL / file.name)
      with stored_params.Writer(staged / folders.PARAMS, arrays) as writer:
        for leaf in reader.leaves:
          for index in _pieces(leaf.shape, arrays[leaf.path].piece):
            piece = reader.read(leaf, index)
            writer.write(leaf.path, index, piece)
            bar.update(piece.nbytes)
      # Last: a folder is recognised by this file, so it never names an incomplete one.
      _write_manifest(staged / folders.MANIFEST, reader, checksums)
  print(f"wrote {target}", flush=True)


def _open(
  path: pathlib.Path | str, kind: str, missing_from: pathlib.Path | str | None = None
) -> folders.ModelFolder:
  folder = folders.open_folder(path, missing_from)
  if folder.kind != kind:
    advice = {
      "official": "it is converted already; to go back to official files, pass --export",
      "converted": "it is an official folder; convert it first, without --export",
    }
    raise errors.InputError(f"{path}: expected a folder of kind {kind}: {advice[kind]}")
  return folder


def _piece_shape(leaf: weights.Leaf, itemsize: int) -> tuple[int, ...]:
  """Some layers of a stacked parameter, else some rows of the official tensor."""
  if leaf.stacked:
    layer_bytes = math.prod(leaf.layer_shape) * itemsize
    layers = max(_PIECE_BYTES // layer_bytes, 1)
    return (min(layers, len(leaf.names)), *leaf.layer_shape)
  return _rows_shape(leaf, itemsize)


def _rows_shape(leaf: weights.Leaf, itemsize: int) -> tuple[int, ...]:
  """Of one layer, rows of the official tensor; whole tiles of 128, which stored chunks share."""
  shape = list(leaf.layer_shape)
  row_bytes = math.prod(shape) // shape[leaf.row_axis] * itemsize
  rows = max(_PIECE_BYTES // row_bytes, 1)
  rows -= rows % 128 if rows > 128 else 0
  shape[leaf.row_axis] = min(rows, shape[leaf.row_axis])
  return tuple(shape)


def _pieces(shape: tuple[int, ...], piece: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
  """The indices that divide an array of `shape` into pieces, in the order of its rows."""
  steps = [
    [slice(start, min(start + step, size)) for start in range(0, size, step)]
    for size, step in zip(shape, piece)
  ]
  return itertools.product(*steps)


def _write_manifest(
  path: pathlib.Path, reader: weights.OfficialReader, checksums: Checksums
) -> None:
  recorded = {
    name: {
      "metadata": file.metadata,
      "dtypes": {
        tensor: safetensors_files.DTYPE_NAMES[entry.dtype]
        for tensor, entry in file.entries.items()
      },
      "crc32": {tensor: checksums[tensor] for tensor in file.entries},
    }
    for name, file in reader.files.items()
  }
  manifest = {"format_version": folders.FORMAT_VERSIONS[-1], "weights": recorded}
  path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read_manifest(folder: folders.ModelFolder) -> dict[str, OfficialFile]:
  """{official weight file: OfficialFile}; refuses a damaged record, or one of other tensors."""
  manifest, files = folders.read_manifest(folder.path), {}
  for part, file in weights.FILES.items():
    try:
      record = manifest["weights"][file]
      if "header" in record:  # Version 1: the JSON text of the official header.
        header = json.loads(record["header"])
        record["metadata"] = header.pop("__metadata__", None)
        record["dtypes"] = {name: entry["dtype"] for name, entry in header.items()}
      dtypes = {name: safetensors_files.DTYPES[kind] for name, kind in record["dtypes"].items()}
      files[file] = OfficialFile(record["metadata"], dtypes, dict(record["crc32"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
      raise errors.InputError(
        f"{folder.path / folders.MANIFEST}: the record of {file} is damaged; {folders.AGAIN}"
      ) from None
    expected = {name for leaf in weights.table(folder.config, (part,)) for name in leaf.names}
    for names in (files[file].dtypes.keys(), files[file].checksums.keys()):
      if different := sorted(names ^ expected):
        raise errors.InputError(
          f"{folder.path / folders.MANIFEST}: the tensors of {file} are not those of the config "
          f"({', '.join(different[:10])}); {folders.AGAIN}"
        )
  return files


def export(source: pathlib.Path | str, target: pathlib.Path, *, overwrite: bool = False) -> None:
  """Converted folder -> official folder: the same tensors in their dtypes, and the same files.

  Raises:
    InputError: the source is not a complete converted folder, or the target cannot be made.
  """
  folder = _open(source, "converted")
  recorded = _read_manifest(folder)
  with folder.open_params() as reader:
    tensors = {
      file: {
        name: (record.dtypes[name], leaf.official_shape)
        for leaf in reader.leaves if leaf.file == file for name in leaf.names
      }
      for file, record in recorded.items()
    }
    total = sum(map(safetensors_files.total_bytes, tensors.values()))
    print(f"exporting {folder.path}: {total / 1e9:.2f} GB", flush=True)
    files = {
      file: safetensors_files.Contents(
        tensors[file], _verified_rows(reader, file, record), record.metadata
      )
      for file, record in recorded.items()
    }
    folders.write_files(folder, target, files, overwrite=overwrite, with_weights=True)
  print(f"wrote {target}", flush=True)


def _verified_rows(
  reader: stored_params.Reader, file: str, record: OfficialFile
) -> Iterator[tuple[str, int, np.ndarray]]:
  """The tensors of an official file in pieces, (name, first row, rows); refuses a damaged one."""
  checksums = Checksums()
  for leaf in reader.leaves:
    for layer, name in enumerate(leaf.names if leaf.file == file else ()):
      for start, rows in _official_rows(reader, leaf, layer):
        rows = rows.astype(record.dtypes[name], copy=False)
        checksums.add(name, rows)
        yield name, start, rows
      if checksums[name] != record.checksums[name]:
        raise errors.InputError(
          f"{reader.path}: tensor {name} (in {'/'.join(leaf.path)}) is damaged: its checksum is "
          f"not the one it was converted with; {folders.AGAIN}"
        )


def _official_rows(
  reader: stored_params.Reader, leaf: weights.Leaf, layer: int
) -> Iterator[tuple[int, np.ndarray]]:
  """A stored parameter's layer as its official tensor, in pieces: (first row, rows)."""
  # Rows of the official tensor, such as the features of a head, in one of the parameter's row axis.
  inner = leaf.official_shape[0] // leaf.layer_shape[leaf.row_axis]
  for index in _pieces(leaf.layer_shape, _rows_shape(leaf, itemsize=4)):
    piece = reader.read(leaf, (layer, *index) if leaf.stacked else index)
    yield index[leaf.row_axis].start * inner, safetensors_files.contiguous(leaf.to_official(piece))


def check(
  source: pathlib.Path | str, target: pathlib.Path,
  missing_from: pathlib.Path | str | None = None,
) -> bool:
  """Prints how an official and a converted folder differ; returns whether they agree exactly."""
  official, converted = _open(source, "official", missing_from), _open(target, "converted")
  results = [check(official, converted) for check in (_check_files, _check_tensors, _check_forward)]
  return all(results)


def _check_files(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  before, after = (
    {file.name: file.read_bytes() for file in folders.other_files(folder)}
    for folder in (official, converted)
  )
  different = sorted(
    name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
  )
  print(f"files: {len(before)} beside the weights, different: {', '.join(different) or 'none'}")
  return not different


@dataclasses.dataclass
class Difference:
  """How the two sides of one tensor differ."""

  different: int = 0  # elements: in any bit where both sides have one dtype, else in value
  largest: float = 0.0  # absolute difference; inf where one side alone is not a number
  official_nans: int = 0  # elements that are not numbers
  converted_nans: int = 0

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    """Counts one piece: official `a`, converted `b`."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    x_nan, y_nan = np.isnan(x), np.isnan(y)
    self.official_nans += int(x_nan.sum())
    self.converted_nans += int(y_nan.sum())
    both_nan = x_nan & y_nan
    if a.dtype == b.dtype:
      # Values alone would not separate -0.0 from 0.0, nor one NaN from another.
      bits = np.dtype(f"u{a.itemsize}")
      same = a.view(bits) == b.view(bits)
    else:
      same = (x == y) | both_nan
    self.different += int((~same).sum())
    apart = ~same & ~both_nan
    if apart.any():
      distance = np.abs(x[apart] - y[apart])
      self.largest = max(self.largest, float(np.nan_to_num(distance, nan=np.inf).max()))

  def __str__(self) -> str:
    only_bits = self.different and not self.largest
    return f"{self.largest:.6g}{f' ({self.different} differ in their bits)' if only_bits else ''}"


def _check_tensors(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  """One line a tensor, a piece of one at a time in memory."""
  count, problems, worst, nans = 0, 0, 0.0, [0, 0]
  recorded = _read_manifest(converted)
  print(f"{'tensor':72} {'shape':20} {'official':9} {'converted':9} max abs difference")
  with official.open_params() as reader, converted.open_params() as stored:
    for leaf in reader.leaves:
      for layer, name in enumerate(leaf.names):
        entry = reader.files[leaf.file].entries[name]
        difference, changed = _compare(
          reader.files[leaf.file], stored, leaf, layer, recorded[leaf.file].checksums[name]
        )
        print(
          f"{name:72} {str(list(entry.shape)):20} {entry.dtype.name:9} "
          f"{stored.dtype(leaf).name:9} {difference}{changed}", flush=True,
        )
        count, worst = count + 1, max(worst, difference.largest)
        problems += difference.different > 0
        nans[0] += difference.official_nans
        nans[1] += difference.converted_nans
  print(f"tensors: {count} compared, {problems} differ, worst {worst:.6g}")
  if any(nans):
    print(f"tensors: {nans[0]} NaN in the official folder, {nans[1]} in the converted one")
  return not problems


def _compare(
  file: safetensors_files.SafetensorsFile, stored: stored_params.Reader, leaf: weights.Leaf,
  layer: int, checksum: int,
) -> tuple[Difference, str]:
  """How one tensor differs, and which side is not what was converted, by its `checksum`."""
  difference, checksums, name = Difference(), Checksums(), leaf.names[layer]
  for start, b in _official_rows(stored, leaf, layer):
    a = file.read(name, (slice(start, start + len(b)),))
    difference.add(a, b)
    checksums.add("official", a)
    checksums.add("converted", b.astype(a.dtype, copy=False))
  changed = [side for side, value in checksums.items() if value != checksum]
  return difference, f" ({' and '.join(changed)} changed since the conversion)" if changed else ""


def _check_forward(official: folders.ModelFolder, converted: folders.ModelFolder) -> bool:
  """Runs both sides on one prompt and one noisy image, if one side fits in memory."""
  elements = sum(math.prod(leaf.shape) for leaf in weights.table(official.config, ("bagel",)))
  # bfloat16; float32 activations make the backend widen a kernel while it multiplies.
  needed, free = 1.3 * 2 * elements, _available_memory()
  if jax.default_backend() == "cpu" and needed > free:
    print(
      f"forward pass: not run, needs {needed / 2**30:.0f} GiB of memory, "
      f"{free / 2**30:.0f} are available"
    )
    return True
  try:
    outputs = [_forward_check(folder) for folder in (official, converted)]
  except (errors.InputError, jax.errors.JaxRuntimeError) as error:
    if not checkpoints.is_full(error):
      raise
    print(f"forward pass: not run, needs {needed / 2**30:.0f} GiB on one device")
    return True
  for name, a in outputs[0].items():
    b = outputs[1][name]
    nans = np.isnan(a) & np.isnan(b)
    difference = np.abs(np.where(nans, 0, a) - np.where(nans, 0, b)).max()
    note = f", {nans.sum()} of {nans.size} are NaN on both sides" if nans.any() else ""
    print(f"forward pass: {name} {list(a.shape)} max abs difference {difference:.6g}{note}")
  return all(np.array_equal(a, outputs[1][name], equal_nan=True) for name, a in outputs[0].items())


def _available_memory() -> float:
  """Bytes that a new program may use on this host, page cache included."""
  try:
    text = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8")
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
