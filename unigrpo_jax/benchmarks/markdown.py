"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table with the column titles `head` and one line per row; no newline at the end."""
  return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
