"""The planner: a config's programs without their weights, its pages, advice and refusals."""

import dataclasses
import functools
import json
import operator
import re

import jax
import pytest

from unigrpo_jax import errors
from unigrpo_jax.recipe import config_files, rl
from unigrpo_jax.reward_models import learned
from unigrpo_jax.runtime import state
from unigrpo_jax.tools.plan import (
  advice,
  chips,
  command,
  figures,
  hlo,
  hlo_text,
  page,
  planner,
  plans,
  topology,
)

UNIGRPO, REFL = (str(config_files.FOLDER / name) for name in ("unigrpo.py", "refl.py"))
GIB = chips.GIB
CHIP = chips.CHIPS["v6e"]


def _phase(name, temporaries=0.0, flops=1e12, exceeds=None, collectives=()):
  program = None if exceeds else hlo.Program(flops, 1e9, tuple(collectives), ())
  sizes = {} if exceeds else {
    "arguments": 0, "results": 0, "temporaries": int(temporaries * GIB)
  }
  return plans.Phase(name, 2, 16 * 1e12, program, sizes, exceeds, 1.0)


def _plan(**changed):
  phases = {name: _phase(name) for name in plans.PHASES}
  phases |= changed
  held = {"parameters": 2 * GIB, "optimizer": 4 * GIB, "moving average": 0, "reference": GIB,
          "sampler": 3 * GIB, "cache": 2 * GIB, "recorded": GIB}
  mesh = {"data": 1, "fsdp": 4, "tensor": 2}
  return plans.Plan(mesh, mesh, held, phases, 768)


@pytest.fixture(scope="module")
def tiny():
  """The embedded checkpoint's programs on one device, compiled by the CPU's compiler."""
  config = config_files.load(f"{UNIGRPO}:tiny", [
    "--config.prompts_per_step=2", "--config.rollout.prompts_at_once=1", "--config.group_size=4",
    "--config.microbatch=4",
  ])
  spec, named = rl.read(config), []
  network = state.open_network(spec.network, jax.devices()[:1])
  return spec, planner.Planner(spec, network, named.append).run(), named


def test_every_phase_is_compiled_once_and_named(tiny):
  _, planned, named = tiny
  assert tuple(planned.phases) == plans.PHASES == tuple(n for n in named if n != "fork")
  assert planned.trajectories == 8
  assert [planned.phases[name].runs for name in plans.PHASES] == [1, 2, 2, 2, 2, 1, 1]


def test_held_bytes_are_those_of_a_real_state(tiny):
  """Against the state that training makes from the same config."""
  spec, planned, _ = tiny
  network = state.open_network(spec.network, jax.devices()[:1])
  optimizer = spec.optimizer.make()
  layout = state.layout(network, optimizer, ema=False, reference=True)
  first = state.first_state(network, optimizer, layout, random_init=False, seed=0)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  assert planned.held["parameters"] == size(first.params) == planned.held["sampler"]
  assert planned.held["optimizer"] == size(first.opt_state)
  assert planned.held["reference"] == size(first.reference)
  assert planned.held["moving average"] == 0
  # Keys and values of 4 trajectories, 64 tokens and 2 more each, after 86 of one prompt; and some
  # integers.
  llm = network.config.llm
  token = 2 * 4 * llm.num_layers * llm.num_kv_heads * llm.head_dim
  slots = 4 * (spec.rollout.settings.max_tokens + 2) + 46 + spec.rollout.prompt_tokens
  assert 0 < planned.held["cache"] - token * slots < 0.1 * token * slots


def test_compiled_flops_are_those_of_the_formulas(tiny):
  """The VAE and the layout have no formula; padding and recomputing explain what is above 1."""
  _, planned, _ = tiny
  for name in ("read", "decode", "denoise", "precompute", "update"):
    phase = planned.phases[name]
    ratio = phase.program.flops * phase.runs / phase.model_flops
    assert 0.97 < ratio < 1.3, (name, ratio)


@pytest.mark.parametrize("file, overrides", [
  (UNIGRPO, ["--config.flow.objective=nft", "--config.ema_decay=0.99",
             "--config.flow.anchor_weight=1"]),
  pytest.param(
    UNIGRPO, ["--config.rollout.think=false", "--config.text.train=false"],
    marks=pytest.mark.slow),
  (UNIGRPO, ["--config.flow.train=false", "--config.lora.rank=4"]),
  # Each trajectory reads the prompt itself.
  (UNIGRPO, ["--config.rollout.prompts_at_once=1", "--config.group_size=8",
             "--config.microbatch=8"]),
  # A reward model, and the autoencoder that decodes for it.
  pytest.param(REFL, [], marks=pytest.mark.slow),
])
def test_shapes_fit_in_every_kind_of_run(file, overrides):
  """On 8 devices, nothing compiled: each program takes what the one before it gives."""
  spec = rl.read(config_files.load(f"{file}:tiny", ["--config.mesh.tensor=1", *overrides]))
  network = state.open_network(spec.network, jax.devices())
  planned = planner.Planner(spec, network, only=()).run()
  assert planned.phases == {} and planned.held["parameters"] > 0
  # Of the rollout, and beside every phase of the next chunk: known without the update's program.
  assert planned.held["recorded"] > 0
  assert planned.held["precomputed"] > 0 or not spec.needs_reference
  assert (planned.held["reward_model"] > 0) == spec.by_gradient
  assert (planned.held["moving average"] > 0) == (spec.optimizer.ema_decay is not None)
  assert 0 < planned.held["anchor"] < planned.held["parameters"] or not spec.anchored


def test_a_plan_counts_a_reward_model_on_its_own_chips():
  """Without those that only draw."""
  config = config_files.load(f"{UNIGRPO}:tiny", [
    "--config.mesh.tensor=1", "--config.rewards={'reward_model': 1.0}",
    "--config.reward_options={}",
  ])
  spec = rl.read(config)
  network = state.open_network(spec.network, jax.devices())
  held = planner.Planner(spec, network, only=()).run().held
  params = learned.open_folder(learned.TINY)[1]
  assert held["rewards"] > planner.bytes_on_chip(params)
  assert "gen" not in params["norm"] and "llm2vae" not in params


def test_record_by_hand():
  gather = hlo.Collective(
    "all-gather", 8e9, tuple((i, i + 2, i + 4, i + 6) for i in (0, 1)), 3)
  record = figures.record(_plan(denoise=_phase("denoise", 5, collectives=[gather])), CHIP)
  # state 7 GiB, sampler 3, cache 2, recorded 1, and 5 of its own
  assert record["peak"]["denoise"] == 18 * GIB == max(record["peak"].values())
  assert record["peak"]["precompute"] == record["peak"]["update"] == 8 * GIB
  assert record["peak"]["read"] == 11 * GIB
  assert record["fits"] and record["spare"] == pytest.approx(1 - 18 / 31.25)
  denoise = record["phases"]["denoise"]
  assert denoise["collectives"] == [
    {"kind": "all-gather", "axis": "fsdp", "bytes": 2 * 3 * 0.75 * 8e9}]
  assert denoise["times"]["interconnect"] == pytest.approx(36e9 / 200e9)
  assert denoise["times"]["compute"] == pytest.approx(2e12 / 918e12)
  assert denoise["bound"] == "interconnect" and denoise["model_flops"] == 2e12
  rest = 6 * max(2e12 / 918e12, 2e9 / 1638e9)
  assert record["seconds"] == pytest.approx(0.18 + rest)
  assert record["images_per_hour"] == pytest.approx(3600 * 768 / record["seconds"])
  assert json.loads(json.dumps(record)) == record


def test_flops_of_kernels_by_hand():
  """Splash attention by its formula, 4 T S H a head; another kernel by its author's estimate."""
  blocks = hlo_text.Array("s8", (4, 4))
  queries, keys = (
    hlo_text.Array("bf16", (2, heads, length, 64)) for heads, length in ((4, 256), (1, 512))
  )
  splash = hlo.CustomCall("splash_mha_fwd.3", (blocks, queries, keys, keys), 5)
  others = [hlo.CustomCall("other", (), 3, flops) for flops in (7.0, None)]
  phase = _phase("denoise")
  program = dataclasses.replace(phase.program, flops=0.0, custom_calls=[splash, *others])
  record = figures.record(_plan(denoise=dataclasses.replace(phase, program=program)), CHIP)
  wanted = 5 * 4 * (2 * 4) * 256 * 512 * 64 + 3 * 7
  assert record["phases"]["denoise"]["flops"] == phase.runs * wanted


@pytest.mark.parametrize("phase, verdict, changes", [
  (_phase("update", 5), "fits", []),
  (_phase("update", 21), "too tight", ["--config.microbatch=32", "variant lora"]),
  # 42 GiB of its own and 21.9 too many: half is not enough, a quarter is.
  (_phase("update", exceeds=50 * GIB), "does not fit", ["--config.microbatch=16", "variant lora"]),
  # With the cache 42 of its own and 24.9 too many.
  (_phase("denoise", 40), "does not fit",
   ["--config.rollout.prompts_at_once=4", "--config.rollout.layout=update",
    "--config.mesh.tensor=4", "variant lora"]),
])
def test_verdict_and_first_changes(phase, verdict, changes):
  config, plan = config_files.load(UNIGRPO), _plan(**{phase.name: phase})
  record = figures.record(plan, CHIP)
  lines = advice.lines(config, plan, record, CHIP)
  assert verdict in page.render("v6e:2x4", record, CHIP)
  assert record["fits"] == (verdict == "fits") == (lines == [])
  for change in changes:
    assert any(change in line for line in lines[1:]), (change, lines)
  freed = [float(line.split("about ")[1].split()[0]) for line in lines[1:]]
  assert freed == sorted(freed, reverse=True)


@pytest.mark.parametrize("name", plans.PHASES)
def test_advice_is_what_a_command_line_takes(name):
  """Each `--config.KEY=VALUE` changes that key of the config, to another value of its type."""
  base = ["--config.remat=none", "--config.mesh.tensor=2"]
  config = config_files.load(UNIGRPO, base)
  plan = _plan(**{name: _phase(name, exceeds=60 * GIB)})
  lines = advice.lines(config, plan, figures.record(plan, CHIP), CHIP)
  arguments = re.findall(r"^  (--config\.(\S+)=(\S+)): about", "\n".join(lines), re.MULTILINE)
  assert len(arguments) == sum("--config." in line for line in lines) >= 2
  for argument, key, value in arguments:
    before, after = (
      functools.reduce(operator.getitem, key.split("."), each)
      for each in (config, config_files.load(UNIGRPO, [*base, argument]))
    )
    assert type(after) is type(before) and str(after).lower() == value != str(before).lower()


def test_advice_divides_over_the_mesh():
  """24 rows over 8 ways: a half divides into 12 rows, which do not."""
  plan = dataclasses.replace(
    _plan(update=_phase("update", exceeds=80 * GIB)), mesh={"data": 1, "fsdp": 8, "tensor": 4})
  config = config_files.load(UNIGRPO, ["--config.microbatch=48"])
  lines = advice.lines(config, plan, figures.record(plan, CHIP), CHIP)
  assert any("--config.microbatch=24:" in line for line in lines)


def test_sampling_has_a_mesh_of_its_own():
  """Its collectives are named by it, and what does not fit there may have more tensor ways."""
  pairs = hlo.Collective("all-gather", 1e9, [[0, 1], [2, 3], [4, 5], [6, 7]], 1)
  phases = {name: _phase(name, collectives=[pairs]) for name in ("denoise", "update")}
  phases["denoise"] = dataclasses.replace(phases["denoise"], exceeds=60 * GIB)
  plan = dataclasses.replace(
    _plan(**phases), sampling_mesh={"data": 1, "fsdp": 8, "tensor": 1})
  record = figures.record(plan, CHIP)
  axes = lambda name: [row["axis"] for row in record["phases"][name]["collectives"]]
  assert axes("update") == ["tensor"] and axes("denoise") == ["other"]
  text = page.render("v6e:2x4", record, CHIP)
  assert "mesh data 1 x fsdp 4 x tensor 2, sampling data 1 x fsdp 8 x tensor 1" in text
  lines = advice.lines(config_files.load(UNIGRPO), plan, record, CHIP)
  assert any("--config.rollout.tensor=2: about 1.50 GiB" in line for line in lines)


@pytest.mark.slow
def test_a_plan_with_fewer_tensor_ways_of_sampling():
  """The parameters are whole where the update has them in parts; the update has its own mesh."""
  plan = {}
  for ways in (2, 1):
    spec = rl.read(config_files.load(f"{UNIGRPO}:tiny", [
      "--config.mesh.tensor=2", "--config.mesh.fsdp=2", f"--config.rollout.tensor={ways}",
    ]))
    network = state.open_network(spec.network, jax.devices()[:4])
    plan[ways] = planner.Planner(spec, network, only=("layout",)).run()
  assert [plan[ways].sampling_mesh["fsdp"] for ways in (2, 1)] == [2, 4]
  assert plan[1].mesh == plan[2].mesh == plan[2].sampling_mesh
  assert 1.5 < plan[1].held["sampler"] / plan[2].held["sampler"] < 2.01
  assert plan[1].held["parameters"] == plan[2].held["parameters"]


def test_some_phases_alone_have_no_time_of_an_iteration():
  some = dataclasses.replace(_plan(), phases={"update": _phase("update", 5)})
  record = figures.record(some, CHIP)
  assert record["fits"] and record["seconds"] is None and set(record["peak"]) == {"update"}
  assert "at best" not in page.render("v6e:2x4", record, CHIP)


def test_a_phase_that_does_not_fit_stops_no_page():
  record = figures.record(_plan(update=_phase("update", exceeds=50 * GIB)), CHIP)
  assert record["seconds"] is None and record["images_per_hour"] is None
  text = page.render("v6e:2x4", record, CHIP)
  assert "does not fit: update needs 50.00 GiB, 18.75 more" in text
  assert " no " in page.comparison({"v6e:2x4": record})


@pytest.mark.parametrize("arguments, words", [
  (["--topology=v5p:4x4x4"], "--config"),
  ([f"--config={UNIGRPO}", "--topology=v9:2x2"], "v5p, v6e, v5e"),
  ([f"--config={UNIGRPO}", "--topology=v6e"], "a colon and a shape"),
  (["--config=none.py", "--topology=v6e:2x2"], "none.py: cannot be read"),
  ([f"--config={config_files.FOLDER / 'sft.py'}", "--topology=v6e:2x2"], "only unigrpo"),
  ([f"--config={UNIGRPO}:no", "--topology=v6e:2x2"], "is none of"),
  ([f"--config={UNIGRPO}", "--topology=v6e:2x2", "--config.no=1"], "--config has no key 'no'"),
  ([f"--config={UNIGRPO}:ocr", "--topology=v6e:2x2", "--config.reward_options.ocr.psm=6"],
   "'ocr'; new options come as a whole, --config.reward_options="),
  ([f"--config={UNIGRPO}", "--topology=v6e:2x2", "--config.steps=many"], "--config.steps=many"),
  ([f"--config={UNIGRPO}", "--topology=v6e:2x2", "--no=1"], "'no'"),
  ([f"--config={UNIGRPO}", "--topology=v6e:2x2", "--", "no"], "no"),
])
def test_refusals(arguments, words):
  with pytest.raises(errors.InputError) as caught:
    command.main(arguments)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_those_of_training(monkeypatch):
  """With an equals sign or a space, before and after the command's own arguments."""
  seen = []

  def stop(spec, *_):
    seen.extend((spec.update.microbatch, spec.rollout.layout))
    raise errors.InputError("far enough")

  monkeypatch.setattr(topology, "devices", lambda name: (CHIP, []))
  monkeypatch.setattr(topology, "open_network", lambda *_: None)
  monkeypatch.setattr(planner, "Planner", stop)
  with pytest.raises(errors.InputError, match="far enough"):
    command.main([
      "--config.microbatch=16", f"--config={UNIGRPO}", "--config.rollout.layout", "update",
      "--topology", "v6e:2x2",
    ])
  assert seen == [16, "update"]


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  def missing(**_):
    raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology. See the docs")

  monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
  with pytest.raises(errors.InputError, match=r"jax\[tpu\]"):
    command.main([f"--config={UNIGRPO}", "--topology=v5p:4x4x4"])


def test_a_compiler_that_another_process_has_may_be_free_later(monkeypatch):
  def busy(**_):
    raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

  monkeypatch.setattr(topology.topologies, "get_topology_desc", busy)
  with pytest.raises(errors.Unavailable, match="lockfile"):
    command.main([f"--config={UNIGRPO}", "--topology=v5p:4x4x4"])


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
  phase, results = plans.compile_phase("update", function, runs=1, model_flops=None)
  assert results is None and phase.exceeds == wanted * GIB and phase.program is None
