"""Runs a frozen graph in TensorFlow.js's format (model.json and its binary) with NumPy.

It supports just the operations in `OPS`, and refuses graphs with others. Arrays are NHWC where the
graph says so; transposing to and fro costs nothing, since a transposed array is a view.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import errors


@dataclasses.dataclass(frozen=True)
class _Node:
  """An operation of the graph."""

  name: str
  run: Callable[..., Any]  # of the inputs' values
  inputs: tuple[tuple[str, int], ...]  # (name of a node, number of its output)


class Graph:
  """A graph as a function: {input: array} -> {output: array}.

  Attributes:
    inputs: names of its inputs.
  """

  def __init__(self, model: Mapping[str, Any], weights: bytes):
    """Prepares a graph.

    Args:
      model: the parsed model.json.
      weights: contents of its file of weights; there must be a single one.

    Raises:
      InputError: it is no graph, has an operation that is not in `OPS`, or the size of the weights
        does not match.
    """
    try:
      nodes = {node["name"]: node for node in model["modelTopology"]["node"]}
      outputs = [name.split(":")[0] for name in model["signature"]["outputs"]]
      specs = [spec for group in model["weightsManifest"] for spec in group["weights"]]
    except (KeyError, TypeError) as error:
      raise errors.InputError(f"no graph of TensorFlow.js: {errors.describe(error)}") from None
    unknown = sorted({node["op"] for node in nodes.values()} - {*OPS, "Const", "Placeholder"})
    if unknown:
      raise errors.InputError(f"a graph with {', '.join(unknown)}, which are none of {[*OPS]}")
    self._constants: dict[str, Any] = _constants(specs, weights)
    self._outputs = outputs
    self._nodes: list[_Node] = []
    self.inputs = [name for name, node in nodes.items() if node["op"] == "Placeholder"]
    placed = {*self._constants, *self.inputs}
    for name in outputs:
      self._place(name, nodes, placed)
    # Nodes that depend on constants alone are computed once.
    rest = []
    for node in self._nodes:
      if all(name in self._constants for name, _ in node.inputs):
        self._constants[node.name] = _run(node, self._constants)
      else:
        rest.append(node)
    self._nodes = rest

  def _place(self, name: str, nodes: Mapping[str, Any], placed: set[str]) -> None:
    """Appends a node to the order of execution, after all nodes that it depends on."""
    stack = [name]
    while stack:
      name = stack[-1]
      if name not in nodes:
        raise errors.InputError(f"a graph without the node {name!r}, which another one reads")
      node = nodes[name]
      inputs = tuple(_reference(text) for text in node.get("input", ()))
      missing = [other for other, _ in inputs if other not in placed]
      if name in placed or not missing:
        stack.pop()
        if name not in placed:
          placed.add(name)
          self._nodes.append(_Node(name, OPS[node["op"]](_attributes(node)), inputs))
      else:
        stack += missing

  def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs the graph; `given` is {name: array} of all `inputs`."""
    values = {**self._constants, **given}
    for node in self._nodes:
      values[node.name] = _run(node, values)
    return {name: values[name] for name in self._outputs}


def load(model: pathlib.Path, weights: pathlib.Path) -> Graph:
  """Reads a graph from its two files; raises InputError where they cannot be read or used."""
  with errors.storage(did="read"), errors.at(str(model)):
    try:
      parsed = json.loads(model.read_bytes())
    except ValueError as error:
      raise errors.InputError(f"is not JSON: {error}") from None
    return Graph(parsed, weights.read_bytes())


def _run(node: _Node, values: Mapping[str, Any]) -> Any:
  """The result of a node: an array, or a list of them where it has several outputs."""
  arguments = []
  for name, number in node.inputs:
    value = values[name]
    arguments.append(value[number] if isinstance(value, list) else value)
  return node.run(*arguments)


def _reference(text: str) -> tuple[str, int]:
  """(node, number of its output) of "node:number" or "node"."""
  name, _, number = text.partition(":")
  return name, int(number or 0)


def _constants(specs: Sequence[Mapping[str, Any]], data: bytes) -> dict[str, np.ndarray]:
  """The arrays of weights, which lie one after another in the manifest's order.

  Arrays that are stored as float16 become float32.
  """
  result, place = {}, 0
  for spec in specs:
    stored = np.dtype(spec.get("quantization", spec)["dtype"])
    if stored not in (np.float16, np.float32, np.int32):
      raise errors.InputError(f"weights {spec['name']!r} of {stored}; float16, float32, int32 only")
    size = math.prod(spec["shape"])
    end = place + size * stored.itemsize
    if end > len(data):
      raise errors.InputError(f"{len(data)} bytes of weights end within {spec['name']!r}")
    values = np.frombuffer(data, stored, size, place).reshape(spec["shape"])
    result[spec["name"]] = values.astype(spec["dtype"])
    place = end
  if place != len(data):
    raise errors.InputError(f"{len(data)} bytes of weights, {place} expected")
  return result


def _attributes(node: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of a node as Python values."""
  result = {}
  for name, value in node.get("attr", {}).items():
    kind, content = next(iter(value.items()), (None, None))
    if kind == "s":
      content = base64.b64decode(content).decode()
    elif kind == "list":
      content = [int(item) for item in content.get("i", ())]
    elif kind == "i":
      content = int(content)
    result[name] = content
  return result


# --- Operations: each takes a node's attributes and returns a function of its inputs. Attributes
# that would change the result in a way that is not supported are refused.


def _require(attributes: Mapping[str, Any], **wanted: Any) -> None:
  """Raises InputError where an attribute is given and differs from the supported value."""
  for name, value in wanted.items():
    if attributes.get(name, value) != value:
      raise errors.InputError(f"an operation with {name}={attributes[name]!r}, not {value!r}")


def _plain(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Callable[..., Any]]:
  """An operation whose attributes do not matter."""
  return lambda attributes: function


def _pad(x, widths, value=0.0):
  result = np.full([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)], value, x.dtype)
  result[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, widths, strict=True))] = x
  return result


def _windows(x: np.ndarray, size: Sequence[int], strides: Sequence[int]) -> np.ndarray:
  """[1, H, W, C] -> view [H', W', h, w, C] of all windows of size [h, w], without padding."""
  view = np.lib.stride_tricks.sliding_window_view(x[0], size, axis=(0, 1))
  return view[:: strides[0], :: strides[1]].transpose(0, 1, 3, 4, 2)


def _conv(attributes):
  _require(attributes, padding="VALID", data_format="NHWC", dilations=[1, 1, 1, 1])
  strides = attributes["strides"][1:3]

  def run(x, kernel):
    height, width, channels, features = kernel.shape
    if x.shape[0] != 1 or x.shape[3] != channels:
      raise ValueError(f"a convolution of {x.shape} by {kernel.shape}")
    windows = _windows(np.ascontiguousarray(x), (height, width), strides)
    # One copy and one matrix product, in which most of the time is spent.
    rows = windows.reshape(-1, height * width * channels)
    return (rows @ kernel.reshape(-1, features)).reshape(1, *windows.shape[:2], features)

  return run


def _max_pool(attributes):
  _require(attributes, padding="VALID", data_format="NHWC")
  (_, height, width, _), (_, *strides, _) = attributes["ksize"], attributes["strides"]

  def run(x):
    windows = _windows(x, (height, width), strides)
    result = windows[:, :, 0, 0].copy()
    for i, j in np.ndindex(height, width):
      np.maximum(result, windows[:, :, i, j], out=result)
    return result[None]

  return run


def _resize(attributes):
  _require(attributes, half_pixel_centers=True, align_corners=False)

  def along(x, axis, size):
    place = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(x.shape[axis] / size) - 0.5
    low = np.floor(place)
    share = (place - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first, second = (np.clip(low + k, 0, x.shape[axis] - 1).astype(int) for k in (0, 1))
    a, b = x.take(first, axis), x.take(second, axis)
    return a + (b - a) * share

  return lambda x, size: along(along(x, 1, size[0]), 2, size[1])


def _leaky_relu(attributes):
  alpha = np.float32(attributes.get("alpha", 0.2))
  if not 0 <= alpha <= 1:
    raise errors.InputError(f"LeakyRelu with alpha={alpha}, which is not in [0, 1]")
  return lambda x: np.maximum(x, alpha * x)


def _sparse_to_dense(places, shape, values, default):
  result = np.full(shape, default)
  result[tuple(places.reshape(len(places), len(shape)).T)] = values
  return result


def _split(x, sizes, axis):
  return np.split(x, np.cumsum(sizes)[:-1], axis=int(axis))


OPS: dict[str, Callable[[Mapping[str, Any]], Callable[..., Any]]] = {
  "Add": _plain(np.add),
  "AddV2": _plain(np.add),
  "ConcatV2": _plain(lambda *given: np.concatenate(given[:-1], axis=int(given[-1]))),
  "Conv2D": _conv,
  "Identity": _plain(lambda x: x),
  "LeakyRelu": _leaky_relu,
  "MaxPool": _max_pool,
  "Pad": _plain(_pad),
  "PadV2": _plain(_pad),
  "Reshape": _plain(lambda x, shape: x.reshape(shape)),
  "ResizeBilinear": _resize,
  "Sigmoid": _plain(lambda x: 1 / (1 + np.exp(-x))),
  "SparseToDense": _plain(_sparse_to_dense),
  "SplitV": _plain(_split),
  "Transpose": _plain(lambda x, axes: x.transpose(axes)),
}
