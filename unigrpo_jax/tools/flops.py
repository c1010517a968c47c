"""Model FLOPs of BAGEL by formula, from its sizes alone.

A product of an [a, b] and a [b, c] matrix is 2abc FLOPs. Only products count: embedding look-ups,
norms, rotary angles, softmax and activations do not, nor do the VAE and the ViT, keys that a query
may not see, and work done again, such as activations recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
from typing import Any

PARTS = ("und", "gen", "text", "latent")  # Groups that take part, as in `optim.GROUPS`.
TIME_FEATURES = 256  # Of a flow time before its embedder (`layers.time_features`).


@dataclasses.dataclass(frozen=True)
class Sizes:
  """L layers, D width, N query heads, K key-value heads, H head dim, F ffn width, V vocabulary, and
  C features of a latent token."""

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  vocab: int
  latent: int

  @classmethod
  def of(cls, config: Any) -> Sizes:
    """Sizes of a `models.config.BagelConfig`."""
    llm = config.llm
    return cls(
      llm.num_layers, llm.hidden_size, llm.num_heads, llm.num_kv_heads, llm.head_dim,
      llm.intermediate_size, llm.vocab_size, config.latent_dim,
    )

  @property
  def expert(self) -> int:
    """Weights of one expert: L (2 D N H + 2 D K H + 3 D F), for q and o, k and v, and the MLP."""
    attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
    return self.layers * (attention + 3 * self.width * self.ffn)


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs of a forward pass, by the weights that cause them; can be added and multiplied."""

  und: int = 0  # of the products with an expert's weights
  gen: int = 0
  text: int = 0  # of the language head
  latent: int = 0  # of the latents' and time's embedding and of the velocity head
  attention: int = 0  # of queries with keys and of weights with values; it has no parameters

  def __add__(self, other: Work) -> Work:
    return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, count: int) -> Work:
    return Work(*(count * a for a in dataclasses.astuple(self)))

  __rmul__ = __mul__

  @property
  def forward(self) -> int:
    """All of it."""
    return sum(dataclasses.astuple(self))

  def backward(self, trained: Collection[str] = PARTS) -> int:
    """FLOPs of the backward pass: 2 x forward where everything is trained.

    y = x W needs two products of the forward's size: one for the gradient of x, one for that of W.
    A part that is not in `trained` skips the second. The first is kept: gradients pass through a
    frozen expert on their way to a trained one, since both share every softmax. Attention's two
    products become four. Work on which no trained parameter depends (a context of text, when only
    the generation expert is trained) has no backward pass: do not call this on it.
    """
    if unknown := set(trained) - set(PARTS):
      raise ValueError(f"{sorted(unknown)} are none of {PARTS}")
    return self.forward + self.attention + sum(getattr(self, part) for part in trained)

  def update(self, trained: Collection[str] = PARTS) -> int:
    """Forward and backward."""
    return self.forward + self.backward(trained)


def attend(sizes: Sizes, pairs: int) -> Work:
  """Attention over `pairs` of a query and a key that it sees: 4 L N H a pair."""
  return Work(attention=4 * sizes.layers * sizes.heads * sizes.head_dim * pairs)


def causal_pairs(queries: int, context: int = 0) -> int:
  """Pairs of T causal queries after S tokens: T S + T (T + 1) / 2."""
  return queries * context + queries * (queries + 1) // 2


def text(sizes: Sizes, tokens: int, *, context: int = 0, scored: int = 0) -> Work:
  """T causal text tokens through the understanding expert, after a context of S tokens.

  Prefill and decoding one by one cost the same. `scored` are the tokens whose logits are computed,
  2 D V each: N in teacher forcing, none in a prefill.
  """
  return (
    Work(und=2 * sizes.expert * tokens, text=2 * sizes.width * sizes.vocab * scored)
    + attend(sizes, causal_pairs(tokens, context))
  )


def decode(sizes: Sizes, tokens: int, *, context: int) -> Work:
  """N tokens decoded after a context of S: each is fed once and scored once."""
  return text(sizes, tokens, context=context, scored=tokens)


def velocity(sizes: Sizes, latents: int, *, context: int) -> Work:
  """One velocity of one image: I latent tokens and 2 markers over a context of S tokens.

  The markers pass the understanding expert and the latents the generation expert; all I + 2 see
  the context and each other. C -> D and D -> C for every latent; 256 -> D -> D for the time, once.
  The markers are counted in every layer, though nothing uses their output of the last one.
  """
  queries = latents + 2
  time = 2 * (TIME_FEATURES * sizes.width + sizes.width**2)
  return (
    Work(
      und=2 * sizes.expert * 2, gen=2 * sizes.expert * latents,
      latent=4 * sizes.latent * sizes.width * latents + time,
    )
    + attend(sizes, queries * (context + queries))
  )
