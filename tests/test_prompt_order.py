"""The order in which a run uses the prompts of a set, and continuing in it."""

import json

import numpy as np
import pytest

from tests import refusals
from unigrpo_jax.data import prompts


def numbered(count):
  return prompts.PromptSet([(f"prompt {i}", {"n": i}) for i in range(count)])


def numbers(step):
  return [prompt.metadata["n"] for prompt in step]


def test_order_is_a_permutation_by_seed_and_epoch():
  twenty = numbered(20)
  orders = [twenty.order(seed, epoch) for seed in range(3) for epoch in range(3)]
  for order in orders:
    assert sorted(order.tolist()) == list(range(20))
  assert len({tuple(order) for order in orders}) == 9
  np.testing.assert_array_equal(twenty.order(1, 2), orders[5])


def test_order_stays_what_it_was():
  """A resumed run continues in this order, so no release may change it."""
  assert numbered(8).order(0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
  assert numbered(8).order(7, 1).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_order_favours_no_place():
  """The mean place of each prompt over many epochs is the middle, within 5 standard errors."""
  six = numbered(6)
  places = np.array([np.argsort(six.order(0, epoch)) for epoch in range(600)])
  error = np.sqrt(35 / 12 / 600)  # of a uniform place in 0..5
  assert np.abs(places.mean(axis=0) - 2.5).max() < 5 * error


def test_the_fingerprint_is_that_of_all_prompts_and_their_metadata():
  kite, birds = ("a kite", {}), ("two birds", {"tag": "counting"})
  of = lambda *records: prompts.PromptSet(records).fingerprint()
  assert of(kite, birds) == of(kite, birds)
  changed = [
    [kite], [birds, kite], [kite, ("two bird", birds[1])], [kite, (birds[0], {"tag": "colors"})],
  ]
  assert len({of(*records) for records in [[kite, birds], *changed]}) == 5


@pytest.mark.parametrize("count, per_step", [(10, 4), (3, 8), (5, 5), (1, 2)])
def test_every_epoch_uses_every_prompt_in_its_own_order(count, per_step):
  stream = prompts.PromptStream(numbered(count), 2, per_step)
  used = sum((numbers(stream.next()) for _ in range(20)), [])
  for epoch in range(len(used) // count):
    one_epoch = used[epoch * count : (epoch + 1) * count]
    assert one_epoch == numbered(count).order(2, epoch).tolist()


def test_a_restored_stream_continues_from_the_state():
  stream = prompts.PromptStream(numbered(10), 5, 4)
  expected = [numbers(stream.next()) for _ in range(3)]
  state = json.loads(json.dumps(stream.state()))
  assert state == 12
  expected += [numbers(stream.next()) for _ in range(3, 9)]
  another = prompts.PromptStream(numbered(10), 5, 4)
  another.restore(state)
  assert [numbers(another.next()) for _ in range(3, 9)] == expected[3:]
  stream.restore(np.int64(0))
  assert [numbers(stream.next()) for _ in range(9)] == expected


@pytest.mark.parametrize("state", [-1, 1.0, "3", None, True])
def test_bad_state_is_refused(state):
  stream = prompts.PromptStream(numbered(4), 0, 2)
  assert f"prompt position={state!r}" in refusals.refusal(stream.restore, state)


@pytest.mark.parametrize("arguments, words", [
  ((-1, 4), "seed=-1"),
  ((0, 0), "prompts_per_step=0"),
])
def test_impossible_stream_is_refused(arguments, words):
  assert words in refusals.refusal(prompts.PromptStream, numbered(8), *arguments)
