"""Algorithms as a run makes them: numbers that scale with the image, adapters over a bf16 base."""

import types as python_types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import joint
from unigrpo_jax import errors, types
from unigrpo_jax.algorithms import update
from unigrpo_jax.data import prompts
from unigrpo_jax.episodes import rollout
from unigrpo_jax.models import layers
from unigrpo_jax.recipe import config_files, parts, rl
from unigrpo_jax.runtime import folders, optim, sharding, state
from unigrpo_jax.sampling import windows


def _spec(*overrides):
  path = config_files.FOLDER / "unigrpo.py"
  overrides = [f"--config.{change}" for change in ("mesh.fsdp=1", *overrides)]
  return rl.read(config_files.load(f"{path}:tiny", overrides))


@pytest.fixture(scope="module")
def tiny():
  """The embedded BAGEL, without weights."""
  return state.open_network(_spec().network, jax.devices()[:1])


def _algorithm(network, *overrides):
  spec = _spec("flow.regulariser_weight=0.5", *overrides)
  return parts.make_algorithm(spec, network, rollout.Rollout(network, None, spec.rollout))


@pytest.mark.parametrize("objective", [*rl.SDE_OBJECTIVES, *rl.FORWARD_OBJECTIVES])
def test_the_regularisers_weight_scales_as_the_ratios_do(tiny, objective):
  """Tokens are 8 x 8 pixels, 32 numbers. sqrt(262144 / D) is 64 for D = 64, and 32 for D = 256."""
  chosen = f"flow.objective={objective}"
  small = _algorithm(tiny, chosen, "rollout.height=8", "rollout.width=16")
  large = _algorithm(tiny, chosen, "rollout.height=16", "rollout.width=32")
  fixed = _algorithm(tiny, chosen, "flow.scale_with_size=False")
  weights = [algorithm.regulariser_weight for algorithm in (small, large, fixed)]
  by_size = [32.0, 16.0, 0.5] if objective in rl.SDE_OBJECTIVES else [0.5, 0.5, 0.5]
  np.testing.assert_allclose(weights, by_size, rtol=1e-12)
  if objective == "grpo":
    clips = [algorithm.clip for algorithm in (small, large, fixed)]
    np.testing.assert_allclose(clips, [2e-5 * 64, 2e-5 * 32, 2e-5], rtol=1e-12)
  elif objective in ("awm", "fpo"):
    clip = {"awm": 0.1, "fpo": 0.05}[objective]
    assert small.clip == large.clip == fixed.clip == clip


def test_the_drift_guard_acts_on_percentiles(tiny):
  spec = _spec("drift.text=0.25", "drift.flow=0.5")
  assert parts.drift_limits(spec, tiny) == {"drift/text_scaled_p99": 0.25, "drift/flow_p99": 0.5}


def test_a_reward_models_questions_are_as_long_in_every_iteration(tiny):
  """As the longest that the run will ask, so that the update compiles once."""
  path = config_files.FOLDER / "refl.py"
  spec = rl.read(config_files.load(f"{path}:tiny", ["--config.mesh.fsdp=1"]))
  sampled = rollout.Rollout(tiny, None, spec.rollout)
  prompt_set = prompts.PromptSet([("a kite", {}), (" ".join(["a kite"] * 20), {}), ("a cat", {})])
  ask = parts.make_algorithm(spec, tiny, sampled, prompt_set).ask
  short, long = (ask([prompt_set[number]]) for number in (0, 1))
  assert short.ids.shape == long.ids.shape and short.lengths[0] < long.lengths[0] - 19
  assert not short.ids[0, int(short.lengths[0]) :].any()
  with pytest.raises(errors.InputError, match="a prompt is empty"):  # before anything is sampled
    parts.make_algorithm(spec, tiny, sampled, prompts.PromptSet([("a kite", {}), (" ", {})]))


@pytest.mark.parametrize("objective, numbers", [
  ("dppo", dict(threshold=0.5)), ("nft", dict(beta=0.5, bound=3.0)),
  ("awm", dict(weighting="t2", ratio="sum_first", clip=0.25, bound=2.0)),
  ("fpo", dict(weighting="uniform", ratio="per_pair", surrogate="spo", clip=0.25, cap=3.0)),
])
def test_an_objective_has_its_own_numbers(tiny, objective, numbers):
  keys = [f"flow.{objective}_{name}={value}" for name, value in numbers.items()]
  made = _algorithm(tiny, f"flow.objective={objective}", *keys)
  assert {name: getattr(made, name) for name in numbers} == numbers


def test_bounds_of_zero_are_none(tiny):
  unbounded = _algorithm(tiny, "flow.objective=awm", "flow.awm_clip=0", "flow.awm_bound=0")
  assert (unbounded.clip, unbounded.bound) == (float("inf"), None)
  assert _algorithm(tiny, "flow.objective=fpo", "flow.fpo_cap=0").cap == float("inf")


def test_a_window_moves_as_its_keys_say():
  moves = ("iterations=7", "stride=2", "dwell=linear", "roll_back=True")
  spec = _spec("rollout.window=progressive", *(f"rollout.moving_{change}" for change in moves))
  assert spec.window.moving == windows.Moving(7, stride=2, roll_back=True, dwell="linear")
  assert _spec("rollout.moving_stride=0").window.moving.stride is None
  first = [int(rl.window_steps(spec, iteration)[0, 0]) for iteration in (1, 7, 8)]
  assert first == [0, 0, 2]  # it stays where it begins for seven iterations


@pytest.mark.parametrize("same", [True, False])
def test_a_group_may_start_from_the_same_noise(tiny, same):
  """What follows is each image's own: its tokens, and the noise of its steps."""
  spec = _spec(f"rollout.same_noise={same}", "group_size=3")
  sampled = rollout.Rollout(tiny, None, spec.rollout)
  drawn = sampled.randomness(jax.random.key(0), 6, sampled.prepare(["a kite", "a cat"]))
  starts = {row.tobytes() for row in np.asarray(drawn.noise)}
  groups = np.asarray(drawn.noise).reshape(2, 3, -1)
  assert len(starts) == (2 if same else 6) and (groups[:, 1:] == groups[:, :1]).all() == same
  for keys in (drawn.text, drawn.steps):
    assert len({row.tobytes() for row in np.asarray(jax.random.key_data(keys))}) == 6


@pytest.fixture(scope="module")
def adapted(golden):
  """The golden BAGEL in bfloat16 with adapters."""
  spec = state.NetworkSpec(
    str(golden), random_init=False, dtype="bfloat16", remat="none", attention="plain",
    mesh=dict(data=1, fsdp=1, tensor=1), lora=layers.Lora(rank=2, alpha=4.0),
  )
  markers = python_types.SimpleNamespace(vision_start=285, vision_end=286)
  folder = folders.open_folder(golden)
  return state.build_network(spec, folder, markers, jax.devices()[:1])


@pytest.mark.slow
def test_the_base_under_adapters_has_the_networks_dtype_and_stays(adapted):
  """In the layout, in the first state, and after an optimizer step; so does its moving average."""
  optimizer = joint.optimizer()
  layout = state.layout(adapted, optimizer, ema=True, reference=False)
  start = state.first_state(adapted, optimizer, layout, random_init=False, seed=0)
  labels = optim.groups(start.params)
  for tree in (layout.abstract.params, layout.abstract.ema, start.params, start.ema):
    for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(labels), strict=True):
      assert leaf.dtype == (jnp.bfloat16 if group == "base" else jnp.float32), group
  assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(start.opt_state))
  fn = joint.whole(update.make_update(
    adapted.model, optimizer, joint.grid(adapted.config), joint.algorithm(regulariser="none"),
    joint.schedule(microbatches=1), trained={"und", "gen"}, ema_decay=0.99,
  ))
  with sharding.activate(adapted.mesh):
    experience = joint.sample(adapted.model, start.params)
    after, metrics = jax.jit(fn, out_shardings=(layout.shardings, None))(start, experience)
  assert jnp.isfinite(metrics["loss/total"]).all()
  chex.assert_trees_all_equal_dtypes(after, start)
  for tree in (after.params, after.ema):
    _, base = optim.split(tree, {"und", "gen"})
    chex.assert_trees_all_equal(base, optim.split(start.params, {"und", "gen"})[1])
  moved = joint.moved(start.params, after.params)
  assert {group for group, size in moved.items() if size} == {"und", "gen"}


def _update(metrics, limits=None, moves=True):
  """An `Update` of a state that only counts its optimizer steps, which all were taken or none."""
  def fn(train_state, *_):
    given = {name: jnp.array(values) for name, values in metrics.items()}
    return train_state.replace(step=train_state.step + moves), given

  run = update.Update(lambda *_: {}, fn, drift_limits=limits or {})
  return run(types.TrainState(jnp.int32(3), jnp.zeros(2), (), None), None)


def test_metrics_are_of_the_last_optimizer_step_and_drift_of_the_first():
  after, metrics = _update({"loss/total": [1.0, 2.0], "drift/text": [0.5, 7.0]})
  assert int(after.step) == 4 and metrics == {"loss/total": 2.0, "drift/text": 0.5}


@pytest.mark.parametrize("moves", [True, False])
def test_an_update_with_a_number_that_is_not_finite_is_rejected(moves):
  with pytest.raises(errors.UpdateRejected, match="grad_norm/und not finite") as caught:
    _update({"loss/total": [1.0, 2.0], "grad_norm/und": [np.nan, 2.0]}, moves=moves)
  # The state before is there to be saved only where no optimizer step moved it.
  assert (caught.value.state is None) == moves


def test_both_programs_get_the_compilers_options():
  run = update.Update(
    lambda *_: {}, lambda state, *_: (state, {}), drift_limits={},
    compiler_options={"xla_no_such_option": 1},
  )
  for program, inputs in ((run.jitted_precompute, (0, 0)), (run.jitted, (0, 0, None, None))):
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
      program(*inputs)


def test_an_error_before_the_update_costs_no_state():
  """One of the devices, which the host learns of late: the state is not donated before."""
  def fail(params):
    raise ValueError("out of memory")

  def precompute(state, experience):
    values = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), state.params)
    return {"velocity_ref": values}

  def change(state, experience, *_):
    return state.replace(params=state.params + experience.only.velocity_ref), {}

  run = update.Update(precompute, change, drift_limits={})
  train_state = types.TrainState(jnp.int32(3), jnp.zeros(2), (), None)
  experience = types.Experience(None, None, (types.Round(None, None),))
  with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
    run(train_state, run.precompute(train_state, experience))
  assert not train_state.params.is_deleted()


def test_an_update_whose_sampler_drifted_is_rejected():
  metrics = {"drift/text_scaled_p99": [0.5, 0.0], "drift/flow_p99": [2e-8, 9.0]}
  _update(metrics, {"drift/text_scaled_p99": 0.5, "drift/flow_p99": 2e-8})
  for name, key, limit in (
    ("drift/text_scaled_p99", "config.drift.text", 0.4),
    ("drift/flow_p99", "config.drift.flow", 1e-8),
  ):
    with pytest.raises(errors.UpdateRejected, match=f"{name}=.*raise {key}$"):
      _update(metrics, {name: limit}, moves=False)
