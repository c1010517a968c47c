"""What the backward pass computes again changes no gradient, only how much is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax.models import bagel, layers, lowering
from unigrpo_jax.tools.plan import hlo

LOOP, STRAIGHT = lowering.Lowering(), lowering.Lowering(unroll=True)
POLICIES = {LOOP: tuple(layers.REMAT), STRAIGHT: ("full", "layer", "none")}


@pytest.fixture(scope="module", params=[
  pytest.param(LOOP, marks=pytest.mark.slow), STRAIGHT,
], ids=["loop", "straight"])
def gradients(request, config, model, params):
  """{policy: (gradient, FLOPs of its program)} of a text's logits and of an image that reads it.

  With the layers as a loop, and one after the other.
  """
  rng = np.random.default_rng(0)
  ids, mask = rng.integers(4, 90, (2, 6)), np.arange(6) < np.array([[6], [4]])
  x = rng.normal(size=(2, 4, config.latent_dim)).astype(np.float32)
  weights = rng.normal(size=(2, 6, config.llm.vocab_size)).astype(np.float32)
  grid = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), joint.grid(config))

  def loss(p, network):
    run = functools.partial(network.apply, {"params": p})
    context = bagel.empty_context(config, 2, 6, jnp.float32)
    context, hidden = run(context, ids, mask, method="append_text")
    velocity = run(context, x, jnp.full(2, 0.5), grid, method="velocity")
    logits = run(hidden, method="logits")
    return jnp.sum(jnp.where(mask[..., None], logits * weights, 0)) + jnp.sum(velocity**2)

  def compiled(policy):
    network = model.clone(remat=policy, lowering=request.param)
    gradient = jax.jit(jax.grad(functools.partial(loss, network=network)))
    program = gradient.lower(params["bagel"]).compile()
    return program(params["bagel"]), hlo.read(program.as_text()).flops

  return {policy: compiled(policy) for policy in POLICIES[request.param]}


def test_gradients_are_equal(gradients):
  """To the norm of each parameter's gradient; all of the decoder's layers have one."""
  norm = lambda tree: jax.tree.map(jnp.linalg.norm, tree["layers"])
  want, _ = gradients["none"]
  for policy, (got, _) in gradients.items():
    difference, size = norm(jax.tree.map(jnp.subtract, got, want)), norm(want)
    for off, of in zip(jax.tree.leaves(difference), jax.tree.leaves(size), strict=True):
      assert off <= 2e-6 * of and of > 0, policy


def test_what_is_kept_is_not_computed_again(gradients):
  flops = {policy: flops for policy, (_, flops) in gradients.items()}
  assert flops["full"] > flops["layer"] > flops["none"]
  for policy in set(flops) - {"full", "layer", "none"}:
    assert flops["full"] > flops[policy] > flops["none"], policy
  if "mlp" in flops:
    assert min(flops["attention"], flops["mlp"]) > flops["layer"]
