"""The configs of training: Table 3, a comment a key, variants, and what is refused and how."""

import dataclasses
import itertools
import pathlib
import re
import runpy
import types

import jax
import numpy as np
import pytest

from unigrpo_jax import errors, rewards
from unigrpo_jax.data import prompts, tokenizer
from unigrpo_jax.recipe import checks, parts, rl, sft
from unigrpo_jax.runtime import folders, sharding, state

ROOT = pathlib.Path(__file__).parents[1]
UNIGRPO, TEXT, FLOW, SFT = "unigrpo", "text_grpo", "flow_grpo", "sft"


def _load(name):
  """The names of a config file."""
  return types.SimpleNamespace(**runpy.run_path(str(ROOT / "configs" / f"{name}.py")))


def _mesh(devices=1):
  return sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices])


def _read(config, devices=1):
  """The spec of a config that can run on so many devices."""
  spec = rl.read(config)
  parts.check_fits(spec, state.Network(None, None, None, _mesh(devices)))
  return spec


def _read_sft(config):
  spec = sft.read(config)
  sft.check_fits(spec, state.Network(None, None, None, _mesh()))
  return spec


def _open_network(config):
  return state.open_network((sft if config.algorithm == "sft" else rl).read(config).network)


def _flat(config, path=""):
  for key, value in config.items():
    name = f"{path}{key}"
    if hasattr(value, "items"):
      yield from _flat(value, name + ".")
    else:
      yield name, value


def test_table_3():
  config = _load(UNIGRPO).get_config()
  values = dict(_flat(config))
  table = {
    "prompts_per_step": 32, "group_size": 24, "rollout.height": 1024, "rollout.width": 1024,
    "rollout.num_timesteps": 25, "rollout.shift": 3.0, "rollout.window_range": (0, 5),
    "rollout.window_size": 3, "rollout.noise_level": 0.8, "rollout.sde": "flow", "epochs": 2,
    "minibatches": 1, "learning_rate.und": 1e-6, "learning_rate.gen": 3e-5, "flow.clip": 1e-6,
    "flow.regulariser": "velocity_mse", "flow.regulariser_weight": 1.5e-5, "flow.weight": 1.0,
    "flow.ratio": "norm", "flow.grad_reweight": "none", "flow.objective": "grpo",
    "text.kl_weight": 0.0, "text.aggregation": "seq-mean-token-mean", "rollout.temperature": 1.0,
    "rollout.cfg_text_scale": 1.0, "text.train": True, "flow.train": True,
  }
  assert {name: values[name] for name in table} == table
  _read(config)


@pytest.mark.parametrize("name, least", [(UNIGRPO, 90), (TEXT, 2), (FLOW, 2), (SFT, 45)])
def test_every_key_has_a_comment(name, least):
  """A section has one above it, or beside it."""
  source = (ROOT / "configs" / f"{name}.py").read_text()
  lines = source[source.index("def get_config") :].split("\ndef ")[0].splitlines()
  keys = 0
  for above, line in zip(lines, lines[1:]):
    if re.match(r"  config\.[\w.]+(, config\.\w+)* = ", line):
      section = line.rstrip().endswith("= ConfigDict()")
      commented = "  # " in line or (section and ("  # " in above or above.startswith("  config.")))
      keys += not section
      assert commented, line
  assert keys >= least


@pytest.mark.parametrize("variants, steps, prompts", [("", (18, 24), 768), ("tiny", (9, 12), 192)])
def test_refl(variants, steps, prompts):
  """One late step of each trajectory, all of its last quarter, and no groups."""
  spec = _read(_load("refl").get_config(variants))
  assert spec.prompts.per_step == spec.trajectories == prompts and spec.rollout.group_size == 1
  assert spec.optimizer.trained == {"gen"} and not spec.trains_text and spec.needs_reference
  assert (spec.update.epochs, spec.update.minibatches) == (1, 2)
  drawn = [rl.window_steps(spec, iteration) for iteration in (1, 2)]
  assert drawn[0].shape == (prompts, 1) and (drawn[0] != drawn[1]).any()
  assert set(np.unique(drawn)) == set(range(*steps)) and spec.rollout.sde is None
  alike = _load("refl").get_config(variants)
  alike.refl.per_batch = True
  assert len(np.unique(rl.window_steps(_read(alike), 1))) == 1
  thinking = _read(_load("refl").get_config(",".join(filter(None, (variants, "think")))))
  assert thinking.rollout.settings.think and thinking.evaluation.modes[0] == "think"
  assert thinking.window == spec.window and not thinking.trains_text


@pytest.mark.parametrize("name", ["refl", TEXT])
@pytest.mark.parametrize("variant", ["fpo", "awm", "nft", "unifpo"])
def test_variants_of_another_objective_are_refused(name, variant):
  with pytest.raises(ValueError, match=f"'{variant}' is one of configs/unigrpo.py alone"):
    _load(name).get_config(f"tiny,{variant}")


@pytest.mark.parametrize("key, value, words", [
  ("text.train", True, "config.text.train=True: .* has no loss of the text; set it to False"),
  ("epochs", 2, "config.epochs=2: .* takes each trajectory once"),
  ("old_values", "recomputed", "config.old_values=recomputed: .* compares no old values"),
  ("rollout.cfg_text_scale", 4.0, "config.rollout.cfg_text_scale=4.0: .* set it to 1.0"),
  ("flow.regulariser", "latent_kl", "config.flow.regulariser=latent_kl needs the steps of an SDE"),
  ("refl.weight", 0.0, "config.refl.weight=0.0"),
  ("refl.gradient_steps", -1, "config.refl.gradient_steps=-1"),
  ("refl.sft_weight", 0.5, "config.refl.sft_weight=0.5 needs examples; set config.refl.sft_config"),
])
def test_what_refl_refuses(key, value, words):
  config = _load("refl").get_config("tiny")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.InputError, match=words):
    _read(config)
  config = _load("refl").get_config()
  with pytest.raises(errors.InputError, match="set config.refl.reward_model to the folder of a"):
    parts.pinned(_read(config), None)


def _another(key, value):
  """Another value of a key, of its type."""
  kind = (checks.KEYS | rl.KEYS | sft.KEYS).get(key)
  if isinstance(kind, checks.OneOf):
    return next(option for option in kind.options if option != value)
  if isinstance(value, bool):
    return not value
  if value == ():
    return ((32, 32),)
  if isinstance(value, tuple):
    return value[:-1] if isinstance(value[0], str) else (value[0], value[1] / 2)
  return {str: "another", int: 1, float: 0.5}[type(value)] + value


@pytest.mark.parametrize("name", [UNIGRPO, SFT])
def test_every_key_is_read(name):
  """Another value gives another spec, or is refused by the key's name."""
  def read(config):
    spec = (sft if name == SFT else rl).read(config)
    return dataclasses.replace(spec, run=dataclasses.replace(spec.run, config={}))

  get_config, unread = _load(name).get_config, []
  variant = "reward_model" if name == SFT else "lora"  # without adapters their alpha does not count
  plain = read(get_config(variant))
  for key, value in _flat(get_config(variant)):
    config = get_config(variant)
    config.update_from_flattened_dict({key: _another(key, value)})
    try:
      if read(config) == plain:
        unread.append(key)
    except errors.InputError as error:
      assert key in str(error)
  assert unread == ["algorithm"]  # which chooses the reader


@pytest.mark.parametrize("reader, name", [(rl, UNIGRPO), (sft, SFT)])
def test_what_older_configs_lack_has_its_default(reader, name):
  """The files state no other values, but of what may change when such a run continues."""
  config = _load(name).get_config()
  run = reader.read(config).run
  given, free = dict(_flat(run.config)), run.mutable_keys
  for key, value in reader.DEFAULTS.items():
    assert given.get(key, value) == value or key in free
    section, _, last = key.rpartition(".")
    node = config[section] if section else config
    if last in node:
      del node[last]
  read = dict(_flat(reader.read(config).run.config))
  assert {key: read[key] for key in reader.DEFAULTS} == reader.DEFAULTS


@pytest.mark.parametrize("name", [UNIGRPO, TEXT, FLOW])
def test_all_combinations_of_variants_can_run(name):
  module = _load(name)
  variants = [v for v in _load(UNIGRPO).VARIANTS if v not in (*FORWARD, *TASKS)]
  variants += ["no_think"] if name == FLOW else []
  for count in range(len(variants) + 1):
    for chosen in itertools.combinations(variants, count):
      for order in (chosen, chosen[::-1]):
        config = module.get_config(",".join(order))
        spec = _read(config)
        assert config.init_from == ("tiny" if "tiny" in order else "")
        assert (config.lora.rank > 0) == ("lora" in order)
        assert (config.rollout.cfg_text_scale > 1) == ("cfg" in order)
        trained = {"und", "gen"} - {{TEXT: "gen", FLOW: "und"}.get(name)}
        assert spec.optimizer.trained == trained
        assert (config.text.train, config.flow.train) == (name != FLOW, name != TEXT)
        assert config.rollout.think == ("no_think" not in order)
  with pytest.raises(ValueError, match="'tyni' is none of tiny"):
    module.get_config("tyni")


@pytest.mark.parametrize("chosen", ["unifpo,awm", "tiny,fpo,nft", "ocr,judge"])
def test_variants_of_which_one_can_be_are_refused_together(chosen):
  with pytest.raises(ValueError, match="exclude each other; leave one out"):
    _load(UNIGRPO).get_config(chosen)


def test_the_rate_of_adapters_is_theirs_in_refl_too():
  assert _load("refl").get_config("lora").learning_rate.gen == 1e-4
  assert _load("refl").get_config().learning_rate.gen == 1e-5


@pytest.mark.parametrize(("changes", "kept"), [
  ({}, set()),
  ({"minibatches": 2, "old_values": "recomputed"},
   {"microbatch", "mesh", "rollout.prompts_at_once"}),
  ({"rollout.window": "per_rank_const"}, {"mesh", "rollout.prompts_at_once"}),
])
def test_what_says_which_trajectories_are_learnt_from_together_stays(changes, kept):
  """Elsewhere these keys are of memory and speed, and may change when a run continues."""
  config = _load(UNIGRPO).get_config("tiny")
  config.update_from_flattened_dict(changes)
  layout = {"microbatch", "mesh", "rollout.prompts_at_once"}
  assert layout - rl.read(config).run.mutable_keys == kept
  # Without groups only the microbatch says it: ReFL's halves are of its prompts.
  assert layout - rl.read(_load("refl").get_config()).run.mutable_keys == {"microbatch"}


def test_keys_of_other_objectives_may_change():
  mutable = rl.read(_load(UNIGRPO).get_config()).run.mutable_keys
  assert {"flow.dppo_threshold", "flow.awm_clip", "flow.draws"} < mutable
  config = _load(UNIGRPO).get_config("fpo")
  mutable = rl.read(config).run.mutable_keys
  assert "flow.awm_clip" in mutable and not {"flow.fpo_clip", "flow.draws"} & mutable


TASKS = {  # their rewards
  "ocr": {"ocr": 1.0, "ocr_exact": 0.0, "ocr_extra_characters": 0.0}, "geneval": {"geneval": 1.0},
  "judge": {"judge": 1.0},
  "pickscore": {"pickscore": 1.0},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("others", [(), ("tiny",), ("lora", "cfg"), ("tiny", "awm")])
def test_variants_of_tasks(task, others):
  """Prompts, evaluation and rewards are the task's, all else is that of the other variants."""
  module = _load(UNIGRPO)
  config = module.get_config(",".join((*others, task)))
  spec = _read(config)
  assert spec.rewards.weights == TASKS[task]
  assert set(spec.rewards.options) <= set(TASKS[task])
  for section, split in ((config.prompts, "train"), (config.eval, config.eval.split)):
    assert section.source != "iconworld"
    if section.source != "pickscore_sfw":  # a folder that users have
      assert prompts.GENERATED[section.source].counts[split]
      if "tiny" in others:
        tiny = tokenizer.load(folders.TINY_FOLDER)
        made = prompts.GENERATED[section.source].make(split, 5000 if split == "train" else 200)
        assert max(len(tiny.encode(prompt)) for prompt, _ in made) + 2 <= spec.rollout.prompt_tokens
  own = "rewards.", "reward_options.", "prompts.source", "eval.", "rollout.prompt_tokens"
  rest = lambda config: {k: v for k, v in _flat(config) if not k.startswith(own)}
  assert rest(config) == rest(module.get_config(",".join(others)))


FORWARD = {"fpo": "fpo", "awm": "awm", "nft": "nft", "unifpo": "fpo"}  # their objectives


@pytest.mark.parametrize("variant", FORWARD)
def test_variants_without_an_sde(variant):
  """The rows of the comparison, at either size and with adapters; no window counts."""
  module, joint = _load(UNIGRPO), variant == "unifpo"
  for others in ((), ("tiny",), ("tiny", "lora", "no_regulariser")):
    chosen = (*others, variant)
    config = module.get_config(",".join(chosen))
    assert config.to_dict() == module.get_config(",".join(chosen[::-1])).to_dict()
    config.rollout.window_range, config.rollout.window_size = (0, 99), 0
    spec = _read(config)
    flow = spec.flow
    assert flow.objective == FORWARD[variant] and spec.window.size == 0
    assert not rl.window_steps(spec, 1).size
    assert (spec.trains_text, spec.rollout.settings.think) == (joint, joint)
    assert spec.optimizer.trained == {"und", "gen"} - (set() if joint else {"und"})
    assert spec.evaluation.modes[0] == ("think" if joint else "plain")
    t = spec.times
    assert (t.num_timesteps, t.shift) == ((13, 1.0) if "tiny" in others else (25, 3.0))
    assert spec.steps_an_image == t.count
    if variant == "awm":
      assert (t.count, t.kind, flow.awm_clip, spec.update.epochs) == (6, "stratified", 0, 1)
      assert (flow.awm_weighting, flow.awm_bound) == ("ghuber", 5)
      assert (flow.anchor_weight, flow.regulariser_weight) == (1, 1e-3)
      assert spec.anchored == {"gen"}
    else:
      assert (t.count, t.kind, spec.update.epochs) == (8, "grid", 2) and not spec.anchored
      assert (flow.fpo_weighting, flow.fpo_ratio, flow.fpo_surrogate, flow.fpo_clip) == (
        "one_minus_t2", "mean_first", "ppo", 0.05)


def test_keys_of_other_objectives_may_change_when_a_run_continues():
  module = _load(UNIGRPO)
  free = lambda variant: {
    key for key in rl.read(module.get_config(variant)).run.mutable_keys if key.startswith("flow.")}
  assert {"flow.draws", "flow.times", "flow.awm_clip", "flow.fpo_clip"} <= free("")
  assert {"flow.awm_clip", "flow.nft_beta"} <= free("fpo")
  assert not {"flow.draws", "flow.times", "flow.fpo_clip", "flow.clip"} & free("fpo")
  # Such a run once noised an image as often as a window has steps.
  config = module.get_config("fpo")
  config.rollout.window_size = 5
  assert rl.read(config).run.defaults["flow.draws"] == 5


REFUSED = [
  ("advantage.ddof", 2, "config.advantage.ddof=2 must be .*1"),  # of no estimate
  ("flow.draws", 0, "config.flow.draws=0 must be at least 1"),
  ("flow.times", "random", "config.flow.times='random' is none of uniform, grid"),
  ("flow.awm_ratio", "sum", "config.flow.awm_ratio='sum'"),
  ("flow.awm_clip", -0.1, "config.flow.awm_clip=-0.1"),
  ("flow.fpo_weighting", "u", "config.flow.fpo_weighting='u' is none of uniform, one_minus_t2"),
  ("flow.fpo_ratio", "mean", "config.flow.fpo_ratio='mean' is none of mean_first"),
  ("flow.fpo_surrogate", "apso", "config.flow.fpo_surrogate='apso' .* did you mean 'aspo'"),
  ("flow.anchor_decay", 1.5, "config.flow.anchor_decay=1.5 must be"),
  ("flow.anchor_weight", -1.0, "config.flow.anchor_weight=-1.0 must be"),
  ("flow.objective", "grpp", "config.flow.objective='grpp' .* did you mean 'grpo'"),
  ("flow.ratio", "x", "config.flow.ratio='x'"),
  ("flow.grad_reweight", "x", "config.flow.grad_reweight='x'"),
  ("flow.regulariser", "mse", "config.flow.regulariser='mse'"),
  ("flow.routing", "all", "config.flow.routing='all'"),
  ("flow.reference_context", "x", "config.flow.reference_context='x'"),
  ("flow.awm_weighting", "x", "config.flow.awm_weighting='x'"),
  ("text.aggregation", "mean", "config.text.aggregation='mean'"),
  ("rollout.sde", "ode", "config.rollout.sde='ode'"),
  ("rollout.window", "x", "config.rollout.window='x'"),
  ("rollout.cfg_renorm", "x", "config.rollout.cfg_renorm='x'"),
  ("advantage.std", "x", "config.advantage.std='x'"),
  ("old_values", "x", "config.old_values='x'"),
  ("export_dtype", "float23", "config.export_dtype='float23'"),
  ("eval.cfg_renorm", "globl", "config.eval.cfg_renorm='globl' .* did you mean 'global'"),
  ("eval.cfg_interval", (1.0, 0.4), r"config.eval.cfg_interval=\(1.0, 0.4\) holds no time"),
  ("rollout.cfg_interval", (0.4, 1.5), "config.rollout.cfg_interval"),
  ("b1", 1.5, "config.b1=1.5 must be"),
  ("steps", 0, "config.steps=0 must be at least 1"),
  ("group_size", 1, "config.group_size=1 must be at least 2"),
  ("epochs", 0, "config.epochs=0"),
  ("microbatch", 0, "config.microbatch=0"),
  ("eval.every", -1, "config.eval.every=-1"),
  ("lora.rank", -1, "config.lora.rank=-1"),
  ("rollout.temperature", 0.0, "config.rollout.temperature=0.0 must be at least 1e-06"),
  ("rollout.num_timesteps", 1, "config.rollout.num_timesteps=1"),
  ("rollout.prompt_tokens", 2, "config.rollout.prompt_tokens=2"),
  ("rollout.noise_level", 0.0, "config.rollout.noise_level=0.0 must be more than 0"),
  ("rollout.window_size", 0, "config.rollout.window_size=0 leaves no step"),
  ("rollout.window_size", 6, "config.rollout.window_range and window_size .* 0 to 5"),
  ("rollout.window_range", (0, 25), "config.rollout.window_range and .* num_timesteps=25"),
  ("text.dual_clip", 0.5, "config.text.dual_clip=0.5 must be more than 1"),
  ("learning_rate.und", -1.0, "config.learning_rate.und=-1.0"),
  ("learning_rate.und", 0.0, "config.text.train=True but config.learning_rate.und=0"),
  ("learning_rate.gen", 0.0, "config.flow.train=True but config.learning_rate.gen=0"),
  ("ema_decay", 1.5, "config.ema_decay=1.5 must be"),
  ("minibatches", 2, "config.minibatches=2: .* set config.old_values=recomputed"),
  ("steps", 2**31 - 1, "config.steps x epochs x minibatches=4294967294 must be at most 2147483647"),
  ("eps", 0.0, "config.eps=0.0 must be .*more than 0"),
  ("eval.modes", (), "config.eval.modes: there is none; give one, such as think"),
  ("prompts_per_step", 33, "config.prompts_per_step=33 does not divide by .*prompts_at_once=16"),
  ("microbatch", 100, "trajectories of an iteration, .*=768 does not divide by .*=100"),
]


def test_rewards_may_be_of_one_kind_under_two_names():
  config = _load(UNIGRPO).get_config("tiny")
  config.rewards = dict(a=0.25, b=0.75)
  image = np.zeros((2, 2, 3), np.uint8)
  config.reward_options = {name: {"kind": "tests.test_configs:constant", "value": value}
                           for name, value in (("a", 1.0), ("b", 3.0))}
  scorer = parts.make_scorer(rl.read(config).rewards)
  scores = scorer.score([rewards.Sample("a kite", image)])
  assert scores["a"] == 1 and scores["b"] == 3 and scorer.total(scores) == 2.5
  scorer.close()
  config.reward_options = {"c": {"kind": "brightness"}}
  with pytest.raises(errors.InputError, match="config.reward_options='c'"):
    parts.make_scorer(rl.read(config).rewards)


def test_served_rewards_may_move_and_their_tokens_stay_out_of_the_config():
  config = _load(UNIGRPO).get_config("tiny")
  config.rewards = dict(http=0.25, other=0.75, local=0.0)
  config.reward_options = {
    "http": {"url": "http://a", "reward": "r"},
    "local": {"kind": "tests.test_configs:constant", "value": 1.0},
    "other": {"kind": "http", "url": "http://b", "reward": "r", "token": "hush"},
  }
  spec = rl.read(config)
  mutable = spec.run.mutable_keys
  assert {"reward_options.http.url", "reward_options.other.timeout"} <= mutable
  assert not {"reward_options.http.reward", "reward_options.local.url"} & mutable
  with pytest.raises(errors.InputError, match="other.token .*name in token_env") as refused:
    parts.make_scorer(spec.rewards)
  assert "hush" not in str(refused.value)


def constant(samples, *, value):
  """A reward that is the same for all samples."""
  return np.full(len(samples), value)


@pytest.mark.parametrize("name", [UNIGRPO, SFT])
@pytest.mark.parametrize("key, value, words", [
  ("dtype", "float16", "config.dtype='float16' is none of float32, bfloat16"),
  ("dtype", "floaty", "config.dtype='floaty' .* did you mean 'float32'"),
  ("mesh.data", 0, "config.mesh.data=0 must be at least 1"),
  ("mesh.tensor", -1, "config.mesh.tensor=-1 must be"),
  ("mesh.fsdp", -1, "config.mesh.fsdp=-1 must be at least 0"),
])
def test_a_network_that_cannot_be_is_refused(name, key, value, words):
  config = _load(name).get_config("tiny")
  config.init_from = "tiny"
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.InputError, match=words):
    _open_network(config)


def test_attention_is_checked_against_names_and_devices():
  for value, words in (
    ("flash", "config.attention='flash' .* did you mean 'splash'"),
    ("splash", "config.attention='splash' runs on a tpu"),
  ):
    config = _load(UNIGRPO).get_config("tiny")
    config.attention = value
    with pytest.raises(errors.InputError, match=words):
      _open_network(config)
  config.attention = "auto"
  assert _open_network(config).model.lowering.attention == "plain"  # on several devices


@pytest.mark.parametrize("key, value, words", REFUSED, ids=[f"{k}={v}" for k, v, _ in REFUSED])
def test_what_is_refused_names_its_key_in_a_line(key, value, words):
  config = _load(UNIGRPO).get_config()
  section, _, name = key.rpartition(".")
  (config[section] if section else config)[name] = value
  with pytest.raises(errors.InputError, match=words) as refused:
    _read(config)
  assert "\n" not in str(refused.value)


SFT_REFUSED = [
  *((key, 0, f"config.{key}=0 must be at least 1") for key in (
    "steps", "sequences_per_step", "microbatch", "noise_draws", "label_chunk", "log_every",
    "checkpoint_every", "keep_checkpoints", "limits.tokens", "limits.labels", "limits.images",
    "limits.patches", "limits.clean", "limits.latents",
  )),
  *((key, -1.0, f"config.{key}=-1.0 must be at least 0") for key in (
    "ce_weight", "mse_weight", "drop_text", "weight_decay", "eps", "learning_rate.vit", "b1",
  )),
  *((key, 1.5, f"config.{key}=1.5 must be at least 0 and at most 1") for key in (
    "drop_text", "drop_vit", "drop_vae", "ema_decay", "b2",
  )),
  ("timestep_shift", 0.0, "config.timestep_shift=0.0 must be more than 0"),
  ("timestep_shift", float("nan"), "config.timestep_shift=nan must be"),
  ("clip_norm", 0.0, "config.clip_norm=0.0 must be more than 0"),
  ("warmup_steps", -1, "config.warmup_steps=-1 must be at least 0"),
  ("export_dtype", "float23", "config.export_dtype='float23'"),
  ("ce_weighting", "tokens", "config.ce_weighting='tokens' .* did you mean 'token'"),
  ("sequences_per_step", 12, "config.sequences_per_step=12 is not a multiple of .*microbatch=8"),
  ("learning_rate", dict.fromkeys(("und", "gen", "text", "latent", "vit", "tables"), 0.0),
   "config.learning_rate is 0 for all groups; give one of them a rate"),
]


@pytest.mark.parametrize(
  "key, value, words", SFT_REFUSED, ids=[f"{k}={v}" for k, v, _ in SFT_REFUSED]
)
def test_what_supervised_training_refuses_names_its_key_in_a_line(key, value, words):
  config = _load(SFT).get_config()
  _read_sft(config)
  if isinstance(value, dict):
    config[key] = value
  else:
    config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.InputError, match=words) as refused:
    _read_sft(config)
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, read", [(UNIGRPO, rl.read), (SFT, sft.read)])
@pytest.mark.parametrize("value", [True, False, "true"])
def test_rematerialisation_is_a_policy_by_name(name, read, value):
  """What older config files and commands say is refused with the names."""
  config = _load(name).get_config()
  with config.ignore_type():
    config.remat = value
  with pytest.raises(errors.InputError, match=f"config.remat={value!r} is none of full, "):
    read(config)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"text.train": False, "flow.train": False}, "text.train and config.flow.train are both"),
    ({"rollout.think": False, "flow.train": False}, "think=False leaves no text to train"),
    ({"flow.objective": "refl", "flow.train": False}, "refl trains nothing else; .*=grpo"),
    ({"flow.objective": "nft", "old_values": "rollout"}, "flow.objective=nft compares velocities"),
    ({"flow.objective": "awm", "flow.regulariser": "latent_kl"}, "regulariser=latent_kl needs the"),
    ({"flow.objective": "fpo", "flow.fpo_surrogate": "aspo", "flow.fpo_clip": 0.0},
     "fpo_surrogate=aspo, config.flow.fpo_clip=0.0 must be more than 0"),
    ({"flow.objective": "awm", "flow.times": "stratified", "rollout.num_timesteps": 3},
     "config.flow.times and config.rollout.num_timesteps: .* leaves out .* use at least 3"),
    ({"rollout.sde": "cps", "rollout.window_range": (0, 24)}, "cps has no noise; .* at 23"),
    ({"rollout.sde": "cps", "rollout.noise_level": 2.0}, "noise_level=2.0 must be less than 2 for"),
    ({"learning_rate.und": 0.0, "learning_rate.latent": 1e-5}, "give it one"),
  ],
)
def test_impossible_pairs_are_refused(changes, words):
  config = _load(UNIGRPO).get_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.InputError, match=words):
    _read(config)


@pytest.mark.parametrize("name, changes, idle", [
  (UNIGRPO, {}, set()), (UNIGRPO, {"text.train": False}, {"und"}), (FLOW, {}, set()),
  (UNIGRPO, {"text.train": False, "flow.routing": "full"}, set()), (TEXT, {}, set()),
  (UNIGRPO, {"rollout.think": False, "learning_rate.text": 1e-6}, {"und", "text"}),
  (UNIGRPO, {"flow.train": False, "learning_rate.latent": 1e-6}, {"gen", "latent"}),
  (UNIGRPO, {"learning_rate.vit": 1e-6}, {"vit"}),
])
def test_groups_that_only_weight_decay_would_move_are_known(name, changes, idle):
  config = _load(name).get_config()
  config.update_from_flattened_dict(changes)
  assert _read(config).idle == idle


def test_what_lies_under_adapters_has_no_learning_rate():
  config = _load(UNIGRPO).get_config("lora")
  with config.unlocked():
    config.learning_rate.base = 1e-6
  with pytest.raises(errors.InputError, match="config.learning_rate='base' is none of und, gen"):
    _read(config)


def test_rows_must_divide_over_the_devices():
  """Also where a number of rows and the devices are the same: the message names what it means."""
  config = _load(UNIGRPO).get_config()
  config.prompts_per_step, config.microbatch = 33, 24
  with pytest.raises(errors.InputError, match="prompts_per_step=33 .*prompts_at_once=16"):
    _read(config, devices=8)
  config.prompts_per_step, config.microbatch = 32, 12
  with pytest.raises(errors.InputError, match="microbatch=12 does not divide by config.mesh"):
    _read(config, devices=8)


def test_a_cosine_ends_with_the_last_optimizer_step():
  config = _load(UNIGRPO).get_config()
  config.steps, config.epochs, config.minibatches = 5, 2, 3
  config.old_values = "recomputed"
  assert rl.read(config).optimizer.steps == 30


def test_the_reference_is_copied_where_the_policy_overwrites_it():
  module = _load(UNIGRPO)
  assert rl.read(module.get_config()).copies_reference
  assert not rl.read(module.get_config("no_regulariser")).copies_reference
  config = module.get_config("lora")
  spec = rl.read(config)
  assert spec.needs_reference and not spec.copies_reference
  config.learning_rate.latent = 1e-5  # without adapters: its parameters change
  assert rl.read(config).copies_reference
