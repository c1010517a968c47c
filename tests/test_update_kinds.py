"""What the update becomes without one modality, with other objectives, and with adapters."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax.algorithms import base, forward, grpo, update
from unigrpo_jax.episodes import replay
from unigrpo_jax.losses import flow as flow_losses
from unigrpo_jax.losses import text as text_losses
from unigrpo_jax.models import bagel, layers
from unigrpo_jax.runtime import optim, sharding
from unigrpo_jax.sampling import times

BOTH = dict(und=1e-2, gen=1e-2)


def _of(kind=grpo.GRPO, **changes):
  """An algorithm whose trajectories are replayed with changes."""
  return joint.algorithm(kind, replay=joint.replay_config(**changes))


def _groups(before, after):
  return {group for group, size in joint.moved(before.params, after.params).items() if size}


def test_text_alone(run, experience):
  after, before, metrics = run(
    experience, algorithm=_of(flow=False), reference=None)
  assert _groups(before, after) == {"und"} and "loss/flow" not in metrics
  assert metrics["loss/total"] == metrics["loss/text"]


def test_images_alone(run, experience):
  """The reasonings are context."""
  after, before, metrics = run(
    experience, algorithm=_of(text=False), reference=None)
  assert _groups(before, after) == {"gen"} and "loss/text" not in metrics


def test_images_without_thinking(run, small, params):
  experience = joint.sample(small, params["bagel"], joint.PLAIN)
  after, before, metrics = run(
    experience, algorithm=_of(script=joint.PLAIN), reference=None)
  assert _groups(before, after) == {"gen"} and metrics["drift/flow"][0] < 1e-7


@pytest.mark.slow
def test_source_images_go_with_their_prompts(run, small, params):
  """However prompts and their groups are cut into microbatches."""
  experience = joint.sample(small, params["bagel"], joint.EDIT)
  update_of = lambda experience: run(
    experience, algorithm=_of(script=joint.EDIT), reference=None,
    schedule=joint.schedule(microbatches=4, group_parts=2))
  after, before, metrics = update_of(experience)
  assert _groups(before, after) == {"gen"} and metrics["drift/flow"][0] < 1e-7
  others = jax.tree.map(lambda a: a[::-1], experience.source)
  assert update_of(experience.replace(source=others))[2]["drift/flow"][0] > 1e-5


@pytest.mark.parametrize("kind", [forward.NFT, forward.FPO])
def test_algorithms_that_noise_the_image_again(run, experience, kind):
  noised = forward.noise_again(jax.random.key(3), experience, times.Times(3))
  x_t, t = noised.only.flow.x_t, noised.only.flow.t[..., None, None]
  np.testing.assert_allclose(
    x_t, (1 - t) * experience.only.flow.latents[:, None] + t * noised.only.noise, atol=1e-6)
  after, before, metrics = run(noised, algorithm=_of(kind, text=False), reference=None)
  assert _groups(before, after) == {"gen"}
  if kind is not forward.NFT:
    assert metrics["flow/log_ratio_max"][0] == 0 == metrics["loss/flow"][0]


def test_awm_is_held_near_its_anchor(run, experience, params):
  """Which has moved a little before, and follows the policy once, after both epochs."""
  noised = forward.noise_again(jax.random.key(3), experience, times.Times(3))
  anchor = update.Anchor(frozenset({"gen"}), rise=0.1, highest=0.3)
  own, _ = optim.split(params["bagel"], anchor.groups)
  anchored = jax.tree.map(lambda a: a + 1e-2, own)
  algorithm = dataclasses.replace(_of(forward.AWM, text=False), anchor_weight=2.0)
  after, before, metrics = run(
    noised, algorithm=algorithm, reference=None, schedule=joint.schedule(epochs=2), anchor=anchor,
    anchored=anchored)
  assert _groups(before, after) == {"gen"}
  # Two optimizer steps: the decay is 0.2.
  moved, _ = optim.split(after.params, anchor.groups)
  want = jax.tree.map(lambda a, b: 0.2 * a + 0.8 * b, anchored, moved)
  chex.assert_trees_all_close(after.anchor, want, rtol=1e-6, atol=1e-8)
  assert metrics["flow/log_ratio_max"][0] == 0 == metrics["loss/flow"][0]
  assert metrics["flow/anchor_mse"][0] > 1e-6
  np.testing.assert_allclose(
    metrics["loss/anchor"], 2.0 * metrics["flow/anchor_mse"], rtol=1e-5)
  # A step that is not finite moves neither.
  broken = noised.replace(adv=noised.adv.at[3].set(jnp.nan))
  after, before, _ = run(
    broken, algorithm=algorithm, reference=None, schedule=joint.schedule(epochs=2), anchor=anchor,
    anchored=anchored)
  chex.assert_trees_all_equal(after.anchor, anchored)
  chex.assert_trees_all_equal(after.params, before.params)


def test_flow_dppo_drops_steps_that_went_too_far(run, experience):
  """Its second epoch is far from the first: the terms that would go further are gone."""
  after, before, metrics = run(
    experience, reference=None, schedule=joint.schedule(epochs=2), rates=dict(gen=1e-2),
    algorithm=dataclasses.replace(_of(grpo.DPPO, text=False), threshold=1e-9))
  assert _groups(before, after) == {"gen"}
  dropped, gradient = metrics["flow/clip_fraction"], metrics["grad_norm/gen"]
  assert dropped[0] == 0 and dropped[1] > 0.5 and gradient[1] < 0.5 * gradient[0]


def _adapted(small, params, *, up):
  """(network with adapters, its parameters): `up` is the size of the second factors."""
  network = small.clone(lora=layers.Lora(rank=2, alpha=4.0))
  fresh = network.init(jax.random.key(0), bagel.example_batch(small.config))["params"]
  fresh = sharding.unbox(fresh)

  def fill(mine, given, key):
    out = {}
    for i, (name, value) in enumerate(sorted(mine.items())):
      own = jax.random.fold_in(key, i)
      if isinstance(value, dict):
        out[name] = fill(value, given[name], own)
      elif name == layers.LORA_UP:
        out[name] = up * jax.random.normal(own, value.shape)
      else:
        out[name] = given.get(name, value)
    return out

  return network, fill(fresh, params["bagel"], jax.random.key(1))


def _replay(model, params, experience):
  grid, config = joint.grid(model.config), joint.replay_config()
  return jax.jit(lambda params: replay.replay(model, params, experience, grid, config))(params)


@pytest.mark.slow
def test_adapters(run, small, params, experience):
  """At the start nothing changes; later they equal merged kernels, and without them the start."""
  base = _replay(small, params["bagel"], experience)
  network, start = _adapted(small, params, up=0.0)
  chex.assert_trees_all_close(_replay(network, start, experience), base, atol=2e-6)
  network, later = _adapted(small, params, up=0.03)
  adapted = _replay(network, later, experience)
  assert float(jnp.abs(adapted.velocity - base.velocity).max()) > 0.1
  assert float(jnp.abs(adapted.logp - base.logp).max()) > 0.1
  merged = layers.merge_lora(later, network.lora)
  chex.assert_trees_all_equal_structs(merged, params["bagel"])
  chex.assert_trees_all_close(_replay(small, merged, experience), adapted, atol=5e-5)
  ignored = _replay(network.clone(lora=None), later, experience)
  chex.assert_trees_all_equal(ignored, base)
  # Only they are their experts' groups.
  labels = dict(zip(
    ["/".join(entry.key for entry in path)
     for path, _ in jax.tree_util.tree_leaves_with_path(later)],
    jax.tree.leaves(optim.groups(later)), strict=True))
  for name, group in labels.items():
    adapter = name.endswith((layers.LORA_DOWN, layers.LORA_UP))
    beneath = name.startswith(("layers/", "norm/")) and not adapter
    assert (group in ("und", "gen")) == adapter and (group == "base") == beneath, name
  assert {"und", "gen", "base"} <= set(labels.values())
  mine, others = optim.split(later, {"und", "gen"})
  assert len(jax.tree.leaves(mine)) + len(jax.tree.leaves(others)) == len(labels)
  chex.assert_trees_all_equal(optim.join(mine, others), later)


@pytest.mark.slow
def test_the_reference_of_adapters_is_what_lies_under_them(run, small, params, experience):
  """No copy of it is kept: 0 from it at the start, more than 0 later; and the base stays."""
  network, later = _adapted(small, params, up=0.03)
  after, before, metrics = run(
    experience, model=network, start=later, reference={},
    algorithm=joint.algorithm(text=joint.text_objective(kl_weight=0.1)))
  base, adapted = (_replay(m, later, experience).velocity for m in (small, network))
  np.testing.assert_allclose(
    metrics["flow/mse"][0], jnp.square(adapted - base).mean(), rtol=1e-4)
  assert metrics["text/kl_ref"][0] > 1e-4
  assert _groups(before, after) == {"und", "gen"}  # "base" is not among them


@pytest.mark.slow
def test_the_references_log_probabilities_do_not_come_from_the_policys_context(
  run, small, params, experience
):
  """Over the policy's context, velocities of the reference change; its log-probabilities do not."""
  trained, rest = optim.split(params["bagel"], {"und"})
  away = optim.join(jax.tree.map(lambda a: 1.05 * a, trained), rest)
  kinds = [
    run(experience, start=away, context=context,
        algorithm=joint.algorithm(text=joint.text_objective(kl_weight=0.1)))[2]
    for context in (True, False)
  ]
  np.testing.assert_allclose(*[metrics["text/kl_ref"] for metrics in kinds], rtol=1e-4)
  assert kinds[0]["text/kl_ref"][0] > 1e-5
  # Only "und" differs: over one context the velocities differ by the markers alone.
  assert kinds[1]["flow/mse"][0] < 0.9 * kinds[0]["flow/mse"][0]


@pytest.mark.parametrize("where", ["adv", "params"])
def test_what_is_not_finite_leaves_the_state_as_it_was(run, small, params, experience, where):
  start = params["bagel"]
  if where == "adv":
    experience = experience.replace(adv=experience.adv.at[3].set(jnp.nan))
  else:
    start = start | {"norm": jax.tree.map(lambda a: a.at[0].set(jnp.nan), start["norm"])}
  after, before, metrics = run(
    experience, start=start, reference=None, ema_decay=0.9,
    algorithm=joint.algorithm(regulariser="none"))
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.isfinite(metrics["loss/total"]).any()
  assert not np.isfinite(update.summarise(metrics)["loss/total"])


@pytest.mark.slow
def test_the_gradient_of_the_joint_loss_is_numerically_right(small, params, experience):
  """Central differences along random directions of each group, ratios away from 1.

  The loss is 1 and rounded to 1e-7, its change over a step of 2e-3 is 1e-2: so are the tolerances.
  """
  grid, algorithm = joint.grid(small.config), joint.algorithm(
    replay=joint.replay_config(routing="full"), clip=1.0,
    text=joint.text_objective(clip_low=9.0, clip_high=9.0))
  text, drawn = experience.only.text, experience.only.flow
  weights = {
    "text": text_losses.token_weights(
      text.mask, experience.valid, aggregation=algorithm.text.aggregation,
      max_tokens=algorithm.text.max_tokens),
    "flow": flow_losses.step_weights(experience.valid, len(joint.STEPS)),
  }
  noise = jax.random.normal(jax.random.key(5), drawn.mean.shape)
  old = base.Values(logp=text.logp - 0.1, flow=drawn.mean + 0.01 * noise)
  given = experience.with_only(velocity_ref=0.3 * noise)

  def loss(params):
    output = replay.replay(small, params, given, grid, algorithm.replay)
    return algorithm.loss(output, given, old, weights, grid, None)[0]

  both = jax.jit(jax.value_and_grad(loss))
  start = params["bagel"]
  _, grads = both(start)
  labels = optim.groups(start)
  for number, group in enumerate(("und", "gen", "text", "latent")):
    keys = iter(jax.random.split(jax.random.key(number), 200))
    way = jax.tree.map(
      lambda a, g, group=group, keys=keys: jax.random.normal(next(keys), a.shape) * (g == group)
      * jnp.sqrt(jnp.mean(jnp.square(a))), start, labels)
    # Half of it along the gradient, so that the change is not lost in rounding.
    size = lambda tree: float(jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(tree))))
    own = jax.tree.map(lambda a, g, group=group: a * (g == group), grads, labels)
    way = jax.tree.map(lambda a, b: a / size(way) + b / size(own), way, own)  # noqa: B023
    slope = float(sum(
      jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(way), jax.tree.leaves(grads), strict=True)))
    h = 2e-3 / max(slope, 0.1)
    ends = [float(both(jax.tree.map(lambda a, b, s=s: a + s * b, start, way))[0]) for s in (h, -h)]  # noqa: B023
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-2), group
