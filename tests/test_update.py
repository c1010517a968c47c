"""The update: ratios of 1, order and cuts that do not matter, what is masked, and what moves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax.algorithms import base, update
from unigrpo_jax.episodes import replay
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.runtime import optim

ATOL = 3e-6  # Of parameters that a step moves by up to 1e-2: float32 sums in another order.


@pytest.fixture(scope="module")
def one_step(run, experience):
  return run(experience)


def _close(a, b, atol=ATOL):
  chex.assert_trees_all_close(a.params, b.params, rtol=1e-5, atol=atol)


def _rows(experience, index):
  return jax.tree.map(lambda a: a[index], experience)


def test_ratios_are_one_in_the_first_epoch(one_step):
  after, before, metrics = one_step
  for name in ("text/ratio_mean", "text/ratio_max", "text/ratio_p99"):
    np.testing.assert_allclose(metrics[name], 1, atol=1e-7)
  for name in ("text/approx_kl", "text/clip_fraction", "flow/log_ratio_max", "flow/clip_fraction"):
    assert metrics[name][0] == 0, name
  assert 0 < metrics["drift/text"][0] < 1e-5 and metrics["drift/flow"][0] < 1e-7
  # The reference is what the policy starts as.
  assert metrics["flow/mse"][0] < 1e-10
  moved = joint.moved(before.params, after.params)
  assert moved["und"] > 100 * ATOL < moved["gen"]
  assert {g for g, size in moved.items() if size} == {"und", "gen"} and int(after.step) == 1


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_microbatches_do_not_change_the_update(run, experience, one_step, parts):
  after, _, metrics = run(experience, schedule=joint.schedule(microbatches=parts))
  _close(after, one_step[0])
  for name, value in one_step[2].items():
    if not name.startswith("drift/"):
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("microbatches,group_parts", [
  (4, 2),
  *(pytest.param(*parts, marks=pytest.mark.slow) for parts in ((1, 1), (2, 1), (2, 2))),
])
def test_a_prompt_read_once_is_the_same_as_once_a_trajectory(
  run, experience, one_step, microbatches, group_parts
):
  """However prompts and their groups are cut into microbatches."""
  shared = experience.replace(prompt=_rows(experience.prompt, slice(None, None, joint.GROUP)))
  schedule = joint.schedule(microbatches=microbatches, group_parts=group_parts)
  after, _, metrics = run(shared, schedule=schedule)
  _close(after, one_step[0])
  assert metrics["drift/text"][0] < 1e-5
  # It would not be, were prompts and trajectories mixed up.
  if microbatches == 1:
    turned = shared.replace(prompt=_rows(shared.prompt, slice(None, None, -1)))
    assert run(turned, schedule=schedule)[2]["drift/text"][0] > 1e-3


def test_the_order_of_trajectories_does_not_matter(run, experience, one_step):
  order = np.random.default_rng(0).permutation(8)
  _close(run(_rows(experience, order))[0], one_step[0])
  # It would if the advantages stayed behind.
  swapped = _rows(experience, order).replace(adv=experience.adv)
  assert max(joint.moved(run(swapped)[0].params, one_step[0].params).values()) > 10 * ATOL


def test_an_invalid_group_equals_none(run, experience):
  """Whatever it holds: the same update as by the other groups alone."""
  valid = np.arange(8) < 4
  broken = experience.replace(
    valid=jnp.asarray(valid), adv=jnp.where(valid, experience.adv, 7.0))
  after, _, metrics = run(broken, schedule=joint.schedule(microbatches=1))
  alone, _, want = run(_rows(experience, np.arange(4)), schedule=joint.schedule(microbatches=1))
  _close(after, alone)
  for name in ("loss/total", "text/entropy", "flow/mse", "grad_norm/gen", "text/ratio_p99"):
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-4, atol=1e-9, err_msg=name)


def _drift_from_one(size: float, count: int) -> dict[str, float]:
  """Of `count` differences of which one is `size` and the others are 0.

  The 99th percentile lies at place 0.99 (count - 1) of the sorted ones, 0.01 (count - 1) before the
  last: between the last but one, 0, and the last.
  """
  return {"_mean": size / count, "_p99": size * (1 - 0.01 * (count - 1))}


def test_drift_of_the_sampled_text(run, experience):
  """One token whose recorded log-probability is off by 3, one off by 9 in an invalid group."""
  text = experience.only.text
  valid = np.arange(8) >= 2
  recorded = text.logp.at[4, 0].add(-3.0).at[0, 0].add(-9.0)
  changed = experience.replace(valid=jnp.asarray(valid)).with_only(text=text.replace(logp=recorded))
  _, _, metrics = run(changed)
  count, size = int(text.mask[valid].sum()), abs(float(recorded[4, 0]))
  assert 10 < count < 40 and size > 3
  # The largest is of all that were sampled; the log-probability itself is off by up to 1e-5.
  np.testing.assert_allclose(metrics["drift/text"], 9, atol=2e-5)
  largest = 9 / abs(float(recorded[0, 0]))
  np.testing.assert_allclose(metrics["drift/text_scaled"], largest, atol=2e-5)
  for name, one in (("drift/text", 3.0), ("drift/text_scaled", 3.0 / size)):
    for suffix, value in _drift_from_one(one, count).items():
      np.testing.assert_allclose(metrics[name + suffix], value, atol=2e-5, err_msg=suffix)


def test_drift_of_the_images_steps(run, experience):
  """A recorded mean that is lower by 0.1 makes a log ratio of 0.1 <x_next - mean + 0.1> / std."""
  drawn = experience.only.flow
  valid = np.arange(8) >= 2
  recorded = drawn.mean.at[4, 1].add(-0.1)
  changed = experience.replace(valid=jnp.asarray(valid)).with_only(
    flow=drawn.replace(mean=recorded))
  _, _, metrics = run(changed)
  away = float((drawn.x_next - drawn.mean)[4, 1].mean())
  t, t_next = float(drawn.t[4, 1]), float(drawn.t_next[4, 1])
  std = joint.NOISE * (t / (1 - t)) ** 0.5 * (t - t_next) ** 0.5
  one = abs(0.1 * (away + 0.1) / std)
  assert one > 1e-3
  np.testing.assert_allclose(metrics["drift/flow"], one, rtol=1e-4)
  for suffix, value in _drift_from_one(one, 6 * len(joint.STEPS)).items():
    np.testing.assert_allclose(metrics["drift/flow" + suffix], value, rtol=1e-4, err_msg=suffix)


def test_zero_advantage_moves_nothing(run, experience):
  flat = experience.replace(adv=jnp.zeros(8))
  after, before, metrics = run(
    flat, algorithm=joint.algorithm(regulariser="none"), schedule=joint.schedule(epochs=2),
    reference=None,
  )
  assert not metrics["grad_norm/und"].any() and not metrics["grad_norm/gen"].any()
  chex.assert_trees_all_equal(after.params, before.params)


def test_the_velocity_error_draws_back_to_the_reference(run, experience, params):
  """With zero advantage it alone acts, and on the generation expert alone."""
  trained, rest = optim.split(params["bagel"], {"gen"})
  away = optim.join(jax.tree.map(lambda a: 1.02 * a, trained), rest)
  after, before, metrics = run(
    experience.replace(adv=jnp.zeros(8)), schedule=joint.schedule(epochs=2), start=away,
    reference=params["bagel"],
  )
  mse = metrics["flow/mse"]
  assert mse[0] > 1e-5 and mse[1] < mse[0]
  moved = joint.moved(before.params, after.params)
  assert moved["gen"] > 0 and moved["und"] == 0
  _, _, other = run(
    experience, algorithm=joint.algorithm(regulariser="latent_kl"), start=away,
    reference=params["bagel"],
  )
  # The distance is logged whatever regularises.
  np.testing.assert_allclose(other["flow/mse"][0], mse[0], rtol=1e-5)
  assert other["flow/latent_kl"][0] > 0 and "flow/latent_kl" not in metrics


@pytest.mark.parametrize("old_values", [
  pytest.param("rollout", marks=pytest.mark.slow), "recomputed",
])
def test_old_values_agree_in_the_first_step(run, experience, one_step, old_values):
  after, _, metrics = run(experience, schedule=joint.schedule(old_values=old_values))
  _close(after, one_step[0])
  assert metrics["text/approx_kl"][0] < 1e-10
  np.testing.assert_allclose(metrics["loss/text"], one_step[2]["loss/text"], atol=1e-6)


def _by_hand(model, params, transformation, experience, epochs):
  """Epochs from the parts: replay, loss against the first epoch's values, and the optimizer."""
  algorithm, grid = joint.algorithm(regulariser="none"), joint.grid(model.config)
  sampled = experience.only.text
  weights = {
    "text": text_losses.token_weights(
      sampled.mask, experience.valid, aggregation=algorithm.text.aggregation,
      max_tokens=algorithm.text.max_tokens),
    "flow": flow_losses.step_weights(experience.valid, 2),
  }
  recorded = base.Values(logp=sampled.logp, flow=experience.only.flow.mean)

  @jax.jit
  def gradient(params, old, is_first_epoch):
    def loss(params):
      output = replay.replay(model, params, experience, grid, algorithm.replay)
      return algorithm.loss(output, experience, old, weights, grid, is_first_epoch)

    (_, (_, new, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return new, grads

  step = jax.jit(functools.partial(
    update.apply_gradients, optimizer=transformation, ema_decay=None, trained={"und", "gen"}))
  state, old = joint.state(params, transformation), None
  for epoch in range(epochs):
    new, grads = gradient(state.params, old or recorded, epoch == 0)
    old = old or new
    # Only the trained groups have gradients in the update.
    grads = optim.join(
      optim.split(grads, {"und", "gen"})[0], jax.tree.map(jnp.zeros_like, grads))
    state, _ = step(state, grads)
  return state


def test_two_epochs_by_hand(run, experience, small, params):
  """The second epoch's ratios are against the first's own values, and are clipped."""
  algorithm, schedule = joint.algorithm(regulariser="none"), joint.schedule(epochs=2)
  after, before, metrics = run(experience, algorithm=algorithm, schedule=schedule, reference=None)
  want = _by_hand(small, params["bagel"], joint.optimizer(), experience, 2)
  _close(after, want, atol=3 * ATOL)
  assert int(after.step) == 2 and metrics["text/approx_kl"][0] == 0 < metrics["text/approx_kl"][1]
  assert metrics["flow/log_ratio_max"][0] == 0 < metrics["flow/log_ratio_max"][1]
  assert metrics["text/clip_fraction"][1] > 0


def test_minibatches_take_a_step_each(run, experience):
  schedule = joint.schedule(epochs=2, minibatches=2, old_values="recomputed", microbatches=1)
  after, _, metrics = run(experience, schedule=schedule)
  assert int(after.step) == 4 == len(metrics["loss/total"])
  # The second minibatch meets a policy that the first has moved, and so old values matter.
  np.testing.assert_allclose(metrics["text/approx_kl"][0], 0, atol=1e-10)
  assert (metrics["text/approx_kl"][1:] > 1e-7).all()
