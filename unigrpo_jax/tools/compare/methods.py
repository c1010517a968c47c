"""The methods that are compared, and the rows of the paper's two tables.

UniGRPO (arXiv 2603.23500), Tables 1 and 2. The paper's column "Thinking" is taken as how a
checkpoint is evaluated: Bagel and SFT are not trained by reinforcement, and ReFL has a row of its
own for training with thinking.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

BAGEL, SFT = "Bagel", "SFT"
UNIGRPO, UNIFPO = "UniGRPO", "UniFPO"


@dataclasses.dataclass(frozen=True)
class Method:
  """How a checkpoint is trained.

  Attributes:
    config: name of its config file, without ".py".
    thinks: whether it reasons before drawing during training.
    variants: of the config, besides those shared by all methods.
    start: method whose last checkpoint it starts from; "": the start shared by all methods.
    share: its iterations as a multiple of the config's.
    overrides: `--config.KEY=VALUE`.
    rate: factor of its learning rates, besides the sweep's.
    guided: whether its validation has a second mode, with guidance.
  """

  config: str
  thinks: bool
  variants: Sequence[str] = ()
  start: str = ""
  share: float = 1.0
  overrides: Sequence[str] = ()
  rate: float = 1.0
  guided: bool = False

  @property
  def modes(self) -> tuple[str, ...]:
    """Modes of its validation; the first one decides which checkpoint is the best."""
    mode = "think" if self.thinks else "plain"
    return (mode, f"{mode}+guidance") if self.guided else (mode,)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the tables: a checkpoint, evaluated with or without thinking."""

  name: str
  trained: str  # the checkpoint: of a method, `BAGEL` or `SFT`
  thinks: bool  # during the evaluation


REFL_THINK = "ReFL (w/ Thinking)"
REFL_TEXT = f"{REFL_THINK} + TextGRPO"
REFL_HALF = f"{REFL_THINK}, half the iterations"
REFL_LONG = f"{REFL_THINK} without regulariser, three times the iterations"

METHODS = {
  "ReFL": Method("refl", False),
  "FPO": Method("unigrpo", False, ("fpo",)),
  "FlowGRPO": Method("flow_grpo", False, ("no_think",)),
  "TextGRPO": Method("text_grpo", True),
  REFL_THINK: Method("refl", True, ("think",)),
  REFL_TEXT: Method("text_grpo", True, start=REFL_THINK),
  UNIFPO: Method("unigrpo", True, ("unifpo",)),
  UNIGRPO: Method("unigrpo", True, guided=True),
}

# Methods that are not in the paper; their rows come last.
EXTRAS = {
  "FlowGRPO trained with thinking": Method("flow_grpo", True),
  "AWM": Method("unigrpo", False, ("awm",)),
  "ReFL, margin 0.95": Method("refl", False, overrides=("--config.refl.margin=0.95",)),
  REFL_HALF: Method("refl", True, ("think",), share=0.5),
  "ReFL (w/ Thinking) + TextGRPO, half each": Method(
    "text_grpo", True, start=REFL_HALF, share=0.5
  ),
  # Its regulariser only measures how far it goes.
  REFL_LONG: Method(
    "refl", True, ("think",), share=3.0, overrides=("--config.flow.regulariser_weight=0",)
  ),
  "UniFPO, learning rates / 3": Method("unigrpo", True, ("unifpo",), rate=1 / 3),
  "UniFPO, learning rates / 10": Method("unigrpo", True, ("unifpo",), rate=1 / 10),
  "UniFPO with an anchor": Method(
    "unigrpo", True, ("unifpo",), overrides=("--config.flow.anchor_weight=1.0",)
  ),
  "UniGRPO trained with guidance": Method("unigrpo", True, ("cfg",), guided=True),
  "UniGRPO, latent KL": Method("unigrpo", True, ("latent_kl",)),
  "UniGRPO without regulariser": Method("unigrpo", True, ("no_regulariser",)),
}
ALL = METHODS | EXTRAS

ROWS = (
  *(Row(name, name, thinks) for name in (BAGEL, SFT, "ReFL", "FPO", "FlowGRPO")
    for thinks in (False, True)),
  Row("TextGRPO", "TextGRPO", True),
  Row(REFL_THINK, REFL_THINK, True),
  Row("… + TextGRPO", REFL_TEXT, True),
  Row(UNIFPO, UNIFPO, True),
  Row(UNIGRPO, UNIGRPO, True),
)


def extra_rows(names: Sequence[str]) -> tuple[Row, ...]:
  """The rows of `EXTRAS`: with thinking, and also without where it is trained without."""
  return tuple(
    Row(name, name, thinks) for name in names for thinks in (False, True)
    if thinks or not EXTRAS[name].thinks
  )


def with_starts(names: Sequence[str]) -> list[str]:
  """The methods `names`, each preceded by those that it starts from."""
  made: list[str] = []
  for name in names:
    chain = [name]
    while ALL[chain[0]].start:
      chain.insert(0, ALL[chain[0]].start)
    made += [step for step in chain if step not in made]
  return made


def without_gradient() -> list[str]:
  """The methods of the tables that, with their starts, need no gradient of the reward."""
  return [
    name for name in METHODS if not any(ALL[each].config == "refl" for each in with_starts([name]))
  ]


def evaluated_modes(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
  """The modes in which a checkpoint is evaluated for its rows, with and without guidance."""
  kinds = dict.fromkeys("think" if row.thinks else "plain" for row in rows if row.trained == name)
  return tuple(mode for kind in kinds for mode in (f"{kind}+guidance", kind))


def slug(name: str) -> str:
  """The name of a method in names of files and folders."""
  words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
  return "_".join(words)
