"""HPS v3 (Ma et al., arXiv 2508.03789): a Qwen2-VL-7B that people's preferences trained.

By the package hpsv3, which reads transformers 4.45 alone. Besides the weights it fetches those of
Qwen/Qwen2-VL-7B-Instruct, about 17 GB, whose sizes and processor it needs.
"""

from __future__ import annotations

from unigrpo_jax import errors
from zoo import base

FILE = "HPSv3.safetensors"


class HPSv3(base.Reward):
  """The mean of (mean, standard deviation): no bounds, a scale of its own."""

  release = base.Release("hpsv3", "MizzenAI/HPSv3", "about 17 GB", "licence on its card", (FILE,))

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "bfloat16",
    batch_size: int = 4, revision: str = "",
  ):
    """See `base.Reward`; `weights` may be the file itself, and a larger batch may not fit 80 GB."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision
    )
    if dtype != "bfloat16":
      raise errors.InputError(f"dtype={dtype!r} must be 'bfloat16', which the package loads")
    package = base.load_module("hpsv3.inference", "hpsv3")
    path = self.folder / FILE if self.folder.is_dir() else self.folder
    if path.suffix != ".safetensors" or not path.is_file():
      raise errors.InputError(f"{path}: no such file {FILE}; {self.release.hub} has it")
    print("hpsv3: reads Qwen/Qwen2-VL-7B-Instruct too (about 17 GB, Apache-2.0), from the hub or "
          "its cache", flush=True)
    self._model = package.HPSv3RewardInferencer(checkpoint_path=str(path), device=self.device)
    if not self._model.use_special_tokens:
      # By its operator precedence, the package would then leave the whole instruction out.
      raise errors.InputError("hpsv3: its config must have use_special_tokens: true")
    self.report()

  def score(self, images, prompts):
    # It fits each picture into 256 patches of 28 x 28 pixels itself.
    return self._model.reward(image_paths=list(images), prompts=list(prompts))[:, 0].float().cpu()
