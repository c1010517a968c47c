"""Sampling text: one `lax.while_loop` over a preallocated cache, every row with its own key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from unigrpo_jax import types

# What `max_tokens` sampled tokens need in the cache: the start token and a closing terminator too.
EXTRA_SLOTS = 2

StepFn = Callable[[Any, chex.Array, chex.Array], tuple[Any, chex.Array]]


def sample_tokens(logits, keys, temperature: float):
  """Draws one token a row from logits [B, V], the softmax in float32.

  Each row has its own typed PRNG key, [B], so that its draw ignores its neighbours. Temperature 0
  takes the largest logit, the lowest id among ties.

  Returns:
    (ids [B] int32, log-probabilities [B] float32 under softmax(logits / temperature); under
    softmax(logits) at temperature 0).
  """
  chex.assert_rank([logits, keys], [2, 1])
  logits = logits.astype(jnp.float32)
  if temperature > 0:
    logits = logits / temperature
    # What `jax.random.categorical` draws.
    draw = lambda key: jax.random.gumbel(key, logits.shape[1:])
    ids = _first_largest(logits + jax.vmap(draw)(keys))
  else:
    ids = _first_largest(logits)
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)[:, 0]
  return ids, logp


def _first_largest(scores):
  """The lowest index of each row's largest value: [B, V] -> [B] int32; V - 1 where it is NaN.

  Two reductions of one array each; XLA's CPU backend does not vectorise that of `jnp.argmax`.
  """
  last = scores.shape[1] - 1
  largest = scores == scores.max(axis=1, keepdims=True)
  return jnp.where(largest, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=1)


def sample(
  step_fn: StepFn, context: Any, *,
  keys, start_id: int, end_id: int, max_tokens: int, temperature: float, active=None, top: int = 0,
  on_step: Callable[[chex.Array], None] | None = None,
) -> tuple[types.TextRollout, Any]:
  """Samples until every row has ended, and leaves each row's text closed in its context.

  The start token is fed, never sampled. A row that reaches `max_tokens` without a terminator is
  cut: its last token stays, and a terminator is fed that was not sampled. So the context always
  holds [start] ids [end], the very ids that were sampled.

  Args:
    step_fn: (context, ids [B], active [B] bool) -> (context, logits [B, V]); feeds one token to
      the active rows and leaves the others as they were.
    context: what `step_fn` carries, with room for `max_tokens + EXTRA_SLOTS` more tokens.
    keys: [B] typed PRNG keys; token i of a row uses its key folded with i.
    max_tokens: most tokens sampled a row, the terminator included.
    active: rows that take part, [B] bool; None: all of them.
    top: how many of the likeliest tokens are recorded beside each sampled one; 0: none.
    on_step: called on the host with the number of tokens sampled so far.

  Returns:
    (TextRollout with T = max_tokens, the context after the closing token).
  """
  rows = keys.shape[0]
  active = jnp.ones(rows, bool) if active is None else active
  table = lambda dtype: jnp.zeros((rows, max_tokens), dtype)
  blank = types.TextRollout(
    ids=table(jnp.int32), logp=table(jnp.float32), mask=table(bool), finished=jnp.zeros(rows, bool)
  )
  if top:
    likeliest = lambda dtype: jnp.zeros((rows, max_tokens, top), dtype)
    blank = blank.replace(top_ids=likeliest(jnp.int32), top_logp=likeliest(jnp.float32))

  def feed_and_sample(state):
    context, feed, active, step, out = state
    context, logits = step_fn(context, feed, active)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    ids, logp = sample_tokens(logits, step_keys, temperature)
    ended = active & (feed == end_id) & (step > 0)
    sampled = active & ~ended & (step < max_tokens)
    at = jnp.minimum(step, max_tokens - 1)
    put = lambda table, new: table.at[:, at].set(jnp.where(sampled, new, table[:, at]))
    finished = out.finished | (sampled & (ids == end_id))
    if top:
      values, likeliest = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), top)
      # A step that samples nothing any more would write over the last one's.
      at_top = lambda table, new: table.at[:, at].set(
        jnp.where(sampled[:, None], new, table[:, at])
      )
      out = out.replace(
        top_ids=at_top(out.top_ids, likeliest), top_logp=at_top(out.top_logp, values)
      )
    out = out.replace(
      ids=put(out.ids, ids), logp=put(out.logp, logp), mask=put(out.mask, sampled),
      finished=finished,
    )
    if on_step is not None:
      jax.debug.callback(on_step, step)
    return context, jnp.where(sampled, ids, end_id), active & ~ended, step + 1, out

  state = (context, jnp.full(rows, start_id, jnp.int32), active, jnp.int32(0), blank)
  unfinished = lambda state: state[2].any()
  context, _, _, _, out = jax.lax.while_loop(unfinished, feed_and_sample, state)
  return out, context
