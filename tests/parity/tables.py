"""What needs no network: image transforms, position ids, masks, tables, schedules."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import PIL.Image

from tests.parity import cases, training
from tests.parity import flow as flow_cases
from unigrpo_jax import errors
from unigrpo_jax.data import images
from unigrpo_jax.episodes import packing
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import layers
from unigrpo_jax.sampling import flow

RULE = r"ImageTransform\((\d+), *(\d+), *(\d+)\)(.*?)(?=ImageTransform|$)"


def rule_from(text: str, kind: str = "") -> config_lib.ImageSizeRule:
  """The resize rule that a README line names; raises NotCovered where it names none."""
  found = re.search(rf"{kind} *{RULE}", text, re.S | re.I)
  if found is None:
    raise cases.NotCovered(f"README.md names no {kind} ImageTransform for this array")
  rule = config_lib.ImageSizeRule(*(int(number) for number in found.groups()[:3]))
  budget = re.search(r"max_pixels=(\d+)", found[4])
  return dataclasses.replace(rule, max_pixels=int(budget[1])) if budget else rule


def resize(picture: PIL.Image.Image, rule: config_lib.ImageSizeRule) -> PIL.Image.Image:
  """`images.resize`, and the official result for a picture too narrow for it too."""
  try:
    return images.resize(picture, rule)
  except errors.InputError:
    size = images.resized_size(*picture.size, rule)
    return picture.resize(size, PIL.Image.Resampling.BICUBIC)


def statistics(array: np.ndarray) -> np.ndarray:
  """Mean, sample standard deviation, smallest and largest element."""
  array = array.astype(np.float64)
  return np.array([array.mean(), array.std(ddof=1), array.min(), array.max()])


@cases.case("k_transforms")
def transforms(folder, rec):
  rules = {kind: rule_from(folder.readme.title(rec.name), kind) for kind in ("vae", "vit")}
  for m in rec.matches(r"in_image(\d+)"):
    for kind, image in resized(PIL.Image.fromarray(rec[m[0]]), rules).items():
      name = f"out_{kind}{m[1]}"
      rec.check("sizes", f"{name}_size", image.size[::-1], cases.EXACT)
      rec.check("statistics", f"{name}_stats", statistics(images.to_array(image)), cases.MODEL)
      rec.check("pixels", f"{name}_uint8", np.asarray(image), cases.EXACT)


@cases.case("k_transforms")
def transparency(folder, rec):
  for m in rec.matches(r"in_rgba(\w*)"):
    image = images.to_rgb(PIL.Image.fromarray(rec[m[0]], "RGBA"))
    rec.check("pixels", f"out_rgba{m[1]}_to_rgb", np.asarray(image), cases.EXACT)


@cases.case("k_transforms")
def folder_transforms(folder, rec):
  """The rules of the folder's own bagel_config.json."""
  rules = {"vae": folder.config.vae_image, "vit": folder.config.vit_image}
  for m in rec.matches(r"out_tiny_(\D+)(\d+)"):
    image = resized(PIL.Image.fromarray(rec[f"in_image{m[2]}"]), rules)[m[1]]
    rec.check("folder_rules", m[0], np.moveaxis(images.to_array(image), -1, 0), cases.EXACT)


def resized(picture: PIL.Image.Image, rules) -> dict[str, PIL.Image.Image]:
  """A picture by the VAE's rule, by the ViT's, and by both one after the other."""
  by_rule = {kind: resize(picture, rule) for kind, rule in rules.items()}
  return by_rule | {"edit_vit": resize(by_rule["vae"], rules["vit"])}


@cases.case("k_transforms")
def size_tables(folder, rec):
  sizes = rec["in_sizes_wh"].tolist()
  for m in rec.matches(r"out_sizes_\w+"):
    meaning = folder.readme.meaning(rec.name, m[0])
    rule = rule_from(meaning)
    count = re.search(r"img_num=(\d+)", meaning)
    resized = [images.resized_size(*size, rule, int(count[1]) if count else 1) for size in sizes]
    rec.check("size_tables", m[0], resized, cases.EXACT)


@cases.case("l_tables")
def masks(folder, rec):
  """Masks from order and reach, one row of one batch a sample."""
  samples, keeps, names = [], [], []
  for m in rec.matches(r"in_split_lens(\d+)"):
    lengths, modes = rec[m[0]].tolist(), rec[f"in_attn_modes{m[1]}"].tolist()
    splits, keep = zip(*(_split(length, mode) for length, mode in zip(lengths, modes)))
    samples.append(splits)
    keeps.append(np.concatenate(keep))
    names.append(f"out_mask{m[1]}")
  if not samples:
    return
  batch = packing.pack(samples, image_markers=folder.image_markers)
  found = [training.visible(batch, row)[keep][:, keep] for row, keep in enumerate(keeps)]
  for name, mask in zip(names, found):
    rec.check("masks", name, mask, cases.EXACT)
  joint = jax.scipy.linalg.block_diag(*(mask.astype(np.int32) for mask in found))
  rec.check("masks", "out_sparse_mask", joint.astype(bool), cases.EXACT)


def _split(length: int, mode: str) -> tuple[packing.Split, np.ndarray]:
  """A split of `length` tokens, markers included, and which of its places are those.

  The tables also hold image splits too short for two markers and a token; all places of an image
  see and are seen alike, so a longer one stands for them.
  """
  if mode == "causal":
    return packing.Text(np.zeros(length, np.int32)), np.ones(length, bool)
  count = max(length - 2, 1)
  ids, features = np.zeros(count, np.int32), np.zeros((count, 1))
  keep = np.arange(count + 2) < length
  if mode == "full":
    return packing.CleanImage(features, ids), keep
  return packing.NoisyImage(features, features, 0.5, ids), keep


@cases.case("l_tables")
def position_ids(folder, rec):
  for m in rec.matches(r"out_ids_(extrapolate|interpolate)_(\d+)x(\d+)_p(\d+)_m(\d+)"):
    numbers = (int(number) for number in m.groups()[1:])
    ids = images.position_ids(*numbers, interpolate=m[1] == "interpolate")
    rec.check("position_ids", m[0], ids, cases.EXACT)


@cases.case("l_tables")
def sincos(folder, rec):
  for m in rec.matches(r"out_sincos_(\d+)_(\d+)"):
    features, side = int(m[1]), int(m[2])
    table = layers.sincos_table(side, features)
    rows = rec.get(f"in_sincos_rows_{features}_{side}", slice(None))
    rec.check("sincos", m[0], table[rows], cases.MODEL)


@cases.case("l_tables")
def schedules(folder, rec):
  for m in rec.matches(r"out_schedule_(\d+)_(.+)"):
    rec.check("schedules", m[0], flow.time_grid(int(m[1]), float(m[2])), cases.FORMULA)


@cases.case("l_tables")
def times(folder, rec):
  features = layers.time_features(rec["in_t"], rec["out_t_freq"].shape[-1])
  rec.check("time_features", "out_t_freq", features, cases.MODEL)
  net = folder.network

  def embed(model, t):
    return model.time_embedder(layers.time_features(t))

  for key, t in (("out_t_embed", rec["in_t"]), ("out_t_embed_int0", np.zeros(1, np.float32))):
    value = net.model.apply({"params": net.params["bagel"]}, t, method=embed)
    rec.check("time_embedder", key, value, cases.MODEL)


@cases.case("l_tables")
def packed_latent(folder, rec):
  for m in rec.matches(r"in_latent(\w*)"):
    latent = np.moveaxis(rec[m[0]], 0, -1)[None]
    tokens = flow_cases.pack_tokens(folder.network, latent)[0]
    rec.check("pack", f"out_packed_latent{m[1]}", tokens, cases.EXACT)
