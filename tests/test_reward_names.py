"""A reward named module:function: whatever is wrong with it is told in one line."""

import re
import sys

from ml_collections import ConfigDict
import pytest

from tests.refusals import refusal
from unigrpo_jax import rewards
from unigrpo_jax.recipe import config_files, parts, rl
from unigrpo_jax.runtime import resumption

MODULES = {
  "needs_a_library": "import a_library_that_is_missing",
  "wrong_syntax": "def score(samples):\n  return [\n",
  "wrong_import": "from json import no_such_name",
  "raises": "VALUE = 1\nVALUE / 0",
  "exits": "import sys\nsys.exit('no GPU')",
  "sound": """
class Score:
  def __init__(self, scale: float = 1.0, *, kind="a"):
    if scale < 0:
      raise ValueError("scale is\\nnegative")
  def __call__(self, samples):
    return [1.0] * len(samples)

class Silent:
  pass

class Inner:
  Score = Score

def sharp(samples, radius=2):
  return [0.0] * len(samples)

def nothing():
  return [0.0]

def by_name(*, samples):
  return [0.0] * len(samples)

number = 5
""",
}


@pytest.fixture(autouse=True)
def user_rewards(tmp_path, monkeypatch):
  """A package `user_rewards` of MODULES in the current folder of a user."""
  folder = tmp_path / "user_rewards"
  folder.mkdir()
  for name, source in MODULES.items():
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
  monkeypatch.syspath_prepend(str(tmp_path))
  yield folder
  for name in [name for name in sys.modules if name.partition(".")[0] == "user_rewards"]:
    del sys.modules[name]


@pytest.mark.parametrize("name, options, words", [
  ("no_such_package.a:Score", {}, "there is no module 'no_such_package'; put its folder"),
  ("user_rewards.aesthetic:Score", {}, "user_rewards' (.*user_rewards) has no 'aesthetic'; check"),
  ("user_rewards.sound.deep:Score", {}, "sound.py) has no 'deep'; check"),
  ("user_rewards.sound:Scor", {}, "sound.py) has no 'Scor'; did you mean 'Score'?"),
  ("user_rewards.sound:Inner.Scor", {}, "has no 'Scor'; did you mean 'Score'?"),
  ("user_rewards.needs_a_library:score", {}, "it imports a_library_that_is_missing, which is not"),
  ("user_rewards.wrong_syntax:score", {}, "'[' was never closed (.*wrong_syntax.py, line 2)"),
  ("user_rewards.wrong_import:score", {}, "cannot import name 'no_such_name'.*line 1)"),
  ("user_rewards.raises:score", {}, "ZeroDivisionError: division by zero (.*raises.py, line 2)"),
  ("user_rewards.exits:score", {}, "SystemExit: no GPU (.*exits.py, line 2)"),
  ("user_rewards.sound:nothing", {}, "takes no samples; give it a first parameter"),
  ("user_rewards.sound:by_name", {}, "takes no samples; give it a first parameter"),
  ("user_rewards.sound:number", {}, "is a int; name a function or a class"),
  ("user_rewards.sound:Silent", {}, "a Silent cannot be called; give it __call__"),
  ("user_rewards.sound:Score", {"scale": -1}, "cannot be made: ValueError: scale is neg"),
  ("user_rewards.sound:Score", {"scale": "1"}, "scale='1' must be a number"),
  ("user_rewards.sound:Score", {"skale": 1}, "unexpected keyword argument 'skale'"),
  ("user_rewards.sound:sharp", {"radius": (1,)}, "radius=(1,) must be a number"),
  ("jpeg_size", {"quality": "high"}, "quality='high' must be an integer"),
  (":Score", {}, "must be module:function"), ("user_rewards:", {}, "must be module:function"),
  (".sound:Score", {}, "must be module:function"), ("a..b:Score", {}, "there is no module 'a'"),
  ("sound.py:Score", {}, "is a path; write sound:Score, with its folder in .*PYTHONPATH=. python"),
  ("/a/b.c/sound.py:Score", {}, "write sound:Score, with its folder in .*PYTHONPATH=/a/b.c python"),
  ("user_rewards/sound.py", {}, "is a path; write sound:function, with"),
  ("user_rewards.sound.Score", {}, "for one of your own write user_rewards.sound:Score"),
])
def test_what_is_wrong_is_told_in_a_line(name, options, words):
  message = " ".join(refusal(rewards.make, name, **options).split())
  assert name in message
  assert re.search(re.escape(words).replace(re.escape(".*"), ".*"), message), message


def test_a_package_that_hides_the_one_that_is_meant_is_named(user_rewards, monkeypatch):
  """As the project's own `rewards` does where training starts in the package's folder."""
  hiding = user_rewards.parent / "hiding" / "user_rewards"
  hiding.mkdir(parents=True)
  (hiding / "__init__.py").write_text("")
  monkeypatch.syspath_prepend(str(hiding.parent))
  message = refusal(rewards.make, "user_rewards.sound:Score")
  assert f"({hiding}/__init__.py) has no 'sound'" in message


def test_names_with_dots_pass_through_a_config():
  """From the command line or a file, to the log and the check of a resumption."""
  name = "user_rewards.sound:Score"
  config = config_files.load("configs/unigrpo.py:tiny", [
    f"--config.rewards={{'{name}': 1.0, 'brightness': 0.0}}",
    f"--config.reward_options={{'{name}': {{'scale': 2.0}}}}",
  ])
  spec = rl.read(config)
  assert spec.rewards.weights == {name: 1.0, "brightness": 0.0}
  assert spec.rewards.options == {name: {"scale": 2.0}}
  scorer = parts.make_scorer(spec.rewards)
  scorer.close()
  before = spec.run.config
  resumption.check(before, before, (), {})
  config.rewards = ConfigDict({name: 0.5, "brightness": 0.0}, allow_dotted_keys=True)
  assert rl.read(config).rewards.weights[name] == 0.5
  assert name in refusal(resumption.check, before, rl.read(config).run.config, (), {})
