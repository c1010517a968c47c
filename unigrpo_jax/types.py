"""The data that flows, and the letters that name its axes.

B batch rows (trajectories) · P prompts · M images (a multiple of the rows whose context they share)
T query length, or sampled tokens · S key length · L layers · D model width · N query heads
K key-value heads · H head dim · F ffn width · V vocabulary · Y labels or tokens of a row
I image tokens · C features of a latent token · R images denoised per row · W window steps
"""

from __future__ import annotations

from typing import Any

import chex
from flax import struct
import jax.numpy as jnp

# Who sees whom is two integers, so no mask is ever stored. A key has an `order`, its place in the
# sequence; a query has a `reach`, the last place it sees: it attends to the keys with
# `order <= reach`. A text token reaches itself; every token of an image split reaches the split's
# last token; a noisy image reaches the token before it, and its own tokens besides.

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
  """Tokens of one expert, on their way through the decoder."""

  x: chex.Array  # embeddings, [B, T, D]
  position: chex.Array  # RoPE position ids, [B, T] int32
  order: chex.Array  # place in the sequence as a key, [B, T] int32; `UNSEEN` for padding
  reach: chex.Array  # last place seen as a query, [B, T] int32; `BLIND` for padding


@struct.dataclass
class Context:
  """A key-value cache with what its owner needs to go on: the past of B sequences.

  The slots are filled from the left, the same ones in every row; a row's padding leaves slots
  whose `order` is `UNSEEN`. The RoPE position and the cached length are independent counters: an
  image of n tokens fills n + 2 slots and advances the position by 1.
  """

  k: chex.Array  # keys after head norm and RoPE, [L, B, K, S, H]
  v: chex.Array  # [L, B, K, S, H]
  order: chex.Array  # place of each key in its sequence, [B, S] int32; `UNSEEN` where there is none
  position: chex.Array  # next RoPE position id of each row, [B] int32
  cursor: chex.Array  # next free slot, [] int32
  # An earlier context of B / n sequences, each of which n consecutive rows continue without a copy
  # of it. Prefixes chain: each part is written once.
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
  """Sampled tokens of B rows, at most T of them each."""

  ids: chex.Array  # [B, T] int32, the terminator included; 0 beyond a row's end
  logp: chex.Array  # at the sampling temperature, [B, T] float32; 0 beyond the end
  mask: chex.Array  # True where a token was sampled, [B, T] bool
  finished: chex.Array  # True where the row ended by its terminator, [B] bool; False: cut at T
  # Where they are asked for: the K likeliest ids before each sampled token, and their
  # log-probabilities at temperature 1, [B, T, K] int32 and float32; without meaning beyond the end.
  top_ids: chex.Array | None = None
  top_logp: chex.Array | None = None


@struct.dataclass
class FlowRollout:
  """Sampled images of B rows, and W steps of each: of the SDE or the ODE, or of noising it again.

  Only steps of the SDE have `x_next`, `mean` and `logp`; they and direct alignment have `t_next`.
  """

  latents: chex.Array  # the images, [B, I, C] float32; without a window there is nothing else
  x_t: chex.Array | None = None  # latents before each step of the window, [B, W, I, C] float32
  x_next: chex.Array | None = None  # and after it, a draw from a Gaussian
  mean: chex.Array | None = None  # of the Gaussian that `x_next` was drawn from, likewise
  # Log-density of the draw, a mean over elements, [B, W] float32; ratios are of means instead.
  logp: chex.Array | None = None
  t: chex.Array | None = None  # flow time of each step, [B, W] float32
  t_next: chex.Array | None = None


@struct.dataclass
class LatentGrid:
  """The latent tokens of M images, padded to I tokens."""

  ids: chex.Array  # rows of the latent position table, [M, I] int32
  mask: chex.Array  # True at real tokens, [M, I] bool


@struct.dataclass
class Patches:
  """The ViT patches of M images, padded to P patches."""

  pixels: chex.Array  # in [-1, 1], [M, P, patch_dim] float32, features in (y, x, rgb) order
  ids: chex.Array  # rows of the ViT position tables, [M, P] int32
  mask: chex.Array  # True at real patches, [M, P] bool


@struct.dataclass
class PackedBatch:
  """B training sequences of text, clean images and images to denoise.

  What later tokens may see lies in two streams, by expert; each image to denoise is a row of its
  own that sees its sequence up to `noisy_reach`. Padding has order `UNSEEN`, reach `BLIND` and
  mask False.
  """

  # The understanding stream, [B, T] int32 each; see `Tokens`.
  und_ids: chex.Array  # text and marker ids; any id at ViT places
  und_position: chex.Array
  und_order: chex.Array
  und_reach: chex.Array
  # Labels, [B, Y].
  label_slot: chex.Array  # understanding-stream place whose output predicts the label, int32
  label_ids: chex.Array  # int32
  label_weight: chex.Array  # float32; 0 for padding
  # ViT patches of M images.
  vit: Patches | None = None
  vit_row: chex.Array | None = None  # batch row of each image, [M] int32
  vit_slot: chex.Array | None = None  # place of each patch in its row, [M, P] int32; T for padding
  # Clean context images: the generation stream, [B, Tg] int32 but for the latents.
  clean_latents: chex.Array | None = None  # [B, Tg, C] float32
  clean_ids: chex.Array | None = None  # rows of the latent position table
  clean_position: chex.Array | None = None
  clean_order: chex.Array | None = None
  clean_reach: chex.Array | None = None
  # R images to denoise per row.
  target: chex.Array | None = None  # clean latents, [B, R, I, C] float32
  noise: chex.Array | None = None  # standard normal, [B, R, I, C] float32
  t: chex.Array | None = None  # flow time, 1 is noise, [B, R] float32
  noisy_ids: chex.Array | None = None  # rows of the latent position table, [B, R, I] int32
  noisy_mask: chex.Array | None = None  # True at real latent tokens, [B, R, I] bool
  noisy_position: chex.Array | None = None  # RoPE position of each image, [B, R] int32
  noisy_reach: chex.Array | None = None  # place of the last token it sees, [B, R] int32; -1: none


@struct.dataclass
class Text:
  """Text that is read."""

  ids: chex.Array  # [B, T] int32, with the markers around it
  mask: chex.Array  # True at real tokens, [B, T] bool


@struct.dataclass
class Seen:
  """Images that are looked at, one a row: clean latents, ViT patches, or both."""

  latents: chex.Array | None = None  # [B, I, C] float32
  grid: LatentGrid | None = None  # of the latents
  patches: Patches | None = None


@struct.dataclass
class Round:
  """What the policy did in one round of B trajectories: it thought, then drew."""

  text: TextRollout | None
  flow: FlowRollout | None  # with the recorded steps
  given: Text | None = None  # a user's turn, read before; None in the first round, after the prompt
  seen: Seen | None = None  # its picture as the next round looks at it; None after the last round
  velocity_ref: chex.Array | None = None  # of the reference, at the steps, [B, W, I, C] float32
  logp_ref: chex.Array | None = None  # of the reference, of the sampled tokens, [B, T] float32
  velocity_anchor: chex.Array | None = None  # of the anchor, likewise
  # What ratios are taken of where it is computed again: `base.Values`. None: as it was sampled.
  old: Any = None
  # Of objectives that noise the finished image again, [B, W, I, C] float32; `flow.x_t` and `flow.t`
  # are then those of the noised image.
  noise: chex.Array | None = None


@struct.dataclass
class Experience:
  """What B trajectories of P prompts leave to learn from."""

  prompt: Text  # P prompts, each serving B / P consecutive trajectories
  source: Seen | None  # an image that each prompt comes with, P rows
  rounds: tuple[Round, ...]  # in order
  # Advantage of each trajectory, [B] float32; None as long as rewards are computed.
  adv: chex.Array | None = None
  # False where a reward failed: the whole group counts nowhere, [B] bool; likewise.
  valid: chex.Array | None = None
  question: Any = None  # what a differentiable reward is asked about each trajectory, B rows

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
  """All that training changes, and what it must not lose."""

  step: chex.Array  # optimizer steps taken, [] int32
  params: Any  # of the network, float32; what lies under adapters, in its dtype
  opt_state: Any
  ema: Any  # moving average of the parameters, or None
  reference: Any = None  # the parameters that a regulariser holds the policy to, or None
  # Moving average of the parameters that the flow trains, with None in the others' places; or None.
  anchor: Any = None

  @property
  def averaged(self) -> Any:
    """The parameters to evaluate and export: their moving average where one is kept."""
    return self.params if self.ema is None else self.ema
