"""What needs no network: image transforms, position ids, masks, tables, schedules."""

from __future__ import annotations

import re

import jax
import numpy as np
import PIL.Image

from tests.parity import cases, training
from tests.parity import flow as flow_cases
from unigrpo_jax.data import images, packing
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import layers
from unigrpo_jax.sampling import flow

RULE = r"ImageTransform\((\d+), ?(\d+), ?(\d+)\)"


def rule_from(text: str, kind: str = "") -> config_lib.ImageSizeRule:
  """The resize rule that a README line names; raises NotCovered where it names none."""
  found = re.search(f"{kind} ?{RULE}" if kind else RULE, text)
  if found is None:
    raise cases.NotCovered(f"README.md names no {kind} ImageTransform for this array")
  rule = config_lib.ImageSizeRule(*(int(number) for number in found.groups()))
  budget = re.search(r"max_pixels=(\d+)", text)
  return rule if budget is None else config_lib.ImageSizeRule(
    rule.max_size, rule.min_size, rule.stride, int(budget[1])
  )


def statistics(array: np.ndarray) -> np.ndarray:
  """Mean, sample standard deviation, smallest and largest element."""
  array = array.astype(np.float64)
  return np.array([array.mean(), array.std(ddof=1), array.min(), array.max()])


@cases.case("k_transforms")
def transforms(folder, rec):
  title = folder.readme.section(rec.name)
  rules = {kind: rule_from(title, kind.upper().replace("VIT", "ViT")) for kind in ("vae", "vit")}
  pictures = [(m[1], PIL.Image.fromarray(rec[m[0]])) for m in rec.matches(r"in_image(\d+)")]
  for i, picture in pictures:
    resized = {kind: images.resize(picture, rule) for kind, rule in rules.items()}
    resized["edit_vit"] = images.resize(resized["vae"], rules["vit"])
    for kind, image in resized.items():
      rec.check("sizes", f"out_{kind}{i}_size", image.size[::-1], cases.EXACT)
      stats = statistics(images.to_array(image))
      rec.check("statistics", f"out_{kind}{i}_stats", stats, cases.MODEL)
      if f"out_{kind}{i}_uint8" in rec:
        rec.check("pixels", f"out_{kind}{i}_uint8", np.asarray(image), cases.EXACT)
  if "in_rgba" in rec:
    image = images.to_rgb(PIL.Image.fromarray(rec["in_rgba"], "RGBA"))
    rec.check("pixels", "out_rgba_to_rgb", np.asarray(image), cases.EXACT)


@cases.case("k_transforms")
def folder_transforms(folder, rec):
  """The rules of the folder's own bagel_config.json."""
  for m in rec.matches(r"out_tiny_(vae|edit_vit)(\d+)"):
    image = images.resize(PIL.Image.fromarray(rec[f"in_image{m[2]}"]), folder.config.vae_image)
    if m[1] == "edit_vit":
      image = images.resize(image, folder.config.vit_image)
    rec.check("folder_rules", m[0], np.moveaxis(images.to_array(image), -1, 0), cases.EXACT)


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
    rows = rec[f"in_sincos_rows_{features}_{side}"]
    rec.check("sincos", m[0], table[rows], cases.MODEL)


@cases.case("l_tables")
def times(folder, rec):
  for m in rec.matches(r"out_schedule_(\d+)_([\d.]+)"):
    rec.check("schedules", m[0], flow.time_grid(int(m[1]), float(m[2])), cases.FORMULA)
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
  latent = np.moveaxis(rec["in_latent"], 0, -1)[None]
  rec.check("pack", "out_packed_latent", flow_cases.pack_tokens(folder.network, latent)[0],
            cases.EXACT)
