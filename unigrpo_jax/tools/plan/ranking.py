"""The results of a search as text: the ranking, the arguments of the best, and what was dropped."""

from __future__ import annotations

from collections.abc import Sequence

from unigrpo_jax.tools.plan import chips, page, search

_RESOURCES = ("compute", "hbm", "interconnect")


def render(
  topology: str, candidates: Sequence[search.Result], dropped: Sequence[search.Result],
  config_point: search.Point,
) -> str:
  """The page about a topology.

  Args:
    topology: its name.
    candidates: whole iterations, the best first.
    dropped: points that were dropped, with reasons.
    config_point: the point of the config itself, which the ranking marks.
  """
  lines = [f"{topology}: {len(candidates)} candidates", ""]
  if candidates:
    lines += _ranking(candidates, config_point)
    lines += _to_paste(candidates)
  else:
    lines += ["none fits and is not refused; give the search other values, or more chips", ""]
  if dropped:
    lines += ["dropped", *(f"  {search.describe(r.point)}: {r.reason}" for r in dropped), ""]
  return "\n".join(line.rstrip() for line in lines)


def losses(candidates: Sequence[search.Result]) -> list[tuple[float, float]]:
  """By what share each candidate is slower than the best: (by max, by sum), see `search.measure`.
  """
  best = [min(result.times[measure] for result in candidates) for measure in (0, 1)]
  return [
    (result.times[0] / best[0] - 1, result.times[1] / best[1] - 1) for result in candidates
  ]


def _ranking(candidates, config_point) -> list[str]:
  names = list(candidates[0].point)
  rows = [(
    "", *names, "max", "loses", "sum", "loses", "compute", "HBM", "interconnect", "peak GiB"
  )]
  for number, (result, lost) in enumerate(zip(candidates, losses(candidates)), 1):
    phases = result.figures["phases"].values()
    totals = [sum(phase["times"][name] for phase in phases) for name in _RESOURCES]
    seconds = [
      text for value, loss in zip(result.times, lost)
      for text in (f"{value:.4g}", f"{loss:.1%}" if loss else "best")
    ]
    mark = "*" if dict(result.point) == dict(config_point) else ""
    rows.append((
      f"{number}{mark}", *(str(result.point[name]) for name in names), *seconds,
      *(f"{total:.4g}" for total in totals),
      f"{max(result.figures['peak'].values()) / chips.GIB:.2f}",
    ))
  marked = "; * is the config as it is" if any("*" in row[0] for row in rows) else ""
  return [
    "seconds of an iteration at the chip's peak figures, without decoding images: max, where",
    "compute, HBM and interconnect overlap in each phase, and sum, where they do not; ordered by",
    f"the mean of both{marked}",
    *page.table(*rows), "",
  ]


def _to_paste(candidates) -> list[str]:
  """The arguments of the best candidate, and of those that are best by max or by sum."""
  lost = losses(candidates)
  lines = []
  for place, result in enumerate(candidates):
    titles = [f"best by {name}" for name, loss in zip(("max", "sum"), lost[place]) if not loss]
    if place == 0 or titles:
      slower = [
        f"loses {loss:.1%} by {name}" for name, loss in zip(("max", "sum"), lost[place]) if loss
      ]
      words = ["best by the mean of both"] * (place == 0) + titles + slower
      lines += [f"{', '.join(words)}:", *(f"  {a}" for a in search.overrides(result.point)), ""]
  return lines
