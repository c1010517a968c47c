"""Random damage to bytes, the same for the same generator."""

import random

# What a fuzzer tries first: ends of ranges, and what JSON, HTTP and npy give a meaning.
PIECES = (
  b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\n", b"\r\n\r\n", b"-1", b"9" * 20, b"NaN", b"1e999",
  b"null", b"[" * 50, b"{", b'"', b"\\ud800", b"PK\x03\x04", b"(", b"'descr'", b"<html>",
)


def mutate(rng: random.Random, body: bytes) -> bytes:
  """The bytes after one to four changes: flipped, cut, repeated, replaced, put in."""
  data = bytearray(body)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(len(data) + 1)
    size = min(int(rng.expovariate(0.1)) + 1, len(data) - at)
    kind = rng.randrange(6)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del data[at : at + size]
    elif kind == 2:
      data[at:at] = data[at : at + size] * rng.randint(1, 20)
    elif kind == 3:
      data[at : at + size] = rng.randbytes(size)
    elif kind == 4:
      data[at:at] = rng.choice(PIECES)
    else:
      del data[at:]
  return bytes(data)
