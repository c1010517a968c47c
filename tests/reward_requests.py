"""Samples, requests and clients that the tests of the reward protocol share."""

import io
import json
import struct
import zipfile

import numpy as np

from unigrpo_jax import rewards

NAN = np.nan


def numbered(count, side=2):
  return [
    rewards.Sample(f"prompt {i}", np.full((side, side, 3), i, np.uint8)) for i in range(count)
  ]


def value(samples):
  return np.array([s.image[0, 0, 0] for s in samples], np.float32)


def client(url, **options):
  defaults = {"url": url, "reward": "r", "backoff": 0.001, "timeout": 5}
  return rewards.make("http", **defaults | options)


def npz(save=np.savez, **arrays):
  file = io.BytesIO()
  save(file, **arrays)
  return file.getvalue()


def encoded(*records):
  return np.frombuffer(json.dumps(list(records)).encode(), np.uint8)


RECORD = {"prompt": "", "text": None, "metadata": {}}
IMAGES = np.zeros((1, 2, 2, 3), np.uint8)


def declared(header):
  """A body whose `images` hold 12 bytes, whatever their npy header says."""
  text = header.encode().ljust(117) + b"\n"
  samples, file = io.BytesIO(), io.BytesIO()
  np.lib.format.write_array(samples, encoded(RECORD))
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(
      "images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(12)
    )
    archive.writestr("samples.npy", samples.getvalue())
  return file.getvalue()


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1000000, 1000000, 3)}"
NEGATIVE = "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -2, 2, 3)}"
OBJECTS = "{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 2, 3)}"
# Name: (part of the refusal, body).
MALFORMED = {
  "empty": ("npz", b""),
  "noise": ("npz", bytes(range(256)) * 4),
  "json": ("npz", b'{"samples": []}'),
  "truncated": ("npz", npz(images=IMAGES, samples=encoded(RECORD))[:-30]),
  "no images": ("images is missing", npz(samples=encoded(RECORD))),
  "no samples": ("samples is missing", npz(images=IMAGES)),
  "compressed": ("compressed", npz(np.savez_compressed, images=IMAGES, samples=encoded(RECORD))),
  "a bomb": ("compressed", npz(np.savez_compressed, images=np.zeros((1, 2000, 2000, 3), np.uint8))),
  "objects": ("must be uint8", npz(images=np.array([[[[None]]]], object), samples=encoded(RECORD))),
  "declared objects": ("must be uint8", declared(OBJECTS)),
  "declared huge": ("has 12 bytes", declared(HUGE)),
  "declared negative": ("has 12 bytes", declared(NEGATIVE)),
  "declared nonsense": ("npz", declared("{" * 60)),
  "declared list": ("not a dictionary", declared("[1, 2]")),
  "floats": ("must be uint8", npz(images=IMAGES.astype(np.float32), samples=encoded(RECORD))),
  "fortran": (
    "must be uint8",
    npz(images=np.zeros((3, 2, 2, 3), np.uint8, order="F"), samples=encoded(*[RECORD] * 3)),
  ),
  "grey": ("[1, 2, 2, 1]", npz(images=np.zeros((1, 2, 2, 1), np.uint8), samples=encoded(RECORD))),
  "no pixels": (
    "[1, 0, 2, 3]", npz(images=np.zeros((1, 0, 2, 3), np.uint8), samples=encoded(RECORD)),
  ),
  "one image": ("rank 4", npz(images=IMAGES[0], samples=encoded(RECORD))),
  "too few samples": (
    "list of 2",
    npz(images=np.zeros((2, 2, 2, 3), np.uint8), samples=encoded(RECORD)),
  ),
  "samples not json": ("utf-8", npz(images=IMAGES, samples=np.full(9, 255, np.uint8))),
  "samples nested": (
    "recursion",
    npz(images=IMAGES, samples=np.frombuffer(b"[" * 100_000, np.uint8)),
  ),
  "samples text": ("must be uint8", npz(images=IMAGES, samples=np.array(json.dumps([RECORD])))),
  "key missing": ("keys", npz(images=IMAGES, samples=encoded({"prompt": "", "text": None}))),
  "key surplus": ("keys", npz(images=IMAGES, samples=encoded(RECORD | {"image": 1}))),
  "prompt number": ("prompt", npz(images=IMAGES, samples=encoded(RECORD | {"prompt": 3}))),
  "text number": ("text", npz(images=IMAGES, samples=encoded(RECORD | {"text": 3}))),
  "metadata null": ("metadata", npz(images=IMAGES, samples=encoded(RECORD | {"metadata": None}))),
}
