"""The bodies of the reward protocol, valid and malformed."""

import numpy as np
import pytest

from tests import reward_requests as shared
from unigrpo_jax import rewards
from unigrpo_jax.rewards import wire


def test_samples_survive_the_wire():
  rng = np.random.default_rng(0)
  sent = [
    rewards.Sample(
      prompt, rng.integers(0, 256, (3, 5, 3), np.uint8), text, {"tag": "x", "include": [{"n": 1}]}
    )
    for prompt, text in (("", None), ("caf\u00e9 \U0001f600", ""), ("half \ud83d", "line\nline"))
  ]
  received = wire.unpack(wire.pack(sent))
  assert len(received) == 3
  for before, after in zip(sent, received):
    assert (after.prompt, after.text) == (before.prompt, before.text)
    assert after.metadata == before.metadata
    np.testing.assert_array_equal(after.image, before.image)
    assert after.image.dtype == np.uint8


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"image": np.zeros((2, 2, 3), np.float32)}, ValueError),
    ({"image": np.zeros((2, 2), np.uint8)}, ValueError),
    ({"metadata": {"a": shared.NAN}}, ValueError),
    ({"metadata": {"a": {1, 2}}}, TypeError),
  ],
)
def test_what_cannot_be_packed(change, error):
  with pytest.raises(error):
    wire.pack([rewards.Sample(**{"prompt": "", "image": np.zeros((2, 2, 3), np.uint8)} | change)])


@pytest.mark.parametrize("name", shared.MALFORMED)
def test_malformed_bodies_are_refused_in_a_line(name):
  words, body = shared.MALFORMED[name]
  with pytest.raises(ValueError) as caught:
    wire.unpack(body)
  assert words in str(caught.value)


def test_declared_bodies_fail_for_what_they_declare():
  """`shared.declared` itself is valid: with an honest header it is read."""
  honest = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2, 3)}"
  (sample,) = wire.unpack(shared.declared(honest))
  assert sample.image.shape == (2, 2, 3)
