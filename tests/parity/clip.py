"""CLIP with random weights: what it sees, reads and answers, as recorded from transformers."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import cases
from unigrpo_jax.reward_models.clip import config as config_lib
from unigrpo_jax.reward_models.clip import convert, network, preprocess

FEATURES = cases.Tolerance(2e-5, 0.0)
LARGE = cases.Tolerance(2e-5, 2e-5)  # logits up to 100, and hidden states that no norm made small
CASES = {
  "pixel_values": ("pixels", cases.Tolerance(1e-6, 0.0)),
  "input_ids": ("words", cases.EXACT), "attention_mask": ("words", cases.EXACT),
  "image_features": ("features", FEATURES), "text_features": ("features", FEATURES),
  "pickscore": ("scores", FEATURES), "clip_over_30": ("scores", FEATURES),
  "logits_per_image": ("logits", LARGE), "vision_last_hidden": ("hidden", LARGE),
  "text_last_hidden": ("hidden", LARGE), "text_pooled": ("hidden", LARGE),
}


@cases.file_case("*clip*/recorded.npz", given=("*clip*/*.json", "*clip*/*.safetensors"))
def scores(path, report):
  folder, recorded = path.parent, dict(np.load(path))
  config = config_lib.read(folder)
  see = preprocess.read_pixels(folder, config.vision.image_size)
  read = preprocess.Words(folder, config.text.max_positions, config.text.vocab_size)
  count = sum(re.fullmatch(r"image_\d+", name) is not None for name in recorded)
  images = [recorded.pop(f"image_{number}") for number in range(count)]
  pixels = np.stack([see(image) for image in images])
  ids = read(json.loads((folder / "recorded.json").read_text())["prompts"])
  end = (ids == ids[:, -1:]).argmax(1)
  params = convert.load(folder, config, jnp.float32, jax.devices()[0])
  found = jax.jit(lambda *args: outputs(network.CLIP(config), *args))(params, pixels, ids)
  found |= {
    "pixel_values": pixels.transpose(0, 3, 1, 2), "input_ids": ids,
    "attention_mask": np.arange(ids.shape[1]) <= end[:, None],
  }
  # Behind its end a text has no meaning: the recorded network left those tokens out as keys.
  said = found["attention_mask"]
  found["text_last_hidden"] = found["text_last_hidden"][said]
  if "text_last_hidden" in recorded:
    recorded["text_last_hidden"] = recorded["text_last_hidden"][said]
  for name, expected in recorded.items():
    case, tolerance = CASES.get(name, (None, None))
    if case is None:
      report.not_covered("rest", name)
    else:
      report.check_equal(case, name, found[name], expected, tolerance)


def outputs(model: network.CLIP, params, pixels, ids) -> dict[str, jax.Array]:
  """Everything that is recorded of a network; each tower runs once."""
  def everything(model, pixels, ids):
    vision, seen = model.vision_model(pixels)
    hidden, pooled = model.text_model(ids)
    image, text = model.visual_projection(seen), model.text_projection(pooled)
    logits = jnp.exp(model.logit_scale) * jnp.matmul(
      network.unit(image), network.unit(text).T, precision=jax.lax.Precision.HIGHEST
    )
    return {
      "vision_last_hidden": vision, "text_last_hidden": hidden, "text_pooled": pooled,
      "image_features": image, "text_features": text, "logits_per_image": logits,
      "pickscore": jnp.diag(logits) / 26, "clip_over_30": jnp.diag(logits) / 30,
    }

  return model.apply({"params": params}, pixels, ids, method=everything)
