"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A line for the head, one below it, and one a row; without a newline at the end."""
  return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
