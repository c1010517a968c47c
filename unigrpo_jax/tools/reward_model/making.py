"""The stage make: triples of IconWorld, from rendered scenes and from pictures of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax.data import atomic, progress
from unigrpo_jax.iconworld import prompts
from unigrpo_jax.tools.reward_model import pictures, world
from unigrpo_jax.tools.reward_model import triples as triples_lib

CHUNK, GROUP = 16, 12  # prompts that are drawn together, and pictures of each
SPLITS = ("train", "validation", "test")
POLICY, LATE, SCENES = range(3)  # parts of random seeds: what they are for
USES = 2.0  # How often a policy's picture is used, on average; 4 triples have 2 pictures.
ROUND_TRIP_BATCH = 64


def path_of(workdir: pathlib.Path, split: str) -> pathlib.Path:
  """The file of a split's triples."""
  return workdir / "triples" / f"{split}.npz"


def make(
  workdir: pathlib.Path, policy: str, split: str, *, count: int, group_prompts: int, seed: int,
) -> triples_lib.Triples:
  """Makes about `count` triples of a split, or reads them if they were made before.

  Drawn pictures are saved after each chunk, from where a stage that was killed continues.

  Args:
    workdir: of the files.
    policy: folder of the checkpoint that draws.
    split: of IconWorld's prompts.
    count: number of triples, divided among sources by `world.SOURCES`.
    group_prompts: the drawn pictures of so many prompts become further triples (source "group"),
      each with just its own prompt, as in a rollout.
    seed: of everything.
  """
  target = path_of(workdir, split)
  if target.exists():
    return triples_lib.Triples.load(target)
  painter = pictures.Painter(policy)
  need = lambda source: count * world.SOURCES[source] / 2 / USES
  modes = len(pictures.MODES)
  chunks = _chunks(max(need("policy") / CHUNK / GROUP, group_prompts / CHUNK, 1.0))
  chunks += -chunks % modes
  late_chunks = _chunks(need("one_step") / CHUNK / GROUP / pictures.PREDICTIONS)
  late_chunks += -late_chunks % len(pictures.LATE_MODES)
  drawn = list(_draw(
    painter, workdir, split, [pictures.MODES[k % modes] for k in range(chunks)], POLICY, seed
  ))
  late = list(_draw(
    painter, workdir, split,
    [pictures.LATE_MODES[k % len(pictures.LATE_MODES)] for k in range(late_chunks)], LATE, seed,
  ))
  made = collect(painter, split, drawn, late, count=count, group_prompts=group_prompts, seed=seed)
  target.parent.mkdir(parents=True, exist_ok=True)
  made.save(target)
  return made


def _chunks(number: float) -> int:
  return max(int(np.ceil(number)), 1)


def _draw(
  painter: pictures.Painter, workdir: pathlib.Path, split: str, modes: Sequence[pictures.Mode],
  purpose: int, seed: int,
) -> Iterator[tuple[prompts.Example, list[world.Picture]]]:
  """Draws one chunk of prompts per mode, or reads it; yields (example, its pictures)."""
  label = f"{split}: " + ("late steps" if purpose == LATE else "policy")
  for number, mode in progress.each(enumerate(modes), len(modes), label, unit="chunks"):
    key = (seed, SPLITS.index(split), purpose, number)
    rng = np.random.default_rng(key)
    # Categories take turns, also across chunks.
    categories = [prompts.CATEGORIES[(number * CHUNK + i) % len(prompts.CATEGORIES)]
                  for i in range(CHUNK)]
    examples = [prompts.sample(rng, split, category) for category in categories]
    path = workdir / "drawn" / f"{split}_{'late' if purpose == LATE else 'policy'}_{number:03d}.npy"
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      drawn = painter.draw(examples, mode, group_size=GROUP, seed=key)
      atomic.write_binary(path, lambda file, drawn=drawn: np.save(file, drawn))
    for example, group in zip(examples, np.load(path, allow_pickle=False)):
      yield example, [world.look(pixels) for pixels in group]


def collect(
  painter: pictures.Painter, split: str, drawn: Sequence[Any], late: Sequence[Any], *, count: int,
  group_prompts: int, seed: int,
) -> triples_lib.Triples:
  """The triples of a split: blocks for each source and category, then the groups.

  `drawn` and `late` are (example, pictures) of the policy's finished pictures and of its late
  steps.
  """
  rng = np.random.default_rng((seed, SPLITS.index(split), SCENES))
  rows = triples_lib.Collected()
  by_category = lambda drawn: {
    category: [item for item in drawn if item[0].goal.category == category]
    for category in prompts.CATEGORIES
  }
  policy, late = by_category(drawn), by_category(late)
  garbled = [
    picture for _, group in drawn for picture in group
    if world.describe(rng, picture, "") is None
  ]

  def attempt(source: str, category: str) -> world.Block | None:
    match source:
      case "policy":
        return world.policy_block(rng, policy, category)
      case "one_step":
        return world.policy_block(rng, late, category)
      case "nonsense":
        return world.nonsense_block(rng, split, category, garbled)
    return world.MAKERS[source](rng, split, category)

  total = round(count / 4)
  with progress.bar(total, f"{split}: blocks", unit="blocks") as bar:
    for source, share in world.SOURCES.items():
      for category in prompts.CATEGORIES:
        wanted = max(round(total * share / len(prompts.CATEGORIES)), 1)
        for block in _blocks(source, category, wanted, attempt, painter, rng):
          for picture, metadata, yes in block.triples:
            rows.add(picture, prompts.plain(metadata), yes, source=source, category=block.category)
          bar.update(1)
  for group, (example, members) in enumerate(drawn[:group_prompts]):
    for picture in members:
      rows.add(
        picture, prompts.plain(example.metadata), picture.shows(example.metadata), source="group",
        category=example.goal.category, group=group, verbatim=example.prompt,
      )
  return rows.triples()


def _blocks(
  source: str, category: str, wanted: int, attempt, painter: pictures.Painter,
  rng: np.random.Generator,
) -> Iterator[world.Block]:
  """Yields `wanted` blocks of a source and category, or fewer if too many attempts fail."""
  made, tries = 0, 0
  pending: list[world.Block] = []
  while made < wanted and tries < world.TRIES * wanted:
    tries += 1
    origin = str(rng.choice(list(world.MAKERS))) if source == "vae" else source
    block = attempt(origin, category)
    if block is None:
      continue
    if source != "vae":
      made += 1
      yield block
      continue
    pending.append(block)
    if len(pending) >= min(ROUND_TRIP_BATCH, 2 * (wanted - made)):
      for block in _round_trips(painter, pending, rng):
        if made < wanted:
          made += 1
          yield block
      pending = []


def _round_trips(
  painter: pictures.Painter, blocks: Sequence[world.Block], rng: np.random.Generator
) -> list[world.Block]:
  """Blocks with pictures encoded and decoded by the VAE, but for those whose answers this changes.
  """
  seen = list(dict.fromkeys(picture for block in blocks for picture, *_ in block.triples))
  filled = [seen[i % len(seen)].pixels for i in range(2 * ROUND_TRIP_BATCH)]  # one shape
  back = painter.round_trip(np.stack(filled), rng.integers(2**31, size=2))
  redrawn: Mapping = {picture: world.look(pixels) for picture, pixels in zip(seen, back)}
  return [made for block in blocks if (made := block.redrawn(redrawn)) is not None]
