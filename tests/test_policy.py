"""What a policy says is what it sampled, and its gradients go only where the routing lets them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax.episodes import policy
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.sampling import sde

SIDE = 8  # 64 tokens: log ratios are means over 1024 elements.
DRIFT = 1e-6 / 1024**0.5  # Of means that are rounded to 2e-7, five standard deviations.


@pytest.fixture(scope="module")
def small(model):
  return model.clone(remat=False)


@pytest.fixture(scope="module")
def experience(small, params):
  return joint.sample(small, params["bagel"], side=SIDE)


def _say(model, params, experience, reading):
  grid = joint.grid(model.config, SIDE)
  return jax.jit(lambda params, e: policy.say(model, params, e, grid, reading))(params, experience)


def _drift(model, said, experience):
  o, f = joint.numbers(), experience.flow
  move = sde.transition(
    f.x_t, said.guided, f.t, f.t_next, jnp.float32(o.t_second), kind=o.kind,
    noise_level=o.noise_level,
  )
  mask = joint.grid(model.config, SIDE).mask[:, None]
  return jnp.abs(flow_losses.log_ratio(move.mean, f.mean, f.x_next, move.std, mask)).max()


def test_it_says_what_was_sampled(small, params, experience):
  """Padded prompts, reasonings that ended and that were cut: log-probabilities and log ratios."""
  text = experience.text
  assert text.finished.any() and not text.finished.all()
  assert not experience.prompt_mask.all()
  said = _say(small, params["bagel"], experience, joint.reading())
  np.testing.assert_allclose(said.logp, text.logp, atol=1e-5)
  assert float(jnp.abs(text.logp).max()) > 1  # there is something to be off from
  assert _drift(small, said, experience) <= DRIFT
  np.testing.assert_array_equal(said.velocity, said.guided)


def test_without_thinking(small, params):
  experience = joint.sample(small, params["bagel"], think=False, side=SIDE)
  reading = joint.reading(system_ids=None, text=False)
  said = _say(small, params["bagel"], experience, reading)
  assert said.logp is None and _drift(small, said, experience) <= DRIFT


@pytest.mark.parametrize("think", [True, False])
def test_guidance_in_training_is_that_of_the_rollout(small, params, think):
  experience = joint.sample(
    small, params["bagel"], think=think, guidance=joint.GUIDANCE, side=SIDE)
  reading = joint.reading(guidance=joint.GUIDANCE)
  if not think:
    reading = dataclasses.replace(reading, system_ids=None, text=False)
  said = _say(small, params["bagel"], experience, reading)
  assert _drift(small, said, experience) <= DRIFT
  # Guided within the interval, which holds the first step alone.
  apart = jnp.abs(said.guided - said.velocity).max((0, 2, 3))
  assert apart[0] > 1e-3 and apart[1] == 0


def test_entropy_by_brute_force(small, params, experience):
  """From the logits of a row by itself, without padding."""
  said = _say(small, params["bagel"], experience, joint.reading())
  run = lambda *args, method: small.apply({"params": params["bagel"]}, *args, method=method)
  for row in (0, 1):
    mask = np.asarray(experience.text.mask[row])
    prompt = np.asarray(experience.prompt_ids[row])[np.asarray(experience.prompt_mask[row])]
    ids = [*joint.SYSTEM, *prompt, 280, *np.asarray(experience.text.ids[row])[mask]]
    ids = jnp.array(ids, jnp.int32)[None]
    _, hidden = run(ids, jnp.ones(ids.shape, bool), method="read_text")
    logp = jax.nn.log_softmax(run(hidden, method="logits")[0, -1 - mask.sum() : -1])
    np.testing.assert_allclose(
      said.entropy[row][mask], -(jnp.exp(logp) * logp).sum(-1), rtol=1e-5)
    assert (said.entropy[row][~mask] == 0).all()


def test_the_temperature_is_that_of_the_sampler(small, params, experience):
  hot = _say(small, params["bagel"], experience, joint.reading(temperature=2.0))
  assert float(jnp.abs(hot.logp - experience.text.logp).max()) > 0.01


def _gradients(model, params, experience, routing, *, text, flow):
  """Largest gradient of each group of parameters, and of the markers' embeddings."""
  reading = joint.reading(routing=routing, text=text, flow=flow)
  grid = joint.grid(model.config, SIDE)

  def loss(params):
    said = policy.say(model, params, experience, grid, reading)
    # Any loss would do: a projection that no symmetry cancels.
    values = said.logp if text else said.velocity
    return jnp.sum(values * jax.random.normal(jax.random.key(1), values.shape))

  grads = jax.jit(jax.grad(loss))(params)
  zero = jax.tree.map(jnp.zeros_like, grads)
  return joint.moved(zero, grads), grads


@pytest.mark.parametrize("routing", policy.ROUTINGS)
def test_where_gradients_of_the_flow_go(small, params, experience, routing):
  reached, grads = _gradients(
    small, params["bagel"], experience, routing, text=False, flow=True)
  assert reached["gen"] > 1e-3 and reached["latent"] > 1e-3
  und, embedded = reached["und"], grads["embed_tokens"]["embedding"]
  markers = np.zeros(len(embedded), bool)
  markers[list(small.image_markers)] = True
  if routing == "expert":
    assert und == 0 and reached["text"] == 0
    return
  assert und > 1e-4
  assert float(jnp.abs(embedded[markers]).min(0).max()) > 0
  # The words of the context are reached through the context alone.
  assert (float(jnp.abs(embedded[~markers]).max()) > 0) == (routing == "full")


def test_the_text_never_reaches_the_generation_expert(small, params, experience):
  reached, _ = _gradients(small, params["bagel"], experience, "full", text=True, flow=False)
  assert reached["gen"] == 0 == reached["latent"] and reached["und"] > 1e-3
  assert reached["text"] > 1e-3


def test_velocities_of_others_over_the_policys_context(small, params, experience):
  """`velocity_params` draw over the context that `params` read."""
  reading, grid = joint.reading(text=False), joint.grid(small.config, SIDE)
  other = jax.tree.map(lambda a: a * 1.01, params["bagel"])
  both = jax.jit(lambda a, b: policy.say(
    small, a, experience, grid, reading, velocity_params=b).velocity)
  mine, mixed = both(params["bagel"], params["bagel"]), both(params["bagel"], other)
  theirs = both(other, other)
  want = _say(small, params["bagel"], experience, reading).velocity
  # Two programs: float32 in another order of sums.
  np.testing.assert_allclose(mine, want, rtol=1e-6, atol=2e-6)
  assert float(jnp.abs(mixed - mine).max()) > 1e-4 < float(jnp.abs(mixed - theirs).max())
