"""ReFL's update of the golden BAGEL: what it moves, what it leaves, and that its cuts add up."""

import types as types_lib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax import types
from unigrpo_jax.algorithms import refl, update
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.models import vae as vae_lib
from unigrpo_jax.recipe import parts
from unigrpo_jax.runtime import optim, sharding


def reward(fixed, latents, question):
  """A probability of latents [n, I, C], by a frozen direction and what is asked."""
  along = jnp.mean(latents @ fixed["direction"], axis=1)
  return jax.nn.sigmoid(question * along)


@pytest.fixture(scope="module")
def experience(small, params):
  """Of one step each, with a question."""
  sampled = joint.sample(small, params["bagel"], joint.PLAIN)
  drawn = sampled.only.flow
  flow = types.FlowRollout(latents=drawn.latents, x_t=drawn.x_t[:, 1:], t=drawn.t[:, 1:])
  return sampled.with_only(flow=flow).replace(
    adv=jnp.full(8, jnp.nan), question=jnp.linspace(-2, 2, 8)
  )


@pytest.fixture(scope="module")
def fixed(small):
  direction = jax.random.normal(jax.random.key(3), (small.config.latent_dim,))
  return {"direction": direction, "not read": jnp.zeros(3)}


def algorithm(**changes) -> refl.ReFL:
  numbers = dict(
    replay=joint.replay_config(joint.PLAIN), text=joint.text_objective(), flow_weight=1.0,
    regulariser="velocity_mse", regulariser_weight=0.1, reward=reward, ask=None, parts=1, ways=1,
    weight=1.0, margin=1.0, term_norms_every=0,
  )
  return refl.ReFL(**numbers | changes)


def run(
  small, params, experience, fixed, learner, beside=None, examples=None, reference=True, **schedule
):
  """(state before, state after, metrics), and how many leaves were differentiated."""
  transformation, differentiated = joint.optimizer(dict(gen=1e-2)), []
  precompute, change = update.make_update(
    small, transformation, joint.grid(small.config), learner, joint.schedule(**schedule),
    trained={"gen"}, ema_decay=None, reference_model=small if reference else None, beside=beside,
  )

  def whole(state, experience, fixed):
    experience = experience.with_only(**precompute(state, experience))
    return change(state, experience, fixed, examples)

  accumulate = update.accumulate

  def counted(loss_fn, trained_params, *rest):
    differentiated.append(len(jax.tree.leaves(trained_params)))
    return accumulate(loss_fn, trained_params, *rest)

  before = joint.state(params["bagel"], transformation)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(update, "accumulate", counted)
    after, metrics = jax.jit(whole)(before, experience, fixed)
  return *jax.device_get((before, after, metrics)), differentiated


@pytest.fixture(scope="module")
def two_steps(small, params, experience, fixed):
  learner = algorithm(term_norms_every=1)
  return run(small, params, experience, fixed, learner, microbatches=1, epochs=2)


def test_only_the_generation_expert_moves(two_steps):
  before, after, metrics, differentiated = two_steps
  for group in optim.GROUPS:
    a, b = (jax.tree.leaves(optim.split(state.params, {group})[0]) for state in (before, after))
    assert not all(map(np.array_equal, a, b)) if group == "gen" else all(map(np.array_equal, a, b))
  trained, _ = optim.split(before.params, {"gen"})
  assert set(differentiated) == {len(jax.tree.leaves(trained))}
  assert metrics["refl/reward"].shape == (2,) and not np.isnan(metrics["loss/total"]).any()


def test_a_step_raises_the_reward_of_the_same_latents(two_steps):
  first, second = two_steps[2]["refl/reward"]
  assert second > first + 1e-4


def test_the_terms_norms_are_those_of_their_gradients(two_steps):
  """In the second step, which is the logged one: before it the policy is its reference."""
  metrics = two_steps[2]
  of_reward, of_regulariser = (metrics[name] for name in update.TERM_NORMS)
  assert of_reward[0] == of_regulariser[0] == update.NOT_MEASURED
  assert 0 < of_regulariser[1] < of_reward[1]
  total = metrics["grad_norm/gen"][1]
  assert abs(of_reward[1] - of_regulariser[1]) <= total <= of_reward[1] + of_regulariser[1]
  summary = update.summarise({name: metrics[name][:1] for name in update.TERM_NORMS})
  assert summary == {}


@pytest.mark.slow
def test_microbatches_and_parts_add_up(small, params, experience, fixed, two_steps):
  _, after, metrics, _ = run(
    small, params, experience, fixed, algorithm(parts=2, ways=2), microbatches=2, epochs=2
  )
  chex.assert_trees_all_close(after.params, two_steps[1].params, rtol=1e-6, atol=1e-6)
  for name in ("loss/total", "refl/reward", "grad_norm/gen", "flow/mse"):
    np.testing.assert_allclose(metrics[name], two_steps[2][name], rtol=1e-5, atol=1e-7)



@pytest.mark.slow
def test_a_loss_beside_adds_its_gradient_to_each_optimizer_step(small, params, experience, fixed):
  """Of the part of the examples that is the step's; the reward, beyond the margin, has none."""
  def beside(trained, frozen, examples):
    grads = jax.tree.map(lambda a: jnp.full_like(a, examples.sum()), trained)
    return optim.join(grads, jax.tree.map(jnp.zeros_like, frozen)), {"sft": examples.sum()}

  examples = jnp.array([1.0, 2.0, 3.0, 4.0])
  before, after, metrics, _ = run(
    small, params, experience, fixed, algorithm(margin=0.0, regulariser="none"), beside, examples,
    reference=False, microbatches=1, minibatches=2,
  )
  trained, rest = optim.split(before.params, {"gen"})
  count = sum(a.size for a in jax.tree.leaves(trained))
  np.testing.assert_allclose(metrics["grad_norm/gen"], [3 * count**0.5, 7 * count**0.5], rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/total"], [3, 7], rtol=1e-6)
  np.testing.assert_array_equal(metrics["refl/zero_gradient"], 1)
  chex.assert_trees_all_equal(optim.split(after.params, {"gen"})[1], rest)


@pytest.mark.slow
def test_the_last_steps_differentiated_alone(small, params, experience, fixed):
  """One step to 0 is the prediction; two are another image, with the same recorded velocity."""
  t = float(experience.only.flow.t[0, 0])
  learners = {
    times: algorithm(replay=joint.replay_config(joint.PLAIN, last_times=times))
    for times in ((), (t, 0.0), (t, t / 2, 0.0))
  }
  results = [
    run(small, params, experience, fixed, learner, microbatches=1)[1:3]
    for learner in learners.values()
  ]
  (plain, metrics), (one, one_metrics), (_, two_metrics) = results
  chex.assert_trees_all_close(one.params, plain.params, rtol=1e-5, atol=3e-6)
  for name in ("refl/reward", "flow/mse", "grad_norm/gen"):
    np.testing.assert_allclose(one_metrics[name], metrics[name], rtol=1e-4, atol=1e-6)
  assert abs(two_metrics["refl/reward"] - metrics["refl/reward"]) > 1e-4
  assert two_metrics["flow/mse"] == pytest.approx(metrics["flow/mse"], abs=1e-6)


def test_direct_alignment_takes_the_noise_that_was_recorded(experience):
  """x_t lies between image and noise at the start of a step of the schedule, each its own."""
  times = (1.0, 0.75, 0.5, 0.0)
  key, drawn = jax.random.key(0), experience.only.flow
  noised = refl.noise_with_its_own(key, experience, times, False).only
  np.testing.assert_array_equal(noised.noise, drawn.x_t)
  t = noised.flow.t
  assert set(np.unique(t)) == set(times[:-1]) and noised.flow.latents is not None
  following = {time: after for time, after in zip(times, times[1:])}
  np.testing.assert_array_equal(noised.flow.t_next, np.vectorize(following.get)(t))
  along = t[..., None, None]
  expected = (1 - along) * drawn.latents[:, None] + along * drawn.x_t
  np.testing.assert_allclose(noised.flow.x_t, expected, rtol=1e-6)
  alike = refl.noise_with_its_own(key, experience, times, True).only
  assert len(np.unique(alike.flow.t)) == 1


def test_a_gradient_lies_as_the_networks_rows_do():
  """Not as its images do, one a device: the network would be differentiated whole on each then."""
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  config = config_lib.VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=2)
  network = types_lib.SimpleNamespace(
    mesh=mesh,
    config=types_lib.SimpleNamespace(vae=config, latent_stride=2, latent_patch_size=2),
  )
  model = types_lib.SimpleNamespace(score=lambda params, pixels, questions: pixels.mean((1, 2, 3)))
  reward_fn = parts.reward_of_latents(network, model, (8, 8))
  example = jnp.zeros((1, 8, 8, 3))
  params = jax.eval_shape(vae_lib.VAE(config).init, jax.random.key(0), example)["params"]
  rows = sharding.along_batch(mesh)
  latents = jax.ShapeDtypeStruct((8, 16, 8), jnp.float32, sharding=rows)
  gradient = jax.jit(jax.grad(lambda latents, fixed: reward_fn(fixed, latents, None).sum()))
  with sharding.activate(mesh):
    compiled = gradient.lower(latents, {"vae": params, "reward_model": None}).compile()
  assert compiled.output_shardings.is_equivalent_to(rows, 3)
