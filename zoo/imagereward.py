"""ImageReward v1.0 (Xu et al., arXiv 2304.05977): BLIP and a head, from people's rankings."""

from __future__ import annotations

import logging

from unigrpo_jax import errors
from zoo import base

TOKENS = 35  # of a prompt, with those around it; the network was trained with no more
FILES = ("ImageReward.pt", "med_config.json")

_log = logging.getLogger(__name__)


class ImageReward(base.Reward):
  """The head's number, less 0.1672 and over 1.0333: about -2 to 2."""

  release = base.Release("imagereward", "THUDM/ImageReward", "about 1.8 GB", "Apache-2.0", FILES)

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float32",
    batch_size: int = 32, revision: str = "",
  ):
    """See `base.Reward`."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision
    )
    package = base.load_module("ImageReward.ImageReward", "imagereward")
    checkpoint, config = (self.folder / name for name in FILES)
    for path in (checkpoint, config):
      if not path.is_file():
        raise errors.InputError(f"{path}: no such file; {self.release.hub} has it")
    print("imagereward: reads the tokenizer of bert-base-uncased (Apache-2.0) too, from "
          "the hub or its cache", flush=True)
    self._model = package.ImageReward(med_config=str(config), device=self.device)
    tensors = self.torch.load(checkpoint, map_location="cpu", weights_only=True)
    found = self._model.load_state_dict(tensors, strict=False)
    base.refuse_other_weights(str(checkpoint), found.missing_keys, found.unexpected_keys)
    self._model.to(self.device, self.dtype).eval()
    self._warned = False
    self.report()

  def score(self, images, prompts):
    model, blip = self._model, self._model.blip
    self._warn(blip.tokenizer, prompts)
    words = blip.tokenizer(
      list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).to(self.device)
    pixels = self.torch.stack([model.preprocess(image) for image in images])
    seen = blip.visual_encoder(pixels.to(self.device, self.dtype))
    read = blip.text_encoder(
      words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen,
      encoder_attention_mask=self.torch.ones(
        seen.shape[:-1], dtype=self.torch.long, device=self.device
      ),
      return_dict=True,
    )
    found = model.mlp(read.last_hidden_state[:, 0])[:, 0].float()
    return ((found - model.mean) / model.std).cpu()

  def _warn(self, tokenizer, prompts) -> None:
    """Says once that a prompt is cut."""
    for prompt in prompts if not self._warned else ():
      if (count := len(tokenizer(prompt).input_ids)) > TOKENS:
        self._warned = True
        _log.warning(
          "ImageReward reads the first %d tokens of a prompt, of which %s has %d; said once",
          TOKENS, errors.shown(prompt), count,
        )
        return
