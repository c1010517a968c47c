"""Sampling text, with a language model small enough to know its answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.sampling import text

START, END = 8, 9


def _keys(seeds):
  return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def _fed(script):
  """A step that remembers what it was fed and wants to say `script[row][i]` at step i."""
  script = jnp.asarray(script)

  def step(context, ids, active):
    fed, count = context
    rows = jnp.arange(len(ids))
    fed = fed.at[rows, count].set(jnp.where(active, ids, fed[rows, count]))
    logits = 50.0 * jax.nn.one_hot(script[rows, count], 10)
    return (fed, count + active), logits

  return step, (jnp.full((len(script), 12), -1), jnp.zeros(len(script), jnp.int32))


def _sample(script, max_tokens, **options):
  step, context = _fed(script)
  options = {"temperature": 0.0, "keys": _keys(range(len(script)))} | options
  return text.sample(
    step, context, start_id=START, end_id=END, max_tokens=max_tokens, **options
  )


def test_rows_end_each_at_its_own_terminator():
  rollout, (fed, count) = _sample([[1, 2, END] + [5] * 9, [3, END] + [5] * 10], 5)
  assert rollout.ids.tolist() == [[1, 2, END, 0, 0], [3, END, 0, 0, 0]]
  assert rollout.mask.sum(axis=1).tolist() == [3, 2]
  assert rollout.finished.tolist() == [True, True]
  assert fed[0, :4].tolist() == [START, 1, 2, END] and fed[1, :3].tolist() == [START, 3, END]
  assert count.tolist() == [4, 3]  # An ended row is fed nothing more.


def test_a_row_cut_at_the_limit_is_closed_all_the_same():
  rollout, (fed, count) = _sample([[1, 2, 3, 4] + [5] * 8, [END] + [5] * 11], 3)
  assert rollout.ids.tolist() == [[1, 2, 3], [END, 0, 0]]
  assert rollout.finished.tolist() == [False, True]
  assert fed[0, :5].tolist() == [START, 1, 2, 3, END] and fed[1, :2].tolist() == [START, END]
  assert count.tolist() == [3 + text.EXTRA_SLOTS, 2]


def test_a_terminator_as_the_last_allowed_token_counts_as_finished():
  rollout, (fed, _) = _sample([[1, END] + [5] * 10], 2)
  assert rollout.finished.tolist() == [True] and fed[0, :3].tolist() == [START, 1, END]


def test_it_stops_when_every_row_has_ended():
  steps = []
  _sample([[1, END] + [5] * 10], 10, on_step=lambda step: steps.append(int(step)))
  jax.effects_barrier()
  assert sorted(steps) == [0, 1, 2]


def test_inactive_rows_are_left_alone():
  rollout, (fed, count) = _sample(
    [[1, END] + [5] * 10, [2] * 12], 4, active=jnp.array([True, False])
  )
  assert count.tolist() == [3, 0] and (fed[1] == -1).all() and not rollout.mask[1].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logp_is_the_log_softmax_at_the_sampling_temperature(temperature):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)), jnp.float32)
  ids, logp = text.sample_tokens(logits, _keys(range(4)), temperature)
  want = jax.nn.log_softmax(logits / temperature)[jnp.arange(4), ids]
  np.testing.assert_allclose(logp, want, rtol=1e-6)


def test_the_likeliest_tokens_of_each_place_are_recorded():
  rollout, _ = _sample([[1, 2, END] + [5] * 9, [END] + [5] * 11], 4, top=2)
  plain, _ = _sample([[1, 2, END] + [5] * 9, [END] + [5] * 11], 4)
  assert rollout.ids.tolist() == plain.ids.tolist() and plain.top_ids is None
  assert rollout.top_ids.shape == rollout.top_logp.shape == (2, 4, 2)
  assert rollout.top_ids[0, :3].tolist() == [[1, 0], [2, 0], [END, 0]]
  assert rollout.top_ids[1, 0].tolist() == [END, 0]
  expected = np.array([50.0, 0.0]) - np.log(np.exp(50.0) + 9)
  np.testing.assert_allclose(rollout.top_logp[0, 0], expected, atol=1e-5)


def test_greedy_takes_the_lowest_id_among_ties():
  ids, logp = text.sample_tokens(jnp.array([[0.0, 2.0, 2.0]]), _keys([0]), 0.0)
  assert ids.tolist() == [1]
  np.testing.assert_allclose(logp, np.log(np.e**2 / (1 + 2 * np.e**2)), rtol=1e-6)


@pytest.mark.parametrize("vocab", [2, 10, 640])
def test_draws_are_those_of_jax(vocab):
  """Rounded scores have ties, and impossible tokens are never drawn."""
  rng = np.random.default_rng(vocab)
  logits = jnp.asarray(np.round(rng.normal(size=(50, vocab)), 1), jnp.float32)
  logits = logits.at[:, vocab // 2 + 1 :].set(-jnp.inf)
  keys = _keys(range(50))
  ids, _ = text.sample_tokens(logits, keys, 1.0)
  assert ids.tolist() == jax.vmap(jax.random.categorical)(keys, logits).tolist()
  ids, _ = text.sample_tokens(logits, keys, 0.0)
  assert ids.tolist() == logits.argmax(axis=1).tolist()


def test_a_row_that_is_not_a_number_has_a_token_and_says_so():
  logits = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 9.0, 1.0]])
  ids, logp = text.sample_tokens(logits, _keys([0, 1]), 0.0)
  assert ids.tolist() == [2, 1] and np.isnan(logp[0]) and np.isfinite(logp[1])


def test_draws_follow_the_distribution():
  """20,000 draws from softmax([0, 1, 2]): within five standard deviations of its probabilities."""
  count, logits = 20_000, jnp.array([0.0, 1.0, 2.0])
  ids, _ = text.sample_tokens(jnp.tile(logits, (count, 1)), _keys(range(count)), 1.0)
  want = jax.nn.softmax(logits)
  got = jnp.bincount(ids, length=3) / count
  assert (jnp.abs(got - want) < 5 * jnp.sqrt(want * (1 - want) / count)).all()


def test_a_row_draws_the_same_whatever_its_neighbours():
  def sample(seeds):
    step = lambda context, ids, active: (context, jnp.zeros((len(seeds), 10)))
    return text.sample(
      step, (), keys=_keys(seeds), start_id=START, end_id=END, max_tokens=8, temperature=1.0
    )[0]

  together, alone = sample([3, 1, 2]), sample([1])
  np.testing.assert_array_equal(together.ids[1], alone.ids[0])
  np.testing.assert_array_equal(together.logp[1], alone.logp[0])
  assert not (together.ids[0] == together.ids[1]).all()
