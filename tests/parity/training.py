"""The training forward: official packs become splits, and splits a padded batch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from tests.parity import cases, network
from tests.parity import flow as flow_cases
from unigrpo_jax import types, weights
from unigrpo_jax.data import packing
from unigrpo_jax.losses import supervised

# Raw timestep of a clean image: stands for -inf.
CLEAN = -1e29
PAD_TO = packing.PadTo(tokens=16, labels=8, patches=8, clean=8, latents=8)
CHUNK = 8
# A norm is a number, not an array: each must agree by itself, but for those that rounding makes of
# an exact zero (the ViT's key biases cancel in the softmax).
NORMS = cases.Tolerance(1e-6, 1e-3)


@dataclasses.dataclass
class OfficialPack:
  """An official pack: tokens of all samples in one sequence, told apart by index lists.

  Attributes:
    rec: the recording that holds its fields as `in_*`.
    folder: the folder, for special ids and sizes.
  """

  folder: network.Folder
  rec: cases.Recording

  @functools.cached_property
  def kinds(self) -> dict[str, dict[int, int]]:
    """For each kind of token, its index in the sequence -> its place in the kind's own list."""
    fields = {"text": "packed_text_indexes", "vae": "packed_vae_token_indexes",
              "vit": "packed_vit_token_indexes"}
    return {
      kind: {int(at): k for k, at in enumerate(self.rec[f"in_{field}"])}
      if f"in_{field}" in self.rec else {}
      for kind, field in fields.items()
    }

  @functools.cached_property
  def raw_times(self) -> np.ndarray:
    return self.rec["in_packed_timesteps"]

  @functools.cached_property
  def times(self) -> np.ndarray:
    shift = self.folder.config.timestep_shift
    return np.asarray(supervised.shifted_timesteps(self.raw_times, shift=shift))

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

  @functools.cached_property
  def bounds(self) -> list[tuple[int, int]]:
    """First and one past the last token of each sample."""
    ends = np.cumsum(self.rec["in_sample_lens"])
    return list(zip([0, *ends[:-1].tolist()], ends.tolist()))

  def ranges(self, start: int, stop: int) -> list[range]:
    """The splits of a sample: as recorded, else told by the image markers."""
    if "in_split_lens" in self.rec:
      ends = np.cumsum(self.rec["in_split_lens"]).tolist()
      splits = [range(a, b) for a, b in zip([0, *ends], ends)]
      return [split for split in splits if start <= split.start < stop]
    first, last = self.folder.image_markers
    ids, texts = self.rec["in_packed_text_ids"], self.kinds["text"]
    cuts = {start, stop}
    cuts |= {at for at, k in texts.items() if ids[k] == first and start <= at < stop}
    cuts |= {at + 1 for at, k in texts.items() if ids[k] == last and start <= at < stop}
    cuts = sorted(cuts)
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]

  def samples(self, *, reweighted: bool = False) -> list[list[packing.Split]]:
    """The splits of each sample, with the official per-label weights or all 1."""
    label_at = {int(at): k for k, at in enumerate(self.rec["in_ce_loss_indexes"])}
    label_ids = self.rec["in_packed_label_ids"]
    label_weights = self.rec["in_ce_loss_weights"] if reweighted else np.ones(len(label_ids))

    def text(tokens: range) -> packing.Text:
      labels = np.full(len(tokens), packing.NO_LABEL)
      weight = np.zeros(len(tokens))
      for i, at in enumerate(tokens):
        if at in label_at:
          labels[i], weight[i] = label_ids[label_at[at]], label_weights[label_at[at]]
      ids = self.rec["in_packed_text_ids"][[self.kinds["text"][at] for at in tokens]]
      return packing.Text(ids, labels, weight)

    def split(tokens: range) -> packing.Split:
      vit = [self.kinds["vit"][at] for at in tokens if at in self.kinds["vit"]]
      vae = [self.kinds["vae"][at] for at in tokens if at in self.kinds["vae"]]
      if vit:
        return packing.PatchImage(
          self.rec["in_packed_vit_tokens"][vit], self.rec["in_packed_vit_position_ids"][vit]
        )
      if not vae:
        return text(tokens)
      ids = self.rec["in_packed_latent_position_ids"][vae]
      if self.raw_times[vae[0]] < CLEAN:
        return packing.CleanImage(self.latents[vae], ids)
      return packing.NoisyImage(
        self.latents[vae], self.rec["in_noise"][vae], float(self.times[vae[0]]), ids
      )

    return [[split(tokens) for tokens in self.ranges(*bound)] for bound in self.bounds]

  def batch(self, **options) -> types.PackedBatch:
    return packing.pack(
      self.samples(**options), image_markers=self.folder.image_markers, pad_to=PAD_TO
    )

  def labels(self, values) -> np.ndarray:
    """[B, Y, ...] -> one entry a label, in the order of `in_ce_loss_indexes`."""
    return self._in_pack_order(values, self.rec["in_ce_loss_indexes"])

  def noisy_tokens(self, values, batch: types.PackedBatch) -> np.ndarray:
    """[B, R, I, ...] -> one entry a noisy token, in the order of `in_mse_loss_indexes`."""
    rows = [row[mask] for row, mask in zip(np.asarray(values), batch.noisy_mask)]
    return self._in_pack_order(rows, self.rec["in_mse_loss_indexes"])

  def _in_pack_order(self, rows, indexes: np.ndarray) -> np.ndarray:
    counts = [((start <= indexes) & (indexes < stop)).sum() for start, stop in self.bounds]
    values = np.concatenate([np.asarray(row)[:n] for row, n in zip(rows, counts)])
    out = np.empty_like(values)
    out[np.argsort(indexes, kind="stable")] = values
    return out


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
  rec.check("layout", "in_packed_position_ids", np.concatenate([r["position"] for r in rows]),
            cases.EXACT)
  rec.check("layout", "in_sample_lens", [len(r["position"]) for r in rows], cases.EXACT)
  lengths, modes = rec["in_split_lens"], rec["in_attn_modes"]
  starts = np.cumsum(lengths) - lengths
  for b, (start, stop) in enumerate(pack.bounds):
    mine = (start <= starts) & (starts < stop)
    rec.check_equal("layout", f"mask of sample {b}", visible(batch, b),
                    mask_by_rule(lengths[mine], modes[mine]), cases.EXACT)
  rec.check("timesteps", "out_timesteps", pack.times, cases.FORMULA)


@cases.case("j_training")
def latents(folder, rec):
  net = folder.network
  latents = net.latents(*net.encode_image(rec["in_padded_images"]), rec["in_vae_noise"])
  rec.check("vae", "in_padded_latent", np.moveaxis(latents, -1, 1), cases.MODEL)


@cases.case("j_training")
def losses(folder, rec):
  pack = OfficialPack(folder, rec)
  batch = pack.batch()

  def total(params, batch):
    hidden, velocity = folder.network.model.apply({"params": params}, batch, method="packed")
    logits_fn = functools.partial(folder.network.model.apply, {"params": params}, method="logits")
    ce, per_label = supervised.cross_entropy(
      logits_fn, hidden, batch.label_ids, batch.label_weight, chunk=CHUNK
    )
    mse, squared = supervised.velocity_mse(velocity, batch.target, batch.noise, batch.noisy_mask)
    return ce + mse, (ce, mse, per_label, squared)

  step = network.compiled(jax.value_and_grad(total, has_aux=True))
  (loss, (ce, mse, per_label, squared)), gradients = step(folder.network.params["bagel"], batch)
  rec.check("losses", "out_ce", pack.labels(per_label), cases.MODEL)
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

  for m in rec.matches(r"grad__(.+)"):
    rec.check("gradients", m[0], official(m[1]), cases.GRADIENT)
  if "out_grad_norm_names" in rec:
    names = rec["out_grad_norm_names"].tolist()
    rec.check("gradient_norms", "out_grad_norms", [np.linalg.norm(official(n)) for n in names],
              NORMS)


@cases.case("m_train_vs_infer")
def train_and_infer(folder, rec):
  net, pack = folder.network, OfficialPack(folder, rec)
  samples, batch = pack.samples(), pack.batch()
  rows = [tokens_of(batch, b) for b in range(len(samples))]
  rec.check("layout", "in_packed_position_ids", np.concatenate([r["position"] for r in rows]),
            cases.EXACT)
  rec.check("timesteps", "in_t", batch.t[:, 0], cases.FORMULA)

  def total(params, batch):
    hidden, velocity = net.model.apply({"params": params}, batch, method="packed")
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
