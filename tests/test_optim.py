"""AdamW by group: who is frozen, who is clipped, and the schedules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.models import bagel
from unigrpo_jax.runtime import optim, sharding

OPTIONS = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)


def _schedules(**rates):
  constant = lambda rate: lambda _: rate
  return {g: constant(rates[g]) if g in rates else None for g in optim.GROUPS}


def test_every_parameter_is_in_a_group(model, config):
  boxed = jax.eval_shape(model.init, jax.random.key(0), bagel.example_batch(config))["params"]
  plain = sharding.unbox(boxed)
  # Only adapters have something beneath them.
  assert set(jax.tree.leaves(optim.groups(plain))) == set(optim.GROUPS) - {"base"}
  assert jax.tree.leaves(optim.groups(plain)) == jax.tree.leaves(optim.groups(boxed))
  with pytest.raises(ValueError, match="stranger"):
    optim.groups({"stranger": jnp.zeros(1)})


def test_frozen_groups_stay_and_keep_no_state(params):
  optimizer = optim.adamw_by_group(_schedules(gen=1e-3), **OPTIONS)
  tree = params["bagel"]
  state = optimizer.init(tree)
  trained = sum(
    leaf.size for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(optim.groups(tree)))
    if group == "gen"
  )
  moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
  assert moments == 2 * trained
  grads = jax.tree.map(jnp.ones_like, tree)
  updates, _ = jax.jit(optimizer.update)(grads, state, tree)
  for update, group in zip(jax.tree.leaves(updates), jax.tree.leaves(optim.groups(tree))):
    assert bool((np.asarray(update) == 0).all()) == (group != "gen")


def test_first_step_is_the_learning_rate_of_each_group():
  tree = {"layers": {"und": jnp.ones(2), "gen": jnp.ones(2)}}
  optimizer = optim.adamw_by_group(_schedules(und=1e-3, gen=1e-1), **OPTIONS)
  updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
  np.testing.assert_allclose(updates["layers"]["und"], -1e-3, rtol=1e-4)
  np.testing.assert_allclose(updates["layers"]["gen"], -1e-1, rtol=1e-4)


def test_each_group_is_clipped_by_its_own_norm():
  """A huge gradient of one expert leaves the other's as it was."""
  grads = {"layers": {"und": jnp.array([300.0, 400.0]), "gen": jnp.array([0.3, 0.4])}}
  clip = optim.adamw_by_group(_schedules(und=1.0, gen=1.0), **(OPTIONS | dict(b1=0.0)))
  _, state = clip.update(grads, clip.init(grads), grads)
  moment = lambda group: state.inner_states[group].inner_state[1][0].mu["layers"][group]
  np.testing.assert_allclose(moment("und"), [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(moment("gen"), [0.3, 0.4], rtol=1e-6)
  norms = optim.group_norms(grads)
  np.testing.assert_allclose([norms["und"], norms["gen"]], [500.0, 0.5], rtol=1e-6)


def test_schedules_by_hand():
  constant = optim.warmup_constant(1.0, 4)
  assert [float(constant(step)) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
  cosine = optim.warmup_cosine(1.0, 2, 10)
  np.testing.assert_allclose(
    [cosine(0), cosine(1), cosine(6), cosine(10)], [0.5, 1.0, 0.5, 0.0], atol=1e-6
  )


def test_moving_average_by_hand():
  """The parameter counts the steps."""
  average = {"w": jnp.zeros(())}
  update = jax.jit(lambda a, p, s: optim.update_average(a, p, s, decay=0.25))
  seen = []
  for step in range(4):
    average = update(average, {"w": jnp.float32(step + 1)}, jnp.int32(step))
    seen.append(float(average["w"]))
  # d = 1 / 10, then 2 / 11; then 3 / 12 and 4 / 13, cut to 1 / 4.
  second = 2 / 11 * 0.9 + 9 / 11 * 2
  third = 0.25 * second + 0.75 * 3
  np.testing.assert_allclose(seen, [0.9, second, third, 0.25 * third + 3], rtol=1e-6)
