"""LAION's aesthetic predictor: how a picture was rated without its prompt."""

from __future__ import annotations

import pathlib

from unigrpo_jax import errors
from zoo import base

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # of the released Sequential; dropout is between


class Aesthetic(base.Reward):
  """Five matrices without activations on the unit image feature of CLIP ViT-L/14: 1 to 10."""

  release = base.Release(
    "aesthetic", "openai/clip-vit-large-patch14", "1.7 GB", "MIT", base.CLIP_FILES
  )

  def __init__(
    self, *, weights: str = release.hub, device: str = "", dtype: str = "float32",
    batch_size: int = 32, revision: str = "", head: str = HEAD,
  ):
    """See `base.Reward`; `head` is the file of the five matrices."""
    super().__init__(
      weights=weights, device=device, dtype=dtype, batch_size=batch_size, revision=revision,
      head=pathlib.Path(head).name,
    )
    self._clip = base.Clip(self)
    self._head = self._read(pathlib.Path(head).expanduser())
    self.report()

  def _read(self, path: pathlib.Path):
    if not path.is_file():
      raise errors.InputError(
        f"head={path}: no such file; it is {HEAD} (3.7 MB, Apache-2.0) of "
        "github.com/christophschuhmann/improved-aesthetic-predictor"
      )
    nn, size = self.torch.nn, self._clip.model.config.projection_dim
    layers = nn.ModuleDict()
    for name, out in LAYERS.items():
      layers[str(name)], size = nn.Linear(size, out), out
    tensors = self.torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("layers."): tensor.float() for name, tensor in tensors.items()}
    found = layers.load_state_dict(tensors, strict=False)
    base.refuse_other_weights(str(path), found.missing_keys, found.unexpected_keys)
    return nn.Sequential(*layers.values()).eval().to(self.device)

  def score(self, images, prompts):
    return self._head(self._clip.images(images))[:, 0].cpu()
