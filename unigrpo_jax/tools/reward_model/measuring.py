"""The stages calibrate and measure: temperature, metrics and gates of a model, and its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigrpo_jax import errors
from unigrpo_jax.benchmarks import markdown
from unigrpo_jax.benchmarks import measured as measured_lib
from unigrpo_jax.data import atomic, locks, progress
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.iconworld import prompts as prompts_lib
from unigrpo_jax.iconworld import renderer, verifier
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.reward_models import learned, metrics
from unigrpo_jax.runtime import checksums, folders, sharding, state
from unigrpo_jax.tools.reward_model import triples as triples_lib
from unigrpo_jax.tools.reward_model import world

MOST_AT_ONCE, BATCH_PIXELS = 96, 2**20  # most pictures, and pixels, scored together
HIDDEN_PROMPT, GREY = "it", 128  # what replaces a hidden prompt, and the pixels of a hidden picture
ASCENT_PICTURES, ASCENT_STEPS, ASCENT_STEP = 48, 20, 0.02  # see `ascent`
CALIBRATED_ON = ("policy", "group")  # sources for the temperature; rendered scenes are easier
# {gate: (key of the metrics, least value)}; see `gates`.
GATES = {
  "AUC of renders": ("render", 0.95), "AUC of round trips": ("vae", 0.95),
  "AUC of policy pictures": ("policy", 0.85), "AUC within groups": ("group_auc", 0.80),
}
OF_A_FILE = {"AUC of the file's pictures": ("file", 0.85)}  # in place of them
MOST_ONE_SIDED = 0.55  # largest AUC with the picture or the prompt hidden


class MissedGates(errors.InputError):
  """A reward model misses some gates."""

  status = 1


def open_trained(
  folder: pathlib.Path | str, *, question: str, vit_max: int | None, prompt_form: str
) -> tuple[learned.RewardModel, Any]:
  """The reward model of a trained network, with tau = 1, and its parameters.

  Arguments are those of `learned.RewardModel`; `vit_max` None: the checkpoint's.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  network = state.open_for_sampling(folder, mesh=mesh)
  yes_id, no_id = learned.answer_ids(network.tokenizer)
  model = learned.RewardModel(
    network.model.for_gradients(), network.tokenizer, yes_id, no_id, question=question,
    prompt_form=prompt_form, vit_max=vit_max or network.config.vit_image.max_size,
  )
  return model, learned.load_params(network)


def margins(
  model: learned.RewardModel, params: Any, pixels: np.ndarray, prompts: Sequence[str], label: str
) -> np.ndarray:
  """The margins z (`readout.margin`) of N pictures and prompts, at tau = 1: [N] float32.

  `pixels` [N, H, W, 3] are uint8, or float32 in [-1, 1]. `label` is that of the progress bar.
  """
  plain = dataclasses.replace(model, tau=1.0, readout="logit")
  questions, found = plain.questions(prompts), []
  score = jax.jit(plain.score)
  at_once = int(np.clip(BATCH_PIXELS // (pixels.shape[1] * pixels.shape[2]), 1, MOST_AT_ONCE))
  starts = range(0, len(prompts), at_once)
  for first in progress.each(starts, len(starts), label, unit="batches"):
    rows = np.arange(first, first + at_once) % len(prompts)  # one shape
    batch = pixels[rows]
    if batch.dtype == np.uint8:
      batch = images_lib.to_array(batch)
    asked = learned.Questions(questions.ids[rows], questions.lengths[rows])
    found.append(np.asarray(score(params, batch, asked)))
  return np.concatenate(found)[: len(prompts)]


def ask(
  model: learned.RewardModel, params: Any, triples: triples_lib.Triples, target: pathlib.Path
) -> dict[str, np.ndarray]:
  """The margins of all triples; saved in `target`, an .npz file, and read from it the next time.

  Returns:
    {"z": as they are; "no_picture", "no_prompt": with one of the two hidden; "verbatim": about the
    user's own words, NaN where there are none}, [N] float32 each.
  """
  about = _about(model, triples)
  if target.exists():
    with np.load(target, allow_pickle=False) as arrays:
      if "about" in arrays and str(arrays["about"]) == about:
        return {name: arrays[name] for name in arrays.files if name != "about"}
  pixels, prompts = triples.pixels[triples.image], triples.prompt.tolist()
  grey = np.broadcast_to(np.uint8(GREY), pixels.shape)
  has = np.flatnonzero(triples.verbatim != "")
  found = {
    "z": margins(model, params, pixels, prompts, "asking"),
    "no_picture": margins(model, params, grey, prompts, "asking about no picture"),
    "no_prompt": margins(
      model, params, pixels, [HIDDEN_PROMPT] * len(prompts), "asking about no prompt"
    ),
    "verbatim": np.full(len(prompts), np.nan, np.float32),
  }
  if has.size:
    found["verbatim"][has] = margins(
      model, params, pixels[has], triples.verbatim[has].tolist(), "asking about riddles"
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  with errors.storage(target):
    atomic.write_binary(target, lambda file: np.savez(file, about=about, **found))
  return found


def _about(model: learned.RewardModel, triples: triples_lib.Triples) -> str:
  """Identifies the triples, in their order, and how the model is asked about them."""
  digest = hashlib.blake2b(f"{model.question} {model.vit_max}".encode(), digest_size=8)
  for array in (triples.pixels, triples.image, triples.prompt, triples.yes, triples.verbatim):
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def temperature(triples: triples_lib.Triples, found: Mapping[str, np.ndarray]) -> float:
  """The tau with the least log loss on a policy's pictures, or on all where there are none."""
  rows = np.isin(triples.source, CALIBRATED_ON)
  rows = rows if rows.any() else np.ones(len(triples), bool)
  return metrics.best_temperature(found["z"][rows], triples.yes[rows])


def measure(
  triples: triples_lib.Triples, found: Mapping[str, np.ndarray], tau: float
) -> dict[str, Any]:
  """The metrics of a reward model, as JSON values; see `page`.

  Args:
    triples: N triples.
    found: their margins; see `ask`.
    tau: the temperature.
  """
  part = lambda rows: metrics.summary(found["z"][rows], triples.yes[rows], tau)
  by = lambda labels, among: {
    str(name): part(among & (labels == name)) for name in np.unique(labels[among])
  }
  grouped = triples.group >= 0
  # Without nonsense, whose answer follows from the picture alone. In other blocks, neither picture
  # nor prompt alone tells the answer.
  blocks = ~grouped & (triples.source != "nonsense")
  alone = lambda name, rows: metrics.auc(found[name][rows], triples.yes[rows])
  within, groups = metrics.group_auc(
    found["z"][grouped], triples.yes[grouped], triples.group[grouped]
  )
  verbatim, _ = metrics.group_auc(
    found["verbatim"][grouped], triples.yes[grouped], triples.group[grouped]
  )
  return {
    "tau": tau, "all": part(~grouped), "sources": by(triples.source, grouped | ~grouped),
    "categories": by(triples.category, ~grouped),
    "cells": {
      f"{source}/{category}": part((triples.source == source) & (triples.category == category))
      for source, category in triples.balance()
    },
    "group_auc": within, "groups": groups, "group_auc_verbatim": verbatim,
    "one_sided": {
      name: {"blocks": alone(name, blocks), "all": alone(name, ~grouped)}
      for name in ("no_picture", "no_prompt")
    },
  }


def gates(measured: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
  """[(name, value, bound, whether it holds)] of the gates for which there are triples."""
  result = []
  for name, (key, least) in (GATES | OF_A_FILE).items():
    value = measured["group_auc"] if key == "group_auc" else (
      measured["sources"].get(key, {}).get("auc", np.nan)
    )
    if not np.isnan(value):
      result.append((name, value, least, value >= least))
  for name, words in (("no_picture", "picture"), ("no_prompt", "prompt")):
    value = measured["one_sided"][name]["blocks"]
    if not np.isnan(value):
      # An AUC below 1/2 reveals as much as one above.
      value = max(value, 1 - value)
      holds = value <= MOST_ONE_SIDED
      result.append((f"AUC with the {words} hidden", value, MOST_ONE_SIDED, holds))
  return result


def check_gates(measured: Mapping[str, Any]) -> None:
  """Raises MissedGates unless all gates hold."""
  if missed := [name for name, *_, holds in gates(measured) if not holds]:
    raise MissedGates(
      f"missed: {', '.join(missed)}; train longer, or on more triples of the sources and "
      "categories that the page shows to be low, before any reinforcement learning"
    )


def page(measured: Mapping[str, Any]) -> str:
  """The page in Markdown: the gates, and metrics by source, by category and by both."""
  rows = []
  for name, value, bound, holds in gates(measured):
    sign = "at most" if bound == MOST_ONE_SIDED else "at least"
    rows.append([name, f"{value:.3f}", f"{sign} {bound:.2f}", "ok" if holds else "MISSED"])
  lines = ["# A reward model's answers\n", markdown.table(["gate", "value", "bound", ""], rows)]
  lines.append(
    f"\ntau {measured['tau']:.3f}; AUC within {measured['groups']} groups of a policy "
    f"{measured['group_auc']:.3f}, about the user's own prompts "
    f"{measured['group_auc_verbatim']:.3f}."
  )
  for what in ("sources", "categories", "cells"):
    parts = ({"all": measured["all"]} if what == "sources" else {}) | measured[what]
    head = [what, "n", "yes", "accuracy", "AUC", "Brier", "log loss", "ECE"]
    lines.append("\n" + markdown.table(head, _rows(parts)))
  if "float_uint8" in measured:
    lines.append(f"\nLargest |R(floats) - R(uint8)|: {measured['float_uint8']:.4f}.")
  if "ascent" in measured:
    (before, after), (_, strict) = measured["ascent"]["reward"], measured["ascent"]["verifier"]
    lines.append(
      f"\n{ASCENT_STEPS} steps along the gradient in the pixels of {ASCENT_PICTURES} scenes with "
      f"one thing wrong: R from {before:.3f} to {after:.3f}, the verifier from 0 to {strict:.3f}."
    )
  return "\n".join(lines) + "\n"


def _rows(parts: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
  """Cells of `metrics.summary` of each part."""
  keys = ("yes", "accuracy", "auc", "brier", "log_loss", "ece")
  for name, part in parts.items():
    cells = ["" if np.isnan(part[key]) else f"{part[key]:.3f}" for key in keys]
    yield [name, str(part["n"]), *cells]


def float_uint8(
  model: learned.RewardModel, params: Any, decoded: np.ndarray, prompts: Sequence[str]
) -> float:
  """The largest difference between scores of decoded pictures, [N, H, W, 3] float32, and of their
  uint8 versions.
  """
  levels = np.asarray(vae_lib.to_uint8(decoded))
  scores = [
    metrics.probability(margins(model, params, pixels, prompts, "comparing"), model.tau)
    for pixels in (decoded, levels)
  ]
  return float(np.abs(scores[0] - scores[1]).max())


def ascent(model: learned.RewardModel, params: Any, seed: int) -> dict[str, tuple[float, float]]:
  """Gradient ascent in the pixels of scenes with one thing wrong: a test of adversarial pictures.

  It takes ASCENT_STEPS steps of root mean square ASCENT_STEP. If the model's reward rises but the
  verifier's score does not, the model has adversarial pictures.

  Returns:
    {"reward": of the model, "verifier": the strict score}: (mean before, mean after).
  """
  rng = np.random.default_rng(seed)
  pictures, asked = [], []
  while len(pictures) < ASCENT_PICTURES:
    example = prompts_lib.sample(rng, "validation")
    picture = world.look(renderer.render(world.changed(rng, example.scene), rng))
    if not picture.shows(example.metadata):
      pictures.append(picture.pixels)
      asked.append(example.metadata)
  questions = model.questions([prompts_lib.plain(metadata) for metadata in asked])
  pixels = np.stack([images_lib.to_array(image) for image in pictures])

  @jax.jit
  def climb(params, pixels):
    def step(_, pixels):
      gradient = jax.grad(lambda p: model.score(params, p, questions).sum())(pixels)
      size = jnp.sqrt(jnp.mean(gradient**2, axis=(1, 2, 3), keepdims=True))
      return jnp.clip(pixels + ASCENT_STEP * gradient / jnp.maximum(size, 1e-20), -1, 1)

    return jax.lax.fori_loop(0, ASCENT_STEPS, step, pixels)

  after = np.asarray(climb(params, pixels))
  levels = np.round(255 * (after / 2 + 0.5)).astype(np.uint8)
  score = jax.jit(model.score)
  strict = [verifier.verify(image, metadata)[0] for image, metadata in zip(levels, asked)]
  return {
    "reward": tuple(float(score(params, p, questions).mean()) for p in (pixels, after)),
    "verifier": (0.0, float(np.mean(strict))),
  }


def write_folder(
  trained: pathlib.Path, out: pathlib.Path, model: learned.RewardModel, measured: Mapping[str, Any]
) -> None:
  """Writes a reward model's folder: the trained network and a reward.json.

  An existing folder is replaced once the new one is complete.

  Raises:
    InputError: it cannot be written.
  """
  others = [path for path in sorted(trained.iterdir()) if path.is_file()]
  folders.check_target(
    trained, out, overwrite=True, needed_bytes=sum(path.stat().st_size for path in others)
  )
  record = {
    "question": model.question, "yes_id": model.yes_id, "no_id": model.no_id, "tau": model.tau,
    "readout": model.readout, "vit_max": model.vit_max, "prompt_form": model.prompt_form,
    "clip": model.clip,
    "checksums": {
      path.name: list(checksums.of(path)) for path in others if path.name != learned.FILE
    },
    "metrics": measured_lib.plain(measured),
  }
  with locks.staging(out, last=(learned.FILE,)) as staged:
    for path in others:
      if path.name != learned.FILE:
        (staged / path.name).write_bytes(path.read_bytes())
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    (staged / learned.FILE).write_text(text, encoding="utf-8")
