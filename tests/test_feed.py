"""From examples to batches: layout, dropped conditions, limits, and the same rows on any hosts."""

import contextlib
import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests import refusals
from unigrpo_jax import errors, finetune
from unigrpo_jax.data import tokenizer as tokenizer_lib
from unigrpo_jax.episodes import packing, programs
from unigrpo_jax.recipe import config_files, sft
from unigrpo_jax.runtime import folders, sharding, state
from unigrpo_jax.supervised import corpus, feed

LIMITS = packing.PadTo(
  tokens=640, labels=256, patches=24, images=6, clean=32, latents=32, noisy=3
)
KEEP = dict(drop_text=0.0, drop_vit=0.0, drop_vae=0.0)


@pytest.fixture(scope="module")
def tokenizer(golden):
  return tokenizer_lib.load(golden)


def _encode(config):
  """Latents that show which image they are of, without a network."""
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

  monkeypatch.setattr(programs, "encode_images", lambda platform: encode_images)
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
EDIT_THINK = dataclasses.replace(EXAMPLES["edit"], text="<think>one blue kite</think>")


def _splits(config, tokenizer, task, **drops):
  recipe = feed.Recipe(noise_draws=3, **(KEEP | drops))
  latents = lambda value: np.full((4, config.latent_dim), value, np.float32)
  example = EDIT_THINK if task == "edit_think" else EXAMPLES[task]
  return feed.splits_of(
    example, {"target": latents(1), "source": latents(2)}, config, tokenizer, recipe,
    np.random.default_rng(0),
  )


@pytest.mark.parametrize(
  "task, kinds",
  [
    ("draw_think", ["Text", "Text", "Text", "NoisyImage"]),
    ("draw", ["Text", "NoisyImage"]),
    ("answer", ["PatchImage", "Text", "Text"]),
    ("edit", ["CleanImage", "PatchImage", "Text", "NoisyImage"]),
    ("edit_think", ["Text", "CleanImage", "PatchImage", "Text", "Text", "NoisyImage"]),
  ],
)
def test_layouts(config, tokenizer, task, kinds):
  splits = _splits(config, tokenizer, task)
  names = [type(split).__name__ for split in splits]
  assert names == kinds[:-1] + [kinds[-1]] * (3 if kinds[-1] == "NoisyImage" else 1)
  labelled = [split for split in splits if isinstance(split, packing.Text) and
              split.labels is not None]
  assert len(labelled) == (task in ("draw_think", "answer", "edit_think"))
  if "think" in task:
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


def _random_example(row_number, rng):
  return EXAMPLES[list(EXAMPLES)[rng.integers(len(EXAMPLES))]]


def _always(example):
  return lambda row_number, rng: example


def _feed(config, tokenizer, examples=_random_example, limits=LIMITS, recipe=RECIPE, **options):
  options = dict(sequences_per_step=12, microbatch=6, seed=0) | options
  options.setdefault("local_rows", np.arange(options["microbatch"], dtype=np.int32))
  return feed.Feed(examples, config, tokenizer, _encode(config), recipe, limits, **options)


def _same(a, b):
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_batch_is_a_function_of_seed_and_step(config, tokenizer):
  a, b, other = (_feed(config, tokenizer, seed=seed) for seed in (0, 0, 1))
  with contextlib.closing(feed.Prefetch(a.batch, range(3, 6))) as batches:
    prefetched = {step: batches.next() for step in range(3, 6)}
  assert _same(prefetched[5], b.batch(5)) and _same(prefetched[3], b.batch(3))
  assert not _same(b.batch(3), b.batch(4)) and not _same(b.batch(3), other.batch(3))


def _by_row(batch):
  """[{name: array}] of the rows of a step, whatever its microbatches; what the ViT sees as well."""
  rows = []
  for m in range(len(batch.und_ids)):
    micro = jax.tree.map(lambda a, m=m: a[m], batch)
    fields = {name: value for name, value in vars(micro).items() if not name.startswith("vit")}
    tokens, patches = micro.und_ids.shape[1], micro.vit.pixels.shape[-1]
    seen = np.zeros((len(micro.und_ids), tokens + 1, patches), np.float32)
    for row, slot, pixels in zip(micro.vit_row, micro.vit_slot, micro.vit.pixels):
      seen[row, slot] = pixels
    fields["seen"] = seen[:, :tokens]
    rows += [{name: a[row] for name, a in fields.items()} for row in range(len(micro.und_ids))]
  return rows


@pytest.mark.parametrize("microbatch", [4, 6, 12])
def test_a_step_does_not_depend_on_the_microbatch(config, tokenizer, microbatch):
  limits = dataclasses.replace(LIMITS, images=12)
  want, got = (
    _by_row(_feed(config, tokenizer, limits=limits, microbatch=size).batch(5))
    for size in (3, microbatch)
  )
  assert len(got) == 12 and all(_same(a, b) for a, b in zip(want, got, strict=True))


def test_every_batch_has_the_same_shapes_whatever_it_holds(config, tokenizer):
  shapes = set()
  for task in EXAMPLES:
    batch = _feed(config, tokenizer, _always(EXAMPLES[task])).batch(0)
    shapes.add(str(jax.tree.map(np.shape, batch)))
  assert len(shapes) == 1


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_latents_belong_to_their_own_example(config, tokenizer, monkeypatch, at_once):
  """Encoded together by size, so many at once, whatever the microbatch; given back by row."""
  monkeypatch.setattr(programs, "VAE_PIXELS", at_once * 32 * 32)
  made = _feed(
    config, tokenizer, _always(EXAMPLES["edit"]), sequences_per_step=4, microbatch=2
  )
  encode, counts = _encode(config), []
  counted = lambda pixels, noise: counts.append(len(pixels)) or encode(pixels, noise)
  dataclasses.replace(made, encode_fn=counted).batch(0)
  assert counts == {1: [1] * 8, 2: [2] * 4, 1024: [8]}[at_once]
  batch = _feed(config, tokenizer, sequences_per_step=8, microbatch=1).batch(0)
  brightness = lambda value: np.float32(value / 255 * 2 - 1)
  seen = set()
  for target, mask in zip(batch.target[:, 0, 0], batch.noisy_mask[:, 0, 0]):
    if mask.any():
      seen.add(float(target[mask][0, 0]))
  known = {float(brightness(value)) for value in (10, 20, 40)}
  assert seen and all(min(abs(value - k) for k in known) < 1e-6 for value in seen)
  clean = batch.clean_latents[batch.clean_order < 2**31 - 1]
  np.testing.assert_allclose(clean, brightness(50), atol=1e-6)


def _shaded(row_number, rng):
  """An example of its own for each row: an image that is asked about, or one to draw."""
  shade = int(rng.integers(1, 256))
  return corpus.Example("how many?", "one", source=_picture(shade)) if shade % 3 else (
    corpus.Example("a kite", target=_picture(shade))
  )


@pytest.mark.parametrize(
  "owners", [[0, 0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]], ids=str
)
def test_a_batch_does_not_depend_on_the_hosts(config, tokenizer, owners):
  """Put together as `make_array_from_process_local_data` does, which sorts rows by their owner."""
  owners = np.array(owners)
  limits = dataclasses.replace(LIMITS, images=8)
  options = dict(sequences_per_step=16, microbatch=8)
  [want, parts] = _by_row(_feed(config, tokenizer, _shaded, limits, **options).batch(1)), []
  for host in range(owners.max() + 1):
    local = np.flatnonzero(owners == host).astype(np.int32)
    images = dataclasses.replace(limits, images=8 // (owners.max() + 1))
    parts.append(
      _feed(config, tokenizer, _shaded, images, local_rows=local, **options).batch(1)
    )
  joined = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
  rows = np.argsort(np.argsort(owners, kind="stable"))  # where each row lies among the parts
  joined = joined.replace(**{
    name: value[:, rows] for name, value in vars(joined).items()
    if value is not None and not name.startswith("vit")
  })
  assert joined.vit_row.shape == (2, 8) and joined.vit_row.dtype == np.int32
  got = _by_row(joined)
  # Some rows have an image, some have none.
  assert 0 < sum(row["seen"].any() for row in got) < 16
  assert all(_same(a, b) for a, b in zip(want, got, strict=True))


def test_one_host_has_all_rows(config, tokenizer):
  """On eight devices; every array is what the feed made."""
  limits = dataclasses.replace(LIMITS, images=8)
  batch = _feed(config, tokenizer, limits=limits, sequences_per_step=16, microbatch=8).batch(0)
  arrays = finetune.put(batch, sharding.make_mesh(fsdp=4, data=2))
  for made, array in zip(jax.tree.leaves(batch), jax.tree.leaves(arrays), strict=True):
    assert array.addressable_shards[0].data.shape[1] == made.shape[1] // 8
    np.testing.assert_array_equal(array, made)


def test_a_host_has_its_share_of_rows_and_images(monkeypatch, golden):
  config = config_files.load("configs/sft.py")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  network = types.SimpleNamespace(
    folder=folders.open_folder(golden), config=None, tokenizer=None, mesh=mesh
  )
  made = lambda: finetune.make_feed(sft.read(config), network, _random_example)
  assert made().limits.images == 8 and made().local_rows.tolist() == [*range(8)]
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(sharding, "row_hosts", lambda mesh, rows: np.arange(rows) * 4 // rows)
  assert made().limits.images == 2 and made().local_rows.tolist() == [2, 3]
  assert made().limits.tokens == config.limits.tokens
  config.limits.images = 6
  message = refusals.refusal(sft.check_fits, sft.read(config), network)
  assert "config.limits.images=6 does not divide" in message and "4 hosts" in message


def test_images_are_cropped_to_few_sizes(config, tokenizer):
  """A size that has not been encoded yet compiles; what is only asked about is not encoded."""
  picture = lambda width, height: PIL.Image.new("RGB", (width, height), (9, 9, 9))

  def sizes_of(examples, image_sizes):
    recipe, seen = feed.Recipe(image_sizes=image_sizes), []
    made = _feed(config, tokenizer, examples=lambda number, rng: examples[number % len(examples)],
                 recipe=recipe, sequences_per_step=len(examples), microbatch=len(examples))
    for number in range(len(examples)):
      example = made._row(number).example
      seen.append(tuple(image and image.size for image in (example.target, example.source)))
    return seen

  shapes = (37, 32), (99, 50), (32, 70)
  drawn = [corpus.Example("a kite", target=picture(*shape)) for shape in shapes]
  edited = corpus.Example("blue", target=picture(64, 32), source=picture(33, 70))
  asked = corpus.Example("how many?", "one", source=picture(48, 32))
  sizes = ((32, 32), (16, 32), (32, 16))
  assert sizes_of([*drawn, edited, asked], sizes) == [
    ((32, 32), None), ((32, 16), None), ((16, 32), None), ((32, 16), (16, 32)), (None, (48, 32)),
  ]
  assert len(set(sizes_of(drawn, ()))) == 3


def test_sizes_that_the_model_cannot_draw_are_refused():
  config = config_files.load("configs/sft.py")
  config.image_sizes = ((1024, 1000),)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  network = state.Network(folders.open_folder(folders.TINY), None, None, mesh)
  message = refusals.refusal(sft.check_fits, sft.read(config), network)
  assert message.startswith("config.image_sizes: height=1024: an image side must be a multiple of")
  config.image_sizes = (1024, 1024)
  assert "config.image_sizes=1024 must be a tuple of 2" in refusals.refusal(sft.read, config)


def test_a_thread_prefetches_and_knows_what_is_bad_before_it_is_needed():
  """Three batches are made ahead; an error is found at most that far ahead, and raised in turn."""
  made = []

  def batch(step):
    made.append(step)
    if step == 4:
      raise errors.InputError("a, line 3: bad")
    return step

  with contextlib.closing(feed.Prefetch(batch, range(1, 7))) as batches:
    assert batches.error(0) is None and batches.error(3) is None
    assert made == [1, 2, 3]
    assert [batches.next() for _ in range(2)] == [1, 2]
    assert batches.error(1) is None and str(batches.error(2)) == "a, line 3: bad"
    assert batches.next() == 3
    assert refusals.refusal(batches.next) == "a, line 3: bad"
    assert batches.next() == 5 and batches.error(2) is None
  assert made == [*range(1, 7)]
  with contextlib.closing(feed.Prefetch(lambda step: 1 // step, range(0, 1))) as batches:
    with pytest.raises(ZeroDivisionError):
      batches.error(1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_hosts_stop_together_before_any_needs_a_bad_batch(steps):
  """Whichever of two hosts' batches are bad; a stop is agreed on one step after it is requested."""
  def batch_fn(bad):
    def batch(step):
      if step == bad:
        raise errors.InputError("bad")

    return batch

  for bad in itertools.product([None, *range(steps)], repeat=2):
    with contextlib.ExitStack() as stack:
      two = [
        stack.enter_context(contextlib.closing(feed.Prefetch(batch_fn(step), range(steps))))
        for step in bad
      ]
      requested = [any(batches.error(2) for batches in two)]
      taken = 0
      while taken < steps and not requested[max(taken - 1, 0)]:
        for batches in two:
          batches.next()  # raises where it is bad
        requested.append(any(batches.error(2) for batches in two))
        taken += 1
      failed = any(batches.error(2) for batches in two)
    first_bad = min((step for step in bad if step is not None), default=None)
    assert failed == (first_bad is not None)
    assert taken == (steps if first_bad is None else 0 if first_bad < 2 else first_bad), bad


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
    config, tokenizer, _always(example), dataclasses.replace(LIMITS, **limit), whole
  )
  message = refusals.refusal(feed_of(**limit).batch, 0)
  match = re.match("a, line 3: a sample " + words, message)
  assert match, message
  needed = {name: int(match[1]) for name in limit}
  feed_of(**needed).batch(0)
  message = refusals.refusal(feed_of(**{name: size - 1 for name, size in needed.items()}).batch, 0)
  assert re.match("a, line 3: a sample has ", message)


def test_too_many_images_of_a_microbatch(config, tokenizer):
  small = dataclasses.replace(LIMITS, images=4)
  message = refusals.refusal(
    _feed(config, tokenizer, _always(EXAMPLES["answer"]), small).batch, 0
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
  message = refusals.refusal(_feed(config, tokenizer, _always(example)).batch, 0)
  assert message.startswith("a, line 3: ") and words in message
