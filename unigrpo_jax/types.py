"""The data that flows, and the letters that name its axes.

B batch rows · M images (a multiple of the rows whose context they share) · T query length · S key
length · L layers · D model width · N query heads · K key-value heads · H head dim · F ffn width ·
V vocabulary · I image tokens · C features of a latent token · R images denoised per row · W window
steps.

Who sees whom is two integers, so no mask is ever stored. A key has an `order`, its place in the
sequence; a query has a `reach`, the last place it sees: it attends to the keys with
`order <= reach`. A text token reaches itself; every token of an image split reaches the split's
last token; a noisy image reaches the token before it, and its own tokens besides.
"""

from __future__ import annotations

from typing import Any

import chex
from flax import struct
import jax.numpy as jnp

# `order` of a key that nobody sees: padding, or a cache slot not yet written.
UNSEEN = 2**31 - 1
# `reach` of a query that sees everything there is.
EVERYTHING = UNSEEN - 1
# `order` of a noisy image's own tokens: every real query of that image sees them.
OWN = -1
# `reach` of a padded query; it sees nothing and its attention output is zero.
BLIND = -2


@struct.dataclass
class Tokens:
  """Tokens of one expert, on their way through the decoder.

  Attributes:
    x: embeddings, [B, T, D].
    position: RoPE position ids, [B, T] int32.
    order: place in the sequence as a key, [B, T] int32; `UNSEEN` for padding.
    reach: last place seen as a query, [B, T] int32; `BLIND` for padding.
  """

  x: chex.Array
  position: chex.Array
  order: chex.Array
  reach: chex.Array


@struct.dataclass
class Context:
  """A key-value cache with what its owner needs to go on: the past of B sequences.

  The slots are filled from the left, the same ones in every row; a row's padding leaves slots
  whose `order` is `UNSEEN`. The RoPE position and the cached length are independent counters: an
  image of n tokens fills n + 2 slots and advances the position by 1.

  Attributes:
    k: keys after head norm and RoPE, [L, B, S, K, H].
    v: values, [L, B, S, K, H].
    order: place of each key in its sequence, [B, S] int32; `UNSEEN` where there is none.
    position: next RoPE position id of each row, [B] int32.
    cursor: next free slot, [] int32.
    prefix: an earlier context of B / n sequences, each of which n consecutive rows continue
      without a copy of it; or None. Prefixes chain: each part is written once.
  """

  k: chex.Array
  v: chex.Array
  order: chex.Array
  position: chex.Array
  cursor: chex.Array
  prefix: Context | None = None

  @property
  def place(self) -> chex.Array:
    """Order of the next token, [] int32: slots count on from those of all ancestors."""
    return self.cursor + sum(part.order.shape[1] for part in self.parts[1:])

  @property
  def parts(self) -> tuple[Context, ...]:
    """The caches that hold the past: this one, its prefix, the prefix of that, and so on."""
    return (self,) if self.prefix is None else (self, *self.prefix.parts)

  def as_of(self, earlier: Mark) -> Context:
    """The same cache as it was at `earlier`: later entries are hidden, nothing is copied."""
    order = jnp.where(self.order < earlier.place, self.order, UNSEEN)
    prefix = None if self.prefix is None else self.prefix.as_of(earlier)
    return self.replace(order=order, position=earlier.position, prefix=prefix)

  def mark(self) -> Mark:
    """Remembers this moment for `as_of`."""
    return Mark(position=self.position, place=self.place)


@struct.dataclass
class Mark:
  """A moment in the life of a `Context`: `position` [B] int32 and `place` [] int32."""

  position: chex.Array
  place: chex.Array


@struct.dataclass
class TextRollout:
  """Sampled tokens of B rows, at most T of them each.

  Attributes:
    ids: sampled ids, [B, T] int32, the terminator included; 0 beyond a row's end.
    logp: their log-probabilities at the sampling temperature, [B, T] float32; 0 beyond the end.
    mask: True where a token was sampled, [B, T] bool.
    finished: True where the row ended by its terminator, [B] bool; False: cut at T tokens.
  """

  ids: chex.Array
  logp: chex.Array
  mask: chex.Array
  finished: chex.Array


@struct.dataclass
class FlowRollout:
  """Sampled images of B rows, and the W steps of each that were drawn from a Gaussian.

  Attributes:
    latents: the images, [B, I, C] float32. An image of the ODE has nothing else.
    x_t, x_next: latents before and after each step of the window, [B, W, I, C] float32.
    mean: of the Gaussian that `x_next` was drawn from, [B, W, I, C] float32.
    logp: log-density of the draw, a mean over latent elements, [B, W] float32.
    t, t_next: flow times of the step, [B, W] float32.
  """

  latents: chex.Array
  x_t: chex.Array | None = None
  x_next: chex.Array | None = None
  mean: chex.Array | None = None
  logp: chex.Array | None = None
  t: chex.Array | None = None
  t_next: chex.Array | None = None


@struct.dataclass
class LatentGrid:
  """The latent tokens of M images, padded to I tokens.

  Attributes:
    ids: rows of the latent position table, [M, I] int32.
    mask: True at real tokens, [M, I] bool.
  """

  ids: chex.Array
  mask: chex.Array


@struct.dataclass
class Patches:
  """The ViT patches of M images, padded to P patches.

  Attributes:
    pixels: normalised pixels in [-1, 1], [M, P, patch_dim] float32, features in (y, x, rgb) order.
    ids: rows of the ViT position tables, [M, P] int32.
    mask: True at real patches, [M, P] bool.
  """

  pixels: chex.Array
  ids: chex.Array
  mask: chex.Array


@struct.dataclass
class PackedBatch:
  """B training sequences of text, clean images and images to denoise.

  What later tokens may see lies in two streams, by expert; each image to denoise is a row of its
  own that sees its sequence up to `noisy_reach`. Padding has order `UNSEEN`, reach `BLIND` and
  mask False.

  Attributes:
    und_ids: text and marker ids of the understanding stream, [B, T] int32; any id at ViT places.
    und_position, und_order, und_reach: see `Tokens`, [B, T] int32.
    vit: patches of M images, or None.
    vit_row: batch row of each image, [M] int32.
    vit_slot: place of each patch in its row's understanding stream, [M, P] int32; T for padding.
    clean_latents: latent tokens of clean context images, [B, Tg, C] float32, or None.
    clean_ids, clean_position, clean_order, clean_reach: [B, Tg] int32.
    target: clean latents of the images to denoise, [B, R, I, C] float32, or None.
    noise: standard normal noise for them, [B, R, I, C] float32.
    t: flow time, 1 is noise, [B, R] float32.
    noisy_ids: rows of the latent position table, [B, R, I] int32.
    noisy_mask: True at real latent tokens, [B, R, I] bool.
    noisy_position: RoPE position of each image, [B, R] int32.
    noisy_reach: place of the last token each image sees, [B, R] int32; -1 for none.
    label_slot: understanding-stream place whose output predicts a label, [B, Y] int32.
    label_ids: what it should predict, [B, Y] int32.
    label_weight: weight of each label, [B, Y] float32; 0 for padding.
  """

  und_ids: chex.Array
  und_position: chex.Array
  und_order: chex.Array
  und_reach: chex.Array
  label_slot: chex.Array
  label_ids: chex.Array
  label_weight: chex.Array
  vit: Patches | None = None
  vit_row: chex.Array | None = None
  vit_slot: chex.Array | None = None
  clean_latents: chex.Array | None = None
  clean_ids: chex.Array | None = None
  clean_position: chex.Array | None = None
  clean_order: chex.Array | None = None
  clean_reach: chex.Array | None = None
  target: chex.Array | None = None
  noise: chex.Array | None = None
  t: chex.Array | None = None
  noisy_ids: chex.Array | None = None
  noisy_mask: chex.Array | None = None
  noisy_position: chex.Array | None = None
  noisy_reach: chex.Array | None = None


@struct.dataclass
class Text:
  """Text that is read.

  Attributes:
    ids: [B, T] int32, with the markers around it.
    mask: True at real tokens, [B, T] bool.
  """

  ids: chex.Array
  mask: chex.Array


@struct.dataclass
class Seen:
  """Images that are looked at, one a row: clean latents, ViT patches, or both.

  Attributes:
    latents: [B, I, C] float32, or None.
    grid: of the latents, or None.
    patches: or None.
  """

  latents: chex.Array | None = None
  grid: LatentGrid | None = None
  patches: Patches | None = None


@struct.dataclass
class Round:
  """What the policy did in one round of B trajectories: it thought, then drew.

  Attributes:
    text: its sampled tokens, or None.
    flow: the recorded steps of its image, or None.
    given: text that was read before, a user's turn; None in the first round, whose is the prompt.
    seen: its picture as the next round looks at it; None after the last round.
    velocity_ref: the reference's velocities at the recorded steps, [B, W, I, C] float32, or None.
    logp_ref: its log-probabilities of the sampled tokens, [B, T] float32, or None.
    noise: for objectives that noise the finished image again, [B, W, I, C] float32; `flow.x_t` and
      `flow.t` are then those of the noised image. None otherwise.
  """

  text: TextRollout | None
  flow: FlowRollout | None
  given: Text | None = None
  seen: Seen | None = None
  velocity_ref: chex.Array | None = None
  logp_ref: chex.Array | None = None
  noise: chex.Array | None = None


@struct.dataclass
class Experience:
  """What B trajectories of P prompts leave to learn from.

  Attributes:
    prompt: of P prompts, each serving B / P consecutive trajectories.
    source: an image that each prompt comes with, P rows; or None.
    rounds: what the policy did, in order; one round is thinking and drawing once.
    adv: advantage of each trajectory, [B] float32.
    valid: False where a reward failed: the trajectory's group counts nowhere, [B] bool.
  """

  prompt: Text
  source: Seen | None
  rounds: tuple[Round, ...]
  adv: chex.Array
  valid: chex.Array

  @property
  def only(self) -> Round:
    """The round of an experience that has one."""
    [only] = self.rounds
    return only

  def with_only(self, **changes: Any) -> Experience:
    """The same with fields of its only round replaced."""
    return self.replace(rounds=(self.only.replace(**changes),))


@struct.dataclass
class TrainState:
  """All that training changes, and what it must not lose.

  Attributes:
    step: optimizer steps taken, [] int32.
    params: of the network, float32.
    opt_state: of the optimizer.
    ema: moving average of the parameters, or None.
    reference: the parameters that a regulariser holds the policy to, or None.
  """

  step: chex.Array
  params: Any
  opt_state: Any
  ema: Any
  reference: Any = None

  @property
  def averaged(self) -> Any:
    """The parameters to evaluate and export: their moving average where one is kept."""
    return self.params if self.ema is None else self.ema
