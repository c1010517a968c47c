"""The numbers that a reward may return: every real dtype, of whatever library."""

import dataclasses
import decimal
import fractions
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import reward_requests as shared
from tests.refusals import refusal
from unigrpo_jax import rewards


class Tensor:
  """Of PyTorch, as far as numpy sees one: it refuses to be an array, by its gradient or dtype."""

  def __init__(self, *values):
    self.values, self.shape = values, (len(values),)

  def __array__(self, dtype=None, copy=None):
    raise RuntimeError("Can't call numpy() on Tensor that requires grad")

  def __len__(self):
    return len(self.values)

  def tolist(self):
    return list(self.values)


class Scalar:
  """A tensor without axes, with a gradient."""

  shape = ()

  def __init__(self, value):
    self.value = value

  def __array__(self, dtype=None, copy=None):
    raise TypeError("Got unsupported ScalarType BFloat16")

  def __float__(self):
    return self.value


HALVES = [0.5, 1.0, 2.0]
REAL = {
  **{
    name: np.array(HALVES, getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz")
  },
  **{str(np.dtype(kind)): np.array(HALVES, kind) for kind in (np.float16, float, np.longdouble)},
  "bfloat16 scalars": [ml_dtypes.bfloat16(half) for half in HALVES],
  "mixed": [ml_dtypes.bfloat16(0.5), np.array(1), 2.0],
  "0-d arrays": [np.array(half) for half in HALVES],
  "masked": np.ma.array(HALVES),
  "jax": jnp.array(HALVES, jnp.bfloat16),
  "jax scalars": list(jnp.array(HALVES, jnp.bfloat16)),
  "Decimal": [decimal.Decimal(str(half)) for half in HALVES],
  "Fraction": [fractions.Fraction(half) for half in HALVES],
  "objects": np.array(HALVES, object),
  "tensor": Tensor(*HALVES),
  "tensors": [Scalar(half) for half in HALVES],
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_dtype_counts(name):
  scores = rewards.evaluate(lambda samples: REAL[name], shared.numbered(3))
  assert scores.values.dtype == np.float32 and scores.reason is None
  np.testing.assert_array_equal(scores.values, HALVES)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, bool, ml_dtypes.int4, object])
def test_integers_of_any_dtype_count(dtype):
  scores = rewards.evaluate(lambda samples: np.array([1, 0, 1], dtype), shared.numbered(3))
  np.testing.assert_array_equal(scores.values, [1, 0, 1])


@pytest.mark.parametrize(
  ("item", "words"),
  [
    (None, "None is no real number"), ("2", "'2' is no real number"), (2j, "2j is no"),
    (np.complex64(1), "(1+0j)"), ([1.0], "[1.0] is no"), (b"1", "b'1' is no"),
    (10**400, "inf is not finite"), (decimal.Decimal("NaN"), "no score for 1 of 3"),
  ],
)
def test_what_is_no_number_costs_its_own_sample(item, words):
  given = np.fromiter([1.0, item, decimal.Decimal(3)], object, 3)
  scores = rewards.evaluate(lambda samples: given, shared.numbered(3))
  np.testing.assert_array_equal(scores.values, [1, shared.NAN, 3])
  assert words in scores.reason


def test_what_is_masked_has_no_score():
  masked = np.ma.array([1, 2, 3], mask=[0, 1, 0])
  scores = rewards.evaluate(lambda samples: masked, shared.numbered(3))
  np.testing.assert_array_equal(scores.values, [1, shared.NAN, 3])


# What comes with the numbers.


@pytest.mark.parametrize(
  ("reason", "shown"),
  [
    (ValueError("no\nface"), "no face"), (["no face"], "['no face']"), ("", "no score for 1 of 2"),
    ("long " * 1000, "long"),
  ],
)
def test_a_reason_may_be_anything(reason, shown):
  given = rewards.Scores(np.array([np.nan, 1]), reason, np.bool_(True))
  one = rewards.Scorer({"r": lambda samples: given}, {"r": 1.0})
  scores = one.submit(shared.numbered(2)).scores(10)["r"]
  np.testing.assert_array_equal(scores.values, [shared.NAN, 1])
  assert shown in scores.reason and len(scores.reason) <= 1000
  assert json.loads(json.dumps(dataclasses.astuple(one.worst_failure())))[1] is True
  one.close()


@pytest.mark.parametrize("details", [["a", None], [[1], None], {"a": 1, "b": 2}, [1, 2]])
def test_details_are_mappings(details):
  given = rewards.Scores(np.ones(2), details=details)
  with pytest.raises(ValueError, match="details must be mappings"):
    rewards.evaluate(lambda samples: given, shared.numbered(2))


class Described:
  """A reward whose `settings` and `fingerprint` are whatever is given."""

  def __init__(self, settings=None, fingerprint=None):
    self.settings, self.fingerprint = settings, fingerprint

  def __call__(self, samples):
    return shared.value(samples)


class Failing(Described):
  settings = fingerprint = property(lambda self: 1 / 0)

  def __init__(self):
    pass


def test_settings_that_fail_cost_no_scores():
  of = lambda reward: rewards.Scorer({"r": reward}, {"r": 1.0}).settings()
  assert of(Described()) == {}
  assert of(Described({"a": np.float32(0.5), "b": np.arange(2), "c": complex})) == {
    "r": {"a": 0.5, "b": [0, 1], "c": "<class 'complex'>"}
  }
  assert "ZeroDivisionError" in of(Failing())["r"]["left_out"]
  assert "left_out" in of(Described(lambda: {}))["r"]


@pytest.mark.parametrize(
  ("reward", "words"),
  [
    (Failing(), "has no fingerprint: ZeroDivisionError"), (Described(fingerprint=b"x"), "b'x'"),
    (Described(fingerprint=lambda: "x"), "must be text"),
  ],
)
def test_a_fingerprint_is_text(reward, words):
  one = rewards.Scorer({"r": reward}, {"r": 1.0})
  assert words in refusal(one.fingerprints)
