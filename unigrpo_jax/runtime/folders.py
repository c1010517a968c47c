"""Model folders: an official BAGEL folder, or what `unigrpo_jax.convert` makes of one.

A converted folder holds
  unigrpo_jax.json   format version; metadata, dtypes and checksums of the official tensors
  official/          every file of the official folder but the weights, unchanged
  params/            the parameter tree, an Orbax checkpoint
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.data import atomic, locks, progress, tokenizer
from unigrpo_jax.data import files as files_lib
from unigrpo_jax.models import adapters, safetensors_files, weight_files, weights
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import checkpoints, hub, stored_params

MANIFEST, OFFICIAL, PARAMS = "unigrpo_jax.json", "official", "params"
FORMAT_VERSIONS = (1, 2)  # The last one is written. 1 kept the text of the official headers.
AGAIN = stored_params.AGAIN
_FEW_VALUES = 2**14
TINY = "tiny"  # The embedded checkpoint, wherever a folder is expected.
TINY_FOLDER = pathlib.Path(__file__).parents[1] / "assets" / "tiny_bagel"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A folder with a BAGEL in it."""

  path: pathlib.Path
  kind: str  # "official" or "converted"
  files: pathlib.Path  # the folder with the configs and the tokenizer, of a file system
  config: config_lib.BagelConfig  # read from `files`
  adapter: adapters.Adapter | None = None  # added to the weights when they are read
  repository: str = ""  # of the hub, with its commit: the weights are downloaded when they are read
  fallback: pathlib.Path | None = None  # official folder of what this one lacks

  def open_params(
    self, parts: Sequence[str] = weights.PARTS
  ) -> weights.OfficialReader | stored_params.Reader | adapters.MergedReader:
    """Opens the weights of `parts`, to be read a slice at a time; see `load_params`."""
    if self.repository and not all((self.path / weights.FILES[part]).is_file() for part in parts):
      hub.find(self.repository)
    if self.kind == "official":
      reader = weights.OfficialReader(self.path, self.config, parts, fallback=self.fallback)
    else:
      reader = stored_params.Reader(self.path / PARAMS, weights.table(self.config, parts))
    return reader if self.adapter is None else adapters.MergedReader(reader, self.adapter)

  def load_params(
    self, dtype: Any = None, shardings: Any = None, parts: Sequence[str] = weights.PARTS,
    without: Collection[str] = (),
  ) -> dict[str, Any]:
    """Loads the parameter tree, each array straight into its own shards.

    The most that a host holds beside its devices is one shard of one parameter.

    Args:
      dtype: one for all, or {part: dtype}; None keeps the stored one.
      shardings: one for all, or a tree of them like the result; None is the first device.
      parts: top-level keys to load, of ("bagel", "vae").
      without: names of modules whose parameters are left out, `bagel.DRAWING` say.

    Raises:
      InputError: the weights are missing, broken, of another config, or too large for the devices.
    """
    if shardings is None:
      shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = {}
    try:
      with self.open_params(parts) as reader:
        leaves = [leaf for leaf in reader.leaves if not set(without).intersection(leaf.path)]
        size = sum(math.prod(leaf.shape) * reader.dtype(leaf).itemsize for leaf in leaves)
        with progress.bar(size, "loading", unit="B", enabled=jax.process_index() == 0) as bar:
          for leaf in leaves:
            is_tree = not isinstance(shardings, jax.sharding.Sharding)
            arrays[leaf.path] = weights.load(
              reader, leaf, dtype.get(leaf.path[0]) if isinstance(dtype, dict) else dtype,
              weights.lookup(shardings, leaf.path) if is_tree else shardings,
            )
            bar.update(math.prod(leaf.shape) * reader.dtype(leaf).itemsize)
    except jax.errors.JaxRuntimeError as error:
      if not checkpoints.is_full(error):
        raise
      raise errors.InputError(f"{self.path}: {checkpoints.TOO_SMALL}") from error
    return traverse_util.unflatten_dict(arrays)

  def fingerprint(self) -> str:
    """16 hexadecimal digits that another config, tokenizer or other weights would change; the same
    wherever the folder lies, official or converted.

    Of the weights, the names and shapes count, and some values of each parameter: of its first
    layer, all where they are few, else a row. That is some MB of any model.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in (config_lib.LLM_FILE, config_lib.VIT_FILE, config_lib.BAGEL_FILE, *tokenizer.FILES):
      if (self.files / name).is_file():
        digest.update(name.encode() + (self.files / name).read_bytes())
    with self.open_params() as reader:
      for leaf in reader.leaves:
        digest.update(f"{'/'.join(leaf.path)} {leaf.shape}".encode())
        layer = [slice(None)] * len(leaf.layer_shape)
        if math.prod(leaf.layer_shape) > _FEW_VALUES:
          layer[leaf.row_axis] = slice(0, 1)
        index = (slice(0, 1), *layer) if leaf.stacked else tuple(layer)
        digest.update(reader.read(leaf, index, np.float32).tobytes())
    return digest.hexdigest()


def is_folder(path: pathlib.Path) -> bool:
  """Whether `path` is a model folder of either kind, complete or not."""
  return any(
    (path / name).is_file() for name in (MANIFEST, config_lib.LLM_FILE, *weights.FILES.values())
  )


def open_folder(
  path: pathlib.Path | str, missing_from: pathlib.Path | str | None = None
) -> ModelFolder:
  """Recognises a model folder and reads its config; "tiny" is the embedded checkpoint.

  Of a name of the Hugging Face hub, see `hub.find`, only the small files are downloaded now.

  `missing_from` is an official folder with what an official one lacks: its configs, the
  autoencoder, or some tensors.

  Raises:
    InputError: the folder does not exist, is neither kind, or its config cannot be read.
  """
  if path == TINY:
    if not TINY_FOLDER.is_dir():
      raise errors.InputError(
        f"{TINY}: {TINY_FOLDER} is missing from this installation; install again, or make a tiny "
        "checkpoint with python -m unigrpo_jax.build and give its folder"
      )
    path = TINY_FOLDER
  source, path = path, hub.find(path, hub.CONFIGS)
  with errors.storage(path, "read"):
    found, is_converted = path.is_dir(), (path / MANIFEST).is_file()
    if not found:
      raise errors.InputError(
        f"{path}: {'is a file' if path.exists() else 'no such folder'}; expected an official BAGEL "
        "folder, one made by python -m unigrpo_jax.convert, or a name of the Hugging Face hub"
      )
  if is_converted:
    version = read_manifest(path).get("format_version")
    if version not in FORMAT_VERSIONS:
      raise errors.InputError(
        f"{path / MANIFEST}: format_version={version!r} is none of {FORMAT_VERSIONS}; {AGAIN}"
      )
    files = files_lib.local_copy(path / OFFICIAL)
    return ModelFolder(path, "converted", files, config_lib.read_config(files))
  if missing_from is not None:
    base = open_folder(missing_from)
    if base.kind != "official":
      raise errors.InputError(f"{missing_from}: expected an official folder; export it first")
    if not weight_files.find(path, weights.FILES["bagel"]):
      raise errors.InputError(
        f"{path}: holds no weights of a network, so all would be those of {missing_from}; "
        + (weight_files.of_pickles(path, weights.FILES["bagel"]) or "give the folder that has some")
      )
    files = base.files
    if (path / config_lib.LLM_FILE).is_file():
      files = files_lib.local_copy(path, leave_out=_weight_names(path))
      needed = (config_lib.LLM_FILE, config_lib.VIT_FILE, config_lib.BAGEL_FILE)
      lacking = [name for name in needed if not (files / name).is_file()]
      has = lambda *names: all((files / name).is_file() for name in names)
      if not has("tokenizer.json") and not has("vocab.json", "merges.txt"):
        lacking += tokenizer.FILES
      files = _with_files_of(files, base.files, lacking, _weight_names(path))
    return ModelFolder(path, "official", files, config_lib.read_config(files), fallback=base.path)
  if is_folder(path):
    files = files_lib.local_copy(path, leave_out=_weight_names(path))
    config = config_lib.read_config(files)
    return ModelFolder(path, "official", files, config, repository=hub.pinned(source, path))
  if (path / "checkpoints").is_dir():
    raise errors.InputError(
      f"{path}: is the workdir of a run; export its newest checkpoint with python -m "
      f"unigrpo_jax.export {path} OUT, and give that folder"
    )
  if (path / adapters.FILES[0]).is_file():
    raise errors.InputError(
      f"{path}: holds LoRA adapters; give the checkpoint that they were trained on, and this "
      "folder as --adapter, or in a config as config.lora.adapter"
    )
  if found := weight_files.find(path, weights.FILES["bagel"]):
    raise errors.InputError(
      f"{path}: holds weights ({found[0].name}) but no {config_lib.LLM_FILE}: take the configs, "
      "the tokenizer and the autoencoder from the model that they were tuned from: python -m "
      f"unigrpo_jax.convert --source={path} --missing_from=BAGEL-7B-MoT --target=FOLDER"
    )
  raise errors.InputError(
    f"{path}: not a BAGEL folder: it holds neither {config_lib.LLM_FILE} and "
    f"{' and '.join(weights.FILES.values())} (official) nor {MANIFEST} (converted)"
  )


def _with_files_of(
  folder: pathlib.Path, other: pathlib.Path, names: Collection[str], weight_names: Collection[str]
) -> pathlib.Path:
  """`folder`, or a copy of its small files with those of `other` that it lacks."""
  names = [name for name in names if (other / name).is_file()]
  if not names:
    return folder
  merged = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, merged, ignore_errors=True)
  for file in folder.iterdir():
    if file.is_file() and file.name not in weight_names:
      shutil.copyfile(file, merged / file.name)
  for name in names:
    shutil.copyfile(other / name, merged / name)
  return merged


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Reads `unigrpo_jax.json` of a converted folder; raises InputError if it is damaged."""
  try:
    return config_lib.read_json(path / MANIFEST)
  except errors.InputError as error:
    raise errors.InputError(f"{error}; {AGAIN}") from None


def _weight_names(folder: pathlib.Path) -> set[str]:
  """The names of the files that the weights of an official folder are read from."""
  return {path.name for name in weights.FILES.values() for path in weight_files.find(folder, name)}


def other_files(folder: ModelFolder, *, note: bool = False) -> list[pathlib.Path]:
  """The official files beside the weights, by name; `note` prints what else there is."""
  names = set()
  if folder.kind == "official":
    names = _weight_names(folder.path) | _weight_names(folder.files)
  others = sorted(path for path in folder.files.iterdir() if path.name not in names)
  dropped = [
    f"{path.name} ({'sub-folder' if path.is_dir() else 'dangling link or special file'})"
    for path in others if not path.is_file()
  ]
  if note and dropped:
    print(f"note: not copied from {folder.files}: {', '.join(dropped)}", file=sys.stderr)
  return [path for path in others if path.is_file()]


def check_target(
  source: pathlib.Path, target: pathlib.Path, *, overwrite: bool, needed_bytes: int = 0,
  is_replaceable: Callable[[pathlib.Path], bool] = is_folder,
) -> None:
  """Refuses a target that exists, overlaps the source, or whose disk is too full.

  With `overwrite`, a target that is itself such a folder, by default a model folder, may be
  replaced.
  """
  source, target = source.resolve(), target.resolve()
  if target == source or source in target.parents or target in source.parents:
    raise errors.InputError(
      f"target {target} overlaps its source {source}; choose a folder outside the source"
    )
  if target in (here := pathlib.Path.cwd(), *here.parents):
    raise errors.InputError(
      f"target {target} is the current folder or holds it; choose a folder within it"
    )
  if target.exists():
    if not overwrite:
      raise errors.InputError(
        f"target {target} exists already; choose another folder, or pass --overwrite"
      )
    is_empty = target.is_dir() and not any(target.iterdir())
    if not is_empty and not is_replaceable(target):
      raise errors.InputError(
        f"target {target} holds something else, so nothing replaces it; choose another folder"
      )
  if files_lib.is_object(target):
    with errors.at(f"target {target}"):
      atomic.probe(target / MANIFEST)
    parent = pathlib.Path(tempfile.gettempdir())  # It is made there, see `atomic.staging`.
  else:
    parent = next(folder for folder in target.parents if folder.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
    why = "cannot be written to" if parent.is_dir() else "is a file, not a folder"
    raise errors.InputError(f"target {target}: {parent} {why}; choose another place")
  free = shutil.disk_usage(parent).free
  if free < needed_bytes * 1.01 + 2**24:
    raise errors.Storage(
      f"target {target}: needs {needed_bytes / 1e9:.2f} GB on the disk of {parent}, "
      f"{free / 1e9:.2f} GB are free; free some space or choose another disk"
    )


def write_files(
  folder: ModelFolder, target: pathlib.Path, files: Mapping[str, safetensors_files.Contents], *,
  overwrite: bool, with_weights: bool,
) -> None:
  """Makes an official folder of weight `files` and the other files of `folder`.

  These include other weights only `with_weights`. It replaces one on success only; raises
  InputError if it cannot be made, see `check_target`.
  """
  others = other_files(folder, note=True)
  if not with_weights:
    others = [path for path in others if not weight_files.is_weights(path)]
  needed = sum(safetensors_files.total_bytes(contents.tensors) for contents in files.values())
  needed += sum(path.stat().st_size for path in others)
  check_target(folder.path, target, overwrite=overwrite, needed_bytes=needed)
  with locks.staging(target, last=(config_lib.LLM_FILE,)) as staged:
    for path in others:
      shutil.copyfile(path, staged / path.name)
    total = sum(safetensors_files.total_bytes(contents.tensors) for contents in files.values())
    with progress.bar(total, "writing", unit="B") as bar:
      for name, contents in files.items():
        counted = dataclasses.replace(contents, pieces=_counted(contents, bar))
        safetensors_files.write(staged / name, counted)


def _counted(contents: safetensors_files.Contents, bar) -> Iterator[tuple[str, int, np.ndarray]]:
  """The pieces of a file; the bar counts what is written of them."""
  for name, row, piece in contents.pieces:
    yield name, row, piece
    bar.update(piece.size * contents.tensors[name][0].itemsize)


def write_official(
  target: pathlib.Path, folder: ModelFolder, params: dict[str, Any], *, dtype: Any
) -> None:
  """Writes parameters in memory as an official folder, replacing `target` on success.

  `params` has the parts "bagel", "vae" or both, arrays whole on this host, to be written in
  `dtype`; the other parts, configs and tokenizer are those of `folder`.

  Raises:
    InputError: the target cannot be made.
  """
  missing = [part for part in weights.PARTS if part not in params]
  unchanged, files = folder.load_params(parts=missing) if missing else {}, {}
  for part, file in weights.FILES.items():
    values = {
      leaf: weights.lookup(params if part in params else unchanged, leaf.path)
      for leaf in weights.table(folder.config, (part,))
    }
    tensors = {
      name: (np.dtype(dtype if part in params else value.dtype), leaf.official_shape)
      for leaf, value in values.items() for name in leaf.names
    }
    files[file] = safetensors_files.Contents(tensors, _official_tensors(values))
  # Beside them the folder may have weights of before this training, and an optimizer's.
  write_files(folder, target, files, overwrite=True, with_weights=False)


def _official_tensors(
  values: Mapping[weights.Leaf, jax.Array]
) -> Iterator[tuple[str, int, np.ndarray]]:
  """The official tensors of parameters in memory: (name, 0, tensor)."""
  for leaf, value in values.items():
    value = np.asarray(value)
    for layer, name in enumerate(leaf.names):
      yield name, 0, leaf.to_official(value[layer] if leaf.stacked else value)
