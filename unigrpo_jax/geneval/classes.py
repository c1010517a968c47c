"""The classes, colours and words of GenEval.

Source: djghosh13/geneval, `evaluation/object_names.txt` and `prompts/create_prompts.py`. The
classes are COCO's 80 in COCO's order; mouse, remote and keyboard have longer names.
"""

from __future__ import annotations

CLASSES = (
  "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
  "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
  "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
  "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
  "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
  "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
  "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
  "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
  "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
  "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# GenEval's name of a class that COCO names otherwise.
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
COLORS = (
  "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)


def with_article(words: str) -> str:
  """"a car", "an orange"."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
  """The plural by GenEval's rule, so "buses", and "knifes" too."""
  return f"{name}es" if name.endswith("s") else f"{name}s"
