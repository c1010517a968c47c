"""The reward protocol: samples travel as npz, scores as JSON. Nothing is ever unpickled.

  POST {url}/v1/rewards/{name}   samples -> {"scores": [number or null, ...]}, null for no score
  POST {url}/v1/rewards          samples and names -> {"scores": {name: [...]}, "errors": {...}}
  GET  {url}/v1/rewards          -> {"rewards": [name, ...], "encodings": [...], "settings": {...}}
  GET  {url}/healthz             -> {"status": "ok"}, without a token; 503 {"status": "loading"}

The body of a POST is what `np.savez(file, ...)` writes, uncompressed, with these arrays:

  images    [N, H, W, 3] uint8; or, for images of any sizes,
  encoded   [bytes] uint8, N PNG or JPEG files one after another, and lengths, [N] int64
  samples   [bytes] uint8, the UTF-8 of a JSON list of N objects {"prompt": text, "text": text or
            null, "metadata": object}, or of {"names": [name, ...], "samples": that list}

An answer has "details" beside "scores" where there are some: for each sample an object of at most
64 KiB, or null. If they make the answer longer than `ANSWER` bytes, they are sent only to requests
with the header "Reward-Details: 1". "errors" has a line for each name without scores. "encodings"
are those that a server accepts, and "settings" what the scores of each of its rewards depend on; a
server without "encodings" accepts only raw images and one name per request. Where a server has a
token, requests need the header "Authorization: Bearer TOKEN". An answer whose status is not 200 is
{"error": line}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
import json
import math
from typing import Any
import zipfile

import numpy as np
import PIL.Image

from unigrpo_jax.data import images as images_lib
from unigrpo_jax.rewards import base

PREFIX = "/v1/rewards"
DETAILS = "Reward-Details"
ENCODINGS = ("raw", "png", "jpeg")
MAX_PIXELS = 1 << 24  # most pixels of an encoded image, 4096 x 4096
# Most bytes of an answer without details, and more for each score.
ANSWER, ANSWER_A_SCORE = 65_536, 64


def pack(
  samples: Sequence[base.Sample], encoding: str = "raw", names: Sequence[str] | None = None
) -> bytes:
  """The body of a request about N >= 1 samples.

  Args:
    samples: to be scored.
    encoding: of images, one of `ENCODINGS`; "raw" needs images of one shape.
    names: of several rewards; None: a request for one reward, named by its path.

  Raises:
    ValueError, TypeError: an image is not [H, W, 3] uint8, shapes differ, or metadata is not JSON.
  """
  records: Any = [
    {"prompt": s.prompt, "text": s.text, "metadata": dict(s.metadata)} for s in samples
  ]
  if names is not None:
    records = {"names": list(names), "samples": records}
  # ASCII escapes: a sampled text may hold an unpaired surrogate, which UTF-8 cannot encode.
  text = json.dumps(records, allow_nan=False).encode("ascii")
  for sample in samples:
    image = sample.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(f"an image is {list(image.shape)} {image.dtype}, not [H, W, 3] uint8")
  if encoding == "raw":
    images = {"images": np.stack([sample.image for sample in samples])}
  else:
    files = [encode(sample.image, encoding) for sample in samples]
    images = {
      "encoded": np.frombuffer(b"".join(files), np.uint8),
      "lengths": np.array([len(file) for file in files], np.int64),
    }
  file = io.BytesIO()
  np.savez(file, **images, samples=np.frombuffer(text, np.uint8))
  return file.getvalue()


def encode(image: np.ndarray, encoding: str) -> bytes:
  """An image, [H, W, 3] uint8, as the bytes of a file: "png", or "jpeg" of quality 95."""
  file = io.BytesIO()
  options = {"compress_level": 1} if encoding == "png" else {"quality": 95}
  PIL.Image.fromarray(image).save(file, encoding, **options)
  return file.getvalue()


def decode(file: bytes) -> np.ndarray:
  """The image in a PNG or JPEG file as `data.images.to_rgb` shows it, [H, W, 3] uint8.

  The bytes may be malicious.

  Raises:
    ValueError: it is no such file, or has more than `MAX_PIXELS`, which is checked before decoding.
  """
  try:
    image = PIL.Image.open(io.BytesIO(file), formats=("PNG", "JPEG"))
    if math.prod(image.size) <= MAX_PIXELS:
      return np.asarray(images_lib.to_rgb(image))
    claim = "{} x {} pixels".format(*image.size)
  except PIL.Image.DecompressionBombError as error:  # Its own limit is higher.
    claim = str(error)
  except PIL.UnidentifiedImageError:  # It quotes the address of an object.
    raise ValueError("an image is no PNG or JPEG") from None
  except Exception as error:  # Pillow raises half a dozen kinds for strange bytes.
    raise ValueError(f"an image is no PNG or JPEG: {' '.join(str(error).split())}") from None
  raise ValueError(f"an image of at most {MAX_PIXELS} pixels is taken; this one says {claim}")


def unpack(body: bytes, max_bytes: float = math.inf) -> list[base.Sample]:
  """The samples in the body of a request for one reward. The bytes may be malicious.

  Compressed members and sizes beyond the body are refused, and so are encoded images of more than
  `max_bytes` in all; so memory stays near the larger of both, but for the JSON, whose objects take
  up to 30 times its bytes.

  Raises:
    ValueError: the body is not as `pack` makes it; one line says why.
  """
  return _samples(*_read(body, max_bytes))


def unpack_named(body: bytes, max_bytes: float = math.inf) -> tuple[list[base.Sample], list[str]]:
  """(samples, names) in the body of a request for several rewards; see `unpack`."""
  images, records = _read(body, max_bytes)
  if not isinstance(records, dict) or set(records) != {"names", "samples"}:
    raise ValueError("a request for several rewards must have the keys names, samples")
  names = records["names"]
  if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
    raise ValueError("names must be a list of names of rewards")
  return _samples(images, records["samples"]), names


def _read(body: bytes, max_bytes: float) -> tuple[Sequence[np.ndarray], Any]:
  """(images, decoded JSON of the samples) in a body; raises ValueError."""
  try:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
      if "encoded.npy" in archive.namelist():
        images = _read_encoded(archive, len(body), max_bytes)
      else:
        images = _read_array(archive, "images", 4, len(body))
        if images.shape[-1] != 3 or 0 in images.shape:
          raise ValueError(f"images are {list(images.shape)}, not [N, H, W, 3]")
      return images, json.loads(_read_array(archive, "samples", 1, len(body)).tobytes())
  except ValueError:
    raise
  except Exception as error:  # zipfile and json raise half a dozen kinds for strange bytes.
    raise ValueError(f"not a readable npz: {' '.join(str(error).split())}") from None


def _samples(images: Sequence[np.ndarray], records: Any) -> list[base.Sample]:
  if not isinstance(records, list) or len(records) != len(images):
    raise ValueError(f"samples must be a JSON list of {len(images)} objects, one an image")
  return [_sample(record, image) for record, image in zip(records, images)]


def _read_encoded(
  archive: zipfile.ZipFile, limit: int, max_bytes: float
) -> list[np.ndarray]:
  data = _read_array(archive, "encoded", 1, limit).tobytes()
  lengths = _read_array(archive, "lengths", 1, limit, np.int64).tolist()
  if not lengths or min(lengths) < 1 or sum(lengths) != len(data):
    raise ValueError(f"lengths must be positive, with the sum {len(data)} of the encoded bytes")
  images, first, total = [], 0, 0
  for length in lengths:
    images.append(decode(data[first : first + length]))
    first, total = first + length, total + images[-1].nbytes
    if total > max_bytes:
      raise ValueError(f"the images are more than the {max_bytes} bytes allowed; send fewer")
  return images


def _read_array(
  archive: zipfile.ZipFile, name: str, rank: int, limit: int, kind=np.uint8
) -> np.ndarray:
  """An uncompressed array of at most `limit` bytes, whose npy header is not trusted.

  Raises:
    ValueError: it is missing or compressed, has another dtype than `kind` or another `rank`, or its
      size does not match its shape.
  """
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
    if dtype != kind or len(shape) != rank or fortran:
      raise ValueError(
        f"the array {name} is {list(shape)} {dtype}; it must be {np.dtype(kind)}, rank {rank}"
      )
    data = file.read()
  if min(shape) < 0 or math.prod(shape) * np.dtype(kind).itemsize != len(data):
    raise ValueError(f"the array {name} says {list(shape)} and has {len(data)} bytes")
  return np.frombuffer(data, kind).reshape(shape)


def _sample(record, image: np.ndarray) -> base.Sample:
  if not isinstance(record, dict) or set(record) != {"prompt", "text", "metadata"}:
    raise ValueError("each of samples must have the keys metadata, prompt, text")
  if not isinstance(record["prompt"], str) or not isinstance(record["text"], str | None):
    raise ValueError("prompt must be a text, and text a text or null")
  if not isinstance(record["metadata"], dict):
    raise ValueError("metadata must be an object, {} for none")
  return base.Sample(image=image, **record)


def answer(
  scores: Mapping[str, base.Scores | str], names: Sequence[str] | None, with_details: bool
) -> dict[str, Any]:
  """The JSON answer to a request.

  Args:
    scores: {name: its scores, or a line that says why there are none}.
    names: rewards of a request for several; None: a request for one.
    with_details: send details whatever their length.
  """
  columns, details, failed = {}, {}, {}
  for name, part in scores.items():
    if isinstance(part, str):
      failed[name] = part
      continue
    columns[name] = [None if math.isnan(value) else value for value in part.values.tolist()]
    if part.details is not None or with_details:
      found = [part.detail(i) or None for i in range(len(part.values))]
      if any(found):
        details[name] = found
  if names is None:
    (columns,), details = columns.values(), next(iter(details.values()), None)
  made = {"scores": columns, "details": details, "errors": failed}
  if not with_details and len(json.dumps(made)) > ANSWER:
    del made["details"]
  return {key: value for key, value in made.items() if value or key == "scores"}


def answer_limit(count: int) -> int:
  """Most bytes of an answer about `count` samples by one reward."""
  return ANSWER + (ANSWER_A_SCORE + base.MAX_DETAIL + 2) * count


def read_answer(body: bytes, count: int, names: Sequence[str] | None) -> list[base.Scores]:
  """The scores in an answer about `count` samples: of one reward, or of each of `names`.

  Raises:
    ValueError: the answer is malformed.
  """
  found = read_object(body)
  scores, details, failed = (found.get(key) for key in ("scores", "details", "errors"))
  if names is None:
    return [_scores(scores, details, count)]
  scores, details, failed = (
    part if isinstance(part, dict) else {} for part in (scores, details, failed)
  )
  return [
    base.Scores(np.full(count, np.nan), str(failed[name])[:500]) if name in failed
    else _scores(scores.get(name), details.get(name), count)
    for name in names
  ]


def _scores(scores, details, count: int) -> base.Scores:
  try:
    if isinstance(scores, list) and len(scores) == count:
      if all(score is None or type(score) in (int, float) for score in scores):
        values = np.array([math.nan if score is None else float(score) for score in scores])
        if not isinstance(details, list) or len(details) != count:
          details = [None] * count
        details = [detail if isinstance(detail, dict) else None for detail in details]
        reasons = (
          str(detail["reason"])[:500] for detail, value in zip(details, values)
          if math.isnan(value) and detail and detail.get("reason")
        )
        return base.Scores(values, next(reasons, None), details=details)
  except OverflowError:
    pass
  raise ValueError(f'the answer is not {{"scores": [{count} numbers or null]}}')


def read_object(body: bytes) -> dict[str, Any]:
  """The JSON object in `body`; {} where it holds none."""
  try:
    found = json.loads(body)
  except (ValueError, RecursionError):
    found = None
  return found if isinstance(found, dict) else {}
