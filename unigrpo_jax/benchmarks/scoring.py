"""Rewards of a rollout: each host scores its own trajectories, then all hosts get all scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import time
from typing import Any

import numpy as np

from unigrpo_jax import rewards
from unigrpo_jax.benchmarks import contact_sheet, monitor
from unigrpo_jax.benchmarks import results as results_lib
from unigrpo_jax.episodes import sampler
from unigrpo_jax.rewards import threads
from unigrpo_jax.runtime import hosts, panels, stopping

PANELS, COLUMNS = 2, 6  # prompts of an iteration shown in the log, and trajectories of each
READ_SECONDS = 60.0  # At most so long `close` waits for running fetches from the devices.
# (done, what is awaited): waits until `done(seconds)` is True, and may raise to stop waiting; see
# `stopping.wait`.
Wait = Callable[[Callable[[float], bool], Callable[[], str]], None]


@dataclasses.dataclass(frozen=True)
class Pending:
  """One chunk's trajectories of this host, whose scores are still being computed."""

  rows: np.ndarray  # numbers of the trajectories in the iteration, [n]
  scores: Any  # the scorer's `Pending`; see `rewards.Scorer.submit`
  # {"lengths": sampled tokens, "finished": 1 where the text ended by its terminator: [n] float32};
  # {} without text.
  text: Mapping[str, np.ndarray]
  shown: Mapping[int, rewards.Sample]  # the samples of those trajectories that a panel shows
  images: futures.Future[Mapping[str, np.ndarray]] | None  # see `monitor.of_images`


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of the B trajectories of an iteration; the same on all hosts unless noted.

  Attributes:
    by_reward: {reward: [B] float32}; NaN where a reward gave no score.
    total: the total reward, from which advantages are computed, [B] float32.
    weighted: the weighted sum of rewards without normalisation, [B] float32.
    group: number of each trajectory's prompt, [B].
    text: {"lengths", "finished": [B] float32}, see `Pending`; {} without text.
    images: {statistic: [B] float32}, see `monitor.of_images`; {} where they are not watched.
    shown: {trajectory: sample} for panels of the first groups; only this host's own.
    seconds: {reward: total duration of its calls in seconds}, of this host.
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
    """{name in the log: panel} of the first groups: pictures with their reasonings and rewards."""
    groups: dict[int, list[results_lib.Row]] = {}
    for row, sample in sorted(self.shown.items()):
      scores = {"reward": self.weighted} | dict(self.by_reward)
      groups.setdefault(int(self.group[row]), []).append(results_lib.Row(
        f"#{row + 1}", "", sample.prompt, sample.text,
        {name: float(values[row]) for name, values in scores.items()}, str(row),
      ))
    images = {str(row): sample.image for row, sample in self.shown.items()}
    return {
      f"samples/rollout/{group}": contact_sheet.panel(rows, images)
      for group, rows in groups.items()
    }

  def metrics(self, valid: np.ndarray, ddof: int) -> dict[str, float]:
    """Metrics for the log.

    These are: of each reward its mean, its standard deviation, the share of trajectories without a
    score and the seconds of its calls; the means of the image statistics; mean and standard
    deviation of the weighted sum over `valid` trajectories; mean length of the texts and the share
    that was cut.

    Args:
      valid: trajectories that count, [B] bool.
      ddof: of the standard deviation of the weighted sum.
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

  One thread fetches images and texts from the devices and hands them to the rewards' threads.
  """

  def __init__(
    self, scorer: rewards.Scorer, group_size: int, normalise: bool, watch_images: bool = False
  ):
    """Starts the threads.

    Args:
      scorer: of the run; `close` closes it.
      group_size: trajectories per prompt.
      normalise: standardise each reward within its group before summing; see `Scorer.total`.
      watch_images: also compute `monitor.of_images`, in a thread of its own.
    """
    self._scorer, self._group_size, self._normalise = scorer, group_size, normalise
    self._reader = threads.Pool(1, "episodes")
    self._statistics = threads.Pool(1, "statistics") if watch_images else None

  def submit(
    self, prompts: Sequence[Any], episode: sampler.Episode, first: int
  ) -> futures.Future[Pending]:
    """Begins to score this host's trajectories of a chunk; does not wait.

    Args:
      prompts: of the chunk, objects with `prompt` and `metadata`.
      episode: the trajectories of all of them.
      first: number of the chunk's first trajectory in the iteration.
    """
    # Only `read`, not the episode: the thread would keep all of its arrays on the devices alive.
    return self._reader.submit(self._read, prompts, episode.read, first)

  def _read(
    self, prompts: Sequence[Any], read_episode: Callable[[], sampler.HostRows], first: int
  ) -> Pending:
    read, samples = read_episode(), []
    for place, (row, image) in enumerate(zip(read.rows, read.images)):
      prompt = prompts[row // self._group_size]
      text = None if read.texts is None else read.texts[place]
      samples.append(rewards.Sample(prompt.prompt, image, text, prompt.metadata))
    text = {} if read.text is None else {
      "lengths": np.float32(read.text.mask.sum(axis=1)), "finished": np.float32(read.text.finished)
    }
    images = None
    if self._statistics is not None:
      groups = (read.rows // self._group_size).tolist()
      images = self._statistics.submit(monitor.of_images, read.images, groups)
    shown = {
      row: sample for row, sample in zip((first + read.rows).tolist(), samples)
      if row < PANELS * self._group_size and row % self._group_size < COLUMNS
    }
    return Pending(first + read.rows, self._scorer.submit(samples), text, shown, images)

  def gather(
    self, chunks: Sequence[futures.Future[Pending]], prompts: int, wait: Wait = stopping.wait
  ) -> Scores:
    """Waits for the scores of an iteration, and gathers those of all hosts; all hosts call it.

    Args:
      chunks: what `submit` returned, of all chunks of the iteration.
      prompts: of the iteration.
      wait: how to wait.

    Raises:
      Diverged: what was sampled is not finite.
      InputError: too many samples have no reward; its subclass Unavailable where a server failed.
      Stopped: `wait` was stopped.
    """
    wait(lambda seconds: _finished(chunks, seconds), lambda: _awaited(chunks))
    with hosts.raise_on_all_hosts():
      pending = [chunk.result() for chunk in chunks]
      scores = [part.scores.result() for part in pending]
      images = [part.images.result() for part in pending if part.images is not None]
    rows = np.concatenate([part.rows for part in pending])

    def gathered(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
      names = parts[0] if parts else ()
      columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
      return hosts.gather_rows(rows, columns, prompts * self._group_size) if columns else {}

    by_reward = gathered(scores)
    group = np.repeat(np.arange(prompts), self._group_size)
    result = Scores(
      by_reward, self._scorer.total(by_reward, group, self._normalise),
      self._scorer.total(by_reward), group,
      gathered([part.text for part in pending]), gathered(images),
      {row: sample for part in pending for row, sample in part.shown.items()},
      {name: sum(part.scores.seconds.get(name, 0.0) for part in pending) for name in by_reward},
    )
    check(self._scorer, result.total, group)
    return result

  def close(self) -> None:
    """Closes the threads and the scorer."""
    self._reader.close()
    if self._statistics is not None:
      self._statistics.close()
    self._scorer.close()
    self._reader.join(READ_SECONDS)  # A fetch that is still running may crash the exiting program.


def score(
  scorer: rewards.Scorer, samples: Sequence[rewards.Sample], wait: Wait = stopping.wait
) -> dict[str, rewards.Scores]:
  """{reward: scores} of this host's samples; all hosts call it, since `wait` synchronises them."""
  pending = scorer.submit(samples)
  wait(pending.wait, lambda: _names(pending.awaited()))
  return pending.scores()


def check(scorer: rewards.Scorer, total: np.ndarray, group: np.ndarray | None = None) -> None:
  """`Scorer.check` with the worst failure of all hosts, so that all raise the same error."""
  local = json.dumps(dataclasses.astuple(scorer.worst_failure()))
  failures = [rewards.Failure(*json.loads(text)) for text in hosts.gather_texts(local)]
  scorer.check(total, group, max(failures, key=lambda failure: failure.count))


def _finished(chunks: Sequence[futures.Future[Pending]], seconds: float) -> bool:
  """Whether all chunks are read and scored, after waiting at most `seconds` for them."""
  end = time.monotonic() + seconds
  if futures.wait(chunks, seconds).not_done:
    return False
  return all(_is_scored(part, end - time.monotonic()) for part in _successful(chunks))


def _is_scored(part: Pending, seconds: float) -> bool:
  """Whether a chunk's scores and statistics are done; waits at most `seconds` for each."""
  images = [] if part.images is None else [part.images]
  return part.scores.wait(seconds) and not futures.wait(images, seconds).not_done


def _awaited(chunks: Sequence[futures.Future[Pending]]) -> str:
  """What `_finished` waits for, in words for the user."""
  if not all(chunk.done() for chunk in chunks):
    return "images"
  names = _names([name for part in _successful(chunks) for name in part.scores.awaited()])
  return names or "statistics of images"


def _successful(chunks: Sequence[futures.Future[Pending]]) -> list[Pending]:
  """The chunks (all done) whose trajectories could be read from the devices."""
  return [chunk.result() for chunk in chunks if chunk.exception() is None]


def _names(awaited: Sequence[str]) -> str:
  """Names of rewards, for a message."""
  return ", ".join(f"reward {name}" for name in dict.fromkeys(awaited))
