"""The planner: a config's programs without their weights, what is said of them, what is refused."""

import dataclasses
import json

import jax
import pytest

from unigrpo_jax import errors, plan
from unigrpo_jax.recipe import config_files
from unigrpo_jax.runtime import runs
from unigrpo_jax.tools.plan import advice, chips, hlo, page, programs, topology

GIB = chips.GIB
CHIP = chips.CHIPS["v6e"]


def _phase(name, temporaries=0.0, flops=1e12, exceeds=None, collectives=()):
  program = None if exceeds else hlo.Program(flops, 1e9, tuple(collectives), (), (), 8)
  sizes = {} if exceeds else {
    "arguments": 0, "results": 0, "temporaries": int(temporaries * GIB)
  }
  return programs.Phase(name, 2, 16 * 1e12, program, sizes, exceeds, 1.0)


def _plan(**changed):
  phases = {name: _phase(name) for name in programs.PHASES}
  phases |= {name: phase for name, phase in changed.items()}
  held = {"parameters": 2 * GIB, "optimizer": 4 * GIB, "moving average": 0, "reference": GIB,
          "sampler": 3 * GIB, "cache": 2 * GIB, "recorded": GIB}
  return programs.Plan({"data": 1, "fsdp": 4, "tensor": 2}, held, phases, 768)


@pytest.fixture(scope="module")
def tiny():
  """The embedded checkpoint's programs on one device, compiled by the CPU's compiler."""
  config = config_files.load("unigrpo", "tiny", [
    "prompts_per_step=2", "rollout.prompts_at_once=1", "group_size=4", "microbatch=4",
  ])
  network = runs.open_network(config, jax.devices()[:1])
  named = []
  planner = programs.Planner(config, network)
  return config, planner.run(named.append), named


def test_every_phase_is_compiled_once_and_named(tiny):
  _, planned, named = tiny
  assert tuple(planned.phases) == programs.PHASES == tuple(n for n in named if n != "fork")
  assert planned.trajectories == 8
  assert [planned.phases[name].runs for name in programs.PHASES] == [1, 2, 2, 2, 2, 1]


def test_held_bytes_are_those_of_a_real_state(tiny):
  """Against the state that training makes from the same config."""
  config, planned, _ = tiny
  network = runs.open_network(config, jax.devices()[:1])
  optimizer = runs.make_optimizer(config)
  abstract, where = runs.state_layout(network, optimizer, ema=False, reference=True)
  state = runs.first_state(network, optimizer, where, random_init=False, seed=0)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  assert planned.held["parameters"] == size(state.params) == planned.held["sampler"]
  assert planned.held["optimizer"] == size(state.opt_state)
  assert planned.held["reference"] == size(state.reference)
  assert planned.held["moving average"] == 0
  # Keys and values of 4 trajectories, 64 tokens and 2 more each, after 86 of one prompt; and some
  # integers.
  llm = network.folder.config.llm
  token = 2 * 4 * llm.num_layers * llm.num_kv_heads * llm.head_dim
  slots = 4 * (config.rollout.max_tokens + 2) + 46 + config.rollout.prompt_tokens
  assert 0 < planned.held["cache"] - token * slots < 0.1 * token * slots


def test_compiled_flops_are_those_of_the_formulas(tiny):
  """The VAE and the layout have no formula; padding and recomputing explain what is above 1."""
  _, planned, _ = tiny
  for name in ("read", "decode", "denoise", "update"):
    phase = planned.phases[name]
    ratio = phase.program.flops * phase.runs / phase.model_flops
    assert 0.97 < ratio < 1.3, (name, ratio)


def test_record_by_hand():
  gather = hlo.Collective(
    "all-gather", 8e9, tuple((i, i + 2, i + 4, i + 6) for i in (0, 1)), 3, "x", "", "")
  told = page.record(_plan(denoise=_phase("denoise", 5, collectives=[gather])), CHIP)
  # state 7 GiB, sampler 3, cache 2, recorded 1, and 5 of its own
  assert told["peak"]["denoise"] == 18 * GIB == max(told["peak"].values())
  assert told["peak"]["update"] == 8 * GIB and told["peak"]["read"] == 11 * GIB
  assert told["fits"] and told["spare"] == pytest.approx(1 - 18 / 31.25)
  drawn = told["phases"]["denoise"]
  assert drawn["collectives"] == [
    {"kind": "all-gather", "axis": "fsdp", "bytes": 2 * 3 * 0.75 * 8e9}]
  assert drawn["times"]["interconnect"] == pytest.approx(36e9 / 200e9)
  assert drawn["times"]["compute"] == pytest.approx(2e12 / 918e12)
  assert drawn["bound"] == "interconnect" and drawn["model_flops"] == 2e12
  rest = 5 * max(2e12 / 918e12, 2e9 / 1638e9)
  assert told["seconds"] == pytest.approx(0.18 + rest)
  assert told["images_per_hour"] == pytest.approx(3600 * 768 / told["seconds"])
  assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("phase, verdict, words", [
  (_phase("update", 5), "fits", []),
  (_phase("update", 21), "too tight", ["config.microbatch=32", "LoRA"]),
  # 42 GiB of its own and 21.9 too many: half is not enough, a quarter is.
  (_phase("update", exceeds=50 * GIB), "does not fit", ["config.microbatch=16", "LoRA"]),
  # With the cache 42 of its own and 24.9 too many.
  (_phase("denoise", 40), "does not fit",
   ["rollout.prompts_at_once=4", "rollout.layout", "mesh.tensor=4", "LoRA"]),
])
def test_verdict_and_first_changes(phase, verdict, words):
  config = config_files.load("unigrpo")
  planned = _plan(**{phase.name: phase})
  told = page.record(planned, CHIP)
  lines = advice.changes(config, planned, told, CHIP)
  assert f"{verdict}" in page.text("v6e:2x4", told, CHIP)
  assert told["fits"] == (verdict == "fits") == (lines == [])
  for word in words:
    assert any(word in line for line in lines[1:]), (word, lines)
  freed = [float(line.split("about ")[1].split()[0]) for line in lines[1:]]
  assert freed == sorted(freed, reverse=True)


def test_some_phases_alone_have_no_time_of_an_iteration():
  planned = _plan()
  some = dataclasses.replace(planned, phases={"update": _phase("update", 5)})
  told = page.record(some, CHIP)
  assert told["fits"] and told["seconds"] is None and set(told["peak"]) == {"update"}
  assert "at best" not in page.text("v6e:2x4", told, CHIP)


def test_a_phase_that_does_not_fit_stops_no_page():
  told = page.record(_plan(update=_phase("update", exceeds=50 * GIB)), CHIP)
  assert told["seconds"] is None and told["images_per_hour"] is None
  text = page.text("v6e:2x4", told, CHIP)
  assert "does not fit: update needs 50.00 GiB, 18.75 more" in text
  assert " no " in page.comparison({"v6e:2x4": told})


@pytest.mark.parametrize("arguments, words", [
  (["--topology=v5p:4x4x4"], "--config"),
  (["--config=configs/unigrpo.py", "--topology=v9:2x2"], "v5p, v6e, v5e"),
  (["--config=configs/unigrpo.py", "--topology=v6e"], "a colon and a shape"),
  (["--config=none.py", "--topology=v6e:2x2"], "no such config"),
  (["--config=configs/sft.py", "--topology=v6e:2x2"], "only unigrpo"),
  (["--config=configs/unigrpo.py:no", "--topology=v6e:2x2"], "is none of"),
  (["--config=configs/unigrpo.py", "--topology=v6e:2x2", "--config.no=1"], "no key"),
  (["--config=configs/unigrpo.py", "--topology=v6e:2x2", "--no=1"], "--no=1"),
])
def test_refusals(arguments, words):
  with pytest.raises(errors.InputError) as caught:
    plan.main(arguments)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  def missing(**_):
    raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology. See the docs")

  monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
  with pytest.raises(errors.InputError, match="requirements-tpu.txt"):
    plan.main(["--config=configs/unigrpo.py", "--topology=v5p:4x4x4"])


@pytest.mark.parametrize("words, wanted", [
  ("RESOURCE_EXHAUSTED: Used 97.51G of 95.74G hbm. Exceeded", 97.51),
  ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
   "(107.34G) exceeds available HBM (15.75G).", 107.34),
])
def test_a_program_that_is_too_big_says_what_it_wanted(words, wanted):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(words)

  function = lambda: None
  function.lower = Lowered
  phase, results = programs.compile_phase("update", function, runs=1, model_flops=None)
  assert results is None and phase.exceeds == wanted * GIB and phase.program is None


