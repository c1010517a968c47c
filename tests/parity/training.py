"""The training forward: official packs become splits, and splits a padded batch."""

from __future__ import annotations

import dataclasses
import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases, network
from tests.parity import flow as flow_cases
from unigrpo_jax import types
from unigrpo_jax.episodes import packing
from unigrpo_jax.losses import supervised
from unigrpo_jax.models import weights

# Raw timestep of a clean image: stands for -inf.
CLEAN = -1e29
PAD_TO = packing.PadTo(tokens=16, labels=8, patches=8, clean=8, latents=8)
CHUNK = 8
# Not trained: the official position tables take no gradient.
FIXED = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


class OfficialPack:
  """An official pack: tokens of all samples in one sequence, told apart by index lists.

  A field that the pack does without (no ViT image, no latents, no labels) is empty.

  Attributes:
    folder: the folder, for special ids and sizes.
    rec: the recording that holds the fields as `in_*`.
    places: for each kind of token, its index in the sequence -> its place in the kind's own list.
    bounds: first and one past the last token of each sample.
    times: flow time of each latent token.
    label_at: index in the sequence -> its place in the list of labels.
  """

  def __init__(self, folder: network.Folder, rec: cases.Recording):
    self.folder, self.rec = folder, rec
    kinds = ("text_indexes", "vae_token_indexes", "vit_token_indexes")
    self.places = {kind[:3]: self._index(f"in_packed_{kind}") for kind in kinds}
    self.label_at = self._index("in_ce_loss_indexes")
    tokens = sorted(at for places in self.places.values() for at in places)
    ends = np.cumsum(rec["in_sample_lens"])
    # Padding to a fixed length is one more sample, of no token.
    self.bounds = [(int(start), int(stop)) for start, stop in zip([0, *ends], ends)
                   if start < stop and tokens[-1] >= start]
    self.raw_times = rec.get("in_packed_timesteps", np.zeros(0, np.float32))
    self.times = np.asarray(
      supervised.shifted_timesteps(self.raw_times, shift=folder.config.timestep_shift)
    )

  def _index(self, field: str) -> dict[int, int]:
    return {int(at): k for k, at in enumerate(self.rec.get(field, ()))}

  @functools.cached_property
  def latents(self) -> np.ndarray:
    """Clean latent tokens of all images, [n, C]: each image cut out of its padded canvas."""
    net, p = self.folder.network, self.folder.config.latent_patch_size
    padded = np.moveaxis(self.rec["in_padded_latent"], 1, -1)
    shapes = self.rec["in_patchified_vae_latent_shapes"]
    return np.concatenate([
      flow_cases.pack_tokens(net, image[None, : h * p, : w * p])[0]
      for image, (h, w) in zip(padded, shapes)
    ])

  def ranges(self, start: int, stop: int) -> list[range]:
    """The splits of a sample: as recorded, else told by the image markers."""
    if "in_split_lens" in self.rec:
      ends = np.cumsum(self.rec["in_split_lens"]).tolist()
      splits = [range(a, b) for a, b in zip([0, *ends], ends)]
      return [split for split in splits if start <= split.start < stop]
    first, last = self.folder.image_markers
    ids, texts = self.rec["in_packed_text_ids"], self.places["tex"]
    cuts = {start, stop}
    cuts |= {at for at, k in texts.items() if ids[k] == first and start <= at < stop}
    cuts |= {at + 1 for at, k in texts.items() if ids[k] == last and start <= at < stop}
    cuts = sorted(cuts)
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]

  def weights(self, reweighted: bool) -> np.ndarray:
    """The official weight of each label, or 1."""
    ones = np.ones(len(self.label_at), np.float32)
    return self.rec.get("in_ce_loss_weights", ones) if reweighted else ones

  def samples(self, *, reweighted: bool = False) -> list[list[packing.Split]]:
    """The splits of each sample. A position that no split accounts for was a dropped image's."""
    positions = self.rec["in_packed_position_ids"]
    samples = []
    for bound in self.bounds:
      sample, position = [], 0
      for tokens in self.ranges(*bound):
        if positions[tokens[0]] > position:
          sample.append(packing.Dropped(int(positions[tokens[0]]) - position))
        sample.append(self._split(tokens, self.weights(reweighted)))
        advance = {packing.Text: len(tokens), packing.NoisyImage: 0}.get(type(sample[-1]), 1)
        position = positions[tokens[0]] + advance
      samples.append(sample)
    return samples

  def _split(self, tokens: range, label_weights: np.ndarray) -> packing.Split:
    vit, vae = ([self.places[kind][at] for at in tokens if at in self.places[kind]]
                for kind in ("vit", "vae"))
    if vit:
      return packing.PatchImage(
        self.rec["in_packed_vit_tokens"][vit], self.rec["in_packed_vit_position_ids"][vit]
      )
    if vae:
      ids = self.rec["in_packed_latent_position_ids"][vae]
      if self.raw_times[vae[0]] < CLEAN:
        return packing.CleanImage(self.latents[vae], ids)
      return packing.NoisyImage(
        self.latents[vae], self.rec["in_noise"][vae], float(self.times[vae[0]]), ids
      )
    labels, weight = np.full(len(tokens), packing.NO_LABEL), np.zeros(len(tokens))
    for i, at in enumerate(tokens):
      if at in self.label_at:
        k = self.label_at[at]
        labels[i], weight[i] = self.rec["in_packed_label_ids"][k], label_weights[k]
    ids = self.rec["in_packed_text_ids"][[self.places["tex"][at] for at in tokens]]
    return packing.Text(ids, labels, weight)

  @functools.cached_property
  def label_order(self) -> list[list[int]]:
    """Of each sample, the places of its labels: first those in texts, then those on images."""
    order = []
    for bound in self.bounds:
      rows = ([], [])
      for tokens in self.ranges(*bound):
        image = any(at in self.places[kind] for at in tokens for kind in ("vit", "vae"))
        rows[image].extend(self.label_at[at] for at in tokens if at in self.label_at)
      order.append(rows[0] + rows[1])
    return order

  def batch(self, *, reweighted: bool = False) -> types.PackedBatch:
    """The pack as padded rows.

    The official data may also label the end marker of an image. Our packing does not, so those
    labels are added here; the slot of one whose image is noisy is T plus that image's number.
    """
    batch = packing.pack(
      self.samples(reweighted=reweighted), image_markers=self.folder.image_markers, pad_to=PAD_TO
    )
    width = max(map(len, self.label_order))
    slots, ids, weight = (
      np.pad(a, ((0, 0), (0, max(width - a.shape[1], 0))))
      for a in (batch.label_slot, batch.label_ids, batch.label_weight)
    )
    indexes = [*self.label_at]
    for b, (order, (start, _)) in enumerate(zip(self.label_order, self.bounds)):
      for y, k in enumerate(order):
        slot = label_slot(batch, b, indexes[k] - start)
        if not batch.label_weight[b, y : y + 1].any():
          slots[b, y], ids[b, y] = slot, self.rec["in_packed_label_ids"][k]
          weight[b, y] = self.weights(reweighted)[k]
        elif slots[b, y] != slot:
          raise ValueError(f"label {k} was packed at slot {slots[b, y]}, not {slot}")
    return batch.replace(label_slot=slots, label_ids=ids, label_weight=weight)

  def labels(self, values) -> np.ndarray:
    """[B, Y, ...] -> one entry a label, in the order of `in_ce_loss_indexes`."""
    rows = [np.asarray(row)[: len(order)] for row, order in zip(values, self.label_order)]
    return np.concatenate(rows)[np.argsort(np.concatenate(self.label_order), kind="stable")]

  def noisy_tokens(self, values, batch: types.PackedBatch) -> np.ndarray:
    """[B, R, I, ...] -> one entry a noisy token, in the order of `in_mse_loss_indexes`."""
    rows = [row[mask] for row, mask in zip(np.asarray(values), batch.noisy_mask)]
    order = np.argsort(np.argsort(self.rec["in_mse_loss_indexes"], kind="stable"))
    return np.concatenate(rows)[order]


def label_slot(batch: types.PackedBatch, row: int, place: int) -> int:
  """Where the output at `place` of a sample is found, see `OfficialPack.batch`."""
  found = np.flatnonzero(batch.und_order[row] == place)
  if found.size:
    return int(found[0])
  ends = batch.noisy_reach[row] + batch.noisy_mask[row].sum(-1) + 2
  return batch.und_ids.shape[1] + int(np.flatnonzero(ends == place)[0])


def forward(model, params, batch: types.PackedBatch):
  """`Bagel.packed`, and the outputs at end markers of noisy images for the labels that ask them."""
  markers = []

  def keep_markers(call, args, kwargs, context):
    if context.method_name != "velocity":
      return call(*args, **kwargs)
    velocity, (und, _) = call(*args, **kwargs | {"return_hidden": True})
    markers.append(und[:, 1])
    return velocity

  with nn.intercept_methods(keep_markers):
    hidden, velocity = model.apply({"params": params}, batch, method="packed")
  if markers:
    slots = batch.label_slot - batch.und_ids.shape[1]
    ends = markers[0].reshape(*batch.t.shape, -1)
    ends = jnp.take_along_axis(ends, jnp.maximum(slots, 0)[..., None], axis=1)
    hidden = jnp.where(slots[..., None] >= 0, ends, hidden)
  return hidden, velocity


def tokens_of(batch: types.PackedBatch, row: int) -> dict[str, np.ndarray]:
  """Tokens of a packed row in sequence order: position, reach, and which noisy image (or -1)."""
  found = {}
  streams = [(batch.und_order, batch.und_position, batch.und_reach)]
  if batch.clean_order is not None:
    streams.append((batch.clean_order, batch.clean_position, batch.clean_reach))
  for order, position, reach in streams:
    for at, *rest in zip(order[row].tolist(), position[row], reach[row]):
      if at != types.UNSEEN:
        found[at] = (*rest, -1)
  for r in range(0 if batch.t is None else batch.t.shape[1]):
    count, reach = batch.noisy_mask[row, r].sum(), int(batch.noisy_reach[row, r])
    for at in range(reach + 1, reach + 3 + count) if count else ():
      found[at] = (batch.noisy_position[row, r], reach, r)
  if sorted(found) != list(range(len(found))):
    raise ValueError(f"row {row} does not fill its places: {sorted(found)}")
  columns = zip(*(found[at] for at in range(len(found))))
  return dict(zip(("position", "reach", "image"), map(np.array, columns)))


def visible(batch: types.PackedBatch, row: int) -> np.ndarray:
  """Who sees whom in a packed row, [query, key] bool, by order, reach and noisy rows."""
  tokens = tokens_of(batch, row)
  image = tokens["image"]
  context = (image < 0) & (np.arange(len(image)) <= tokens["reach"][:, None])
  return context | ((image >= 0) & (image == image[:, None]))


def mask_by_rule(lengths, modes) -> np.ndarray:
  """The official rule on a sample's splits, [query, key] bool."""
  split = np.repeat(np.arange(len(lengths)), lengths)
  mode = np.asarray(modes)[split]
  same = split == split[:, None]
  seen = np.tri(len(split), dtype=bool) | (same & (mode != "causal"))
  return seen & ((mode != "noise") | same)


@cases.case("j_training")
def layout(folder, rec):
  pack = OfficialPack(folder, rec)
  batch = pack.batch()
  rows = [tokens_of(batch, b) for b in range(len(pack.bounds))]
  check_positions(rec, rows)
  rec.check_equal("layout", "in_sample_lens", [len(r["position"]) for r in rows],
                  [stop - start for start, stop in pack.bounds], cases.EXACT)
  rec.check("timesteps", "out_timesteps", pack.times, cases.FORMULA)
  lengths, modes = rec["in_split_lens"], rec["in_attn_modes"]
  starts = np.cumsum(lengths) - lengths
  for b, (start, stop) in enumerate(pack.bounds):
    mine = (start <= starts) & (starts < stop)
    rec.check_equal("layout", f"mask of sample {b}", visible(batch, b),
                    mask_by_rule(lengths[mine], modes[mine]), cases.EXACT)


def check_positions(rec: cases.Recording, rows: list[dict[str, np.ndarray]]) -> None:
  positions = np.concatenate([row["position"] for row in rows])
  rec.check_equal("layout", "in_packed_position_ids", positions,
                  rec["in_packed_position_ids"][: len(positions)], cases.EXACT)


@cases.case("j_training")
def latents(folder, rec):
  net = folder.network
  latents = net.latents(*net.encode_image(rec["in_padded_images"]), rec["in_vae_noise"])
  rec.check("vae", "in_padded_latent", np.moveaxis(latents, -1, 1), cases.MODEL)


@cases.case("j_training")
def losses(folder, rec):
  pack = OfficialPack(folder, rec)
  batch = pack.batch()
  # "total (weights 1,1)" of the cross entropy and the squared error.
  factors = re.search(r"weights ([\d.]+), *([\d.]+)", folder.readme.meaning(rec.name, "out_losses"))
  of_ce, of_mse = map(float, factors.groups()) if factors else (1.0, 1.0)

  def total(params, batch):
    hidden, velocity = forward(folder.network.model, params, batch)
    logits_fn = functools.partial(folder.network.model.apply, {"params": params}, method="logits")
    ce, per_label = supervised.cross_entropy(
      logits_fn, hidden, batch.label_ids, batch.label_weight, chunk=CHUNK
    )
    mse, squared = jnp.zeros(()), None
    if velocity is not None:
      mse, squared = supervised.velocity_mse(
        velocity, batch.target, batch.noise, batch.noisy_mask
      )
    return of_ce * ce + of_mse * mse, (ce, mse, per_label, squared)

  step = network.compiled(jax.value_and_grad(total, has_aux=True))
  (loss, (ce, mse, per_label, squared)), gradients = step(folder.network.params["bagel"], batch)
  rec.check("losses", "out_ce", pack.labels(per_label), cases.MODEL)
  if squared is not None:
    rec.check("losses", "out_mse", pack.noisy_tokens(squared, batch), cases.MODEL)
  weighted = pack.batch(reweighted=True)
  (_, (reweighted, *_)), _ = step(folder.network.params["bagel"], weighted)
  rec.check("losses", "out_losses", np.array([ce, mse, loss, reweighted]), cases.MODEL)
  check_gradients(folder, rec, gradients)


def check_gradients(folder, rec: cases.Recording, gradients) -> None:
  """Compares every recorded gradient and gradient norm, by official name."""
  leaves = {name: (leaf, layer) for leaf in weights.table(folder.config, ("bagel",))
            for layer, name in enumerate(leaf.names)}

  def official(name: str) -> np.ndarray:
    leaf, layer = leaves[name]
    gradient = np.asarray(weights.lookup(gradients, leaf.path[1:]))
    return leaf.to_official(gradient[layer] if leaf.stacked else gradient)

  # What rounding makes of exact zeros (the ViT's key biases cancel in the softmax).
  rounding = 1e-7 * float(np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(gradients)]))
  for m in rec.matches(r"grad__(.+)"):
    zero = np.linalg.norm(rec[m[0]]) < rounding
    tolerance = dataclasses.replace(cases.GRADIENT, absolute=rounding) if zero else cases.GRADIENT
    rec.check("gradients", m[0], official(m[1]), tolerance)
  if "out_grad_norm_names" not in rec:
    return
  names = rec["out_grad_norm_names"].tolist()
  norms = [np.linalg.norm(official(name)) for name in names]
  # Each by itself, which says more than the norm of all.
  rec.check("gradient_norms", "out_grad_norms", norms, cases.Tolerance(rounding, 1e-3))
  rec.check("gradient_names", "out_grad_norm_names", list(dict.fromkeys(names)), cases.EXACT)
  others = [np.linalg.norm(official(name)) for name in leaves if name not in {*names, *FIXED}]
  rec.check_equal("gradient_names", "gradients of the other parameters", others,
                  np.zeros(len(others)), cases.EXACT)


@cases.case("m_train_vs_infer")
def train_and_infer(folder, rec):
  net, pack = folder.network, OfficialPack(folder, rec)
  samples, batch = pack.samples(), pack.batch()
  rows = [tokens_of(batch, b) for b in range(len(samples))]
  check_positions(rec, rows)
  rec.check("timesteps", "in_t", batch.t[:, 0], cases.FORMULA)

  def total(params, batch):
    hidden, velocity = forward(net.model, params, batch)
    logits_fn = functools.partial(net.model.apply, {"params": params}, method="logits")
    _, ce = supervised.cross_entropy(
      logits_fn, hidden, batch.label_ids, batch.label_weight, chunk=CHUNK
    )
    _, squared = supervised.velocity_mse(velocity, batch.target, batch.noise, batch.noisy_mask)
    return ce.sum() + squared.mean(-1).sum(), (ce, squared, logits_fn(hidden), velocity)

  step = network.compiled(jax.grad(total, has_aux=True))
  gradients, (ce, squared, logits, velocity) = step(net.params["bagel"], batch)
  rec.check("train", "out_train_ce", pack.labels(ce), cases.MODEL)
  rec.check("train", "out_train_mse", pack.noisy_tokens(squared, batch), cases.MODEL)
  rec.check("train", "out_train_logits", pack.labels(logits), cases.MODEL)
  rec.check("train", "out_train_velocity", pack.noisy_tokens(velocity, batch), cases.MODEL)
  check_gradients(folder, rec, gradients)

  for sample in samples:
    if [*map(type, sample)] != [packing.Text] * (len(sample) - 1) + [packing.NoisyImage]:
      raise cases.NotCovered("the cached path is replayed for texts before one noisy image only")
  texts = [np.concatenate([s.ids for s in sample[:-1]]) for sample in samples]
  context = net.empty(len(texts), max(map(len, texts)))
  context, hidden = net.append_text(context, texts)
  slots = batch.label_slot
  logits = [net.logits(h[slot[slot < len(h)]]) for h, slot in zip(hidden, slots)]
  rec.check("infer", "out_infer_logits", pack.labels(logits), cases.MODEL)
  x_t = (1 - batch.t[..., None, None]) * batch.target + batch.t[..., None, None] * batch.noise
  grid = types.LatentGrid(batch.noisy_ids[:, 0], batch.noisy_mask[:, 0])
  velocity, _ = net.velocity(context, x_t[:, 0], batch.t[:, 0], grid)
  rec.check("infer", "out_infer_velocity", pack.noisy_tokens(velocity[:, None], batch), cases.MODEL)
