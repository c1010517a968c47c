"""The reward `geneval` with a detector of drawn rectangles, its colours, and over HTTP."""

import json
import threading

import numpy as np
import pytest

from unigrpo_jax import errors, rewards
from unigrpo_jax.geneval import rules
from unigrpo_jax.rewards import colors, serve

PAINT = {
  "red": (220, 20, 20), "orange": (240, 140, 20), "yellow": (245, 230, 30), "green": (30, 160, 40),
  "blue": (30, 60, 220), "purple": (130, 30, 170), "pink": (250, 130, 180), "brown": (120, 70, 25),
  "black": (10, 10, 10), "white": (250, 250, 250),
}
GREY = (128, 128, 128)


class Rectangles:
  """Finds, in every picture, the given objects: [class, score, box], with a mask of the box."""

  name, thresholds, concurrent = "rectangles 1", (0.3, 0.9), True

  def __init__(self, objects=(), fails=False):
    self._objects, self._fails = objects, fails

  def __call__(self, images):
    if self._fails:
      raise RuntimeError("out of memory")
    assert all(image.dtype == np.uint8 for image in images)
    return [
      [rules.Found(kind, rules.UNKNOWN, tuple(box), score) for kind, score, box in self._objects]
      for _ in images
    ]


def make(*objects, **options):
  return rewards.make(
    "geneval", detector="tests.test_geneval_reward:Rectangles",
    detector_options={"objects": objects}, **options,
  )


def sample(metadata, *painted):
  image = np.full((32, 32, 3), GREY, np.uint8)
  for color, (left, top, right, bottom) in painted:
    image[top:bottom, left:right] = PAINT[color]
  return rewards.Sample("a photo", image, metadata=metadata)


LEFT, RIGHT = (0, 0, 10, 10), (20, 0, 30, 10)
CUP = {"class": "cup", "count": 1}


def test_rules_thresholds_and_details():
  objects = ["cup", 0.5, LEFT], ["cup", 0.95, RIGHT], ["dog", 0.2, RIGHT]
  asked = [sample({"include": [CUP]}), sample({"include": [CUP], "tag": "counting"})]
  strict = rewards.evaluate(make(*objects), asked)
  assert strict.values.tolist() == [0, 1] and strict.reason is None
  assert strict.details[0] == {
    "correct": True, "reason": "cup: 2 found, exactly 1 wanted",
    "boxes": {"cup": [[20, 0, 30, 10, 0.95], [0, 0, 10, 10, 0.5]]},
  }
  assert strict.details[1]["reason"] == ""
  assert rewards.evaluate(make(*objects, rule="official"), asked).values.tolist() == [1, 1]
  soft = dict(rule="soft", thresholds=[0.1, 0.3])
  assert rewards.evaluate(make(*objects, **soft), asked).values.tolist() == [0, 0]
  three = [*objects, ["cup", 0.7, LEFT]]
  assert rewards.evaluate(make(*three, **soft, clip=False), asked[:1]).values.tolist() == [-1]


def test_settings_say_what_changes_a_score():
  reward = make()
  assert reward.settings == {
    "rule": "strict", "detector": "rectangles 1", "thresholds": [0.3, 0.9], "color": "hsv"
  }
  assert json.loads(reward.fingerprint) == reward.settings and reward.concurrent
  assert make(rule="soft").settings["clip"]
  assert make(thresholds=[0, 1]).settings["thresholds"] == [0, 1]


def test_colours_and_positions():
  metadata = {"tag": "color_attr", "include": [
    CUP | {"color": "blue"},
    {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]},
  ]}
  reward = make(["cup", 0.5, LEFT], ["dog", 0.5, RIGHT])
  right = sample(metadata, ("blue", LEFT), ("red", RIGHT))
  wrong = sample(metadata, ("blue", LEFT), ("green", RIGHT))
  scores = rewards.evaluate(reward, [right, wrong])
  assert scores.values.tolist() == [1, 0]
  assert scores.details[1]["reason"] == "dog: 0 red of 1 wanted, found green"
  # A box without area has no colour.
  empty = make(["cup", 0.5, (5, 5, 5, 9)])
  assert rewards.evaluate(empty, [sample({"include": [CUP | {"color": "blue"}]})]).values == [0]


@pytest.mark.parametrize(("metadata", "reason"), [
  ({}, "its metadata has no include"),
  ({"include": []}, "its metadata has no include"),
  ({"include": [{"class": "cup"}]}, "count=None"),
  ({"include": [{"class": "mug", "count": 1}]}, "asks for 'mug', which is none of GenEval's 80"),
  ({"include": [CUP | {"color": "mauve"}]}, "asks for 'mauve'"),
  ({"include": [CUP, CUP | {"position": ["near", 0]}]}, "asks for 'near'"),
])
def test_what_cannot_be_judged_is_nan_with_a_reason(metadata, reason):
  asked = [sample({"include": [CUP]}), sample(metadata)]
  scores = rewards.evaluate(make(["cup", 0.5, LEFT]), asked)
  assert scores.values[0] == 1 and np.isnan(scores.values[1])
  assert reason in scores.reason and reason in scores.details[1]["reason"]


def test_a_detector_that_fails_is_nan_with_its_reason():
  reward = rewards.make("geneval", detector="tests.test_geneval_reward:Rectangles",
                        detector_options={"fails": True})
  scores = rewards.evaluate(reward, [sample({"include": [CUP]}), sample({})])
  assert np.isnan(scores.values).all()
  assert scores.reason == "rectangles 1: RuntimeError: out of memory"
  assert "no include" in scores.details[1]["reason"]


@pytest.mark.parametrize(("options", "message"), [
  ({"rule": "lenient"}, "rule='lenient' is none of official, strict, soft"),
  ({"color": "rgb"}, "color='rgb' is none of hsv, clip, module:Class"),
  ({"thresholds": [0.3]}, "must be two numbers"),
  ({"thresholds": [0.3, 2]}, "thresholds=2 must be at least 0 and at most 1"),
  ({"detector_options": {"size": 3}}, "unexpected keyword argument 'size'|unexpected keyword"),
  (dict(clip=False), "clip=False has no effect with rule=strict, only with soft"),
])
def test_bad_options_are_one_line(options, message):
  with pytest.raises(errors.InputError, match=message) as raised:
    rewards.make("geneval", **{"detector": "tests.test_geneval_reward:Rectangles"} | options)
  assert "\n" not in str(raised.value)


def test_crops():
  image = np.zeros((8, 8, 3), np.uint8)
  image[:, 4:] = 255
  mask = np.zeros((8, 8), bool)
  mask[2:6, 2:6] = True
  crop = lambda box, mask=None: colors.crop(image, rules.Found("cup", "", box, mask=mask))
  # Python rounds halves to even, as PIL does.
  assert np.asarray(crop((1.4, 0.5, 6.6, 7.5))).shape == (8, 6, 3)
  masked = np.asarray(crop((1, 1, 6, 6), mask))
  assert (masked[0] == 0x99).all() and masked[1, 1, 0] == 0 and masked[1, 3, 0] == 255
  assert crop((3, 3, 3, 5)) is None
  # What leaves the picture is black, as PIL's crop has it.
  assert np.asarray(crop((-2, 0, 8, 8))).shape == (8, 10, 3)


@pytest.mark.parametrize("name", PAINT)
def test_hues(name):
  image = np.full((10, 10, 3), PAINT[name], np.uint8)
  image[:3] = GREY
  found = rules.Found("cup", rules.UNKNOWN, (0, 0, 10, 10))
  assert colors.Hsv()([colors.crop(image, found)], "cup") == [name]
  # With more grey than colour there is none to name; what a mask leaves out is not counted.
  image[:6] = GREY
  assert colors.Hsv()([colors.crop(image, found)], "cup") == [rules.UNKNOWN]
  mask = np.zeros((10, 10), bool)
  mask[6:] = True
  masked = rules.Found("cup", rules.UNKNOWN, (0, 0, 10, 10), mask=mask)
  assert colors.Hsv()([colors.crop(image, masked)], "cup") == [name]


def test_clip_s_texts():
  assert colors.templates("red", "cup") == [
    "a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object"
  ]


def test_served_scores_equal_local_ones():
  reward = make(["cup", 0.5, LEFT], ["dog", 0.5, RIGHT], rule="soft")
  server = serve.Server({"geneval": reward})
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    asked = [
      sample({"include": [CUP | {"color": "blue"}]}, ("blue", LEFT)),
      sample({"include": [CUP | {"count": 2}]}), sample({}),
    ]
    over = rewards.evaluate(rewards.make("http", url=server.address, reward="geneval"), asked)
  finally:
    server.shutdown()
    server.server_close()
  local = rewards.evaluate(reward, asked)
  np.testing.assert_array_equal(over.values, local.values)
  assert local.values[:2].tolist() == [1, 0.5] and np.isnan(local.values[2])
