"""DeQA-Score (You et al., arXiv 2501.11561): the quality of a picture, without its prompt.

The hub's copy wants to run code of its own (trust_remote_code), which this never does: it takes the
code from a clone of github.com/zhiyuanyou/DeQA-Score that you have made and looked at.
"""

from __future__ import annotations

import pathlib
import sys

from unigrpo_jax import errors
from zoo import base


class DeQA(base.Reward):
  """The expected level over 5: 0.2 is bad, 1 excellent."""

  release = base.Release(
    "deqa", "zhiyuanyou/DeQA-Score-Mix3", "about 16 GB", "licence on its card",
    ("*.json", "*.model", "*.safetensors"),
  )

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float16",
    batch_size: int = 8, revision: str = "", code: str = "",
  ):
    """See `base.Reward`; `code` is the folder of the clone."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision
    )
    if dtype != "float16":
      raise errors.InputError(f"dtype={dtype!r} must be 'float16', which its code computes in")
    folder = pathlib.Path(code).expanduser()
    if not code or not (folder / "src" / "evaluate" / "scorer.py").is_file():
      raise errors.InputError(
        f"code={code!r}: no clone of DeQA-Score: git clone "
        "https://github.com/zhiyuanyou/DeQA-Score, look at it, and give its folder"
      )
    sys.path.insert(0, str(folder))
    scorer = base.load_module("src.evaluate.scorer", "deqa")
    self._scorer = scorer.Scorer(pretrained=str(self.folder), device=self.device)
    self.report()

  def score(self, images, prompts):
    return self._scorer(list(images)).float().cpu() / 5
