"""HPS v2.1 (Wu et al., arXiv 2306.09341): how people would prefer a picture for its prompt.

Of PyPI, hpsv2 1.2.0 lacks its vocabulary file and reads the checkpoint at every call: this needs
open_clip alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from zoo import base

FILE = "HPS_v2.1_compressed.pt"
SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HPSv2(base.Reward):
  """The cosine of CLIP ViT-H/14's features, without a scale: about 0.20 to 0.35."""

  release = base.Release("hpsv2", "xswu/HPSv2", "about 2 GB", "Apache-2.0", (FILE,))

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float16",
    batch_size: int = 32, revision: str = "",
  ):
    """See `base.Reward`; `weights` may be the file itself, `dtype` that of autocast on a GPU."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision
    )
    open_clip = base.load_module("open_clip", "hpsv2")
    path = self.folder / FILE if self.folder.is_dir() else self.folder
    if not path.is_file():
      raise errors.InputError(f"{path}: no such file; {self.release.hub} has it")
    self._model = open_clip.create_model("ViT-H-14", pretrained=None)
    tensors = self.torch.load(path, map_location="cpu", weights_only=True)
    found = self._model.load_state_dict(tensors.get("state_dict", tensors), strict=False)
    base.refuse_other_weights(str(path), found.missing_keys, found.unexpected_keys)
    self._model.eval().to(self.device)
    self._tokenizer = open_clip.get_tokenizer("ViT-H-14")
    self.report()

  def score(self, images, prompts):
    autocast = self.torch.autocast(
      self.device.partition(":")[0], dtype=self.dtype,
      enabled=self.device.startswith("cuda") and self.dtype != self.torch.float32,
    )
    with autocast:
      seen = self._model.encode_image(pixels(self.torch, images).to(self.device), normalize=True)
      read = self._model.encode_text(
        self._tokenizer(list(prompts)).to(self.device), normalize=True
      )
      return (seen * read).sum(-1).float().cpu()


def pixels(torch, images: Sequence[PIL.Image.Image]):
  """Pictures as HPSv2's code saw them: [N, 3, 224, 224] float32.

  They become tensors first and are resized then, bicubically and without antialiasing, as
  torchvision before 0.17 did it with tensors; its later versions do it otherwise.
  """
  made = []
  for image in images:
    x = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
    height, width = x.shape[1:]
    long = int(SIZE * max(height, width) / min(height, width))
    size = (SIZE, long) if height <= width else (long, SIZE)
    x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", align_corners=False)[0]
    top, left = (round((side - SIZE) / 2) for side in size)
    made.append(x[:, top : top + SIZE, left : left + SIZE])
  mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
  return (torch.stack(made) - mean) / std
