"""Advantages and the objectives of text and images: by hand, limits, gradients, masks."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigrpo_jax.losses import advantages, flow, regularizers, text

jitted_and_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def group_advantages(rewards, group, groups=2, **options):
  run = lambda r, g: advantages.group_advantages(r, g, num_groups=groups, **options)
  return run(jnp.asarray(rewards, jnp.float32), jnp.asarray(group))


def check_gradient(function, value):
  """Central differences along the gradient, and along random directions."""
  gradient = jax.grad(function)(value)
  size = jnp.linalg.norm(gradient)
  assert size > 1e-3
  directions = [gradient / size]
  for key in jax.random.split(jax.random.key(7), 3):
    drawn = jax.random.normal(key, value.shape)
    directions.append(drawn / jnp.linalg.norm(drawn))
  # Along a unit direction a step of 4e-3 moves an element by less than that; float32 values of
  # order 1 then give the slope to 1e-7 / 4e-3.
  step = 4e-3
  for along in directions:
    slope = (function(value + step * along) - function(value - step * along)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, along), slope, atol=5e-3 * size + 5e-5)


@jitted_and_not
def test_advantages_by_hand(wrap):
  # Group 0 is 0, 2: mean 1, std 1. Group 1 is 1, 1, 4: mean 2, squares 6, over 3. Interleaved.
  rewards, group = jnp.array([0.0, 1.0, 2.0, 1.0, 4.0]), jnp.array([0, 1, 0, 1, 1])
  run = wrap(lambda r, g: advantages.group_advantages(r, g, num_groups=2, eps=0.0))
  adv, valid, metrics = run(rewards, group)
  root = math.sqrt(2)
  np.testing.assert_allclose(adv, [-1, -1 / root, 1, -1 / root, 2 / root], rtol=1e-6)
  assert valid.all() and metrics["zero_std_fraction"] == 0 == metrics["dropped_groups"]
  np.testing.assert_allclose(metrics["group_std_mean"], (1 + root) / 2, rtol=1e-6)


def test_other_conventions_by_hand():
  rewards, group = [0, 2, 1, 1, 4], [0, 0, 1, 1, 1]
  adv = group_advantages(rewards, group, ddof=1, eps=1.0)[0]
  np.testing.assert_allclose(adv[:2], [-1 / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2))], rtol=1e-6)
  np.testing.assert_allclose(adv[2:] * (1 + math.sqrt(3)), [-1, -1, 2], rtol=1e-6)
  adv = group_advantages(rewards, group, std="none")[0]
  np.testing.assert_allclose(adv, [-1, 1, -1, -1, 2], rtol=1e-6)
  # All rewards: mean 1.6, squares 2.56 + .16 + .36 + .36 + 5.76 = 9.2.
  adv = group_advantages(rewards, group, std="batch", eps=0.0)[0]
  np.testing.assert_allclose(adv, np.array([-1, 1, -1, -1, 2]) / math.sqrt(9.2 / 5), rtol=1e-6)
  adv = group_advantages(rewards, group, eps=0.0, clip=0.5)[0]
  np.testing.assert_allclose(adv, [-0.5, 0.5, -0.5, -0.5, 0.5])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("std", ["group", "none"])
def test_a_group_of_one(ddof, std):
  adv, valid, _ = group_advantages([3, 0, 2], [0, 1, 1], ddof=ddof, eps=0.5, std=std)
  assert adv[0] == 0 and valid.all() and adv[2] == -adv[1] > 0


@pytest.mark.parametrize("failed", [np.nan, np.inf])
def test_a_failed_reward_drops_its_group_and_nothing_else(failed):
  adv, valid, metrics = group_advantages([failed, 9, 0, 2], [0, 0, 1, 1], std="batch")
  alone, _, alone_metrics = group_advantages([0, 2], [0, 0], groups=1, std="batch")
  assert valid.tolist() == [False, False, True, True]
  np.testing.assert_array_equal(adv, [0, 0, *alone])
  assert metrics["dropped_groups"] == 1 and alone_metrics["dropped_groups"] == 0
  for name in ("group_std_mean", "zero_std_fraction"):
    assert metrics[name] == alone_metrics[name]
  assert not group_advantages([failed], [0], groups=1)[1].any()


def test_equal_rewards_give_zero_at_any_size():
  """0.1 has no exact mean in float32; over eps = 1e-8 its rounding would be an advantage of 1."""
  rewards = [0.1] * 7 + [1, 2]
  adv, valid, metrics = group_advantages(rewards, [0] * 7 + [1, 1], eps=1e-8, groups=3)
  np.testing.assert_array_equal(adv[:7], 0)
  assert valid.all() and metrics["zero_std_fraction"] == 0.5


def test_a_large_offset_costs_no_digits():
  adv = group_advantages([0, 1, 2], [0, 0, 0], groups=1)[0]
  np.testing.assert_allclose(group_advantages([4096, 4097, 4098], [0, 0, 0], groups=1)[0], adv)


@jitted_and_not
def test_token_weights_by_hand(wrap):
  mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  valid = jnp.array([True, True, False])
  run = lambda kind: wrap(
    lambda m, v: text.token_weights(m, v, aggregation=kind, max_tokens=5)
  )(mask, valid)
  np.testing.assert_allclose(run("seq-mean-token-mean"), [[0.25, 0.25, 0], [0.5, 0, 0], [0] * 3])
  third, tenth = 1 / 3, 0.1
  np.testing.assert_allclose(run("token-mean"), [[third, third, 0], [third, 0, 0], [0] * 3])
  np.testing.assert_allclose(run("constant"), [[tenth, tenth, 0], [tenth, 0, 0], [0] * 3])


def test_nothing_counts_is_no_weight():
  mask, valid = jnp.ones((2, 3), bool), jnp.zeros(2, bool)
  for kind in text.AGGREGATIONS:
    weights = text.token_weights(mask, valid, aggregation=kind, max_tokens=3)
    np.testing.assert_array_equal(weights, 0)
  np.testing.assert_array_equal(flow.step_weights(valid, 2), 0)
  assert flow.step_weights(valid, 0).shape == (2, 0)


def text_batch(rows=4, tokens=5, seed=0):
  rng = np.random.default_rng(seed)
  logp_old = jnp.asarray(-rng.uniform(0.1, 3, (rows, tokens)), jnp.float32)
  logp = logp_old + jnp.asarray(rng.normal(0, 0.3, logp_old.shape), jnp.float32)
  adv = jnp.asarray(rng.normal(size=rows), jnp.float32)
  mask = jnp.arange(tokens) < jnp.asarray(rng.integers(1, tokens + 1, rows))[:, None]
  weights = text.token_weights(
    mask, jnp.ones(rows, bool), aggregation="seq-mean-token-mean", max_tokens=tokens
  )
  return logp, logp_old, adv, weights


@jitted_and_not
def test_text_loss_by_hand(wrap):
  # Ratios 2, 1/2 and 1.1 at clip 0.2 / 0.3: A = 1 gives 1.3, 0.5, 1.1; A = -1 gives -2, -0.8, -1.1.
  ratio = jnp.log(jnp.array([[2, 0.5, 1.1], [2, 0.5, 1.1]]))
  run = wrap(lambda logp, w: text.policy_loss(
    logp, jnp.zeros_like(logp), jnp.array([1.0, -1.0]), w, clip_low=0.2, clip_high=0.3
  ))
  for row, values in enumerate([[-1.3, -0.5, -1.1], [2, 0.8, 1.1]]):
    for token, value in enumerate(values):
      loss, metrics = run(ratio, jnp.zeros((2, 3)).at[row, token].set(1.0))
      np.testing.assert_allclose(loss, value, rtol=1e-6)
      # The clip takes the gradient of 2 at A = 1, and of 1/2 at A = -1.
      assert metrics["clipped"].sum() == ((row, token) in [(0, 0), (1, 1)])
      assert jnp.count_nonzero(metrics["log_ratio"]) == 1


def test_dual_clip_by_hand():
  run = lambda ratio, adv: text.policy_loss(
    jnp.log(jnp.array([[ratio]])), jnp.zeros((1, 1)), jnp.array([adv]), jnp.ones((1, 1)),
    clip_low=0.2, clip_high=0.2, dual_clip=3.0,
  )
  for ratio, adv, value in [(5.0, -2.0, 6.0), (2.0, -2.0, 4.0), (5.0, 2.0, -2.4)]:
    loss, metrics = run(ratio, adv)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    assert metrics["dual_clipped"].item() == (value == 6.0)


def test_sequence_ratio_by_hand():
  """Log ratios 0.3 and -0.1 share exp(0.1), and each token's gradient is the ratio's."""
  weights = jnp.array([[0.5, 0.5, 0.0]])
  run = lambda logp: text.policy_loss(
    logp, jnp.zeros_like(logp), jnp.array([2.0]), weights, clip_low=0.2, clip_high=0.2,
    ratio="sequence",
  )[0]
  loss, gradient = jax.value_and_grad(run)(jnp.array([[0.3, -0.1, 9.0]]))
  ratio = math.exp(0.1)
  np.testing.assert_allclose(loss, -2 * ratio, rtol=1e-6)
  np.testing.assert_allclose(gradient, [[-ratio, -ratio, 0]], rtol=1e-6)


@pytest.mark.parametrize("options", [
  {}, {"dual_clip": 1.5}, {"kl_weight": 0.7},
])
def test_text_gradient_numerically(options):
  logp, logp_old, adv, weights = text_batch()
  if options.get("kl_weight"):
    options = options | {"logp_ref": logp_old - 0.2}
  check_gradient(
    lambda p: text.policy_loss(
      p, logp_old, adv, weights, clip_low=0.2, clip_high=0.25, **options
    )[0], logp
  )


@jitted_and_not
def test_text_masked_equals_deleted(wrap):
  logp, logp_old, adv, weights = text_batch()
  weights = weights.at[:, 2:4].set(0.0)
  counted = np.array([0, 1, 4])
  run = wrap(jax.value_and_grad(lambda *a: text.policy_loss(
    *a[:4], clip_low=0.2, clip_high=0.2, logp_ref=a[1] - 1, kl_weight=0.1
  ), has_aux=True))
  (loss, metrics), gradient = run(
    logp.at[:, 2:4].set(jnp.nan), logp_old.at[:, 2:4].set(jnp.inf), adv, weights
  )
  (loss_cut, metrics_cut), gradient_cut = run(
    logp[:, counted], logp_old[:, counted], adv, weights[:, counted]
  )
  np.testing.assert_allclose(loss, loss_cut, rtol=1e-6)
  np.testing.assert_array_equal(gradient[:, 2:4], 0)
  np.testing.assert_allclose(gradient[:, counted], gradient_cut, rtol=1e-6)
  chex.assert_trees_all_close(jax.tree.map(lambda a: a[:, counted], metrics), metrics_cut)
  assert all(not jnp.any(values[:, 2:4]) for values in metrics.values())


def test_on_policy_text_has_ratio_one_and_the_policy_gradient():
  logp, _, adv, weights = text_batch()
  run = lambda p: text.policy_loss(p, logp, adv, weights, clip_low=0.2, clip_high=0.2)
  (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(logp)
  np.testing.assert_array_equal(metrics["log_ratio"], 0)
  assert not metrics["clipped"].any()
  np.testing.assert_allclose(loss, -(weights * adv[:, None]).sum(), rtol=1e-6)
  np.testing.assert_allclose(gradient, -weights * adv[:, None], rtol=1e-6)


def test_zero_advantage_has_no_text_gradient():
  logp, logp_old, adv, weights = text_batch()
  run = lambda p: text.policy_loss(p, logp_old, 0 * adv, weights, clip_low=0.2, clip_high=0.2)[0]
  np.testing.assert_array_equal(jax.grad(run)(logp), 0)


@pytest.mark.parametrize("aggregation", text.AGGREGATIONS)
def test_text_microbatches_add_up(aggregation):
  logp, logp_old, adv, _ = text_batch()
  mask, valid = logp > -2, jnp.array([True, False, True, True])
  weights = text.token_weights(mask, valid, aggregation=aggregation, max_tokens=8)
  run = jax.value_and_grad(lambda p, o, a, w: text.policy_loss(
    p, o, a, w, clip_low=0.2, clip_high=0.2
  )[0])
  whole, gradient = run(logp, logp_old, adv, weights)
  parts = [run(*(a[rows] for a in (logp, logp_old, adv, weights)))
           for rows in (slice(0, 1), slice(1, 4))]
  np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-6)
  np.testing.assert_allclose(jnp.concatenate([g for _, g in parts]), gradient, rtol=1e-6)


def test_kl_estimates_by_hand():
  logp, ref = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
  log2 = math.log(2)
  np.testing.assert_allclose(text.k1(logp, ref), [log2, -log2], rtol=1e-6)
  np.testing.assert_allclose(text.k3(logp, ref), [0.5 + log2 - 1, 2 - log2 - 1], rtol=1e-5)
  assert text.k3(jnp.array(-50.0), jnp.array(0.0)) == 10
  for estimate in (text.k1, text.k3):
    check_gradient(lambda p, estimate=estimate: estimate(p, ref).sum(), logp)


def test_kl_estimates_average_to_the_divergence():
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
  expected = (p * np.log(p / q)).sum()
  for estimate in (text.k1, text.k3):
    mean = (p * estimate(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))).sum()
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_are_of_the_sampling_temperature(temperature):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden, kernel = jax.random.normal(keys[0], (2, 5, 3)), jax.random.normal(keys[1], (3, 7))
  ids, mask = jax.random.randint(keys[2], (2, 5), 0, 7), jnp.arange(5) < jnp.array([[5], [3]])
  p = jax.nn.softmax(hidden @ kernel / temperature)
  picked = jnp.log(jnp.take_along_axis(p, ids[..., None], -1)[..., 0])
  spoiled = jnp.where(mask[..., None], hidden, jnp.nan)
  for chunk in (2, 9):
    run = lambda h, chunk=chunk: text.token_logprobs(
      lambda h: h @ kernel, h, ids, mask, temperature=temperature, chunk=chunk
    )
    logp, entropy = run(spoiled)
    np.testing.assert_allclose(logp, jnp.where(mask, picked, 0), rtol=1e-5)
    np.testing.assert_allclose(
      entropy, jnp.where(mask, -(p * jnp.log(p)).sum(-1), 0), rtol=1e-5
    )
  check_gradient(lambda h: sum(a.sum() for a in run(h)), hidden)
  assert jnp.isfinite(jax.grad(lambda h: run(h)[0].sum())(spoiled)).all()


def steps_of(policy_drift, rows=3, steps=2, tokens=4, features=2, seed=0):
  """mean, mean_old, x_next, std, mask of a window."""
  rng = np.random.default_rng(seed)
  shape = (rows, steps, tokens, features)
  mean_old = rng.normal(size=shape)
  std = rng.uniform(0.3, 0.9, shape[:2])
  x_next = mean_old + std[..., None, None] * rng.normal(size=shape)
  mean = mean_old + policy_drift * rng.normal(size=shape)
  mask = np.arange(tokens) < np.array([tokens, 2, 3])[:rows, None, None]
  arrays = [jnp.asarray(a, jnp.float32) for a in (mean, mean_old, x_next, std)]
  return *arrays, jnp.asarray(mask)


@jitted_and_not
def test_log_ratio_by_hand(wrap):
  # d = (0.5, 1), e = (1, -2), std 2: <d e> = -0.75; <d^2> = 0.625. The third token does not count.
  mean_old, mask = jnp.array([[[1.0], [1.0], [5.0]]]), jnp.array([[True, True, False]])
  mean = mean_old + jnp.array([[[0.5], [1.0], [jnp.nan]]])
  x_next = mean_old + jnp.array([[[1.0], [-2.0], [7.0]]])
  run = lambda kind: wrap(
    lambda m: flow.log_ratio(m, mean_old, x_next, jnp.array([2.0]), mask, kind=kind)
  )(mean)
  np.testing.assert_allclose(run("norm"), [-0.375])
  np.testing.assert_allclose(run("plain"), [(-0.75 - 0.3125) / 4])
  np.testing.assert_allclose(run("unnormalised"), [-1.5 - 0.625])
  away = wrap(lambda m: flow.divergence(m, mean_old, jnp.array([2.0]), mask))(mean)
  np.testing.assert_allclose(away, [0.625 / 8])


@pytest.mark.parametrize("drift", [1e-6, 1e-3, 0.3])
def test_log_ratio_is_eq_5_of_densities_in_float64(drift):
  """The naive form in float64 from the same float32 arrays; float32 would lose it at 1e-6."""
  mean, mean_old, x_next, std, mask = steps_of(drift)
  m, o, x, s = (np.asarray(a, np.float64) for a in (mean, mean_old, x_next, std))
  counted = np.broadcast_to(np.asarray(mask)[..., None], m.shape)
  average = lambda a: (a * counted).sum((2, 3)) / counted.sum((2, 3))
  plain = (average((x - o) ** 2) - average((x - m) ** 2)) / (2 * s**2)
  norm = s * (plain + average((m - o) ** 2) / (2 * s**2))
  run = lambda kind: flow.log_ratio(mean, mean_old, x_next, std, mask, kind=kind)
  np.testing.assert_allclose(run("plain"), plain, rtol=1e-4, atol=1e-7 * drift)
  np.testing.assert_allclose(run("norm"), norm, rtol=1e-4, atol=1e-7 * drift)
  np.testing.assert_allclose(run("unnormalised"), plain * 2 * s**2, rtol=1e-4, atol=1e-7 * drift)


@pytest.mark.parametrize("kind", flow.RATIOS)
def test_flow_gradient_numerically(kind):
  mean, mean_old, x_next, std, mask = steps_of(0.3)
  adv, weights = jnp.array([1.0, -2.0, 0.5]), flow.step_weights(jnp.ones(3, bool), 2)

  log_ratio_of = lambda mean: flow.log_ratio(mean, mean_old, x_next, std, mask, kind=kind)
  # Between the moves that are clipped and those that are not, and from each too far for the
  # differences to cross it.
  gains = jnp.sort(jnp.expm1(log_ratio_of(mean)) * jnp.sign(adv)[:, None], axis=None)
  clip = float(gains[-2] + gains[-1]) / 2

  def loss(mean):
    return flow.policy_loss(log_ratio_of(mean), adv, weights, clip_low=clip, clip_high=clip)

  assert clip > 0 and loss(mean)[1]["clipped"].sum() == 1
  check_gradient(lambda mean: loss(mean)[0], mean)
  constant = lambda old, x: flow.log_ratio(mean, old, x, std, mask, kind=kind).sum()
  for gradient in jax.grad(constant, argnums=(0, 1))(mean_old, x_next):
    np.testing.assert_array_equal(gradient, 0)


@jitted_and_not
def test_flow_loss_by_hand(wrap):
  # Ratios 1 + 3e-6, 1 - 3e-6, 1 + 5e-7 at clip 1e-6, A = 2 and -2.
  log_ratio = jnp.array([[3e-6, -3e-6, 5e-7]] * 2)
  run = wrap(lambda lr, w: flow.policy_loss(
    lr, jnp.array([2.0, -2.0]), w, clip_low=1e-6, clip_high=1e-6
  ))
  for row, values in enumerate([[-2e-6, 6e-6, -1e-6], [6e-6, -2e-6, 1e-6]]):
    for step, value in enumerate(values):
      loss, metrics = run(log_ratio, jnp.zeros((2, 3)).at[row, step].set(1.0))
      np.testing.assert_allclose(loss, value, rtol=1e-5)
      assert metrics["clipped"].sum() == (value == -2e-6)


def test_on_policy_steps_have_ratio_one_and_a_gradient():
  mean, _, x_next, std, mask = steps_of(0.0)
  adv, weights = jnp.array([1.0, -2.0, 0.0]), flow.step_weights(jnp.ones(3, bool), 2)

  def loss(m, adv=adv):
    log_ratio = flow.log_ratio(m, mean, x_next, std, mask)
    return flow.policy_loss(log_ratio, adv, weights, clip_low=1e-6, clip_high=1e-6)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(mean)
  np.testing.assert_array_equal(metrics["log_ratio"], 0)
  assert value == 0 and not metrics["clipped"].any()
  # -A w (x_next - mean) / (std D), D = 8, 4, 6 elements; nothing where A = 0 or nothing counts.
  scale = -adv[:, None] / 6 / std / jnp.array([8.0, 4.0, 6.0])[:, None]
  expected = jnp.where(mask[..., None], scale[..., None, None] * (x_next - mean), 0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
  assert jnp.abs(gradient[0]).max() > 0
  zero = jax.grad(lambda m: loss(m, 0 * adv)[0])(mean + 0.3)
  np.testing.assert_array_equal(zero, 0)


def test_flow_masked_equals_deleted_and_microbatches_add_up():
  mean, mean_old, x_next, std, mask = steps_of(0.3)
  adv, weights = jnp.array([1.0, -2.0, 0.5]), flow.step_weights(jnp.array([True, True, False]), 2)
  run = jax.value_and_grad(lambda m, o, x, s, k, a, w: flow.policy_loss(
    flow.log_ratio(m, o, x, s, k), a, w, clip_low=0.1, clip_high=0.1
  )[0])
  spoiled = jnp.where(mask[..., None], mean, jnp.nan)
  whole, gradient = run(spoiled, mean_old, x_next, std, mask, adv, weights)
  parts = []
  for row, tokens in ((0, 4), (1, 2)):
    cut = lambda a, row=row, tokens=tokens: a[row : row + 1, :, :tokens]
    rows = [a[row : row + 1] for a in (std, mask, adv, weights)]
    rows[1] = rows[1][..., :tokens]
    parts.append(run(cut(mean), cut(mean_old), cut(x_next), *rows))
    np.testing.assert_allclose(cut(gradient), parts[-1][1], rtol=1e-5)
    np.testing.assert_array_equal(gradient[row, :, tokens:], 0)
  np.testing.assert_allclose(whole, sum(loss for loss, _ in parts), rtol=1e-5)
  np.testing.assert_array_equal(gradient[2], 0)


def test_reweighting_multiplies_each_step():
  dt = jnp.array([[-0.5, -0.25]])
  np.testing.assert_array_equal(flow.reweight("inv_dt", dt), [[2, 4]])
  np.testing.assert_array_equal(flow.reweight("none", dt), [[1, 1]])
  run = lambda **w: flow.policy_loss(
    jnp.full((1, 2), 1e-3), jnp.ones(1), jnp.ones((1, 2)), clip_low=1, clip_high=1, **w
  )[0]
  np.testing.assert_allclose(run(loss_weight=flow.reweight("inv_dt", dt)), 3 * run(), rtol=1e-6)


def test_dppo_drops_far_steps_that_move_on():
  far, near = 2e-5, 1e-6
  away = jnp.array([[far, far, near], [far, far, near]])
  log_ratio = jnp.array([[0.1, -0.1, 0.1], [0.1, -0.1, -0.1]])
  mask = flow.dppo_mask(away, log_ratio, jnp.array([1.0, -1.0]), threshold=1e-5)
  assert mask.tolist() == [[False, True, True], [True, False, True]]
  # At the threshold it is far.
  assert not flow.dppo_mask(away[:1], log_ratio[:1], jnp.ones(1), threshold=far)[0, 0]
  loss, metrics = flow.policy_loss(
    log_ratio, jnp.array([1.0, -1.0]), jnp.ones((2, 3)), clip_low=1e-6, clip_high=1e-6,
    loss_mask=mask,
  )
  # -rho A of the steps that count: nothing is clipped.
  up, down = math.expm1(0.1), math.expm1(-0.1)
  np.testing.assert_allclose(loss, -down - up + up + down, atol=1e-7)
  assert (metrics["clipped"] == ~mask).all()


def test_scales_with_the_root_of_the_elements():
  assert flow.scaled_clip(1e-6, 262144) == 1e-6
  np.testing.assert_allclose(flow.scaled_clip(1e-6, 65536), 2e-6)
  np.testing.assert_allclose(flow.scaled_clip(1.5e-5, jnp.array([262144, 1024])), [1.5e-5, 2.4e-4])


@jitted_and_not
def test_regularizers_by_hand(wrap):
  # Differences 1, 3 and one that does not count: mean square 5.
  v, ref = jnp.array([[[1.0], [3.0], [jnp.nan]]]), jnp.zeros((1, 3, 1))
  mask, std, dt = jnp.array([[True, True, False]]), jnp.array([0.5]), jnp.array([-0.1])
  np.testing.assert_allclose(wrap(regularizers.velocity_mse)(v, ref, mask), [5])
  kl = lambda form: wrap(
    lambda v: regularizers.latent_kl(v, ref, std, dt, mask, form=form)
  )(v)
  np.testing.assert_allclose(kl("exact"), [10], rtol=1e-6)
  np.testing.assert_allclose(kl("code"), [1], rtol=1e-6)


def test_regularizer_gradients_numerically_and_not_into_the_reference():
  mean, ref, _, std, mask = steps_of(0.3)
  dt = -jnp.square(std)
  terms = [
    lambda a, b: regularizers.velocity_mse(a, b, mask).sum(),
    lambda a, b: regularizers.latent_kl(a, b, std, dt, mask, form="exact").sum(),
    lambda a, b: regularizers.latent_kl(a, b, std, dt, mask, form="code").sum(),
  ]
  for term in terms:
    check_gradient(lambda a, term=term: term(a, ref), mean)
    np.testing.assert_array_equal(jax.grad(term, argnums=1)(mean, ref), 0)
    spoiled = jnp.where(mask[..., None], mean, jnp.nan)
    np.testing.assert_array_equal(jax.grad(term)(spoiled, ref), jax.grad(term)(mean, ref))


def test_refusals():
  mean, mean_old, x_next, std, mask = steps_of(0.1)
  logp, logp_old, adv, weights = text_batch()
  clip = dict(clip_low=0.2, clip_high=0.2)
  cases = [
    ("'mean'", lambda: group_advantages([1.0], [0], std="mean")),
    ("'sum'", lambda: text.token_weights(mask[:, 0], mask[:, 0, 0], aggregation="sum",
                                         max_tokens=1)),
    ("'row'", lambda: text.policy_loss(logp, logp_old, adv, weights, ratio="row", **clip)),
    ("logp_ref", lambda: text.policy_loss(logp, logp_old, adv, weights, kl_weight=1.0, **clip)),
    ("'eq5'", lambda: flow.log_ratio(mean, mean_old, x_next, std, mask, kind="eq5")),
    ("'dt'", lambda: flow.reweight("dt", std)),
    ("'k3'", lambda: regularizers.latent_kl(mean, mean_old, std, std, mask, form="k3")),
  ]
  for words, call in cases:
    with pytest.raises(ValueError, match=words):
      call()
  with pytest.raises(AssertionError):  # [B, I] is not [B, 1, I]: it would count other rows' tokens.
    flow.log_ratio(mean, mean_old, x_next, std, mask[:, 0])
