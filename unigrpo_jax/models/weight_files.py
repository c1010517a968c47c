"""The weight files of an official folder as people have them: of other names, in shards, wrapped.

A part of the release is one file. Fine-tunes name it `model.safetensors`, cut it into shards with
an index, or put what a training framework wrapped the network in before the tensors' names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import contextlib
import pathlib
import re
from typing import Any

import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import safetensors_files

# The file that holds each top-level part of the parameter tree.
FILES = {"bagel": "ema.safetensors", "vae": "ae.safetensors"}
# Of names: what DistributedDataParallel, torch.compile, FSDP and checkpointing add anywhere, and
# what a class around the network adds in front.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AROUND = ("model.", "bagel.")
_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def canonical(name: str) -> str:
  """The name of a tensor in the release: without what wrapped the network."""
  name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
  while name.startswith(_AROUND):
    name = name.partition(".")[2]
  return name


def find(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The files that hold what file `name` of the release holds: it, or an index and its shards.

  Weights of the network may have any name; then they must be the only ones. [] if there are none;
  of shards, some may be missing.

  Raises:
    InputError: several files may be meant, or an index is damaged; or the folder cannot be read.
  """
  with errors.storage(folder, "read"):
    return _find(folder, name)


def is_weights(path: pathlib.Path) -> bool:
  """Whether a file holds weights, or says where they are, by its name."""
  return path.suffix in (_SUFFIX, *_PICKLES) or path.name.endswith(_INDEX)


def _find(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  found = sorted(path for path in folder.iterdir() if path.is_file())
  found = [path for path in found if path.name == name or path.name not in FILES.values()]
  indices = [path for path in found if path.name.endswith(_INDEX)]
  files = [path for path in found if path.name.endswith(_SUFFIX)]
  names = [name] if name == FILES["vae"] else [name, "model.safetensors"]
  if len(files) == 1 and files[0].name not in names and not any(
    shard in files for index in indices for shard in _with_shards(index)[1:]
  ):
    indices = []  # They are another model's, of which the folder has no shard.
  for candidate in names:
    for path in (folder / candidate, folder / f"{candidate.removesuffix(_SUFFIX)}{_INDEX}"):
      if path in files or path in indices:
        return _with_shards(path)
  if name == FILES["vae"]:
    return []
  singles = indices or files
  sets = {_SHARD.sub(r"\1-of-\3", path.name) for path in singles}
  if len(sets) > 1:
    raise errors.InputError(
      f"{folder}: holds several weight files ({', '.join(sorted(sets)[:5])}), and none is "
      f"{name}; leave the one that is meant, or give it that name"
    )
  return _with_shards(singles[0]) if indices else _complete(singles)


def _with_shards(path: pathlib.Path) -> list[pathlib.Path]:
  """A file, or an index with its shards."""
  if not path.name.endswith(_INDEX):
    return [path]
  return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def _weight_map(path: pathlib.Path) -> Mapping[str, str]:
  """{tensor: file} of an index."""
  shards = config_lib.read_json(path).get("weight_map")
  if not isinstance(shards, dict) or not shards or not all(
    isinstance(name, str) and name.endswith(_SUFFIX) and not re.search(r"[/\\\x00]", name)
    for name in shards.values()
  ):
    raise errors.InputError(
      f'{path}: its "weight_map" must say which {_SUFFIX} file of its folder each tensor is in; '
      "download it again"
    )
  return shards


def _complete(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """All shards of a set without an index, of which some are there."""
  if paths and (match := _SHARD.fullmatch(paths[0].name)):
    stem, digits, total = match[1], len(match[2]), match[3]
    if not int(total) < 10_000:
      raise errors.InputError(f"{paths[0]}: is not one of {total} shards; rename it")
    return [
      paths[0].parent / f"{stem}-{number:0{digits}}-of-{total}{_SUFFIX}"
      for number in range(1, int(total) + 1)
    ]
  return list(paths)


class Tensors(contextlib.ExitStack):
  """The tensors of one file of the release, wherever they are: as a `SafetensorsFile`.

  Attributes:
    path: of the file, or of the index.
    entries: {name in the release: Entry}.
    metadata: of the header; None where there are several that differ.
  """

  def __init__(
    self, folder: pathlib.Path, name: str, fallback: pathlib.Path | None = None,
    ignored: Collection[str] = (),
  ):
    """Opens the files of `folder`; those of the official folder `fallback` where it has none.

    Tensors whose names in the file are `ignored` are left out.

    Raises:
      InputError: there are none, or one is damaged, or two have a tensor of the same name.
    """
    super().__init__()
    paths = find(folder, name)
    if not paths and fallback is not None:
      folder, paths = fallback, find(fallback, name)
    if not paths:
      raise errors.InputError(f"{folder / name}: file not found; {_advice(folder, name)}")
    if missing := [path.name for path in paths if not path.is_file()]:
      raise errors.InputError(
        f"{folder}: {len(missing)} of its shards are missing ({', '.join(missing[:5])}); download "
        "them"
      )
    self.path, self.entries = paths[0], {}
    self._sources: dict[str, tuple[safetensors_files.SafetensorsFile, str]] = {}
    try:
      index = _weight_map(paths[0]) if paths[0].name.endswith(_INDEX) else {}
      files = [
        self.enter_context(safetensors_files.SafetensorsFile(path, ignored))
        for path in paths if path.name.endswith(_SUFFIX)
      ]
      for file in files:
        lacking = [tensor for tensor, name in index.items()
                   if name == file.path.name and tensor not in {*file.entries, *ignored}]
        if lacking:
          raise errors.InputError(
            f"{file.path}: lacks {len(lacking)} tensors that {self.path.name} says it has "
            f"({', '.join(lacking[:5])}); download both again"
          )
        for own in file.entries:
          self._add(own, file)
    except BaseException:
      self.close()
      raise
    self.metadata: Any = files[0].metadata
    if any(file.metadata != self.metadata for file in files):
      self.metadata = None

  def _add(self, own: str, file: safetensors_files.SafetensorsFile) -> None:
    name = canonical(own)
    if name in self._sources:
      other, other_name = self._sources[name]
      raise errors.InputError(
        f"{file.path}: {own} is the tensor that {other_name} of {other.path.name} is too; leave one"
      )
    self._sources[name], self.entries[name] = (file, own), file.entries[own]

  def fill_from(self, other: Tensors, names: Sequence[str]) -> list[str]:
    """Takes those of `names` that are missing here from `other`; returns which."""
    taken = [name for name in names if name not in self.entries and name in other.entries]
    for name in taken:
      self._sources[name], self.entries[name] = other._sources[name], other.entries[name]
    return taken

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads `tensor[index]`, see `SafetensorsFile.read`."""
    file, own = self._sources[name]
    return file.read(own, index)


def _advice(folder: pathlib.Path, name: str) -> str:
  """What to do where a folder has no file `name`."""
  if name == FILES["vae"]:
    return "fine-tunes leave the autoencoder out: copy it from the original BAGEL folder"
  return of_pickles(folder, name) or "a BAGEL folder must contain it"


def of_pickles(folder: pathlib.Path, name: str) -> str:
  """How to make file `name` of the pickles in a folder; "" where it has none."""
  pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
  if pickles:
    target = f"{pathlib.Path(name).stem}{_SUFFIX}"
    return (
      f"{pickles[0]} may be a pickle, which runs code when it is read; where PyTorch is installed: "
      f"python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in "
      f"torch.load('{pickles[0]}', weights_only=True).items()}}, '{target}')\""
    )
  return ""
