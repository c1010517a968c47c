"""The reward model: one differentiable function of pixels, and the question that it asks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors, rewards
from unigrpo_jax.data import images as images_lib
from unigrpo_jax.episodes import packing
from unigrpo_jax.reward_models import learned, metrics, readout, resize
from unigrpo_jax.runtime import checksums, folders

PROMPTS = ["two red kites", "a bird left of a green apple"]


def record(folder, **changes):
  """Writes a reward.json into a BAGEL folder."""
  files = {path.name: list(checksums.of(path)) for path in folder.iterdir()}
  (folder / learned.FILE).write_text(json.dumps(dict(
    question=learned.TINY_QUESTION, yes_id=88, no_id=77, tau=1.5, readout="two_token",
    vit_max=32, prompt_form="plain", clip="hard", metrics={},
    checksums={name: value for name, value in files.items() if name != learned.FILE},
  ) | changes))
  return folder


@pytest.fixture(scope="module")
def folder(shallow, tmp_path_factory):
  copy = tmp_path_factory.mktemp("reward_model") / "reward_model"
  copy.mkdir()
  for path in shallow.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  return record(copy)


@pytest.fixture(scope="module")
def opened(folder):
  return learned.open_folder(folder)


@pytest.fixture(scope="module")
def pictures():
  return np.random.default_rng(0).uniform(-1.3, 1.3, (2, 32, 32, 3)).astype(np.float32)


def test_readouts_by_hand():
  logits = jnp.array([[0.5, 2.0, -1.0, 3.0]])
  kinds = dict(yes_id=1, no_id=2, tau=2.0)
  read = {name: readout.read(logits, readout=name, **kinds)[0] for name in readout.READOUTS}
  assert read["logit"] == 1.5
  np.testing.assert_allclose(read["two_token"], 1 / (1 + np.exp(-1.5)), rtol=1e-6)
  np.testing.assert_allclose(read["log"], -np.log1p(np.exp(-1.5)), rtol=1e-6)
  scaled = np.exp(np.array([0.25, 1.0, -0.5, 1.5]))
  np.testing.assert_allclose(read["vocabulary"], scaled[1] / scaled.sum(), rtol=1e-6)
  swapped = readout.read(logits, yes_id=2, no_id=1, tau=2.0)
  np.testing.assert_allclose(swapped, 1 - read["two_token"], rtol=1e-6)
  assert readout.read(logits + 4, **kinds) == readout.read(logits, **kinds)
  assert readout.read(logits, yes_id=1, no_id=2, tau=1e9) == 0.5
  gradient = jax.grad(lambda l: readout.read(l, **kinds)[0])(logits)[0]
  slope = read["two_token"] * (1 - read["two_token"]) / 2.0
  np.testing.assert_allclose(gradient, [0, slope, -slope, 0], rtol=1e-6)


@pytest.mark.parametrize("sizes", [(40, 28), (30, 50), (97, 32)])
def test_resize_is_pillows_but_for_its_rounding(sizes):
  old, new = sizes
  image = np.random.default_rng(1).integers(0, 256, (old, old + 7, 3), np.uint8)
  by_pillow = PIL.Image.fromarray(image).resize((new + 3, new), PIL.Image.Resampling.BICUBIC)
  ours = resize.resize(image, new, new + 3, (0.0, 255.0))
  assert np.abs(np.asarray(by_pillow, np.float32) - ours).max() < 1.1
  assert resize.resize(image, *image.shape[:2]) is not None
  np.testing.assert_allclose(resize.weights(old, new).sum(axis=1), 1)


def test_the_sequence_is_that_of_packing(opened):
  model, _ = opened
  image = PIL.Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8))
  pixels, ids = images_lib.to_array(image), np.arange(16)
  questions = model.questions(PROMPTS)
  built = model._sequence(model.patches(np.stack([pixels] * 2)), questions)
  t = model.tokenizer
  texts = [[t.im_start, *t.encode(model.question.format(prompt=prompt)), t.im_end]
           for prompt in PROMPTS]
  start = lambda: packing.Text(np.array([t.im_start]), np.array([model.yes_id]))
  packed = packing.pack(
    [[packing.PatchImage(images_lib.patchify(pixels, 8), ids), packing.Text(np.array(text)),
      start()] for text in texts],
    image_markers=model.model.image_markers,
    pad_to=packing.PadTo(tokens=1, labels=1, patches=1),
  )
  length = packed.und_ids.shape[1]
  for name in ("und_order", "und_reach", "label_slot", "vit_row", "vit_slot"):
    expected = getattr(packed, name)
    found = np.asarray(getattr(built, name))
    found = found[:, :length] if name.startswith("und") else found
    np.testing.assert_array_equal(found, expected, err_msg=name)
  real = packed.und_order < length
  for name in ("und_ids", "und_position"):
    found = np.asarray(getattr(built, name))[:, :length]
    np.testing.assert_array_equal(found[real], getattr(packed, name)[real], err_msg=name)
  np.testing.assert_allclose(built.vit.pixels, packed.vit.pixels, atol=1e-6)


def test_gradient_agrees_with_central_differences_and_stops_where_pixels_are_clipped(
  folder, pictures
):
  with jax.enable_x64(True):
    model, params = learned.open_folder(folder, dtype=jnp.float64)
    questions = model.questions(PROMPTS)
    score = jax.jit(lambda pixels: model.score(params, pixels, questions).sum())
    rng, pixels, h = np.random.default_rng(3), jnp.asarray(pictures, jnp.float64), 1e-4
    gradient = np.asarray(jax.jit(jax.grad(score))(pixels))
    steps = list(rng.standard_normal((5, *pixels.shape)))
    for place in rng.choice(np.flatnonzero(np.abs(pictures) < 1), 20):
      steps.append(np.zeros(pixels.shape))
      steps[-1].flat[place] = 1.0
    inside = np.abs(pictures) < 1 - 1e-2  # A step across the bound is a step across a kink.
    for step in steps:
      step = step * inside / max(np.abs(step).max(), 1)
      numeric = (score(pixels + h * step) - score(pixels - h * step)) / (2 * h)
      np.testing.assert_allclose((gradient * step).sum(), numeric, rtol=1e-5)
  assert not gradient[np.abs(pictures) > 1].any()
  assert (gradient[np.abs(pictures) < 1] != 0).mean() > 0.9


def test_batched_equals_single_whatever_the_padding(opened, pictures):
  model, params = opened
  questions = model.questions(PROMPTS)
  score = jax.jit(model.score)
  both = score(params, pictures, questions)
  assert both.dtype == jnp.float32 and both.shape == (2,)
  longer = questions.replace(ids=np.pad(questions.ids, ((0, 0), (0, 16)), constant_values=5))
  np.testing.assert_allclose(score(params, pictures, longer), both, rtol=1e-5)
  for row in range(2):
    alone = score(params, pictures[row : row + 1], model.questions(PROMPTS[row : row + 1]))
    np.testing.assert_allclose(alone[0], both[row], rtol=1e-5)


def test_no_gradient_reaches_the_reward_model(opened, pictures):
  model, params = opened
  gradient = jax.jit(jax.grad(lambda p: model.score(p, pictures, model.questions(PROMPTS)).sum()))
  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient(params)))


@pytest.mark.parametrize(("prompt", "words"), [
  ("  ", "empty"), ("kite " * 2000, "has room for 1023"),
])
def test_prompts_that_it_cannot_ask_about_are_refused(opened, prompt, words):
  with pytest.raises(errors.InputError, match=words):
    opened[0].questions([prompt])


def test_quotation_marks_within_quotation_marks_are_refused(opened):
  model = dataclasses.replace(opened[0], question=learned.QUESTION)
  model.questions(["a kite that says 'go'"])
  with pytest.raises(errors.InputError, match="write ' instead"):
    model.questions(['a kite that says "go"'])


@pytest.mark.parametrize(("changes", "words"), [
  (dict(yes_id=77), "belong to different models"), (dict(tau=0), "tau=0 must be more than 0"),
  (dict(question="yes?"), "must hold {prompt} once"), (dict(vit_max=12), "try 8"),
  (dict(readout="sum"), "is none of two_token"), (dict(tau="1"), "of a wrong kind"),
])
def test_a_wrong_record_is_refused(folder, tmp_path, changes, words):
  for path in folder.iterdir():
    (tmp_path / path.name).symlink_to(path.resolve())
  (tmp_path / learned.FILE).unlink()
  record(tmp_path, **changes)
  with pytest.raises(errors.InputError, match=words):
    learned.open_folder(tmp_path)


def test_other_weights_or_none_are_refused(folder, tmp_path):
  with pytest.raises(errors.InputError, match="has no reward.json"):
    learned.open_folder(folders.TINY_FOLDER)
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  with (tmp_path / "ema.safetensors").open("r+b") as file:
    file.seek(-1, 2)
    file.write(b"\x77")
  with pytest.raises(errors.InputError, match="ema.safetensors: is not the file"):
    learned.open_folder(tmp_path)


def test_metrics_by_hand():
  scores, yes = np.array([3.0, 1.0, 1.0, -2.0]), np.array([True, True, False, False])
  assert metrics.auc(scores, yes) == 3.5 / 4
  assert metrics.auc(-scores, yes) == 0.5 / 4
  assert np.isnan(metrics.auc(scores, yes | True))
  # Thresholds 3, 1, -2: precisions 1, 2/3, 1/2 at recalls 1/2, 1, 1.
  assert np.isclose(metrics.average_precision(scores, yes), 0.5 * 1 + 0.5 * 2 / 3)
  groups = np.array([0, 0, 1, 1])
  assert np.isnan(metrics.group_auc(scores, yes, groups)[0])
  assert metrics.group_auc(scores, yes, np.array([0, 1, 1, 0])) == (0.75, 2)
  assert np.isclose(metrics.calibration_error([0.2, 0.2, 0.9, 1.0], [0, 1, 1, 1]),
                    (2 * 0.3 + 0.1) / 4)
  found = metrics.summary(np.array([np.log(3), -np.log(3)]), np.array([True, True]))
  assert (found["accuracy"], found["n"]) == (0.5, 2)
  np.testing.assert_allclose(found["brier"], (0.25**2 + 0.75**2) / 2)
  np.testing.assert_allclose(found["log_loss"], -(np.log(0.75) + np.log(0.25)) / 2)
  z = np.random.default_rng(0).normal(0, 2, 4000)
  drawn = np.random.default_rng(1).random(4000) < 1 / (1 + np.exp(-z))
  assert abs(metrics.best_temperature(3 * z, drawn) - 3) < 0.2
  np.testing.assert_allclose(metrics.soft_tifa([0.25, 1.0]), (0.5, 0.625))


def test_the_host_reward_gives_the_same_numbers_from_uint8(folder, opened):
  model, params = opened
  reward = rewards.make("reward_model", folder=str(folder))
  rng = np.random.default_rng(4)
  images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
  metadata = {"include": [{"class": "kite", "count": 2, "color": "red"}]}
  samples = [rewards.Sample("paint twice one kites, as a tomato", images[0], None, metadata)]
  samples += [rewards.Sample(prompt, image) for prompt, image in zip(["a bird", " "], images[1:])]
  found = rewards.evaluate(reward, samples)
  assert np.isnan(found.values).tolist() == [False, False, True] and "is empty" in found.reason
  pixels = jnp.asarray(images[:2], jnp.float32) / 255 * 2 - 1
  scores = jax.jit(model.score)(params, pixels, model.questions(["two red kites", "a bird"]))
  np.testing.assert_allclose(found.values[:2], scores, atol=1e-6)
  assert reward.settings == {
    "model": model.checksum, "readout": model.readout, "tau": model.tau,
    "question": model.question, "prompt_form": model.prompt_form, "vit_max": model.vit_max,
  }


def test_a_run_keeps_to_its_reward_model(folder, tmp_path):
  fingerprints = []
  for changes in ({}, dict(tau=2.0)):
    for path in folder.iterdir():
      (tmp_path / path.name).write_bytes(path.read_bytes())
    record(tmp_path, **changes)
    seen = rewards.make("reward_model", folder=str(tmp_path), time_limit=9.0)
    scorer = rewards.Scorer({"seen": seen},
                            {"seen": 1.0})
    fingerprints.append(scorer.fingerprints())
    scorer.close()
  assert list(fingerprints[0]) == ["reward_options.seen"] and fingerprints[0] != fingerprints[1]


def test_words_are_plain_only_where_the_world_has_them(opened):
  model = opened[0]
  kite = {"class": "kite", "count": 1}
  ask = lambda **entry: model.words("a riddle", {"include": [kite | entry]})
  assert ask(color="red") == "a red kite" and ask(count=3) == "three kites"
  assert ask(count=12) == "12 kites"
  assert ask(**{"class": "dog"}) == model.words("a riddle", {}) == "a riddle"
  above = {"include": [{"class": "apple", "count": 1},
                       {"class": "bird", "count": 1, "position": ["above", 0]}]}
  assert model.words("", above) == "a bird above an apple"
  verbatim = dataclasses.replace(model, prompt_form="prompt")
  assert verbatim.words("a riddle", above) == "a riddle"
