"""A replay gives what was sampled, and its gradients go only where the routing lets them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax.episodes import replay

SIDE = 8  # 64 tokens: log ratios are means over 1024 elements.
DRIFT = 1e-6 / 1024**0.5  # Of means that are rounded to 2e-7, five standard deviations.


@pytest.fixture(scope="module")
def experience(small, params):
  return joint.sample(small, params["bagel"], side=SIDE)


@functools.cache
def _jitted(model, config):
  grid = joint.grid(model.config, SIDE)
  return jax.jit(lambda params, e: replay.replay(model, params, e, grid, config))


def _replay(model, params, experience, config):
  return _jitted(model, config)(params, experience)


def _drift(model, output, experience):
  return joint.flow_drift(model, output, experience, SIDE)


def test_it_gives_what_was_sampled(small, params, experience):
  """Padded prompts, reasonings that ended and that were cut: log-probabilities and log ratios."""
  text = experience.only.text
  assert text.finished.any() and not text.finished.all()
  assert not experience.prompt.mask.all()
  output = _replay(small, params["bagel"], experience, joint.replay_config())
  np.testing.assert_allclose(output.logp, text.logp, atol=1e-5)
  assert float(jnp.abs(text.logp).max()) > 1  # there is something to be off from
  assert _drift(small, output, experience) <= DRIFT
  np.testing.assert_array_equal(output.velocity, output.guided)


def test_without_thinking(small, params):
  experience = joint.sample(small, params["bagel"], joint.PLAIN, side=SIDE)
  output = _replay(small, params["bagel"], experience, joint.replay_config(joint.PLAIN))
  assert output.logp is None and _drift(small, output, experience) <= DRIFT


@pytest.mark.parametrize(
  "script", [joint.THINK_EDIT, joint.EDIT, joint.ANSWER], ids=["think_edit", "edit", "answer"]
)
def test_source_images_are_replayed(small, params, script):
  """Latents and patches of several sizes, each read once for the trajectories of its prompt."""
  experience = joint.sample(small, params["bagel"], script, side=SIDE)
  config = joint.replay_config(script)
  assert experience.source.grid.ids.shape[0] == len(joint.PROMPTS) < len(experience.adv)
  assert not experience.source.grid.mask.all() and not experience.source.patches.mask.all()
  output = _replay(small, params["bagel"], experience, config)
  others = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), experience.source)
  other = _replay(small, params["bagel"], experience.replace(source=others), config)
  assert (output.logp is None) == (script == joint.EDIT)
  assert (output.guided is None) == (script == joint.ANSWER)
  if output.logp is not None:
    np.testing.assert_allclose(output.logp, experience.only.text.logp, atol=1e-5)
    assert float(jnp.abs(other.logp - output.logp).max()) > 1e-3
  if output.guided is not None:
    assert _drift(small, output, experience) <= DRIFT
    assert _drift(small, other, experience) > 100 * DRIFT


@pytest.mark.parametrize(
  "script", [joint.THINK, joint.PLAIN, joint.THINK_EDIT], ids=["think", "plain", "think_edit"]
)
def test_guidance_in_training_is_that_of_the_rollout(small, params, script):
  experience = joint.sample(small, params["bagel"], script, guidance=joint.GUIDANCE, side=SIDE)
  config = joint.replay_config(script, guidance=joint.GUIDANCE)
  output = _replay(small, params["bagel"], experience, config)
  assert _drift(small, output, experience) <= DRIFT
  # Guided within the interval, which holds the first step alone.
  apart = jnp.abs(output.guided - output.velocity).max((0, 2, 3))
  assert apart[0] > 1e-3 and apart[1] == 0


def test_entropy_by_brute_force(small, params, experience):
  """From the logits of a row by itself, without padding."""
  output = _replay(small, params["bagel"], experience, joint.replay_config())
  run = lambda *args, method: small.apply({"params": params["bagel"]}, *args, method=method)

  @jax.jit
  def logps(ids):
    _, hidden = run(ids, jnp.ones(ids.shape, bool), method="read_text")
    return jax.nn.log_softmax(run(hidden, method="logits"))

  sampled, prompts = experience.only.text, experience.prompt
  for row in (0, 1):
    mask = np.asarray(sampled.mask[row])
    prompt = np.asarray(prompts.ids[row])[np.asarray(prompts.mask[row])]
    ids = [*joint.SYSTEM, *prompt, 280, *np.asarray(sampled.ids[row])[mask]]
    logp = logps(np.array(ids, np.int32)[None])[0, -1 - mask.sum() : -1]
    np.testing.assert_allclose(
      output.entropy[row][mask], -(jnp.exp(logp) * logp).sum(-1), rtol=1e-5)
    assert (output.entropy[row][~mask] == 0).all()


def test_the_temperature_is_that_of_the_sampler(small, params, experience):
  hot = _replay(small, params["bagel"], experience, joint.replay_config(temperature=2.0))
  assert float(jnp.abs(hot.logp - experience.only.text.logp).max()) > 0.01


def _gradients(model, params, experience, routing, *, text, flow):
  """Largest gradient of each group of parameters, and of the markers' embeddings."""
  config = joint.replay_config(routing=routing, text=text, flow=flow)
  grid = joint.grid(model.config, SIDE)

  def loss(params):
    output = replay.replay(model, params, experience, grid, config)
    # Any loss would do: a projection that no symmetry cancels.
    values = output.logp if text else output.velocity
    return jnp.sum(values * jax.random.normal(jax.random.key(1), values.shape))

  grads = jax.jit(jax.grad(loss))(params)
  zero = jax.tree.map(jnp.zeros_like, grads)
  return joint.moved(zero, grads), grads


@pytest.mark.parametrize("routing", replay.ROUTINGS)
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
  """`velocity_params` denoise over the context that `params` read."""
  config, grid = joint.replay_config(text=False), joint.grid(small.config, SIDE)
  other = jax.tree.map(lambda a: a * 1.01, params["bagel"])
  both = jax.jit(lambda a, b: replay.replay(
    small, a, experience, grid, config, velocity_params=b).velocity)
  same, mixed = both(params["bagel"], params["bagel"]), both(params["bagel"], other)
  others = both(other, other)
  want = _replay(small, params["bagel"], experience, config).velocity
  # Two programs: float32 in another order of sums.
  np.testing.assert_allclose(same, want, rtol=1e-6, atol=2e-6)
  assert float(jnp.abs(mixed - same).max()) > 1e-4 < float(jnp.abs(mixed - others).max())
