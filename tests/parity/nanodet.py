"""NanoDet's heads and detections of recorded photographs; needs what `rewards.fetch` fetches."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import PIL.Image

from tests.parity import cases
from unigrpo_jax import errors
from unigrpo_jax.rewards.detectors import nanodet

SCORES = cases.Tolerance(1e-3, 0.0)
PIXELS = cases.Tolerance(0.1, 0.0)


@cases.file_case("*nanodet*/recorded.json", given=["*nanodet*/*.png"])
def photographs(path, report):
  recorded = json.loads(path.read_text())
  try:
    detector = nanodet.NanoDet()
  except errors.InputError as error:
    raise cases.NotCovered(str(error)) from None
  for case in recorded["cases"]:
    image = np.asarray(PIL.Image.open(path.parent / case["file"]).convert("RGB"))
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    report.check_equal("pixels", case["file"], digest, case["pixels_sha256"], cases.EXACT)
    for head, made in zip(case["heads"], detector.heads(image), strict=True):
      name = f"{case['file']} {head['name']}"
      report.check_equal("heads", name, [1, *made.shape], head["shape"], cases.EXACT)
      report.check_equal("heads", name, made.mean(), head["mean"], SCORES)
      report.check_equal("heads", name, np.abs(made).max(), head["absmax"], SCORES)
      # Of the middle row, whatever the name says.
      middle = made[len(made) // 2, :8]
      report.check_equal("heads", name, middle, head["row0_first8"], SCORES)
    found = [item for item in detector([image])[0] if item.score > recorded["threshold"]]
    expected = case["detections"]
    names = np.array([item["class"] for item in expected], str)
    report.check_equal("classes", case["file"], [item.kind for item in found], names, cases.EXACT)
    report.check_equal("scores", case["file"], [item.score for item in found],
                       [item["score"] for item in expected], SCORES)
    report.check_equal("boxes", case["file"], [item.box for item in found],
                       [item["box"] for item in expected], PIXELS)
