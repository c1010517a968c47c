"""The reward protocol's bodies: samples as npz, scores as JSON. Nothing is ever unpickled.

  POST {url}/v1/rewards/{name}   samples -> {"scores": [number or null, ...]}, null for no score
  GET  {url}/v1/rewards          -> {"rewards": [name, ...]}
  GET  {url}/healthz             -> {"status": "ok"}, without a token

The body of a POST is what `np.savez(file, images=..., samples=...)` writes, uncompressed: `images`
[N, H, W, 3] uint8, and `samples` [bytes] uint8, the UTF-8 of a JSON list of N objects {"prompt":
text, "text": text or null, "metadata": object}. With a token, requests have the header
"Authorization: Bearer TOKEN". Any other status than 200 comes with {"error": one line}.
"""

from __future__ import annotations

from collections.abc import Sequence
import io
import json
import math
import zipfile

import numpy as np

from unigrpo_jax.rewards import base

PREFIX = "/v1/rewards"


def pack(samples: Sequence[base.Sample]) -> bytes:
  """The body of a request: N >= 1 samples whose images all have one shape.

  Raises:
    ValueError, TypeError: an image is not [H, W, 3] uint8, shapes differ, or metadata is not JSON.
  """
  images = np.stack([sample.image for sample in samples])
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images are {list(images.shape)} {images.dtype}, not [N, H, W, 3] uint8")
  records = [{"prompt": s.prompt, "text": s.text, "metadata": dict(s.metadata)} for s in samples]
  # ASCII escapes, so that half a surrogate pair out of a sampled text survives.
  text = json.dumps(records, allow_nan=False).encode("ascii")
  file = io.BytesIO()
  np.savez(file, images=images, samples=np.frombuffer(text, np.uint8))
  return file.getvalue()


def unpack(body: bytes) -> list[base.Sample]:
  """The samples of a request's body, which may be any bytes.

  Memory stays near the size of the body: compressed members and sizes beyond it are refused.

  Raises:
    ValueError: the body is not what `pack` makes; one line says why.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
      images = _read_array(archive, "images", 4, len(body))
      records = json.loads(_read_array(archive, "samples", 1, len(body)).tobytes())
  except ValueError:
    raise
  except Exception as error:  # zipfile and json raise half a dozen kinds for strange bytes.
    raise ValueError(f"not a readable npz: {' '.join(str(error).split())}") from None
  if images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(f"images are {list(images.shape)}, not [N, H, W, 3]")
  if not isinstance(records, list) or len(records) != len(images):
    raise ValueError(f"samples must be a JSON list of {len(images)} objects, one an image")
  return [_sample(record, image) for record, image in zip(records, images)]


def _read_array(archive: zipfile.ZipFile, name: str, rank: int, limit: int) -> np.ndarray:
  """An uncompressed uint8 array of at most `limit` bytes, without trust in its npy header."""
  try:
    info = archive.getinfo(f"{name}.npy")
  except KeyError:
    raise ValueError(f"the array {name} is missing") from None
  if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
    raise ValueError(f"the array {name} is compressed; write it with np.savez")
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
      raise ValueError(f"the array {name} has npy version {version}, not 1.0 or 2.0")
    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, fortran, dtype = read_header(file)
    if dtype != np.uint8 or len(shape) != rank or fortran:
      raise ValueError(f"the array {name} is {list(shape)} {dtype}; it must be uint8, rank {rank}")
    data = file.read()
  if min(shape) < 0 or math.prod(shape) != len(data):
    raise ValueError(f"the array {name} says {list(shape)} and has {len(data)} bytes")
  return np.frombuffer(data, np.uint8).reshape(shape)


def _sample(record, image: np.ndarray) -> base.Sample:
  if not isinstance(record, dict) or set(record) != {"prompt", "text", "metadata"}:
    raise ValueError("each of samples must have the keys metadata, prompt, text")
  if not isinstance(record["prompt"], str) or not isinstance(record["text"], str | None):
    raise ValueError("prompt must be a text, and text a text or null")
  if not isinstance(record["metadata"], dict):
    raise ValueError("metadata must be an object, {} for none")
  return base.Sample(image=image, **record)
