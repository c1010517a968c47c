"""Validation: evaluations during training on fixed prompts and noise."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.benchmarks import evaluation, measured, scoring
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.data import progress
from unigrpo_jax.data import prompts as prompts_lib
from unigrpo_jax.episodes import pipeline, requests, rollout
from unigrpo_jax.runtime import hosts, stopping

PANELS = 4  # prompts whose pictures are shown in the log


@dataclasses.dataclass(frozen=True)
class ValidationSpec:
  """What is evaluated, and how.

  Attributes:
    every: steps between evaluations; 0: never.
    source, split: of the prompts; see `data.prompts.open_set`.
    prompts: number of prompts, the first of the split.
    batch_size: rows sampled together, of all hosts.
    modes: see `evaluation.Mode.parse`. The best checkpoint is the one with the highest reward in
      the first mode.
    settings: how images are sampled; its guidance is used in the modes with guidance.
    keep: number of prompts whose images are saved.
    images: images per prompt.
    size: (height, width) of an image in pixels.
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
  """Evaluates parameters during a run, and saves the results of each evaluation."""

  def __init__(
    self, spec: ValidationSpec, sampler: rollout.Rollout, scorer: rewards.Scorer,
    folder: pathlib.Path,
  ):
    """Prepares the prompts; does nothing where `spec.every` is 0.

    Args:
      spec: what is evaluated.
      sampler: the run's rollout, whose network and autoencoder are used.
      scorer: the run's rewards.
      folder: each evaluation is saved in a subfolder named by its step.

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
    """Scores by reward, and "reward": their weighted sum, [N] float32."""
    scores = scoring.score(self._scorer, samples, self._wait)
    values = {name: part.values for name, part in scores.items()}
    return scores | {"reward": self._scorer.total(values)}

  def __call__(
    self, params: Any, step: int, between: Callable[[], None], wait: scoring.Wait = stopping.wait
  ) -> dict[str, Any]:
    """Evaluates parameters of the network after `step` steps; all hosts call it.

    Args:
      params: the network's, from a training state.
      step: optimizer steps taken; names the folder.
      between: called between batches; may raise to stop.
      wait: how to wait for the rewards; may raise to stop.

    Returns:
      What goes into the log: {`metric`/REWARD: mean}; for GenEval's prompts also
      {`metric`/REWARD/TAG: mean}; on the first host also panels of some pictures.

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

  def _by_tag(self, results: results_lib.Results) -> dict[str, float]:
    """{`metric`/REWARD/TAG: mean over the tag's images}; TAG "overall" is the mean of the tags."""
    made = {}
    for mode, of_mode in measured.by_mode(results, names=results.rewards).items():
      for name, summary in of_mode.items():
        parts = summary.tasks | {"overall": summary.overall}
        made |= {f"{metric(mode)}/{name}/{tag}": part.mean for tag, part in parts.items()}
    return made


def metric(mode: str) -> str:
  """Prefix of a mode's metrics in the log; `mode` is a name or what `Mode.parse` takes."""
  return f"eval/{evaluation.Mode.parse(mode).name.replace(' + ', '+')}"
