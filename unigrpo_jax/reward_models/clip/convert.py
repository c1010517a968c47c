"""From the tensors in a CLIP's safetensors files to the parameters of `network.CLIP`.

Files have the names of transformers, which our parameters share, or those of open_clip, where q, k
and v of a layer are one tensor, and both projections are stored as [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.models import safetensors_files, weight_files, weights
from unigrpo_jax.reward_models.clip import config as config_lib
from unigrpo_jax.reward_models.clip import network
from unigrpo_jax.runtime import sharding

FILE = "model.safetensors"
# Older files contain these position ids, 0, 1, 2, ...
_IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_STACK = "layers"  # Parameters below this name have a leading axis of layers.
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# A tensor that only files of open_clip have; and (part of transformers' names, of open_clip's).
_OPEN_CLIP_SIGN = "visual.class_embedding"
_OPEN_CLIP = (
  ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.class_", "class_"),
  ("embeddings.patch_embedding", "conv1"), ("embeddings.token_", "token_"),
  ("embeddings.position_embedding.weight", "positional_embedding"),
  ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"),
  ("encoder.layers.", "transformer.resblocks."), ("self_attn.out_proj", "attn.out_proj"),
  ("self_attn.q_proj.", "attn.in_proj_"), ("self_attn.k_proj.", "attn.in_proj_"),
  ("self_attn.v_proj.", "attn.in_proj_"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"),
  ("mlp.fc2", "mlp.c_proj"), ("visual_projection.weight", "visual.proj"),
  ("text_projection.weight", "text_projection"),
)
_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a tensor of transformers is found in a file.

  Attributes:
    name: of the tensor in the file.
    shape: of the tensor in the file.
    third: which third of its rows is meant; None: all of it.
    transposed: whether the file stores it as [in, out].
  """

  name: str
  shape: tuple[int, ...]
  third: int | None = None
  transposed: bool = False

  def read(self, file: weight_files.Tensors) -> np.ndarray:
    """Reads the tensor in the layout of transformers."""
    if self.third is None:
      tensor = file.read(self.name)
    else:
      size = self.shape[0] // 3
      tensor = file.read(self.name, (slice(self.third * size, (self.third + 1) * size),))
    return tensor.T if self.transposed else tensor


@functools.cache
def abstract_params(config: config_lib.Config, dtype: Any) -> Any:
  """The parameters as shapes: matrices in `dtype`, everything else in float32."""
  c = config.vision
  pixels = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, config.text.max_positions), jnp.int32)
  boxed = jax.eval_shape(network.CLIP(config).init, jax.random.key(0), pixels, ids)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.ShapeDtypeStruct(
      leaf.shape, dtype if path[-1].key == "kernel" else jnp.float32
    ),
    sharding.unbox(boxed)["params"],
  )


def load(
  folder: pathlib.Path, config: config_lib.Config, dtype: Any, place: jax.sharding.Sharding
) -> Any:
  """Loads the parameters in a folder's safetensors file or files.

  Args:
    folder: of the CLIP.
    config: its sizes.
    dtype: to which matrices are rounded; everything else is float32.
    place: sharding of every parameter.

  Raises:
    InputError: there is no such file, it is damaged, or its tensors are not those of `config`; the
      message names surplus, missing and misshapen ones.
  """
  shapes = abstract_params(config, dtype)
  flat, structure = jax.tree_util.tree_flatten_with_path(shapes)
  with weight_files.Tensors(folder, FILE, ignored=_IGNORED) as file:
    open_clip = _OPEN_CLIP_SIGN in file.entries
    leaves = [
      ([key.key for key in path], leaf, sources(path, leaf, config, open_clip))
      for path, leaf in flat
    ]
    check(
      file, {source.name: source.shape for *_, own in leaves for source in own}, config_lib.FILE
    )
    params = [jax.device_put(_read(file, *leaf), place) for leaf in leaves]
  return jax.tree_util.tree_unflatten(structure, params)


def check(
  file: weight_files.Tensors, expected: Mapping[str, tuple[int, ...]], shapes_from: str
) -> None:
  """Raises InputError unless a file has exactly the tensors `expected`, {name: shape}.

  `shapes_from` says where these come from, for the message.
  """
  actual = {name: entry.shape for name, entry in file.entries.items()}
  if lines := weights.mismatches(actual, expected, lambda name: shapes_from):
    raise errors.InputError(
      f"{file.path}: the tensors do not match {shapes_from}: {' | '.join(lines)} | use the weights "
      "that belong to it"
    )


def sources(path: Any, leaf: Any, config: config_lib.Config, open_clip: bool) -> list[_Source]:
  """The tensors of a file that fill the parameter `leaf` at `path`; one per layer if stacked."""
  parts = [key.key for key in path]
  shape = leaf.shape[1:] if _STACK in parts else leaf.shape
  if parts[-1] == "kernel":
    shape = shape[::-1]  # [out, in]
  if parts[-2:] == ["patch_embedding", "kernel"]:
    shape = (shape[0], 3, config.vision.patch_size, config.vision.patch_size)
  parts[-1] = _LEAVES.get(parts[-1], parts[-1])
  make = _of_open_clip if open_clip else _Source
  if _STACK not in parts:
    return [make(".".join(parts), shape)]
  name = ".".join(part if part != _STACK else f"{_STACK}.{{}}" for part in parts)
  return [make(name.format(layer), shape) for layer in range(leaf.shape[0])]


def _of_open_clip(name: str, shape: tuple[int, ...]) -> _Source:
  """The tensor in a file of open_clip for a tensor of transformers."""
  third = next((third for part, third in _THIRDS.items() if f".{part}." in name), None)
  transposed = name.endswith("_projection.weight")
  for ours, theirs in _OPEN_CLIP:
    name = name.replace(ours, theirs)
  if third is not None:
    shape = (3 * shape[0], *shape[1:])
  return _Source(name, shape[::-1] if transposed else shape, third, transposed)


def _read(
  file: weight_files.Tensors, path: Sequence[str], leaf: Any, sources: Sequence[_Source]
) -> np.ndarray:
  """Reads a parameter, layer by layer."""
  out = np.empty(leaf.shape, leaf.dtype)
  for target, source in zip(out if _STACK in path else [out], sources):
    tensor = source.read(file)
    if path[-1] == "kernel":  # [out, in], or that of a convolution, [out, 3, y, x]
      tensor = tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else (1, 0))
    target[...] = safetensors_files.contiguous(tensor).reshape(target.shape)
  return out
