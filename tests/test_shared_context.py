"""A context that several rows go on from is, to each of them, its own."""

import itertools

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
  small = model.clone(remat="none")
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
  assert forked.prefix.k.shape[1] == 2 and forked.k.shape[3] == 6


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


# Kind of each segment -> how it is appended; every one fills as many slots.
APPEND = {"text": "append_text", "latents": "append_latents", "patches": "append_patches"}
SLOTS = 6


def _segment(rng, config, kind, rows):
  """Arguments of a segment of `rows` rows, padded; the last row of an image has none."""
  if kind == "text":
    return _text(rng, rng.integers(1, SLOTS, rows), SLOTS)
  mask = np.arange(SLOTS - 2) < np.append(rng.integers(1, SLOTS - 1, rows - 1), 0)[:, None]
  ids = jnp.asarray(rng.integers(0, 9, mask.shape), jnp.int32)
  width = config.latent_dim if kind == "latents" else config.vit.patch_dim
  values = jnp.asarray(rng.uniform(-1, 1, (*mask.shape, width)), jnp.float32)
  if kind == "latents":
    return values, types.LatentGrid(ids, jnp.asarray(mask))
  return (types.Patches(values, ids, jnp.asarray(mask)),)


def _grow(config, call, context, segments):
  """(context, what each segment gave: hidden states of its text or None, positions)."""
  given = []
  for kind, arguments in segments:
    hidden = None
    context = call(APPEND[kind], context, *arguments)
    if kind == "text":
      context, hidden = context
      hidden = jnp.where(arguments[1][..., None], hidden, 0)
    given.append((hidden, context.position))
  return context, given


@pytest.mark.parametrize("sizes, kinds", [
  pytest.param((6,), "text latents patches text patches text", marks=pytest.mark.slow),
  pytest.param((3, 3), "text patches latents text latents text", marks=pytest.mark.slow),
  pytest.param((2, 2, 2), "latents patches text text latents text", marks=pytest.mark.slow),
  pytest.param((2, 1, 2, 1), "patches text latents patches text text", marks=pytest.mark.slow),
  ((1, 2, 1, 1, 1), "text latents text patches latents text"),
  pytest.param(
    (1, 1, 1, 1, 1, 1), "text latents patches text patches text", marks=pytest.mark.slow),
], ids=lambda value: len(value) if isinstance(value, tuple) else "")
def test_a_sequence_in_parts_is_the_uncut_one(config, call, sizes, kinds):
  """Parts chain, with slots left over in each; four rows go on from the two of the last prefix."""
  rng, kinds, last = np.random.default_rng(2), kinds.split(), sum(sizes[:-1])
  segments = [
    (kind, _segment(rng, config, kind, 2 if i < last else 4)) for i, kind in enumerate(kinds)
  ]
  again = lambda tree: jax.tree.map(lambda a: jnp.repeat(a, COPIES, axis=0), tree)
  repeated = [(kind, again(a) if i < last else a) for i, (kind, a) in enumerate(segments)]
  room = SLOTS * len(kinds)
  before, want = _grow(
    config, call, bagel.empty_context(config, 4, room + 3, jnp.float32), repeated[:-1])
  whole, want_last = _grow(config, call, before, repeated[-1:])

  context, got, rest = None, [], iter(segments)
  for part, size in enumerate(sizes):
    slots, copies = SLOTS * size + 1, COPIES if part == len(sizes) - 1 else 1
    if part:
      context = bagel.fork(config, context, copies, slots)
    else:
      context = bagel.empty_context(config, 2 * copies, slots, jnp.float32)
    for segment in itertools.islice(rest, size):
      mark = context.mark()
      context, given = _grow(config, call, context, [segment])
      got += given
  assert len(context.parts) == len(sizes)
  for i, ((hidden, position), (want_hidden, want_position)) in enumerate(
    zip(got, want + want_last, strict=True)
  ):
    if i < last:
      hidden, position = again((hidden, position))
    np.testing.assert_array_equal(position, want_position)
    if hidden is not None:
      np.testing.assert_allclose(hidden, want_hidden, atol=ATOL)
  now, then = _velocity(config, call, context), _velocity(config, call, context.as_of(mark))
  np.testing.assert_allclose(now, _velocity(config, call, whole), atol=ATOL)
  np.testing.assert_allclose(
    then, _velocity(config, call, whole.as_of(before.mark())), atol=ATOL)
  assert float(jnp.abs(now - then).max()) > 1e-3
