"""GenEval: its summary of judged images, and the folders that its own detector script reads.

Source: Ghosh et al. (arXiv 2310.11513), djghosh13/geneval: `generation/diffusers_generate.py`,
`evaluation/evaluate_images.py` and `evaluation/summary_scores.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import intervals
from unigrpo_jax.data import atomic, lines

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclasses.dataclass(frozen=True)
class Summary:
  """What GenEval reports of N judged images.

  Attributes:
    tasks: {category: share of its images that are correct, over its prompts}.
    overall: the mean of the categories, not of the images.
    images: share of all images that are correct.
    prompts: share of prompts with a correct image.
  """

  tasks: dict[Hashable, intervals.Estimate]
  overall: intervals.Estimate
  images: float
  prompts: float

  def table(self) -> str:
    """Markdown: categories, overall, and 95 % half widths over prompts."""
    cells = [f"{part.mean:.4f} ± {part.half:.4f}" for part in (*self.tasks.values(), self.overall)]
    names = [*map(str, self.tasks), "overall"]
    rows = [names, ["---"] * len(names), cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def summary(
  correct: Sequence[float], tags: Sequence[Hashable], prompts: Sequence[Hashable]
) -> Summary:
  """The summary of N images, each [N]: verdicts 0 or 1 (NaN: left out), categories, prompts."""
  correct = np.asarray(correct, float)
  tags, prompts = list(tags), list(prompts)
  judged = [i for i in range(len(correct)) if not np.isnan(correct[i])]
  tasks = {}
  for tag in dict.fromkeys(tags[i] for i in judged):
    rows = [i for i in judged if tags[i] == tag]
    tasks[tag] = intervals.clustered(correct[rows], [prompts[i] for i in rows])
  met: dict[Hashable, bool] = {}
  for i in judged:
    met[prompts[i]] = met.get(prompts[i], False) or bool(correct[i])
  return Summary(
    tasks, intervals.mean_of(list(tasks.values())),
    float(correct[judged].mean()) if judged else np.nan,
    sum(met.values()) / len(met) if met else np.nan,
  )


def write_prompt(folder: pathlib.Path, number: int, metadata: dict[str, Any]) -> None:
  """Begins the folder of a prompt: FOLDER/00000/metadata.jsonl and samples/.

  Raises:
    InputError: the metadata has no tag, include or prompt; Storage where it cannot be written.
  """
  for key in ("tag", "include", "prompt"):
    if key not in metadata:
      raise errors.InputError(
        f"prompt {number + 1}: its metadata has no {key!r}, so GenEval's script cannot judge it; "
        "draw the prompts of its evaluation_metadata.jsonl"
      )
  with errors.storage(folder):
    (folder / f"{number:05d}" / "samples").mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / f"{number:05d}" / "metadata.jsonl", json.dumps(metadata))


def write_image(folder: pathlib.Path, number: int, k: int, image: np.ndarray) -> None:
  """Writes image `k`, [H, W, 3] uint8, of a prompt: FOLDER/00000/samples/00000.png."""
  picture = PIL.Image.fromarray(image)
  with errors.storage(folder):
    atomic.write(
      folder / f"{number:05d}" / "samples" / f"{k:05d}.png",
      lambda aside: picture.save(aside, format="PNG"),
    )


def read_results(path: pathlib.Path) -> Summary:
  """The summary of a results.jsonl of GenEval's `evaluate_images.py`.

  Raises:
    InputError: a line is no object with a prompt, a tag and a correct; says which.
  """
  expected = "give the results.jsonl that GenEval's evaluate_images.py wrote"
  correct, tags, prompts = [], [], []
  for where, text in lines.read(path):
    row = lines.parse_object(text, where, expected)
    if type(row.get("correct")) not in (bool, int, float) or not isinstance(row.get("tag"), str):
      raise errors.InputError(f"{where}: needs a text tag, and correct true or false; {expected}")
    correct.append(float(row["correct"]))
    tags.append(row["tag"])
    # GenEval groups by the whole metadata.
    prompts.append(json.dumps(row.get("metadata", row["prompt"]), sort_keys=True))
  if not correct:
    raise errors.InputError(f"{path}: holds no judged image")
  return summary(correct, tags, prompts)
