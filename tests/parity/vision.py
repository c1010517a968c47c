"""Images in: the ViT with its connector, and the VAE."""

from __future__ import annotations

import numpy as np

from tests.parity import cases, network, text
from unigrpo_jax import types
from unigrpo_jax.data import images
from unigrpo_jax.episodes import packing


def patches_of(net: network.Network, pictures: list[np.ndarray]) -> types.Patches:
  """Normalised images [3, H, W], one a row; None where a row has no image."""
  vit = net.config.vit
  pixels, ids = [], []
  for picture in pictures:
    if picture is None:
      pixels.append(np.zeros((0, vit.patch_dim), np.float32))
      ids.append(np.zeros(0, np.int32))
      continue
    picture = np.moveaxis(picture, 0, -1)
    pixels.append(images.patchify(picture, vit.patch_size))
    ids.append(images.position_ids(
      *picture.shape[:2], vit.patch_size, net.config.vit_max_patches_per_side,
      net.config.interpolate_pos,
    ))
  length = max(map(len, ids))
  padded, mask = network.pad(pixels, length)
  return types.Patches(padded, network.pad(ids, length)[0], mask)


@cases.case("c_vit")
def towers(folder, rec):
  net = folder.network
  patches = patches_of(net, [rec[m[0]] for m in rec.matches(r"in_image\d+")])
  packed = lambda a: network.unpad(a, patches.mask)
  rec.check("patches", "out_packed_vit_tokens", packed(patches.pixels), cases.EXACT)
  rec.check("patches", "out_packed_vit_position_ids", packed(patches.ids), cases.EXACT)
  rec.check("patches", "in_vit_token_seqlens", patches.mask.sum(1), cases.EXACT)

  @network.compiled
  def run(params, patches):
    def stages(model):
      features = model.vit(patches.pixels, patches.ids, patches.mask)
      return features, model.connector(features), model.embed_patches(patches)

    return net.model.apply({"params": params}, method=stages)

  names = ("out_vit_hidden", "out_connector", "out_vit_embeds")
  for name, value in zip(names, run(net.params["bagel"], patches)):
    rec.check("towers", name, packed(value), cases.MODEL)


@cases.case("c_vit")
def context(folder, rec):
  """The image splits as a context, and as the understanding stream of a training batch."""
  net = folder.network
  patches = patches_of(net, [rec[m[0]] for m in rec.matches(r"in_image\d+")])
  count = patches.mask.sum(1)
  context = net.apply("append_patches", net.empty(len(count), max(count) + 2), patches)
  network.check_cache(rec, "cache", context)
  rec.check("layout", "in_packed_seqlens", network.cached(context, 0)[2], cases.EXACT)
  rec.check("layout", "in_packed_position_ids", np.repeat(context.position - 1, count + 2),
            cases.EXACT)
  # Labels everywhere: the training path is the one that gives every hidden state.
  samples = [[packing.PatchImage(patches.pixels[i, :n], patches.ids[i, :n])]
             for i, n in enumerate(count)]
  batch = packing.pack(samples, image_markers=folder.image_markers)
  slots = np.broadcast_to(np.arange(batch.und_ids.shape[1]), batch.und_ids.shape)
  hidden, _ = net.apply("packed", batch.replace(label_slot=slots))
  rec.check("training_path", "out_llm_hidden",
            network.unpad(hidden, batch.und_order != types.UNSEEN), cases.MODEL)


@cases.case("c_vit")
def question(folder, rec):
  """A text after the first image, and the greedy answer to it."""
  net = folder.network
  ids, recorded = rec["in_question_ids"], rec.get("out_answer_tokens", np.zeros(0, np.int32))
  patches = patches_of(net, [rec["in_image0"]])
  tokens = patches.mask.sum() + 2 + len(ids) + len(recorded)
  context = net.apply("append_patches", net.empty(1, tokens), patches)
  rec.check("question", "in_question_pos", context.position + np.arange(len(ids)), cases.EXACT)
  context, (hidden,) = net.append_text(context, [ids])
  rec.check("question_logits", "out_question_logits", net.logits(hidden), cases.MODEL)
  if not len(recorded):
    return
  answer = text.greedy(net, context, folder.special_ids["bos_token_id"], len(recorded))[0]
  rec.check("question", "out_answer_tokens", answer, cases.EXACT)
  logits = text.forced(net, context, [recorded])[0]
  rec.check("question_logits", "out_answer_step_logits", logits, cases.MODEL)


@cases.case("d_vae")
def autoencoder(folder, rec):
  net = folder.network
  channels_first = lambda a: np.moveaxis(a, -1, 1)
  for m in rec.matches(r"in_image(\d+)"):
    i = m[1]
    mean, logvar = net.encode_image(rec[m[0]])
    moments = channels_first(np.concatenate([mean, logvar], -1))
    rec.check("encode", f"out_moments{i}", moments, cases.MODEL)
    latents = net.latents(mean, logvar, None)
    rec.check("encode", f"out_latent_mean{i}", channels_first(latents), cases.MODEL)
    if f"in_noise{i}" in rec:
      latents = net.latents(mean, logvar, rec[f"in_noise{i}"])
      rec.check("encode", f"out_latent_sampled{i}", channels_first(latents), cases.MODEL)
    sampled = np.moveaxis(rec[f"out_latent_sampled{i}"], 1, -1)
    rec.check("decode", f"out_decoded{i}", channels_first(net.decode_image(sampled)), cases.MODEL)


@cases.case("d_vae")
def low_contrast(folder, rec):
  """An almost constant image, in which the epsilon of the group norms shows."""
  moments = np.concatenate(folder.network.encode_image(rec["in_lowcontrast_image"]), -1)
  rec.check("low_contrast", "out_lowcontrast_moments", np.moveaxis(moments, -1, 1), cases.MODEL)


@cases.case("d_vae")
def padded(folder, rec):
  net = folder.network
  latents = net.latents(*net.encode_image(rec["in_padded_images"]), rec["in_padded_noise"])
  rec.check("padded", "out_padded_latent", np.moveaxis(latents, -1, 1), cases.MODEL)
