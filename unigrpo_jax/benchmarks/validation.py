"""The evaluations within a run: fixed prompts and noise, before training and at intervals."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.benchmarks import evaluation, measured, scoring
from unigrpo_jax.data import progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline, requests, rollout
from unigrpo_jax.runtime import hosts, stopping

PANELS = 4  # prompts whose pictures the log gets


@dataclasses.dataclass(frozen=True)
class ValidationSpec:
  """What is evaluated, and how.

  Attributes:
    every: steps from one to the next; 0: never.
    source, split: of the prompts, and `prompts`, how many of them.
    batch_size: rows at once, all hosts together.
    modes: see `evaluation.Mode.parse`; the best checkpoint is that with the highest reward in the
      first.
    settings: how images are sampled; the guidance is that of the modes with guidance.
    keep: prompts whose images are saved.
    images: of each prompt.
    size: height and width of an image in pixels.
    seed: see `evaluation.image_seed`.
  """

  every: int
  source: str
  split: str
  prompts: int
  batch_size: int
  modes: tuple[str, ...]
  settings: requests.Settings
  keep: int
  images: int
  size: tuple[int, int]
  seed: int


class Validation:
  """Evaluates parameters and keeps the results of each step in a folder."""

  def __init__(
    self, spec: ValidationSpec, sampler: rollout.Rollout, scorer: rewards.Scorer,
    folder: pathlib.Path,
  ):
    """Prepares the prompts; nothing where `spec.every` is 0.

    Args:
      spec: what is evaluated.
      sampler: of the run, whose network and autoencoder are used.
      scorer: rewards of the run.
      folder: gets a folder a step.

    Raises:
      InputError: a prompt, a mode or a number is impossible.
    """
    self._sampler, self._scorer, self._folder = sampler, scorer, folder
    if not spec.every:
      return
    self._modes = [evaluation.Mode.parse(mode) for mode in spec.modes]
    prompt_set = prompts_lib.open_set(spec.source, spec.split)
    examples = [prompt_set[i] for i in range(min(spec.prompts, len(prompt_set)))]
    self._of_geneval = spec.source != prompts_lib.ICONWORLD and measured.is_geneval(examples)
    self._pictures = len(self._modes) * len(examples) * spec.images
    drawing = pipeline.Pipeline(sampler.network)
    drawing.params = {"vae": sampler.sampler.vae_params}
    self._evaluation = evaluation.Evaluation(
      drawing, examples, self._score, settings=spec.settings, modes=self._modes,
      batch_size=spec.batch_size, seed=spec.seed, num_saved_images=spec.keep, size=spec.size,
      images=spec.images,
    )

  def _score(self, samples):
    scores = scoring.score(self._scorer, samples, self._wait)
    values = {name: part.values for name, part in scores.items()}
    return scores | {"reward": self._scorer.total(values)}

  def __call__(
    self, params: Any, step: int, between: Callable[[], None], wait: scoring.Wait = stopping.wait
  ) -> dict[str, Any]:
    """Evaluates parameters of the network after `step` steps.

    Args:
      params: of a training state.
      step: names the folder.
      between: called between two batches; may raise to stop.
      wait: for the rewards; may raise to stop.

    Returns:
      {`metric`/REWARD: mean}, of GenEval's prompts {`metric`/REWARD/TAG: mean} too, and on the
      first host panels of the first pictures.

    Raises:
      InputError: too many pictures have no reward, or the folder cannot be written to.
    """
    self._wait = wait
    with progress.bar(self._pictures, "evaluating", unit="pictures", enabled=hosts.first()) as bar:
      def report(_: str, done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done < total:
          between()

      results = self._evaluation.run(self._sampler.sampler.cast_and_reshard(params), report)
    totals = np.array([row.rewards.get("reward", np.nan) for row in results.rows])
    scoring.check(self._scorer, totals)
    with hosts.raise_on_all_hosts():
      if hosts.first():
        results.save(self._folder / f"{step:06d}", f"after {step} steps")
    said = ", ".join(f"{mode.name} {results.mean(mode, 'reward'):.3f}" for mode in self._modes)
    prompts = len({row.number for row in results.rows})
    hosts.print_first(f"evaluated {prompts} prompts at step {step}: reward {said}")
    shown = enumerate(results.panels(PANELS)) if hosts.first() else ()
    means = {
      f"{metric(mode.name)}/{name}": results.mean(mode, name)
      for mode in self._modes for name in results.rewards
    } | (self._by_tag(results) if self._of_geneval else {})
    return {f"samples/eval/{number}": panel for number, panel in shown} | {
      name: mean for name, mean in means.items() if np.isfinite(mean)
    }

  def _by_tag(self, results: evaluation.Results) -> dict[str, float]:
    """{`metric`/REWARD/TAG: mean of the tag's images}, and /overall, the mean of the tags."""
    made = {}
    for mode, of_mode in measured.by_mode(results, names=results.rewards).items():
      for name, summary in of_mode.items():
        parts = summary.tasks | {"overall": summary.overall}
        made |= {f"{metric(mode)}/{name}/{tag}": part.mean for tag, part in parts.items()}
    return made


def metric(mode: str) -> str:
  """What the log calls a mode, by its name or what `Mode.parse` takes for it."""
  return f"eval/{evaluation.Mode.parse(mode).name.replace(' + ', '+')}"
