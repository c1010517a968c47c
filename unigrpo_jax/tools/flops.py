"""Model FLOPs of BAGEL by formula, from its sizes alone.

A product of an [a, b] and a [b, c] matrix is 2abc FLOPs. Only matrix products count. Embedding
look-ups, norms, rotary embeddings, softmax, activations, the VAE, the ViT, keys that a query does
not attend to, and repeated work such as recomputed activations do not.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
from typing import Any

PARTS = ("und", "gen", "text", "latent")  # Parameter groups that are counted; see `optim.GROUPS`.
TIME_FEATURES = 256  # Features of a flow time, the input of its embedder (`layers.time_features`).


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
  """FLOPs of a forward pass, by parameter group; supports + and * by an integer."""

  und: int = 0  # weights of the understanding expert
  gen: int = 0  # weights of the generation expert
  text: int = 0  # the language head
  latent: int = 0  # embeddings of latents and times, and the velocity head
  attention: int = 0  # queries with keys, and probabilities with values; has no parameters

  def __add__(self, other: Work) -> Work:
    return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, count: int) -> Work:
    return Work(*(count * a for a in dataclasses.astuple(self)))

  __rmul__ = __mul__

  @property
  def forward(self) -> int:
    """FLOPs of the forward pass."""
    return sum(dataclasses.astuple(self))

  def backward(self, trained: Collection[str] = PARTS) -> int:
    """FLOPs of the backward pass: 2 x forward where everything is trained.

    y = x W has two products of the forward's size: one for the gradient of x, one for that of W. A
    part that is not in `trained` skips the second, but not the first: gradients pass through a
    frozen expert on their way to a trained one, since both share every softmax. Attention's two
    products become four. Do not call this for work on which no trained parameter depends, such as a
    text context when only the generation expert is trained: it has no backward pass.
    """
    if unknown := set(trained) - set(PARTS):
      raise ValueError(f"{sorted(unknown)} are none of {PARTS}")
    return self.forward + self.attention + sum(getattr(self, part) for part in trained)

  def update(self, trained: Collection[str] = PARTS) -> int:
    """FLOPs of the forward and the backward pass."""
    return self.forward + self.backward(trained)


def attend(sizes: Sizes, pairs: int) -> Work:
  """Attention over `pairs` of a query and a key that it attends to: 4 L N H per pair."""
  return Work(attention=4 * sizes.layers * sizes.heads * sizes.head_dim * pairs)


def causal_pairs(queries: int, context: int = 0) -> int:
  """Pairs of query and key of T causal tokens after a context of S tokens: T S + T (T + 1) / 2."""
  return queries * context + queries * (queries + 1) // 2


def text(sizes: Sizes, tokens: int, *, context: int = 0, scored: int = 0) -> Work:
  """T causal text tokens through the understanding expert, after a context of S tokens.

  Prefill and decoding token by token cost the same. `scored` is the number of tokens whose logits
  are computed, at 2 D V each: all in teacher forcing, none in a prefill.
  """
  return (
    Work(und=2 * sizes.expert * tokens, text=2 * sizes.width * sizes.vocab * scored)
    + attend(sizes, causal_pairs(tokens, context))
  )


def decode(sizes: Sizes, tokens: int, *, context: int) -> Work:
  """T tokens decoded after a context of S: each is an input once, and has its logits computed."""
  return text(sizes, tokens, context=context, scored=tokens)


def velocity(sizes: Sizes, latents: int, *, context: int) -> Work:
  """One velocity of one image: I latent tokens and 2 markers over a context of S tokens.

  The markers pass through the understanding expert and the latents through the generation expert;
  all I + 2 attend to the context and to each other. Each latent has projections C -> D and D -> C,
  the time 256 -> D -> D once. The markers are counted in every layer, though their output of the
  last layer is not used.
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
