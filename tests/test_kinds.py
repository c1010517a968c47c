"""Every key of every config has a kind: other values are refused in one line that names the key."""

import decimal
import pathlib
import re
import runpy

from ml_collections import ConfigDict
import numpy as np
import pytest

from unigrpo_jax import errors
from unigrpo_jax.recipe import checks, config_files, rl, sft

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
# Of no key.
NEVER = [None, {"a": 1}, {1: 1.0}, [[1]], b"x", {1}, object(), np.zeros(2), 1j, {"a": {}}]
TEXTS = ["", "1", "1.0", "true", "no such name", "a\0b", "a\nb"]
FLAGS, NUMBERS = [True, False, np.bool_(True)], [
  -1, 0.5, -1.5, 1e300, 10**400, -(10**400), 2**31, 2**32, 2**63, float("nan"), float("inf"),
  np.float32("nan"), decimal.Decimal("nan"),
]
TYPED = ["no such", "1.5e", "{", "{'a': {", "None", "'a"]
WRONG = {
  checks.Number: [*NEVER, *TEXTS, *FLAGS, (1.0,), decimal.Decimal(1), float("nan"), float("inf"),
                  -float("inf"), np.float32("nan"), 10**400],
  checks.Integer: [*NEVER, *TEXTS, *FLAGS, *NUMBERS, 1.0, (1,), np.float64(2.0)],
  checks.Flag: [*NEVER, *TEXTS, *NUMBERS, 0, 1, (True,)],
  checks.Text: [*NEVER, *FLAGS, *NUMBERS, 0, ("a",), "a\0b", "a\nb"],
  checks.OneOf: [*NEVER, *TEXTS, *FLAGS, *NUMBERS, 0, ("a",)],
  checks.Several: [*NEVER, "text", *FLAGS, *NUMBERS, 0, (None,), (1.5, True), ([],), ("1", 2),
                    (float("nan"), 1)],
  checks.Table: [None, [[1]], b"x", {1}, object(), np.zeros(2), *TEXTS, *FLAGS, *NUMBERS, 0,
                 {1: 1.0}, {"a": None}, {"a": "1.0"}, {"a": b"x"}, {"a": True}, {"a": {1: 1}},
                 {"a": float("nan")}, {"a": [1]}],
}


def _keys(path):
  """The reader of a config file, and the kinds of its keys."""
  reader = sft if path.stem == "sft" else rl
  return reader, checks.KEYS | reader.KEYS


def _config(path, key, value):
  config = runpy.run_path(str(path))["get_config"]()
  *sections, name = key.split(".")
  node = config
  for section in sections:
    node = node[section]
  with config.unlocked(), config.ignore_type():
    if isinstance(value, dict):
      value = ConfigDict(value, convert_dict=False)
    if name in node:
      del node[name]  # An assignment would make a float of an int, and of True.
    node[name] = value
  return config


@every_config
def test_values_of_wrong_kinds_are_refused(path):
  """All values by the kind of each key, and one of each key by the reader of whole configs."""
  reader, keys = _keys(path)
  tried = 0
  for number, (key, kind) in enumerate(keys.items()):
    values = WRONG[type(kind)]
    for value in values:
      with pytest.raises(errors.InputError) as refused:
        if value is values[number % len(values)]:
          reader.read(_config(path, key, value))
        else:
          kind.read(f"config.{key}", value)
      message = str(refused.value)
      assert message.startswith(f"config.{key}") and "\n" not in message, (key, value, message)
      assert len(message) < 400, message
      tried += 1
  assert tried > 1000


@every_config
def test_sections_are_sections_and_keys_are_known(path):
  reader, keys = _keys(path)
  for section in {key.partition(".")[0] for key in keys if "." in key}:
    for value in (None, 1, "text", ()):
      config = runpy.run_path(str(path))["get_config"]()
      with config.ignore_type():
        config[section] = value
      with pytest.raises(errors.InputError, match=re.escape(f"config.{section}={value!r} must")):
        reader.read(config)
  for key, words in (("sttep", "'sttep' is none of"), ("mesh.tensr", "mean 'mesh.tensor'")):
    with pytest.raises(errors.InputError, match=words):
      reader.read(_config(path, key, 1))
  config = runpy.run_path(str(path))["get_config"]()
  del config["mesh"]["tensor"]
  with pytest.raises(errors.InputError, match="config.mesh.tensor is missing"):
    reader.read(config)


@every_config
def test_text_of_a_command_line_is_refused_in_a_line(path):
  """The flags parse it; what they let through is refused by the reader."""
  reader, keys = _keys(path)
  for key, kind in keys.items():
    if isinstance(kind, checks.Text) or key in reader.DEFAULTS:
      continue  # any text is one; a default may not be in the file
    text = TYPED[len(key) % len(TYPED)]
    with pytest.raises(errors.InputError) as refused:
      reader.read(config_files.load(str(path), [f"--config.{key}={text}"]))
    message = str(refused.value)
    assert key in message and "\n" not in message, (key, text, message)


def test_values_like_those_of_python_become_theirs():
  config = _config(CONFIGS[-1], "steps", np.int64(3))
  with config.ignore_type():
    config.eps, config.flow.weight, config.text.train = np.float32(0.5), 2, np.bool_(True)
    config.init_from, config.writers = pathlib.Path("a/b"), ["jsonl"]
    config.reward_options = {"brightness": {"a": np.float64(1.0), "b": [None, "x"]}}
  spec = rl.read(config)
  assert (spec.run.steps, spec.optimizer.eps, spec.flow.weight, spec.text.train) == (3, 0.5, 2, 1)
  kinds = [type(value) for value in (spec.run.steps, spec.optimizer.eps, spec.text.train)]
  assert kinds == [int, float, bool]
  assert spec.network.init_from == "a/b" and spec.run.config["reward_options"] == {
    "brightness": {"a": 1.0, "b": [None, "x"]}}


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**63, 2**64])
@every_config
def test_a_seed_is_never_taken_for_another(path, seed):
  with pytest.raises(errors.InputError, match=f"config.seed={seed} must be at least 0 and at most"):
    _keys(path)[0].read(config_files.load(str(path), [f"--config.seed={seed}"]))


@pytest.mark.parametrize("text, words", [
  ("{'brightness': '1.0'}", "config.rewards.brightness='1.0' must be a number"),
  ("{'brightness': True}", "config.rewards.brightness=True must be a number"),
  ("{'brightness': None}", "config.rewards.brightness=None must be a number"),
  ("{'brightness': (1.0,)}", r"config.rewards.brightness=\(1.0,\) must be a number"),
  ("{5: 1.0}", "config.rewards: the name 5 must be text"),
  ("[1]", "config.rewards.*is not a dict"),
])
def test_weights_are_numbers_by_name(text, words):
  with pytest.raises(errors.InputError, match=words):
    rl.read(config_files.load(str(CONFIGS[-1]), [f"--config.rewards={text}"]))


@pytest.mark.parametrize("text, words", [
  ("{'brightness': 5}", "config.reward_options.brightness=5 must be a dict"),
  ("{'brightness': None}", "config.reward_options.brightness=None must be a dict"),
  ("{'a': {'b': b'x'}}", "config.reward_options.a.b=b'x' must be a number, text"),
  ("{'a': {'b': {2: 3}}}", "config.reward_options.a.b: the name 2 must be text"),
])
def test_options_are_dicts_by_reward(text, words):
  with pytest.raises(errors.InputError, match=words):
    rl.read(config_files.load(str(CONFIGS[-1]), [f"--config.reward_options={text}"]))


@pytest.mark.parametrize("change, words", [
  ("rollout.shift=1e300", "config.rollout.shift=1e\\+300 must be 0, or of a size from 1.2e-38 to"),
  ("rollout.shift=1e-300", "config.rollout.shift=1e-300 must be 0, or of a size"),
  ("rewards={'brightness': -1e39}", "config.rewards.brightness=-1e\\+39 must be 0, or of a size"),
  ("b1=1.0", "config.b1=1.0 must be less than 1"), ("b2=0.99999999", "config.b2=0.99999999 must"),
  ("group_size=2147483647", "config.group_size=2147483647 must be .* at most 1000000"),
  ("prompts_per_step=900000", "config.prompts_per_step x group_size=.* at most 1000000"),
  ("rollout.num_timesteps=2147483647", "config.rollout.num_timesteps=.* at most 100000"),
])
def test_what_no_array_can_hold_is_refused(change, words):
  with pytest.raises(errors.InputError, match=words):
    rl.read(config_files.load(str(CONFIGS[-1]), [f"--config.{change}"]))
