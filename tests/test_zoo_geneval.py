"""The detectors and colours of zoo/geneval.py: with stand-ins for the libraries; transformers' on
random weights where torch is there."""

import contextlib
import hashlib
import json
import sys
import types

import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, rewards
from unigrpo_jax.geneval import classes
from zoo import geneval


class Torch(types.ModuleType):
  """What zoo/geneval.py uses of torch, without a network."""

  def __init__(self, load=None):
    super().__init__("torch")
    switch = lambda: types.SimpleNamespace(allow_tf32=True)
    self.backends = types.SimpleNamespace(
      cuda=types.SimpleNamespace(matmul=switch()), cudnn=switch()
    )
    self._load = load

  def load(self, path, *, map_location, weights_only):
    assert weights_only, "a checkpoint is not unpickled"
    return self._load


class Model:
  """An mmdet model that says which weights do not fit."""

  def __init__(self, missing=(), unexpected=()):
    self._found = list(missing), list(unexpected)

  def load_state_dict(self, state, strict):
    assert state == {"w": 1} and not strict
    return self._found


@pytest.fixture
def mmdetection(tmp_path, monkeypatch):
  """A function (model, cup's score, version, data) -> the detector, of a fake mmdet."""

  def make(model=None, score=0.97, version="2.28.2", data=b"weights"):
    checkpoint = tmp_path / "c.pth"
    checkpoint.write_bytes(data)
    monkeypatch.setattr(geneval, "HASH", hashlib.sha256(b"weights").hexdigest()[:8])
    mmdet, apis = types.ModuleType("mmdet"), types.ModuleType("mmdet.apis")
    mmdet.__version__, mmdet.__file__ = version, str(tmp_path / "mmdet" / "__init__.py")

    def init_detector(config, weights, device):
      assert config.endswith(geneval.CONFIG) and weights is None and device == "cpu"
      return model or Model()

    def inference_detector(model, image):
      assert image.flags["C_CONTIGUOUS"]
      # The cup is where blue is, which comes first.
      mask = image[..., 0] > 200
      boxes = [np.zeros((0, 5), np.float32)] * 80
      boxes[classes.CLASSES.index("cup")] = np.float32([[1, 2, 3, 4, score], [0, 0, 1, 1, 0.01]])
      masks = [[] for _ in range(80)]
      masks[classes.CLASSES.index("cup")] = [mask, mask]
      return boxes, masks

    apis.init_detector, apis.inference_detector = init_detector, inference_detector
    modules = {"torch": Torch({"state_dict": {"w": 1}}), "mmdet": mmdet, "mmdet.apis": apis}
    for name, module in modules.items():
      monkeypatch.setitem(sys.modules, name, module)
    return geneval.MMDetection(weights=str(checkpoint), device="cpu")

  return make


def test_mmdetection(mmdetection, capsys):
  detector = mmdetection()
  assert "sees in geneval_check.jpg: cup 0.97" in capsys.readouterr().out
  torch = sys.modules["torch"]
  assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
  image = np.zeros((6, 8, 3), np.uint8)
  image[2, 3, 2] = 255
  ((cup,),) = detector([image])
  assert (cup.kind, cup.box) == ("cup", (1, 2, 3, 4)) and cup.score == pytest.approx(0.97)
  assert cup.mask.sum() == 1 and cup.mask[2, 3] and detector.thresholds == (0.3, 0.9)
  assert detector.name.startswith("Mask2Former Swin-S ") and "mmdet 2.28.2" in detector.name


@pytest.mark.parametrize(("options", "message"), [
  ({"model": Model(missing=["b", "a"])}, r"2 missing \(b, a\)"),
  ({"model": Model(unexpected=["c"])}, r"1 unexpected \(c\)"),
  ({"score": 0.4}, r"must see a cup of 0.6 or more in geneval_check.jpg, and sees cup 0.40"),
  ({"score": 0.01}, "and sees nothing"),
  ({"version": "3.3.0"}, "2.28.2 reads this checkpoint"),
  ({"data": b"others"}, "its sha256 begins with"),
])
def test_wrong_weights_are_refused(mmdetection, options, message):
  with pytest.raises(errors.InputError, match=message):
    mmdetection(**options)


def test_missing_packages_and_files_are_one_line(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "mmdet", None)
  monkeypatch.setitem(sys.modules, "torch", Torch())
  monkeypatch.setitem(sys.modules, "transformers", None)
  monkeypatch.setitem(sys.modules, "open_clip", None)
  for make, name in ((geneval.MMDetection, "geneval.txt"), (geneval.ClipColors, "geneval.txt"),
                     (geneval.Transformers, "geneval-transformers.txt")):
    with pytest.raises(errors.InputError, match=f"pip install -r zoo/requirements-{name}"):
      make(weights="w")
  for name in ("open_clip", "safetensors.torch"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  with pytest.raises(errors.InputError, match="no such file; it is hf download timm/vit_large"):
    geneval.ClipColors(weights=str(tmp_path / "no"))


def test_clip_colours_by_texts(monkeypatch, tmp_path):
  class Features(np.ndarray):
    """A tensor's methods that are used."""

    def norm(self, dim, keepdim):
      return np.linalg.norm(self, axis=dim, keepdims=keepdim).view(Features)

    to = lambda self, device: self

  features = lambda x: np.asarray(x, np.float64).view(Features)
  torch = Torch()
  torch.stack = lambda rows, axis=0: features(np.stack(rows, axis))
  torch.inference_mode = contextlib.nullcontext
  seen = []

  class Network:
    visual = types.SimpleNamespace(preprocess_cfg={})

    def load_state_dict(self, state, strict):
      assert not strict
      return sorted({"w"} - state.keys()), sorted(state.keys() - {"w"})

    def eval(self):
      pass

    def encode_text(self, texts):
      seen.extend(texts)
      # The n-th colour is the n-th axis; templates have several lengths.
      return features([
        np.eye(10)[next(i for i, c in enumerate(classes.COLORS) if f" {c}" in text)] * (k + 1)
        for k, text in enumerate(texts)
      ])

    def encode_image(self, pixels):
      return pixels

  class Texts(list):
    to = lambda self, device: self

  clip = types.ModuleType("open_clip")
  clip.__version__ = "3.3.0"

  def create_model(model, *, pretrained, force_quick_gelu, precision, device):
    assert (model, force_quick_gelu, precision) == ("ViT-L-14", True, "fp32")
    assert pretrained is None, "old versions of open_clip unpickle a file that they are given"
    return Network()

  def load_file(path):
    state = json.loads(path.read_bytes())
    if not state:
      raise ValueError("Error while deserializing header")
    return state

  clip.create_model, clip.PreprocessCfg = create_model, lambda **options: options
  clip.image_transform_v2 = lambda options, is_train: lambda crop: np.eye(10)[crop.width]
  clip.get_tokenizer = lambda model: Texts
  safetensors = types.ModuleType("safetensors.torch")
  safetensors.load_file = load_file
  for name, module in (("torch", torch), ("open_clip", clip), ("safetensors.torch", safetensors)):
    monkeypatch.setitem(sys.modules, name, module)
  for state, what in (({}, "deserializing header"), ({"v": 1}, "are not its own: 1 missing")):
    (tmp_path / "w").write_text(json.dumps(state))
    with pytest.raises(errors.InputError, match=what):
      geneval.ClipColors(weights=str(tmp_path / "w"), device="cpu")
  (tmp_path / "w").write_text(json.dumps({"w": 1}))
  colors = geneval.ClipColors(weights=str(tmp_path / "w"), device="cpu")
  crops = [PIL.Image.new("RGB", (number, 1)) for number in (3, 9)]
  assert colors(crops, "cup") == ["green", "white"]
  assert seen[:3] == ["a photo of a red cup", "a photo of a red-colored cup",
                      "a photo of a red object"] and len(seen) == 30
  colors(crops, "cup")
  assert len(seen) == 30, "texts are read once a class"


def test_tight_box():
  mask = np.zeros((5, 6), bool)
  mask[1:3, 2:5] = True
  assert geneval.tight_box(mask) == (2, 1, 5, 3)


def test_served_as_one_reward(mmdetection, monkeypatch):
  detector = mmdetection()

  class Colors:
    name = "fixed"

    def __init__(self, *, weights, device):
      assert (weights, device) == ("c", "cpu")

    def __call__(self, crops, kind):
      return ["red"] * len(crops)

  class Detector:
    name, thresholds = detector.name, detector.thresholds

    def __init__(self, *, weights, device):
      assert (weights, device) == ("w", "cpu")

    def __call__(self, images):
      return detector(images)

  monkeypatch.setattr(geneval, "MMDetection", Detector)
  monkeypatch.setattr(geneval, "ClipColors", Colors)
  reward = rewards.make("zoo.geneval:GenEval", weights="w", color_weights="c", device="cpu")
  assert reward.settings["detector"] == detector.name and reward.settings["color"] == "fixed"
  sample = rewards.Sample("a red cup", np.full((6, 6, 3), 255, np.uint8), metadata={
    "include": [{"class": "cup", "count": 1, "color": "red"}]})
  assert rewards.evaluate(reward, [sample]).values == [1]


@pytest.mark.slow
def test_transformers_on_random_weights(tmp_path):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  backbone = transformers.SwinConfig(
    embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=64,
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )
  names = {v: k for k, v in geneval.ALIASES.items()}
  config = transformers.Mask2FormerConfig(
    backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
    encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
    encoder_feedforward_dim=32, num_queries=20,
    id2label={i: names.get(name, name) for i, name in enumerate(classes.CLASSES)},
  )
  model = transformers.Mask2FormerForUniversalSegmentation(config)
  model.save_pretrained(tmp_path)
  transformers.Mask2FormerImageProcessorPil(
    size={"shortest_edge": 64, "longest_edge": 128}
  ).save_pretrained(tmp_path)
  detector = geneval.Transformers(weights=str(tmp_path), device="cpu", checked=False)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8), np.zeros((40, 40, 3), np.uint8)]
  geneval_lowest, geneval.LOWEST = geneval.LOWEST, 0.0
  try:
    together = detector(images)
    alone = [detector([image])[0] for image in images]
  finally:
    geneval.LOWEST = geneval_lowest
  assert together[0]
  for a, b in zip(together, alone, strict=True):
    assert [(x.kind, x.score, x.box) for x in a] == [(x.kind, x.score, x.box) for x in b]
  for item in together[0]:
    assert item.kind in classes.CLASSES and item.mask.shape == (48, 64) and 0 <= item.score <= 1
    assert item.box == geneval.tight_box(item.mask)
  # Random weights do not see the cup.
  with pytest.raises(errors.InputError, match="must see a cup"):
    geneval.Transformers(weights=str(tmp_path), device="cpu")
  # One weight less is refused.
  from safetensors import numpy as files  # noqa: PLC0415

  state = files.load_file(tmp_path / "model.safetensors")
  name = next(name for name in state if "class_predictor" in name)
  files.save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors",
                  metadata={"format": "pt"})
  with pytest.raises(errors.InputError, match=r"1 missing \(class_pred"):
    geneval.Transformers(weights=str(tmp_path), device="cpu")
  described = json.loads((tmp_path / "config.json").read_text())
  described["id2label"]["0"] = "thing"
  (tmp_path / "config.json").write_text(json.dumps(described))
  files.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(errors.InputError, match="classes that are not COCO's 80: .'thing'"):
    geneval.Transformers(weights=str(tmp_path), device="cpu")
