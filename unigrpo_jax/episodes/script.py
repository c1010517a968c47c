"""A trajectory is a static script of segments; requests and the policy fill in the arrays.

  draw    prompt // image                      think, draw   system prompt // text image
  edit    [system] source prompt // [text] image      answer   [system] [source] prompt // text

The segments before `//` are the same for all trajectories of a group and are read once. Those in
brackets are optional.
"""

from __future__ import annotations

import dataclasses

# Names of given texts and seen images. The sampler and the replay follow the same scripts: a new
# kind of trajectory is a new script, not a new code path.
SYSTEM, PROMPT, REASONING, SOURCE = "system", "prompt", "reasoning", "source"


@dataclasses.dataclass(frozen=True)
class Given:
  """Text that the network reads; `name` is its key in `programs.Inputs.texts`."""

  name: str


@dataclasses.dataclass(frozen=True)
class Seen:
  """An image that the network looks at; `name` is its key in `programs.Inputs.images`."""

  name: str
  latents: bool  # as clean VAE latents, through the generation expert
  patches: bool  # as ViT patches, through the understanding expert


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Text that the policy samples."""


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An image that the policy denoises; later segments do not see its noisy latents."""


Segment = Given | Seen | Sampled | Drawn


@dataclasses.dataclass(frozen=True)
class Script:
  """What a trajectory consists of, in order."""

  shared: tuple[Segment, ...]  # read once for all trajectories of a group; Given and Seen only
  own: tuple[Segment, ...]  # each trajectory's own

  @property
  def segments(self) -> tuple[Segment, ...]:
    return self.shared + self.own

  def has(self, segment: Segment | type) -> bool:
    """Whether the script contains this segment, or any segment of this class."""
    return any(part == segment or type(part) is segment for part in self.segments)


def make(
  *, think: bool, answer: bool = False, source: bool = False, reasoning: bool = False
) -> Script:
  """The script of one round.

  Args:
    think: the system prompt asks for a reasoning, which is sampled or given.
    answer: the policy answers in words instead of drawing.
    source: an image is given, to be edited or to be asked about.
    reasoning: the reasoning is given instead of sampled; needs `think`.
  """
  shared: list[Segment] = [Given(SYSTEM)] if think else []
  if source:
    # Questions are answered through the ViT alone, as BAGEL does.
    shared.append(Seen(SOURCE, latents=not answer, patches=True))
  shared.append(Given(PROMPT))
  if reasoning:
    shared.append(Given(REASONING))
  own: list[Segment] = [Sampled()] if answer or (think and not reasoning) else []
  return Script(tuple(shared), (*own, *[Drawn()] * (not answer)))
