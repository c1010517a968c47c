"""CLIP score (Hessel et al., arXiv 2104.08718): how well a picture fits its prompt."""

from __future__ import annotations

from zoo import base


class ClipScore(base.Reward):
  """exp(logit_scale) cos / 30, and that scale is 100: about 0.7 to 1.1, as Flow-GRPO and UniRL.

  Flow-GRPO's own `clip_scorer.py` resizes tensors bilinearly, which gives other numbers.
  """

  release = base.Release(
    "clip", "openai/clip-vit-large-patch14", "1.7 GB", "MIT", base.CLIP_FILES
  )

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float32",
    batch_size: int = 32, revision: str = "", cosine: bool = False,
  ):
    """See `base.Reward`; `cosine` gives the cosine itself."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision,
      scale="cosine" if cosine else "logit / 30",
    )
    self._clip = base.Clip(self)
    self._divisor = float(self._clip.model.logit_scale.float().exp()) if cosine else 30
    self.report()

  def score(self, images, prompts):
    return (self._clip.logits(images, prompts) / self._divisor).cpu()
