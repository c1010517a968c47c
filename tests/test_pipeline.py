"""All modes: a row alone, in a batch, on a mesh and again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from unigrpo_jax import errors
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import pipeline
from unigrpo_jax.episodes import requests as requests_lib
from unigrpo_jax.runtime import sharding
from unigrpo_jax.sampling import flow

SETTINGS = requests_lib.Settings(
  num_timesteps=4, max_tokens=6, temperature=1.0,
  guidance=flow.Guidance(image_scale=1.5, interval=(0.0, 1.0)),
)
MODES = {
  "draw": {},
  "think": {"think": True},
  "edit": {"image": True},
  "edit_think": {"image": True, "think": True},
  "understand": {"image": True, "understand": True},
  "understand_think": {"image": True, "understand": True, "think": True},
}


@pytest.fixture(scope="module")
def one_device(golden):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return pipeline.Pipeline.open(golden, dtype=jnp.float32, mesh=mesh).load()


def _run(pipe, requests, settings):
  return pipe.run(pipe.prepare(requests, settings))


def _requests(with_image):
  rng = np.random.default_rng(0)
  prompts = ["a red kite", "two", "three birds above a chair"]
  if not with_image:
    sizes = [(48, 64), (32, 32), (64, 16)]
    return [requests_lib.Request(p, seed=i, size=s) for i, (p, s) in enumerate(zip(prompts, sizes))]
  images = [
    PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
    for h, w in [(50, 70), (40, 33), (64, 64)]
  ]
  return [
    requests_lib.Request(p, seed=i, image=im) for i, (p, im) in enumerate(zip(prompts, images))
  ]


def _settings(mode):
  options = {k: v for k, v in MODES[mode].items() if k != "image"}
  return dataclasses.replace(SETTINGS, **options)


def _assert_same(got, want):
  assert got.ids == want.ids and got.text == want.text and got.finished == want.finished
  if want.image is None:
    assert got.image is None
  else:
    assert got.image.shape == want.image.shape and got.image.dtype == np.uint8
    # Truncation to uint8 may fall the other way on the last bit.
    assert np.abs(got.image.astype(int) - want.image).max() <= 1


@pytest.mark.parametrize("mode", [
  "edit_think", "understand",
  *(pytest.param(mode, marks=pytest.mark.slow)
    for mode in ("draw", "think", "edit", "understand_think")),
])
def test_a_row_alone_equals_the_row_in_a_batch(one_device, mode):
  """From request to result, over texts and images of different sizes."""
  requests, settings = _requests("image" in MODES[mode]), _settings(mode)
  together = _run(one_device, requests, settings)
  for request, got in zip(requests[:2], together):
    _assert_same(got, _run(one_device, [request], settings)[0])
  writes = settings.think or settings.understand
  assert len({result.ids for result in together}) == (3 if writes else 1)


def test_a_repeated_batch_compiles_nothing(one_device, compilations):
  settings = _settings("edit_think")
  _run(one_device, _requests(True), settings)
  compilations.clear()
  again = [
    dataclasses.replace(request, prompt=request.prompt[::-1], seed=7 + i)
    for i, request in enumerate(_requests(True))
  ]
  _run(one_device, again, settings)
  assert compilations == []


def test_eight_devices_equal_one(golden, one_device):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sharded = pipeline.Pipeline.open(golden, dtype=jnp.float32, mesh=mesh).load()
  kernel = sharded.params["bagel"]["layers"]["gen"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  settings, requests = _settings("think"), _requests(False)
  for got, want in zip(_run(sharded, requests, settings), _run(one_device, requests, settings)):
    _assert_same(got, want)


def test_seeds_matter_and_repeat(one_device):
  request = _requests(False)[0]
  run = lambda seed: _run(one_device, [dataclasses.replace(request, seed=seed)], SETTINGS)[0].image
  np.testing.assert_array_equal(run(1), run(1))
  assert (run(1) != run(2)).mean() > 0.5


def test_thinking_reads_the_system_prompt_and_conditions_the_image(one_device):
  request = _requests(False)[0]
  thought = _run(one_device, [request], _settings("think"))[0]
  plain = _run(one_device, [request], SETTINGS)[0]
  assert plain.text is None and thought.text is not None
  assert (thought.image != plain.image).mean() > 0.1


def test_given_reasoning_draws_what_sampled_reasoning_drew(one_device):
  """Thinking greedily, then giving the same words back, is the same image."""
  settings = dataclasses.replace(_settings("think"), temperature=0)
  request = _requests(False)[0]
  sampled = _run(one_device, [request], settings)[0]
  words = one_device.network.tokenizer.decode(sampled.ids)
  assert tuple(one_device.network.tokenizer.encode(words)) == sampled.ids and not sampled.finished
  given = _run(one_device, [dataclasses.replace(request, reasoning=words)], settings)[0]
  assert given.text is None
  assert np.abs(given.image.astype(int) - sampled.image).max() <= 1
  with pytest.raises(errors.InputError, match="not asked for"):
    _run(one_device, [dataclasses.replace(request, reasoning=words)], SETTINGS)


def test_only_answering_needs_no_vae(golden):
  answering = pipeline.Pipeline.open(golden).load(("bagel",))
  assert set(answering.params) == {"bagel"}
  assert _run(answering, [requests_lib.Request("why?")], _settings("understand_think"))[0].ids


@pytest.mark.parametrize(
  "request_, settings, words",
  [
    (requests_lib.Request("  "), SETTINGS, "prompt 1 is empty"),
    (requests_lib.Request("x" * 4100), SETTINGS, "prompt 1 has 4100 tokens, at most 409"),
    (requests_lib.Request("x", size=(40, 64)), SETTINGS, "height=40.*multiple of 16.*try 32"),
    (requests_lib.Request("x", size=(64, 144)), SETTINGS, "width=144.*128"),
    (requests_lib.Request("x"), dataclasses.replace(SETTINGS, think=True, max_tokens=4000),
     "at most 0 fit|prompt 1 has"),
  ],
)
def test_impossible_requests_are_refused(one_device, request_, settings, words):
  with pytest.raises(errors.InputError, match=words):
    _run(one_device, [request_], settings)


@pytest.mark.parametrize(
  "name, value", [("num_timesteps", 1), ("shift", 0), ("temperature", -1), ("max_tokens", 0)]
)
def test_impossible_settings_are_refused(name, value):
  with pytest.raises(errors.InputError, match=f"{name}={value} must be"):
    dataclasses.replace(SETTINGS, **{name: value})


def test_an_empty_batch_is_refused(one_device):
  with pytest.raises(errors.InputError, match="at least one request"):
    _run(one_device, [], SETTINGS)


def test_mixed_batches_are_refused(one_device):
  with pytest.raises(errors.InputError, match="every request or for none"):
    _run(one_device, [_requests(True)[0], _requests(False)[0]], SETTINGS)


def test_a_tokenizer_that_does_not_fit_is_refused(golden, monkeypatch):
  too_large = dataclasses.replace(tokenizer_lib.load(golden), size=10_000)
  monkeypatch.setattr(tokenizer_lib, "load", lambda _: too_large)
  with pytest.raises(errors.InputError, match="9999.*vocab_size=300"):
    pipeline.Pipeline.open(golden)
