"""Repositories of the Hugging Face hub, wherever a folder is expected: ByteDance-Seed/BAGEL-7B-MoT.

They are downloaded once, into the cache of the hub's library: HF_HOME says where it is, and with
HF_HUB_OFFLINE=1 nothing else is asked. NAME@REVISION is a branch, a tag or a commit.
"""

from __future__ import annotations

from collections.abc import Sequence
import fnmatch
import os
import pathlib
import re
import shutil
import sys
from typing import Any

from unigrpo_jax import errors
from unigrpo_jax.data import files
from unigrpo_jax.models import weight_files

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
_SECONDS = 5  # that one request may take; the library retries a few times
CONFIGS = ("*.json", "*.txt", "*.md", "LICENSE*")
WEIGHTS = ("*.safetensors",)
# What a repository that has the first of these is read from; other weights in it are left there.
_RELEASED = tuple(weight_files.FILES.values())


def find(source: str | os.PathLike, patterns: Sequence[str] = (*CONFIGS, *WEIGHTS)) -> pathlib.Path:
  """The folder that `source` names: a path, or a repository, whose files are downloaded.

  Args:
    source: a folder of this name comes before a repository.
    patterns: of the files; sub-folders are left out.

  Returns:
    `source` itself where it is no name of a repository, whether or not it exists.

  Raises:
    InputError: there is no such repository or no room for it, or the library is not installed; or
      Storage where the hub cannot be reached and the cache lacks it.
  """
  path, match = files.path(source), _NAME.fullmatch(str(source))
  if match is None or path.exists():
    return path
  # Read when huggingface_hub is imported: an unreachable hub must fail in seconds, not hang.
  os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(_SECONDS))
  os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_SECONDS))
  try:
    import huggingface_hub
  except ImportError:
    raise errors.InputError(
      f"{source}: no such folder; to download the repository of that name from the Hugging Face "
      "hub, pip install huggingface_hub"
    ) from None
  name, revision = match.groups()
  try:
    # snapshot_download waits without end for a hub that accepts connections but does not answer.
    info = huggingface_hub.HfApi().repo_info(
      name, revision=revision, timeout=_SECONDS, files_metadata=True
    )
  except Exception as error:  # network, authentication and name errors of several libraries
    return _cached(huggingface_hub, source, name, revision, patterns, error)
  wanted = _wanted(info.siblings, patterns)
  _announce(huggingface_hub, source, name, info.sha, wanted)
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=[file.rfilename for file in wanted]
    ))
  except OSError as error:
    # Errors of the network are of this kind too, without a number.
    if error.errno is not None and error.filename:
      raise errors.of_storage(error, error.filename, "written") from None
    raise _failure(source, error) from None
  except Exception as error:
    raise _failure(source, error) from None


def pinned(source: str | os.PathLike, found: pathlib.Path) -> str:
  """The repository and commit that `find` made `found` of; "" where it is `source` itself."""
  # The folder of a snapshot has the name of its commit.
  is_same = found == files.path(source)
  return "" if is_same else f"{str(source).partition('@')[0]}@{found.name}"


def _wanted(listed: Sequence[Any], patterns: Sequence[str]) -> list[Any]:
  """The files of a repository, with `rfilename` and `size`, that match."""
  names = {file.rfilename for file in listed}
  released = _RELEASED[0] in names

  def matches(name: str) -> bool:
    if released and fnmatch.fnmatchcase(name, WEIGHTS[0]) and name not in _RELEASED:
      return False
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

  return [file for file in listed if matches(file.rfilename)]


def _announce(library: Any, source: Any, name: str, commit: str, wanted: Sequence[Any]) -> None:
  """Says what is not in the cache yet, and how large it is; refuses what the disk cannot hold."""
  missing = [
    file for file in wanted
    if not isinstance(library.try_to_load_from_cache(name, file.rfilename, revision=commit), str)
  ]
  if not missing:
    return
  cache = pathlib.Path(library.constants.HF_HUB_CACHE)
  size = sum(file.size or 0 for file in missing)
  place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
  free = shutil.disk_usage(place).free
  if size > free:
    raise errors.InputError(
      f"{source}: downloading it takes {_bytes(size)}, {_bytes(free)} are free in {cache}; free "
      "some space, or set HF_HOME to a folder on another disk"
    )
  print(
    f"downloading {source} from the Hugging Face hub: {len(missing)} file(s), {_bytes(size)}, into "
    f"{cache}; {_bytes(free)} are free", file=sys.stderr, flush=True,
  )


def _bytes(size: int) -> str:
  return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _cached(
  library: Any, source: Any, name: str, revision: str | None, patterns: Sequence[str],
  cause: Exception,
) -> pathlib.Path:
  """What was downloaded before; raises for the reason that nothing else can be had."""
  try:
    path = pathlib.Path(library.snapshot_download(
      name, revision=revision, allow_patterns=list(patterns), local_files_only=True
    ))
  except Exception:
    raise _failure(source, cause) from None
  lacking = [pattern for pattern in patterns if pattern in WEIGHTS and not any(path.glob(pattern))]
  if lacking:
    raise _failure(source, cause)
  return path


def _failure(source: Any, error: Exception) -> errors.InputError:
  """One line about a repository that cannot be had."""
  kind = type(error).__name__
  if kind == "OfflineModeIsEnabled":
    return errors.InputError(
      f"{source}: no such folder, and the cache of the Hugging Face hub does not hold it; "
      "HF_HUB_OFFLINE is set: unset it to download, or set HF_HOME to the cache that has it"
    )
  reason = errors.first_line(error)
  if kind in (
    "RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError"
  ):
    return errors.InputError(
      f"{source}: no such folder, and the Hugging Face hub does not give it ({reason}); check the "
      "name, and for a private or gated repository set HF_TOKEN"
    )
  return errors.Storage(
    f"{source}: no such folder, and the Hugging Face hub did not deliver it ({reason}); check the "
    "name and the network and run the same command again, or download it elsewhere and give the "
    "folder"
  )
