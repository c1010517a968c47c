"""The host's part of an iteration does not keep the devices waiting, nor hide what went wrong."""

import functools
import json
import threading
import types as types_lib

import jax
import numpy as np
import pytest

from tests import idle_share, test_train_unigrpo
from unigrpo_jax import errors, rewards, train, types
from unigrpo_jax.algorithms import update
from unigrpo_jax.benchmarks import scoring
from unigrpo_jax.data import prompts
from unigrpo_jax.episodes import rollout, sampler
from unigrpo_jax.runtime import hosts, stopping


@pytest.mark.slow
def test_a_chunk_is_read_while_the_devices_go_on(shallow, tmp_path, monkeypatch):
  """Words are decoded only when what comes next is in the devices' queue, and it gets there: the
  next chunk, and after the last one what the update needs besides advantages."""
  launched, replayed, waited = threading.Event(), threading.Event(), []
  wait, decode = sampler.wait_for_images, sampler.Sampler._decoded
  precompute = update.Update.precompute

  def listen(episode, timer):
    launched.set()
    wait(episode, timer)

  def listen_to_the_update(self, *args):
    experience = precompute(self, *args)
    assert experience.only.velocity_ref is not None and experience.adv is None
    replayed.set()
    return experience

  def late(self, text):
    waited.append((replayed if waited else launched).wait(120))
    return decode(self, text)

  monkeypatch.setattr(update.Update, "precompute", listen_to_the_update)
  monkeypatch.setattr(sampler, "wait_for_images", listen)
  monkeypatch.setattr(sampler.Sampler, "_decoded", late)
  config = test_train_unigrpo._config(shallow, **{"steps": 1, "eval.every": 0})
  last = train.train(config, tmp_path, jax.devices()[:1])
  assert waited == [True, True] and int(last.step) == 2


def _rows(logp):
  blank = np.zeros((2, 2))
  text = types.TextRollout(ids=blank, logp=np.array(logp), mask=blank > 0, finished=blank[0] > 0)
  return sampler.HostRows(np.arange(2), text, ["a", "b"], [np.zeros((2, 2, 3), np.uint8)] * 2)


@pytest.mark.parametrize("logp, finite, words", [
  ([[0, 0], [0, np.nan]], True, "log-probabilities of 1 of 2 reasonings"),
  ([[0, 0], [0, 0]], False, "latents of some images"),
])
def test_what_diverged_is_found_when_it_is_read(logp, finite, words):
  """In a thread; whoever gathers the scores learns of it, and no reward sees it."""
  seen = []
  scorer = rewards.Scorer({"a": lambda samples: seen.append(samples)}, {"a": 1.0})
  made = scoring.Scoring(scorer, group_size=2, normalise=False)
  read = lambda: rollout._read_finite(lambda: _rows(logp), np.bool_(finite))
  chunk = made.submit(["a prompt"], sampler.Episode(None, None, None, read=read), 0)
  with pytest.raises(errors.Diverged, match=words):
    made.gather([chunk], 1)
  made.close()
  assert not seen


def test_the_first_groups_are_shown_with_their_rewards():
  """Two chunks of two prompts: the first two groups, six trajectories of each at most."""
  score = lambda samples: [float(sample.image.mean()) for sample in samples]
  made = scoring.Scoring(rewards.Scorer({"a": score}, {"a": 2.0}), group_size=7, normalise=False)
  chunks = []
  for chunk in (0, 1):
    images = [np.full((2, 2, 3), 14 * chunk + row, np.uint8) for row in range(14)]
    read = sampler.HostRows(np.arange(14), None, [f"thought {i}" for i in range(14)], images)
    prompts = [
      types_lib.SimpleNamespace(prompt=f"prompt {2 * chunk + i}", metadata={}) for i in (0, 1)
    ]
    episode = sampler.Episode(None, None, None, read=lambda read=read: read)
    chunks.append(made.submit(prompts, episode, 14 * chunk))
  shown = made.gather(chunks, 4).panels()
  made.close()
  assert list(shown) == ["samples/rollout/0", "samples/rollout/1"]
  second = shown["samples/rollout/1"]
  assert second.prompt == "prompt 1" and len(second.pictures) == 6
  assert second.pictures[2].label == "#10" and second.pictures[2].text == "thought 9"
  assert second.pictures[2].rewards == {"reward": 18.0, "a": 9.0}
  assert second.sheet.ndim == 3 and "| #10 | reward 18, a 9 | thought 9 |" in second.markdown()


def test_statistics_and_a_reward_of_weight_0_are_only_logged():
  """Its failures too: neither a total nor the check knows of them."""
  first, second = (lambda samples: [0.25] * len(samples)), (lambda samples: [np.nan, *[0.5] * 3])
  scorer = rewards.Scorer({"first": first, "second": second}, {"first": 2.0, "second": 0.0},
                          max_failed_fraction=0.0)
  made = scoring.Scoring(scorer, group_size=2, normalise=False, watch_images=True)
  images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 255, 9, 9)]
  read = sampler.HostRows(np.arange(4), None, None, images)
  given = [types_lib.SimpleNamespace(prompt="a", metadata={})] * 2
  chunk = made.submit(given, sampler.Episode(None, None, None, read=lambda: read), 0)
  scores = made.gather([chunk], 2)
  made.close()
  np.testing.assert_array_equal(scores.total, [0.5] * 4)
  metrics = scores.metrics(np.ones(4, bool), 0)
  assert all(0 <= metrics.pop(f"seconds/reward/{name}") < 60 for name in ("first", "second"))
  assert metrics == {
    "reward/first": 0.25, "reward/second": 0.5, "reward/mean": 0.5, "reward/std": 0.0,
    "reward_std/first": 0.0, "reward_std/second": 0.0, "reward_failed/first": 0.0,
    "reward_failed/second": 0.25,
    "images/saturation": 0.0, "images/sharpness": pytest.approx(0, abs=1e-6),
    "images/clipped": 0.5, "images/diversity": 0.5,
  }


def _hanging():
  """(what scores, a chunk that it waits for, what lets the reward go on)."""
  go = threading.Event()
  scorer = rewards.Scorer({"a": lambda samples: go.wait(60)}, {"a": 1.0})
  made = scoring.Scoring(scorer, group_size=2, normalise=False)
  episode = sampler.Episode(None, None, None, read=lambda: _rows([[0, 0], [0, 0]]))
  return made, made.submit([prompts.Prompt("a prompt", {})], episode, 0), go


def test_a_stop_ends_the_wait_for_a_reward_that_hangs(capsys, monkeypatch):
  monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.0)
  made, chunk, go = _hanging()
  with pytest.raises(stopping.Stopped):
    made.gather([chunk], 1, functools.partial(stopping.wait, stop_requested=lambda: True))
  assert "no longer waiting for reward a, after" in capsys.readouterr().out
  go.set()
  made.close()


def test_the_worst_failure_of_all_hosts_is_everyones(monkeypatch):
  scorer = rewards.Scorer({"a": lambda samples: 1 / 0}, {"a": 1.0})
  scorer.score([rewards.Sample("", np.zeros((1, 1, 3), np.uint8))])
  other = json.dumps([3, True, "reward a: no answer"])
  monkeypatch.setattr(hosts, "gather_texts", lambda text: [text, other])
  with pytest.raises(errors.Unavailable, match="reward a: no answer; run the same command again"):
    scoring.check(scorer, np.full(4, np.nan))
  scorer.close()


def test_gaps_by_hand():
  """Between 0 and 10: 0 to 1, 3 to 4 and 8 to 10; what lies within another one adds nothing."""
  intervals = [(4, 8), (1, 3), (5, 6), (1.5, 2)]
  assert idle_share.gaps(intervals, 0, 10, 0.5) == [(0, 1), (3, 1), (8, 2)]
  assert idle_share.gaps(intervals, 2, 7, 0.5) == [(3, 1)]
  assert idle_share.gaps(intervals, 0, 10, 1.5) == [(8, 2)]
