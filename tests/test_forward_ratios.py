"""Ratios of AWM and FPO, and the surrogates of FPO++: by hand, limits, what stays the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.losses import flow, forward_process, regularizers

ADV = jnp.array([1.5, -0.7, 0.3, -2.0])
KINDS = [(ratio, "ppo") for ratio in forward_process.FPO_RATIOS] + [
  ("mean_first", "spo"), ("mean_first", "aspo")]
WEIGHTS = flow.step_weights(jnp.ones(4, bool), 3)


def batch(drift=0.0):
  """(v, v_old, what else a matching needs) of 4 images at 3 times; the last of 6 tokens is padding.
  """
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x_0 = jnp.broadcast_to(draw(4, 1, 6, 2), (4, 3, 6, 2))
  v_old, noise = draw(4, 3, 6, 2), draw(4, 3, 6, 2)
  t = jnp.asarray(rng.uniform(0.1, 0.9, (4, 3)), jnp.float32)
  mask = jnp.broadcast_to(jnp.arange(6) < 5, (4, 3, 6))
  return v_old + drift * draw(4, 3, 6, 2), v_old, dict(x_0=x_0, noise=noise, t=t, mask=mask)


def slope(fn, *args, **settings):
  """((loss, metrics), its gradient by the first argument), compiled."""
  return jax.jit(jax.value_and_grad(functools.partial(fn, **settings), has_aux=True))(*args)


def fpo(v, v_old, matching, adv=ADV, *, weighting="one_minus_t2", ratio="mean_first", **settings):
  losses = forward_process.fpo_losses(v, v_old, weighting=weighting, **matching)
  settings = dict(clip=0.05) | settings
  return forward_process.fpo_surrogate(*losses, adv, WEIGHTS, ratio=ratio, **settings)


def awm(v, v_old, matching, adv=ADV, **settings):
  settings = dict(weighting="ghuber", ratio="exp_first", clip=math.inf, bound=5.0) | settings
  return forward_process.awm_loss(v, v_old, adv=adv, weights=WEIGHTS, **matching, **settings)


def test_matching_losses_by_hand():
  # Two numbers miss u = noise - x_0 = 1 by 2 and by 0: m = 2; the old ones by 1 and by 1: m = 1.
  one = lambda *values: jnp.array(values, jnp.float32).reshape(1, 1, 2, 1)
  losses, old, gain = forward_process.fpo_losses(
    one(3, 1), one(0, 2), one(1, 1), one(2, 2), jnp.array([[0.75]]), jnp.ones((1, 1, 2), bool))
  np.testing.assert_allclose([losses, old, gain], np.reshape([2, 1, -1], (3, 1, 1)) / 16)
  t = jnp.array([0.0, 0.5, 1.0])
  np.testing.assert_array_equal(forward_process.fpo_weight("one_minus_t2", t), [1, 0.25, 0])
  np.testing.assert_array_equal(forward_process.fpo_weight("uniform", t), 1)


def test_the_weighted_loss_is_the_squared_error_of_the_noise():
  """(1 - t)^2 <(v - u)^2> is <(noise - x_t - (1 - t) v)^2>."""
  v, v_old, given = batch(0.3)
  losses, _, _ = forward_process.fpo_losses(v, v_old, **given)
  t = given["t"][..., None, None]
  x_t = (1 - t) * given["x_0"] + t * given["noise"]
  error = flow.difference(given["noise"], x_t + (1 - t) * v, given["mask"])
  np.testing.assert_allclose(
    losses, flow.element_mean(jnp.square(error), given["mask"]), rtol=1e-5)


@pytest.mark.parametrize("weighting", forward_process.FPO_WEIGHTINGS)
def test_the_difference_of_losses_is_a_product(weighting):
  """Equal to the difference of two means, and exact where float32 means would lose it."""
  v, v_old, given = batch(0.4)
  run = jax.jit(functools.partial(forward_process.fpo_losses, weighting=weighting))
  losses, old, gain = run(v, v_old, **given)
  np.testing.assert_allclose(gain, old - losses, atol=4e-6)  # of losses up to 7
  near = v_old * (1 + 1e-6)
  *_, gain = run(near, v_old, **given)
  wide = {k: np.asarray(a, np.float64) for k, a in given.items()}
  u, w = wide["noise"] - wide["x_0"], forward_process.fpo_weight(weighting, given["t"])
  miss = lambda v: np.square(np.asarray(v, np.float64) - u)[..., :5, :].mean((-1, -2))
  np.testing.assert_allclose(gain, w * (miss(v_old) - miss(near)), rtol=1e-5)


@pytest.mark.parametrize("weighting", forward_process.AWM_WEIGHTINGS)
def test_the_log_ratio_of_awm_is_a_difference_of_log_probabilities(weighting):
  v, v_old, given = batch(0.4)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ratio(v):
    values = forward_process.awm_log_ratio(v, v_old, weighting=weighting, **given)
    return values.sum(), values

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def logp(v):
    values = forward_process.awm_log_prob(v, weighting=weighting, **given)
    return values.sum(), values

  ((_, ratios), slope), ((_, new), slope_p) = ratio(v), logp(v)
  np.testing.assert_allclose(ratios, new - logp(v_old)[0][1], rtol=1e-4, atol=4e-6)
  np.testing.assert_allclose(slope, slope_p, rtol=1e-4, atol=1e-6)
  # Of velocities without any error too.
  assert jnp.isfinite(ratio(given["noise"] - given["x_0"])[1]).all()


@pytest.mark.parametrize("ratio, surrogate", KINDS)
def test_the_first_epoch_of_fpo(ratio, surrogate):
  """Ratios are exactly 1, nothing is clipped, and the gradient is the sum of A dl."""
  v, _, given = batch()
  loss = lambda v, v_old, adv: fpo(v, v_old, given, adv, ratio=ratio, surrogate=surrogate)
  both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (value, metrics), (gradient, of_old) = both(v, v, ADV)
  assert value == 0 and not metrics["log_ratio"].any()
  assert not metrics["clipped"].any() and not metrics["outside"].any()

  def matching(v):
    return jnp.sum(WEIGHTS * ADV[:, None] * forward_process.fpo_losses(v, v, **given)[0])

  np.testing.assert_allclose(gradient, jax.jit(jax.grad(matching))(v), rtol=1e-5, atol=1e-8)
  assert not of_old.any()
  far = batch(0.5)[0]
  (_, moved), (gradient, of_old) = both(far, v, jnp.zeros(4))
  assert moved["log_ratio"].any() and not gradient.any() and not of_old.any()


def test_one_pair_is_its_own_mean():
  v, v_old, given = jax.tree.map(lambda a: a[:, :1], batch(0.8))
  losses = forward_process.fpo_losses(v, v_old, **given)
  weights = flow.step_weights(jnp.ones(4, bool), 1)
  kinds = [
    forward_process.fpo_surrogate(*losses, ADV, weights, ratio=ratio, clip=0.05)[0]
    for ratio in ("mean_first", "per_pair", "clamped_mean")
  ]
  np.testing.assert_array_equal(kinds, kinds[:1] * 3)


def _surrogate(gain, ratio, surrogate="ppo", adv=ADV, **settings):
  gain = jnp.asarray(gain, jnp.float32)
  zero, weights = jnp.zeros_like(gain), flow.step_weights(jnp.ones(len(gain), bool), gain.shape[1])
  return forward_process.fpo_surrogate(
    settings.pop("losses", zero), settings.pop("old", zero), gain, jnp.asarray(adv, jnp.float32),
    weights, ratio=ratio, clip=0.05, surrogate=surrogate, **settings)


def test_ratios_of_large_differences_by_hand():
  """Where the kinds differ: a pair beyond 3, and one beyond 10."""
  log_ratio = lambda ratio, **settings: _surrogate(
    [[4.0, -1.0]], ratio, adv=[1.0], **settings)[1]["log_ratio"].tolist()
  assert log_ratio("mean_first") == [[1.5]]
  assert log_ratio("per_pair") == [[3, -1]]
  assert log_ratio("clamped_mean") == [[1]]
  assert log_ratio("straight_through") == [[4, -1]]
  assert log_ratio("straight_through", bound=2.0) == [[2, -1]]
  # A clip takes the gradient of what it cut; straight through, it does not.
  gradient = lambda ratio: slope(
    _surrogate, jnp.array([[11.0, 0.0]]), ratio=ratio, adv=[-1.0])[1][0, 0]
  assert gradient("per_pair") == 0 == gradient("clamped_mean")
  np.testing.assert_allclose(gradient("straight_through"), math.exp(10) / 2, rtol=1e-5)


def test_capped_losses_by_hand():
  """l = (6, 9) and l_old = (7, 1), all capped at 8, and at 5 where the advantage is negative."""
  losses, old = jnp.array([[6.0, 9.0]] * 2), jnp.array([[7.0, 1.0]] * 2)

  def run(losses):
    loss, metrics = _surrogate(
      old - losses, "straight_through", adv=[1.0, -1.0], losses=losses, old=old, cap=8.0,
      cap_negative=5.0)
    return loss, metrics["log_ratio"]

  gradient, log_ratio = jax.grad(run, has_aux=True)(losses)
  np.testing.assert_array_equal(log_ratio, [[1, -7], [2, -4]])
  # Capped losses have no gradient; 1 is beyond the clip of a good image.
  assert not gradient.any()
  gradient, _ = jax.grad(run, has_aux=True)(jnp.full((2, 2), 0.5))
  assert gradient[1].all()


def test_surrogates_by_hand():
  """SPO has no gradient at 1 + eps sign A, and pulls back beyond; ASPO is PPO for good images."""
  edge = 0.05 * (1 - 1e-5)  # At the very edge rounding decides whether PPO clips.
  rho = jnp.array([[edge], [edge], [-edge], [-edge], [0.2], [-0.2]])
  adv = jnp.array([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])

  def slopes(surrogate):
    loss = lambda rho: _surrogate(jnp.log1p(rho), "mean_first", surrogate, adv)
    return 6 * slope(loss, rho)[1][:, 0]

  np.testing.assert_allclose(slopes("ppo")[jnp.array([1, 2, 4, 5])], [2, -2, 0, 0], atol=1e-5)
  # -A + |A| rho / eps
  np.testing.assert_allclose(slopes("spo"), [0, 4, -4, 0, 6, -6], atol=1e-4)
  good = adv > 0
  np.testing.assert_allclose(
    slopes("aspo"), jnp.where(good, slopes("ppo"), slopes("spo")), atol=1e-5)
  _, metrics = _surrogate(jnp.log1p(rho), "mean_first", "spo", adv)
  assert metrics["outside"][4:].all() and metrics["clipped"][4:].all()
  with pytest.raises(ValueError, match="'bpo'"):
    _surrogate(rho, "mean_first", "bpo", adv)
  with pytest.raises(ValueError, match="'median'"):
    _surrogate(rho, "median", adv=adv)


@pytest.mark.parametrize("weighting", ["uniform", "ghuber"])
def test_the_ratios_of_awm_agree_at_1_and_differ_after(weighting):
  v, v_old, given = batch(0.5)
  gradients = {True: [], False: []}
  for ratio in forward_process.AWM_RATIOS:
    run = jax.jit(jax.value_and_grad(
      lambda v, ratio=ratio: awm(v, v_old, given, weighting=weighting, ratio=ratio),
      has_aux=True))
    (value, metrics), gradient = run(v_old)
    assert value == 0 and not metrics["log_ratio"].any()
    gradients[True].append(gradient)
    gradients[False].append(run(v)[1])
  for same, pair in gradients.items():
    assert np.allclose(*pair, rtol=1e-4, atol=1e-7) == same
  with pytest.raises(ValueError, match="'some'"):
    awm(v, v_old, given, ratio="some")


def test_advantages_of_awm_are_at_most_1():
  adv = jnp.array([-9.0, -2.5, 0, 5, 50])
  np.testing.assert_allclose(forward_process.unit_advantages(adv, bound=5.0), [-1, -0.5, 0, 1, 1])
  v, v_old, given = batch(0.1)
  divided = awm(v, v_old, given, ADV)[0]
  np.testing.assert_allclose(divided, awm(v, v_old, given, ADV / 5, bound=None)[0], rtol=1e-6)


def test_no_clip_is_none():
  v, v_old, given = batch(3.0)
  free, bound = (awm(v, v_old, given, weighting="uniform", clip=c)[1] for c in (math.inf, 0.1))
  assert not free["clipped"].any() and not free["outside"].any() and bound["outside"].any()


def test_padding_is_never_read():
  v, v_old, given = batch(0.3)
  mask = given["mask"][..., None]
  spoil = lambda a: jnp.where(mask, a, jnp.nan)
  for objective in (fpo, awm):
    run = jax.jit(jax.value_and_grad(
      lambda v, v_old, objective=objective: objective(v, v_old, given)[0]))
    pairs = (v, v_old), (spoil(v), spoil(v_old))
    for one, other in zip(*(jax.tree.leaves(run(*pair)) for pair in pairs)):
      np.testing.assert_array_equal(one, other)


def test_good_images_alone_are_supervised_training():
  """With A = 1 for all, steps down the loss lower the matching error of the images."""
  _, v_old, given = batch()
  matching = jax.jit(lambda v: forward_process.fpo_losses(v, v, **given)[0].mean())
  gradient = jax.jit(jax.grad(lambda v, old: fpo(v, old, given, jnp.ones(4))[0]))
  v, errors = v_old, []
  for _ in range(3):
    errors.append(float(matching(v)))
    v -= 5.0 * gradient(v, v)
  assert errors[0] > errors[1] > errors[2]


def test_the_anchors_distance_is_0_where_it_stands():
  v, _, given = batch()
  loss = lambda v, anchor: regularizers.velocity_mse(v, anchor, given["mask"]).sum()
  value, gradient = jax.value_and_grad(loss)(v, v)
  assert value == 0 and not gradient.any()
  assert not jax.grad(loss, argnums=1)(v, v + 1).any()
