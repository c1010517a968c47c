"""A context that several rows go on from is, to each of them, its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax import types
from unigrpo_jax.models import bagel

ATOL = 1e-5
COPIES, IMAGES = 2, 2


@pytest.fixture(scope="module")
def call(model, params):
  """call(method, *args): on the golden weights."""
  small = model.clone(remat=False)
  run = jax.jit(
    lambda params, method, args: small.apply({"params": params}, *args, method=method),
    static_argnums=1,
  )
  return lambda method, *args: run(params["bagel"], method, args)


def _text(rng, lengths, width):
  mask = np.arange(width) < np.array(lengths)[:, None]
  return jnp.asarray(rng.integers(3, 250, mask.shape) * mask, jnp.int32), jnp.asarray(mask)


@pytest.fixture(scope="module")
def grown(config, call):
  """Two rows with a system prompt and a prompt, continued twice each; and four whole rows."""
  rng = np.random.default_rng(0)
  system, prompt = _text(rng, [3, 3], 3), _text(rng, [4, 2], 5)
  words = _text(rng, [3, 1, 2, 3], 4)
  shared, _ = call("append_text", bagel.empty_context(config, 2, 9, jnp.float32), *system)
  before = shared.mark()
  shared, _ = call("append_text", shared, *prompt)
  forked = bagel.fork(config, shared, COPIES, 6)
  after = forked.mark()
  forked, hidden = call("append_text", forked, *words)
  again = lambda pair: [jnp.repeat(a, COPIES, axis=0) for a in pair]
  whole, _ = call("append_text", bagel.empty_context(config, 4, 14, jnp.float32), *again(system))
  marks = [whole.mark()]
  whole, _ = call("append_text", whole, *again(prompt))
  marks.append(whole.mark())
  whole, want = call("append_text", whole, *words)
  mask = words[1][..., None]
  np.testing.assert_allclose(hidden * mask, want * mask, atol=ATOL)
  return forked, (before, after), whole, marks


def _velocity(config, call, context):
  count = 4 * IMAGES
  x = jax.random.normal(jax.random.key(0), (count, 4, config.latent_dim))
  t = jnp.linspace(0.1, 1.0, count)
  grid = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), joint.grid(config))
  return call("velocity", context, x, t, grid)


def test_forked_rows_equal_rows_of_their_own(config, call, grown):
  """What they go on to write (in the fixture) and the images over it."""
  forked, _, whole, _ = grown
  got, want = _velocity(config, call, forked), _velocity(config, call, whole)
  np.testing.assert_allclose(got, want, atol=ATOL)
  np.testing.assert_array_equal(forked.position, whole.position)
  # Nothing was copied: the prefix has the two rows that were read.
  assert forked.prefix.k.shape[1] == 2 and forked.k.shape[2] == 6


@pytest.mark.parametrize("moment", [0, 1], ids=["within the prefix", "at the fork"])
def test_moments_of_a_shared_context(config, call, grown, moment):
  forked, marks, whole, whole_marks = grown
  now = _velocity(config, call, forked)
  got = _velocity(config, call, forked.as_of(marks[moment]))
  want = _velocity(config, call, whole.as_of(whole_marks[moment]))
  np.testing.assert_allclose(got, want, atol=ATOL)
  assert float(jnp.abs(got - now).max()) > 1e-2


def test_places_count_on_from_the_prefix(grown):
  forked, (before, after), _, _ = grown
  assert (int(before.place), int(after.place), int(forked.place)) == (3, 9, 13)
  assert [part.order.shape for part in forked.parts] == [(4, 6), (2, 9)]
  real = forked.order != types.UNSEEN
  assert int(forked.order[real].min()) == 9


def test_reading_at_once_equals_appending(config, call):
  """With padding in the middle, at the start and at the end of rows."""
  rng = np.random.default_rng(1)
  mask = np.array([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
  mask = np.concatenate([mask, mask[:1]])
  ids = jnp.asarray(rng.integers(3, 250, mask.shape), jnp.int32)
  read, hidden = call("read_text", ids, jnp.asarray(mask))
  appended, want = call(
    "append_text", bagel.empty_context(config, 4, 7, jnp.float32), ids, jnp.asarray(mask))
  np.testing.assert_allclose(hidden * mask[..., None], want * mask[..., None], atol=ATOL)
  for name in ("order", "position", "cursor"):
    np.testing.assert_array_equal(getattr(read, name), getattr(appended, name))
  chex.assert_trees_all_close(
    _velocity(config, call, read), _velocity(config, call, appended), atol=ATOL)
  # The same row without its padding.
  alone, _ = call("read_text", ids[:1][:, mask[0]].repeat(4, axis=0), jnp.ones((4, 5), bool))
  np.testing.assert_allclose(
    _velocity(config, call, alone)[:IMAGES], _velocity(config, call, read)[:IMAGES], atol=ATOL)
