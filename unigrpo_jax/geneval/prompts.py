"""GenEval's 553 prompts, and further ones by the same rules to train on.

Source: djghosh13/geneval, `prompts/create_prompts.py --seed 43 -n 100`, whose file
evaluation_metadata.jsonl is `"".join(json.dumps(metadata) + "\\n" for metadata in official())`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
from typing import Any

import numpy as np

from unigrpo_jax.geneval import classes as words

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SEED = 43  # of the official prompts
TRAIN_ROWS = 50_000
# Parts of each tag in prompts to train on. Source: yifan123/flow_grpo, `merge_genevaltask.py`.
MIXTURE = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
_PARTS = [tag for tag, part in MIXTURE.items() for _ in range(part)]
# The classes that training does not see in "geneval_unseen". Source: yifan123/flow_grpo.
UNSEEN = (
  "car", "traffic light", "fire hydrant", "dog", "elephant", "umbrella", "frisbee", "skis",
  "baseball bat", "skateboard", "wine glass", "cup", "bowl", "apple", "bed", "toilet", "microwave",
  "book", "clock", "toothbrush",
)
UNSEEN_ROWS, UNSEEN_DIFFERENT = 1024, 256  # of its test split: each prompt four times
# Prompts by set and split.
COUNTS = {
  "geneval": {"validation": 553, "test": 553},  # the same
  "geneval_train": {"train": TRAIN_ROWS},
  "geneval_unseen": {"train": TRAIN_ROWS, "test": UNSEEN_ROWS},
}

Metadata = dict[str, Any]  # tag, include, exclude (counting only) and prompt, in this order


def _single(name: str) -> Metadata:
  return _made(
    "single_object", [{"class": name, "count": 1}], f"a photo of {words.with_article(name)}"
  )


def _two(rng: np.random.Generator, names: Sequence[str]) -> Metadata:
  a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
  return _made(
    "two_object", [{"class": a, "count": 1}, {"class": b, "count": 1}],
    f"a photo of {words.with_article(a)} and {words.with_article(b)}",
  )


def _counting(rng: np.random.Generator, names: Sequence[str]) -> Metadata:
  name = names[rng.choice(len(names))]
  count = int(rng.integers(2, 4, endpoint=True))
  return {
    "tag": "counting",
    "include": [{"class": name, "count": count}],
    "exclude": [{"class": name, "count": count + 1}],
    "prompt": f"a photo of {NUMBERS[count]} {words.plural(name)}",
  }


def _colors(rng: np.random.Generator, names: Sequence[str]) -> Metadata:
  names = _without_person(names)
  name = names[rng.choice(len(names))]
  color = words.COLORS[rng.choice(len(words.COLORS))]
  return _made(
    "colors", [{"class": name, "count": 1, "color": color}],
    f"a photo of {words.with_article(color)} {name}",
  )


def _position(rng: np.random.Generator, names: Sequence[str]) -> Metadata:
  a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
  relation = RELATIONS[rng.choice(len(RELATIONS))]
  return _made(
    "position",
    [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
    f"a photo of {words.with_article(a)} {relation} {words.with_article(b)}",
  )


def _color_attr(rng: np.random.Generator, names: Sequence[str]) -> Metadata:
  names = _without_person(names)
  a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
  c, d = (words.COLORS[i] for i in rng.choice(len(words.COLORS), 2, replace=False))
  return _made(
    "color_attr",
    [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}],
    f"a photo of {words.with_article(c)} {a} and {words.with_article(d)} {b}",
  )


# Tag -> draws one prompt of some classes; a prompt of one object has nothing to draw.
_DRAW: dict[str, Callable[[np.random.Generator, Sequence[str]], Metadata]] = {
  "two_object": _two, "counting": _counting, "colors": _colors, "position": _position,
  "color_attr": _color_attr,
}


def _made(tag: str, include: list[dict[str, Any]], prompt: str) -> Metadata:
  return {"tag": tag, "include": include, "prompt": prompt}


def _without_person(names: Sequence[str]) -> Sequence[str]:
  return [name for name in names if name != "person"]


def official() -> list[Metadata]:
  """The metadata of the 553 prompts, in the order of evaluation_metadata.jsonl."""
  rng = np.random.default_rng(SEED)
  order = rng.choice(len(words.CLASSES), size=len(words.CLASSES), replace=False)
  drawn = [_single(words.CLASSES[i]) for i in order]
  for draw in _DRAW.values():
    drawn += [draw(rng, words.CLASSES) for _ in range(100)]
  return list({json.dumps(metadata): metadata for metadata in drawn}.values())


def train(names: Sequence[str] = words.CLASSES, rows: int = TRAIN_ROWS) -> list[Metadata]:
  """Prompts of some classes in the proportions `MIXTURE`, mixed; none of them is of the 553.

  A prompt may be there more than once.
  """
  rng = np.random.default_rng([SEED, 1])
  own = {metadata["prompt"] for metadata in official()}
  made: list[Metadata] = []
  while len(made) < rows:
    # As many at a time as `MIXTURE` has parts, so that a longer list begins with a shorter one.
    for place in rng.permutation(len(_PARTS)):
      while (metadata := _DRAW[_PARTS[place]](rng, names))["prompt"] in own:
        pass
      made.append(metadata)
  return made[:rows]


def unseen() -> list[Metadata]:
  """256 different prompts of the classes `UNSEEN`, four times."""
  rng = np.random.default_rng([SEED, 2])
  different: dict[str, Metadata] = {}
  while len(different) < UNSEEN_DIFFERENT:  # There are only 60 different ones of counting.
    metadata = _DRAW[_PARTS[rng.integers(len(_PARTS))]](rng, UNSEEN)
    different.setdefault(metadata["prompt"], metadata)
  return list(different.values()) * (UNSEEN_ROWS // UNSEEN_DIFFERENT)


def make(name: str, split: str, count: int) -> list[Metadata]:
  """The first `count` prompts of a split of a set of `COUNTS`; the 553 are never trained on."""
  match name, split:
    case "geneval", _:
      return official()[:count]
    case "geneval_train", "train":
      return train(rows=count)
    case "geneval_unseen", "train":
      return train([name for name in words.CLASSES if name not in UNSEEN], count)
  return unseen()[:count]


def is_rewritten(prompts: Iterable[tuple[str, Mapping[str, Any]]]) -> bool:
  """Whether prompts, with their metadata, are the 553 in other words, as BAGEL's are that its
  rewriter wrote (evaluation_metadata_long.jsonl): the same demands in the same order.
  """
  pairs = list(prompts)
  demands = lambda metadata: [metadata.get(key) for key in ("tag", "include", "exclude")]
  of_geneval = official()[: len(pairs)]
  return (
    len(pairs) == len(of_geneval) > 0
    and all(demands(got) == demands(own) for (_, got), own in zip(pairs, of_geneval))
    and any(prompt != own["prompt"] for (prompt, _), own in zip(pairs, of_geneval))
  )
