"""Rewards of a rollout's episodes: each host scores its own, and all hosts get all scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import time
from typing import Any

import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.benchmarks import contact_sheet, evaluation, monitor
from unigrpo_jax.episodes import sampler
from unigrpo_jax.rewards import threads
from unigrpo_jax.runtime import hosts, panels, stopping

PANELS, COLUMNS = 2, 6  # prompts of a step that a log may show, and trajectories of each
READ_SECONDS = 60.0  # In which the devices end what they have begun.
# How what may never come is waited for: `stopping.wait` without its last argument.
Wait = Callable[[Callable[[float], bool], Callable[[], str]], None]


@dataclasses.dataclass(frozen=True)
class Pending:
  """Scores that are being computed of the trajectories `rows` of an iteration, [n]."""

  rows: np.ndarray
  scores: Any  # see `rewards.Scorer.submit`
  lengths: np.ndarray | None
  finished: np.ndarray | None
  shown: Mapping[int, rewards.Sample]  # those of `rows` that a panel shows
  images: futures.Future[Mapping[str, np.ndarray]] | None  # see `monitor.of_images`


@dataclasses.dataclass(frozen=True)
class Scores:
  """What B trajectories of an iteration scored, the same on all hosts.

  Attributes:
    by_reward: {name: [B] float32}; NaN where a reward gave no score.
    total: what advantages are made of, [B] float32.
    weighted: the weighted sum, not normalised, [B] float32.
    group: which prompt each trajectory is of, [B].
    text: {"lengths", "finished"}: of the sampled text, [B] float32; {} without.
    images: {name: [B] float32}, see `monitor.of_images`; {} where nothing watches them.
    shown: {trajectory: sample} of the first groups, as far as this host has them.
    seconds: {name: that its calls took}, one after another, on this host.
  """

  by_reward: Mapping[str, np.ndarray]
  total: np.ndarray
  weighted: np.ndarray
  group: np.ndarray
  text: Mapping[str, np.ndarray]
  images: Mapping[str, np.ndarray]
  shown: Mapping[int, rewards.Sample]
  seconds: Mapping[str, float]

  def panels(self) -> dict[str, panels.Panel]:
    """The first groups for a log: pictures side by side, with reasonings and rewards."""
    groups: dict[int, list[evaluation.Row]] = {}
    for row, sample in sorted(self.shown.items()):
      scores = {"reward": self.weighted} | dict(self.by_reward)
      groups.setdefault(int(self.group[row]), []).append(evaluation.Row(
        f"#{row + 1}", "", sample.prompt, sample.text,
        {name: float(values[row]) for name, values in scores.items()}, str(row),
      ))
    images = {str(row): sample.image for row, sample in self.shown.items()}
    return {
      f"samples/rollout/{group}": contact_sheet.panel(rows, images)
      for group, rows in groups.items()
    }

  def metrics(self, valid: np.ndarray, ddof: int) -> dict[str, float]:
    """Means of each reward and of the images' statistics; mean and standard deviation of the sum
    where `valid`, [B] bool. Besides, of each reward, its standard deviation, the share of
    trajectories without a score, and the seconds of its calls.
    """
    counting = self.weighted[valid]
    columns = {f"reward/{name}": values for name, values in self.by_reward.items()}
    columns |= {monitor.PREFIX + name: values for name, values in self.images.items()}
    metrics = {
      name: np.nanmean(values) for name, values in columns.items() if np.isfinite(values).any()
    }
    for name, values in self.by_reward.items():
      if np.isfinite(values).any():
        metrics[f"reward_std/{name}"] = np.nanstd(values)
      metrics[f"reward_failed/{name}"] = np.isnan(values).mean()
      metrics[f"seconds/reward/{name}"] = self.seconds.get(name, 0.0)
    metrics |= {
      "reward/mean": counting.mean(), "reward/std": counting.std(ddof=min(ddof, counting.size - 1))
    }
    if self.text:
      metrics |= {
        "text/length": self.text["lengths"].mean(),
        "text/truncated": 1 - self.text["finished"].mean(),
      }
    return metrics


class Scoring:
  """Scores episodes in threads while the next ones are sampled.

  One thread waits for images and words, and hands them to those of the rewards.
  """

  def __init__(
    self, scorer: rewards.Scorer, group_size: int, normalise: bool, watch_images: bool = False
  ):
    """`normalise`: each reward within its group before they are summed. `watch_images`: with the
    statistics of `monitor.of_images`, in a thread of their own.
    """
    self._scorer, self._group_size, self._normalise = scorer, group_size, normalise
    self._reader = threads.Pool(1, "episodes")
    self._statistics = threads.Pool(1, "statistics") if watch_images else None

  def submit(
    self, prompts: Sequence[Any], episode: sampler.Episode, first: int
  ) -> futures.Future[Pending]:
    """Begins to score this host's trajectories of a chunk; waits for nothing.

    Args:
      prompts: of the chunk, with `prompt` and `metadata`.
      episode: their groups.
      first: number of the chunk's first trajectory in the iteration.
    """
    # Not the episode: until then the thread would hold all that it recorded.
    return self._reader.submit(self._read, prompts, episode.read, first)

  def _read(
    self, prompts: Sequence[Any], read_episode: Callable[[], sampler.HostRows], first: int
  ) -> Pending:
    read, samples = read_episode(), []
    for place, (row, image) in enumerate(zip(read.rows, read.images)):
      prompt = prompts[row // self._group_size]
      text = None if read.texts is None else read.texts[place]
      samples.append(rewards.Sample(prompt.prompt, image, text, prompt.metadata))
    text, images = read.text, None
    if self._statistics is not None:
      groups = (read.rows // self._group_size).tolist()
      images = self._statistics.submit(monitor.of_images, read.images, groups)
    shown = {
      row: sample for row, sample in zip((first + read.rows).tolist(), samples)
      if row < PANELS * self._group_size and row % self._group_size < COLUMNS
    }
    return Pending(
      first + read.rows, self._scorer.submit(samples),
      None if text is None else np.float32(text.mask.sum(axis=1)),
      None if text is None else np.float32(text.finished), shown, images,
    )

  def gather(
    self, chunks: Sequence[futures.Future[Pending]], prompts: int, wait: Wait = stopping.wait
  ) -> Scores:
    """The scores of all chunks of an iteration, on every host those of all hosts.

    Raises:
      Diverged: what was sampled is not finite.
      InputError: too many samples have no reward; `Unavailable` where that may be otherwise later.
      Stopped: `wait` was stopped.
    """
    wait(lambda seconds: _finished(chunks, seconds), lambda: _awaited(chunks))
    with hosts.raise_on_all_hosts():
      pending = [chunk.result() for chunk in chunks]
      scores = [part.scores.result() for part in pending]
      images = [part.images.result() for part in pending if part.images is not None]
    rows = np.concatenate([part.rows for part in pending])
    total = prompts * self._group_size
    merged = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
    by_reward = hosts.gather_rows(rows, merged, total)
    text = {}
    if pending[0].lengths is not None:
      text = hosts.gather_rows(rows, {
        name: np.concatenate([getattr(part, name) for part in pending])
        for name in ("lengths", "finished")
      }, total)
    if images:
      images = hosts.gather_rows(rows, {
        name: np.concatenate([part[name] for part in images]) for name in images[0]
      }, total)
    group = np.repeat(np.arange(prompts), self._group_size)
    result = Scores(
      by_reward, self._scorer.total(by_reward, group, self._normalise),
      self._scorer.total(by_reward), group, text, images or {},
      {row: sample for part in pending for row, sample in part.shown.items()},
      {name: sum(part.scores.seconds.get(name, 0.0) for part in pending) for name in by_reward},
    )
    check(self._scorer, result.total, group)
    return result

  def close(self) -> None:
    self._reader.close()
    if self._statistics is not None:
      self._statistics.close()
    self._scorer.close()
    self._reader.join(READ_SECONDS)  # A thread in the middle of a fetch may crash a program's end.


def score(
  scorer: rewards.Scorer, samples: Sequence[rewards.Sample], wait: Wait = stopping.wait
) -> dict[str, rewards.Scores]:
  """Scores of this host's samples by reward, which each host calls and `wait` waits for."""
  pending = scorer.submit(samples)
  wait(pending.wait, lambda: _names(pending.awaited()))
  return pending.scores()


def check(scorer: rewards.Scorer, total: np.ndarray, group: np.ndarray | None = None) -> None:
  """`Scorer.check` of what all hosts have, which all raise alike: the worst failure of any host."""
  local = json.dumps(dataclasses.astuple(scorer.worst_failure()))
  failures = [rewards.Failure(*json.loads(text)) for text in hosts.gather_texts(local)]
  scorer.check(total, group, max(failures, key=lambda failure: failure.count))


def _finished(chunks: Sequence[futures.Future[Pending]], seconds: float) -> bool:
  """Whether all chunks are read and scored, after waiting so long for them at most."""
  end = time.monotonic() + seconds
  if futures.wait(chunks, seconds).not_done:
    return False
  return all(_wait(part, end - time.monotonic()) for part in _read(chunks))


def _wait(part: Pending, seconds: float) -> bool:
  images = [] if part.images is None else [part.images]
  return part.scores.wait(seconds) and not futures.wait(images, seconds).not_done


def _awaited(chunks: Sequence[futures.Future[Pending]]) -> str:
  """What `_finished` waits for; "" for nothing."""
  if not all(chunk.done() for chunk in chunks):
    return "images"
  names = _names([name for part in _read(chunks) for name in part.scores.awaited()])
  return names or "statistics of images"


def _read(chunks: Sequence[futures.Future[Pending]]) -> list[Pending]:
  """Of the chunks, which are done, those whose reading did not fail."""
  return [chunk.result() for chunk in chunks if chunk.exception() is None]


def _names(awaited: Sequence[str]) -> str:
  return ", ".join(f"reward {name}" for name in dict.fromkeys(awaited))
