"""From examples to batches: layout, dropped conditions, limits, and the same batch for a step."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests import refusals
from unigrpo_jax import finetune
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import packing, phases
from unigrpo_jax.recipe import config_files
from unigrpo_jax.runtime import folders, hosts, sharding
from unigrpo_jax.supervised import corpus, feed

LIMITS = packing.PadTo(
  tokens=640, labels=256, patches=24, images=6, clean=32, latents=32, noisy=3
)
KEEP = dict(drop_text=0.0, drop_vit=0.0, drop_vae=0.0)


@pytest.fixture(scope="module")
def tokenizer(golden):
  return tokenizer_lib.load(golden)


def _encode(config):
  """Latents that say which image they are of, without a network."""
  def encode(pixels, noise):
    count, height, width, _ = pixels.shape
    tokens = height // config.latent_stride * (width // config.latent_stride)
    return np.broadcast_to(
      pixels.mean(axis=(1, 2, 3))[:, None, None], (count, tokens, config.latent_dim)
    )

  return encode


@pytest.mark.parametrize(
  "count, side, rows",
  [(1, 32, 16), (16, 32, 16), (17, 32, 32), (5, 256, 16), (3, 512, 4), (1, 1024, 1), (1, 1152, 1)],
)
def test_encoding_is_filled_up_to_what_a_device_takes(monkeypatch, golden, count, side, rows):
  """Few images become 16, large ones as many as have the pixels of one of 1024 x 1024."""
  shapes, folder = [], folders.open_folder(golden)
  small = side // folder.config.vae.downsample

  def encode_images(vae, params, pixels, noise):
    shapes.append(pixels.shape)
    return jnp.asarray(noise)

  monkeypatch.setattr(phases, "encode_images", encode_images)
  noise = np.random.default_rng(0).normal(
    size=(count, small, small, folder.config.vae.z_channels)).astype(np.float32)
  tokens = finetune.make_encoder(folder)(np.zeros((count, side, side, 3), np.float32), noise)
  assert shapes == [(rows, side, side, 3)] and len(tokens) == count
  assert len({float(image.mean()) for image in tokens}) == count


def _picture(value):
  return PIL.Image.new("RGB", (32, 32), (value,) * 3)


EXAMPLES = {
  "draw_think": corpus.Example("a kite", "<think>one kite</think>", target=_picture(10)),
  "draw": corpus.Example("a kite", target=_picture(20)),
  "answer": corpus.Example("how many?", "one", source=_picture(30)),
  "edit": corpus.Example("make it blue", target=_picture(40), source=_picture(50)),
}


def _splits(config, tokenizer, task, **drops):
  recipe = feed.Recipe(noise_draws=3, **(KEEP | drops))
  latents = lambda value: (np.full((4, config.latent_dim), value, np.float32), np.arange(4))
  example = EXAMPLES[task]
  return feed.splits_of(
    example, latents(1) if example.target else None,
    latents(2) if example.target and example.source else None,
    config, tokenizer, recipe, np.random.default_rng(0),
  )


@pytest.mark.parametrize(
  "task, kinds",
  [
    ("draw_think", ["Text", "Text", "Text", "NoisyImage"]),
    ("draw", ["Text", "NoisyImage"]),
    ("answer", ["PatchImage", "Text", "Text"]),
    ("edit", ["CleanImage", "PatchImage", "Text", "NoisyImage"]),
  ],
)
def test_layouts(config, tokenizer, task, kinds):
  splits = _splits(config, tokenizer, task)
  names = [type(split).__name__ for split in splits]
  assert names == kinds[:-1] + [kinds[-1]] * (3 if kinds[-1] == "NoisyImage" else 1)
  labelled = [split for split in splits if isinstance(split, packing.Text) and
              split.labels is not None]
  assert len(labelled) == (EXAMPLES[task].text is not None)
  if task == "draw_think":
    system = tokenizer.encode(tokenizer_lib.SYSTEM_PROMPT_GEN)
    assert splits[0].ids.tolist() == [tokenizer.im_start, *system, tokenizer.im_end]
  noisy = [split for split in splits if isinstance(split, packing.NoisyImage)]
  assert len({split.t for split in noisy}) == len(noisy)  # Each draw has a time of its own.


def test_dropped_conditions(config, tokenizer):
  """Without its text a drawing keeps S, an edit keeps V and T: what guidance compares with."""
  kinds = lambda task, **drops: [
    type(split).__name__ for split in _splits(config, tokenizer, task, **drops)
    if not isinstance(split, packing.NoisyImage)
  ]
  assert kinds("draw_think", drop_text=1.0) == ["Text"]
  assert kinds("draw", drop_text=1.0) == []
  assert kinds("edit", drop_text=1.0) == ["CleanImage", "PatchImage"]
  assert kinds("edit", drop_vit=1.0, drop_vae=1.0) == ["Dropped", "Dropped", "Text"]
  # An answer without its image or question would be noise.
  assert kinds("answer", drop_text=1.0, drop_vit=1.0) == ["PatchImage", "Text", "Text"]


RECIPE = feed.Recipe(noise_draws=3)


def _feed(config, tokenizer, examples=None, limits=LIMITS, recipe=RECIPE, **options):
  names = list(EXAMPLES)
  draw = examples or (lambda rng: EXAMPLES[names[rng.integers(len(names))]])
  options = dict(rows=6, microbatches=2, seed=0) | options
  return feed.Feed(draw, config, tokenizer, _encode(config), recipe, limits, **options)


def test_a_batch_is_a_function_of_seed_and_step(config, tokenizer):
  a, b, other = (_feed(config, tokenizer, seed=seed) for seed in (0, 0, 1))
  same = lambda x, y: all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))
  ahead = dict(zip(range(3, 6), a.batches(3, 6)))
  assert same(ahead[5], b.batch(5)) and same(ahead[3], b.batch(3))
  assert not same(b.batch(3), b.batch(4)) and not same(b.batch(3), other.batch(3))


def test_every_batch_has_the_same_shapes_whatever_it_holds(config, tokenizer):
  shapes = set()
  for task in EXAMPLES:
    batch = _feed(config, tokenizer, lambda _, task=task: EXAMPLES[task]).batch(0)
    shapes.add(str(jax.tree.map(np.shape, batch)))
  assert len(shapes) == 1


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_latents_belong_to_their_own_example(config, tokenizer, monkeypatch, at_once):
  """Encoded together by size, so many at once, given back by row."""
  monkeypatch.setattr(phases, "VAE_PIXELS", at_once * 32 * 32)
  made = _feed(config, tokenizer, lambda _: EXAMPLES["edit"], rows=3, microbatches=1)
  encode, counts = made._encode, []
  made._encode = lambda pixels, noise: counts.append(len(pixels)) or encode(pixels, noise)
  made.batch(0)
  assert counts == {1: [1] * 6, 2: [2] * 3, 1024: [6]}[at_once]
  batch = _feed(config, tokenizer, rows=1, microbatches=8).batch(0)
  brightness = lambda value: np.float32(value / 255 * 2 - 1)
  seen = set()
  for target, mask in zip(batch.target[:, 0, 0], batch.noisy_mask[:, 0, 0]):
    if mask.any():
      seen.add(float(target[mask][0, 0]))
  known = {float(brightness(value)) for value in (10, 20, 40)}
  assert seen and all(min(abs(value - k) for k in known) < 1e-6 for value in seen)
  clean = batch.clean_latents[batch.clean_order < 2**31 - 1]
  np.testing.assert_allclose(clean, brightness(50), atol=1e-6)


@pytest.mark.parametrize("owners", [[0, 0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1, 0]], ids=str)
def test_a_row_sees_its_own_image_on_whichever_host(config, tokenizer, monkeypatch, owners):
  """Two hosts' batches, put together as `make_array_from_process_local_data` does."""
  owners = np.array(owners)

  def example(rng):
    shade = int(rng.integers(1, 256))
    return corpus.Example("how many?", "one", source=_picture(shade)) if shade % 3 else (
      corpus.Example("a kite", target=_picture(shade))
    )

  def seen(batch, rows):
    """What lies where the ViT's images are written, [microbatches, rows, tokens, features]."""
    count, _, tokens = batch.und_ids.shape
    out = np.zeros((count, rows, tokens + 1, batch.vit.pixels.shape[-1]), np.float32)
    for place, row, slot, pixels in zip(out, batch.vit_row, batch.vit_slot, batch.vit.pixels):
      place[row[:, None], slot] = pixels
    return out[:, :, :tokens]

  monkeypatch.setattr(sharding, "row_hosts", lambda mesh, rows: owners)
  monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda where, array: array)
  expected = np.zeros((2, 8, LIMITS.tokens, config.vit.patch_dim), np.float32)
  mesh, parts = sharding.make_mesh(devices=jax.devices()[:1]), []
  for host in range(2):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    batch = _feed(config, tokenizer, example, rows=4).batch(0)
    expected[:, owners == host] = seen(batch, 4)
    parts.append(finetune.spread(batch, mesh, rows=8))
  whole = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
  assert whole.vit_row.shape == (2, 2 * LIMITS.images) and whole.vit_row.dtype == np.int32
  assert 8 < expected.any(axis=(2, 3)).sum() < 16  # some rows have an image, some have none
  np.testing.assert_array_equal(seen(whole, 8), expected)


def test_one_host_has_all_rows(config, tokenizer):
  """On eight devices; every array is what the feed made."""
  batch = _feed(config, tokenizer, rows=8, limits=dataclasses.replace(LIMITS, images=8)).batch(0)
  spread = finetune.spread(batch, sharding.make_mesh(fsdp=4, data=2), rows=8)
  for made, put in zip(jax.tree.leaves(batch), jax.tree.leaves(spread), strict=True):
    assert put.addressable_shards[0].data.shape[1] == made.shape[1] // 8
    np.testing.assert_array_equal(put, made)


def test_a_host_has_its_share_of_the_images(monkeypatch):
  made = config_files.load("sft")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert finetune.padding(made).images == 8
  monkeypatch.setattr(hosts, "count", lambda: 4)
  assert finetune.padding(made).images == 2
  assert finetune.padding(made).tokens == made.limits.tokens
  made.limits.images = 6
  message = refusals.refusal(finetune.check_config, made, mesh)
  assert "config.limits.images=6 does not divide" in message and "4 hosts" in message


LONG = corpus.Example("a kite", "<think>one kite</think>", target=_picture(10), where="a, line 3")
EDIT = dataclasses.replace(EXAMPLES["edit"], where="a, line 3")


@pytest.mark.parametrize("example, limit, words", [
  (LONG, {"tokens": 64}, r"has (\d+) tokens .*, more than config\.limits\.tokens=64;"),
  (LONG, {"labels": 4}, r"has (\d+) labels, more than config\.limits\.labels=4;"),
  (EDIT, {"patches": 2}, r"has (\d+) patches in an image, more than config\.limits\.patches=2;"),
  (EDIT, {"clean": 1}, r"has (\d+) latent tokens of images to edit, .*config\.limits\.clean=1;"),
  (EDIT, {"latents": 1}, r"has (\d+) latent tokens in an image to draw, .*\.latents=1;"),
])
def test_a_sample_beyond_the_limits_says_so_itself(config, tokenizer, example, limit, words):
  """Its true size: with a limit of that size it fits."""
  whole = feed.Recipe(noise_draws=3, **KEEP)
  feed_of = lambda **limit: _feed(
    config, tokenizer, lambda _: example, dataclasses.replace(LIMITS, **limit), whole
  )
  message = refusals.refusal(feed_of(**limit).batch, 0)
  found = re.match("a, line 3: a sample " + words, message)
  assert found, message
  needed = {name: int(found[1]) for name in limit}
  feed_of(**needed).batch(0)
  message = refusals.refusal(feed_of(**{name: size - 1 for name, size in needed.items()}).batch, 0)
  assert re.match("a, line 3: a sample has ", message)


def test_too_many_images_of_a_microbatch(config, tokenizer):
  small = dataclasses.replace(LIMITS, images=4)
  message = refusals.refusal(
    _feed(config, tokenizer, lambda _: EXAMPLES["answer"], small).batch, 0
  )
  assert "config.limits.images leaves 4 to the 6 sequences" in message and "have 6;" in message


@pytest.mark.parametrize("changes, words", [
  ({"target": PIL.Image.new("RGB", (1000, 9))}, "image of 1000x9 pixels is too narrow"),
  ({"source": PIL.Image.new("RGB", (1000, 9))}, "image of 1000x9 pixels is too narrow"),
  ({"target": None, "source": PIL.Image.new("RGB", (1000, 9))}, "image of 1000x9 pixels is too"),
  ({"prompt": "\U0001f600"}, "has no id in the toy tokenizer"),
  ({"text": "\U0001f600"}, "has no id in the toy tokenizer"),
])
def test_an_example_that_cannot_be_learnt_is_named(config, tokenizer, changes, words):
  example = dataclasses.replace(LONG, **changes)
  message = refusals.refusal(_feed(config, tokenizer, lambda _: example).batch, 0)
  assert message.startswith("a, line 3: ") and words in message


def test_iconworld_mixtures_and_wrong_plans():
  from unigrpo_jax.iconworld import plans, verifier

  rng = np.random.default_rng(0)
  wrong = corpus.iconworld({"draw_think": 1.0}, wrong_plan_rate=1.0)
  for _ in range(20):
    example = wrong(rng)
    # The picture follows the plan, so drawing stays honest where reasoning goes wrong.
    found = sorted((d.kind, d.color) for d in verifier.detect(np.array(example.target)))
    plan = plans.plan_of(example.text)
    assert found == sorted((thing.kind, thing.color) for thing in plan.things)
  mixed = corpus.iconworld(dict.fromkeys(corpus.TASKS, 1.0), wrong_plan_rate=0.0)
  kinds = {(e.text is None, e.target is None, e.source is None) for e in map(mixed, [rng] * 60)}
  assert len(kinds) == 4


@pytest.mark.parametrize("mixture, rate, words", [
  ({"drawn": 1.0}, 0.0, "config.data.mixture='drawn' is none of .* did you mean 'draw'"),
  ({"draw": 2.0, "edit": -1.0}, 0.0, "config.data.mixture.edit=-1.0 must be at least 0"),
  ({"draw": float("nan")}, 0.0, "config.data.mixture.draw=nan"),
  ({"draw": 0.0}, 0.0, "config.data.mixture={'draw': 0.0} has no task"),
  ({}, 0.0, "config.data.mixture={} has no task"),
  ({"draw": 1.0}, 7.0, "config.data.wrong_plan_rate=7.0 must be at least 0 and at most 1"),
])
def test_impossible_mixtures_name_their_key(mixture, rate, words):
  message = refusals.refusal(corpus.iconworld, mixture, wrong_plan_rate=rate)
  assert re.match(words, message), message


@pytest.fixture
def shard(tmp_path):
  """Writes lines, objects or bytes, as a shard beside two images; gives the folder."""
  _picture(7).save(tmp_path / "a.png")
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

  def write(*lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "one.jsonl").write_bytes(b"\n".join(raw))
    return tmp_path

  return write


DRAWN = {"prompt": "a kite", "image": "a.png"}


@pytest.mark.parametrize("row, text, images", [
  (DRAWN, None, "target"),
  (DRAWN | {"reasoning": " <think>one </think>\n"}, " <think>one </think>\n", "target"),
  (DRAWN | {"source": "a.png"}, None, "target source"),
  (DRAWN | {"source": "a.png", "reasoning": "r"}, "r", "target source"),
  ({"prompt": "how many?", "answer": "one"}, "one", ""),
  ({"prompt": "how many?", "answer": "one", "source": "a.png"}, "one", "source"),
])
def test_a_line_of_a_shard_is_an_example(shard, row, text, images):
  """Its texts are those of the file, to the letter."""
  folder = shard(b"", row, b"  ")
  example = corpus.shards(folder)(np.random.default_rng(0))
  assert (example.prompt, example.text) == (row["prompt"], text)
  for name in ("target", "source"):
    assert (getattr(example, name) is not None) == (name in images)
  assert example.where == f"{folder / 'one.jsonl'}, line 2"


@pytest.mark.parametrize("line, words", [
  (b"{", "not JSON"),
  (b"[" * 100_000, "not JSON"),
  (b'{"prompt": ' + b"1" * 6000 + b"}", "not JSON"),
  (b'{"prompt": "a", "prompt": "b", "image": "a.png"}', "'prompt' is there twice"),
  (b"\xff", "not UTF-8"),
  ([], "is not an object; expected an object"),
  ({"image": "a.png"}, 'no key "prompt"'),
  ({"prompt": "a"}, 'none of "image" to draw and "answer" to learn'),
  ({"prompt": "a", "reasoning": "b"}, 'none of "image" to draw'),
  (DRAWN | {"answer": "one"}, 'both of "image" to draw and "answer" to learn; give one'),
  ({"prompt": "a", "answer": "b", "reasoning": "c", "source": "a.png"}, '"reasoning" beside'),
  (DRAWN | {"reasonning": "b"}, "key='reasonning' is none of .* did you mean 'reasoning'"),
  (DRAWN | {"prompt": " "}, "the prompt is empty"),
  (DRAWN | {"reasoning": "\n"}, "the reasoning is empty"),
  ({"prompt": "a", "answer": ""}, "the answer is empty"),
  (DRAWN | {"reasoning": None}, "reasoning=null must be text"),
  (DRAWN | {"image": 3}, "image=3 must be text"),
  (DRAWN | {"image": "b.png"}, "image='b.png' is no file in "),
  (DRAWN | {"source": "."}, "source='.' is no file in "),
  (DRAWN | {"source": "b" * 300}, "source='b+' is no file in "),
  (DRAWN | {"source": "a\0.png"}, "is no file in "),
])
def test_a_bad_line_of_a_shard_is_named_before_training(shard, line, words):
  folder = shard(DRAWN, line)
  message = refusals.refusal(corpus.shards, folder)
  assert message.startswith(f"{folder / 'one.jsonl'}, line 2: ")
  assert re.search(words, message), message


def test_shards_that_are_no_files(shard, tmp_path):
  assert "no *.jsonl shards" in refusals.refusal(corpus.shards, tmp_path / "nowhere")
  assert "its shards are empty" in refusals.refusal(corpus.shards, shard(b"", b""))
  (tmp_path / "x.jsonl").mkdir()
  assert f"{tmp_path / 'x.jsonl'}: cannot be read" in refusals.refusal(corpus.shards, tmp_path)


def test_an_image_that_cannot_be_read_names_its_line(shard):
  folder = shard(DRAWN | {"image": "broken.png"})
  message = refusals.refusal(corpus.shards(folder), np.random.default_rng(0))
  assert message.startswith(f"{folder / 'one.jsonl'}, line 1: {folder / 'broken.png'}: ")
