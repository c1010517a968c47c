"""Official BAGEL folder <-> Orbax folder, streaming: `python -m unigrpo_jax.convert --help`.

`--export` gives back every tensor and every other file bit for bit. Memory stays near 1 GiB for any
size of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
import pathlib
import re
import sys

from unigrpo_jax import errors
from unigrpo_jax.data import files

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_SECONDS = 5  # that one request may take; the library retries a few times
_HUB_FILES = ("*.json", "*.txt", "*.md", "LICENSE*", "ema.safetensors", "ae.safetensors")


def find_source(source: str) -> pathlib.Path:
  """The folder that `--source` names: a path, or a repository of the Hugging Face hub.

  Raises:
    InputError: neither exists, or the hub cannot be reached.
  """
  path = files.path(source)
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
      "huggingface_hub: pip install huggingface_hub"
    ) from None
  unreachable = None
  try:
    # snapshot_download waits without end for a hub that accepts connections but does not answer.
    huggingface_hub.HfApi().repo_info(source, timeout=_HUB_SECONDS)
    print(f"downloading {source} from the Hugging Face hub", flush=True)
  except Exception as error:  # network, authentication and name errors of several libraries
    unreachable = error
  try:
    # Without the hub, what was downloaded before is used.
    return pathlib.Path(huggingface_hub.snapshot_download(
      source, allow_patterns=list(_HUB_FILES), local_files_only=unreachable is not None
    ))
  except Exception as error:
    cause = unreachable or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    raise errors.InputError(
      f"--source={source}: no such folder, and the hub did not deliver it ({reason}); check the "
      "name and the network, or download it elsewhere and pass the folder"
    ) from None


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
  parser = errors.ArgumentParser(
    prog="python -m unigrpo_jax.convert",
    description="Converts an official BAGEL folder to an Orbax checkpoint that loads sharded, and "
    "back, bit for bit. Streams: about 1 GiB of memory, and disk for one copy of the model.",
    epilog="examples: --source=ByteDance-Seed/BAGEL-7B-MoT --target=bagel | --export "
    "--source=bagel --target=bagel_official | --check --source=BAGEL-7B-MoT --target=bagel",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--source", required=True,
    help="folder to read: official (with ema.safetensors and ae.safetensors), or converted with "
    "--export; or a repository name of the Hugging Face hub, which is downloaded",
  )
  parser.add_argument("--target", required=True, type=files.path, help="folder to make")
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

  # After the arguments are known to be good: importing jax takes seconds.
  from unigrpo_jax.runtime import conversion

  if args.check:
    if not conversion.check(source, args.target):
      sys.exit(1)
  elif args.export:
    conversion.export(source, args.target, overwrite=args.overwrite)
  else:
    conversion.convert(source, args.target, overwrite=args.overwrite)


if __name__ == "__main__":
  errors.report(main)
