"""GenEval's reward with Mask2Former and CLIP, for a server with a GPU; needs no jax.

  python -m unigrpo_jax.rewards.serve --rewards geneval=zoo.geneval:GenEval --reward_options \\
    '{"geneval": {"weights": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",
                  "color_weights": "ViT-L-14.safetensors", "device": "cuda"}}'

Two detectors: `MMDetection` is the official one, for numbers that are reported
(requirements-geneval.txt, Python 3.10); `Transformers` has other weights of the same network, for
training where mmdet cannot be installed (requirements-geneval-transformers.txt). Each looks at a
photograph first and refuses to start where it does not see what is in it.

Source: djghosh13/geneval, `evaluation/evaluate_images.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.geneval import classes, rules
from unigrpo_jax.rewards import colors, geneval
from zoo import base

CONFIG = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"  # as mmdet 2.28 ships it
HASH = "743b7d99"  # beginning of the checkpoint's sha256, and end of its official file name
HUB = "facebook/mask2former-swin-small-coco-instance"
LOWEST = 0.05  # score below which nothing is returned
THRESHOLDS = (0.3, 0.9)
PHOTO = pathlib.Path(__file__).with_name("geneval_check.jpg")  # a cup of coffee; CC0
SEEN, CERTAIN = "cup", 0.6  # what it shows, and the score that any working detector gives it
# Names of COCO's classes that other files use.
ALIASES = classes.RENAMED | {
  "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
  "pottedplant": "potted plant", "diningtable": "dining table",
}


class GenEval(geneval.GenEval):
  """The reward `geneval` with one of these detectors and CLIP's colours."""

  def __init__(
    self, *, weights: str, color_weights: str, detector: str = "MMDetection", device: str = "cuda",
    rule: str = "strict", clip: bool = True, **detector_options: Any,
  ):
    """Loads both models.

    Args:
      weights: the detector's; see there, also for `detector_options`.
      color_weights: CLIP's; see `ClipColors`.
      detector: "MMDetection" or "Transformers".
      device: PyTorch's name of it.
      rule, clip: see `rewards.geneval.GenEval`.
    """
    errors.choose("detector", detector, ("MMDetection", "Transformers"))
    super().__init__(
      rule=rule, clip=clip, detector=f"{__name__}:{detector}", color=f"{__name__}:ClipColors",
      detector_options={"weights": weights, "device": device, **detector_options},
      color_options={"weights": color_weights, "device": device},
    )


class MMDetection:
  """Mask2Former Swin-S by mmdet 2.x, as GenEval's own script runs it."""

  thresholds = THRESHOLDS

  def __init__(self, *, weights: str, config: str = "", device: str = "cuda"):
    """Loads the checkpoint, and looks at the photograph.

    Args:
      weights: path of the official checkpoint.
      config: path of its config; "" takes the one that mmdet ships.
      device: PyTorch's name of it.

    Raises:
      InputError: a package or file is missing, or the weights are not those of the network.
    """
    torch, mmdet, apis = (
      base.load_module(name, "geneval") for name in ("torch", "mmdet", "mmdet.apis")
    )
    if not mmdet.__version__.startswith("2."):
      raise errors.InputError(f"mmdet {mmdet.__version__}: 2.28.2 reads this checkpoint, 3.x none")
    _exact_products(torch)
    path = _file(weights, f"the checkpoint {CONFIG[:-3]}_20220504_001756-{HASH}.pth")
    if (found := _sha256(path)[: len(HASH)]) != HASH:
      raise errors.InputError(f"weights={weights!r}: its sha256 begins with {found}, not {HASH}")
    shipped = pathlib.Path(mmdet.__file__).parent / ".mim" / "configs" / "mask2former" / CONFIG
    self._model = apis.init_detector(str(config or shipped), None, device=device)
    try:
      state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
      raise errors.InputError(
        f"weights={weights!r} cannot be read without running code in it: {errors.describe(error)}"
      ) from None
    # One weight that is missing makes every score worthless; mmdet only warns.
    base.refuse_other_weights(weights, *self._model.load_state_dict(state, strict=False))
    self._infer = apis.inference_detector
    self.name = f"Mask2Former Swin-S {HASH}, mmdet {mmdet.__version__}"
    check(self)

  def __call__(self, images: Sequence[np.ndarray]) -> list[list[rules.Found]]:
    """As `rewards.detectors.Detector`."""
    return [self._detect(image) for image in images]

  def _detect(self, image: np.ndarray) -> list[rules.Found]:
    # mmdet reads files as blue, green, red.
    made = self._infer(self._model, np.ascontiguousarray(image[..., ::-1]))
    boxes, masks = made if isinstance(made, tuple) else (made, None)
    return [
      rules.Found(
        name, rules.UNKNOWN, tuple(map(float, row[:4])), float(row[4]),
        None if masks is None else np.asarray(masks[number][k], bool),
      )
      for number, name in enumerate(classes.CLASSES)
      for k, row in enumerate(boxes[number])
      if row[4] > LOWEST
    ]


class Transformers:
  """Mask2Former Swin-S by transformers: other weights than GenEval's, so not for its tables."""

  thresholds = THRESHOLDS

  def __init__(
    self, *, weights: str, device: str = "cuda", revision: str | None = None,
    checked: bool = True,
  ):
    """Loads a checkpoint, and looks at the photograph.

    Args:
      weights: folder, or a name on the Hugging Face hub, such as `HUB`, that is in its cache.
      device: PyTorch's name of it.
      revision: of the hub.
      checked: False leaves the photograph out, for a network with random weights.

    Raises:
      InputError: a package or file is missing, or the weights are not those of the network.
    """
    torch, transformers = (
      base.load_module(name, "geneval-transformers") for name in ("torch", "transformers")
    )
    _exact_products(torch)
    options = {"revision": revision, "local_files_only": True}
    try:
      self._model, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        weights, output_loading_info=True, use_safetensors=True, **options
      )
      # The other one, which needs torchvision, gives other pixels.
      self._processor = transformers.Mask2FormerImageProcessorPil.from_pretrained(
        weights, **options
      )
    except (OSError, ValueError) as error:
      raise errors.InputError(
        f"weights={weights!r}: {errors.first_line(error)}; hf download {HUB} fetches it (276 MB)"
      ) from None
    base.refuse_other_weights(weights, list(info["missing_keys"]), list(info["unexpected_keys"]))
    if info.get("mismatched_keys"):
      raise errors.InputError(f"weights of another shape: {sorted(info['mismatched_keys'])[:3]}")
    labels = self._model.config.id2label
    self._classes = {number: ALIASES.get(name, name) for number, name in labels.items()}
    if unknown := sorted(set(self._classes.values()) - set(classes.CLASSES)):
      raise errors.InputError(f"weights={weights!r}: classes that are not COCO's 80: {unknown[:5]}")
    self._torch, self._device = torch, device
    self._model.to(device).eval()
    commit = getattr(self._model.config, "_commit_hash", None) or revision
    self.name = (
      f"Mask2Former Swin-S, transformers {transformers.__version__}, {weights}"
      f"{f' {commit}' if commit else ''} (not GenEval's weights)"
    )
    if checked:
      check(self)

  def __call__(self, images: Sequence[np.ndarray]) -> list[list[rules.Found]]:
    """As `rewards.detectors.Detector`. One picture at a time: those of a batch would be padded."""
    return [self._detect(image) for image in images]

  def _detect(self, image: np.ndarray) -> list[rules.Found]:
    given = self._processor(images=[PIL.Image.fromarray(image)], return_tensors="pt")
    with self._torch.inference_mode():
      made = self._model(pixel_values=given["pixel_values"].to(self._device))
    # Without binary maps, objects that overlap are lost.
    (result,) = self._processor.post_process_instance_segmentation(
      made, threshold=LOWEST, return_binary_maps=True, target_sizes=[image.shape[:2]]
    )
    found = []
    for number, segment in enumerate(result["segments_info"]):
      mask = result["segmentation"][number].cpu().numpy() > 0
      name = self._classes[segment["label_id"]]
      found.append(rules.Found(name, rules.UNKNOWN, tight_box(mask), segment["score"], mask))
    return found


class ClipColors:
  """Colours by OpenAI's CLIP ViT-L/14 in open_clip, zero-shot, as GenEval's own script has them."""

  def __init__(self, *, weights: str, device: str = "cuda", model: str = "ViT-L-14"):
    """Loads the network from the safetensors file `weights`: open_clip's "openai" weights.

    Raises:
      InputError: a package or the file is missing, or it has not this network's weights.
    """
    torch, open_clip, safetensors = (
      base.load_module(name, "geneval") for name in ("torch", "open_clip", "safetensors.torch")
    )
    _exact_products(torch)
    path = _file(weights, "hf download timm/vit_large_patch14_clip_224.openai (1.7 GB)")
    self._model = open_clip.create_model(
      model, pretrained=None, force_quick_gelu=True, precision="fp32", device=device
    )
    # Given the file, open_clip before 2.28 would unpickle it, whatever it is.
    try:
      found = self._model.load_state_dict(safetensors.load_file(path), strict=False)
    except Exception as error:  # No safetensors file, or RuntimeError for other shapes.
      raise errors.InputError(f"color_weights={weights!r}: {errors.first_line(error)}") from None
    base.refuse_other_weights(weights, *found)
    self._model.eval()
    self._transform = open_clip.image_transform_v2(
      open_clip.PreprocessCfg(**self._model.visual.preprocess_cfg), is_train=False
    )
    self._tokenizer, self._torch, self._device = open_clip.get_tokenizer(model), torch, device
    self._weights: dict[str, Any] = {}  # by class, [features, 10]
    self.name = f"CLIP {model} {_sha256(path)[:8]}, open_clip {open_clip.__version__}"

  def __call__(self, crops: Sequence[PIL.Image.Image], kind: str) -> list[str]:
    """As `rewards.colors.Colors`."""
    torch = self._torch
    with torch.inference_mode():
      if kind not in self._weights:
        rows = []
        for color in classes.COLORS:
          texts = self._tokenizer(colors.templates(color, kind)).to(self._device)
          rows.append(_normal(_normal(self._model.encode_text(texts)).mean(0)))
        self._weights[kind] = torch.stack(rows, -1)
      pixels = torch.stack([self._transform(picture) for picture in crops]).to(self._device)
      best = (_normal(self._model.encode_image(pixels)) @ self._weights[kind]).argmax(-1)
    return [classes.COLORS[i] for i in best.tolist()]


def check(detector: Any) -> None:
  """Has a detector look at the photograph and prints what it finds there.

  A config, checkpoint or GPU that does not fit often gives low scores without an error, and so a
  reward of 0 for everything.

  Raises:
    InputError: it does not see the cup, or hardly.
  """
  (found,) = detector([np.asarray(PIL.Image.open(PHOTO).convert("RGB"))])
  best: dict[str, float] = {}
  for item in sorted(found, key=lambda item: item.score):
    best[item.kind] = item.score
  seen = ", ".join(f"{kind} {score:.2f}" for kind, score in list(best.items())[::-1][:5])
  print(f"{detector.name} sees in {PHOTO.name}: {seen or 'nothing'}", flush=True)
  if best.get(SEEN, 0.0) < CERTAIN:
    raise errors.InputError(
      f"{detector.name} must see a {SEEN} of {CERTAIN} or more in {PHOTO.name}, and sees "
      f"{seen or 'nothing'}: its weights, config or GPU do not fit"
    )


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
  """Left, top, right, bottom of a mask [H, W] that is not empty."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _normal(features):
  return features / features.norm(dim=-1, keepdim=True)


def _exact_products(torch: Any) -> None:
  """TF32 changes a detector's scores."""
  torch.backends.cuda.matmul.allow_tf32 = False
  torch.backends.cudnn.allow_tf32 = False


def _file(path: str, what: str) -> pathlib.Path:
  if not pathlib.Path(path).is_file():
    raise errors.InputError(f"{path!r}: no such file; it is {what}")
  return pathlib.Path(path)


def _sha256(path: pathlib.Path) -> str:
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()
