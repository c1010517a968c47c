"""The numbers that a reward may return: every real dtype, of whatever library."""

import decimal
import fractions

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import reward_requests as shared
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
