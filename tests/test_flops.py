"""FLOPs: worked by hand, consistent with each other, and close to what XLA counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from unigrpo_jax import types
from unigrpo_jax.models import bagel
from unigrpo_jax.models import config as config_lib
from unigrpo_jax.runtime import optim
from unigrpo_jax.tools import flops

# Small enough to work by hand: one expert has 2 * (2*4*(2+1)*2 + 3*4*5) = 2 * 108 weights.
SIZES = flops.Sizes(
  layers=2, width=4, heads=2, kv_heads=1, head_dim=2, ffn=5, vocab=10, latent=3
)


def test_weights_of_an_expert_and_of_the_released_one():
  assert SIZES.expert == 216
  release = flops.Sizes(28, 3584, 28, 4, 128, 18944, 152064, 64)
  # Qwen2.5-7B has 7.62e9 parameters, 2 x 152,064 x 3,584 of them in its embedding and head; the
  # rest is products but for biases and norms.
  assert release.expert == pytest.approx(7_615_616_512 - 2 * 152_064 * 3_584, rel=1e-4)


def test_text_by_hand():
  """3 tokens after 5, one scored: 432 x 3; pairs 6 + 7 + 8 at 4 x 2 x 2 x 2; 2 x 4 x 10."""
  assert flops.causal_pairs(3, 5) == 6 + 7 + 8
  work = flops.text(SIZES, 3, context=5, scored=1)
  assert work == flops.Work(und=1296, attention=21 * 32, text=80)
  assert work.forward == 1296 + 672 + 80


def test_velocity_by_hand():
  """4 latents and 2 markers over 5: 6 x 11 pairs; 3 -> 4 and 4 -> 3 each; 256 -> 4 -> 4 once."""
  assert flops.velocity(SIZES, 4, context=5) == flops.Work(
    und=2 * 432, gen=4 * 432, latent=4 * (24 + 24) + 2 * (1024 + 16), attention=66 * 32
  )


def test_writing_one_after_the_other_costs_what_reading_at_once_does():
  one_by_one = flops.Work()
  for place in range(7):
    one_by_one += flops.text(SIZES, 1, context=5 + place, scored=1)
  assert one_by_one == flops.decode(SIZES, 7, context=5)


def test_backward_is_twice_forward_and_a_frozen_part_skips_its_weights():
  work = flops.velocity(SIZES, 4, context=5)
  assert work.backward() == 2 * work.forward
  assert work.backward(()) == work.forward + work.attention
  assert work.backward(("gen",)) == work.forward + work.attention + work.gen
  assert work.update() == 3 * work.forward
  with pytest.raises(ValueError, match="vit"):
    work.backward(("vit",))


def test_a_reading_is_the_sum_of_its_parts():
  """12 tokens read or written, 7 of them scored."""
  prompt, reasoning = flops.text(SIZES, 5), flops.decode(SIZES, 7, context=5)
  assert prompt + reasoning == flops.text(SIZES, 12, scored=7)


def test_parts_are_groups_of_the_optimizer():
  assert set(flops.PARTS) <= set(optim.GROUPS)


# What XLA counts, norms and softmax included: 1 % more here. One layer, since it counts the body of
# a scan once.


@pytest.fixture(scope="module")
def one_layer(config):
  """The golden network with one layer, and sizes that leave products most of the work."""
  llm = dataclasses.replace(
    config.llm, num_layers=1, hidden_size=256, intermediate_size=768, num_heads=4, num_kv_heads=2,
    vocab_size=1024,
  )
  return dataclasses.replace(config, llm=llm)


def _counted(config, method, rows, capacity, *arguments, **options):
  """FLOPs that XLA counts in the compiled method; nothing is run."""
  model = bagel.Bagel(config, (1, 2), dtype=jnp.float32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), bagel.example_batch(config))
  params = jax.tree.map(
    lambda leaf: leaf.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names")
  )
  context = jax.eval_shape(lambda: bagel.empty_context(config, rows, capacity, jnp.float32))
  call = jax.jit(functools.partial(model.apply, method=method, **options))
  return call.lower(params, context, *arguments).compile().cost_analysis()["flops"]


def _shape(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("rows, tokens, capacity", [(1, 64, 64), (2, 32, 128)])
def test_text_is_what_xla_counts(one_layer, rows, tokens, capacity):
  """The program scores every slot of the cache and every new token, and masks what is unseen."""
  counted = _counted(
    one_layer, "append_text", rows, capacity, _shape(rows, tokens, dtype=jnp.int32),
    _shape(rows, tokens, dtype=jnp.bool_),
  )
  sizes = flops.Sizes.of(one_layer)
  formula = flops.text(sizes, tokens)
  computed = dataclasses.replace(
    formula, attention=flops.attend(sizes, tokens * (capacity + tokens)).attention
  )
  assert 1 < counted / (rows * computed.forward) < 1.02
  assert formula.attention < computed.attention


@pytest.mark.parametrize("images, latents, capacity", [(1, 64, 48), (3, 100, 16)])
def test_velocity_is_what_xla_counts(one_layer, images, latents, capacity):
  integers = _shape(images, latents, dtype=jnp.int32)
  counted = _counted(
    one_layer, "velocity", images, capacity, _shape(images, latents, one_layer.latent_dim),
    _shape(images), types.LatentGrid(integers, _shape(images, latents, dtype=jnp.bool_)),
    # Else XLA drops what the last layer makes of the markers: 0.5 to 1.4 % less than the formula.
    return_hidden=True,
  )
  formula = images * flops.velocity(flops.Sizes.of(one_layer), latents, context=capacity)
  assert 1 < counted / formula.forward < 1.02


def test_sizes_are_read_from_a_config(config):
  sizes = flops.Sizes.of(config)
  assert sizes.head_dim * sizes.heads == sizes.width == config.llm.hidden_size
  assert sizes.latent == config.latent_dim and isinstance(config, config_lib.BagelConfig)
