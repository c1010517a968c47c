"""PickScore (Kirstain et al., arXiv 2305.01569): how people would prefer a picture for its prompt.
"""

from __future__ import annotations

from zoo import base


class PickScore(base.Reward):
  """exp(logit_scale) cos / 26, as Flow-GRPO, UniRL and verl-omni have it: about 0.7 to 0.95."""

  release = base.Release(
    "pickscore", "yuvalkirstain/PickScore_v1", "3.9 GB", "MIT", base.CLIP_FILES
  )

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float32",
    batch_size: int = 32, revision: str = "", raw: bool = False,
  ):
    """See `base.Reward`; `raw` leaves the 26 out."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision,
      scale="logit" if raw else "logit / 26",
    )
    self._clip, self._divisor = base.Clip(self), 1 if raw else 26
    self.report()

  def score(self, images, prompts):
    return (self._clip.logits(images, prompts) / self._divisor).cpu()
